"""Several processes: the same computation as one, whatever their number; their files, their failures, their end.

The two processes run this file as a script, a single one runs the same functions in here.
"""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import data
import evaluate
import processes
import runs
import train
from checkpoints import load_checkpoint, read_checkpoint
from model import PRESETS, RS2SAM2, TINY_CLIP
from processes import gather, rank, share, world_size
from recipe import Recipe
from scenes import make_scenes

ROOT = Path(__file__).parent.parent
RECIPE = Recipe(epoch_range=(9, 9), lr=1e-3, ema=0.9, augment="ours", dice=1.0, pseudo=5.0)
BATCH, STEPS, STOP = 4, 6, 4  # an epoch of 9 samples is steps of 4, 4 and 1: the last leaves one of two ranks nothing


# ---- the parts -----------------------------------------------------------------------------------------------------------


def new_trainer(scenes: Path, out: Path, accumulate: int = 1) -> train.Trainer:
    """In float64, where nothing but the order of sums tells numbers of processes apart."""
    torch.manual_seed(0)
    clip = TINY_CLIP | {"vision_cfg": TINY_CLIP["vision_cfg"] | {"image_size": 32}}
    model = RS2SAM2(replace(PRESETS["tiny"], image_size=64, encoder_name=clip)).double()
    model.prompt_encoder.pe_layer.float()  # sam2 multiplies its codes of places with float32 coordinates
    args = Namespace(
        lr=RECIPE.lr, epochs=2, batch_size=BATCH, accumulate=accumulate, seed=0, workers=0, out=out, data=str(scenes),
        model="tiny", checkpoint_activations=False,
    )  # fmt: skip
    out.mkdir(exist_ok=True)
    train_set = data.open_dataset(scenes, "train", one_phrase=True, augment=RECIPE.augment)
    return train.Trainer(args, RECIPE, model, torch.device("cpu"), train_set, data.open_dataset(scenes, "val"))


def follow(trainer: train.Trainer) -> dict:
    """Train to the end of the run; last.pt is left as it was after STOP steps -> what there was to see on the way."""
    step, seen = trainer.step, {"ids": [], "random": [], "terms": [], "gradients": [], "reductions": 0}

    def watched(batch, count):
        mine = share(count, rank(), world_size())
        seen["ids"].append(sum(gather(batch["id"] if mine else []), []))
        terms = step(batch, count)
        seen["terms"].append(terms)
        if trainer.samples == 2 * BATCH + 1 + BATCH:
            trainer.save_last({})
        return terms

    def reduce(state, bucket):
        seen["reductions"] += 1
        return allreduce_hook(dist.group.WORLD, bucket)

    def gradients(*_):
        seen["gradients"].append([p.grad.clone() for p in trainer.trained])

    trainer.step = watched
    trainer.optimizer.register_step_pre_hook(gradients)
    trainer.model.register_forward_pre_hook(lambda *_: seen["random"].append(gather(torch.rand(()).item())))
    if world_size() > 1:
        trainer.synced.register_comm_hook(None, reduce)
    while trainer.samples < trainer.total_samples:
        trainer.run_epoch()
        trainer.epoch = dict(train.EPOCH)  # as Trainer.run does after validation
    return seen | {"weights": dict(trainer.model.state_dict()), "average": trainer.average.mean}


def resumed(scenes: Path, out: Path, last: Path) -> dict:
    trainer, checkpoint = new_trainer(scenes, out), read_checkpoint(last)
    trainer.model.load_state_dict(checkpoint["model"])
    trainer.resume(checkpoint)
    return follow(trainer)


def scored(scenes: Path, out: Path) -> tuple[list, list]:
    """Scoring in batches of 4, which ranks share, and of 20, which leave one of two ranks nothing -> the rows of each; how
    many batches each rank computed."""
    trainer, batches = new_trainer(scenes, out), []
    trainer.model.register_forward_pre_hook(lambda *_: batches.append(1))
    rows = [evaluate.score(trainer.model, trainer.val_set, batch_size=size) for size in (4, 20)]
    return rows, gather(len(batches))


def everything(scenes: Path, out: Path, alone: Path) -> None:
    """All the two processes do in these tests, for their start takes the longest."""
    torch.set_num_threads(1)
    results = {
        "whole": follow(new_trainer(scenes, out)),
        "accumulated": follow(new_trainer(scenes, out.with_name("accumulated"), accumulate=2)),
        "resumed": resumed(scenes, out.with_name("on"), alone),
        "scores": scored(scenes, out),
    }
    if not rank():
        torch.save(results, out / "results.pt")


