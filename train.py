"""Train RS2-SAM 2: one loop for a laptop's CPU, a card and several.

    python train.py                                 tiny model, generated scenes, from scratch: minutes on two cores
    python train.py --data RRSIS-D --gpus 1         SAM 2.1-L + CLIP ViT-L-14 on real data under data/RRSIS-D
    python train.py --data RRSIS-D --gpus 8         the same computation on 8 cards; on several machines, with torchrun
    python train.py --resume runs/scenes-tiny-1     go on with an interrupted run
    python train.py --data DIR --init best.pt       fine-tune a checkpoint, of this program or the published one

A run's folder holds best.pt (averaged weights, the best validation mIoU + oIoU), last.pt (all that --resume needs),
log.jsonl (the recipe, a line an epoch) and panels.png; ./best.pt is a link to the newest run's best. A run may be killed at any
moment. SIGTERM and Ctrl-C finish the step, save, print the command that goes on and exit with 143 and 130.
"""

import argparse
import math
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

from runtime.arguments import answer_early, at_least, parse_again


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # fmt: off
    add("--data", default="scenes", help="data set: scenes (generated, the default), RRSIS-D, RefSegRS, RISBench, or a path")
    add("--model", metavar="PRESET", help="tiny, small, base, large or paper (default: tiny on generated scenes, else large)")
    add("--set", nargs="+", default=[], action="extend", metavar="NAME=VALUE",
        help="change fields of the preset or its recipe (presets.py), as lr=1e-4, image_size=512 or losses.dice=0.5")
    add("--out", type=Path, metavar="DIR", help="folder of the run (default: runs/<data>-<model>-<number>)")
    add("--epochs", type=at_least(int, 1), help="default: the preset's recipe")
    add("--batch-size", type=at_least(int, 1),
        help="samples of an optimiser step, over all cards and --accumulate parts (default: the preset's recipe)")
    add("--accumulate", type=at_least(int, 1), default=1, metavar="N",
        help="compute each step in N parts, which needs less memory and gives the same result (default: 1)")
    add("--checkpoint-activations", action=argparse.BooleanOptionalAction, default=False,
        help="compute activations of the image encoder again in the backward pass: less memory, slower")
    add("--seed", type=at_least(int, 0), default=0, help="of initial weights, data order and augmentation (default: 0)")
    add("--gpus", type=at_least(int, 0), metavar="N",
        help="cards of this machine, a process on each; 0: the CPU (default: 1 if there is a CUDA card, else 0); "
        "under torchrun, which starts the processes itself, only 0 makes a difference")
    add("--workers", type=at_least(int, 0), help="processes that load data, for each card (default: by the cores)")
    add("--resume", type=Path, metavar="RUN",
        help="go on with the run in this folder, with its own flags; epochs, batch size, --set lr and cards may be new")
    add("--init", metavar="CKPT", help="fine-tune from a checkpoint: of train.py, or the published one")
    add("--skip-missing", action="store_true", help="leave out samples whose image or mask file is missing")
    add("--from-scratch", action="store_true", help="start from random weights, all trained (tiny does without --sam2)")
    add("--sam2", metavar="FILE",
        help="SAM 2 weights of the preset's size, whose image encoder stays frozen (default: downloaded; tiny trains its own)")
    add("--encoder-weights", metavar="TAG|FILE|TAG=FILE",
        help="the union encoder's: a pretrained tag of open_clip, a file, or TAG=FILE, the file of a tag; BEiT-3's file")
    # fmt: on
    return parser


if __name__ == "__main__":
    answer_early(command_line())

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from data import Collate, TrainingOrder, open_dataset
from evaluate import best_median_worst, print_results, results_by_group, score, write_panels
from losses import total_loss
from model import RS2SAM2, compile_blocks
from presets import Preset, Recipe, learning_rate
from runtime import devices, processes
from runtime.averaging import AveragedWeights
from runtime.devices import autocast, compute_dtype, default_workers, pick_device, to_device
from runtime.errors import UserError, exit_on_user_error
from runtime.optimizers import optimizers_for, parameter_groups
from runtime.processes import gather, joined_gradients, rank, rank_0_first, share_weights, world_size
from runtime.progress import Progress
from runtime.recording import Recorded
from runtime.run_folder import RunFolder, free_run, revision
from runtime.signals import StopSignal, ignore_signals
from synthetic_scenes.scenes import ensure_scenes
from weights import checkpoints
from weights.provenance import started_from, taught
from weights.recipes import first_line, opening, resolve

