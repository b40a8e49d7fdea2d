"""The loop: parameter groups, data order, averages, schedule, and the command lines themselves on a small set of scenes."""

import dataclasses
import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from torch import nn

import evaluate
import recipe
import runs
import train
from model import PRESETS, RS2SAM2
from processes import Stream
from scenes import make_scenes

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("data") / "scenes", train=6, val=3, test=2, size=96, progress=False)


def run(script: str, *args, cwd: Path, code: int = 0) -> str:
    """Run a command line as a user would -> what it printed."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / script, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


# ---- parts of the loop ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> RS2SAM2:
    return RS2SAM2(dataclasses.replace(PRESETS["tiny"], image_size=64))


@pytest.mark.parametrize("train_trunk", [True, False])
def test_parameter_groups_are_disjoint_and_complete(train_trunk):
    model = RS2SAM2(dataclasses.replace(PRESETS["tiny"], image_size=64, train_trunk=train_trunk))
    fusion, foundation = recipe.parameter_groups(model, lr=1e-3, foundation_rate=0.5)
    ids = [id(p) for group in (fusion, foundation) for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters() if p.requires_grad}
    assert (fusion["lr"], foundation["lr"]) == (1e-3, 5e-4)
    assert any(p is model.mask_prompt.token.weight for p in fusion["params"])
    assert any(p is model.decoder_fusion.attention.in_proj_weight for p in fusion["params"])
    assert any(p is model.mask_decoder.mask_tokens.weight for p in foundation["params"])
    trunk = model.image_encoder.trunk.blocks[0]
    assert any(p is trunk.space_adapter.up.weight for p in fusion["params"])
    assert any(p is trunk.block.norm1.weight for p in foundation["params"]) == train_trunk


def test_muon_takes_the_matrices_of_both_groups(tiny):
    groups = recipe.parameter_groups(tiny, lr=1e-3, foundation_rate=0.5, muon=2.0)
    assert [(group["lr"], group["muon"]) for group in groups] == [(1e-3, False), (5e-4, False), (2e-3, True), (1e-3, True)]
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in tiny.parameters() if p.requires_grad}
    taken = {id(p) for group in groups if group["muon"] for p in group["params"]}
    assert all(p.ndim == 2 and min(p.shape) > 1 for group in groups[2:] for p in group["params"])
    encoder, decoder = tiny.union_encoder, tiny.mask_decoder
    joint, qkv = encoder.joint[0], tiny.image_encoder.trunk.blocks[0].block.attn.qkv
    for p in (joint.mlp[0].weight, joint.attention.in_proj_weight, qkv.weight, tiny.mask_prompt.token.weight):
        assert id(p) in taken
    tables = (encoder.positional_embedding, decoder.mask_tokens.weight, tiny.no_mem_embed)
    for p in (*tables, encoder.visual.conv1.weight, tiny.text_weight.weight, joint.norm1.weight, joint.mlp[0].bias):
        assert id(p) in ids and id(p) not in taken


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 24, 8), (2, 8, 24)])
def test_orthogonal_keeps_the_directions_and_makes_their_sizes_equal(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64) * torch.logspace(-3, 3, shape[0], dtype=torch.float64)[:, None, None]
    U, _, Vh = torch.linalg.svd(matrices, full_matrices=False)
    within = U.mT @ recipe.orthogonal(matrices) @ Vh.mT  # diagonal where the directions are kept
    sizes = within.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(within, torch.diag_embed(sizes), atol=1e-6, rtol=0)
    assert 0.65 < sizes.min() and sizes.max() < 1.25


def test_a_step_of_muon_is_as_defined_and_adamw_has_the_rest():
    torch.manual_seed(0)
    make = lambda: [nn.Parameter(x) for x in torch.randn(3, 6, 4, dtype=torch.float64).unbind()]  # noqa: E731
    a, b, vector = make()
    other = nn.Parameter(vector.detach().clone())
    groups = [{"params": [vector], "lr": 0.1, "muon": False}, {"params": [a, b], "lr": 0.2, "muon": True}]
    optimizer = recipe.Muon(groups, betas=(0.9, 0.98), weight_decay=0.5, fused=True)
    adamw = torch.optim.AdamW([other], lr=0.1, betas=(0.9, 0.98), weight_decay=0.5, fused=True)
    means, expected = [torch.zeros(6, 4, dtype=torch.float64) for _ in range(2)], [a.detach().clone(), b.detach().clone()]
    for _ in range(3):
        gradients = torch.randn(3, 6, 4, dtype=torch.float64)
        for p, gradient in zip((a, b, vector), gradients):
            p.grad = gradient.clone()
        other.grad = gradients[2].clone()
        optimizer.step(), adamw.step()
        for i in range(2):
            means[i] = 0.95 * means[i] + 0.05 * gradients[i]
            nesterov = 0.95 * means[i] + 0.05 * gradients[i]
            update = recipe.orthogonal(nesterov[None])[0] * 0.2 * 6**0.5
            expected[i] = expected[i] * (1 - 0.2 * 0.5) - 0.2 * update
    torch.testing.assert_close([a.detach(), b.detach()], expected)
    assert torch.equal(vector, other)


def test_the_stream_visits_every_sample_once_a_pass_and_can_be_cut_anywhere():
    whole = list(Stream(7, seed=3, start=0, stop=21))
    for number in range(3):
        assert sorted(whole[7 * number : 7 * number + 7]) == [(i, number) for i in range(7)]
    assert [i for i, _ in whole[:7]] != [i for i, _ in whole[7:14]]
    for cut in range(22):
        assert list(Stream(7, 3, 0, cut)) + list(Stream(7, 3, cut, 21)) == whole
    assert list(Stream(7, 4, 0, 21)) != whole


def test_the_average_is_the_moving_average(tiny):
    model = torch.nn.Linear(2, 1, bias=False)
    average = train.Average(model, decay=0.5)
    first = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    average.update()  # the first step: decay 1 / 11
    torch.testing.assert_close(average.mean["weight"], first / 11 + (first + 1) * 10 / 11)
    live = model.weight.detach().clone()
    average.swap()
    torch.testing.assert_close(model.weight.detach(), first + 10 / 11)
    average.swap()
    assert torch.equal(model.weight.detach(), live)


def test_schedules():
    cosine = [recipe.rate_factor("cosine", p, 0) for p in (0, 0.025, 0.05, 0.525, 1)]
    assert cosine == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert [recipe.rate_factor("constant", 0.5, epoch) for epoch in (0, 49, 50, 59)] == [1, 1, 0.1, 0.1]
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "peak": peak} for peak in (1.0, 2.0)], lr=9.0)
    for progress, factor in ((0, 0.001), (0.05, 1), (0.525, 0.5), (1, 0.001)):
        recipe.set_rates(optimizer, "cosine", progress, epoch=0)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([factor, 2 * factor])


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    runs.write_checkpoint(path, {"x": 1})
    monkeypatch.setattr(torch, "save", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(runs.WriteError, match="disk full"):
        runs.write_checkpoint(path, {"x": 2})
    assert torch.load(path, weights_only=True) == {"x": 1}


def test_the_link_never_replaces_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        best = tmp_path / "runs" / str(number) / "best.pt"
        best.parent.mkdir(parents=True)
        best.write_text(str(number))
        runs.link_best(best.relative_to(tmp_path))
        assert Path("best.pt").read_text() == str(number)
    Path("best.pt").unlink()
    Path("best.pt").write_text("mine")
    runs.link_best(best)
    assert Path("best.pt").read_text() == "mine"


def test_where_there_can_be_no_link_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(Path, "symlink_to", refuse)
    folder = runs.RunFolder(tmp_path / "run")
    folder.make()
    folder.save_best({"x": 1})
    assert torch.load(folder.path / "best.pt", weights_only=True) == {"x": 1} and not Path("best.pt").exists()
    told = capsys.readouterr().out
    assert f"best.pt can't be linked here (Operation not supported); this run's best is {folder.path}" in told


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def no_compiler(*_):
    def backend(*_):
        raise RuntimeError("Failed to find\n C compiler")

    torch.compile(torch.sin, backend=backend)(torch.ones(1))


@pytest.mark.parametrize("step, told", [
    (out_of_memory, "out of memory with --batch-size 8 at 64 pixels: try --accumulate 2, --checkpoint-activations, or a "
     "smaller --image-size"),
    (no_compiler, "torch.compile failed .*Failed to find C compiler.*: install what it misses, often a C compiler, or train "
     "without it, slower, by TORCH_COMPILE_DISABLE=1 in the environment"),
])  # fmt: skip
def test_what_fails_on_a_card_alone_is_one_sentence(step, told, scenes, tmp_path, monkeypatch):
    command = f"train.py --data {scenes} --model tiny --image-size 64 --gpus 0 --workers 0 --out {tmp_path / 'run'}"
    monkeypatch.setattr(sys, "argv", command.split())
    monkeypatch.setattr(train.Trainer, "step", step)
    with pytest.raises(runs.UsageError, match=told):
        train.main()


# ---- metrics ------------------------------------------------------------------------------------------------------------


def test_iou_by_hand():
    a, b = np.array([[1, 1, 0], [0, 0, 0]]), np.array([[1, 0, 1], [0, 0, 0]])
    assert evaluate.iou_counts(a, b) == (1, 3)
    scores = evaluate.summarise([1, 9, 0], [3, 10, 0])
    assert scores["mIoU"] == pytest.approx(100 * (1 / 3 + 0.9 + 1) / 3) and scores["oIoU"] == pytest.approx(1000 / 13)
    assert scores["Pr@0.9"] == pytest.approx(200 / 3)  # >=, and a correct "nothing there" counts
    assert evaluate.summarise([1, 9, 0], [3, 10, 0], "paper")["mIoU"] == pytest.approx(100 * (1 / 3 + 0.9) / 3)


def test_intervals_are_the_bootstrap_s():
    """Two images, one all right and one all wrong: a draw of two has none, one or both right, with 1/4, 1/2, 1/4."""
    def row(file, iou):
        return {"scene": file, "iou": iou, "intersection": 50 * iou, "union": 100}

    rows = [row("a", 1.0), row("a", 1.0), row("b", 0.0), row("b", 0.0)]
    assert evaluate.bootstrap(rows, "ours") == {"mIoU interval": [0.0, 100.0], "oIoU interval": [0.0, 50.0]}
    # 400 images, half right: the interval is that of a mean of 400 coins, 50 +- 1.96 * 2.5
    rows = [row(str(i), float(i % 2)) for i in range(400)]
    low, high = evaluate.bootstrap(rows, "ours")["mIoU interval"]
    assert low == pytest.approx(45.1, abs=0.8) and high == pytest.approx(54.9, abs=0.8)
    same = [row("one", 0.3), row("one", 0.5)]  # one image: nothing varies
    assert evaluate.bootstrap(same, "ours")["mIoU interval"] == pytest.approx([40, 40])


def test_rows_by_size_of_the_target():
    names = [evaluate.size_name(share) for share in (0, 0.0099, 0.01, 0.0999, 0.1, 1)]
    assert [name.split()[0] for name in names] == ["nothing", "small", "medium", "medium", "large", "large"]


def test_best_median_worst_covers_both_ends():
    rows = [{"iou": i / 10} for i in range(10)]
    assert evaluate.best_median_worst(rows, 5) == [9, 8, 5, 4, 0]
    assert sorted(evaluate.best_median_worst(rows, 50)) == list(range(10))
    assert evaluate.best_median_worst(rows, 1) == [9]


# ---- the command lines ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory) -> tuple[Path, str]:
    """A folder in which two short epochs were trained -> (the folder, what was printed)"""
    cwd = tmp_path_factory.mktemp("work")
    args = ("--data", scenes, "--model", "tiny", "--image-size", 64, "--epochs", 2, "--batch-size", 16, "--workers", 1)
    return cwd, run("train.py", *args, "--gpus", 0, cwd=cwd)


def test_training_leaves_what_it_promises(finished):
    cwd, printed = finished
    out = cwd / "runs" / "scenes-tiny-1"
    assert {p.name for p in out.iterdir()} == {"best.pt", "last.pt", "previous.pt", "log.jsonl", "panels.png"}
    assert (cwd / "best.pt").is_symlink() and (cwd / "best.pt").resolve() == out / "best.pt"
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2] and all(math.isfinite(line["loss"]) for line in lines)
    assert "total" in printed and "trained" in printed and "frozen" in printed and "mIoU" in printed
    best = torch.load(out / "best.pt", weights_only=True)
    assert best["model_name"] == "tiny" and best["preset"]["image_size"] == 64


def test_evaluation_needs_the_checkpoint_alone(finished):
    cwd, _ = finished
    printed = run("evaluate.py", "--ckpt", "best.pt", "--json", "s.json", "--panels", 3, cwd=cwd)
    assert "split test" in printed and (cwd / "panels-test.png").exists()
    result = json.loads((cwd / "s.json").read_text())
    rows = result["rows"]
    assert result["scores"]["samples"] == len(rows) and set(rows[0]) >= {"id", "phrase", "intersection", "union", "iou"}
    assert result["scores"]["mIoU"] == pytest.approx(100 * np.mean([r["iou"] for r in rows]))
    low, high = result["scores"]["mIoU interval"]
    assert low <= result["scores"]["mIoU"] <= high and "95 % intervals" in printed
    assert sum(group["samples"] for group in result["by size"].values()) == len(rows)
    assert "exists" in run("evaluate.py", "--json", "s.json", cwd=cwd, code=2)  # nothing is overwritten
    run("evaluate.py", "--protocol", "paper", "--split", "val", cwd=cwd)


STOP = """
import sys, train
save = train.Trainer.save_last
def save_and_stop(self, metrics):
    save(self, metrics)
    if self.samples:
        sys.exit(0)
