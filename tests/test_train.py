"""Training: its parts by hand-computed values, and whole runs, undisturbed, stopped, killed, in several processes.

Command lines run in children of a fork which has the libraries imported, with Python code of the test's own first.
"""

import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
from argparse import Namespace
from dataclasses import asdict, fields, replace
from pathlib import Path

import cv2
import pytest
import timm.optim
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_flatten

import presets
import train
from data import TrainingOrder, open_dataset
from experiments import curves
from model import RS2SAM2, compile_blocks
from presets import PRESETS, RECIPES, Preset, Recipe
from runtime import optimizers, processes
from runtime.errors import UserError
from synthetic_scenes.scenes import make_scenes
from weights import hub
from weights.checkpoints import stored_preset, stored_recipe
from weights.provenance import in_words, provenance, taught

ROOT = Path(__file__).parent.parent
# Epochs of 10 samples in batches of 4: the first is 3 steps, to sample 12, the second 2, to sample 20.
SMALL = ("image_size=64", "trunk.stages=[1, 1, 1, 1]", "trunk.global_att_blocks=[2]", "encoder_args.joint_layers=1",
         "encoder_name.vision_cfg.image_size=32", "encoder_name.vision_cfg.layers=1", "epoch_range=(10, 10)", "cpu_processes=2")
GO_ON = ("--resume", "run")

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train"])

# In float64 nothing but the order of sums tells numbers of processes apart.
DOUBLE = """
from functools import partial
def double(model):
    model.double().prompt_encoder.pe_layer.float()  # sam2 multiplies its codes of places with float32 coordinates
train.main = partial(train.main, edit=double)
"""
EVERY_STEP = "train.SAVE_EVERY = 0\n"
# At a function's call in the step that begins at a sample: something on one rank, before or after.
AT = """
call_{name} = train.{name}
def watched(*args, **kwargs):
    if {rank} == train.rank() and (not hasattr(args[0], "samples") or args[0].samples == {samples}):
        {do}
    return call_{name}(*args, **kwargs)
train.{name} = watched
"""
# Dies at the given call of those that write a file; torch.save's is in the middle of it.
DIE = """
def dying(call, name, count=[0]):
    def watched(*args, **kwargs):
        count[0] += 1
        if count[0] == {call}:
            print("killed in", name, flush=True)
            if name == "save":
                args[1].write(b"PK half of a checkpoint")
                args[1].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return watched
torch.save, os.replace, os.fsync = dying(torch.save, "save"), dying(os.replace, "replace"), dying(os.fsync, "fsync")
"""
SIGNAL = "os.kill(os.getpid(), signal.{})"
QUIET = "processes.time.sleep = lambda _: os._exit(1)\n"  # where torchrun would end a process that waits for another
FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))"


def at(name: str, samples: int, do: str, rank: int = 0) -> str:
    return AT.format(name=name, samples=samples, do=do, rank=rank)


def work(cwd: Path, first: str, module: str, args: list[str], environ: dict) -> None:
    """A command line in a process of its own."""
    os.setsid()
    os.chdir(cwd)
    for number in (1, 2):
        os.dup2(os.open("printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of a loader's workers, as in the program itself
    sys.argv, sys.modules["__main__"].__spec__ = [str(ROOT / f"{module}.py"), *args], None
    exec(first, {"os": os, "signal": signal, "torch": torch, "train": train, "processes": processes})
    sys.modules[module].main()


def start(cwd: Path, *args, first: str = "", ranks: int = 1, module: str = "train") -> list:
    """Start a command line in a folder, in one process, or in several as torchrun does -> the processes."""
    cwd.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group, args = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}, list(map(str, args))
    environs = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {} for rank in range(ranks)]
    started = [FORKS.Process(target=work, args=(cwd, first, module, args, environ)) for environ in environs]
    for process in started:
        process.start()
    return started


def end(started: list) -> list[int]:
    """The exit codes of what was started."""
    for process in started:
        process.join()
    return [process.exitcode for process in started]


def run(cwd: Path, *args, code: int = 0, **options) -> str:
    """Run a command line, whose processes must all end with this exit code -> what is printed in this folder so far."""
    codes, printed = end(start(cwd, *args, **options)), (cwd / "printed").read_text()
    assert set(codes) == {code} and "Traceback" not in printed, printed
    return printed


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("data") / "scenes", train=6, val=2, test=1, size=96, seed=1, progress=False)


