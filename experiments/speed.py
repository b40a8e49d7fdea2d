"""How fast a model is, and how much memory it takes. Results are appended, as Markdown tables, to docs/speed.md, each line
when it is known.

    python -m experiments.speed --model paper --batch-size 1 4 8 --compile default --baseline      on a GPU
    python -m experiments.speed --model tiny --batch-size 8 --tasks forward train evaluate loader
    python -m experiments.speed --memory                 computed, on no device: FLOPs, and the batch that fits a card
    python -m experiments.speed --model large --profile  where the time goes, stage by stage

Weights and inputs are random. Tasks: train (forward, loss, backward, clipping, optimiser), loader (the training set's loader
alone, and beside the training step), forward (as evaluate.py calls the model), evaluate (its whole loop over generated
scenes of 800 pixels, loader and scoring included). On a CPU the variants of a task are timed in turns, so that what
else the machine does slows them alike, on a card one after the other, as each keeps memory of its own; a figure is the
median over --repeats. --baseline times the published settings beside them, on the same weights with the same optimiser:
batch 1, SAM 2 in float32, multi-head attention that returns its weights, no compilation, a synchronisation and an emptied cache
after each step. MFU is the share of what the device reaches on a large product.
`--compile recorded` is what train.py does on a card; the memory of its CUDA graph is not in its peak GiB.
"""

import argparse
import contextlib
import copy
import itertools
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from runtime.arguments import DTYPES, answer_early, at_least

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "speed.md"
TASKS = ("train", "loader", "forward", "evaluate")  # in this order
# Graphs by block, with the options of torch.compile: alone; and small kernels put together. As train.py does it: by block, and
# each pass recorded as one CUDA graph.
RECORDED, BY_BLOCK = "recorded", {"blocks": {}, "recorded": {}, "blocks-combined": {"options": {"combo_kernels": True}}}
MODES = (*BY_BLOCK, "default", "reduce-overhead", "max-autotune")  # the others: of torch.compile, for the whole


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # fmt: off
    add("--model", default="tiny", metavar="PRESET", help="of presets.py (default: tiny)")
    add("--image-size", type=at_least(int, 1), help="default: the preset's")
    add("--batch-size", type=at_least(int, 1), nargs="+", default=[1])
    add("--tasks", choices=TASKS, nargs="+", default=["forward", "train"])
    add("--compile", choices=MODES, nargs="*", default=[], help="time compiled forms too: by block, or as a whole")
    add("--dtype", choices=DTYPES[1:], nargs="+", default=[], help="time forward and evaluate in each of these")
    add("--checkpoint-activations", action="store_true", help="as train.py's")
    add("--baseline", action="store_true", help="time the published settings too")
    add("--profile", action="store_true", help="where the time of a forward pass goes, instead of tasks")
    add("--memory", action="store_true", help="compute FLOPs and the batch that fits, for all presets; measure nothing")
    add("--device", choices=("cpu", "cuda"), help="default: the card where there is one")
    add("--repeats", type=at_least(int, 1), default=10)
    add("--warmup", type=at_least(int, 0), default=3)
    add("--workers", type=at_least(int, 0), help="processes that load data (default: as train.py's)")
    add("--seed", type=at_least(int, 0), default=0)
    add("--out", type=Path, default=RESULTS, help="the file to append to (default: docs/speed.md)")
    # fmt: on
    return parser


if __name__ == "__main__":
    answer_early(command_line())

import torch
from torch import nn
from torch.utils.data import DataLoader

from data import Collate, open_dataset
from evaluate import score
from experiments.clock import Device, measure
from experiments.counting import flops, memory_table, random_batch, random_model
from experiments.loading import write_scenes
from fusion import CrossAttention
from losses import total_loss
from model import RS2SAM2, compile_blocks
from presets import RECIPES, Recipe, find_preset
from runtime.devices import autocast, compute_dtype, default_workers, to_device, training_attention
from runtime.errors import UserError, exit_on_user_error
from runtime.optimizers import optimizers_for
from runtime.recording import Recorded
from runtime.run_folder import revision

BASELINE = "published settings"


class StockAttention(CrossAttention):
    """A CrossAttention that computes and returns its weights, as nn.MultiheadAttention does by default."""

    def forward(self, query, memory, mask=None):
        padding = None if mask is None else ~mask  # (B, Nk)
        return nn.MultiheadAttention.forward(self, query, memory, memory, padding)[0]  # (B, Nq, dim)


