"""Which device computes, in which precision."""

import argparse
import contextlib
import functools
import os
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from runtime.errors import UserError
from runtime.processes import let_rank_0_speak

LARGE = 50_000_000  # weights: all presets but `tiny`, which bfloat16 makes no faster on a CPU, nor compilation on a card


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


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name; UserError where this machine has none."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the second where torch was built without CUDA
        reason = str(error).split("\n")[0][:120]
        raise UserError(f"device {name} can't be used here ({reason}): leave it out, or name cpu") from None


def compute_dtype() -> torch.dtype:
    """bfloat16 where the CUDA card computes in it, else float16."""
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for products in bfloat16; False where torch can't say."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # its mkldnn check accepts CPUs that emulate them
    return any(getattr(torch.cpu, name, bool)() for name in names)


def is_large(model: torch.nn.Module) -> bool:
    return sum(p.numel() for p in model.parameters()) > LARGE


def chosen_dtype(name: str, model: torch.nn.Module) -> torch.dtype:
    """What a model on its device computes in by the name of --dtype. auto: on a CUDA card `compute_dtype`; on a CPU with
    bfloat16 this, where the model is LARGE; else float32."""
    if name != "auto":
        return getattr(torch, name)
    device = next(model.parameters()).device.type
    if device == "cuda":
        return compute_dtype()
    return torch.bfloat16 if device == "cpu" and is_large(model) and cpu_has_bfloat16() else torch.float32


def autocast(device: torch.device, dtype: torch.dtype | None = None):
    """Mixed precision in a dtype, none for float32. Without a dtype `compute_dtype` on CUDA, float32 elsewhere."""
    dtype = dtype or (compute_dtype() if device.type == "cuda" else torch.float32)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def training_attention():
    """A context for forward and backward passes, in which attention takes no kernel of cuDNN's. torch (2.11, on an H100) would
    prefer it, and its backward pass gave NaN for finite inputs where the flash kernel's was finite."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


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


def compile_here(compile_blocks, model) -> None:
    """Compile a model on a card by `compile_blocks`, which returns how many kinds of blocks it compiles, and say how long that
    will take; where one operation can't be compiled, say why and leave the model as it is."""
    if torch._dynamo.config.disable:  # TORCH_COMPILE_DISABLE=1
        return
    try:
        torch.compile(torch.neg)(next(model.parameters())[:1])
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = first_words(error).partition(" Set TORCH")[0]
        print(f"torch.compile does not work here, training goes on without it, slower ({reason})", flush=True)
    else:
        tell_compiling(compile_blocks(model))


def tell_compiling(kinds: int) -> None:
    """Say that so many kinds of blocks will be compiled, each with a graph forward and one backward; and then, where one is
    finished and the last line is 20 seconds old, how many are."""
    from torch._inductor.runtime.runtime_utils import cache_dir  # which takes seconds to import

    begun, done = (told := time.monotonic()), 0

    def finished(*_) -> None:
        nonlocal told, done
        done += 1
        if time.monotonic() - told >= 20:
            told = time.monotonic()
            print(f"compiled {done} of about {2 * kinds} graphs in {told - begun:.0f} s", flush=True)

    torch._dynamo.callback.on_compile_end(finished)
    print(f"compiling {kinds} kinds of blocks in the first step: minutes, once on this machine, as {cache_dir()} "
          "(TORCHINDUCTOR_CACHE_DIR) keeps the kernels; TORCH_COMPILE_DISABLE=1 starts at once and trains slower", flush=True)


def ways_to_fit(samples: int, args: argparse.Namespace) -> str:
    """What a run can do that fills the card; samples: how many each process computes in a step."""
    ways = [f"--accumulate {samples} (now {args.accumulate})"] if args.accumulate < samples else []
    ways += [] if args.checkpoint_activations else ["--checkpoint-activations"]
    return f"use {' and '.join(ways)}, or " * bool(ways) + "take a smaller --set image_size or --model"


def first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


@contextlib.contextmanager
def card_failures(way_out: str = "take a smaller --model, or a card that other programs leave free", end: bool = True):
    """What fails on a card alone, as a UserError with exit code 1. way_out: what to do where its memory is full; end: whether
    the program ends with it, as it may on every rank."""
    try:
        yield
    except torch.OutOfMemoryError:
        if end:
            let_rank_0_speak()
        raise UserError(f"the card's memory is full: {way_out}", exit_code=1) from None
    except torch._dynamo.exc.TorchDynamoException as error:
        let_rank_0_speak()
        way_out = "train slower by TORCH_COMPILE_DISABLE=1 in the environment"
        raise UserError(f"torch.compile failed ({first_words(error)}): {way_out}", exit_code=1) from error