@pytest.fixture
def in_process(tmp_path, monkeypatch):
    """main() in the tests' own process: a folder to work in, and its handlers of signals are put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in `work`, whose runs are compared with
    yield tmp_path
    torch.set_num_threads(threads)
    for number, handler in before.items():
        signal.signal(number, handler)


def new_run(scenes: Path, *more, gpus: tuple = ("--gpus", 0)) -> tuple:
    return ("--data", scenes, "--model", "tiny", "--epochs", 2, "--batch-size", 4, "--workers", 0, "--out", "run",
            *gpus, "--set", *SMALL, *more)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(scenes, tmp_path_factory) -> Path:
    """The folder of a run."""
    run(folder := tmp_path_factory.mktemp("undisturbed"), *new_run(scenes))
    return folder / "run"


@pytest.fixture(scope="module")
def doubles(scenes, tmp_path_factory) -> dict[str, Path]:
    """The same run in float64 by one process and by two, whole and in parts -> their folders."""
    folder, runs = tmp_path_factory.mktemp("doubles"), {}
    for ranks, parts in ((1, 1), (2, 1), (2, 2)):
        cwd = folder / f"{ranks} {parts}"
        run(cwd, *new_run(scenes, "muon=0.0"), "--accumulate", parts, first=DOUBLE, ranks=ranks)
        runs[f"{ranks} x {parts}"] = cwd / "run"
    return runs


def log_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    apart = ("images/s", "data_wait", "seconds", "revision", "left_out")
    return [{k: v for k, v in line.items() if k not in apart} for line in lines]


def state_of(run: Path, name: str = "last.pt") -> dict:
    return torch.load(run / name, weights_only=True)


def assert_same_run(run: Path, other: Path, tolerance: float = 0) -> None:
    """The same weights, optimiser, averages, best weights and log, but for timings; bit for bit, if not said otherwise."""
    def compare(a, b):
        (mine, form), (theirs, other_form) = tree_flatten(a), tree_flatten(b)
        assert form == other_form
        for x, y in zip(mine, theirs):
            if isinstance(x, (torch.Tensor, float)):
                torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
            else:
                assert x == y

    compare(log_of(run), log_of(other))
    for name, keys in (("last.pt", ("model", "average", "optimizers", "samples", "best", "epoch")),
                       ("best.pt", ("model", "metrics", "epoch"))):  # fmt: skip
        a, b = state_of(run, name), state_of(other, name)
        compare({key: a[key] for key in keys}, {key: b[key] for key in keys})
    assert {p.name for p in run.iterdir()} == {"best.pt", "last.pt", "log.jsonl", "panels.png"}


@pytest.mark.parametrize("train_trunk, muon", [(True, 0.0), (False, 0.0), (True, 2.0)])
def test_parameter_groups_are_disjoint_and_complete(train_trunk, muon):
    model = RS2SAM2(replace(PRESETS["tiny"], image_size=64, train_trunk=train_trunk))
    groups = optimizers.parameter_groups(model, Recipe(lr=1e-3, foundation_rate=0.5, muon=muon))
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters() if p.requires_grad}
    assert [group["lr"] for group in groups] == ([1e-3, 5e-4, 2e-3, 1e-3] if muon else [1e-3, 5e-4])
    assert all(group["peak"] == group["lr"] for group in groups)
    fusion, foundation = ({id(p) for group in groups[n::2] for p in group["params"]} for n in (0, 1))
    trunk = model.image_encoder.trunk.blocks[0]
    attention = model.decoder_fusion.attention.in_proj_weight
    for p in (model.mask_prompt.token.weight, attention, trunk.space_adapter.up.weight):
        assert id(p) in fusion
    assert id(model.mask_decoder.mask_tokens.weight) in foundation
    assert (id(trunk.block.norm1.weight) in foundation) == train_trunk
    if muon:
        taken, joint = {id(p) for group in groups[2:] for p in group["params"]}, model.union_encoder.joint[0]
        assert all(p.ndim == 2 and min(p.shape) > 1 for group in groups[2:] for p in group["params"])
        for p in (joint.mlp[0].weight, joint.attention.in_proj_weight, trunk.block.attn.qkv.weight, attention):
            assert id(p) in taken
        tables = (model.union_encoder.positional_embedding, model.mask_decoder.mask_tokens.weight, model.no_mem_embed)
        for p in (*tables, model.union_encoder.visual.conv1.weight, model.text_weight.weight, joint.mlp[0].bias):
            assert id(p) in ids and id(p) not in taken
    for optimizer in optimizers.optimizers_for(model, Recipe(muon=muon)):
        optimizer.step()  # takes the groups as they are


def test_muon_is_timm_s():
    torch.manual_seed(0)
    first = [torch.randn(shape) for shape in [(16, 32), (32, 16), (16, 32), (8, 8), (16, 32), (48, 16)]]
    ours, theirs = ([nn.Parameter(p.clone()) for p in first] for _ in range(2))
    ours_in, theirs_in = ([{"params": ps[:4], "lr": 0.02}, {"params": ps[4:], "lr": 0.01}] for ps in (ours, theirs))
    optimizer, expected = optimizers.Muon(ours_in, 0.1), timm.optim.Muon(theirs_in, weight_decay=0.1, nesterov=True, ns_steps=4)
    for step in range(3):
        for p, q in zip(ours, theirs):
            p.grad = q.grad = torch.randn(p.shape) if p is not ours[3] or step else None  # not part of the first step
        optimizer.step()
        expected.step()
    for p, q, start in zip(ours, theirs, first):
        assert (p - q).norm() < 0.03 * (q - start).norm()  # timm's products are in bfloat16
    mine, theirs = ({k: v["momentum_buffer"] for k, v in o.state_dict()["state"].items()} for o in (optimizer, expected))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)  # either's run can be resumed


def test_learning_rates():
    cosine, constant = Recipe(schedule="cosine"), Recipe(schedule="constant")
    assert [train.learning_rate(cosine, p, 0) for p in (0, 0.025, 0.05, 0.525, 1)] == pytest.approx([1e-3, 0.5, 1, 0.5, 1e-3])
    assert [train.learning_rate(constant, 0.5, epoch) for epoch in (0, 49, 50, 59)] == [1, 1, 0.1, 0.1]


def resolved(*arguments) -> tuple[Preset, Recipe]:
    args, checkpoint = train.parse(list(map(str, arguments)))
    return train.resolve(args.model, args.set, checkpoint, resume=bool(args.resume))


def test_settings_reach_preset_and_recipe():
    preset, recipe = resolved("--model", "base", "--set", "lr=2e-3", "image_size=512", "--set", "losses.dice=0.5",
                              "--batch-size", 6, "--epochs", 3)  # fmt: skip
    assert preset == replace(PRESETS["base"], image_size=512)
    losses = RECIPES["base"].losses | {"dice": 0.5}
    assert recipe == replace(RECIPES["base"], lr=2e-3, losses=losses, batch_size=6, epochs=3)
    for three in (("--epochs", 3), ("--set", "epochs=3")):  # the budget in samples gives way
        assert resolved("--model", "tiny", *three)[1] == replace(RECIPES["tiny"], epochs=3, samples=0)


def test_overflow_is_the_scaler_s_business(scenes):
    """A step whose gradient overflows is left out and its scale halved; one that does so at a scale below 1 stops."""
    args, _ = train.parse(list(map(str, new_run(scenes, "muon=0.0"))))
    preset, recipe = train.resolve(args.model, args.set)
    model, *sets = train.prepare(args, preset, recipe, None, None)
    run = train.Run(args, recipe, model, torch.device("cpu"), *sets)
    loader = torch.utils.data.DataLoader(run.train_set, 4, collate_fn=train.Collate(model.union_encoder.tokenizer))
    batch, stop = next(iter(loader)), Namespace(number=0)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    handle = run.trained[0].register_hook(lambda grad: grad.fill_(math.inf))
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    for scale in (1.0, 0.5):
        train.train_step(run, batch, stop)
        assert run.scaler.get_scale() == scale
    assert all(torch.equal(v, before[k]) for k, v in run.model.state_dict().items())
    with pytest.raises(UserError, match="gradient inf"):
        train.train_step(run, batch, stop)
    handle.remove()
    for optimizer in run.optimizers:
        optimizer.zero_grad()
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    train.train_step(run, batch, stop)
    assert any(not torch.equal(v, before[k]) for k, v in run.model.state_dict().items())


def test_a_run_leaves_what_it_promises(undisturbed):
    printed, (first, *lines) = (undisturbed.parent / "printed").read_text(), log_of(undisturbed)
    assert {p.name for p in undisturbed.iterdir()} == {"best.pt", "last.pt", "log.jsonl", "panels.png"}
    link = undisturbed.parent / "best.pt"
    assert link.is_symlink() and link.resolve() == (undisturbed / "best.pt").resolve()
    # the last batch of an epoch is whole and reaches into the next pass
    assert [(line["epoch"], line["samples"]) for line in lines] == [(1, 12), (2, 20)]
    assert all(math.isfinite(line[key]) for line in lines for key in ("loss", *RECIPES["tiny"].losses))
    assert lines[0]["val"]["samples"] == 12 and lines[1]["loss"] < lines[0]["loss"]
    preset, recipe = resolved(*new_run("DIR")[:-len(SMALL)], *SMALL)
    assert (first["run"], first["model_name"], first["init"]) == ("run", "tiny", None)
    assert first["preset"] == json.loads(json.dumps(asdict(preset))) and first["recipe"]["losses"] == recipe.losses
    assert [line["lr"] for line in lines] == [recipe.lr * train.learning_rate(recipe, share, 0) for share in (8 / 20, 16 / 20)]
    seconds = [json.loads(line)["seconds"] for line in (undisturbed / "log.jsonl").read_text().splitlines()[1:]]
    assert 0 < seconds[0] < seconds[1] <= state_of(undisturbed)["seconds"]
    assert f"{presets.in_words('preset', preset)}\n{presets.in_words('recipe', recipe)}\n" in printed
    told = (" total, ", " trained, ", " frozen", "epoch 2: loss ", ", cpu, run run", "score it with `python evaluate.py")
    assert all(text in printed for text in told)


def test_a_checkpoint_means_the_same_whatever_becomes_of_presets_py(undisturbed, monkeypatch):
    best, last = state_of(undisturbed, "best.pt"), state_of(undisturbed)
    preset, recipe = resolved(*new_run("DIR")[:-len(SMALL)], *SMALL)
    for checkpoint in (best, last):
        assert checkpoint["preset"] == asdict(preset) and checkpoint["recipe"] == asdict(recipe)
        json.dumps({k: v for k, v in checkpoint.items() if k not in ("model", "tokenizer", "average", "optimizers")})
        assert set(checkpoint["preset"]) == {f.name for f in fields(Preset)} and checkpoint["left_out"] == []
    scored = max(log_of(undisturbed)[1:], key=lambda line: line["val"]["mIoU"] + line["val"]["oIoU"])
    assert best["epoch"] == scored["epoch"] and best["metrics"] == scored["val"]
    assert best["run"] == "run" and best["init"] is None and best["taught"] == taught(open_dataset(best["data"], "train"))
    assert best["taught"]["generated"] and "the" in best["taught"]["words"]
    assert best.keys() < last.keys() and {"model_name", "data", "metrics", "epoch", "revision", "torch"} < best.keys()
    assert all(torch.is_tensor(v) for v in best["model"].values()) and best["metrics"]["samples"] == 12
    monkeypatch.setitem(presets.RECIPES, "tiny", Recipe(lr=9.0))
    monkeypatch.setitem(presets.PRESETS, "tiny", replace(PRESETS["tiny"], reduction=2))
    assert (stored_preset(best), stored_recipe(best)) == (preset, recipe) == resolved("--resume", undisturbed)


def test_a_set_smaller_than_a_batch_and_a_loss_without_boundary(scenes, tmp_path):
    run(tmp_path, *new_run(scenes, "losses={'dice': 1.0}"), "--batch-size", 16, "--epochs", 5, ranks=2)
    lines = log_of(tmp_path / "run")[1:]
    assert [line["samples"] for line in lines] == [16, 32, 48, 64, 80] and lines[0]["loss"] == lines[0]["dice"]


def test_a_compiled_and_edited_run_goes_all_its_ways(scenes, undisturbed, in_process, monkeypatch):
    """Trained, validated, stopped, resumed and scored with compiled blocks, as on a card; and as an ablation does it."""
    models, edited, kinds, backward = [], [], [], train.backward

    def on_device(model, device):
        kinds.append(compile_blocks(model, backend="eager"))
        models.append(model)
        return model

    def stop(run, *args, **kwargs):
        if run.samples == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(run, *args, **kwargs)

    torch._dynamo.reset(), counters.clear()
    monkeypatch.setattr(train, "on_device", on_device)
    monkeypatch.setattr(train, "backward", stop)
    out, ablation = Path("run"), {"edit": edited.append, "left_out": ("x", "y")}
    with pytest.raises(SystemExit) as end:
        train.main(list(map(str, new_run(scenes))), **ablation)
    assert end.value.code == 143 and state_of(out)["samples"] == 16 and "val" in log_of(out)[1]
    train.main(["--resume", "run"], **ablation)
    assert models == edited and len(edited) == 2
    assert counters["stats"]["unique_graphs"] == kinds[0] <= 16  # blocks of one shape have one; scoring and panels have none
    assert_same_run(out, undisturbed, tolerance=1e-5)
    assert state_of(out)["left_out"] == state_of(out, "best.pt")["left_out"] == ["x", "y"]
    with pytest.raises(SystemExit):  # not without its edit
        train.main(["--resume", "run"])


def test_a_signal_finishes_the_step_and_saves_or_ends_at_once(scenes, undisturbed, tmp_path):
    """While there is nothing to go on with yet; in the middle of an epoch; in an epoch's last step, too late for the step;
    while it is validated; in the run's last step. In between there are workers."""
    printed = run(tmp_path / "none", *new_run(scenes), first=at("prepare", 0, SIGNAL.format("SIGINT")), code=130)
    assert not (tmp_path / "none" / "run").exists() and "go on with" not in printed
    args = new_run(scenes)
    for name, where, samples, saved in (("SIGTERM", "backward", 0, 4), ("SIGINT", "check_finite", 8, 12),
                                        ("SIGTERM", "score", 0, 12), ("SIGINT", "backward", 16, 20)):  # fmt: skip
        code = {"SIGTERM": 143, "SIGINT": 130}[name]
        printed = run(tmp_path, *args, first=at(where, samples, SIGNAL.format(name)), code=code)
        assert printed.endswith("\nstopped; go on with: python train.py --resume run\n")
        assert state_of(tmp_path / "run")["samples"] == saved
        assert len(log_of(tmp_path / "run")) == (2 if samples == 16 else 1)
        args = (*GO_ON, "--workers", 2)
    assert printed.count("go on with") == 4
    run(tmp_path, *GO_ON)
    assert_same_run(tmp_path / "run", undisturbed)


