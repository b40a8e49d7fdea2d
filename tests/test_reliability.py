"""Nothing lost, nothing run: kills, signals, full disks, hostile files and numbers that go wrong.

Broken data sets have a file of their own, test_broken_data.py. The long tests:

    python -m pytest -m slow -s tests/test_reliability.py tests/test_broken_data.py
"""

import dataclasses
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import data
import runs
import stopping
import train
from checkpoints import read_checkpoint
from model import PRESETS, RS2SAM2, TINY_CLIP
from recipe import Recipe
from scenes import make_scenes

ROOT = Path(__file__).parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
SIGNALS = pytest.mark.skipif(sys.platform == "win32", reason="signals as Unix has them")

# Runs train.py's command lines, each in a child of its own, which need not import the libraries again. Epochs are short,
# and every step is saved. Python code of the test's comes first.
SERVER = """
import dataclasses, json, os, sys
import runs, train
train.RECIPES["tiny"] = dataclasses.replace(train.RECIPES["tiny"], epoch_range=(24, 24))
train.SAVE_EVERY = 0
for line in sys.stdin:
    job = json.loads(line)
    if not (pid := os.fork()):
        os.chdir(job["cwd"])
        for number in (1, 2):
            os.dup2(os.open("printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.argv = ["train.py", *job["args"]]
        exec(job["first"])
        try:
            with train.one_sentence("train.py", train.ERRORS, (FloatingPointError, train.WriteError)):
                signals = train.Signals()
                signals.watch()
                train.main(signals)
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 99
        sys.stdout.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

# Dies at the given call of those that a checkpoint is written with; torch.save's is in the middle of its file.
DIE = """
import signal, torch
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
runs.torch.save = dying(torch.save, "save")
os.replace, os.fsync = dying(os.replace, "replace"), dying(os.fsync, "fsync")
"""


class Server:
    """The child processes' parent."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, cwd: Path, *args, first: str = "") -> int:
        """Start a command line in a folder -> its process's number."""
        cwd.mkdir(exist_ok=True)
        job = {"cwd": str(cwd), "args": list(map(str, args)), "first": first}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self) -> int:
        """Wait for what was started -> its exit code."""
        return int(self.process.stdout.readline())

    def run(self, cwd: Path, *args, first: str = "") -> int:
        self.start(cwd, *args, first=first)
        return self.end()


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait(60)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("data") / "scenes", train=6, val=3, test=2, size=96, progress=False)


def new_run(scenes: Path, epochs: int = 2) -> tuple:
    return ("--data", scenes, "--model", "tiny", "--image-size", 64, "--gpus", 0, "--workers", 0, "--epochs", epochs,
            "--out", "run")  # fmt: skip


GO_ON = ("--resume", "run", "--workers", 0)


