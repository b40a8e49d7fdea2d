"""Checkpoints on the command lines: the published one in all its forms (at small size, its sizes being those of the
compact fixtures), fine-tuning from it and from our own, and files that are something else."""

import dataclasses
import json
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from test_model import OnMeta
from test_parity import HERE, compact_weights, published_model, published_preset, read
from test_train import ROOT, run, scenes  # noqa: F401 (a fixture)
from test_weights import Evil

import checkpoints
import evaluate
import train
from checkpoints import CheckpointError, load_checkpoint
from model import PRESETS, RS2SAM2
from weights import our_name

UNUSED = {  # what the published file holds besides
    "visual_model.memory_attention.layers.0.norm1.weight": torch.zeros(4),
    "visual_model.maskmem_tpos_enc": torch.zeros(7, 1, 1, 64),
    "mm_extractor.beit3.vision_embed.mask_token": torch.zeros(1, 1, 64),
    "meo_linear.weight": torch.zeros(2, 2),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[dict, dict, bytes]:
    """(configuration, state dict, SentencePiece model) of a small published model."""
    tensors, config = read(HERE / "fixtures" / "b1_s10.safetensors")
    folder = tmp_path_factory.mktemp("spm")
    (folder / "text.txt").write_text("\n".join(["the ship on the left", "a large red storage tank at the bottom"] * 5))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "toy"), vocab_size=50, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    return config, compact_weights(tensors, config) | UNUSED, (folder / "toy.model").read_bytes()


@pytest.fixture(autouse=True)
def small_paper(published, monkeypatch):
    """Preset `paper` at the fixture's sizes."""
    monkeypatch.setitem(PRESETS, "paper", published_preset(published[0]))


