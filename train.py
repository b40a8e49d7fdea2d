"""Train RS2-SAM 2: one loop for a laptop's CPU and for a GPU.

    python train.py                                 tiny model, generated scenes, from scratch: minutes on two cores
    python train.py --data RRSIS-D --gpus 1         SAM 2.1-L + CLIP ViT-L-14 on real data under data/RRSIS-D
    python train.py --data RRSIS-D --gpus 8         the same computation on 8 cards; on several machines, with torchrun
    python train.py --resume runs/scenes-tiny-1     go on with an interrupted run
    python train.py --data DIR --init best.pt       fine-tune a checkpoint, of this program or the published one

A run's folder holds best.pt (averaged weights, the best validation mIoU + oIoU), last.pt (all that --resume needs),
previous.pt (the last.pt before), log.jsonl (a line an epoch) and panels.png; ./best.pt is a link to the newest run's best.
It may be killed at any moment. SIGTERM and Ctrl-C finish the step, save and exit with 143 and 130.
"""

import argparse
import contextlib
import math
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from checkpoints import UserError, build, load_checkpoint, read_checkpoint, read_run, rebuild
from data import Collate, Timed, open_dataset
from evaluate import autocast, best_median_worst, compute_dtype, print_report, report, score, to_device, write_panels
from layouts import UserError
from losses import total_loss
from model import RS2SAM2, compiled, count_parameters
from processes import Shares, Stream, gather, launch, launched, process_group, rank, rank_0_first, share, world_size
from recipe import RECIPES, Average, Recipe, command_line, optimizer_for, set_rates
from runs import RunFolder, UserError, UserError, default_workers, free_run, pick_device, revision
from scenes import make_scenes
from stopping import Signals, Stopped, leave_signals, one_sentence
from weights import UserError

SAVE_EVERY = 600  # seconds between two last.pt within an epoch
EPOCH = {"steps": 0, "samples": 0, "seconds": 0.0, "waited": 0.0, "sums": {}}  # what is added up over an epoch, at its start
ERRORS = (UserError, UserError, UserError, UserError)  # each is one sentence for the user


