"""Foundation files, the published checkpoint, our own of both kinds, damaged and hostile files: all written here, small."""

import json
import pickle
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from sam2.build_sam import build_sam2
from test_parity import HERE, published_model, read, under

from encoder import BEiT3Encoder, OpenCLIPEncoder, open_clip_config, open_clip_model
from fusion import PUBLISHED
from model import RS2SAM2
from presets import PRESETS, RECIPES, Preset, Recipe
from runtime.errors import UserError
from weights import checkpoints
from weights.checkpoints import build_model, load_checkpoint, read_run, rebuild, stored_preset, stored_recipe
from weights.files import read_state
from weights.foundation import load_open_clip, load_sam2, open_clip_file
from weights.names import is_unused, our_name

SIZES = [f"sam2.1/sam2.1_hiera_{size}.yaml" for size in ("t", "s", "b+", "l")] + ["sam2/sam2_hiera_l.yaml"]
SMALL_BEIT3 = dict(width=128, layers=2, heads=2, hidden=64, vocabulary=100, image_size=64, patch=16, text_positions=40)
SMALL = replace(PRESETS["tiny"], image_size=64)
AROUND = replace(SMALL, reduction=4, image_size=128, decoder=PRESETS["base"].decoder, train_trunk=False)  # a given SAM 2


class Evil:
    def __reduce__(self):  # unpickled, it would write the marker into the working directory
        return open, ("marker", "w")


def assert_same_weights(ours, theirs) -> None:
    theirs = theirs if isinstance(theirs, dict) else theirs.state_dict()
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs), rtol=0, atol=0)


def facts(preset: Preset, state: dict) -> dict:
    """A checkpoint of train.py's, but for what only training reads."""
    return {
        "preset": asdict(preset), "recipe": asdict(RECIPES["tiny"]), "left_out": [], "model": state, "tokenizer": None,
        "model_name": "tiny", "data": "scenes", "revision": "abc1234",
    }  # fmt: skip


