"""Score a checkpoint: Pr@0.5-0.9, oIoU, mIoU and boundary IoU of a split, by two protocols.

    python evaluate.py --ckpt best.pt                                  the data set it was trained on, split test
    python evaluate.py --ckpt best.pt --data RRSIS-D --split val --json scores.json
    torchrun --nproc-per-node 8 evaluate.py --ckpt best.pt             on 8 cards, with the same result

A sample is one (object, phrase) pair. IoU = I / U of its mask, mIoU their mean, oIoU = sum I / sum U, Pr@X the share of
samples with IoU >= X; bIoU the mean boundary IoU (Cheng et al., 2021: the IoU of what lies within 2 % of the diagonal of
the masks' own outlines); all times 100. The protocols:

    ours   the mask logits are resized in one step (bilinear) to the size the mask is stored at and scored there; a
           correct "nothing there" (both masks empty) counts 1
    paper  scored at the network's input size against the mask resized to it (nearest), in float32, as released; an
           empty union counts 0
"""

import argparse
import contextlib
import json
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import Collate, open_dataset
from imagery.pictures import captioned, fitted, grid, lit
from model import count_parameters
from runtime.devices import autocast, compute_dtype, default_workers, pick_device, to_device
from runtime.errors import UserError, exit_on_user_error
from runtime.processes import gather, process_group, rank, rank_0_first, world_size
from runtime.run_folder import free_path, write_whole
from runtime.signals import ignore_signals
from weights.checkpoints import load_checkpoint

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
PROTOCOLS = ("ours", "paper")
SIZES = {"small (below 1 %)": 0.01, "medium (1 to 10 %)": 0.1}  # shares of the image; what is above is large


def iou_counts(prediction: np.ndarray, target: np.ndarray) -> tuple[int, int]:
    """Pixels in the intersection and in the union of two masks (H, W) of 0 and 1."""
    prediction, target = prediction.astype(bool), target.astype(bool)
    return int((prediction & target).sum()), int((prediction | target).sum())