class Trainer:
    """The state of a run: model, optimiser, averaged weights, position in the stream of samples."""

    def __init__(self, args, recipe: Recipe, model: RS2SAM2, device, train_set, val_set, signals: Signals | None = None):
        self.args, self.recipe, self.device = args, recipe, device
        self.folder, self.signals = RunFolder(args.out), signals or Signals()
        self.train_set, self.val_set = train_set, val_set
        for dataset in (train_set, val_set):
            dataset.image_size, dataset.encoder_size = model.preset.image_size, model.union_encoder.image_size
        self.model = model.to(device)
        self.model.image_encoder.checkpoint_activations = args.checkpoint_activations
        if device.type == "cuda":
            self.model.cast_frozen(compute_dtype())
        self.forward = self.synced = compiled(self.model) if device.type == "cuda" else self.model
        if world_size() > 1:  # `synced` averages gradients over the processes; scoring needs none of it
            self.synced = DistributedDataParallel(self.forward, gradient_as_bucket_view=True)  # no second copy of gradients
        self.optimizer = optimizer_for(model, recipe, args.lr)
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        # float16 has no range for gradients; bfloat16 and float32 need no scaling
        fp16 = device.type == "cuda" and compute_dtype() == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.average = Average(model, recipe.ema)
        self.samples, self.best, self.saved_at, self.revision = 0, -1.0, time.time(), revision()
        self.workers = default_workers() if args.workers is None else args.workers
        self.stop = False  # what all processes know of a signal: one of them may have noted it a moment too late for a step
        self.log, self.epoch = [], dict(EPOCH)  # the lines of log.jsonl; what is added up for the next
        shortest, longest = recipe.epoch_range
        self.epoch_samples = int(max(shortest, min(longest, len(train_set))))
        if args.epochs is None:
            args.epochs = -(-recipe.samples // self.epoch_samples) or recipe.epochs
        self.total_samples = args.epochs * self.epoch_samples

    def checkpoint(self, metrics: dict) -> dict:
        """What evaluate.py needs: nothing but this."""
        tokenizer = getattr(self.model.union_encoder.tokenizer, "model", None)
        tokenizer = tokenizer and torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8)
        return {
            "preset": asdict(self.model.preset), "model": self.model.state_dict(), "tokenizer": tokenizer,
            "model_name": self.args.model, "data": self.args.data, "metrics": metrics,
            "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items()},
            "epoch": self.samples // self.epoch_samples, "revision": self.revision, "torch": str(torch.__version__),
        }  # fmt: skip

    def save_last(self, metrics: dict) -> None:
        if rank():
            return
        state = {
            "average": self.average.mean, "average_steps": self.average.steps, "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(), "samples": self.samples, "best": self.best, "log": self.log,
            "running": self.epoch,
        }  # fmt: skip
        self.folder.save(self.checkpoint(metrics) | state, self.log)
        self.saved_at = time.time()

    def resume(self, state: dict) -> None:
        peaks = [group["peak"] for group in self.optimizer.param_groups]  # --lr may have been given anew
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError:  # other groups
            raise UserError(
                f"{self.folder.last} was trained in another way, by revision {state['revision']} of this program: go on with "
                f"that one, or start anew from its weights by --init {self.folder.last}"
            ) from None
        for group, peak in zip(self.optimizer.param_groups, peaks):
            group["peak"] = peak
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        for k, v in state["average"].items():
            self.average.mean[k].copy_(v)
        self.average.steps, self.samples, self.best = state["average_steps"], state["samples"], state["best"]
        self.log, self.epoch = state["log"], state["running"]

    def step(self, batch: dict, count: int) -> dict[str, float]:
        """One optimiser step -> the loss and its terms. `batch` is this process's share of `count` samples."""
        progress, epoch = self.samples / self.total_samples, self.samples // self.epoch_samples
        set_rates(self.optimizer, self.recipe.schedule, progress, epoch)
        # What is random in the model is fixed by the step, so it is the same wherever the run was interrupted.
        torch.manual_seed(int(np.random.SeedSequence([self.args.seed, self.samples, rank()]).generate_state(1)[0]))
        size, sums = len(batch["id"]), {}
        parts = min(self.args.accumulate, size)
        for part in range(parts):
            mine = share(size, part, parts)
            for key, term in self.backward(batch, mine, count, last=part == parts - 1).items():
                sums[key] = sums.get(key, 0.0) + term
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.recipe.clip)
        asked = torch.full_like(norm, self.signals.asked)
        values = torch.stack([*sums.values(), norm / world_size(), asked])
        if world_size() > 1:
            dist.all_reduce(values)  # all processes see the same, so they stop together
        *values, norm, asked = values.tolist()  # the step's one wait for the device
        self.check_finite(values[0], norm, batch["id"])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.average.update()
        self.samples += count
        if asked:  # of any of them
            self.stop, self.signals.asked = True, self.signals.asked or signal.SIGTERM
        return dict(zip(sums, values))

    def backward(self, batch: dict, mine: range, count: int, last: bool) -> dict[str, torch.Tensor]:
        """Add the gradients of a part of the batch, weighted by its share of the step's samples -> its part of the terms."""
        part = to_device({key: value[mine.start : mine.stop] for key, value in batch.items()}, self.device)
        taken = len(share(count, rank(), world_size()))
        weight = len(mine) / count if taken else 0.0  # without a share of its own it takes part with another's sample
        alone = world_size() > 1 and not last  # processes meet once a step
        with self.synced.no_sync() if alone else contextlib.nullcontext():
            images = self.model.normalise(part["image"], part["encoder_image"])
            with autocast(self.device):
                output = self.synced(*images, part["ids"], part["lengths"])
            recipe = self.recipe
            terms = total_loss(output, part["target"], recipe.ce, recipe.dice, recipe.boundary, recipe.pseudo,
                               recipe.soft_edges)  # fmt: skip
            # the processes' gradients are averaged, so each gives its own times their number
            self.scaler.scale(terms["loss"] * (weight * world_size())).backward()
        return {key: weight * term.detach() for key, term in terms.items()}

    def check_finite(self, loss: float, norm: float, ids: list[str]) -> None:
        """Stop before weights are spoilt. An infinite gradient is float16's everyday business, which the scaler minds by
        lowering its scale; below a scale of 1 it has another cause."""
        if math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled() and self.scaler.get_scale() >= 1):
            return
        last = self.args.out / "last.pt"
        ids = dict.fromkeys(i for part in gather(ids) for i in part)
        raise FloatingPointError(
            f"the loss became {loss} and its gradient {norm} at sample {self.samples} (batch {', '.join(ids)}): look at "
            f"these samples or try a lower --lr{f'; {last} holds an earlier state' if last.exists() else ''}"
        )

    def run_epoch(self) -> dict[str, float]:
        """Train to the end of the current epoch -> mean loss and terms, samples per second."""
        now = self.epoch  # it may have begun before an interruption, and may have ended
        epoch = (self.samples - bool(now["steps"])) // self.epoch_samples
        stop = (epoch + 1) * self.epoch_samples
        stream = Stream(len(self.train_set), self.args.seed, self.samples, stop)
        shares = Shares(stream, self.args.batch_size, rank(), world_size())
        loader = Timed(DataLoader(
            self.train_set, batch_sampler=shares, num_workers=self.workers,
            collate_fn=Collate(self.model.union_encoder.tokenizer), pin_memory=self.device.type == "cuda",
            worker_init_fn=leave_signals,
        ))  # fmt: skip
        start, before, waited = time.perf_counter(), now["seconds"], now["waited"]
        self.model.train()
        title, hidden = f"epoch {epoch + 1}/{self.args.epochs}", rank() > 0 or None  # None: where there is no terminal
        with tqdm(total=len(stream), desc=title, unit="img", disable=hidden) as bar:
            for batch in loader:
                count = min(self.args.batch_size, stop - self.samples)
                terms = self.step(batch, count)
                seconds = time.perf_counter() - start
                now |= {"steps": now["steps"] + 1, "samples": now["samples"] + count, "seconds": before + seconds,
                        "waited": waited + loader.seconds}  # fmt: skip
                now["sums"] = {k: now["sums"].get(k, 0.0) + v for k, v in terms.items()}
                bar.update(count)
                rate = self.optimizer.param_groups[0]["lr"]
                bar.set_postfix(loss=f"{terms['loss']:.3f}", lr=f"{rate:.1e}", data=f"{loader.seconds / seconds:.0%}")
                if self.stop:
                    self.save_last({})
                    self.meet()  # does not return
                if time.time() - self.saved_at > SAVE_EVERY:
                    self.save_last({})
        waited = max(gather(now["waited"]))  # all wait for the slowest
        rates = {"images/s": now["samples"] / now["seconds"], "data_wait": waited / now["seconds"]}
        return {k: v / now["steps"] for k, v in now["sums"].items()} | rates

    def validate(self) -> dict:
        """Score the averaged weights on the validation set; keep them if they are the best so far."""
        self.average.swap()
        rows = score(self.model, self.val_set, batch_size=min(8, self.args.batch_size), workers=self.workers,
                     forward=self.forward)  # fmt: skip
        result = report(rows, "ours")
        quality = result["scores"]["mIoU"] + result["scores"]["oIoU"]
        if quality > self.best:
            self.best = quality
            if not rank():
                self.folder.save_best(self.checkpoint(result["scores"]))
        self.average.swap()
        return result["scores"]

    def meet(self) -> None:
        """Rank 0 has written its files. From here on a signal ends the program on the spot; one that any of the processes
        has noted ends all of them now."""
        self.signals.asked = max(gather(self.signals.asked))
        self.signals.impatient()

    def run(self) -> None:
        """Train to the end, then score and picture the best weights."""
        if not self.folder.sound:
            self.save_last({})  # whatever comes now, there is a run to go on with; and a full disk shows early
        elif not rank():
            self.folder.write_log(self.log)  # the program may have ended between the two
        while self.samples < self.total_samples or self.epoch["steps"]:
            self.signals.patient = True
            line = self.run_epoch()
            self.save_last({})  # validation may take long, and an interruption need not wait for its end
            self.meet()
            scores = self.validate()
            epoch = self.samples // self.epoch_samples
            self.log.append({"epoch": epoch, "samples": self.samples} | line | {"val": scores})
            self.epoch = dict(EPOCH)
            self.save_last(scores)
            print(f"epoch {epoch}: loss {line['loss']:.3f}, {line['images/s']:.1f} images/s, "
                  f"val mIoU {scores['mIoU']:.2f}, oIoU {scores['oIoU']:.2f}", flush=True)  # fmt: skip
        gather(None)  # rank 0 has written best.pt
        best, _ = load_checkpoint(self.args.out / "best.pt", self.device)
        rows = score(best, self.val_set, batch_size=min(8, self.args.batch_size), workers=self.workers)
        if rank():
            return
        print(f"\nbest weights on the validation set of {self.args.data}, per cent:")
        print_report(report(rows, "ours"))
        write_panels(self.args.out / "panels.png", best, self.val_set, best_median_worst(rows, 12))
        print(f"\nwrote {self.args.out / 'best.pt'} and {self.args.out / 'panels.png'}; score it with "
              f"`python evaluate.py --ckpt {self.args.out / 'best.pt'}`")  # fmt: skip


