"""Everything there is to learn on a CUDA card, in at most 25 minutes of an H100, what matters most first.

    python -m experiments.gpu_report                                 writes gpu-report/report.md, each line when it is known
    python -m experiments.gpu_report --models tiny --quick           the same steps in little, to try them

Each step is a program of its own with a time limit: one that fails or is cut off loses nothing but its own rest. What a
step prints on stderr is in DIR/<step>.txt, how each ended in DIR/steps.jsonl. Started again with the same --out, the program
goes on with the steps not yet begun and then tries those again that did not end well. Exit code: 0 all done, 1 some are not,
2 no card. The default run makes data/scenes where it is missing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from runtime.arguments import answer_early

MINUTES = 25  # of one start, at most
OURS = ("kernels", "figures", "precision", "memory")  # steps that are functions of this file


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.gpu_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["paper", "large"], metavar="PRESET", help="default: paper large")
    add("--out", type=Path, default="gpu-report", metavar="DIR", help="folder of the results (default: gpu-report)")
    add("--quick", action="store_true", help="few repeats, samples and images: the figures mean nothing")
    add("--only", choices=OURS, help="do this one step here and now, for the first of --models, and print its lines")
    return parser


if __name__ == "__main__":
    answer_early(command_line())

import numpy as np
import torch

from annotations.samples import Sample
from data import open_dataset
from experiments import counting, speed
from predict import RS2SAM2Predictor
from presets import RECIPES
from runtime.averaging import AveragedWeights
from runtime.devices import autocast, compute_dtype
from runtime.errors import UserError, exit_on_user_error

# The default run on two CPU cores, seed 0 (docs/training.md); seeds differ by one to two points.
CPU_SCORES = {"mIoU": 76.84, "oIoU": 75.75}


# ---- the steps --------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A program that prints lines of the report."""

    name: str
    seconds: int  # its time limit
    command: list[str]
    plain: bool = False  # what it prints is no Markdown


def steps(models: list[str], quick: bool, out: Path) -> Iterator[Step]:
    """All steps, in order."""
    here = [sys.executable, "-m", "experiments.gpu_report", "--out", str(out), *["--quick"] * quick]
    first = models[0]
    yield Step("GPU tests", 120, [sys.executable, "-m", "pytest", "-q", "--tb=short", "tests/test_gpu.py"], plain=True)
    for model in models:
        yield Step(f"{model} by the published settings, as it is and as trained", 300,
                   timing(quick, model, "--tasks", "train", "forward", "--compile", "recorded", "--baseline"))  # fmt: skip
    yield Step(f"{first}, the costliest kernels", 240, [*here, "--only", "kernels", "--models", first])
    yield from default_run(quick, out)
    yield Step("default run, figures", 60, [*here, "--only", "figures"])
    yield Step("masks in half precision and in float32", 120, [*here, "--only", "precision"])
    yield Step(f"{first}, the loader beside training", 200,
               timing(quick, first, "--tasks", "train", "loader", "--compile", "recorded"))  # fmt: skip
    yield Step(f"{first}, memory", 150, [*here, "--only", "memory", "--models", first])
    forms = ["blocks", "recorded", "blocks-combined"]
    yield Step(f"{first} by block with fewer launches", 420, timing(quick, first, "--tasks", "train", "--compile", *forms))
    for model in models:  # whose compilation takes longest
        yield Step(f"{model} in one graph", 420,
                   timing(quick, model, "--tasks", "train", "forward", "--compile", "default"))  # fmt: skip
        yield Step(f"{model} in one CUDA graph, one image", 240,
                   timing(quick, model, "--tasks", "forward", "--compile", "reduce-overhead", batch=1))  # fmt: skip