@contextlib.contextmanager
def published_settings(model: RS2SAM2, half_encoder: bool):
    """The published way to run the same weights; half_encoder: in training on CUDA BEiT-3 ran in half precision."""
    attentions = [m for m in model.modules() if type(m) is CrossAttention]
    encoder, low = model.union_encoder, [(p, p.dtype) for p in model.parameters() if p.dtype != torch.float32]
    forward = encoder.forward

    def half(*args):
        with torch.autocast("cuda", dtype=compute_dtype()):
            return tuple(x.float() for x in forward(*args))

    for m in attentions:
        m.__class__ = StockAttention
    for p, _ in low:
        p.data = p.data.float()
    if half_encoder:
        encoder.forward = half
    try:
        yield
    finally:
        for m in attentions:
            m.__class__ = CrossAttention
        for p, dtype in low:
            p.data = p.data.to(dtype)
        if half_encoder:
            del encoder.forward


# ---- on a device ---------------------------------------------------------------------------------------------------------


class Step:
    """A training step as train.py does it. batch as `random_batch` gives it; call is the model or its compiled form."""

    def __init__(self, model: RS2SAM2, recipe: Recipe):
        self.optimizers, self.recipe = optimizers_for(model, recipe), recipe
        self.trained = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, call, batch, precision) -> None:
        self.update(self.gradients(call, precision, *batch))

    def gradients(self, call, precision, *batch) -> dict[str, torch.Tensor]:
        *inputs, target = batch
        with training_attention():
            with precision():
                output = call(*inputs)
            (loss := total_loss(output, target, self.recipe.losses)["loss"]).backward()
        return {"loss": loss.detach()}

    def update(self, terms: dict[str, torch.Tensor], keep_gradients: bool = False) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.recipe.clip)
        values = torch.stack([terms["loss"], norm])
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=not keep_gradients)
        values.tolist()  # the step's one wait for the device

    def recorded(self, call, precision):
        """The step of a batch, its forward and backward pass one CUDA graph, as train.py's on a card."""
        gradients = Recorded(partial(self.gradients, call, precision), self.trained)
        return lambda batch: self.update(gradients(*batch), keep_gradients=bool(gradients.graphs))


def forward_once(call, batch, precision) -> None:
    with torch.inference_mode(), precision():
        call(*batch[:-1])


def recorded_forward(call, precision):
    """The forward pass of a batch as one CUDA graph."""

    def forward(*inputs) -> dict[str, torch.Tensor]:
        with torch.no_grad(), precision():
            return {"logits": call(*inputs).logits}

    recorded = Recorded(forward)
    return lambda batch: recorded(*batch[:-1])


def flushed(run) -> None:
    """`run` as the published loop goes: the device waited for and the allocator's cache emptied after each step."""
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def compiled(model: RS2SAM2, mode: str) -> torch.nn.Module:
    """A form of the model with the same weights: its blocks compiled, or a graph of the whole in a mode of torch.compile."""
    if mode not in BY_BLOCK:
        return torch.compile(model, dynamic=False, mode=mode)
    shared = {id(p): p for p in [*model.parameters(), *model.buffers()]}  # what deepcopy takes as copied already
    compile_blocks(twin := copy.deepcopy(model, shared), **BY_BLOCK[mode])
    return twin


def in_dtype(model: RS2SAM2, dtype: str) -> RS2SAM2:
    """The model in evaluation mode with its weights in a dtype, as evaluate.py has it."""
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    twin.cast_frozen(getattr(torch, dtype))
    return twin


def task_runs(args, task: str, model: RS2SAM2, clock: Device, calls: dict, step: Step, dataset) -> dict:
    """{(variant, batch size): (settings, run)} of one task, the published settings first."""
    runs = {}
    batches = {size: random_batch(model, size, clock.device) for size in {1, *args.batch_size}}
    if args.baseline and task != "evaluate":
        settings = partial(published_settings, model, half_encoder=clock.cuda and task == "train")
        once = {"forward": forward_once, "train": step}[task]
        runs[BASELINE, 1] = settings, partial(flushed, partial(once, model, batches[1], contextlib.nullcontext))
    for size, (variant, call) in itertools.product(args.batch_size, calls.items()):
        dtype = getattr(torch, variant) if variant in args.dtype else None
        precision = partial(autocast, clock.device, dtype)
        if RECORDED in variant and task != "evaluate":
            record = {"forward": recorded_forward, "train": step and step.recorded}[task]
            runs[variant, size] = contextlib.nullcontext, partial(record(call, precision), batches[size])
            continue
        runs[variant, size] = (
            contextlib.nullcontext,
            {
                "forward": partial(forward_once, call, batches[size], precision),
                "train": step and partial(step, call, batches[size], precision),
                "evaluate": partial(score, call, dataset, batch_size=size, workers=args.workers, dtype=dtype),
            }[task],
        )
    return runs