def parse_args() -> tuple[argparse.Namespace, dict | None]:
    """-> (the command line, with what is left to choose filled in; the checkpoint to go on from or None)"""
    parser = command_line(__doc__)
    args = parser.parse_args()
    checkpoint = None
    if args.resume:
        checkpoint, last = read_run(args.resume)
        again = {"resume", "epochs", "batch_size", "lr", "data", "skip_missing"}
        again |= {"accumulate", "checkpoint_activations", "gpus", "workers"}  # how a run computes, not what
        parser.set_defaults(**{k: v for k, v in checkpoint["args"].items() if k != "resume"})
        before, args = parser.parse_args([]), parser.parse_args()
        if fixed := [k for k, v in vars(args).items() if k not in again and v != getattr(before, k)]:
            raise UserError(
                f"--{fixed[0].replace('_', '-')} can't be changed by --resume: leave it out, or start a new run"
            )
        args.out, args.resume = last.parent, last
    elif args.init:
        fixed = ("model", "from_scratch", "sam2", "encoder", "encoder_weights", "encoder_size", "without")
        if given := [key for key in fixed if getattr(args, key)]:
            raise UserError(f"--{given[0].replace('_', '-')} and --init exclude each other: the checkpoint fixes the network")
        args.model = read_checkpoint(args.init)["model_name"]
    args.model = args.model or ("tiny" if Path(args.data).name == "scenes" else "large")
    recipe = RECIPES[args.model]
    args.batch_size = args.batch_size or recipe.batch_size
    args.lr = args.lr or recipe.lr
    if args.batch_size < (parts := world_size() * args.accumulate):
        raise UserError(
            f"--batch-size {args.batch_size} can't be shared by {world_size()} processes with --accumulate "
            f"{args.accumulate}: it is the whole step's, so make it {parts} or more"
        )
    return args, checkpoint