def test_killed_while_checkpoints_are_written_and_at_random_moments(scenes, undisturbed, tmp_path):
    """In the middle of a file, before it is flushed, before it is renamed; by a timer of the process's own time, which ends it
    as SIGKILL does: nothing runs any more. last.pt is whole each time."""
    rng, last = random.Random(0), tmp_path / "run" / "last.pt"
    for call in (1, 7, 8, None):
        timer = f"signal.setitimer(signal.ITIMER_VIRTUAL, {rng.uniform(0.3, 1)})\n"
        first = EVERY_STEP + (DIE.format(call=call) if call else timer)
        (code,) = end(start(tmp_path, *(GO_ON if last.exists() else new_run(scenes)), first=first))
        assert code in ([-signal.SIGKILL] if call else [-signal.SIGVTALRM, 0])
        assert not last.exists() or state_of(last.parent)["samples"] % 4 == 0
    printed = run(tmp_path, *GO_ON)
    assert {"save", "fsync", "replace"} == set(re.findall("killed in (.*)", printed))
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_full_disk_is_one_sentence_and_what_was_saved_stays(scenes, undisturbed, tmp_path):
    """Before the first checkpoint, at a later last.pt, at best.pt; then there is room again."""
    run(tmp_path, *new_run(scenes), first=FULL, code=1)
    assert not list((tmp_path / "run").iterdir())
    run(tmp_path, *new_run(scenes), first=EVERY_STEP + at("backward", 8, FULL), code=1)
    assert state_of(tmp_path / "run")["samples"] == 8
    printed = run(tmp_path, *GO_ON, first=at("score", 0, FULL), code=1)
    assert state_of(tmp_path / "run")["samples"] == 12 and not (tmp_path / "run" / "best.pt").exists()
    told = r"train.py: run/(.*).pt can't be written \(File too large\): make room .* what was saved before is untouched\n"
    assert re.findall(told, printed) == ["last", "last", "best"] and printed.count("train.py:") == 3
    run(tmp_path, *GO_ON)
    assert_same_run(tmp_path / "run", undisturbed)


