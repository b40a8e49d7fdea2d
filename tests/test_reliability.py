"""Nothing lost, nothing run: kills, signals, full disks, hostile files and numbers that go wrong.

Broken data sets have a file of their own, test_broken_data.py. The long tests:

    python -m pytest -m slow -s tests/test_reliability.py tests/test_broken_data.py
"""

import contextlib
import dataclasses
import json
import os
import random
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
    for call in (3, 8, 11, 12, 13, 14, 1):
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
            with contextlib.suppress(ProcessLookupError):  # it was done already
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
    assert process.wait(200) == 130
    printed = (tmp_path / "printed").read_text()
    assert "go on with: python train.py --resume runs/scenes-tiny-1" in printed and "Traceback" not in printed
    assert read_checkpoint(tmp_path / "runs" / "scenes-tiny-1" / "last.pt")["samples"] > 0
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
    assert process.wait(200) == 130
    printed = (tmp_path / "printed").read_text()
    assert printed.count("go on with: python train.py --resume runs/scenes-tiny-1") == 1 and "Traceback" not in printed
    state = read_checkpoint(tmp_path / "runs" / "scenes-tiny-1" / "last.pt")
    assert state["samples"] == 280 * len(state["log"]) + state["running"]["samples"] > 0


# Gives rank 0 alone a signal when it has read the third step's sums, too late for that step, so the others know nothing of it.
LATE = f"""
import os, runpy, signal
import tqdm
from processes import rank
class Bar(tqdm.tqdm):
    steps = 0
    def set_postfix(self, *args, **kwargs):
        self.steps += 1
        if self.steps == 3 and not rank():
            os.kill(os.getpid(), signal.SIGINT)
tqdm.tqdm = Bar
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


@SIGNALS
def test_a_signal_between_two_steps_stops_two_processes_after_the_same(scenes, tmp_path):
    (tmp_path / "late.py").write_text(LATE)
    launch = "import sys, processes; processes.launch(2, sys.argv[1:])"
    command = [sys.executable, "-c", launch, "late.py", *new_run(scenes)[:-6], "--workers", 0, "--batch-size", 8]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=100)
    assert done.returncode in (130, 143) and "Traceback" not in done.stderr  # that of the first to end
    assert done.stdout.count("go on with: python train.py --resume runs/scenes-tiny-1") == 1
    assert read_checkpoint(tmp_path / "runs" / "scenes-tiny-1" / "last.pt")["samples"] == 4 * 8


# ---- full disks -----------------------------------------------------------------------------------------------------------

LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"


@SIGNALS
def test_a_full_disk_is_one_sentence_and_what_was_saved_stays(server, undisturbed, scenes, tmp_path):
    """By a limit on the size of files, before the first checkpoint, and after some; then there is room again."""
    assert server.run(tmp_path, *new_run(scenes), first=LIMIT.format(size=2**20)) == 1
    assert not list((tmp_path / "run").iterdir())
    later = "save = runs.RunFolder.save\ndef full(self, *a):\n    if self.previous.exists():\n        " + LIMIT
    later = later.format(size=2**20) + "    save(self, *a)\nruns.RunFolder.save = full"
    assert server.run(tmp_path, *new_run(scenes), first=later) == 1
    read_checkpoint(tmp_path / "run" / "last.pt", checksums=True)
    # best.pt is what finds no room
    best = "best = runs.RunFolder.save_best\ndef full(self, *a):\n    " + LIMIT
    best += "    best(self, *a)\nruns.RunFolder.save_best = full"
    assert server.run(tmp_path, *GO_ON, first=best.format(size=2**20)) == 1
    assert not (tmp_path / "run" / "best.pt").exists()
    errors = [line for line in (tmp_path / "printed").read_text().splitlines() if line.startswith("train.py:")]
    told = "train.py: run/{}.pt can't be written (File too large): make room or see to the folder; what was saved before is " \
        "untouched"  # fmt: skip
    assert errors == [told.format(name) for name in ("last", "last", "best")]
    assert "Traceback" not in (tmp_path / "printed").read_text()
    assert server.run(tmp_path, *GO_ON) == 0
    assert_same_run(tmp_path / "run", undisturbed)


@SIGNALS
@pytest.mark.parametrize("option", [("--json", "s.json"), ("--panels", 3)])
def test_scores_and_panels_on_a_full_disk(undisturbed, tmp_path, option):
    full = "import evaluate\nwrite = evaluate.write_whole\ndef full(*a):\n    {}    write(*a)\nevaluate.write_whole = full\n"
    done = subprocess.run(
        [sys.executable, "-c", full.format(LIMIT.format(size=1024)) + "evaluate.main()", "--ckpt", undisturbed / "best.pt",
         *map(str, option)], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    name = "s.json" if "s.json" in option else "panels-test.png"
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"evaluate.py: {name} can't be written (File")
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


@SIGNALS
def test_predictions_on_a_full_disk(undisturbed, scenes, tmp_path):
    image = next((scenes / "images/rrsisd/JPEGImages").iterdir())
    done = subprocess.run(
        [sys.executable, "-c", f"import predict; {LIMIT.format(size=1024)}predict.main()", "--ckpt", undisturbed / "best.pt",
         "--image", image, "--phrase", "the ship"], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 1 and "1 of 1 failed" in done.stderr and "File too large" in done.stderr
    assert "Traceback" not in done.stderr and not list((tmp_path / "predictions").iterdir())


@SIGNALS
def test_half_a_set_of_scenes_is_none(server, tmp_path):
    """Stopped, or out of room, while data/scenes is generated: nothing is there that could be taken for it."""
    few = "make = train.make_scenes\ntrain.make_scenes = lambda root: make(root, 60, 3, 2, 96)\n"
    args = ("--model", "tiny", "--image-size", 64, "--gpus", 0, "--workers", 0, "--out", "run", "--epochs", 1)
    for how, code in ((LIMIT.format(size=2048), 1), ("", 143), ("", -9)):
        pid = server.start(tmp_path, *args, first=few + how)
        if not how:
            while not list(tmp_path.glob("data/*/scenes/images/rrsisd/JPEGImages/00003.jpg")):
                time.sleep(0.001)
            os.kill(pid, abs(code) if code < 0 else signal.SIGTERM)
        assert server.end() == code
        assert not (tmp_path / "data" / "scenes").exists() and (code < 0 or not list((tmp_path / "data").iterdir()))
    assert server.run(tmp_path, *args, first=few) == 0 and (tmp_path / "data" / "scenes").is_dir()
    printed = (tmp_path / "printed").read_text()
    assert printed.count("train.py: data/scenes can't be written") == 1 and "Traceback" not in printed


# ---- numbers --------------------------------------------------------------------------------------------------------------


def new_trainer(scenes: Path, out: Path, workers: int = 0) -> train.Trainer:
    torch.manual_seed(0)
    recipe = Recipe(epoch_range=(12, 12), lr=1e-3, ema=0.9, augment="ours", dice=1.0, pseudo=5.0)
    clip = TINY_CLIP | {"vision_cfg": TINY_CLIP["vision_cfg"] | {"image_size": 32}}
    model = RS2SAM2(dataclasses.replace(PRESETS["tiny"], image_size=64, encoder_name=clip))
    args = Namespace(lr=recipe.lr, epochs=1, batch_size=4, accumulate=1, seed=0, workers=workers, out=out,
                     data=str(scenes), model="tiny", checkpoint_activations=False)  # fmt: skip
    train_set = data.open_dataset(scenes, "train", one_phrase=True, augment="ours")
    trainer = train.Trainer(args, recipe, model, torch.device("cpu"), train_set, data.open_dataset(scenes, "val"))
    trainer.folder.make()
    return trainer


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def spoil(trainer: train.Trainer, what: str, value: float) -> None:
    """From the second step on something is `value`."""
    step, normalise = trainer.step, trainer.model.normalise

    def second(batch, count):
        if trainer.samples:
            if what == "weight":
                with torch.no_grad():
                    trainer.model.text_weight.weight[0, 0] = value
            elif what == "image":
                trainer.model.normalise = lambda *images: [image.masked_fill(image > 1, value) for image in normalise(*images)]
            elif what == "gradient":
                trainer.trained[0].register_hook(lambda grad: grad.fill_(value))
            else:
                trainer.backward = lambda *a, **k: {"loss": torch.tensor(value)}
        trainer.batch = batch["id"]
        return step(batch, count)

    trainer.step = second


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["image", "weight", "gradient", "loss"])
def test_what_is_not_finite_stops_within_the_step(scenes, tmp_path, one_thread, what, value):
    trainer = new_trainer(scenes, tmp_path / "run")
    spoil(trainer, what, value)
    trainer.save_last({})
    before = {k: v.clone() for k, v in trainer.average.mean.items()}
    with pytest.raises(FloatingPointError) as error:
        trainer.run_epoch()
    assert trainer.samples == 4  # one step went well, none followed
    told = str(error.value)
    assert f"(batch {', '.join(dict.fromkeys(trainer.batch))})" in told and "last.pt holds an earlier state" in told
    assert all(v.isfinite().all() for v in trainer.average.mean.values()) and before
    assert all(v.isfinite().all() for v in read_checkpoint(tmp_path / "run" / "last.pt")["model"].values())


def test_the_sentence_of_numbers_that_are_not_finite(server, scenes, tmp_path):
    poison = """