SAVE_EVERY = 600  # seconds between two last.pt within an epoch


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, dict | None]:
    """-> (the command line, on --resume with the run's own flags; the checkpoint). `set` holds all that changes the recipe."""
    parser, checkpoint = command_line(), None
    args = parser.parse_args(arguments)
    if args.resume:
        checkpoint, last = checkpoints.read_run(args.resume)
        in_recipe = {"resume", "set", "epochs", "batch_size"}
        free = in_recipe | {"data", "skip_missing", "accumulate", "checkpoint_activations", "gpus", "workers"}
        before = {k: v for k, v in checkpoint["args"].items() if k not in in_recipe}
        args = parse_again(parser, arguments, before, free, "--resume")
        args.out, args.resume = last.parent, last
    elif args.init:
        if given := [k for k in ("model", "from_scratch", "sam2", "encoder_weights") if getattr(args, k)]:
            raise UserError(f"--{given[0].replace('_', '-')} and --init exclude each other: the checkpoint fixes the network")
        checkpoint = checkpoints.read_checkpoint(args.init)
        args.model = checkpoint["model_name"]
    args.set = [*args.set, *(f"{k}={v}" for k in ("epochs", "batch_size") if (v := getattr(args, k)))]
    args.model = args.model or ("tiny" if Path(args.data).name == "scenes" else "large")
    return args, checkpoint


def on_device(model: RS2SAM2, device: torch.device) -> RS2SAM2:
    """The model moved there; on a card its frozen weights are cast and a large one's blocks compiled: `tiny` is trained in less
    time than that takes."""
    if device.type == "cuda":
        model.to(device).cast_frozen(compute_dtype())
        if devices.is_large(model):
            devices.compile_here(compile_blocks, model)
    return model.to(device)


class Run:
    """The state of a run: model, optimiser, averaged weights, and how far it has come in the stream of samples."""

    def __init__(self, args, recipe: Recipe, model: RS2SAM2, device, train_set, val_set, left_out=()):
        self.args, self.recipe, self.device, self.left_out, self.init = args, recipe, device, list(left_out), None
        self.train_set, self.val_set, self.folder = train_set, val_set, RunFolder(args.out)
        for dataset in (train_set, val_set):
            dataset.image_size, dataset.encoder_size = model.preset.image_size, model.union_encoder.image_size
        model.text_weight.requires_grad_(any("boundary" in term for term in recipe.losses))  # else it has no gradient
        self.model = on_device(model, device)
        if world_size() > 1:
            share_weights(model)
        self.model.image_encoder.checkpoint_activations = args.checkpoint_activations
        self.optimizers = optimizers_for(model, recipe)
        self.trained = [p for group in self.groups() for p in group["params"]]
        self.gradients = joined_gradients(self.trained) if world_size() > 1 else None
        fp16 = device.type == "cuda" and compute_dtype() == torch.float16  # whose range is too small for gradients
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.backward = Recorded(partial(backward, self), self.trained, enabled=device.type == "cuda")
        self.average = AveragedWeights(model, recipe.ema)
        self.samples, self.epoch, self.best, self.best_rows, self.log = 0, 0, -1.0, [], []  # epoch: how many are complete
        self.running, self.revision = {}, revision()  # running: sums over the epoch under way
        self.began = self.saved_at = time.time()
        self.workers, self.taught = default_workers() if args.workers is None else args.workers, {}
        self.epoch_samples = max(recipe.batch_size, int(np.clip(len(train_set), *recipe.epoch_range)))  # a step at least
        self.epochs = -(-recipe.samples // self.epoch_samples) or recipe.epochs

    def groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def checkpoint(self, metrics: dict) -> dict:
        """What best.pt holds: all that evaluate.py and predict.py need, as plain values and tensors."""
        return checkpoints.model_entries(self.model) | {
            "recipe": asdict(self.recipe), "left_out": self.left_out, "model_name": self.args.model, "data": self.args.data,
            "run": str(self.args.out), "init": self.init, "taught": self.taught,
            "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items()}, "metrics": metrics,
            "epoch": self.epoch, "revision": self.revision, "torch": str(torch.__version__),
        }  # fmt: skip

    def save(self, metrics: dict) -> None:
        """Write last.pt, on rank 0."""
        if rank():
            return
        state = {
            "average": self.average.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers],
            "scaler": self.scaler.state_dict(), "seconds": time.time() - self.began,
            "samples": self.samples, "best": self.best, "log": self.log, "running": self.running,
        }  # fmt: skip
        self.folder.save(self.checkpoint(metrics) | state, self.log)
        self.saved_at = time.time()

    def restore(self, state: dict) -> None:
        """Take over the state of a last.pt whose weights the model has already. Learning rates are the recipe's."""
        for optimizer, old in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(old)
        for group, new in zip(self.groups(), parameter_groups(self.model, self.recipe)):
            group["peak"] = new["peak"]
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.average.load_state_dict(state["average"])
        self.samples, self.epoch, self.best = state["samples"], state["epoch"], state["best"]
        self.init, self.taught = state.get("init"), state.get("taught", {})
        self.log, self.running, self.began = state["log"], state["running"], self.began - state.get("seconds", 0)