def test_what_is_not_finite_stops_within_the_step(scenes, tmp_path):
    """A gradient of one process; a weight of one of two, which both say as one."""
    for ranks, spoilt, loss in ((1, "register_hook(lambda grad: grad.fill_(float('inf')))", r"\d.\d+"),
                                (2, "data.fill_(float('nan'))", "nan")):  # fmt: skip
        see = at("check_finite", 8, "print('batch', *args[3])") + at("backward", 8, f"args[0].trained[0].{spoilt}", ranks - 1)
        cwd = tmp_path / str(ranks)
        printed = run(cwd, *new_run(scenes), first=EVERY_STEP + QUIET + see, ranks=ranks, code=1)
        (batch,), (said,) = (re.findall(regex, printed, re.MULTILINE) for regex in (
            "^batch (.*)", rf"^train.py: the loss became {loss} and its gradient (?:nan|inf) at sample 8 \(batch (.*?)\)"))
        said = said.split(", ")
        assert set(batch.split()) <= set(said) and len(said) > 2 and "go on with" not in printed
        state = state_of(cwd / "run")
        assert state["samples"] == 8 and all(v.isfinite().all() for v in state["model"].values())


def test_processes_and_parts_compute_the_same_steps(doubles):
    one = state_of(doubles["1 x 1"])
    assert one["model"]["text_weight.weight"].dtype == torch.float64 and one["samples"] == 20
    for how in ("2 x 1", "2 x 2"):
        assert_same_run(doubles["1 x 1"], doubles[how], tolerance=1e-9)
    printed = (doubles["2 x 1"].parent / "printed").read_text()
    assert all(printed.count(told) == 1 for told in ("2 x cpu", "parameters:", "epoch 1:", "epoch 2:", "score it with"))


