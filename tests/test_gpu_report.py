"""The report of the day with a card, without one: its steps, how they are run, the lines of its tables."""

import json
import os
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from experiments import counting, gpu_report, speed
from experiments.gpu_report import Report, Step
from runtime.errors import UserError
from synthetic_scenes import __main__ as synthetic_scenes
from synthetic_scenes.scenes import make_scenes


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", "import os, pathlib, subprocess, sys, time\n" + code]


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """Start the report with these steps in a folder -> (exit code, what it printed)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_report.signal, "signal", lambda *_: None)

    def run(*steps: Step) -> tuple[int, str]:
        return gpu_report.run_all(list(steps), Report(Path("out"))), capsys.readouterr().out

    return run


def ended(folder: Path = Path("out")) -> dict[str, str]:
    return {line["step"]: line["ended"] for line in map(json.loads, (folder / "steps.jsonl").read_text().splitlines())}


def test_a_step_that_fails_or_is_cut_off_loses_only_itself_and_a_second_start_goes_on(start):
    fail = "print('| of two lines | 1 |')\nassert pathlib.Path('mended').exists(), 'it is broken'"
    hang = """print('| known before | 2 |')
if not pathlib.Path('mended').exists():
    print(subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)']).pid)
    time.sleep(60)"""
    # its own line is in the file by the time it goes on
    last = "print('| a | b |')\ntime.sleep(1)\nprint('kept', '| a | b |' in pathlib.Path('out/report.md').read_text())"
    steps = Step("one", 20, python(fail)), Step("two", 2, python(hang), plain=True), Step("three", 20, python(last))
    began = time.monotonic()
    code, printed = start(*steps)
    assert code == 1 and time.monotonic() - began < 15 and printed == Path("out/report.md").read_text()
    assert "\n## one\n\n| of two lines | 1 |\n\n*failed with exit code 1, " in printed
    assert "*: `AssertionError: it is broken` (out/one.txt)\n" in printed and "\n    | known before | 2 |\n" in printed
    assert "\n*cut off after 2 s, 2 s*\n" in printed and "\nkept True\n\n*done, " in printed
    table = "| step | ended |\n|---|---|\n| one | failed with exit code 1 |\n| two | cut off after 2 s |\n| three | done |\n"
    assert printed.endswith(table)
    child = next(line for line in printed.splitlines() if line.strip().isdecimal())
    for _ in range(50):  # until the one who inherits it has heard of its end
        state = Path(f"/proc/{child.strip()}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("what a step has started lives on")

    Path("mended").touch()
    code, printed = start(*steps, Step("four", 20, python("print('new')")))
    titles = [line for line in printed.splitlines() if line.startswith("## ")]
    assert code == 0 and titles == ["## four", "## one", "## two"]  # never begun, then what did not end well
    assert ended() == dict.fromkeys(("one", "two", "three", "four"), "done")
    assert start(*steps)[1].startswith("\n| step | ended |")


def test_a_start_that_was_killed_goes_on_at_the_next_step_and_time_is_limited(start, monkeypatch):
    steps = Step("one", 20, python("print('again')")), Step("two", 20, python("print('next')"))
    report = Report(Path("out"))
    report.note(steps[0], ended="not at all")
    assert gpu_report.pending(steps, report.ended()) == [steps[1], steps[0]]
    monkeypatch.setattr(gpu_report, "MINUTES", 0)
    code, printed = start(*steps)
    assert code == 1 and "No time is left: start the program again" in printed and "| two | not begun |" in printed
    monkeypatch.setattr(gpu_report, "MINUTES", 6 / 60)  # what is left is less than the step's own limit
    _, printed = start(Step("long", 60, python("time.sleep(60)")), steps[1])
    assert "| long | cut off after 6 s |\n| two | not begun |" in printed


def test_without_a_card_one_sentence_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="^no CUDA card is here, .*: start it on a machine that has one$") as error:
        gpu_report.main([])
    assert error.value.exit_code == 2 and not Path("gpu-report").exists()


@pytest.mark.parametrize("quick", [False, True])
def test_every_step_is_a_command_line_that_its_program_takes(quick, tmp_path):
    parsers = {"experiments.gpu_report": gpu_report, "experiments.speed": speed, "synthetic_scenes": synthetic_scenes}
    every = [*gpu_report.steps(["paper", "large"], quick, tmp_path / "out")]
    assert len({step.name for step in every}) == len(every)
    names = [step.name for step in every]
    assert names[:3] == ["GPU tests", *(f"{m} by the published settings, as it is and as trained" for m in ("paper", "large"))]
    for step in every:
        program, arguments = step.command[2], step.command[3:]
        if step.command[1] == "train.py":
            args = train.command_line().parse_args(step.command[2:])
            assert args.gpus == 1 and args.data == (str(tmp_path / "out" / "scenes") if quick else "scenes")
        elif program != "pytest":
            args = parsers[program].command_line().parse_args(arguments)
            assert not hasattr(args, "batch_size") or args.batch_size[0] <= (2 if quick else 8)
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "out" / "run" / "last.pt").touch()
    run = next(step for step in gpu_report.steps(["large"], quick, tmp_path / "out") if step.name == "default run")
    assert run.command[-2:] == ["--resume", str(tmp_path / "out" / "run")] and train.command_line().parse_args(run.command[2:])


def test_the_costliest_kernels_by_hand():
    events = [Namespace(key=f"kernel {n}", count=2 * n, self_device_time_total=1000.0 * n) for n in range(1, 5)]
    events.append(Namespace(key="aten::mm", count=9, self_device_time_total=0.0))
    assert [*gpu_report.kernel_rows(events, repeats=2, most=2)] == [
        "| kernel 4 | 4 | 2.000 | 40.0 % |", "| kernel 3 | 3 | 1.500 | 30.0 % |",
        "| the others | 3 | 1.500 | 30.0 % |", "| all | 10 | 5.000 | 100.0 % |",
    ]  # fmt: skip


def test_figures_of_the_default_run_by_hand(tmp_path):
    log = tmp_path / "log.jsonl"
    with pytest.raises(UserError, match="the default run has not ended an epoch"):
        [*gpu_report.figures(log)]
    lines = [{"preset": {}}]
    for n, (rate, score) in enumerate(((40.0, 60.0), (400.0, 71.0), (350.0, 76.0), (300.0, 75.0)), start=1):
        lines.append({"samples": 4000 * n, "seconds": 30.0 * n, "images/s": rate, "val": {"mIoU": score, "oIoU": score - 1}})
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = "\n".join(gpu_report.figures(log))
    for line in ("| validation mIoU | 76.00 | 76.84 |", "| validation oIoU | 75.00 | 75.75 |",
                 "| images a second, the fastest epoch | 400.0 | |",
                 "| seconds of training to 70 mIoU, at that rate | 20.0 | |", "| seconds in all | 120 | |"):  # fmt: skip
        assert line in table


def test_masks_of_two_precisions_are_compared_pixel_by_pixel(tmp_path, monkeypatch):
    scenes = make_scenes(tmp_path / "scenes", train=1, val=2, test=2, size=96, seed=1, progress=False)
    asked = []

    class Predictor:
        def __init__(self, model, dtype):
            self.model, self.dtype = model, dtype

        @classmethod
        def from_pretrained(cls, path, device, dtype):
            return cls("model", dtype)

        def predict(self, images, phrases):
            asked.append(images)
            masks = np.zeros((len(images), 4, 4), bool)
            masks[-1, 0] = self.dtype == torch.bfloat16  # a quarter of the last one differs
            return [*masks], None, None

    monkeypatch.setattr(gpu_report, "RS2SAM2Predictor", Predictor)
    *_, row = gpu_report.precision(Path("best.pt"), scenes, 3, "cpu")
    assert row == "| torch.bfloat16 | 3 | 91.667 % | 75.00 % | 99.5 % |"
    assert len(asked) == 2 and asked[0] == asked[1] and len(set(asked[0])) == 3 and all(map(os.path.exists, asked[0]))


def test_the_batch_that_fits_by_hand():
    GiB = 2**30  # the lines of `large` in docs/speed.md
    assert counting.fitting_batch(24, True, 9.12 * GiB, 1.018 * GiB, 6 * GiB) == 11
    assert counting.fitting_batch(24, False, 9.06 * GiB, 5.192 * GiB, 6 * GiB) == 2
    assert counting.fitting_batch(8, True, 9.12 * GiB, 1.018 * GiB, 6 * GiB) == 0
    assert counting.fitting_batch(24, True, 9.12 * GiB, 1.018 * GiB, 22 * GiB) == 0
