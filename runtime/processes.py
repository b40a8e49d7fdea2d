"""The processes of a run, one a card (or several on a CPU), started by torchrun or by `launch`.

Each finds its number, its rank, in the environment. Rank 0 alone prints and writes files.
"""

import contextlib
import functools
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args as torchrun_arguments
from torch.distributed.run import run as torchrun

from runtime.errors import UserError


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def launched() -> bool:
    """Whether this process is one of those that torchrun, or `launch`, has started."""
    return "WORLD_SIZE" in os.environ


@contextlib.contextmanager
def process_group():
    """Within it, the processes that torchrun has started know of each other, and with its end each of them ends; nothing
    changes where there is one process.

    What is printed on ranks other than 0 goes nowhere; messages on stderr are seen from all."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
    patient_group()
    code = 1
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if rank() else sys.stdout):
            yield
            gather(None)  # nobody leaves before the last has come
        code = 0
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        code = 130
    except RuntimeError as error:
        # Where the end of another process broke a collective here, that one's message is the one to read.
        broken = isinstance(error, dist.DistError) or "gloo" in str(error)
        if broken and (elsewhere := int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) < world_size()):
            tell_of_another_machine()
        wait_for_the_end()
        if not broken or not elsewhere:
            traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)  # the group's threads may abort the interpreter's own end


@functools.cache
def patient_group() -> dist.ProcessGroup:
    """All processes, for Python objects: one may wait for another's download, or for the last of its images, for days. The end
    of a process shows at once all the same."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


def tell_of_another_machine() -> None:
    """Say, once on each machine, that the run ends: the torchrun of one machine prints what happens there alone."""
    if int(os.environ["LOCAL_RANK"]) == 0:
        print("another process of this run has ended, and with it this one: if no reason is printed here, it is on its machine",
              file=sys.stderr, flush=True)  # fmt: skip


def wait_for_the_end() -> None:
    """Give another process, which has failed and says why, the time to end this one."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(5)


def let_rank_0_speak() -> None:
    """Called where the same may have failed on every rank: rank 0 goes on, and may end the others before they say it too."""
    if rank():
        wait_for_the_end()


def gather(value) -> list:
    """The values of all ranks, in their order, on every rank. All of them must call it."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value, group=patient_group())
    return values


def share_weights(model: nn.Module) -> None:
    """Give the model of every process rank 0's weights, since machines may round what one seed draws differently."""
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, 0)


def joined_gradients(trained: Sequence[Tensor]) -> Tensor:
    """Give these weights gradients of zero that are parts of one tensor (n,), which is returned: one exchange averages all.

    They have to stay where they are: `zero_grad(set_to_none=False)`."""
    joined = torch.zeros(sum(p.numel() for p in trained), dtype=trained[0].dtype, device=trained[0].device)
    for p, part in zip(trained, joined.split([p.numel() for p in trained])):
        p.grad = part.view_as(p)
    return joined


@contextlib.contextmanager
def rank_0_first():
    """What is inside is done on rank 0, then on the others: what it downloads is there, what is wrong is said once."""
    if rank():
        gather(None)
    yield
    if not rank():
        gather(None)


def processes_for(gpus: int | None, most_on_cpu: int, batch: int, parts: int) -> int:
    """How many processes share a batch that each computes in `parts` parts: one a card (gpus; None: one where there is one), or
    on a CPU the most that divide it, up to `most_on_cpu` and the cores. UserError where the batch can't be divided evenly."""
    if launched():
        processes = world_size()
    elif gpus is not None or torch.cuda.is_available():
        processes = gpus or 1
    else:
        most = min(most_on_cpu, os.cpu_count() or 1)
        processes = next(n for n in range(most, 0, -1) if n == 1 or batch % (n * parts) == 0)
    if batch % (processes * parts):
        raise UserError(
            f"a batch of {batch} can't be divided evenly by {processes} process{'es' * (processes > 1)} with --accumulate "
            f"{parts}: make --batch-size a multiple of {processes * parts}"
        )
    return processes


def launch(processes: int) -> None:
    """Run this program (a script or `python -m MODULE`, with its arguments) in several processes by torchrun.

    When one ends badly torchrun stops the others, a sentence says which it was, and SystemExit has its exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the sentence below says it
    module = sys.modules["__main__"].__spec__
    command = ["-m", module.name] if module else [sys.argv[0]]
    try:
        torchrun(torchrun_arguments(["--standalone", f"--nproc-per-node={processes}", *command, *sys.argv[1:]]))
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        code = failure.exitcode
        if code < 0:
            name = signal.Signals(-code).name
            print(f"the process of rank {number} was killed by {name}, and the others were stopped", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)