def test_two_processes_count_nothing_twice_in_scoring(doubles):
    cwd, seen = doubles["1 x 1"].parent, []
    for ranks in (1, 2):
        run(cwd, "--ckpt", "run/best.pt", "--split", "val", "--json", f"{ranks}.json", module="evaluate", ranks=ranks)
        seen.append(json.loads((cwd / f"{ranks}.json").read_text()))
    assert seen[0] == seen[1] and len({(row["id"], row["phrase"]) for row in seen[0]["rows"]}) == seen[0]["scores"]["samples"]
    assert len(seen[0]["rows"]) == 12 and (cwd / "printed").read_text().count("split val") == 2


def test_two_processes_share_the_images_to_predict(scenes, undisturbed, tmp_path):
    """Each image once, with both phrases, to the same masks; what fails on one process is told by one, after all the rest."""
    first, *others = sorted((scenes / "images" / "rrsisd" / "JPEGImages").iterdir())
    (broken := tmp_path / "broken.jpg").write_bytes(b"no image")  # the second, so of rank 1
    args = ("--ckpt", undisturbed / "best.pt", "--image", first, broken, *others, "--phrase", "the ship", "--phrase",
            "the plane on the left", "--probabilities", "--batch", 1, "--device", "cpu", "--out", "out")  # fmt: skip
    found = []
    for ranks, seen in ((1, 18), (2, 10)):
        printed = run(tmp_path / str(ranks), *args, first="import predict", module="predict", ranks=ranks, code=1)
        told = printed.split("predict.py: 2 of 20 failed:\n")
        assert len(told) == 2 and told[1].count(f"  {broken}, ") == 2 and printed.count(" -> out/") == seen
        folder = tmp_path / str(ranks) / "out"
        lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        found.append({(line["image"], line["phrase"]): (folder / line["probabilities"]).read_bytes() for line in lines})
        assert len(lines) == len(found[-1]) == 18
    assert found[0] == found[1]