def task_rows(args, task: str, results: Iterable, images: int | None, work: dict, product: float) -> Iterator[str]:
    """A table's lines for the results of one task; images: how many a run sees, where that is not the batch."""
    name, baseline = args.model, None
    for (variant, size), seconds, memory in results:
        cells, rate = [name, task, variant, str(size)], (images or size) / seconds
        if rate == 0:
            yield f"| {' | '.join(cells)} | out of memory | | | | |"
            continue
        baseline = rate if variant in (BASELINE, *args.dtype[:1]) else baseline
        mfu = f"{100 * rate * work['train' if task == 'train' else 'forward'] / product:.1f} %"
        times = f"{rate / baseline:.2f}" if baseline else ""
        yield f"| {' | '.join([*cells, f'{rate:.3g}', f'{1000 / rate:.4g}', mfu, f'{memory / 2**30:.2f}', times])} |"


def loader_rows(args, model, clock: Device, step: Step, call, root: Path) -> Iterator[str]:
    """The training set's loader alone, with one worker, and beside the training step, with the share that waits for it."""
    sizes = {"image_size": model.preset.image_size, "encoder_size": model.union_encoder.image_size}
    dataset = open_dataset(root, "train", one_phrase=True, augment=RECIPES[args.model].augment, **sizes)
    size, precision = args.batch_size[-1], partial(autocast, clock.device)
    if step:
        recorded = args.compile[-1:] == [RECORDED]
        once = step.recorded(call, precision) if recorded else partial(step, call, precision=precision)
    for workers, training in ((1, False), (max(1, args.workers), True))[: 1 + ("train" in args.tasks)]:
        loader = DataLoader(dataset, size, num_workers=workers, drop_last=True, pin_memory=clock.cuda,
                            collate_fn=Collate(model.union_encoder.tokenizer), persistent_workers=True)  # fmt: skip
        for _ in range(2):  # the first pass starts the workers and does not count
            start = ready = time.perf_counter()
            waited, images = 0.0, 0
            for batch in loader:
                waited, images = waited + time.perf_counter() - ready, images + len(batch["id"])
                if training:
                    b = to_device(batch, clock.device)
                    pictures = model.normalise(b["image"], b["encoder_image"])
                    once((*pictures, b["ids"], b["lengths"], b["target"]))
                ready = time.perf_counter()
        rate, waiting = images / (ready - start), 100 * waited / (ready - start)
        what = f"beside training, which waits {waiting:.1f} % of the time" if training else "alone"
        what = f"{args.model} | loader | {what}, {workers} worker{'s' * (workers > 1)}"
        yield f"| {what} | {size} | {rate:.3g} | {1000 / rate:.4g} | | | |"


def profile(model: RS2SAM2, clock: Device, batch) -> str:
    """Time of a forward pass by part, without compilation; the device is waited for around every part."""
    trunk, total, started = model.image_encoder.trunk, {}, {}
    names = ("union_encoder", "mask_prompt", "neck", "prompt_encoder", "decoder_fusion", "mask_decoder")
    parts = [(name, getattr(model, name)) for name in names] + [("patch embedding", trunk.patch_embed)]
    for i, block in enumerate(trunk.blocks):
        stage = f"Hiera, stage {1 + sum(i > end for end in trunk.stage_ends)}"
        parts += [(stage, block), (f"{stage}: fusion layers", block.space_adapter)]
        parts += [(f"{stage}: MLP adapters", block.mlp_adapter)]

    def now() -> float:
        if clock.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def begin(part, args) -> None:
        started[part] = now()

    def end(name, part, args, out) -> None:
        total[name] = total.get(name, 0) + now() - started[part]

    hooks = [part.register_forward_pre_hook(begin) for _, part in parts]
    hooks += [part.register_forward_hook(partial(end, name)) for name, part in parts]
    for _ in range(2):  # the first is for warming up
        total.clear()
        start = now()
        forward_once(model, batch, partial(autocast, clock.device))
        whole = now() - start
    for hook in hooks:
        hook.remove()
    lines = [f"| part of a forward pass, batch {len(batch[0])} | ms | share |", "|---|---|---|"]
    lines += [f"| {name} | {1000 * s:.1f} | {100 * s / whole:.1f} % |" for name, s in total.items()]
    return "\n".join([*lines, f"| all | {1000 * whole:.1f} | 100 % |"])