def train(run: Run, stop: StopSignal) -> None:
    """Train to the end of the last epoch, with a validation and a last.pt after each."""
    run.save({})  # whatever comes now, there is a run to go on with; and a full disk shows early
    while run.epoch < run.epochs:
        with stop.deferred():
            line = train_epoch(run, stop)
            run.save({})  # validation may take long, and an interruption need not wait for its end
            stop.number = max(gather(stop.number))
        run.epoch += 1
        scores = validate(run)
        so_far = {"epoch": run.epoch, "samples": run.samples, "seconds": time.time() - run.began, "lr": run.groups()[0]["lr"]}
        run.log.append(so_far | line | {"val": scores})
        run.running = {}
        run.save(scores)
        print(f"epoch {run.epoch}: loss {line['loss']:.3f}, {line['images/s']:.1f} images/s, "
              f"val mIoU {scores['mIoU']:.2f}, oIoU {scores['oIoU']:.2f}", flush=True)  # fmt: skip


def train_epoch(run: Run, stop: StopSignal) -> dict[str, float]:
    """Train to the end of the current epoch, which may have begun before an interruption -> mean loss and terms, images per
    second, share of the time spent waiting for data. The last batch is a whole one and may reach into the next epoch."""
    batch_size, end = run.recipe.batch_size, (run.epoch + 1) * run.epoch_samples
    order = TrainingOrder(len(run.train_set), run.args.seed, run.samples, end, batch_size, rank(), world_size())
    loader = DataLoader(
        run.train_set, batch_sampler=order, num_workers=run.workers, worker_init_fn=ignore_signals,
        collate_fn=Collate(run.model.union_encoder.tokenizer), pin_memory=run.device.type == "cuda",
    )  # fmt: skip
    total = run.running = run.running or {"steps": 0, "samples": 0, "seconds": 0.0, "waited": 0.0, "terms": {}}
    run.model.train()
    with Progress(None, f"epoch {run.epoch + 1}/{run.epochs}", len(order) * batch_size, unit="img", disable=rank() > 0) as bar:
        began = time.perf_counter()
        for batch in loader:
            arrived = time.perf_counter()
            terms, stopping = train_step(run, batch, stop)
            ended = time.perf_counter()
            total["steps"], total["samples"] = total["steps"] + 1, total["samples"] + batch_size
            total["waited"], total["seconds"] = total["waited"] + arrived - began, total["seconds"] + ended - began
            total["terms"] = {k: total["terms"].get(k, 0.0) + v for k, v in terms.items()}
            began = ended
            bar.update(batch_size)
            bar.set_postfix(loss=f"{terms['loss']:.3f}", data=f"{total['waited'] / total['seconds']:.0%}")
            if stopping or time.time() - run.saved_at > SAVE_EVERY:
                run.save({})
            if stopping:
                stop.number = max(gather(stop.number))  # rank 0 has written last.pt
                stop.exit()
    run.backward.forget()  # validation needs the room, and exchanges weights
    waited = max(gather(total["waited"]))  # all wait for the slowest
    rates = {"images/s": total["samples"] / total["seconds"], "data_wait": waited / total["seconds"]}
    return {k: v / total["steps"] for k, v in total["terms"].items()} | rates