@pytest.mark.parametrize("where, rank, samples", [("backward", 1, 12), ("check_finite", 0, 8)])
def test_two_processes_stop_after_the_same_step(scenes, doubles, tmp_path, where, rank, samples):
    """A signal to one of them: in a step; after the sums of an epoch's last step are read, too late for that one. Two go on,
    and one with what two began."""
    first = DOUBLE + at(where, samples, SIGNAL.format("SIGTERM"), rank)
    printed = run(tmp_path, *new_run(scenes, "muon=0.0"), first=first, ranks=2, code=143)
    assert printed.endswith("\nstopped; go on with: python train.py --resume run\n") and printed.count("go on with") == 1
    assert state_of(tmp_path / "run")["samples"] == samples + 4
    run(tmp_path, *GO_ON, first=DOUBLE, ranks=2 if rank else 1)
    assert_same_run(tmp_path / "run", doubles["2 x 1"], tolerance=0 if rank else 1e-9)


def test_two_processes_are_killed_while_one_writes(scenes, doubles, tmp_path):
    """In the middle of a checkpoint; the other waits for it."""
    first = DOUBLE + QUIET + "if os.environ['RANK'] == '0':\n" + re.sub("(?m)^", "    ", EVERY_STEP + DIE.format(call=6))
    codes = end(start(tmp_path, *new_run(scenes, "muon=0.0"), ranks=2, first=first))
    assert codes == [-signal.SIGKILL, 1] and "killed in save" in (tmp_path / "printed").read_text()
    assert state_of(tmp_path / "run")["samples"] == 0
    run(tmp_path, *GO_ON, first=DOUBLE, ranks=2)
    assert_same_run(tmp_path / "run", doubles["2 x 1"])


