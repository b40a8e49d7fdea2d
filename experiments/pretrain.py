"""SAM 2's own training in miniature: a SAM 2 of `tiny`'s size learns to segment what a click or a box points at.

    python -m experiments.pretrain --out runs/sam2-tiny.pt        writes a file in SAM 2's format; minutes on two cores
    python -m experiments.pretrain --instances instances.json --images DIR      the objects of a file in COCO's format
    python train.py --sam2 runs/sam2-tiny.pt                      trains `tiny` around that image encoder, which stays frozen
    python -m experiments.ablate --out runs/frozen -- --sam2 runs/sam2-tiny.pt

The method takes SAM 2's image encoder as it is and never trains it, whereas `tiny` without --sam2 learns its own. With this
file the method can be studied on a laptop in the paper's regime. No phrase is seen here, no category and no scene of
data/scenes: the scenes are drawn with another seed. As in SAM 2's training each prompt is followed by a correction: the
first answer goes in again as the mask prompt, with a click at a wrong pixel.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

from runtime.arguments import answer_early, at_least

SCENES = Path("data/scenes-clicks")


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.pretrain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/sam2-tiny.pt"), metavar="FILE", help="default: runs/sam2-tiny.pt")
    add("--data", help=f"data set by name or path (default: scenes of its own, generated as {SCENES})")
    add("--instances", type=Path, metavar="FILE", help="in place of a data set: a file in COCO's format, flips and colour vary")
    add("--images", type=Path, metavar="DIR", help="where the images of --instances lie")
    add("--image-size", type=at_least(int, 32), default=128, metavar="S", help="pixels, a multiple of 32 (default: 128)")
    add("--samples", type=at_least(int, 1), default=40_000, help="targets to train on (default: 40000)")
    add("--seed", type=at_least(int, 0), default=0, help="of initial weights, order and prompts (default: 0)")
    return parser


if __name__ == "__main__":
    answer_early(command_line())

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from annotations.instances import InstancesFile
from data import Collate, ReferringDataset, TrainingOrder, open_dataset
from evaluate import iou_counts, masks_at, summarise
from experiments.stand_ins import leave_out
from losses import cross_entropy, dice
from model import RS2SAM2
from presets import PRESETS, RECIPES
from runtime.averaging import AveragedWeights
from runtime.devices import default_workers, pick_device, to_device
from runtime.errors import UserError, exit_on_user_error
from runtime.optimizers import optimizers_for
from runtime.progress import Progress
from runtime.run_folder import write_checkpoint
from synthetic_scenes.scenes import ensure_scenes
from train import learning_rate
from weights.names import our_name

MIN_SHARE = 0.003  # of the image, for an object of --instances to be pointed at
AWAY, TOWARDS, CORNERS, NOTHING = 0, 1, (2, 3), -1  # SAM 2's labels of points
ADDED = ("fusion", "decoder-fusion", "mask-prompt", "boundary")  # what the method adds to SAM 2


def bare_sam2(image_size: int) -> RS2SAM2:
    """`tiny` without what the method adds; all of SAM 2 in it is trained, with the parts that only clicks and boxes need."""
    model = RS2SAM2(replace(PRESETS["tiny"], train_trunk=True, image_size=image_size))
    leave_out(model, ADDED)
    model.dense_prompt = PreviousMask()
    for unused in (model.union_encoder, model.sparse_prompt, model.text_features):
        unused.requires_grad_(False)
    for part in (model.prompt_encoder, model.mask_decoder.output_hypernetworks_mlps[0]):
        part.requires_grad_(True)
    return model


class PreviousMask(nn.Module):
    """For the DensePrompt: an answer's logits as they are, or None. SAM 2's mask path takes both."""

    def forward(self, logits: Tensor | None, side: int) -> Tensor | None:
        return logits  # (B, 1, side, side)


def click(where: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """x and y of one of the pixels (H, W), of any pixel if there is none."""
    y, x = (where if where.any() else ~where).nonzero()
    one = rng.integers(len(x))
    return x[one], y[one]


def prompts(masks: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A click inside, or by chance the box, of each mask (B, H, W) -> points (B, 2, 2) as x, y; labels (B, 2).

    An empty mask gets a click that says: not here."""
    points, labels = np.zeros((len(masks), 2, 2), np.float32), np.full((len(masks), 2), NOTHING)
    for i, mask in enumerate(masks.cpu().numpy() > 0):
        if mask.any() and rng.random() < 0.5:
            y, x = mask.nonzero()
            points[i], labels[i] = ((x.min(), y.min()), (x.max(), y.max())), CORNERS
        else:
            points[i, 0], labels[i, 0] = click(mask, rng), TOWARDS if mask.any() else AWAY
    return torch.from_numpy(points).to(masks.device), torch.from_numpy(labels).to(masks.device)