def boundary_region(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask (H, W) of 0 and 1 within d of its outline, bool (H, W): d is 2 % of the image's diagonal, at
    least 1. Distance is that of a square neighbourhood, and what is outside the image is outside the mask."""
    d = max(1, round(0.02 * float(np.hypot(*mask.shape))))
    mask = mask.astype(np.uint8)
    inside = cv2.erode(mask, np.ones((2 * d + 1,) * 2, np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return mask > inside


def boundary_iou(prediction: np.ndarray, target: np.ndarray, protocol: str) -> float:
    """IoU of the boundary regions of two masks (H, W) of 0 and 1."""
    return float(sample_iou(*iou_counts(boundary_region(prediction), boundary_region(target)), protocol))


def sample_iou(intersection, union, protocol: str) -> np.ndarray:
    """IoU per sample (n,) float64; an empty union counts 1 in protocol `ours` and 0 in `paper`."""
    empty = 1.0 if protocol == "ours" else 0.0
    intersection, union = np.asarray(intersection, dtype=np.float64), np.asarray(union, dtype=np.float64)
    return np.where(union > 0, intersection / np.maximum(union, 1), empty)


def summarise(intersection, union, protocol: str = "ours") -> dict[str, float]:
    """{"mIoU", "oIoU", "Pr@0.5", ..., "samples"} of per-sample counts (n,), in per cent."""
    iou = sample_iou(intersection, union, protocol)
    overall = sample_iou(np.sum(intersection), np.sum(union), protocol)
    scores = {"mIoU": 100 * float(iou.mean()), "oIoU": 100 * float(overall)}
    scores |= {f"Pr@{t}": 100 * float((iou >= t).mean()) for t in THRESHOLDS}
    return scores | {"samples": len(iou)}


def summarise_rows(rows: list[dict], protocol: str) -> dict[str, float]:
    """`summarise` of rows of `score`, and their mean boundary IoU: "bIoU"."""
    scores = summarise([r["intersection"] for r in rows], [r["union"] for r in rows], protocol)
    return scores | {"bIoU": 100 * float(np.mean([r["boundary_iou"] for r in rows]))}


def by_group(rows: list[dict], key: str, protocol: str) -> dict[str, dict[str, float]]:
    """Scores of the rows that share a value of `key`, for every non-empty value, sorted by it."""
    groups = sorted({row[key] for row in rows} - {""})
    return {group: summarise_rows([r for r in rows if r[key] == group], protocol) for group in groups}


def size_name(share: float) -> str:
    """The group of a target that covers this share of its image."""
    if share == 0:
        return "nothing there"
    return next((name for name, limit in SIZES.items() if share < limit), "large (10 % and more)")


def bootstrap(rows: list[dict], protocol: str, draws: int = 1000) -> dict[str, list[float]]:
    """95 % intervals of mIoU and oIoU, {"mIoU interval": [low, high], ...}, in per cent.

    Percentiles over `draws` sets of images, drawn with replacement: phrases for one image stand or fall together, so
    whole images are drawn, not samples, with all their copies.
    """
    images = {scene: number for number, scene in enumerate(dict.fromkeys(row["scene"] for row in rows))}
    sums = np.zeros((len(images), 4))  # of each image's samples: IoU, number, intersection, union
    for row in rows:
        sums[images[row["scene"]]] += (row["iou"], 1, row["intersection"], row["union"])
    rng = np.random.default_rng(0)
    drawn = np.stack([sums[rng.integers(len(sums), size=len(sums))].sum(0) for _ in range(draws)])
    scores = {"mIoU": drawn[:, 0] / drawn[:, 1], "oIoU": sample_iou(drawn[:, 2], drawn[:, 3], protocol)}
    return {f"{name} interval": [float(x) for x in np.percentile(100 * s, (2.5, 97.5))] for name, s in scores.items()}


def masks_at(logits: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Mask logits (1, 1, h, w) -> bool (H, W) at `size`."""
    return (F.interpolate(logits, size, mode="bilinear", align_corners=False)[0, 0] > 0).cpu().numpy()


@torch.inference_mode()
def score(model, dataset, protocol="ours", batch_size=8, workers=0, title="scoring", forward=None) -> list[dict]:
    """Run the model over a data set -> one row a sample: id, file, phrase, kind, category, intersection, union, iou,
    boundary_iou, and of the true mask its share of the image and the name of its size.

    The model is put into evaluation mode and back. `forward` is what is called instead of it (its compiled form).
    Several processes take whole batches in turn, the same ones whatever their number, and each returns all rows.
    """
    device, size = next(model.parameters()).device, len(dataset)
    forward = model if forward is None else forward  # not `or`: a compiled module has no truth value
    batches = [range(i, min(i + batch_size, size)) for i in range(0, size, batch_size)][rank() :: world_size()]
    loader = DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, collate_fn=Collate(model.union_encoder.tokenizer),
        pin_memory=device.type == "cuda", worker_init_fn=ignore_signals,
    )  # fmt: skip
    rows, was_training = {}, model.training
    model.eval()
    for indices, batch in zip(batches, tqdm(loader, title, leave=False, disable=rank() > 0 or None)):
        batch = to_device(batch, device)
        images = model.normalise(batch["image"], batch["encoder_image"])
        with autocast(device) if protocol == "ours" else contextlib.nullcontext():
            output = forward(*images, batch["ids"], batch["lengths"])
        for i, logits in enumerate(output.logits.float().split(1)):
            target = batch["mask"][i] if protocol == "ours" else batch["target"][i]
            prediction, truth = masks_at(logits, target.shape), target.cpu().numpy()
            intersection, union = iou_counts(prediction, truth)
            iou, share = float(sample_iou(intersection, union, protocol)), float(target.float().mean())
            row = {key: batch[key][i] for key in ("id", "file", "scene", "phrase", "kind", "category")}
            row |= {"intersection": intersection, "union": union, "iou": iou, "share": share, "size": size_name(share)}
            row["boundary_iou"] = boundary_iou(prediction, truth, protocol)
            rows[indices[i]] = row
    model.train(was_training)
    rows = {index: row for part in gather(rows) for index, row in part.items()}
    return [rows[index] for index in range(size)]


def table(scores: dict[str, dict[str, float]]) -> str:
    """Named rows of scores as an aligned text table."""
    columns = [*(f"Pr@{t}" for t in THRESHOLDS), "oIoU", "mIoU", "bIoU"]
    width = max(map(len, scores)) + 2
    lines = [" " * width + "".join(f"{c:>8}" for c in columns) + f"{'samples':>9}"]
    for name, row in scores.items():
        lines.append(f"{name:<{width}}" + "".join(f"{row[c]:8.2f}" for c in columns) + f"{row['samples']:9d}")
    return "\n".join(lines)