def train_step(run: Run, batch: dict, stop: StopSignal) -> tuple[dict[str, float], bool]:
    """One optimiser step on this process's part of a batch -> (the loss and its terms; whether a signal asks to stop)."""
    progress = run.samples / (run.epochs * run.epoch_samples)
    for group in run.groups():
        group["lr"] = group["peak"] * learning_rate(run.recipe, progress, run.epoch)
    # What is random in the model is fixed by the step, so it is the same wherever the run was interrupted.
    torch.manual_seed(int(np.random.SeedSequence([run.args.seed, run.samples, rank()]).generate_state(1)[0]))
    sums, parts = {}, run.args.accumulate
    size = len(batch["id"]) // parts
    for n in range(parts):
        part = to_device({key: value[n * size : (n + 1) * size] for key, value in batch.items()}, run.device)
        with devices.training_attention():
            terms = run.backward(*(part[key] for key in ("image", "encoder_image", "ids", "lengths", "target")))
        for key, term in terms.items():
            sums[key] = sums.get(key, 0.0) + term
    if run.gradients is not None:
        dist.all_reduce(run.gradients.div_(world_size()))
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.trained, run.recipe.clip)
    values = torch.stack([*sums.values(), norm, torch.full_like(norm, stop.number)]) / world_size()
    if world_size() > 1:
        dist.all_reduce(values)  # all processes see the same, so they stop together
    minded = run.scaler.is_enabled() and run.scaler.get_scale() >= 1  # float16's infinite gradients, by a lower scale
    for optimizer in run.optimizers:
        run.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=not run.backward.graphs and run.gradients is None)
    run.scaler.update()
    run.average.update()
    *values, norm, asked = values.tolist()  # the step's one wait for the device, which has all of the step to do by now
    check_finite(run, values[0], 0.0 if minded else norm, batch["id"])
    run.samples += run.recipe.batch_size
    return dict(zip(sums, values)), bool(asked)


