"""The folder of a training run: its name, its files, and where its code came from."""

import os
import subprocess
from pathlib import Path

import torch


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
    if link.is_symlink():
        link.unlink()
    if link.exists():
        print(f"{link} is a file of yours and stays as it is; this run's best is {best}")
        return
    link.symlink_to(os.path.relpath(best, link.parent))


def revision() -> str:
    """The git revision of this code, with + where it was changed; '' outside a repository."""
    here = Path(__file__).parent
    git = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=here, capture_output=True, text=True)
    return git.stdout.strip() if git.returncode == 0 else ""


def free_run(data: str, model: str) -> Path:
    """runs/<data>-<model>-<number>, the first number that is free."""
    number = 1
    while (path := Path("runs") / f"{Path(data).resolve().name}-{model}-{number}").exists():
        number += 1
    return path