def save_pretrained(folder: Path, state: dict, form: str) -> Path:
    """Write the state dict as Hugging Face's save_pretrained does -> what --ckpt is given."""
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["EvfSamModel"]}')
    save, name = (save_file, "model.safetensors") if "safetensors" in form else (torch.save, "pytorch_model.bin")
    if "shards" in form:
        stem, suffix = name.split(".")
        names, shards = list(state), {}
        for number, part in enumerate((names[::3], names[1::3], names[2::3]), start=1):
            file = f"{stem}-0000{number}-of-00003.{suffix}"
            save({k: state[k] for k in part}, folder / file)
            shards |= dict.fromkeys(part, file)
        (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    else:
        save(state, folder / name)
    return folder / name if "file" in form else folder


FORMS = ["bin", "safetensors", "bin shards", "safetensors shards", "bin file", "safetensors file", "wrapped file"]


@pytest.mark.parametrize("form", FORMS)
def test_the_published_checkpoint_in_all_its_forms(published, tmp_path, form):
    config, state, spm = published
    named = {f"module.evf_model.{k}": v for k, v in state.items()} if "wrapped" in form else state
    path = save_pretrained(tmp_path / "published", named, form)
    (tmp_path / "published" / "sentencepiece.bpe.model").write_bytes(spm)
    model, facts = load_checkpoint(path)
    expected = published_model(config, {k: v for k, v in state.items() if k not in UNUSED})
    for (name, ours), theirs in zip(model.state_dict().items(), expected.state_dict().values()):
        assert torch.equal(ours, theirs), name
    assert facts["model_name"] == "paper" and model.union_encoder.tokenizer(["the ship"])[0][0, 0] == 0
    batch = torch.randn(1, 3, 256, 256), torch.randn(1, 3, 64, 64), torch.tensor([[0, 5, 7, 2]]), torch.tensor([4])
    with torch.no_grad():  # buffers that no file holds are right too
        for ours, theirs in zip(model(*batch), expected(*batch)):
            assert torch.equal(ours, theirs)


def test_half_precision_weights_are_read_into_float32(published, tmp_path):
    _, state, spm = published
    path = save_pretrained(tmp_path / "half", {k: v.bfloat16() for k, v in state.items()}, "bin")
    (path / "beit3.spm").write_bytes(spm)
    model, _ = load_checkpoint(path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.text_weight.weight, state["text2one_linear.weight"].bfloat16().float())


@pytest.fixture
def folder(published, tmp_path) -> Path:
    """The published checkpoint as a folder in the current one."""
    path = save_pretrained(tmp_path / "published", published[1], "bin")
    (path / "sentencepiece.bpe.model").write_bytes(published[2])
    return path


def test_the_published_checkpoint_is_scored_and_fine_tuned(folder, scenes, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    # (in this process, for the small sizes of preset `paper`)
    args = ["evaluate.py", "--ckpt", "published", "--data", str(scenes), "--protocol", "paper", "--json", "s.json"]
    monkeypatch.setattr(sys, "argv", args)
    evaluate.main()
    scores = json.loads(Path("s.json").read_text())
    assert scores["model_name"] == "paper" and scores["scores"]["samples"] == len(scores["rows"]) > 0
    assert "split test, protocol paper" in capsys.readouterr().out

    args = ["train.py", "--init", "published", "--data", str(scenes), "--epochs", "1", "--batch-size", "4", "--gpus", "0"]
    monkeypatch.setattr(sys, "argv", [*args, "--lr", "1e-9", "--workers", "0"])
    train.main()
    last, facts = load_checkpoint(next(Path("runs").iterdir()) / "last.pt")
    first, _ = load_checkpoint("published")
    assert facts["model_name"] == "paper" and last.union_encoder.tokenizer.model == first.union_encoder.tokenizer.model
    for (name, a), b in zip(first.state_dict().items(), last.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)  # where it began, but for a rate of 1e-9


def test_fine_tuning_from_our_own_at_another_size(scenes, tmp_path):  # noqa: F811
    small = ("--data", scenes, "--epochs", 1, "--gpus", 0, "--workers", 0, "--batch-size", 16)
    run("train.py", *small, "--model", "tiny", "--image-size", 64, "--lr", 1e-3, cwd=tmp_path)
    printed = run("train.py", *small, "--init", "best.pt", "--image-size", 96, "--lr", 1e-9, cwd=tmp_path)
    assert "tiny on" in printed
    (first, _), (last, facts) = (load_checkpoint(tmp_path / f"runs/scenes-tiny-{n}/last.pt") for n in (1, 2))
    average, _ = load_checkpoint(tmp_path / "runs/scenes-tiny-1/best.pt")
    assert last.preset.image_size == 96 and facts["args"]["init"] == "best.pt"
    differs = False
    for (name, a), b, live in zip(average.state_dict().items(), last.state_dict().values(), first.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
        differs |= not torch.equal(a, live)
    assert differs  # the best weights were taken, not the last
    printed = run("train.py", *small, "--init", "best.pt", "--encoder", "ViT-B-32", cwd=tmp_path, code=2)
    assert "--encoder and --init exclude each other" in printed


@pytest.mark.parametrize(
    "damage, expected",
    [
        ("no tokeniser", "no tokeniser in"),
        ("a shard is missing", "lacks pytorch_model-00002-of-00003.bin"),
        ("the index is no index", "is no index of shards"),
        ("a key is missing", "lacks text_weight.bias"),
        ("a key is unknown", "surprise"),
        ("a size is wrong", r"text2one_linear\.bias is \(2,\), expected \(1,\)"),
        ("empty folder", "expected best.pt, or model.safetensors"),
        ("code", "can't be read"),
        ("code in a file", "can't be read"),
        ("lying header", "can't be read"),
        ("foundation weights", "neither a checkpoint of train.py"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(published, tmp_path, damage, expected):
    _, state, spm = published
    state, path = dict(state), tmp_path / "published"
    if damage == "a key is missing":
        del state["text2one_linear.bias"]
    elif damage == "a key is unknown":
        state["visual_model.surprise"] = torch.zeros(1)
    elif damage == "a size is wrong":
        state["text2one_linear.bias"] = torch.zeros(2)
    save_pretrained(path, state, "bin shards")
    if damage != "no tokeniser":
        (path / "sentencepiece.bpe.model").write_bytes(spm)
    if damage == "a shard is missing":
        (path / "pytorch_model-00002-of-00003.bin").unlink()
    elif damage == "the index is no index":
        (path / "pytorch_model.bin.index.json").write_text("[1, 2]")
    elif damage == "empty folder":
        path = tmp_path / "empty"
        path.mkdir()
    elif damage == "code":
        (path / "pytorch_model-00002-of-00003.bin").write_bytes(pickle.dumps({"x": Evil(tmp_path / "marker")}))
    elif damage == "code in a file":
        path = tmp_path / "evil.pt"
        torch.save({"preset": Evil(tmp_path / "marker")}, path)
    elif damage == "lying header":
        path = tmp_path / "lies.safetensors"
        header = json.dumps({"x": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"0000")
    elif damage == "foundation weights":
        path = tmp_path / "sam2.pt"
        torch.save({"model": {"image_encoder.x": torch.zeros(1)}}, path)
    with pytest.raises(CheckpointError, match=expected) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "marker").exists()


def test_published_weights_name_no_data_set(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--ckpt", "published"])
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    assert stop.value.code == 2 and "--data" in capsys.readouterr().err


def test_presets_are_the_data_class_s():
    """What rebuild and a stored checkpoint rely on: a preset survives the way through plain types."""
    for preset in PRESETS.values():
        assert checkpoints.Preset(**dataclasses.asdict(preset)) == preset


PUBLISHED_NAMES = [  # our name -> the published one, written down apart from weights.RENAMES, which it is checked against
    (r"^union_encoder\.", "mm_extractor.beit3."),
    (r"^text_features\.", "text_feat_linear."),
    (r"^text_weight\.", "text2one_linear."),
    (r"^sparse_prompt\.hidden\.", "text_hidden_fcs.0.0."),
    (r"^sparse_prompt\.out\.", "text_hidden_fcs.0.2."),
    (r"^mask_prompt\.attention\.", "vmtoken.multihead_attn."),
    (r"^mask_prompt\.token\.", "mask_linear."),
    (r"^mask_prompt\.score\.", "mask_product."),
    (r"^neck\.", "visual_model.image_encoder.neck."),
    (r"^prompt_encoder\.", "visual_model.sam_prompt_encoder."),
    (r"^decoder_fusion\.attention\.", "visual_model.sam_mask_decoder.vlfusion_module.multihead_attn."),
    (r"^mask_decoder\.", "visual_model.sam_mask_decoder."),
    (r"^image_encoder\.", "visual_model.image_encoder."),
    (r"^no_mem_embed$", "visual_model.no_mem_embed"),
    (r"(blocks\.\d+)\.block\.", r"\1."),
    (r"\.mlp_adapter\.", ".MLP_Adapter."),
    (r"\.space_adapter\.", ".Space_Adapter."),
    (r"(Adapter)\.down\.", r"\1.D_fc1."),
    (r"(Adapter)\.up\.", r"\1.D_fc2."),
    (r"\.text_down\.", ".text_in_linear."),
    (r"\.text_up\.", ".text_out_linear."),
    (r"\.vision_reads_text\.", ".vlfusion_module.multihead_attn."),
    (r"\.text_reads_vision\.", ".lvfusion_module.multihead_attn."),
]


def published_name(ours: str) -> str:
    for pattern, replacement in PUBLISHED_NAMES:
        ours = re.sub(pattern, replacement, ours)
    return ours


PEAK = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def run_for_peak(*args, cwd: Path) -> tuple[str, int]:
    """Run Python with these arguments -> (what it printed, its peak of resident memory in bytes)"""
    command = [sys.executable, "-c", PEAK, sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    printed, _, peak = done.stdout.rpartition("peak ")
    return printed, int(peak) * 1024


@pytest.mark.slow
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_a_full_size_checkpoint_is_never_in_memory_twice(published, tmp_path, form, monkeypatch):
    """926 million random bfloat16 weights in a folder, scored on one image at 1024 by the command line: beside the
    libraries, which take 0.75 GiB, the peak of memory stays below 1.3 times the float32 model."""
    monkeypatch.undo()  # the real preset
    with OnMeta(torch.device("meta")):
        ours = RS2SAM2(PRESETS["paper"]).state_dict()
    names = {published_name(key): value.shape for key, value in ours.items()}
    assert [our_name(name) for name in names] == list(ours)
    torch.manual_seed(0)
    state = {name: torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.03, 0.03) for name, shape in names.items()}
    path = save_pretrained(tmp_path / "published", state, form)
    del state
    (path / "sentencepiece.bpe.model").write_bytes(published[2])
    for folder in ("images", "masks"):
        (tmp_path / "one" / folder).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "one" / folder / "a.png"), np.full((800, 800), 200, np.uint8))
    (tmp_path / "one" / "phrases.csv").write_text("image,mask,phrase,split\na.png,a.png,the ship on the left,test\n")
    args = ["--ckpt", path, "--data", tmp_path / "one", "--protocol", "paper"]
    printed, peak = run_for_peak(ROOT / "evaluate.py", *args, cwd=tmp_path)
    assert re.search(r"all( +\d+\.\d\d){7} +1\n", printed), printed
    _, libraries = run_for_peak("-c", "import evaluate", cwd=ROOT)
    model = 4 * sum(map(math.prod, names.values()))
    print(f"{form}: peak {peak / 2**30:.2f} GiB, {peak / model:.3f} times the float32 model; without the libraries' "
          f"{libraries / 2**30:.2f} GiB {(peak - libraries) / model:.3f} times")  # fmt: skip
    assert peak - libraries < 1.3 * model