def processes_for(args: argparse.Namespace) -> int:
    """How many processes the command line asks for: of cards, or without any, as many as the recipe says for a CPU."""
    if args.gpus is not None or torch.cuda.is_available():
        return args.gpus or 1
    return min(RECIPES[args.model].cpu_processes, os.cpu_count() or 1, args.batch_size // args.accumulate)


def new_model(args: argparse.Namespace) -> RS2SAM2:
    if args.init:
        return load_checkpoint(args.init, image_size=args.image_size)[0]
    return build(
        args.model, args.image_size, args.from_scratch, sam2_file=args.sam2, encoder=args.encoder,
        encoder_weights=args.encoder_weights, encoder_size=args.encoder_size, without=args.without,
    )  # fmt: skip


def open_sets(args: argparse.Namespace, augment: str | None):
    """The training and the validation set."""
    common = {"seed": args.seed, "skip_missing": args.skip_missing}
    train_set = open_dataset(args.data, "train", one_phrase=True, augment=augment, **common)
    return train_set, open_dataset(args.data, "val", **common)


def prepare(args: argparse.Namespace, checkpoint: dict | None) -> tuple[RS2SAM2, tuple]:
    """-> (the model, the training and the validation set), after what the command line may have wrong is checked."""
    if not checkpoint:
        args.out = args.out or free_run(args.data, args.model)
        if RunFolder(args.out).taken():
            raise UserError(f"{args.out} holds another run: choose a new --out, or go on with it by --resume {args.out}")
    augment, fresh = RECIPES[args.model].augment, args.data == "scenes" and not Path("data/scenes").exists()
    sets = None if fresh else open_sets(args, augment)
    torch.manual_seed(args.seed)
    model = rebuild(checkpoint, path=args.resume) if checkpoint else new_model(args)
    if fresh:
        print("generating scenes under data/scenes (once, a minute or two)", flush=True)
        try:
            make_scenes(Path("data/scenes"))
        except OSError as error:
            raise UserError(f"data/scenes can't be written ({error.strerror or error}): make room there") from None
        sets = open_sets(args, augment)
    return model, sets


def main(signals: Signals | None = None) -> None:
    with process_group():
        with rank_0_first():
            args, checkpoint = parse_args()
            device = pick_device(args.gpus)
            if not launched() and (processes := processes_for(args)) > 1:
                return launch(processes, sys.argv)
            model, sets = prepare(args, checkpoint)
        args.out = gather(args.out)[0]
        try:
            without = model.preset.without
            trainer = Trainer(args, RECIPES[args.model].without(without), model, device, *sets, signals)
            if not rank():
                trainer.folder.make()
            if checkpoint:
                with rank_0_first():
                    trainer.resume(checkpoint)
                trainer.folder.sound = args.resume == trainer.folder.last
                checkpoint = None  # what it holds of the file would keep that on the disk when it is replaced
            counts, where = count_parameters(model), f"{world_size()} x {device.type}" if world_size() > 1 else device
            variant = f"{args.model} without {', '.join(without)}" if without else args.model
            print(f"{variant} on {args.data} ({len(sets[0]):,} training targets, {len(sets[1]):,} validation phrases), "
                  f"{where}, run {args.out}\nparameters: {counts['total']:,} total, {counts['trained']:,} trained, "
                  f"{counts['frozen']:,} frozen", flush=True)  # fmt: skip
            trainer.run()
        except Stopped:
            if args.out.is_dir() and RunFolder(args.out).taken():
                print(f"\nstopped; go on with: python train.py --resume {args.out}", flush=True)
            raise
        except torch.OutOfMemoryError:
            more = args.accumulate * 2
            smaller = f"--accumulate {more}, " if args.batch_size >= world_size() * more else ""
            again = "" if args.checkpoint_activations else "--checkpoint-activations, "
            raise UserError(
                f"out of memory with --batch-size {args.batch_size} at {model.preset.image_size} pixels: try {smaller}"
                f"{again}or a smaller --image-size"
            ) from None
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UserError(
                f"torch.compile failed ({' '.join(str(error).split())[:200]}): install what it misses, often a C compiler, or "
                f"train without it, slower, by TORCH_COMPILE_DISABLE=1 in the environment"
            ) from error


if __name__ == "__main__":
    with one_sentence("train.py", ERRORS, (FloatingPointError, UserError)):
        signals = Signals()
        signals.watch()
        main(signals)