import torch
step = train.Trainer.step
def poisoned(self, *a):
    if self.samples == 16:
        with torch.no_grad():
            self.trained[0].fill_(float("nan"))
    return step(self, *a)
train.Trainer.step = poisoned"""
    assert server.run(tmp_path, *new_run(scenes), first=poison) == 1
    printed = (tmp_path / "printed").read_text()
    assert "Traceback" not in printed and "train.py: the loss became nan and its gradient nan at sample 16" in printed
    assert read_checkpoint(tmp_path / "run" / "last.pt")["samples"] == 16
    assert server.run(tmp_path, *GO_ON) == 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_overflow_is_the_scaler_s_business(scenes, tmp_path, one_thread, device):
    """A step whose gradient overflows is left out and its scale halved; one that does so at a scale below 1 stops."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA card")
    trainer = new_trainer(scenes, tmp_path / "run")
    trainer.model.to(device)
    trainer.device, trainer.average.mean = torch.device(device), {k: v.to(device) for k, v in trainer.average.mean.items()}
    trainer.scaler = torch.amp.GradScaler(device, init_scale=2.0)
    handle = trainer.trained[0].register_hook(lambda grad: grad.fill_(float("inf")))
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    loader = torch.utils.data.DataLoader(trainer.train_set, batch_size=4,
                                         collate_fn=data.Collate(trainer.model.union_encoder.tokenizer))  # fmt: skip
    batch = next(iter(loader))
    for scale in (1.0, 0.5):
        trainer.step(batch, 4)
        assert trainer.scaler.get_scale() == scale
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    with pytest.raises(FloatingPointError, match="gradient inf"):
        trainer.step(batch, 4)
    handle.remove()
    trainer.optimizer.zero_grad()
    trainer.scaler = torch.amp.GradScaler(device, init_scale=2.0)
    trainer.step(batch, 4)
    assert any(not torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())