def assert_refused(what, expected: str) -> None:
    """what: a checkpoint's path, or a function"""
    with pytest.raises(UserError, match=expected) as error:
        what() if callable(what) else load_checkpoint(what)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def spm(tmp_path_factory) -> bytes:
    """A SentencePiece model of some phrases."""
    folder = tmp_path_factory.mktemp("spm")
    (folder / "text.txt").write_text("\n".join(["the ship on the left", "a large red storage tank at the bottom"] * 5))
    options = {"vocab_size": 50, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(input=f"{folder}/text.txt", model_prefix=f"{folder}/toy", **options)
    return (folder / "toy.model").read_bytes()


@pytest.fixture(scope="module")
def sam2_file(tmp_path_factory):
    """A small SAM 2.1 with random weights, and its file as SAM 2's are."""
    torch.manual_seed(0)
    changes = [f"++model.image_encoder.trunk.{name}={value}" for name, value in SMALL.trunk.items()]
    changes.append("++model.image_encoder.neck.backbone_channel_list=[128,64,32,16]")
    sam = build_sam2(f"configs/{SIZES[0]}", device="cpu", apply_postprocessing=False, hydra_overrides_extra=changes)
    for table in (sam.image_encoder.trunk.pos_embed, sam.image_encoder.trunk.pos_embed_window):
        torch.nn.init.normal_(table)
    path = tmp_path_factory.mktemp("sam2") / "sam2.1_hiera_tiny.pt"
    torch.save({"model": sam.state_dict()}, path)
    return sam, path


def test_with_silent_adapters_the_image_encoder_is_sam2_s_own(sam2_file):
    sam, path = sam2_file
    model = RS2SAM2(AROUND)
    load_sam2(model, path)
    with torch.no_grad():
        for adapter in model.image_encoder.adapters():
            adapter.up.weight.zero_(), adapter.up.bias.zero_()
        image = torch.randn(1, 3, 128, 128)
        ours = model.neck(model.image_encoder(image, torch.randn(1, 5, 256)))[0][:3]
        theirs = sam.image_encoder(image)["backbone_fpn"]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert_same_weights(model.mask_decoder, sam.sam_mask_decoder)
    assert_same_weights(model.prompt_encoder, sam.sam_prompt_encoder)
    assert torch.equal(model.no_mem_embed, sam.no_mem_embed)


@pytest.mark.parametrize("config", SIZES)
def test_every_key_of_every_size_goes_somewhere(config):
    with checkpoints.skip_initialisation():
        sam = build_sam2(f"configs/{config}", device="cpu", apply_postprocessing=False)
        model = RS2SAM2(replace(AROUND, sam2=config, trunk={}))
    named = {f"visual_model.{key}": value.shape for key, value in sam.state_dict().items()}
    mapped = {our_name(key): shape for key, shape in named.items() if not is_unused(key, len(model.image_encoder.trunk.blocks))}
    added = re.compile(r"adapter\.|union_encoder|text_features|text_weight|sparse_prompt|mask_prompt|decoder_fusion")
    assert mapped == {key: value.shape for key, value in model.state_dict().items() if not added.search(key)}


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    """A small model that open_clip knows by name, with a file of its weights."""
    folder = tmp_path_factory.mktemp("clip")
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": {"width": 16, "heads": 2, "layers": 2}}
    (folder / "small-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "small-clip.json")
    torch.manual_seed(1)
    clip = open_clip.create_model("small-clip")
    torch.save(clip.state_dict(), folder / "small.pt")
    return clip.eval(), folder / "small.pt"


def test_weights_beside_numpy_s_numbers_are_read_and_what_is_not_is_one_plain_sentence(small_clip, tmp_path):
    clip, path = small_clip
    numbers = {"epoch": np.float64(1), "loss": np.float32(2), "step": np.int64(3)}
    torch.save(numbers | {"state_dict": clip.state_dict(), "optimizer": {"state": {}}}, tmp_path / "full.pt")
    load_open_clip(open_clip_model("small-clip"), "small-clip", tmp_path / "full.pt")
    assert_refused(tmp_path / "full.pt", "foundation weights go to train.py, by --sam2 or --encoder-weights$")
    state = read_state(tmp_path / "full.pt")
    assert all(torch.equal(tensor, state[name]) for name, tensor in clip.state_dict().items())
    torch.save({"state_dict": clip.state_dict(), "args": Path("x")}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"small-clip \(it is damaged or of another kind\): name another file$"):
        load_open_clip(open_clip_model("small-clip"), "small-clip", tmp_path / "other.pt")


def test_the_towers_are_open_clip_s(small_clip):
    theirs, path = small_clip
    clip = open_clip_model("small-clip")
    load_open_clip(clip, "small-clip", open_clip_file("small-clip", path))
    encoder = OpenCLIPEncoder(clip, width=48, joint_layers=1, joint_heads=4).eval()
    phrases = ["The ship on the upper left", "a windmill"]
    (ids, lengths), full = encoder.tokenizer(phrases), open_clip.get_tokenizer("small-clip")(phrases)
    assert torch.equal(ids, full[:, : ids.shape[1]]) and lengths.tolist() == [8, 4]
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        vision, text = encoder.encode_image(image), encoder.encode_text(ids)
        end = text[torch.arange(2), lengths - 1] @ theirs.text_projection
        expected = theirs.encode_image(image), theirs.encode_text(full)
    torch.testing.assert_close((vision[:, 0] @ theirs.visual.proj, end), expected, rtol=1e-4, atol=1e-5)


def test_files_give_another_resolution_and_the_normalisation_of_their_tag(small_clip, sam2_file, monkeypatch):
    (theirs, path), (sam, sam_path) = small_clip, sam2_file
    preset = replace(AROUND, encoder_name="small-clip", encoder_size=64)
    model = build_model("base", preset, sam2_file=sam_path, encoder_weights=path)
    encoder = model.union_encoder
    assert (encoder.image_size, encoder.grid) == (64, 8)
    table = open_clip.create_model("small-clip", pretrained=str(path), force_image_size=64).visual.positional_embedding
    assert torch.equal(encoder.visual.positional_embedding, table)  # interpolated
    assert torch.equal(table[0], theirs.visual.positional_embedding[0])  # the class token's
    assert torch.equal(encoder.visual.conv1.weight, theirs.visual.conv1.weight)
    assert torch.equal(model.no_mem_embed, sam.no_mem_embed)
    for name, p in model.named_parameters():  # what no file holds was drawn at random all the same, or starts at zero
        zero = model.preset.architecture.zero_start and re.search(r"adapter\.(text_)?up\.", name)
        assert p.isfinite().all() and (not p.any() if zero else "weight" not in name or p.dim() < 2 or p.std() > 0), name
    assert rebuild(facts(model.preset, model.state_dict())).union_encoder.image_size == 64

    tag = {"url": "", "mean": (0.5,) * 3, "std": (0.25,) * 3, "quick_gelu": True}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small-clip", {"half": tag})
    tagged = build_model("base", replace(preset, encoder_tag="half"), sam2_file=sam_path, encoder_weights=f"half={path}")
    assert (tagged.union_encoder.mean, tagged.union_encoder.std) == ((0.5,) * 3, (0.25,) * 3)
    assert torch.equal(tagged.union_encoder.visual.conv1.weight, theirs.visual.conv1.weight)
    again = rebuild(facts(tagged.preset, tagged.state_dict()))
    assert torch.equal(again.encoder_norm, tagged.encoder_norm) and not torch.equal(again.encoder_norm, model.encoder_norm)
    alone = build_model("base", replace(preset, encoder_tag="half"), sam2_file=sam_path, encoder_weights=str(path))
    assert torch.equal(alone.encoder_norm, model.encoder_norm)  # a file alone is taken for the name's usual way


def test_what_is_not_a_plain_vit_is_refused(monkeypatch):
    monkeypatch.setattr(open_clip.factory, "_get_hf_config", lambda *a: pytest.fail("fetched"))
    accepted = []
    with torch.device("meta"):
        for name in open_clip.list_models():
            try:
                config = open_clip_config(name)
            except UserError as error:
                assert name in str(error)
                continue
            open_clip_model(config | {tower: config[tower] | {"layers": 1} for tower in ("vision_cfg", "text_cfg")})
            accepted.append(name)
        quick, plain = open_clip_model("ViT-B-16", "openai"), open_clip_model("ViT-L-14", "laion2b_s32b_b82k")
    assert {"ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-B-32-quickgelu"} <= set(accepted) and len(accepted) >= 30
    assert not {"RN50", "ViT-B-16-SigLIP", "roberta-ViT-B-32", "coca_ViT-B-32", "convnext_base"} & set(accepted)
    assert "QuickGELU" in str(quick.visual) and "QuickGELU" not in str(plain.visual)  # a tag decides this
    assert plain.visual.preprocess_cfg["mean"] == (0.5, 0.5, 0.5)
    for name in ("ViT-Z", "hf-hub:someone/something", "local-dir:/tmp"):
        assert_refused(lambda name=name: open_clip_model(name), f"no model '{name}'")


def test_the_paper_s_preset_is_built_from_files_of_beit3_base_or_large(sam2_file, spm, tmp_path):
    """The file's shapes say which; here a small one. Heads that it holds besides are left out."""
    paper = replace(PRESETS["paper"], sam2=SIZES[0], trunk=SMALL.trunk)
    torch.manual_seed(3)
    source, file = BEiT3Encoder(**SMALL_BEIT3), tmp_path / "beit3_base_patch16_224.pth"
    state = {f"beit3.{k}": v for k, v in source.state_dict().items()}
    extra = {"beit3.vision_embed.mask_token": torch.zeros(1, 1, 128), "mim_head.weight": torch.zeros(2, 2)}
    options = {"sam2_file": sam2_file[1], "encoder_weights": file}
    torch.save({"model": state | extra}, file)
    (tmp_path / "beit3.spm").write_bytes(spm)
    model = build_model("paper", paper, **options)
    assert model.preset == replace(paper, encoder_args=SMALL_BEIT3)
    assert_same_weights(model.union_encoder, source)
    assert model.union_encoder.tokenizer(["the ship"])[1].item() > 2
    assert model.union_encoder.tokenizer(["the ship " * 99])[0].shape == (1, 38)  # two rows of the table stay unused
    for entries, tokenizer, expected in (
        (state, b"nonsense", "is no SentencePiece model"),
        ({k: v for k, v in state.items() if "layers.1.ffn.B.fc2.bias" not in k}, spm, r"layers\.1\.ffn\.B\.fc2\.bias"),
        ({"beit3.other": torch.zeros(1)}, spm, "is not a BEiT-3 file: it lacks 'beit3.text_embed.weight'"),
    ):
        torch.save({"model": entries}, file)
        (tmp_path / "beit3.spm").write_bytes(tokenizer)
        assert_refused(lambda: build_model("paper", paper, **options), expected)


def test_tiny_starts_from_random_weights_or_around_a_sam2_that_stays(sam2_file):
    model = build_model("tiny", replace(SMALL, encoder_size=64))
    assert (model.union_encoder.image_size, model.union_encoder.grid) == (64, 8) and model.preset.train_trunk
    assert rebuild(facts(model.preset, model.state_dict())).union_encoder.image_size == 64
    model = build_model("tiny", replace(AROUND, train_trunk=True), sam2_file=sam2_file[1])
    assert not model.preset.train_trunk and not any(p.requires_grad for p in model.neck.parameters())
    assert torch.equal(model.no_mem_embed, sam2_file[0].no_mem_embed)
    assert build_model("base", AROUND, from_scratch=True).preset.train_trunk


@pytest.mark.parametrize("name, changes, options, expected", [
    ("paper", {"encoder_size": 64}, {}, "--set encoder_size=...: preset paper's BEiT-3 has its own"),
    ("paper", {"encoder_name": "ViT-B-32"}, {}, "--set encoder_name=...: preset paper's BEiT-3 has its own"),
    ("paper", {}, {"from_scratch": True}, "preset paper can't start from scratch"),
    ("paper", {}, {}, "BEiT-3 is not on a hub"),
    ("tiny", {"reduction": 3}, {}, r"no network has the sizes of this preset \(embed_dim must be divisible by num_heads\)"),
    ("tiny", {"trunk": {"stages": [1, 1]}}, {}, "no network has the sizes of this preset .*Hiera"),
    ("tiny", {"encoder_size": 60}, {}, "the preset's encoder needs a multiple of its patches of 8"),
    ("tiny", {}, {"encoder_weights": "x"}, "leave out --sam2 and --encoder-weights"),
    ("tiny", {}, {"sam2_file": "gone.pt", "encoder_weights": "x"}, "preset tiny has no encoder weights"),
    ("base", {"image_size": 100}, {}, "image size 100: SAM 2's windows need a multiple of 32, up to 4096"),
    ("base", {"encoder_size": 8000}, {}, "encoder size 8000"),
    ("base", {}, {"sam2_file": "gone.pt"}, "no weights file at gone.pt"),
    ("base", {"encoder_tag": None}, {}, "preset base names no tag of ViT-B-16"),
    ("base", {}, {"encoder_weights": "openai=gone.pt"}, "no weights file at gone.pt"),
    ("base", {"encoder_name": "ViT-S-32"}, {}, "'laion2b_s34b_b88k' is neither a file nor a pretrained tag"),
])  # fmt: skip
def test_what_can_t_be_built_is_one_sentence(name, changes, options, expected):
    assert_refused(lambda: build_model(name, replace(PRESETS[name], **changes), **options), expected)


@pytest.fixture
def published(monkeypatch) -> tuple[RS2SAM2, dict]:
    """(a small model of the published kind, its state dict under the published names); preset `paper` is of its size."""
    tensors, config = read(HERE / "fixtures" / "b1_s10.safetensors")
    shapes = {key: shape for key, shape, *_ in config["weights"]}
    torch.manual_seed(2)
    state = {key: 0.1 * torch.randn(shape) for key, shape in shapes.items()} | under("w/", tensors)
    model, _ = published_model(config, state)
    monkeypatch.setitem(PRESETS, "paper", model.preset)
    unread = "memory_attention.layers.0.norm1.weight", "maskmem_tpos_enc"  # the published file holds them besides
    state |= {"mm_extractor.beit3.vision_embed.mask_token": torch.zeros(1), "meo_linear.weight": torch.zeros(1)}
    return model, state | {f"visual_model.{key}": torch.zeros(1) for key in unread}


def save_pretrained(folder: Path, state: dict, form: str) -> Path:
    """Write the state dict as Hugging Face's save_pretrained does -> what --ckpt is given."""
    folder.mkdir()
    save, stem, suffix = (save_file, "model", "safetensors") if "safetensors" in form else (torch.save, "pytorch_model", "bin")
    names = [list(state)[n::3] for n in range(3)] if "shards" in form else [list(state)]
    files = [f"{stem}-0000{n}-of-00003.{suffix}" for n in (1, 2, 3)] if "shards" in form else [f"{stem}.{suffix}"]
    for file, part in zip(files, names):
        save({key: state[key] for key in part}, folder / file)
    if "shards" in form:
        index = {"metadata": {}, "weight_map": {key: file for file, part in zip(files, names) for key in part}}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder / files[0] if "file" in form else folder


@pytest.mark.parametrize(
    "form", ["bin", "safetensors", "bin shards", "safetensors shards", "bin file", "safetensors wrapped file", "half"]
)
def test_the_published_checkpoint_in_all_its_forms(published, spm, tmp_path, form):
    expected, state = published
    named = {f"module.evf_model.{k}": v for k, v in state.items()} if "wrapped" in form else state
    named = {k: v.bfloat16() for k, v in named.items()} if form == "half" else named
    path = save_pretrained(tmp_path / "published", named, form)
    (tmp_path / "published" / "sentencepiece.bpe.model").write_bytes(spm)
    model, checkpoint = load_checkpoint(path)
    assert_same_weights(model, {k: v.bfloat16().float() if form == "half" else v for k, v in expected.state_dict().items()})
    assert checkpoint["model_name"] == "paper" and model.union_encoder.tokenizer(["the ship"])[0][0, 0] == 0
    assert stored_recipe(checkpoint) == RECIPES["paper"] and {p.dtype for p in model.parameters()} == {torch.float32}
    if form == "bin":  # buffers that no file holds are right too
        batch = torch.randn(1, 3, 256, 256), torch.randn(1, 3, 64, 64), torch.tensor([[0, 5, 7, 2]]), torch.tensor([4])
        with torch.no_grad():
            assert torch.equal(model(*batch).logits, expected(*batch).logits)


def test_what_is_wrong_with_a_published_checkpoint_is_one_sentence(published, spm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, shard = published[1], "pytorch_model-00002-of-00003.bin"
    evil, good = pickle.dumps({"x": Evil()}), save_pretrained(tmp_path / "good", state, "bin shards")
    assert_refused(good, "no tokeniser in")
    (good / "beit3.spm").write_bytes(spm)
    for number, (change, expected) in enumerate((
        (lambda f: (f / shard).unlink(), f"lacks {shard}"),
        (lambda f: (f / shard).write_bytes(evil), f"{shard} can't be read"),
        (lambda f: (f / "pytorch_model.bin.index.json").write_text("[1]"), "no index of shards"),
        (lambda f: [path.unlink() for path in f.iterdir()], "holds nothing: expected best.pt, or model.safetensors"),
    )):  # fmt: skip
        change(shutil.copytree(good, tmp_path / str(number)))
        assert_refused(tmp_path / str(number), expected)
    for more, expected in (
        ({"visual_model.surprise": torch.zeros(1)}, "unknown keys: visual_model.surprise"),
        ({"text2one_linear.bias": torch.zeros(2)}, r"bias is \(2,\), expected \(1,\)"),
        ({"text2one_linear.bias": None}, "lacks text_weight.bias"),
    ):
        torch.save({k: v for k, v in (state | more).items() if v is not None}, tmp_path / "published.bin")
        (tmp_path / "beit3.spm").write_bytes(spm)
        assert_refused(tmp_path / "published.bin", expected)
    assert not (tmp_path / "marker").exists()


@pytest.fixture(scope="module")
def small() -> RS2SAM2:
    torch.manual_seed(0)
    return RS2SAM2(SMALL).eval()


def test_a_checkpoint_means_the_same_after_presets_have_changed(small, tmp_path, monkeypatch):
    for name, preset in PRESETS.items():
        plain = {"preset": asdict(preset), "recipe": asdict(RECIPES[name])}
        plain["recipe"]["betas"] = list(plain["recipe"]["betas"])  # as JSON would give it
        assert stored_preset(plain) == preset and stored_recipe(plain) == RECIPES[name]
    torch.save(facts(SMALL, small.state_dict()), tmp_path / "m.pt")
    monkeypatch.setitem(PRESETS, "tiny", PRESETS["base"])
    monkeypatch.setitem(RECIPES, "tiny", Recipe())
    model, checkpoint = load_checkpoint(tmp_path / "m.pt")
    assert model.preset == SMALL and stored_recipe(checkpoint).muon == 2.0 and "model" not in checkpoint


def test_today_s_kind_still_loads(small, tmp_path):
    """Its architecture is a word and its recipe is looked up by the model's name."""
    path, new = tmp_path / "m.pt", facts(SMALL, small.state_dict())
    old = {k: v for k, v in new.items() if k not in ("recipe", "left_out")}
    old["preset"] |= {"architecture": "ours", "without": (), "version": 2}
    torch.save(old, path)
    model, checkpoint = load_checkpoint(path)
    assert model.preset == SMALL and stored_recipe(checkpoint) == RECIPES["tiny"] and checkpoint["left_out"] == []
    assert_same_weights(model, small)
    published = RS2SAM2(replace(SMALL, architecture=PUBLISHED))
    torch.save(old | {"preset": old["preset"] | {"architecture": "published"}, "model": published.state_dict()}, path)
    assert load_checkpoint(path)[0].preset == published.preset
    for changes, expected in (
        ({"version": 1}, "older form of architecture ours.: use the revision abc1234"),
        ({"architecture": "theirs"}, "architecture theirs of model tiny is unknown"),
        ({"without": ("dice",)}, "an ablation's, without dice: score it by `python -m experiments.ablate`"),
    ):
        torch.save(old | {"preset": old["preset"] | changes, "model": {}}, path)
        assert_refused(path, expected)


def test_an_edit_comes_before_the_weights_and_a_lack_of_memory_passes(small):
    whole = facts(SMALL, small.state_dict())
    less = whole | {"model": {k: v for k, v in whole["model"].items() if "sparse" not in k}, "left_out": ["sparse"]}
    assert_same_weights(rebuild(less, edit=lambda m: setattr(m, "sparse_prompt", torch.nn.Identity())), less["model"])
    with pytest.raises(torch.OutOfMemoryError):
        rebuild(less, edit=lambda model: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    assert_refused(lambda: rebuild(whole, image_size=100), "image size 100")
    assert rebuild(whole, image_size=96).preset.image_size == 96


def test_a_loaded_model_is_the_model_and_apart_from_its_file(small, tmp_path):
    path = tmp_path / "m.pt"
    half = {k: v.bfloat16() if k.startswith("mask_decoder.") else v for k, v in small.state_dict().items()}
    saved = {k: v.float() for k, v in half.items()}  # float32, also where the file is not
    torch.save(facts(SMALL, half), path)
    trained, model, content = load_checkpoint(path)[0], load_checkpoint(path)[0], path.read_bytes()
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in small.parameters()]
    for (name, ours), theirs in zip(model.named_buffers(), small.buffers()):  # what no checkpoint holds
        assert torch.equal(ours, theirs) or name.startswith("mask_decoder."), name
    with torch.no_grad():
        for p in trained.parameters():
            p.add_(1)
    assert path.read_bytes() == content
    for change in (lambda file: file.write(bytes(len(content))), lambda file: file.truncate(10)):
        with open(path, "r+b") as file:
            change(file)
        assert_same_weights(model, saved)


def test_what_is_no_checkpoint_is_one_sentence(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("no.pt")
    torch.save(facts(SMALL, small.state_dict()), path)
    shortened = path.read_bytes()[:100_000]
    path.unlink()
    for content in (None, b"", b"not a checkpoint", b"PK\3\4 half", torch.zeros(2), {"preset": Evil()}, shortened):
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        assert_refused(path, "no.pt")
        assert_refused(lambda: read_state(path), "no.pt")
    assert not Path("marker").exists()


def test_a_hostile_checkpoint_runs_and_fetches_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    call = {"_target_": "shutil.copyfile", "src": __file__, "dst": f"{tmp_path}/marker"}
    yaml, clip = tmp_path / "evil.yaml", SMALL.encoder_name
    yaml.write_text(f"model: {{image_encoder: {json.dumps(call)}}}")
    trunks = {"x": call}, {"_target_": "os.getcwd"}, {"stages": [call]}, {"weights_path": str(tmp_path / "m.pt")}
    for change, expected in (
        *(({"trunk": SMALL.trunk | change}, "numbers and lists of numbers") for change in trunks),
        ({"decoder": SMALL.decoder | {"mlp": call}}, "numbers and lists of numbers"),
        *(({"sam2": path}, "no YAML file under the sam2 package") for path in (f"{'../' * 30}{yaml}", str(yaml))),
        ({"encoder_name": "hf-hub:evil/evil"}, "open_clip has no model"),
        ({"encoder_name": clip | {"text_cfg": clip["text_cfg"] | {"hf_model_name": "evil/evil"}}}, "not made of its own ViT"),
        ({"encoder_name": clip | {"vision_cfg": clip["vision_cfg"] | {"timm_model_name": "evil"}}}, "not made of its own ViT"),
        ({"surprise": 1}, "its preset has an unknown surprise.: use the revision abc1234"),
        ({"architecture": {"text_kept": 1.0}}, "its architecture lacks"),
        ({"decoder": []}, "does not fit this version of the code"),
    ):
        torch.save(facts(SMALL, {}) | {"preset": asdict(SMALL) | change}, tmp_path / "m.pt")
        assert_refused(tmp_path / "m.pt", expected)
    assert not (tmp_path / "marker").exists()


def test_a_run_s_state_is_read_from_its_folder_or_file(tmp_path):
    last, state = tmp_path / "last.pt", facts(SMALL, {})
    assert_refused(lambda: read_run(tmp_path), "nothing to resume: .*last.pt does not exist")
    torch.save(state, last)
    assert_refused(lambda: read_run(tmp_path), "last.pt holds weights alone")
    last.write_bytes(last.read_bytes()[:-100])
    assert_refused(lambda: read_run(tmp_path), "last.pt can't be read")
    torch.save(state | {"optimizers": [], "log": [], "running": {}, "samples": 8}, last)
    assert all((state["samples"], file) == (8, last) for state, file in map(read_run, (tmp_path, last)))