def test_the_processes_that_train_py_starts_stop_together(scenes, tmp_path):
    """Two processes by torchrun, and Ctrl-C, as a terminal sends it, to everybody."""
    endless = new_run(scenes, "epoch_range=(1000000, 1000000)", gpus=())
    (program,) = start(tmp_path, *endless, "--workers", 1)
    until = time.time() + 100
    while not (tmp_path / "run" / "last.pt").exists() and time.time() < until:
        time.sleep(0.1)
    time.sleep(0.5)  # and steps begin
    os.killpg(program.pid, signal.SIGINT)
    assert end([program]) == [130], (tmp_path / "printed").read_text()
    printed = (tmp_path / "printed").read_text()
    assert "Traceback" not in printed and state_of(tmp_path / "run")["samples"] > 0
    assert printed.count("stopped; go on with: python train.py --resume run\n") == 1
    assert os.cpu_count() < 2 or "2 x cpu" in printed
    with pytest.raises(ProcessLookupError):  # nobody is left
        time.sleep(0.5)
        os.killpg(program.pid, 0)


def test_a_broken_sample_of_one_process_is_one_sentence(tmp_path):
    scenes = make_scenes(tmp_path / "scenes", train=6, val=2, test=1, size=96, seed=1, progress=False)
    samples = open_dataset(scenes, "train").samples
    orders = (TrainingOrder(len(samples), 0, 0, 4, 4, rank, 2) for rank in (0, 1))
    first, second = ({samples[i].image for i, _ in next(iter(order))} for order in orders)
    Path((second - first).pop()).write_bytes(b"no image")
    codes = end(start(tmp_path, *new_run(scenes), ranks=2, first=QUIET))
    assert codes == [1, 2]
    *beginning, sentence = (tmp_path / "printed").read_text().splitlines()
    assert re.fullmatch(r"train.py: Sample \d+ of scenes .* is broken: .* not a sound image\.", sentence), sentence
    assert [line.split()[0] for line in beginning if line[0] != " "] == ["tiny", "parameters:", "preset:", "recipe:"]


@pytest.mark.parametrize("args, told", [
    ("--data nowhere", "no folder nowhere"),
    ("--gpus 99", "use --gpus 0"),
    ("--accumulate 3", "a batch of 8 can't be divided evenly by 1 process with --accumulate 3: make --batch-size a"),
    ("--set lrr=1", "--set lrr=1: write name=value, where name is one of sam2, encoder,"),
    ("--set lr=fast", "lr is of kind float"),
    ("--set losses.dyce=1", "dyce"),
    ("--data SCENES --model large", "laion2b_s32b_b82k=FILE"),  # says how to name a local file
    ("--resume nowhere", "nothing to resume"),
    ("--init RUN/best.pt --model tiny", "--model and --init exclude each other"),
    ("--init RUN/best.pt --set reduction=2", "reduction is 1 in the checkpoint, 2 is asked for; --init fixes the network"),
    ("--init gone.pt", "gone.pt is a link to runs/gone/best.pt, which is not there"),
    ("--resume RUN --seed 1", "--seed can't be changed by --resume"),
    ("--resume RUN --set image_size=96", "image_size is 64 in the checkpoint, 96 is asked for; --resume can change lr, "),
    ("--resume RUN --set lr=1e-3 ema=0.5", "ema is 0.995 in the checkpoint, 0.5 is asked for; --resume can change lr, "),
    ("--resume RUN/best.pt", "holds weights alone"),
    ("--data SCENES --out RUN", "holds another run: choose a new --out, or go on with it by --resume"),
])  # fmt: skip
def test_wrong_input_is_one_sentence_before_anything_long(args, told, scenes, undisturbed, in_process, monkeypatch, capsys):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(hub, "get_hf_file_metadata", no_network)
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("it trains"))
    Path("gone.pt").symlink_to("runs/gone/best.pt")
    args = args.replace("SCENES", str(scenes)).replace("RUN", str(undisturbed))
    with pytest.raises(SystemExit) as end:
        train.main((args if "--gpus" in args or "--resume" in args else f"{args} --gpus 0").split())
    printed = capsys.readouterr()
    assert end.value.code == (1 if "large" in args else 2) and not printed.out
    assert printed.err.startswith("train.py: ") and told in printed.err
    assert printed.err.count("\n") == 1 or "nowhere" in args  # which shows the layouts
    assert not Path("runs").exists()


def test_resume_takes_a_new_learning_rate_and_what_changes_no_result(undisturbed):
    changes = ("--resume", undisturbed, "--set", "lr=1e-5", "--epochs", 5, "--workers", 1)
    args, checkpoint = train.parse(list(map(str, changes)))
    stored = stored_recipe(checkpoint)
    assert stored.lr == 1.4e-3 and stored.epochs == 2 and resolved(*changes)[1] == replace(stored, lr=1e-5, epochs=5)
    assert (args.workers, args.model, args.out, args.gpus) == (1, "tiny", undisturbed, 0)