FAIL = """
import atexit, os, sys
from pathlib import Path
from processes import gather, process_group, rank, rank_0_first

how, pids = sys.argv[1:]
with process_group():
    Path(pids, str(rank())).write_text(str(os.getpid()))
    gather(None)
    if how == "mistake":
        with rank_0_first():
            print("nothing there", file=sys.stderr)
            sys.exit(2)
    if how == "not finite":  # which all ranks see
        raise FloatingPointError("the loss became nan")
    if rank():
        if how == "killed":
            os.kill(os.getpid(), 9)
        atexit.register(os.abort)  # what threads of a process group that is left standing do now and then
        raise ValueError("something unforeseen")
    gather(None)  # waits for rank 1
"""


# ---- tests -----------------------------------------------------------------------------------------------------------------


def start(*command, launcher: str, cwd: Path, code: int = 0) -> str:
    """Run a script in two processes, by torchrun or as --gpus N does -> what was printed."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    own = ["-c", "import sys, processes; processes.launch(2, sys.argv[1:])"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *(torchrun if launcher == "torchrun" else own), *map(str, command)],
        cwd=cwd, env=env, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("data") / "scenes", train=6, val=3, test=2, size=96, progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def one(scenes, folder) -> dict:
    """The run in one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seen = follow(new_trainer(scenes, folder / "one"))
    torch.set_num_threads(threads)
    return seen


@pytest.fixture(scope="module")
def two(one, scenes, folder) -> dict:
    """What two processes did, among it the same run."""
    out = folder / "two"
    start(__file__, scenes, out, folder / "one" / "last.pt", launcher="own", cwd=folder)
    return torch.load(out / "results.pt", weights_only=True)


def assert_same(a: dict, b: dict, steps: int) -> None:
    """The last `steps` steps and the weights, to 1e-9 in float64."""
    assert a["ids"][-steps:] == b["ids"][-steps:]
    for key in ("terms", "gradients", "weights", "average"):
        mine, other = (x[key][-steps:] if isinstance(x[key], list) else x[key] for x in (a, b))
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def test_shares_are_the_batch_of_one_process():
    for size, batch_size, ranks in ((23, 8, 1), (23, 8, 2), (23, 8, 3), (17, 16, 8), (5, 8, 8)):
        stream = processes.Stream(7, seed=0, start=3, stop=3 + size)
        (whole,), several = ([list(processes.Shares(stream, batch_size, r, n)) for r in range(n)] for n in (1, ranks))
        assert sum(whole, []) == list(stream) and len(whole) == len(processes.Shares(stream, batch_size))
        for step, batch in enumerate(whole):
            taken = [several[r][step] for r in range(ranks) if share(len(batch), r, ranks)]
            assert sum(taken, []) == batch
            assert all(several[r][step] == batch[:1] for r in range(ranks) if not share(len(batch), r, ranks))
            assert max(map(len, taken)) - min(map(len, taken)) <= 1


