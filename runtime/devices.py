"""Which device computes, in which precision."""

import contextlib
import os

import torch

from runtime.errors import UserError


def pick_device(gpus: int | None = None) -> torch.device:
    """The CPU for 0, else a CUDA card: under torchrun one for each of its processes, whatever `gpus` says.

    gpus: cards asked for; None: one where there is one. UserError where there are fewer.
    """
    there = torch.cuda.device_count()
    gpus = min(there, 1) if gpus is None else gpus
    if not gpus:
        return torch.device("cpu")
    launched = "LOCAL_WORLD_SIZE" in os.environ
    gpus = int(os.environ.get("LOCAL_WORLD_SIZE", gpus))
    if gpus > there:
        flag = "--nproc-per-node" if launched else "--gpus"
        raise UserError(f"{gpus} CUDA cards are asked for and this machine has {there}: use {flag} {there}")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())


def compute_dtype() -> torch.dtype:
    """bfloat16 where the CUDA card computes in it, else float16."""
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name; UserError where this machine has none."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the second where torch was built without CUDA
        reason = str(error).split("\n")[0][:120]
        raise UserError(f"device {name} can't be used here ({reason}): leave it out, or name cpu") from None




def autocast(device: torch.device):
    """Mixed precision on CUDA; nothing elsewhere: a laptop's CPU is slower in bfloat16 than in float32."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.autocast("cuda", dtype=compute_dtype())


def to_device(batch: dict, device: torch.device) -> dict:
    """The tensors of a batch, moved; everything else as it is."""
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def default_workers() -> int:
    """Processes that load data, for each process that computes on this machine: half its cores, at most 8."""
    return min(8, (os.cpu_count() or 2) // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def choose_threads() -> None:
    """Compute in as many threads as cores are free, at most torch's default; OMP_NUM_THREADS in the environment wins.

    Each step waits for its last thread, so on a machine whose cores are taken several threads are slower than one."""
    if "OMP_NUM_THREADS" not in os.environ and hasattr(os, "getloadavg"):
        torch.set_num_threads(max(1, round(torch.get_num_threads() - os.getloadavg()[0])))


@contextlib.contextmanager
def card_failures():
    """What fails in training on a card alone, as a UserError with exit code 1."""
    try:
        yield
    except torch.OutOfMemoryError:
        sentence = "the card's memory is full: raise --accumulate, try --checkpoint-activations or a smaller --set image_size"
        raise UserError(sentence, exit_code=1) from None
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = " ".join(str(error).split())[:200]
        way_out = "install what it misses, often a C compiler, or train slower by TORCH_COMPILE_DISABLE=1 in the environment"
        raise UserError(f"torch.compile failed ({reason}): {way_out}", exit_code=1) from error
