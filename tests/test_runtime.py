"""What surrounds a run, by itself: files written whole, signals, processes and their end, devices, averaged weights."""

import errno
import itertools
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.run import main as torchrun

from runtime import devices, processes, progress, run_folder
from runtime.arguments import at_least
from runtime.averaging import AveragedWeights
from runtime.errors import UserError, exit_on_user_error
from runtime.progress import Progress
from runtime.signals import StopSignal, ignore_signals

ROOT = Path(__file__).parent.parent


def no_room(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_file_is_replaced_whole_or_not_at_all(where, tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    run_folder.write_checkpoint(path, {"x": 1})
    write = lambda file: torch.save({"x": 2}, file)  # noqa: E731
    if where == "write":  # torch's zip writer makes an error of its own of the file's
        write = lambda file: torch.save({"x": 2}, Mock(wraps=file, write=no_room))  # noqa: E731
    else:
        monkeypatch.setattr(os, where, no_room)
    with pytest.raises(UserError, match=r"last.pt can't be written \(No space left on device\): make room .* untouched$") as e:
        run_folder.write_whole(path, write)
    with pytest.raises(KeyboardInterrupt):
        run_folder.write_whole(path, Mock(side_effect=KeyboardInterrupt))
    assert e.value.exit_code == 1 and torch.load(path, weights_only=True) == {"x": 1} and list(tmp_path.iterdir()) == [path]


def test_a_run_s_folder(tmp_path):
    folder = run_folder.RunFolder(tmp_path / "runs" / "1")
    folder.make()
    (folder.path / "last.pt.part").touch()  # of a killed run
    folder.make()
    assert not folder.taken() and not list(folder.path.iterdir())
    folder.save({"x": 1}, [])
    assert folder.taken() and [p.name for p in folder.path.iterdir()] == ["last.pt"]
    folder.save({"x": 2}, [{"epoch": 1}, {"epoch": 2}])
    assert (folder.path / "log.jsonl").read_text() == '{"epoch": 1}\n{"epoch": 2}\n'
    with pytest.raises(UserError, match="can't be written .*choose another --out") as error:
        run_folder.RunFolder(folder.last / "run").make()
    assert error.value.exit_code == 1


def test_the_link_never_replaces_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = []
    for number in ("1", "2"):
        folder = run_folder.RunFolder(Path("runs") / number)
        folder.make()
        folder.save_best({"run": number})
        assert Path("best.pt").is_symlink() and Path("best.pt").resolve() == folder.best.resolve()
        folders.append(folder)
    assert capsys.readouterr().out == "best.pt links to runs/2/best.pt from now on, not to runs/1/best.pt\n"
    folders[0].save_best({"run": "1", "epoch": 2})  # an older run that goes on leaves the newest the link
    assert Path("best.pt").resolve() == folder.best.resolve() and not capsys.readouterr().out
    Path("best.pt").unlink()
    Path("best.pt").write_text("mine")
    run_folder.link_best(folder.best)
    assert Path("best.pt").read_text() == "mine" and "stays as it is" in capsys.readouterr().out
    Path("best.pt").unlink()
    monkeypatch.setattr(Path, "symlink_to", no_room)  # a file system without links: the run goes on
    run_folder.link_best(folder.best)
    assert "can't be linked here (No space left on device); this run's best is runs/2/best.pt" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]


def test_free_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_folder.free_run("/data/RRSIS-D/", "large") == Path("runs/RRSIS-D-large-1")
    assert run_folder.free_run("RRSIS-D", "large") == Path("runs/RRSIS-D-large-2")  # the first is taken by now
    for expected in ("a.png", "a-2.png", "a-3.png"):
        assert run_folder.free_path(Path("a.png")) == Path(expected)
        Path(expected).touch()


def test_a_user_error_is_one_sentence_and_its_exit_code(capsys):
    for code in (1, 2):
        with pytest.raises(SystemExit) as end, exit_on_user_error("train.py"):
            raise UserError("the disk is full: make room", exit_code=code)
        assert end.value.code == code and capsys.readouterr().err == "train.py: the disk is full: make room\n"
    worker = "Caught UserError in DataLoader worker process 0.\nTraceback:\nruntime.errors.UserError: Sample 3 is broken.\n"
    assert str(UserError(worker)) == "Sample 3 is broken."


def test_numbers_of_a_command_line():
    assert at_least(int, 1)("3") == 3 and at_least(float, 0)("0") == 0
    for kind, text, told in ((int, "0", "an integer of 1"), (int, "x", "an integer"), (float, "nan", "a number of 1")):
        with pytest.raises(Exception, match=f"'{text}' is not {told}"):
            at_least(kind, 1)(text)


def test_ctrl_c_is_one_line():
    script = "import argparse, atexit, os, signal; from runtime.arguments import answer_early; atexit.register(print, 'end')"
    script += "; signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background hasn't\n"
    script += "answer_early(argparse.ArgumentParser('x.py'), []); os.kill(os.getpid(), signal.SIGINT); print('it goes on')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "end\n", "\nx.py: interrupted\n")
    fault = subprocess.run([sys.executable, "-c", script.replace("os.kill(os.getpid(), signal.SIGINT)", "1 / 0")],
                           capture_output=True, text=True, cwd=ROOT)  # fmt: skip
    assert fault.returncode == 1 and "Traceback" in fault.stderr and "ZeroDivisionError" in fault.stderr


def test_progress_without_a_terminal(monkeypatch, capsys):
    now = itertools.count(step=20)  # seconds: every look at the clock
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with Progress(total=40, desc="scoring", unit="img", mininterval=0) as bar:
        for n in range(4):
            bar.set_postfix(loss=f"{n}")
            bar.update(10)
            Progress.write(f"line {n}")
    out, err = capsys.readouterr()
    assert out == "line 0\nline 1\nline 2\nline 3\n"
    lines = err.splitlines()
    assert lines and all(re.match(r"scoring: \d+ of 40 in 00:00, .* left, .*img(/s)?.*, loss=\d$", line) for line in lines), err
    monkeypatch.undo()
    assert list(Progress(range(3), "fast")) == [0, 1, 2] and capsys.readouterr().err == ""  # a minute is not over


def test_threads_are_as_many_as_cores_are_free(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for load in (0.2, 3.4, 7.9, 30.0):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        devices.choose_threads()
    assert chosen == [8, 5, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    devices.choose_threads()
    assert len(chosen) == 4  # the user's own


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert devices.pick_device(None) == devices.pick_device(0) == torch.device("cpu")
    with pytest.raises(UserError, match="99 CUDA cards are asked for and this machine has 0: use --gpus 0"):
        devices.pick_device(99)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert devices.default_workers() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # four processes share cards and cores
    assert devices.default_workers() == 2 and devices.pick_device(0) == torch.device("cpu")
    with pytest.raises(UserError, match="4 CUDA cards are asked for and this machine has 2: use --nproc-per-node 2"):
        devices.pick_device(None)


def test_what_is_computed_in(monkeypatch):
    model, few = torch.nn.Linear(8, 1), {"_is_avx512_bf16_supported": False, "_is_amx_tile_supported": False}
    for names, known in ((few, False), (few | {"_is_amx_tile_supported": True}, True), ({}, False)):
        with monkeypatch.context() as patch:  # another torch may not know of such instructions
            patch.setattr(torch, "cpu", SimpleNamespace(**{name: lambda there=there: there for name, there in names.items()}))
            assert devices.cpu_has_bfloat16.__wrapped__() is known
    monkeypatch.setattr(devices, "LARGE", 8)
    for there in (True, False):
        monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda there=there: there)
        assert devices.chosen_dtype("auto", model) == (torch.bfloat16 if there else torch.float32)
        assert devices.chosen_dtype("auto", torch.nn.Linear(7, 1)) == torch.float32
        assert devices.chosen_dtype("bfloat16", model) == torch.bfloat16
        assert devices.chosen_dtype("float32", model) == torch.float32
    for dtype, computed in ((None, torch.float32), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
        with devices.autocast(torch.device("cpu"), dtype):
            assert model(torch.ones(1, 8)).dtype == computed


@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stop = StopSignal()
    stop.watch()
    yield stop
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_waits_for_the_end_of_what_is_deferred(stop, number, code):
    finished = False
    with pytest.raises(SystemExit, match=str(code)):
        with stop.deferred():
            os.kill(os.getpid(), number)
            finished = True
        pytest.fail("it goes on")
    assert finished and stop.number == number
    os.kill(os.getpid(), number)  # torchrun hands on what a terminal has sent already: what ends is not disturbed


def test_errors_within_what_is_deferred_and_signals_elsewhere(stop):
    """A UserError is said all the same, but not that a collective broke as torchrun stops the processes."""
    with pytest.raises(UserError), stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        raise UserError("the loss became nan")
    with pytest.raises(SystemExit), stop.deferred():
        raise RuntimeError("Connection closed by peer")
    stop.number = 0
    with pytest.raises(RuntimeError), stop.deferred():
        raise RuntimeError("a fault")
    stop.watch()
    with pytest.raises(SystemExit, match="143"):  # at once where nothing is deferred
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it goes on")
    stop.watch()
    ignore_signals(0)  # workers leave them to the process that trains
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_the_batch_divides_by_processes_and_parts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for most, batch, parts, expected in ((4, 8, 1, 4), (4, 6, 1, 3), (4, 8, 4, 2), (4, 7, 1, 1), (1, 8, 1, 1), (9, 8, 1, 4)):
        assert processes.processes_for(None, most, batch, parts) == expected
    assert processes.processes_for(0, 4, 8, 2) == 1 and processes.processes_for(4, 1, 8, 2) == 4
    with pytest.raises(UserError, match="a batch of 6 .* 4 processes with --accumulate 1: make --batch-size a multiple of 4"):
        processes.processes_for(4, 1, 6, 1)
    with pytest.raises(UserError, match="a batch of 9 .* by 1 process with --accumulate 2: .* multiple of 2"):
        processes.processes_for(None, 4, 9, 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(processes, "world_size", lambda: 3)
    assert processes.launched() and processes.processes_for(0, 1, 6, 2) == 3
    with pytest.raises(UserError, match="a batch of 8 .* by 3 processes"):
        processes.processes_for(None, 4, 8, 1)


FAIL = """
import functools, os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from runtime.errors import UserError, exit_on_user_error
from runtime.processes import gather, process_group, rank, world_size
from runtime.progress import Progress
from runtime.signals import StopSignal

how, stop = sys.argv[1], StopSignal()
stop.watch()
stop.farewell = "farewell"
dist.init_process_group = functools.partial(dist.init_process_group, timeout=timedelta(seconds=2))
with process_group(), exit_on_user_error("fail.py"), stop.deferred():
    Path(f"pid{rank()}").write_text(str(os.getpid()))
    assert gather(rank()) == [0, 1] and world_size() == 2
    print("printed once")
    time.sleep(4 * rank())
    gather(None)  # waits for longer than a gradient is waited for
    if how == "terminated":
        if rank():
            os.kill(os.getppid(), signal.SIGTERM)
        while not stop.number:
            time.sleep(0.1)
        os.write(2, b"the step is finished\\n")  # in one piece: print writes the end of the line by itself
    elif rank():
        if how == "killed":
            os.kill(os.getpid(), 9)
        raise UserError("Sample 3 is broken")
    gather(None)  # waits for rank 1
"""


def in_a_fork(folder: Path, how: str, call):
    """A started process, which need not import torch again, that calls a launcher of FAIL in a folder, with out and err."""
    folder.mkdir(exist_ok=True)
    (folder / "fail.py").write_text(FAIL)

    def launch():
        os.chdir(folder)
        os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
        sys.argv, sys.modules["__main__"].__spec__, sys.stderr = ["fail.py", how], None, open(2, "w")
        call()

    program = multiprocessing.get_context("fork").Process(target=launch)
    program.start()
    return program


@pytest.mark.parametrize("how, code, says, not_said", [
    ("killed", 137, "the process of rank 1 was killed by SIGKILL, and the others were stopped\n", "Traceback"),
    ("mistake", 2, "fail.py: Sample 3 is broken\n", "Traceback"),
    ("terminated", 143, "the step is finished\nthe step is finished\n", "process of rank"),
])  # fmt: skip
def test_the_end_of_one_process_is_the_end_of_all_and_said_once(how, code, says, not_said, tmp_path):
    program = in_a_fork(tmp_path, how, lambda: processes.launch(2))
    program.join()
    out, err = ((tmp_path / name).read_text() for name in ("out", "err"))
    assert program.exitcode == code and err.count(says) == 1 and not_said not in err, err
    assert out == "printed once\n" + "\nfarewell\n" * (how == "terminated")
    for number in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid{number}").read_text()), 0)


def test_the_end_of_a_process_on_another_machine_is_one_sentence(tmp_path):
    """Two launchers, as on two machines, each with its own process: torchrun ends its own alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint {address} --rdzv-id t fail.py killed".split()
    began = time.time()
    machines = [in_a_fork(tmp_path / str(n), "killed", lambda: torchrun(flags)) for n in (0, 1)]
    for machine in machines:
        machine.join()
    assert [machine.exitcode for machine in machines] == [1, 1] and time.time() - began < 60
    (here,) = (tmp_path / str(n) for n in (0, 1) if (tmp_path / str(n) / "pid0").exists())
    assert (here / "out").read_text() == "printed once\n"
    said = (here / "err").read_text().splitlines()
    sentence = "another process of this run has ended, and with it this one: if no reason is printed here, it is on its machine"
    assert said.count(sentence) == 1
    assert not any("Traceback" in line for line in said[: said.index(sentence)])  # what follows is torchrun's


def test_processes_share_rank_0s_weights_and_average_their_gradients_at_once(tmp_path):
    def process(number):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=number, world_size=2)
        torch.manual_seed(number)
        processes.share_weights(model := nn.Linear(3, 1))
        joined = processes.joined_gradients([model.bias, model.weight])
        model(torch.tensor([[1.0, 2.0, 3.0]]) * (number + 1)).sum().backward()
        dist.all_reduce(joined.div_(2))
        torch.save([model.state_dict(), joined, model.weight.grad], tmp_path / str(number))

    programs = [multiprocessing.get_context("fork").Process(target=process, args=[number]) for number in (0, 1)]
    for step in ("start", "join"):
        for program in programs:
            getattr(program, step)()
    torch.manual_seed(0)
    first = nn.Linear(3, 1).state_dict()
    for number in (0, 1):
        weights, joined, grad = torch.load(tmp_path / str(number))
        assert all(torch.equal(weights[name], first[name]) for name in first)
        assert joined.tolist() == [1, 1.5, 3, 4.5] and grad.tolist() == [[1.5, 3, 4.5]]


def test_the_average_is_the_moving_average():
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    average, first = AveragedWeights(model, decay=0.1), model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    average.update()  # the first step: decay 1 / 11
    torch.testing.assert_close(average.mean, {"weight": first / 11 + (first + 1) * 10 / 11})
    average.update()  # then 0.1, as 2 / 12 is more
    expected, live = 0.1 * (first + 10 / 11) + 0.9 * (first + 1), model.weight.detach().clone()
    average.swap()
    torch.testing.assert_close(model.weight.detach(), expected)
    average.swap()
    assert torch.equal(model.weight, live)
    other = AveragedWeights(model, decay=0.1)
    other.load_state_dict(average.state_dict())
    assert other.steps == 2 and torch.equal(other.mean["weight"], average.mean["weight"])
    average = AveragedWeights(model, decay=0)  # none
    average.update(), average.swap()
    assert not average.mean and torch.equal(model.weight, live)
