"""Around a run: its folder and files, its device, and the numbers of its command line."""

import argparse
import math
import os
import subprocess
from pathlib import Path

import torch


class UsageError(Exception):
    """A command line that can't be followed. The message is one sentence for the user."""


def write_checkpoint(path: Path, checkpoint: dict) -> None:
    """Written beside, flushed and renamed: whenever the power goes, `path` is the old file or the new one."""
    part = path.with_suffix(".part")
    with open(part, "wb") as f:
        torch.save(checkpoint, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def link_best(best: Path, link: Path = Path("best.pt")) -> None:
    """Point ./best.pt at a run's best. A regular file of that name is left alone."""
    if link.exists() and not link.is_symlink():
        print(f"{link} is a file of yours and stays as it is; this run's best is {best}")
        return
    part = link.with_name(f"{link.name}.{os.getpid()}")  # replaced in one go: several runs may end at the same time
    part.symlink_to(os.path.relpath(best, link.parent))
    os.replace(part, link)


def revision() -> str:
    """The git revision of this code, with + where it was changed; '' outside a repository."""
    here = Path(__file__).parent
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=here, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return ""
    return git.stdout.strip() if git.returncode == 0 else ""


def free_run(data: str, model: str) -> Path:
    """runs/<data>-<model>-<number>, the first number that is free."""
    number = 1
    while (path := Path("runs") / f"{Path(data).resolve().name}-{model}-{number}").exists():
        number += 1
    return path


def free_path(path: Path) -> Path:
    """`path`, or the first path-2, path-3 ... that does not exist: nothing is overwritten."""
    number, free = 2, path
    while free.exists():
        free, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return free


def pick_device(gpus: int | None) -> torch.device:
    """The CPU for --gpus 0, else a CUDA card: under torchrun one for each of its processes, whatever --gpus says."""
    there = torch.cuda.device_count()
    gpus = min(there, 1) if gpus is None else gpus
    if not gpus:
        return torch.device("cpu")
    gpus = int(os.environ.get("LOCAL_WORLD_SIZE", gpus))
    if gpus > there:
        raise UsageError(f"--gpus {gpus}: this machine has {there} CUDA card{'s' * (there != 1)}; use --gpus {there}")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())


def default_workers() -> int:
    """Processes that load data, for each one that trains on this machine: half its cores, at most 8."""
    return min(8, (os.cpu_count() or 2) // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def number(kind: type, least: float, text: str):
    """A number of the command line, at least `least`."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not value >= least:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not {'an integer' if kind is int else 'a number'} of {least} or more"
        )
    return value