@torch.inference_mode()
def write_panels(path: Path, model, dataset, indices: list[int]) -> None:
    """A PNG with one row a sample: image, truth, pseudo-mask (where the model has one), prediction; IoU and phrase above."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    rows = []
    for index in indices:
        batch = to_device(Collate(model.union_encoder.tokenizer)([dataset[index]]), device)
        with autocast(device):
            output = model(*model.normalise(batch["image"], batch["encoder_image"]), batch["ids"], batch["lengths"])
        truth = batch["mask"][0].cpu().numpy()
        prediction = masks_at(output.logits.float(), truth.shape)
        pseudo = [] if output.pseudo_mask is None else [output.pseudo_mask.float().sigmoid()[0, 0].cpu().numpy()]
        iou = float(sample_iou(*iou_counts(prediction, truth), "ours"))
        image = fitted(batch["image"][0].permute(1, 2, 0).cpu().numpy(), 256, 256)
        cells = [image, *(lit(image, mask) for mask in (truth, *pseudo, prediction))]
        rows.append([captioned(grid([cells]), f"IoU {iou:.2f}  {batch['phrase'][0]}")])
    _, png = cv2.imencode(".png", cv2.cvtColor(grid(rows), cv2.COLOR_RGB2BGR))
    write_whole(path, lambda file: file.write(png.tobytes()))
    model.train(was_training)


def best_median_worst(rows: list[dict], n: int) -> list[int]:
    """Indices of n samples: the best, those around the median, the worst, a third each."""
    order = sorted(range(len(rows)), key=lambda i: -rows[i]["iou"])
    n = min(n, len(order))
    best, worst = (n + 2) // 3, n // 3
    middle = n - best - worst
    start = min(max((len(order) - middle) // 2, best), len(order) - worst - middle)
    return order[:best] + order[start : start + middle] + (order[-worst:] if worst else [])


def results_by_group(rows: list[dict], protocol: str) -> dict:
    """All scores of a data set: {"scores", "by kind", "by size", "by category"}."""
    groups = {f"by {key}": by_group(rows, key, protocol) for key in ("kind", "size", "category")}
    scores = summarise_rows(rows, protocol) | bootstrap(rows, protocol)
    return {"scores": scores} | {k: v for k, v in groups.items() if v}


def print_results(result: dict) -> None:
    rows = {"all": result["scores"]}
    for group in ("by kind", "by size", "by category"):
        rows |= result.get(group, {})
    print(table(rows))
    intervals = (f"{name} {low:.2f} to {high:.2f}" for name in ("mIoU", "oIoU")
                 for low, high in [result["scores"][f"{name} interval"]])  # fmt: skip
    print(f"95 % intervals (bootstrap over images): {', '.join(intervals)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", type=Path, default="best.pt", help="a checkpoint of train.py (default: best.pt)")
    add("--data", help="data set by name or path (default: the one the checkpoint was trained on)")
    add("--split", help="train, val or test (default: test, or val where there is none)")
    add("--protocol", choices=PROTOCOLS, default="ours", help="how to score, see above (default: ours)")
    add("--json", type=Path, metavar="FILE", help="write scores and one row a sample here")
    add("--panels", type=int, default=0, metavar="N", help="write pictures of N best, median and worst cases")
    add("--skip-missing", action="store_true", help="leave out samples whose files are missing")
    args = parser.parse_args()
    with process_group(), exit_on_user_error("evaluate.py"):
        evaluate(args)


def evaluate(args: argparse.Namespace) -> None:
    """What the command line asks for: scores on the screen, and in files where wanted."""
    if args.json and (args.json.exists() or not args.json.parent.is_dir()):
        raise UserError(f"{args.json} exists or has no folder: name another file, nothing is overwritten")
    with rank_0_first():
        model, checkpoint = load_checkpoint(args.ckpt, pick_device(None))
        data, dataset = open_for(model, checkpoint, args, skip_missing=args.skip_missing)
    if torch.cuda.is_available() and args.protocol == "ours":
        model.requires_grad_(False).cast_frozen(compute_dtype())
    rows = score(model, dataset, args.protocol, workers=default_workers())
    if rank():
        return
    result = results_by_group(rows, args.protocol)
    print(f"{args.ckpt} on {data}, split {dataset.split}, protocol {args.protocol}")
    print_results(result)
    if args.json:
        facts = {k: checkpoint[k] for k in ("model_name", "revision", "epoch")}
        facts["parameters"] = count_parameters(model)["total"]
        facts |= {"ckpt": str(args.ckpt), "data": data, "split": dataset.split, "protocol": args.protocol}
        text = json.dumps(facts | result | {"rows": rows}, indent=1)
        write_whole(args.json, lambda file: file.write(text.encode()))
        print(f"wrote {args.json}")
    if args.panels:
        path = free_path(Path(f"panels-{dataset.split}.png"))
        write_panels(path, model, dataset, best_median_worst(rows, args.panels))
        print(f"wrote {path}")


def open_for(model, checkpoint: dict, args: argparse.Namespace, **options):
    """(name, data set) of --data and --split as the model takes it; without --data, the one it was trained on. UserError."""
    data = args.data or checkpoint["data"]
    if data is None:
        raise UserError(f"{args.ckpt} holds published weights, which name no data set: give it with --data")
    sizes = {"image_size": model.preset.image_size, "encoder_size": model.union_encoder.image_size}
    return data, open_dataset(data, args.split, **sizes, **options)


if __name__ == "__main__":
    main()