def test_a_run_that_goes_on_with_new_numbers_says_and_keeps_so(undisturbed, in_process, capsys):
    shutil.copytree(undisturbed, "run")
    before = state_of(Path("run"))["seconds"]
    train.main(["--resume", "run", "--set", "lr=1e-5", "--epochs", "3"])
    told = "\nfrom here on epochs is 3, it was 2\nfrom here on lr is 1e-05, it was 0.0014\nepoch 3:"
    assert told in capsys.readouterr().out.replace("\r", "")
    state, lines = state_of(Path("run")), log_of(Path("run"))
    assert lines[:3] == log_of(undisturbed) and lines[3] == {"resumed at": 20, "set": ["lr=1e-5", "epochs=3"]}
    assert len(lines) == 5 and lines[4]["lr"] <= 1e-5 and before < state["seconds"] < before + 100
    assert state["args"]["set"] == [*SMALL, "epochs=2", "batch_size=4", "lr=1e-5", "epochs=3"]


def test_a_fine_tuned_run_knows_its_chain(scenes, undisturbed, in_process, capsys):
    Path("best.pt").symlink_to(undisturbed / "best.pt")
    small = ("--data", str(scenes), "--epochs", "1", "--batch-size", "4", "--workers", "0", "--gpus", "0", "--out")
    train.main([*small, "second", "--init", "best.pt", "--set", "epoch_range=(4, 4)"])
    score = {key: state_of(undisturbed, "best.pt")["metrics"][key] for key in ("mIoU", "oIoU")}
    chain = {"file": str(undisturbed / "best.pt"), "model": "tiny", "run": "run", "data": str(scenes), "score": score}
    second, printed = state_of(Path("second"), "best.pt"), capsys.readouterr().out
    assert second["init"].items() > chain.items() and second["init"] == log_of(Path("second"))[0]["init"]
    assert f"\nbest.pt -> {undisturbed / 'best.pt'}: tiny, run run, trained on {scenes}, epoch " in printed
    assert f"best.pt links to second/best.pt from now on, not to {undisturbed / 'best.pt'}\n" in printed
    train.main([*small, "third", "--init", "best.pt", "--set", "epoch_range=(4, 4)"])
    third = provenance(state_of(Path("third"), "best.pt"))
    assert [third["run"], third["init"]["run"], third["init"]["init"]["run"]] == ["third", "second", "run"]
    assert in_words(third).count("fine-tuned from") == 2 and third["init"]["file"] == "second/best.pt"


def test_curves_of_a_run(undisturbed, tmp_path, monkeypatch):
    shutil.copy(undisturbed / "log.jsonl", tmp_path)
    lines, plots = log_of(tmp_path)[1:], curves.curves(curves.read_log(tmp_path))
    assert plots["validation, per cent"] == {k: ([12, 20], [line["val"][k] for line in lines]) for k in ("mIoU", "oIoU")}
    assert plots["learning rate"] == {"of the fusion modules": ([12, 20], [line["lr"] for line in lines])}
    assert plots["loss and its terms"].keys() == {"loss", *RECIPES["tiny"].losses}
    assert plots["loss and its terms"]["dice"] == ([12, 20], [line["dice"] for line in lines])
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "log.jsonl").write_text('{"epoch": 1, "samples": 4, "loss": 2.0, "val": {"mIoU": 1.0}}\n')
    assert curves.curves(curves.read_log(tmp_path / "old"))["learning rate"] == {}  # of an earlier revision
    for folder, told in ((tmp_path / "gone", "log.jsonl can't be read"), (tmp_path / "empty", "has no epoch yet")):
        if folder.name == "empty":
            folder.mkdir()
            (folder / "log.jsonl").write_text('{"run": "x"}\n')
        with pytest.raises(UserError, match=told):
            curves.main([str(folder)])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="matplotlib, which is missing: pip install matplotlib"):
        curves.main([str(tmp_path)])
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    for folder in (tmp_path, tmp_path / "old"):
        curves.main([str(folder)])
        assert cv2.imread(str(folder / "curves.png")).std() > 1


def test_help_and_flags(capsys):
    assert len([action for action in train.command_line()._actions if action.dest != "help"]) <= 17
    for arguments, code, told in (("--help", 0, "python train.py --resume runs/"), ("--epochs 0", 2, "an integer of 1")):
        with pytest.raises(SystemExit) as end:
            train.command_line().parse_args(arguments.split())
        printed = capsys.readouterr()
        assert end.value.code == code and told in printed.out + printed.err