def expected_minutes(args, work: dict, product: float) -> float:
    """How long the tasks take at 30 % MFU, the loader not counted; five minutes for each compilation."""
    kinds = {"train": work["train"], "forward": work["forward"], "evaluate": 4 * work["forward"]}
    flop = sum(kinds.get(task, 0) for task in args.tasks) * (args.repeats + args.warmup + 1)
    images = sum(args.batch_size) * (1 + len(args.compile)) + args.baseline
    return flop * images / (0.3 * product) / 60 + 5 * len(args.compile) * len(args.batch_size) * len(args.tasks)


def measured(args) -> Iterator[str]:
    """Everything the command line asks for, on the device -> lines of Markdown, each when it is known."""
    clock = Device(args.device)
    model = random_model(args.model, args.image_size, args.seed).to(clock.device)
    if clock.cuda and not args.dtype:
        model.cast_frozen(compute_dtype())
    model.image_encoder.checkpoint_activations = args.checkpoint_activations
    work, product = flops(args.model, args.image_size), clock.product()
    yield (f"{clock.describe()}; {product / 1e12:.2f} TFLOP/s on a large product; {model.preset.image_size} pixels; "
           f"{work['forward'] / 1e9:,.1f} GFLOP an image forward, {work['train'] / 1e9:,.1f} in training; "
           f"median of {args.repeats}, seed {args.seed}.\n")  # fmt: skip
    if args.profile:
        yield profile(model.eval(), clock, random_batch(model, args.batch_size[-1], clock.device))
        return
    print(f"(this will take {expected_minutes(args, work, product):.0f} minutes or so)\n", file=sys.stderr, flush=True)
    first = args.dtype[0] if args.dtype else "published"
    yield f"| preset | task | variant | batch | images/s | ms an image | MFU | peak GiB | times {first} |"
    yield "|---" * 9 + "|"
    calls = {"as it is": model} | {f"compiled ({mode})": compiled(model, mode) for mode in args.compile}
    calls = {dtype: in_dtype(model, dtype) for dtype in args.dtype} or calls
    step = Step(model, RECIPES[args.model]) if "train" in args.tasks else None
    with tempfile.TemporaryDirectory() as folder:
        root, data, images = Path(folder) / "scenes", None, 4 * max(args.batch_size)
        if {"evaluate", "loader"} & set(args.tasks):
            write_scenes(root, {"train": 8 * max(args.batch_size), "val": images}, args.seed)
            sizes = {"image_size": model.preset.image_size, "encoder_size": model.union_encoder.image_size}
            data = torch.utils.data.Subset(open_dataset(root, "val", **sizes), range(images))
        for task in sorted(args.tasks, key=TASKS.index):
            model.train(task in ("train", "loader"))
            if not model.training:
                step = None  # and with it the optimiser's memory
                model.requires_grad_(False)
                if clock.cuda and not args.dtype:
                    model.cast_frozen(compute_dtype())  # all weights, as evaluate.py does
            if task == "loader":
                yield from loader_rows(args, model, clock, step, [*calls.values()][-1], root)
                continue
            results = measure(clock, task_runs(args, task, model, clock, calls, step, data), args.repeats, args.warmup)
            yield from task_rows(args, task, results, images if task == "evaluate" else None, work, product)


def main(arguments: list[str] | None = None) -> None:
    args = command_line().parse_args(arguments)
    find_preset(args.model)
    if args.dtype and (args.compile or args.baseline or {*args.tasks} - {"forward", "evaluate"}):
        raise UserError("--dtype times the tasks forward and evaluate as they are: --tasks names them, other flags go")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.workers = default_workers() if args.workers is None else args.workers
    command = " ".join(["python -m experiments.speed", *(sys.argv[1:] if arguments is None else arguments)])
    head = f"\n### {time.strftime('%Y-%m-%d')}, `{command}`\n\ntorch {torch.__version__}, revision {revision() or 'unknown'}\n"
    with open(args.out, "a") as file:
        for line in itertools.chain([head], memory_table() if args.memory else measured(args)):
            print(line, flush=True)
            print(line, file=file, flush=True)


if __name__ == "__main__":
    with exit_on_user_error("speed"):
        main()