# ---- determinism ------------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights_with_any_number_of_workers(scenes, tmp_path, one_thread):
    runs_ = []
    for number, workers in enumerate((0, 0, 1, 2)):
        trainer = new_trainer(scenes, tmp_path / str(number), workers)
        line = trainer.run_epoch()
        assert trainer.samples == 12
        runs_.append((line["loss"], trainer.model.state_dict(), trainer.average.mean))
    for other in runs_[1:]:
        assert_equal(runs_[0], other)
    torch.manual_seed(1)
    assert not torch.equal(RS2SAM2(PRESETS["tiny"]).text_weight.weight, runs_[0][1]["text_weight.weight"])


def test_workers_leave_signals_to_the_one_that_trains():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        stopping.leave_signals(0)
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    with pytest.raises(runs.WriteError, match="Is a directory"):
        runs.write_whole(Path(__file__).parent, lambda file: file.write(b""))


# ---- hostile files ----------------------------------------------------------------------------------------------------------

# Writes every hostile checkpoint, then tries each: the peak of memory may hardly grow over that of a sound one's.
HOSTILE = r'''
import json, pickle, sys, zipfile
from pathlib import Path
import torch
from checkpoints import load_checkpoint

sound, folder = Path(sys.argv[1]), Path(sys.argv[2])
STOP, PROTOCOL = b".", b"\x80\x02"

def text(s):
    return b"X" + len(s).to_bytes(4, "little") + s.encode()

def call(name, *arguments):
    """A pickle's call of a function, on arguments that are pickled already."""
    return b"c" + name.replace(" ", "\n").encode() + b"\n(" + b"".join(arguments) + b"tR"

def number(n):
    n = n.to_bytes(16, "little")
    return b"\x8a" + bytes([len(n)]) + n

def archive(name, pickled, kind=zipfile.ZIP_STORED, size=0):
    with zipfile.ZipFile(folder / name, "w", kind) as file:
        for entry, content in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n")):
            file.writestr("archive/" + entry, content)
        if size:
            with file.open("archive/data/0", "w", force_zip64=True) as bomb:
                for _ in range(size >> 20):
                    bomb.write(bytes(1 << 20))

def changed(name, change):
    checkpoint = torch.load(sound, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, folder / name)

bytes_ = call("builtins bytearray", number(4 << 30))
chain = call("_codecs encode", text("0"), text("latin1"))
for _ in range(34):
    chain = call("_codecs encode", chain, text("hex_codec"))
archive("deflated storage.pt", zipfile.ZipFile(sound).read("archive/data.pkl"), zipfile.ZIP_DEFLATED, 1 << 29)
archive("deflated pickle.pt", PROTOCOL + b"\x8c\x00" + bytes(1 << 29), zipfile.ZIP_DEFLATED)
archive("byte array.pt", PROTOCOL + bytes_ + STOP)
archive("doubling.pt", PROTOCOL + chain + STOP)
archive("memo.pt", b"\x80\x02]r\xff\xff\xff\x7f.")
archive("nested.pt", PROTOCOL + b"]" * 100_000 + b"a" * 99_999 + STOP)
(folder / "byte array of old.pt").write_bytes(PROTOCOL + bytes_ + STOP)
(folder / "pickle.pt").write_bytes(pickle.dumps({"preset": print}))
(folder / "sizes.pt").write_bytes(bytes(4096))
changed("stretched.pt", lambda c: c["model"].update({"text_weight.bias": torch.zeros(1).expand(1 << 32)}))
changed("runs a function.pt", lambda c: c["preset"]["trunk"].update(
    x={"_target_": "os.system", "command": f"touch {folder}/marker"}))
changed("names a file.pt", lambda c: c["preset"].update(sam2="../../../../../../tmp/evil.yaml"))
changed("names a hub.pt", lambda c: c["preset"]["encoder_name"]["text_cfg"].update(hf_model_name="evil/evil"))
changed("fetches.pt", lambda c: c["preset"].update(encoder_name="hf-hub:evil/evil"))
changed("endless layers.pt", lambda c: c["preset"]["encoder_args"].update(joint_layers=10**9))
changed("endless width.pt", lambda c: c["preset"]["decoder"].update(dim=10**9))
changed("endless image.pt", lambda c: c["preset"].update(image_size=32 * 10**6))
changed("endless encoder image.pt", lambda c: c["preset"].update(encoder_size=1 << 16))
changed("endless patches.pt", lambda c: (
    c["preset"].update(encoder_size=4096), c["preset"]["encoder_name"]["vision_cfg"].update(patch_size=1)))
changed("endless projection.pt", lambda c: (
    c["preset"]["encoder_name"].update(embed_dim=1 << 16), c["preset"]["encoder_name"]["vision_cfg"].update(width=1 << 16)))
changed("endless text.pt", lambda c: c["preset"]["encoder_name"]["text_cfg"].update(context_length=1 << 16))
changed("nested preset.pt", lambda c: c.update(preset=[]))
(folder / "long header.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
lies = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
(folder / "lying header.safetensors").write_bytes(len(lies).to_bytes(8, "little") + lies)
(folder / "deep header.safetensors").write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)
(folder / "deep index").mkdir()
(folder / "deep index" / "model.safetensors.index.json").write_text("[" * 100_000)

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

load_checkpoint(sound)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak()
for path in sorted(folder.iterdir()):
    try:
        load_checkpoint(path)
        print(json.dumps([path.name, "loaded", ""]))
    except Exception as error:
        print(json.dumps([path.name, type(error).__name__, str(error)]))
print(json.dumps(["peak", "", peak() - before]))
'''


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from /proc")
def test_hostile_checkpoints_run_nothing_and_exhaust_nothing(undisturbed, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE, undisturbed / "best.pt", tmp_path], env=ENV, capture_output=True, text=True,
        timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *results, (_, _, peak) = map(json.loads, done.stdout.splitlines())
    print(f"\n{len(results)} hostile files, peak of memory {peak:.0f} MiB above a sound one's")
    assert len(results) == 26 and not (tmp_path / "marker").exists()
    for name, kind, told in results:
        assert kind == "CheckpointError" and "\n" not in told, (name, kind, told)
        assert name in told or "preset describes no network" in told, (name, told)
    assert peak < 200