def test_the_time_spent_waiting_for_data_is_that_of_the_loader(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def slow():
        for item in range(3):
            now[0] += 2
            yield item

    loader = data.Timed(slow())
    for _ in loader:
        now[0] += 5  # the step
    assert loader.seconds == 6


def test_two_processes_compute_what_one_does(one, two):
    assert len(one["ids"]) == STEPS and [len(ids) for ids in one["ids"]] == [4, 4, 1, 4, 4, 1]
    assert_same(one, two["whole"], STEPS)


def test_accumulated_steps_are_the_steps_and_meet_once(one, two, scenes, folder):
    assert_same(one, follow(new_trainer(scenes, folder / "three parts", accumulate=3)), STEPS)  # 1, 1 and 2 samples
    assert_same(one, two["accumulated"], STEPS)
    assert two["accumulated"]["reductions"] == two["whole"]["reductions"] >= STEPS


def test_resume_with_another_number_of_processes(one, two, scenes, folder):
    assert read_checkpoint(folder / "one" / "last.pt")["samples"] == 13
    assert_same(one, two["resumed"], STEPS - STOP)
    assert_same(one, resumed(scenes, folder / "on one", folder / "two" / "last.pt"), STEPS - STOP)


def test_random_numbers_go_on_where_they_were_and_differ_between_ranks(one, two, scenes, folder):
    again = resumed(scenes, folder / "again", folder / "one" / "last.pt")
    assert again["random"] == one["random"][STOP:] and len(set(map(tuple, one["random"]))) == STEPS
    assert two["resumed"]["random"] == two["whole"]["random"][STOP:]
    assert all(a != b for a, b in two["whole"]["random"])


def test_scores_are_the_same_whoever_computes_them(two, scenes, folder):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows, batches = scored(scenes, folder / "scores")
    torch.set_num_threads(threads)
    assert rows == two["scores"][0] and [len(r) for r in rows] == [15, 15]
    assert batches == [5] and two["scores"][1] == [3, 2]  # 4 and 1 of them; nothing is computed twice
    assert len({(row["id"], row["phrase"]) for row in rows[0]}) == 15


def test_the_command_lines_under_torchrun(scenes, tmp_path):
    args = ("--data", scenes, "--model", "tiny", "--image-size", 64, "--epochs", 1, "--batch-size", 40, "--gpus", 0)
    printed = start(ROOT / "train.py", *args, "--accumulate", 2, launcher="torchrun", cwd=tmp_path)
    assert "2 x cpu" in printed and all(printed.count(line) == 1 for line in ("parameters:", "epoch 1:", "wrote "))
    assert "Traceback" not in printed and "Warning" not in printed
    out = tmp_path / "runs" / "scenes-tiny-1"
    assert {p.name for p in out.iterdir()} == {"best.pt", "last.pt", "previous.pt", "log.jsonl", "panels.png"}
    (line,) = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    assert 0 < line["data_wait"] < 1 and line["samples"] == 280
    printed = start(ROOT / "evaluate.py", "--json", "scores.json", launcher="torchrun", cwd=tmp_path)
    assert printed.count("split test") == 1
    model, _ = load_checkpoint(out / "best.pt")
    sizes = {"image_size": 64, "encoder_size": model.union_encoder.image_size}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = evaluate.score(model, data.open_dataset(scenes, "test", **sizes))
    torch.set_num_threads(threads)
    assert json.loads((tmp_path / "scores.json").read_text())["rows"] == rows


@pytest.mark.parametrize(
    "how, code, says, not_said",
    [
        ("killed", 137, "the process of rank 1 was killed by SIGKILL", "Traceback"),
        ("unforeseen", 1, "the process of rank 1 ended with exit code 1", "closed by peer"),
        ("not finite", 1, "the process of rank 0 ended with exit code 1", "[rank1]"),
        ("mistake", 2, "nothing there", "process of rank"),
    ],
)
def test_the_end_of_one_process_is_the_end_of_all_and_said_once(how, code, says, not_said, tmp_path):
    script, pids = tmp_path / "fail.py", tmp_path / "pids"
    script.write_text(FAIL)
    pids.mkdir()
    printed = start(script, how, pids, launcher="own", cwd=tmp_path, code=code)
    assert printed.count(says) == 1 and not_said not in printed
    assert how != "unforeseen" or "something unforeseen" in printed
    assert len(list(pids.iterdir())) == 2
    for path in pids.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


def test_a_broken_sample_of_one_process_is_one_sentence(tmp_path):
    scenes = make_scenes(tmp_path / "scenes", train=6, val=3, test=2, size=96, progress=False)
    broken = data.open_dataset(scenes, "train").samples[0]
    Path(broken.image).write_bytes(b"no image")
    args = ("--data", scenes, "--model", "tiny", "--image-size", 64, "--gpus", 0, "--workers", 0)
    printed = start(ROOT / "train.py", *args, launcher="own", cwd=tmp_path, code=2)
    assert printed.count(f"Sample {broken.id} of") == 1 and "Traceback" not in printed, printed


def test_a_batch_too_small_to_share_is_said(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "world_size", lambda: 2)
    args = ("--data", scenes, "--model", "tiny", "--gpus", 0, "--batch-size", 3, "--accumulate", 2)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
    with pytest.raises(runs.UsageError, match="make it 4 or more"):
        train.main()


def test_a_half_set_environment_is_said(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(runs.UsageError, match="RANK is not"):
        with processes.process_group():
            pass


if __name__ == "__main__":
    with processes.process_group():
        everything(*map(Path, sys.argv[1:]))