def timing(quick: bool, model: str, *flags: str, batch: int = 8) -> list[str]:
    """A command line of experiments.speed."""
    flags = [*flags, "--batch-size", str(min(batch, 2) if quick else batch)]
    flags += ["--repeats", "2", "--warmup", "1", "--workers", "1"] if quick else []
    return [sys.executable, "-m", "experiments.speed", "--model", model, *flags, "--out", os.devnull]


def scenes_of(quick: bool, out: Path) -> Path:
    return out / "scenes" if quick else Path("data/scenes")


def default_run(quick: bool, out: Path) -> Iterator[Step]:
    """`python train.py`, which goes on where it was cut off; with --quick of 16 samples on a few scenes."""
    train = [sys.executable, "train.py", "--gpus", "1"]
    if (out / "run" / "last.pt").exists():
        train += ["--resume", str(out / "run")]
    else:
        train += ["--out", str(out / "run"), *["--set", "samples=16", "epoch_range=(8, 8)"] * quick]
        train += ["--data", str(scenes_of(quick, out))] if quick else []
    if quick and not scenes_of(quick, out).exists():
        few = ["--out", str(scenes_of(quick, out)), "--train", "8", "--val", "3", "--test", "3"]
        yield Step("a few scenes", 60, [sys.executable, "-m", "synthetic_scenes", *few], plain=True)
    yield Step("default run", 330, train, plain=True)


# ---- how they are run -------------------------------------------------------------------------------------------------


class Report:
    """The folder of results: report.md, and steps.jsonl with two lines a step, when it begins and when it ends."""

    def __init__(self, folder: Path):
        self.folder, self.states = folder, folder / "steps.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, line: str) -> None:
        print(line, flush=True)
        with open(self.folder / "report.md", "a") as file:
            file.write(line + "\n")

    def note(self, step: Step, **state) -> None:
        with open(self.states, "a") as file:
            file.write(json.dumps({"step": step.name} | state) + "\n")

    def ended(self) -> dict[str, str]:
        """{step: how it ended the last time}, of those that were begun."""
        lines = self.states.read_text().splitlines() if self.states.exists() else []
        return {state["step"]: state["ended"] for state in map(json.loads, lines)}


def pending(every: Iterable[Step], ended: dict[str, str]) -> list[Step]:
    """What is left to do: first what was never begun, then what did not end well."""
    return sorted((step for step in every if ended.get(step.name) != "done"), key=lambda step: step.name in ended)


def do(step: Step, report: Report, seconds: float) -> str:
    """Run a step for so many seconds at most, its lines into the report as they come -> how it ended."""
    report.write(f"\n## {step.name}\n")
    report.note(step, ended="not at all")
    began, log = time.monotonic(), report.folder / f"{step.name.replace(' ', '-')}.txt"
    with open(log, "w") as errors:
        process = subprocess.Popen(step.command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
                                   env=os.environ | {"PYTHONUNBUFFERED": "1"})  # fmt: skip
    timer = threading.Timer(seconds, kill, [process])
    timer.start()
    try:
        for line in process.stdout:
            report.write("    " * step.plain + line.rstrip())
        code = process.wait()
    finally:
        timer.cancel()
        kill(process)  # and what it has left behind
    took = time.monotonic() - began
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    how = "done" if code == 0 else f"cut off after {seconds:.0f} s" if took >= seconds else f"failed with exit code {code}"
    report.note(step, ended=how, seconds=round(took, 1), command=step.command)
    report.write(f"\n*{how}, {took:.0f} s*" + (f": `{said[-1].strip()}` ({log})" if code and said else ""))
    return how


def kill(process: subprocess.Popen) -> None:
    """End a step and all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def run_all(every: list[Step], report: Report) -> int:
    """Do what is left of the steps in MINUTES -> exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    until = time.monotonic() + 60 * MINUTES
    for step in pending(every, report.ended()):
        left = until - time.monotonic()
        if left < 5:
            report.write("\nNo time is left: start the program again, it goes on with the next step.")
            break
        do(step, report, min(step.seconds, left))
    ended = report.ended()
    report.write("\n| step | ended |\n|---|---|")
    for step in every:
        report.write(f"| {step.name} | {ended.get(step.name, 'not begun')} |")
    return int(any(ended.get(step.name) != "done" for step in every))


