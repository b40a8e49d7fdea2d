"""A model hub, asked by huggingface_hub: an answer within seconds, or one sentence that says why there is none."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging

from runtime.errors import UserError

PATIENCE = 4  # seconds for an answer; the environment variable HF_HUB_ETAG_TIMEOUT gives more
REFUSALS = {  # in this order: the first is a kind of the second
    GatedRepoError: "its page asks to accept terms: do that, then `hf auth login`",
    RepositoryNotFoundError: "there is no such repository, or a private one that needs `hf auth login`",
    RevisionNotFoundError: "it has no such revision",
    EntryNotFoundError: "it has no such file",
}


class Refused(UserError):
    """The hub's answer is no: there is no such thing, or not for everybody."""


class Unreachable(UserError):
    """The hub gave no answer."""

    def __init__(self, sentence: str):
        super().__init__(sentence, exit_code=1)


def ask(question: Callable, what: str):
    """What question() returns; Refused or Unreachable, with `what` as their subject.

    It is asked in a thread of its own, since a name server that does not answer can't be given up otherwise.
    """
    patience, answer = int(os.environ.get("HF_HUB_ETAG_TIMEOUT", PATIENCE)), []
    logging.set_verbosity_error()  # the library tells of each retry

    def listen() -> None:
        try:
            answer.append((question(), None))
        except Exception as error:  # of three libraries
            answer.append((None, error))

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    thread.join(patience)
    result, error = answer[0] if answer else (None, TimeoutError(f"no answer in {patience} seconds"))
    if error:
        raise failure(error, what) from error
    return result


def failure(error: Exception, what: str) -> UserError:
    """What has gone wrong in one sentence."""
    if isinstance(error, UserError):
        return error
    for kind, reason in REFUSALS.items():
        if isinstance(error, kind) and not isinstance(error, LocalEntryNotFoundError):
            return Refused(f"{what}: {constants.ENDPOINT} says no, {reason}")
    if isinstance(error, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return Unreachable(f"{what}: it is not in the cache, and HF_HUB_OFFLINE forbids to look for it: unset that")
    while error.__cause__ is not None and isinstance(error, LocalEntryNotFoundError):
        error = error.__cause__
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return Unreachable(f"{what}: {constants.ENDPOINT} is not reached ({reason}): try again, or name a mirror by HF_ENDPOINT")


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def require_space(folder: Path, size: float, what: str) -> None:
    """UserError where the disk of a folder, which need not exist, has less than `size` bytes left."""
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    if (free := shutil.disk_usage(there).free) < size:
        raise UserError(
            f"{what} needs {gigabytes(size)} on the disk of {folder}, which has {gigabytes(free)} left: make room", exit_code=1
        )