def backward(run: Run, image: Tensor, encoder_image: Tensor, ids: Tensor, lengths: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Add the gradients of one of --accumulate's parts -> its share of the loss and the terms. On a card it is recorded and
    replayed."""
    with autocast(run.device):
        output = run.model(*run.model.normalise(image, encoder_image), ids, lengths)
    terms = total_loss(output, target, run.recipe.losses)
    run.scaler.scale(terms["loss"] / run.args.accumulate).backward()
    return {key: term.detach() / run.args.accumulate for key, term in terms.items()}


def check_finite(run: Run, loss: float, norm: float, ids: list[str]) -> None:
    """Stop before spoilt weights are saved."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    ids = dict.fromkeys(i for part in gather(ids) for i in part)
    with rank_0_first():  # whose end is the end of all
        raise UserError(
            f"the loss became {loss} and its gradient {norm} at sample {run.samples} (batch {', '.join(ids)}): look at these "
            f"samples or try a lower --set lr; {run.folder.last} holds an earlier state", exit_code=1,
        )  # fmt: skip


def score_validation(run: Run) -> list[dict]:
    size = min(8, run.recipe.batch_size // (world_size() * run.args.accumulate))  # needs no more memory than training
    with torch.compiler.set_stance("force_eager"):  # graphs without gradients would take minutes to compile
        return score(run.model, run.val_set, batch_size=size, workers=run.workers)


def validate(run: Run) -> dict:
    """Score the averaged weights on the validation set; keep them if they are the best so far."""
    run.average.swap()
    scores = results_by_group(rows := score_validation(run), "ours")["scores"]
    if scores["mIoU"] + scores["oIoU"] > run.best:
        run.best, run.best_rows = scores["mIoU"] + scores["oIoU"], rows
        if not rank():
            run.folder.save_best(run.checkpoint(scores))
    run.average.swap()
    return scores


def finish(run: Run) -> None:
    """Print the best weights' scores and picture what they find."""
    gather(None)  # rank 0 has written best.pt
    run.model.load_state_dict(checkpoints.read_checkpoint(best := run.folder.best)["model"])
    rows = run.best_rows or score_validation(run)  # the second where they were scored before an interruption
    if rank():
        return
    print(f"\nbest weights on the validation set of {run.args.data}, per cent:")
    print_results(results_by_group(rows, "ours"))
    with torch.compiler.set_stance("force_eager"):  # as in scoring
        write_panels(run.args.out / "panels.png", run.model, run.val_set, best_median_worst(rows, 12))
    print(f"\nwrote {best} and {run.args.out / 'panels.png'}; score it with `python evaluate.py --ckpt {best}`")


def prepare(args: argparse.Namespace, preset: Preset, recipe: Recipe, checkpoint: dict | None, edit):
    """-> (the model with its first weights, the training set, the validation set)"""
    ways = {"from_scratch": args.from_scratch, "sam2_file": args.sam2, "encoder_weights": args.encoder_weights}
    if args.data == "scenes":
        if not checkpoint:
            checkpoints.find_weights(args.model, preset, **ways)  # refused, or downloaded, before scenes are drawn
        ensure_scenes(Path("data/scenes"))
    common = {"seed": args.seed, "skip_missing": args.skip_missing}
    train_set = open_dataset(args.data, "train", one_phrase=True, augment=recipe.augment, **common)
    val_set = open_dataset(args.data, "val", **common)
    torch.manual_seed(args.seed)
    if checkpoint:
        return checkpoints.rebuild(checkpoint, edit, preset.image_size, args.resume or args.init), train_set, val_set
    model = checkpoints.build_model(args.model, preset, **ways)
    if edit:
        edit(model)
    return model, train_set, val_set


def main(arguments: list[str] | None = None, edit=None, left_out: tuple[str, ...] = ()) -> None:
    """Train as the command line says. An ablation gives `edit`, which changes the built model, and what that leaves out."""
    stop = StopSignal()
    stop.watch()
    with processes.process_group(), exit_on_user_error("train.py"), devices.card_failures():
        with rank_0_first():
            args, checkpoint = parse(arguments)
            preset, recipe = resolve(args.model, args.set, checkpoint, resume=bool(args.resume))
            device = pick_device(args.gpus)
            number = processes.processes_for(args.gpus, recipe.cpu_processes, recipe.batch_size, args.accumulate)
            if number > 1 and not processes.launched():
                return processes.launch(number)
            if args.out and not args.resume and RunFolder(args.out).taken():
                raise UserError(f"{args.out} holds another run: choose a new --out, or go on with it by --resume {args.out}")
            model, train_set, val_set = prepare(args, preset, recipe, checkpoint, edit)
            args.out = args.out or (None if rank() else free_run(args.data, args.model))
        args.out = gather(args.out)[0]
        run = Run(args, recipe, model, device, train_set, val_set, left_out)
        if not rank():
            run.folder.make()
        print(opening(run, checkpoint), flush=True)
        if args.resume:
            run.restore(checkpoint)
            run.log += [{"resumed at": run.samples, "set": args.set}] if args.set else []
            args.set = [*checkpoint["args"]["set"], *args.set]
        else:
            run.init, run.taught = args.init and started_from(args.init, checkpoint), taught(train_set, checkpoint)
            run.log = [first_line(run.checkpoint({}))]
        del checkpoint
        stop.farewell = f"stopped; go on with: python train.py --resume {args.out}"
        with devices.card_failures(devices.ways_to_fit(recipe.batch_size // world_size(), args)):
            train(run, stop)
        with devices.card_failures(f"the run is trained, score it by `python evaluate.py --ckpt {run.folder.best}`"):
            finish(run)


if __name__ == "__main__":
    main()