# ---- steps of this file -----------------------------------------------------------------------------------------------


def kernels(name: str, quick: bool, device: str = "cuda") -> Iterator[str]:
    """The 15 costliest kernels of a training step and of a forward pass, compiled by block."""
    model = counting.random_model(name, None, 0).to(device)
    model.cast_frozen(compute_dtype())
    call, step = speed.compiled(model, "blocks"), speed.Step(model, RECIPES[name])
    batch = counting.random_batch(model, 2 if quick else 8, device)
    for what, once in (("training", step), ("inference", speed.forward_once)):
        call.train(what == "training")

        def run(once=once):
            once(call, batch, lambda: autocast(torch.device(device)))

        yield f"| kernel, {name} in {what} at batch {len(batch[0])} | calls | ms | share |\n|---|---|---|---|"
        yield from kernel_rows(*profiled(run, repeats=3))
        yield ""


def profiled(run, repeats: int) -> tuple[list, int]:
    """(torch.profiler's averages by kernel, repeats) of `run` after two runs for warming up."""
    run(), run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    return profile.key_averages(), repeats


def kernel_rows(averages: list, repeats: int, most: int = 15) -> Iterator[str]:
    """A table's lines: the costliest kernels of one run, the others together, and all."""
    events = sorted((e for e in averages if e.self_device_time_total > 0), key=lambda e: -e.self_device_time_total)
    whole = sum(e.self_device_time_total for e in events) / repeats or 1.0  # microseconds
    rows = [(e.key[:90].replace("|", "/"), e.count, e.self_device_time_total) for e in events]
    rows = [*rows[:most], ("the others", sum(r[1] for r in rows[most:]), sum(r[2] for r in rows[most:])),
            ("all", sum(r[1] for r in rows), sum(r[2] for r in rows))]  # fmt: skip
    for key, calls, time_ in rows:
        time_ /= repeats
        yield f"| {key} | {calls / repeats:.0f} | {time_ / 1000:.3f} | {100 * time_ / whole:.1f} % |"


def figures(log: Path) -> Iterator[str]:
    """Of the default run: its best scores beside the CPU's, and how long it trained, compilation and scoring left out."""
    if not log.exists():
        raise UserError(f"{log} is not there: the default run has not ended an epoch", exit_code=1)
    epochs = [line for line in map(json.loads, log.read_text().splitlines()) if "val" in line]
    if not epochs:
        raise UserError(f"{log} has no epoch yet: the default run did not end one", exit_code=1)
    best = max((line["val"] for line in epochs), key=lambda val: val["mIoU"] + val["oIoU"])
    rate = max(line["images/s"] for line in epochs)  # the first epoch compiles
    reached = next((line["samples"] for line in epochs if line["val"]["mIoU"] >= 70), None)
    yield "| the default run | on a card | on the CPU |\n|---|---|---|"
    for key, cpu in CPU_SCORES.items():
        yield f"| validation {key} | {best[key]:.2f} | {cpu:.2f} |"
    yield f"| images a second, the fastest epoch | {rate:.1f} | |"
    yield f"| seconds of training to 70 mIoU, at that rate | {reached / rate:.1f} | |" if reached else "| 70 mIoU | never | |"
    yield f"| seconds in all | {epochs[-1]['seconds']:.0f} | |"
    yield f"| samples | {epochs[-1]['samples']} | 24000 |"


