"""A run's folder and its files, each written whole or not at all."""

import contextlib
import itertools
import json
import os
import subprocess
from pathlib import Path

import torch

from runtime.errors import UserError


def write_whole(path: Path, write) -> None:
    """Let write(file) fill a file beside `path`, flushed and renamed: whenever the power goes, `path` is the old file or
    the new one. UserError with exit code 1 where that can't be, with the old file untouched."""
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        # torch's zip writer turns what the file said into an error of its own
        if isinstance(error, OSError) or "inline_container" in str(error):
            cause = error if isinstance(error, OSError) else error.__context__
            reason = getattr(cause, "strerror", None) or str(cause or error).split("\n")[0]
            sentence = f"{path} can't be written ({reason}): make room or see to the folder; what was saved before is untouched"
            raise UserError(sentence, exit_code=1) from error
        raise


def write_checkpoint(path: Path, checkpoint: dict) -> None:
    write_whole(path, lambda file: torch.save(checkpoint, file))


class RunFolder:
    """last.pt (all that --resume needs), best.pt (all that evaluate.py needs) and log.jsonl (what the run is, then a line an
    epoch). ./best.pt is linked to the first best.pt that is saved here, so of several runs the newest has the link."""

    def __init__(self, path: Path):
        self.path, self.last, self.best, self.linked = path, path / "last.pt", path / "best.pt", False

    def taken(self) -> bool:
        """Whether a run is there already."""
        return self.last.exists() or self.best.exists()

    def make(self) -> None:
        """Make the folder, and clear away what a killed run has left half-written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for part in self.path.glob("*.part"):
                part.unlink()
        except OSError as error:
            sentence = f"{error.filename} can't be written ({error.strerror}): choose another --out"
            raise UserError(sentence, exit_code=1) from None

    def save(self, state: dict, log: list[dict]) -> None:
        """Write last.pt, and log.jsonl from the lines it holds too."""
        write_checkpoint(self.last, state)
        self.write_log(log)

    def save_best(self, checkpoint: dict) -> None:
        write_checkpoint(self.best, checkpoint)
        if not self.linked:
            link_best(self.best)
        self.linked = True

    def write_log(self, log: list[dict]) -> None:
        if log:
            lines = "".join(json.dumps(line) + "\n" for line in log)
            write_whole(self.path / "log.jsonl", lambda file: file.write(lines.encode()))


def link_best(best: Path, link: Path = Path("best.pt")) -> None:
    """Point ./best.pt at a run's best, and say what it pointed at before. A regular file of that name is left alone; where
    there can be no link, none is made."""
    if link.exists() and not link.is_symlink():
        print(f"{link} is a file of yours and stays as it is; this run's best is {best}")
        return
    part = link.with_name(f"{link.name}.{os.getpid()}")  # replaced in one go: several runs may end at the same time
    before, now = os.readlink(link) if link.is_symlink() else None, os.path.relpath(best, link.parent)
    try:
        part.symlink_to(now)
        os.replace(part, link)
        if before not in (None, now):
            print(f"{link} links to {now} from now on, not to {before}", flush=True)
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
    """runs/<data>-<model>-<number>, a new folder of the first number that is free: runs that start together have their own."""
    for number in itertools.count(1):
        path = Path("runs") / f"{Path(data).resolve().name}-{model}-{number}"
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path


def free_path(path: Path) -> Path:
    """`path`, or the first of path-2, path-3 ... that does not exist: nothing is overwritten."""
    number, free = 2, path
    while free.exists():
        free, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return free
