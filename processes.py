"""The processes of a run: how they start and meet, in what order samples come, and who works on which.

There is one a card (or several on a CPU): those that torchrun starts, on one machine or many, or that `launch` starts in
the same way. Each finds its number, its rank, in the environment. Rank 0 alone prints and writes files.
"""

import contextlib
import itertools
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from runs import UsageError
from stopping import leave


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def launched() -> bool:
    """Whether this process is one of those that torchrun, or `launch`, has started."""
    return "WORLD_SIZE" in os.environ


@contextlib.contextmanager
def process_group():
    """Within it, the processes that torchrun has started know of each other; nothing changes where there is one.

    What is printed on ranks other than 0 goes nowhere; messages on stderr are seen from all."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if missing := [k for k in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if k not in os.environ]:
        raise UsageError(f"WORLD_SIZE is set but {missing[0]} is not: start with torchrun, or unset WORLD_SIZE")
    # Gradients go by NCCL where there are cards; Python objects always by gloo, which can wait for a long download.
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
    sys.excepthook = partial(last_words, sys.excepthook)
    if rank() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all; rank 0 has the word
    if dist.is_torchelastic_launched():
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if rank() else sys.stdout):
        try:
            yield
            gather(None)  # nobody leaves before the last has come
        except SystemExit as end:
            leave(end.code)
        except (FloatingPointError, RuntimeError):
            # Another rank's too, or the end of another may have broken a collective here: rank 0, or that other one, is
            # to speak first, and the launcher then stops the rest.
            time.sleep(5 if rank() else 2)
            raise
    time.sleep(0.2)  # gloo's threads let go of the last call's tensors: joined before they have, they may wait for ever
    dist.destroy_process_group()


def last_words(say, kind, *error) -> None:
    """What nobody has caught: said as ever, by torch's hook, which names the rank; then the exit code, come what may."""
    say(kind, *error)
    leave(130 if issubclass(kind, KeyboardInterrupt) else 1)


def end_with(launcher: int) -> None:
    """End this process when its launcher was killed: nobody else would then end it."""
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def gather(value) -> list:
    """The values of all ranks, in their order, on every rank. All of them must call it, so it makes them meet, too."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def rank_0_first():
    """What is inside is done on rank 0, then on the others: what it downloads is there, what is wrong is said once."""
    if rank():
        gather(None)
    yield
    if not rank():
        gather(None)


def launch(processes: int, command: list[str]) -> None:
    """Run a Python script with its arguments in several processes on this machine, as torchrun does.

    When one ends badly the others are stopped, a sentence says which it was, and SystemExit has its exit code."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the sentence below says it
    with tempfile.TemporaryDirectory() as logs:
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=str(uuid.uuid4()), max_restarts=0,
            rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost",
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )  # fmt: skip
        try:
            elastic_launch(config, sys.executable)(*command)
            return
        except SignalException as stop:
            sys.exit(128 + stop.sigval)
        except ChildFailedError as error:
            number, failure = error.get_first_failure()
            code = failure.exitcode
    if code != 2:  # after a user's mistake all is said
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        name = Path(command[0]).name
        print(f"{name}: the process of rank {number} {how}, and the others were stopped", file=sys.stderr)
    sys.exit(code if code > 0 else 128 - code)


def share(count, part, parts):
    """Part number `part` of `parts` contiguous ones of `count` things, as a range; their sizes differ by 1 at most."""
    return range(count * part // parts, count * (part + 1) // parts)


class Stream(torch.utils.data.Sampler):
    """The training order as one endless stream of positions, pass after pass over the shuffled set, cut anywhere.

    Position n belongs to pass n // size; the item's key is (index, pass), so its phrase and augmentation depend on
    the seed and the key alone, not on workers, interruptions or batch boundaries.
    """

    def __init__(self, size: int, seed: int, start: int, stop: int):
        self.size, self.seed, self.start, self.stop = size, seed, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self):
        for number in range(self.start // self.size, -(-self.stop // self.size)):
            order = np.random.default_rng([self.seed, number]).permutation(self.size)
            first = number * self.size
            for n in range(max(self.start, first), min(self.stop, first + self.size)):
                yield int(order[n - first]), number


class Shares(torch.utils.data.Sampler):
    """A Stream cut into batches, and of every batch the share of one rank: a DataLoader's batch_sampler.

    The shares of all ranks, in their order, are the batch of a single process. The last batch may be short; a rank whose
    share of it is empty gets the batch's first sample, so that it takes part in the step, and gives it no weight.
    """

    def __init__(self, stream, batch_size, rank=0, ranks=1):
        self.stream, self.batch_size, self.rank, self.ranks = stream, batch_size, rank, ranks

    def __len__(self):
        return -(-len(self.stream) // self.batch_size)

    def __iter__(self):
        keys = iter(self.stream)
        while batch := list(itertools.islice(keys, self.batch_size)):
            yield [batch[i] for i in share(len(batch), self.rank, self.ranks)] or batch[:1]