def precision(weights: Path, data: Path, count: int, device: str = "cuda") -> Iterator[str]:
    """The share of pixels on which masks in half precision and in float32 agree, over one phrase of each generated scene."""
    torch.backends.cudnn.allow_tf32 = False
    exact = RS2SAM2Predictor.from_pretrained(weights, device, torch.float32)
    half = RS2SAM2Predictor(exact.model, torch.bfloat16 if device == "cpu" else compute_dtype())
    samples = [sample for split in ("val", "test") for sample in open_dataset(str(data), split).samples]
    chosen: list[Sample] = [*{sample.image: sample for sample in samples}.values()][:count]
    agree = []
    for start in range(0, len(chosen), 8):
        some = chosen[start : start + 8]
        asked = [str(sample.image) for sample in some], [sample.phrases[0] for sample in some]
        masks = [predictor.predict(*asked)[0] for predictor in (exact, half)]
        agree += [float(np.mean(a == b)) for a, b in zip(*masks)]
    yield "| masks against float32 | scenes | pixels that agree | the worst scene | wanted |\n|---|---|---|---|---|"
    yield f"| {half.dtype} | {len(agree)} | {100 * np.mean(agree):.3f} % | {100 * min(agree):.2f} % | 99.5 % |"


def memory(name: str, card: int, device: str = "cuda") -> Iterator[str]:
    """The batch that docs/speed.md computes for a card of so many GB, with and without checkpointed activations: the memory
    that two training steps take, and whether they run in that card's."""
    yield f"| {name}, of {card} GB | batch | GiB computed | GiB allocated | reserved | it fits |\n|---|---|---|---|---|---|"
    for checkpointing in (False, True):
        fixed, image, least = counting.training_memory(name, checkpointing)
        batch = max(1, counting.fitting_batch(card, checkpointing, fixed, image, least))
        room = (card * 2**30 - counting.CONTEXT) / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, room))
        torch.cuda.reset_peak_memory_stats()
        fits = two_steps(name, checkpointing, batch, device)
        peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        cells = [f"{n / 2**30:.2f}" for n in (fixed + batch * image, *peaks)]
        what = f"checkpointing {'yes' if checkpointing else 'no'}"
        yield f"| {what} | {batch} | {' | '.join(cells)} | {'yes' if fits else 'no'} |"


def two_steps(name: str, checkpointing: bool, batch: int, device: str) -> bool:
    """Two training steps without compilation, as train.py's -> whether there is room for them."""
    model = counting.random_model(name, None, 0).to(device)
    model.cast_frozen(compute_dtype())
    model.image_encoder.checkpoint_activations = checkpointing
    step, average = speed.Step(model, RECIPES[name]), AveragedWeights(model, RECIPES[name].ema)
    inputs = counting.random_batch(model, batch, device)
    try:
        for _ in range(2):
            step(model, inputs, lambda: autocast(torch.device(device)))
            average.update()
    except torch.OutOfMemoryError:
        return False
    return True


def own_step(args: argparse.Namespace) -> Iterator[str]:
    """The lines of a step of this file."""
    run, name = args.out / "run", args.models[0]
    if args.only == "kernels":
        return kernels(name, args.quick)
    if args.only == "figures":
        return figures(run / "log.jsonl")
    if args.only == "precision":
        return precision(run / "best.pt", scenes_of(args.quick, args.out), 4 if args.quick else 500)
    return memory(name, 24)


def main(arguments: list[str] | None = None) -> int:
    args = command_line().parse_args(arguments)
    if not torch.cuda.is_available():
        raise UserError("no CUDA card is here, which is what this program measures: start it on a machine that has one")
    if args.only:
        for line in own_step(args):
            print(line, flush=True)
        return 0
    report = Report(args.out)
    report.write(f"\n# {time.strftime('%Y-%m-%d %H:%M')}: {speed.Device('cuda').describe()}, torch {torch.__version__}, "
                 f"revision {speed.revision() or 'unknown'}")  # fmt: skip
    return run_all([*steps(args.models, args.quick, args.out)], report)


if __name__ == "__main__":
    with exit_on_user_error("gpu_report"):
        sys.exit(main())