train.Trainer.save_last = save_and_stop
train.SAVE_EVERY = {seconds}
train.main()
"""


def test_resume_is_exact(finished, scenes, tmp_path):
    """Stopped after its first step, gone on with, stopped after an epoch and gone on with again: bit for bit the run in one
    go."""
    cwd, _ = finished
    whole = torch.load(cwd / "runs" / "scenes-tiny-1" / "last.pt", weights_only=True)
    first = ("--data", scenes, "--model", "tiny", "--image-size", 64, "--epochs", 2, "--batch-size", 16, "--gpus", 0)
    again = ("--resume", "runs/scenes-tiny-1")
    for args, seconds, samples in ((first, 0, 16), (again, 600, whole["samples"] // 2)):
        subprocess.run(
            [sys.executable, "-c", STOP.format(seconds=seconds), *map(str, args)], cwd=tmp_path, check=True, timeout=300,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True,
        )  # fmt: skip
        stopped = torch.load(tmp_path / "runs" / "scenes-tiny-1" / "last.pt", weights_only=True)
        assert stopped["samples"] == samples
    run("train.py", *again, cwd=tmp_path)
    resumed = torch.load(tmp_path / "runs" / "scenes-tiny-1" / "last.pt", weights_only=True)
    for key in ("model", "average"):
        for name, tensor in whole[key].items():
            assert torch.equal(tensor, resumed[key][name]), name
    assert resumed["samples"] == whole["samples"] and resumed["best"] == whole["best"]


def test_a_run_of_another_recipe_is_not_gone_on_with(finished, tmp_path):
    state = torch.load(finished[0] / "runs" / "scenes-tiny-1" / "last.pt", weights_only=True)
    state["optimizer"]["param_groups"] = state["optimizer"]["param_groups"][:2]
    torch.save(state, tmp_path / "last.pt")
    printed = run("train.py", "--resume", "last.pt", cwd=tmp_path, code=2)
    assert f"last.pt was trained in another way, by revision {state['revision']} of this program" in printed


def test_what_resume_can_t_change_is_said(finished, tmp_path):
    cwd, _ = finished
    printed = run("train.py", "--resume", "runs/scenes-tiny-1", "--image-size", 96, cwd=cwd, code=2)
    assert "--image-size can't be changed by --resume" in printed
    state = torch.load(cwd / "runs" / "scenes-tiny-1" / "last.pt", weights_only=True)
    state["args"]["seed"] = 3
    torch.save(state, tmp_path / "last.pt")
    printed = run("train.py", "--resume", "last.pt", "--seed", 0, cwd=tmp_path, code=2)  # though 0 is the default
    assert "--seed can't be changed by --resume" in printed


def test_a_run_of_another_form_is_not_gone_on_with(finished, tmp_path):
    state = torch.load(finished[0] / "runs" / "scenes-tiny-1" / "last.pt", weights_only=True)
    state["preset"]["wings"] = 2
    torch.save(state, tmp_path / "last.pt")
    printed = run("train.py", "--resume", "last.pt", cwd=tmp_path, code=2)
    assert "last.pt does not fit this version of the code" in printed and "'wings'" in printed
    assert f"use the revision {state['revision']}, or train it again" in printed and "Traceback" not in printed


def test_another_run_s_checkpoint_is_not_overwritten(finished, scenes):
    cwd, _ = finished
    args = ("--data", scenes, "--model", "tiny", "--image-size", 64, "--out", "runs/scenes-tiny-1", "--gpus", 0)
    assert "holds another run" in run("train.py", *args, cwd=cwd, code=2)


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--data", "nowhere"], "no folder nowhere"),
        (["--data", "RRSIS-D"], "refs(unc).p"),  # shows the expected layout
        (["--data", "EMPTY"], "refs(unc).p"),
        (["--gpus", "99"], "--gpus 99"),
        (["--data", "SCENES", "--model", "large"], "laion2b_s32b_b82k=FILE"),  # says how to name a local file
        (["--data", "SCENES", "--model", "large", "--encoder-weights", "empty.pt"], "--sam2 FILE"),
        (["--model", "large"], "--encoder-weights laion2b_s32b_b82k=FILE"),  # before scenes are made
        (["--image-size", "100"], "multiple of 32"),
        (["--data", "SCENES", "--model", "large", "--sam2", "none.pt"], "no weights file at none.pt"),
        (["--data", "SCENES", "--model", "large", "--sam2", "empty.pt"], "--encoder-weights laion2b_s32b_b82k=FILE"),
        (["--data", "SCENES", "--model", "paper", "--sam2", "empty.pt"], "beit3_large_patch16_224.pth"),
        (["--data", "SCENES", "--model", "paper", "--sam2", "empty.pt", "--encoder-weights", "empty.pt"], "beit3.spm"),
        (["--data", "SCENES", "--model", "base", "--sam2", "empty.pt", "--encoder", "ViT-B-32"], "--encoder-weights"),
        (
            [
                "--data",
                "SCENES",
                "--model",
                "base",
                "--sam2",
                "empty.pt",
                "--encoder",
                "RN50",
                "--encoder-weights",
                "openai",
            ],
            "own ViT",
        ),
        (["--data", "SCENES", "--model", "tiny", "--encoder", "ViT-B-32"], "union encoder of its own"),
        (["--data", "SCENES", "--model", "tiny", "--image-size", "100"], "multiple of 32"),
        (["--data", "SCENES", "--model", "tiny", "--sam2", "none.pt"], "no weights file at none.pt"),
        (["--data", "SCENES", "--model", "tiny", "--sam2", "empty.pt", "--from-scratch"], "from scratch reads no weights"),
        (["--data", "SCENES", "--model", "tiny", "--encoder-weights", "empty.pt"], "from scratch reads no weights"),
        (["--data", "SCENES", "--model", "tiny", "--sam2", "empty.pt", "--encoder-weights", "empty.pt"], "no encoder weights"),
        (["--data", "SCENES", "--model", "paper", "--from-scratch", "--encoder-weights", "x"], "can't start from scratch"),
        (["--data", "SCENES", "--model", "tiny", "--image-size", "8192"], "up to 4096"),
        (["--data", "SCENES", "--model", "tiny", "--encoder-size", "8192"], "up to 4096"),
        (["--resume", "nowhere"], "nothing to resume"),
    ],
)
def test_wrong_input_is_one_sentence_before_anything_long(args, expected, scenes, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    monkeypatch.setattr(open_clip, "download_pretrained", no_network)
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("empty.pt").touch()
    args = [{"SCENES": str(scenes), "EMPTY": "empty"}.get(a, a) for a in args]
    monkeypatch.setattr(sys, "argv", ["train.py", "--gpus", "0", *args])  # in this process
    with pytest.raises(train.ERRORS) as error:
        train.main()
    assert expected in str(error.value), error.value
    assert not Path("runs").exists()


def test_wrong_input_ends_with_exit_code_2(tmp_path):
    assert run("train.py", "--data", "nowhere", cwd=tmp_path, code=2).startswith("train.py: There is no folder nowhere")
    assert "is not an integer of 1 or more" in run("train.py", "--epochs", "0", cwd=tmp_path, code=2)


def test_evaluate_s_errors(tmp_path):
    assert "no checkpoint at best.pt" in run("evaluate.py", cwd=tmp_path, code=2)


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "data.py", "scenes.py"])
def test_help(script, tmp_path):
    assert "usage" in run(script, "--help", cwd=tmp_path)
