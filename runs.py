"""Around a run: its folder and files, its device, and the numbers of its command line."""

import argparse
import contextlib
import json
import math
import os
import subprocess
from pathlib import Path

import torch


class UsageError(Exception):
    """A command line that can't be followed. The message is one sentence for the user."""


class WriteError(Exception):
    """A file that can't be written, as on a full disk. The message is one sentence for the user."""


def write_whole(path: Path, write, keep: Path | None = None) -> None:
    """Let write(file) fill a file beside `path`, flushed and renamed: whenever the power goes, `path` is the old file or
    the new one. WriteError if that can't be, with the old one in place. keep: what the old one is renamed to; for a moment
    then nothing is at `path`."""
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        if keep:
            os.replace(path, keep)
        os.replace(part, path)
        flush_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        # torch's zip writer turns what the file said into an error of its own
        if isinstance(error, OSError) or "inline_container" in str(error):
            cause = error if isinstance(error, OSError) else error.__context__
            reason = getattr(cause, "strerror", None) or str(cause or error).split("\n")[0]
            raise WriteError(
                f"{path} can't be written ({reason}): make room or see to the folder; what was saved before is untouched"
            ) from error
        raise


def flush_folder(folder: Path) -> None:
    """Make renames in a folder outlast a power cut, where the system can."""
    with contextlib.suppress(OSError):  # Windows opens no folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_checkpoint(path: Path, checkpoint: dict) -> None:
    write_whole(path, lambda file: torch.save(checkpoint, file))


class RunFolder:
    """The files of a run that carry its state: last.pt, previous.pt (the last.pt before it) and log.jsonl.

    At whatever moment the program is killed, last.pt is whole or, while it is being renamed, previous.pt is."""

    def __init__(self, path: Path):
        self.path, self.last, self.previous = path, path / "last.pt", path / "previous.pt"
        self.sound = False  # whether this process has read or written last.pt: an unreadable one is not kept

    def taken(self) -> bool:
        """Whether a run is there already."""
        return any((self.path / name).exists() for name in ("last.pt", "previous.pt", "best.pt"))

    def make(self) -> None:
        """Make the folder, and clear away what a killed run has left half-written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for part in self.path.glob("*.part"):
                part.unlink()
        except OSError as error:
            raise WriteError(f"{error.filename} can't be written ({error.strerror}): choose another --out") from None

    def save(self, state: dict, log: list[dict]) -> None:
        """Write last.pt, and as log.jsonl the lines it holds too."""
        write_whole(self.last, lambda file: torch.save(state, file), keep=self.previous if self.sound else None)
        self.sound = True
        self.write_log(log)

    def save_best(self, checkpoint: dict) -> None:
        write_checkpoint(self.path / "best.pt", checkpoint)
        link_best(self.path / "best.pt")

    def write_log(self, log: list[dict]) -> None:
        if log:
            lines = "".join(json.dumps(line) + "\n" for line in log)
            write_whole(self.path / "log.jsonl", lambda file: file.write(lines.encode()))


def link_best(best: Path, link: Path = Path("best.pt")) -> None:
    """Point ./best.pt at a run's best. A regular file of that name is left alone, and where there can be no link, none is."""
    if link.exists() and not link.is_symlink():
        print(f"{link} is a file of yours and stays as it is; this run's best is {best}")
        return
    part = link.with_name(f"{link.name}.{os.getpid()}")  # replaced in one go: several runs may end at the same time
    try:
        part.symlink_to(os.path.relpath(best, link.parent))
        os.replace(part, link)
    except OSError as error:  # a file system without links, or a folder of somebody else's: no reason to end a run
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        print(f"{link} can't be linked here ({error.strerror or error}); this run's best is {best}")


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