def correction(masks: Tensor, answers: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A click at a pixel where the answer (B, H, W) and the mask (B, H, W) differ, or inside the mask where they agree
    -> points (B, 1, 2), labels (B, 1)."""
    points, labels = np.zeros((len(masks), 1, 2), np.float32), np.zeros((len(masks), 1), np.int64)
    for i, (mask, answer) in enumerate(zip(masks.cpu().numpy() > 0, answers.cpu().numpy() > 0)):
        wrong = mask != answer
        x, y = click(wrong if wrong.any() else mask, rng)
        points[i, 0], labels[i, 0] = (x, y), TOWARDS if mask[y, x] else AWAY
    return torch.from_numpy(points).to(masks.device), torch.from_numpy(labels).to(masks.device)


def answer(model: RS2SAM2, stages: list[Tensor], points: Tensor, labels: Tensor, before: Tensor | None) -> Tensor:
    """SAM 2's logits (B, 1, S/4, S/4) for points (B, N, 2) with labels (B, N) and the logits it gave before, or None."""
    sparse, _ = model.prompt_encoder(points=(points, labels), boxes=None, masks=None)  # (B, N + 1, C)
    return model.decode(*stages, None, None, before, sparse)  # (B, 1, S/4, S/4)


def both_answers(model: RS2SAM2, batch: dict, rng: np.random.Generator) -> list[Tensor]:
    """The logits (B, 1, S/4, S/4) for a prompt, and for that with its correction."""
    target = batch["target"]  # (B, S, S)
    image, _ = model.normalise(batch["image"], batch["encoder_image"])  # (B, 3, S, S)
    fine, middle, embedding, _ = model.neck(model.image_encoder(image, None))[0]  # (B, C, S/4, S/4), (B, C, S/8, S/8), ..
    stages = [fine, middle, embedding]
    points, labels = prompts(target, rng)  # (B, 2, 2), (B, 2)
    first = answer(model, stages, points, labels, None)  # (B, 1, S/4, S/4)
    full = F.interpolate(first.detach(), target.shape[-2:], mode="bilinear", align_corners=False)[:, 0]  # (B, S, S)
    more, label = correction(target, full, rng)  # (B, 1, 2), (B, 1)
    points, labels = torch.cat([points, more], dim=1), torch.cat([labels, label], dim=1)  # (B, 3, 2), (B, 3)
    return [first, answer(model, stages, points, labels, first.detach())]


def loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy and Dice of logits (B, 1, S/4, S/4) against the target (B, S, S)."""
    z = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=False)[:, 0]  # (B, S, S)
    return (cross_entropy(z, target) + dice(z, target)).mean()


def sam2_name(key: str) -> str:
    """The name in SAM 2's files of one of this model's entries."""
    key = key.replace(".block.", ".")
    for ours, theirs in (("neck.", "image_encoder.neck."), ("prompt_encoder.", "sam_prompt_encoder."),
                         ("mask_decoder.", "sam_mask_decoder.")):  # fmt: skip
        key = theirs + key[len(ours) :] if key.startswith(ours) else key
    return key


def sam2_state(model: RS2SAM2) -> dict[str, Tensor]:
    """SAM 2's part of the model, by the names in SAM 2's own files."""
    ours = {k: v for k, v in model.state_dict().items() if not k.startswith(("union_encoder.", "sparse_prompt."))}
    state = {sam2_name(k): v for k, v in ours.items()}
    assert [our_name(f"visual_model.{k}") for k in state] == list(ours)
    return state


def batches(dataset, model: RS2SAM2, **options):
    """Batches of a DataLoader with these options, on the model's device."""
    device = next(model.parameters()).device
    dataset.image_size, dataset.encoder_size = model.preset.image_size, model.union_encoder.image_size
    collate = Collate(model.union_encoder.tokenizer)
    for batch in DataLoader(dataset, num_workers=default_workers(), collate_fn=collate, **options):
        yield to_device(batch, device)


def train(model: RS2SAM2, dataset, samples: int, seed: int) -> None:
    """By the recipe of `tiny`, but for the average and momentum with which all that docs/ablation.md shows was trained; the
    averaged weights remain."""
    recipe = replace(RECIPES["tiny"], ema=0.999, betas=(0.9, 0.98))
    optimizers, average = optimizers_for(model, recipe), AveragedWeights(model, recipe.ema)
    rng, done = np.random.default_rng(seed), 0
    order = TrainingOrder(len(dataset), seed, 0, samples, recipe.batch_size)
    model.train()
    with Progress(total=samples, unit="img") as bar:
        for batch in batches(dataset, model, batch_sampler=order):
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = group["peak"] * learning_rate(recipe, done / samples, epoch=0)
            answers = both_answers(model, batch, rng)
            total = sum(loss(logits, batch["target"]) for logits in answers) / len(answers)
            total.backward()
            torch.nn.utils.clip_grad_norm_(average.live.values(), recipe.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            average.update()
            done += len(batch["target"])
            bar.set_postfix(loss=f"{total.item():.3f}", refresh=False)
            bar.update(len(batch["target"]))
    average.swap()


@torch.inference_mode()
def validate(model: RS2SAM2, dataset, seed: int) -> list[float]:
    """mIoU in per cent of the first answers, and of the corrected ones."""
    rng, found = np.random.default_rng(seed), ([], [])
    model.eval()
    for batch in batches(dataset, model, batch_size=8):
        for logits, counts in zip(both_answers(model, batch, rng), found):
            for one, mask in zip(logits.split(1), batch["mask"]):
                counts.append(iou_counts(masks_at(one, mask.shape), mask.numpy()))
    return [summarise(*zip(*counts))["mIoU"] for counts in found]


def open_set(args: argparse.Namespace, split: str) -> ReferringDataset:
    """A split of --data, of the scenes or, with no word to them, of the objects of --instances."""
    if args.instances:
        samples = InstancesFile(args.instances, args.images).samples(split, MIN_SHARE)
        augment = "ours" if split == "train" else None
        return ReferringDataset("instances", args.images, split, samples, args.image_size, 32, True, augment, args.seed)
    if not args.data:
        ensure_scenes(SCENES, test=0, seed=1)
    return open_dataset(args.data or str(SCENES), split, one_phrase=True, seed=args.seed)


def main(arguments: list[str] | None = None) -> None:
    args = command_line().parse_args(arguments)
    if args.out.exists():
        raise UserError(f"{args.out} exists already: name another --out")
    sets = [open_set(args, split) for split in ("train", "val")]
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{args.out} can't be written ({error.strerror}): choose another --out", exit_code=1) from None
    torch.manual_seed(args.seed)
    model, start = bare_sam2(args.image_size).to(pick_device()), time.perf_counter()
    train(model, sets[0], args.samples, args.seed)
    minutes = (time.perf_counter() - start) / 60
    write_checkpoint(args.out, {"model": sam2_state(model)})
    print(f"{args.samples:,} samples in {minutes:.1f} minutes; wrote {args.out}", flush=True)
    first, corrected = validate(model, sets[1], args.seed)
    print(f"validation mIoU {first:.2f} of a click or box, {corrected:.2f} corrected once")


if __name__ == "__main__":
    with exit_on_user_error("pretrain"):
        main()