@pytest.fixture(scope="module")
def undisturbed(server, scenes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert server.run(folder, *new_run(scenes)) == 0, (folder / "printed").read_text()
    return folder / "run"


def log_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images/s", "data_wait")} for line in lines]


def assert_equal(a, b, where="") -> None:
    """Bit for bit, in nested dicts and lists."""
    if torch.is_tensor(a):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where} {key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for x, y in zip(a, b):
            assert_equal(x, y, where)
    else:
        assert a == b, where


def assert_same_run(run: Path, other: Path) -> None:
    """The same weights, optimiser, averages, best weights and log, but for timings."""
    assert log_of(run) == log_of(other)
    for name, keys in (("last.pt", ("model", "average", "optimizer", "average_steps", "samples", "best", "metrics")),
                       ("best.pt", ("model", "metrics", "epoch"))):  # fmt: skip
        a, b = (read_checkpoint(folder / name, checksums=True) for folder in (run, other))
        for key in keys:
            assert_equal(a[key], b[key], f"{name} {key}")
    assert not list(run.glob("*.part")) and (run / "panels.png").exists()


# ---- kills ----------------------------------------------------------------------------------------------------------------


@SIGNALS
def test_killed_while_checkpoints_are_written(server, scenes, undisturbed, tmp_path):
    """In the middle of a file, before it is flushed, between the two renames, before the log: last.pt or previous.pt is
    whole each time, and the end is that of an undisturbed run."""
    args, seen = new_run(scenes), set()
    for call in (3, 8, 11, 12, 13, 14, 21):
        assert server.run(tmp_path, *args, first=DIE.format(call=call)) == -signal.SIGKILL
        seen.add((tmp_path / "printed").read_text().split()[-1])
        if not (tmp_path / "run" / "last.pt").exists():
            seen.add("last.pt is away")
            args = args if call == 3 else GO_ON  # before the first of all
        else:
            args = GO_ON
    assert server.run(tmp_path, *GO_ON) == 0
    assert seen == {"save", "fsync", "replace", "last.pt is away"}
    assert "run/last.pt is missing: going on from run/previous.pt" in (tmp_path / "printed").read_text()
    assert "Traceback" not in (tmp_path / "printed").read_text()
    assert_same_run(tmp_path / "run", undisturbed)


def survive(server, scenes, undisturbed, folder: Path, kills: int, seed: int) -> tuple[int, int]:
    """Kill runs at so many random moments, beginning another when one is done -> (runs done, kills while a file was
    half-written)."""
    rng, done, half, killed, number = random.Random(seed), 0, 0, 0, 0
    while killed < kills or (folder / str(number)).exists():
        cwd = folder / str(number)
        args = GO_ON if any((cwd / "run" / name).exists() for name in ("last.pt", "previous.pt")) else new_run(scenes)
        pid = server.start(cwd, *args)
        if killed < kills:
            if rng.random() < 0.5:
                time.sleep(rng.uniform(0.05, 6))
            else:  # while something is written
                until = time.time() + rng.uniform(0.5, 6)
                while time.time() < until or (time.time() < until + 3 and not list(cwd.glob("run/*.part"))):
                    time.sleep(0.0005)
            os.kill(pid, signal.SIGKILL)
        code = server.end()
        assert code in (0, -signal.SIGKILL), (cwd / "printed").read_text()
        if code:
            killed += 1
            half += bool(list(cwd.glob("run/*.part")))
        else:
            assert_same_run(cwd / "run", undisturbed)
            done, number = done + 1, number + 1
    return done, half


@pytest.mark.slow
@SIGNALS
def test_killed_at_20_random_moments(server, scenes, undisturbed, tmp_path):
    done, half = survive(server, scenes, undisturbed, tmp_path, kills=20, seed=0)
    print(f"\n20 kills survived, {half} of them while a file was half-written, in {done} runs")
    assert half and done


def test_a_damaged_last_falls_back_to_the_one_before(server, scenes, undisturbed, tmp_path):
    """Truncated, or with a single bit changed: that is said, and what can't be read never takes the place of the other."""
    assert server.run(tmp_path, *new_run(scenes, epochs=1)) == 0
    run = tmp_path / "run"
    for damage in ("cut", "bit"):
        content = bytearray((run / "last.pt").read_bytes())
        if damage == "bit":
            content[len(content) // 2] ^= 1
        (run / "last.pt").write_bytes(content[: len(content) // 2] if damage == "cut" else content)
        before = (run / "previous.pt").read_bytes()
        # killed when the new last.pt is in its place, and the log is about to be written
        assert server.run(tmp_path, *GO_ON, "--epochs", 2, first=DIE.format(call=4)) == -signal.SIGKILL
        printed = (tmp_path / "printed").read_text()
        assert printed.count("run/last.pt can't be read: going on from run/previous.pt") == 1 + (damage == "bit")
        assert (run / "previous.pt").read_bytes() == before
        read_checkpoint(run / "last.pt", checksums=True)
    assert server.run(tmp_path, *GO_ON, "--epochs", 2) == 0
    for name in ("last.pt", "previous.pt"):
        (run / name).write_bytes(b"PK")
    assert server.run(tmp_path, *GO_ON) == 2
    assert (tmp_path / "printed").read_text().splitlines()[-1] == (
        "train.py: run/last.pt can't be read as a checkpoint: it is damaged or of another kind"
    )


# ---- signals --------------------------------------------------------------------------------------------------------------


def wait_for(path: Path, what: str = "", seconds: float = 100) -> None:
    until = time.time() + seconds
    while not (path.exists() and what in (path.read_text() if what else "")):
        assert time.time() < until, f"no {what} in {path}"
        time.sleep(0.02)


@SIGNALS
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_and_saves(server, scenes, undisturbed, tmp_path, number, code):
    never = "train.SAVE_EVERY = 1e9; step = train.Trainer.step\n"  # what is saved is saved for the signal
    slow = "def slower(*a):\n    print('step', flush=True)\n    time.sleep(0.3)\n    return step(*a)\n"
    pid = server.start(tmp_path, *new_run(scenes), "--workers", 1,
                       first="import time\n" + never + slow + "train.Trainer.step = slower")  # fmt: skip
    wait_for(tmp_path / "printed", "step")
    os.kill(pid, number)
    assert server.end() == code
    assert (tmp_path / "printed").read_text().endswith("stopped; go on with: python train.py --resume run\n")
    assert "Traceback" not in (tmp_path / "printed").read_text()
    assert read_checkpoint(tmp_path / "run" / "last.pt")["samples"] in (8, 16)
    assert server.run(tmp_path, *GO_ON) == 0
    assert_same_run(tmp_path / "run", undisturbed)


@SIGNALS
def test_a_signal_outside_of_training_ends_at_once(server, scenes, undisturbed, tmp_path):
    """While the model is built, and while it is validated; the second signal ends the wait for a step."""
    hold = "import time\ndef hold(*a, **k):\n    print('held', flush=True)\n    time.sleep(100)\n"
    for where, code in (("train.RS2SAM2 = train.build", 130), ("train.score", 143), ("train.Trainer.step", 143)):
        cwd = tmp_path / where
        pid = server.start(cwd, *new_run(scenes), first=f"{hold}{where} = hold")
        wait_for(cwd / "printed", "held")
        os.kill(pid, signal.SIGINT if code == 130 else signal.SIGTERM)
        if where == "train.Trainer.step":
            time.sleep(0.2)
            os.kill(pid, signal.SIGTERM)
        assert server.end() == code
        printed = (cwd / "printed").read_text()
        assert "Traceback" not in printed and ("go on with" in printed) == (where == "train.score")
    assert server.run(cwd.with_name("train.score"), *GO_ON) == 0
    assert_same_run(cwd.with_name("train.score") / "run", undisturbed)


@SIGNALS
def test_the_program_itself_and_its_workers_stop_by_ctrl_c(scenes, tmp_path):
    """As a terminal sends it, to the workers too."""
    args = [*new_run(scenes)[:-6], "--workers", 2]
    with open(tmp_path / "printed", "w") as printed:
        process = subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, args)], cwd=tmp_path, env=ENV,
                                   stdout=printed, stderr=printed, start_new_session=True)  # fmt: skip
    wait_for(tmp_path / "runs" / "scenes-tiny-1" / "last.pt")
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    printed = (tmp_path / "printed").read_text()
    assert "go on with: python train.py --resume runs/scenes-tiny-1" in printed and "Traceback" not in printed
    assert read_checkpoint(tmp_path / "runs" / "scenes-tiny-1" / "last.pt")["samples"] % 280
    with pytest.raises(ProcessLookupError):  # nobody of the group is left
        time.sleep(0.5)
        os.killpg(process.pid, 0)


@SIGNALS
def test_two_processes_stop_after_the_same_step(scenes, tmp_path):
    launch = "import sys, processes; processes.launch(2, sys.argv[1:])"
    args = [*new_run(scenes)[:-6], "--workers", 0]
    with open(tmp_path / "printed", "w") as printed:
        process = subprocess.Popen([sys.executable, "-c", launch, str(ROOT / "train.py"), *map(str, args)], cwd=tmp_path,
                                   env=ENV, stdout=printed, stderr=printed, start_new_session=True)  # fmt: skip
    wait_for(tmp_path / "runs" / "scenes-tiny-1" / "last.pt")
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)  # reaches the launcher, which hands it on, and both processes
    assert process.wait(100) == 130
    printed = (tmp_path / "printed").read_text()
    assert printed.count("go on with: python train.py --resume runs/scenes-tiny-1") == 1 and "Traceback" not in printed
    state = read_checkpoint(tmp_path / "runs" / "scenes-tiny-1" / "last.pt")
    assert state["running"]["steps"] > 0 and state["samples"] == state["running"]["samples"]
