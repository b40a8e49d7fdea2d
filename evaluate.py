"""Score a checkpoint, or anybody's predictions: Pr@0.5-0.9, oIoU, mIoU and boundary IoU of a split, by two protocols.

    python evaluate.py --ckpt best.pt                                  the data set it was trained on, split test
    python evaluate.py --ckpt best.pt --data RRSIS-D --split val --json scores.json
    torchrun --nproc-per-node 8 evaluate.py --ckpt best.pt             on 8 cards, with the same result
    python evaluate.py --ckpt best.pt --predictions masks.json         writes the masks too, as COCO results
    python evaluate.py --from masks.json --data RRSIS-D                scores such a file, by both protocols

A sample is one (object, phrase) pair. IoU = I / U of its mask, mIoU their mean, oIoU = sum I / sum U, Pr@X the share of
samples with IoU >= X; bIoU the mean boundary IoU (Cheng et al., 2021: the IoU of what lies within 2 % of the diagonal of
the masks' own outlines); all times 100. Some papers call mIoU gIoU and oIoU cIoU. The protocols:

    ours   the mask logits are resized in one step (bilinear) to the size the mask is stored at and scored there; a
           correct "nothing there" (both masks empty) counts 1
    paper  scored at the network's input size against the mask resized to it (nearest), in float32, as released; an
           empty union counts 0. The masks of --from are resized to 1024 x 1024 (nearest) for it
"""

import argparse
import json
from pathlib import Path

from runtime.arguments import DTYPES, answer_early

PROTOCOLS = ("ours", "paper")


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, source = parser.add_argument, parser.add_mutually_exclusive_group()
    # fmt: off
    source.add_argument("--ckpt", type=Path, default="best.pt", help="a checkpoint of train.py (default: best.pt)")
    source.add_argument("--from", dest="masks", type=Path, metavar="FILE",
        help="score the predictions in this file, as --predictions writes it, whoever made them")
    add("--data", help="data set by name or path (default: the one the checkpoint was trained on)")
    add("--split", help="train, val or test (default: test, or val where there is none)")
    add("--protocol", choices=PROTOCOLS, help="how to score, see above (default: ours; with --from both)")
    add("--json", type=Path, metavar="FILE", help="write scores and one row a sample here")
    add("--predictions", type=Path, metavar="FILE", help="write the predicted masks here, as COCO results")
    add("--panels", type=int, default=0, metavar="N", help="write pictures of N best, median and worst cases")
    add("--ids", nargs="+", default=[], metavar="ID", help="write pictures of these samples instead (ids as in --json)")
    add("--dtype", choices=DTYPES, default="auto",
        help="what to compute in (default: bfloat16 where that is fast, else float32; protocol paper: float32)")
    add("--skip-missing", action="store_true", help="leave out samples whose files are missing")
    # fmt: on
    return parser


if __name__ == "__main__":
    answer_early(command_line())

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

from annotations.masks import decode_rle
from annotations.predictions import encode, read_predictions, to_json
from data import Collate, ReferringDataset, open_dataset
from imagery.pictures import captioned, fitted, grid, lit, outlined
from imagery.results import probabilities
from model import count_parameters
from runtime import devices
from runtime.devices import autocast, chosen_dtype, default_workers, pick_device, to_device
from runtime.errors import UserError, exit_on_user_error
from runtime.processes import gather, process_group, rank, rank_0_first, world_size
from runtime.progress import Progress
from runtime.recording import Recorded
from runtime.run_folder import free_path, write_whole
from runtime.signals import ignore_signals
from weights.checkpoints import load_checkpoint
from weights.provenance import provenance, weights_line

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
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
    return logits_at(logits, size) > 0


def logits_at(logits: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Mask logits (1, 1, h, w) -> (H, W) at `size`."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)[0, 0].cpu().numpy()


def scored_row(item: dict, prediction: np.ndarray, target: torch.Tensor, protocol: str) -> dict:
    """The row of a sample: what it is, the share of the image that is target, and how its prediction, bool (H, W), meets its
    target, uint8 (H, W)."""
    truth = target.cpu().numpy()
    intersection, union = iou_counts(prediction, truth)
    share = float(target.float().mean())
    row = {key: item[key] for key in ("id", "file", "scene", "phrase", "kind", "category")}
    row |= {"intersection": intersection, "union": union, "iou": float(sample_iou(intersection, union, protocol))}
    return row | {"share": share, "size": size_name(share), "boundary_iou": boundary_iou(prediction, truth, protocol)}


@torch.inference_mode()
def score(model, dataset, protocol="ours", batch_size=8, workers=0, title="scoring", masks=False, dtype=None) -> list[dict]:
    """Run the model over a data set -> the `scored_row` of each sample; with `masks` also the predicted one at the size the
    true one is stored at, "segmentation", as an RLE, and its "confidence", the mean probability inside it.

    The model is put into evaluation mode and back. dtype: as `autocast` takes it; protocol paper computes in float32.
    Several processes take whole batches in turn, the same ones whatever their number, and each returns all rows.
    """
    device, size = next(model.parameters()).device, len(dataset)
    batches = [range(i, min(i + batch_size, size)) for i in range(0, size, batch_size)][rank() :: world_size()]
    loader = DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, collate_fn=Collate(model.union_encoder.tokenizer),
        pin_memory=device.type == "cuda", worker_init_fn=ignore_signals,
    )  # fmt: skip
    rows, was_training = {}, model.training

    def predicted(image, encoder_image, ids, lengths) -> dict:
        with autocast(device, dtype if protocol == "ours" else torch.float32):
            return {"logits": model(*model.normalise(image, encoder_image), ids, lengths).logits}

    forward = Recorded(predicted, enabled=device.type == "cuda")
    model.eval()
    for indices, batch in zip(batches, Progress(loader, title, leave=False, disable=rank() > 0)):
        batch = to_device(batch, device)
        found = forward(*(batch[key] for key in ("image", "encoder_image", "ids", "lengths")))["logits"]
        for i, logits in enumerate(found.float().split(1)):
            item = {key: values[i] for key, values in batch.items()}
            target = item["mask"] if protocol == "ours" else item["target"]
            whole = logits_at(logits, target.shape)
            row = rows[indices[i]] = scored_row(item, whole > 0, target, protocol)
            if masks:
                whole = whole if target is item["mask"] else logits_at(logits, item["mask"].shape)
                inside = probabilities(whole[whole > 0])
                row |= {"segmentation": encode(whole > 0), "confidence": float(inside.mean()) if inside.size else 0.0}
    forward.forget()
    model.train(was_training)
    rows = {index: row for part in gather(rows) for index, row in part.items()}
    return [rows[index] for index in range(size)]


def score_predictions(found: list[dict], dataset: ReferringDataset, protocol: str, workers: int = 0) -> list[dict]:
    """The rows of `score` for predicted masks, an RLE for each item of the data set. A mask of another size than the one it is
    scored at is resized to it (nearest)."""
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, worker_init_fn=ignore_signals)
    rows = []
    for rle, item in zip(found, Progress(loader, "scoring", leave=False)):
        prediction, target = decode_rle(rle), item["mask"] if protocol == "ours" else item["target"]
        rows.append(scored_row(item, resized(prediction, target.shape) > 0, target, protocol))
    return rows


def resized(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A mask, uint8 (h, w), at the size (H, W), as imagery.pixels resizes the true ones."""
    return np.array(Image.fromarray(mask).resize(shape[::-1], Image.NEAREST))


def table(scores: dict[str, dict[str, float]]) -> str:
    """Named rows of scores as an aligned text table."""
    columns = [*(f"Pr@{t}" for t in THRESHOLDS), "oIoU", "mIoU", "bIoU"]
    width = max(map(len, scores)) + 2
    lines = [" " * width + "".join(f"{c:>8}" for c in columns) + f"{'samples':>9}"]
    for name, row in scores.items():
        lines.append(f"{name:<{width}}" + "".join(f"{row[c]:8.2f}" for c in columns) + f"{row['samples']:9d}")
    return "\n".join(lines)


@torch.inference_mode()
def write_panels(path: Path, model, dataset, indices: list[int], dtype: torch.dtype | None = None) -> None:
    """A PNG with one row a sample: image, outlines of truth (green) and prediction (yellow), and by the light they leave on the
    image truth, pseudo-mask (where the model has one) and prediction; IoU and phrase above."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    rows = []
    for index in indices:
        batch = to_device(Collate(model.union_encoder.tokenizer)([item := dataset[index]]), device)
        with autocast(device, dtype):
            output = model(*model.normalise(batch["image"], batch["encoder_image"]), batch["ids"], batch["lengths"])
        pseudo = [] if output.pseudo_mask is None else [output.pseudo_mask.float().sigmoid()[0, 0].cpu().numpy()]
        rows.append(panel(item, masks_at(output.logits.float(), item["mask"].shape), pseudo))
    save_picture(path, grid(rows))
    model.train(was_training)


def panel(item: dict, prediction: np.ndarray, pseudo: list[np.ndarray]) -> list[np.ndarray]:
    truth = item["mask"].numpy()
    iou = float(sample_iou(*iou_counts(prediction, truth), "ours"))
    image = fitted(item["image"].permute(1, 2, 0).numpy(), 256, 256)
    outlines = outlined(outlined(image, truth, colour=(0, 255, 80)), prediction)  # seen in a dark scene too
    cells = [image, outlines, *(lit(image, mask) for mask in (truth, *pseudo, prediction))]
    return [captioned(grid([cells]), f"IoU {iou:.2f}  {item['phrase']}")]


def save_picture(path: Path, picture: np.ndarray) -> None:
    _, png = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    write_whole(path, lambda file: file.write(png.tobytes()))


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
    args = command_line().parse_args()
    devices.choose_threads()
    way_out = "let other programs leave it, or compute on the CPU by CUDA_VISIBLE_DEVICES= in the environment"
    with process_group(), exit_on_user_error("evaluate.py"), devices.card_failures(way_out):
        for path in filter(None, (args.json, args.predictions)):
            if path.exists() or not path.parent.is_dir():
                raise UserError(f"{path} exists or has no folder: name another file, nothing is overwritten")
        (evaluate_file if args.masks else evaluate)(args)


def evaluate(args: argparse.Namespace) -> None:
    """Score a checkpoint as the command line says: on the screen, and in files where wanted."""
    protocol = args.protocol or "ours"
    if (protocol, args.dtype) == ("paper", "bfloat16"):
        raise UserError("--protocol paper is scored in float32, as published: leave --dtype out")
    with rank_0_first():
        model, checkpoint = load_checkpoint(args.ckpt, pick_device(None))
        data, dataset = open_for(model, checkpoint, args, skip_missing=args.skip_missing)
        chosen = numbers_of(dataset, args.ids)
    dtype = torch.float32 if protocol == "paper" else chosen_dtype(args.dtype, model)
    model.requires_grad_(False).cast_frozen(dtype)
    print(weights_line(args.ckpt, checkpoint), flush=True)
    rows = score(model, dataset, protocol, workers=default_workers(), masks=args.predictions is not None, dtype=dtype)
    if rank():
        return
    if args.predictions:
        write_whole(args.predictions, lambda file: file.write(to_json(rows)))
        print(f"wrote {args.predictions}")
        rows = [{k: v for k, v in row.items() if k not in ("segmentation", "confidence")} for row in rows]
    facts = {k: checkpoint[k] for k in ("model_name", "revision", "epoch")} | {"weights": provenance(checkpoint)}
    facts |= {"parameters": count_parameters(model)["total"], "ckpt": str(args.ckpt), "data": data}
    facts["dtype"] = str(dtype).removeprefix("torch.")
    present(args, facts, dataset.split, {protocol: rows})
    if indices := chosen or best_median_worst(rows, args.panels):
        path = free_path(Path(f"panels-{dataset.split}.png"))
        write_panels(path, model, dataset, indices, dtype)
        print(f"wrote {path}")


def evaluate_file(args: argparse.Namespace) -> None:
    """Score the predictions in a file, by both protocols or by one."""
    if args.data is None or args.predictions:
        raise UserError("--from scores a file of masks: it needs --data, and --predictions has nothing to write")
    dataset = open_dataset(args.data, args.split, skip_missing=args.skip_missing)
    chosen, samples = numbers_of(dataset, args.ids), [(dataset.samples[i], j) for i, j in dataset.items]
    found, unused = read_predictions(args.masks, [(s.id, s.image, s.phrases[j]) for s, j in samples])
    if unused:
        print(f"{unused:,} predictions in {args.masks} are for no phrase of split {dataset.split} and were left out")
    results = {}
    for protocol in [args.protocol] if args.protocol else PROTOCOLS:
        results[protocol] = score_predictions(found, dataset, protocol, default_workers())
    if rank():
        return
    rows = next(iter(results.values()))
    present(args, {"from": str(args.masks), "data": args.data}, dataset.split, results)
    if indices := chosen or best_median_worst(rows, args.panels):
        path = free_path(Path(f"panels-{dataset.split}.png"))
        pairs = ((dataset[index], decode_rle(found[index])) for index in indices)
        save_picture(path, grid([panel(item, resized(mask, item["mask"].shape), []) for item, mask in pairs]))
        print(f"wrote {path}")


def numbers_of(dataset: ReferringDataset, ids: list[str]) -> list[int]:
    """The indices of the items of these samples, in the order of the ids; UserError for an id that no sample has."""
    known = {}
    for number, (i, _) in enumerate(dataset.items):
        known.setdefault(dataset.samples[i].id, []).append(number)
    if unknown := [id for id in ids if id not in known]:
        raise UserError(f"--ids {unknown[0]}: split {dataset.split} has no such sample, but {', '.join([*known][:5])} ...")
    return [number for id in dict.fromkeys(ids) for number in known[id]]


def present(args: argparse.Namespace, facts: dict, split: str, results: dict[str, list[dict]]) -> None:
    """Print the scores of a split by each protocol, and write them with all rows where --json asks for it; the second
    protocol's are an entry of their own there."""
    texts = {}
    for protocol, rows in results.items():
        result = results_by_group(rows, protocol)
        print(f"{facts.get('ckpt') or facts['from']} on {facts['data']}, split {split}, protocol {protocol}")
        print_results(result)
        texts[protocol] = {"protocol": protocol} | result | {"rows": rows}
    if args.json:
        first, *second = texts.values()
        text = json.dumps(facts | {"split": split} | first | {more["protocol"]: more for more in second}, indent=1)
        write_whole(args.json, lambda file: file.write(text.encode()))
        print(f"wrote {args.json}")


def open_for(model, checkpoint: dict, args: argparse.Namespace, **options):
    """(name, data set) of --data and --split as the model takes it; without --data, the one it was trained on. UserError."""
    data = args.data or checkpoint["data"]
    if data is None:
        raise UserError(f"{args.ckpt} holds published weights, which name no data set: give it with --data")
    sizes = {"image_size": model.preset.image_size, "encoder_size": model.union_encoder.image_size}
    return data, open_dataset(data, args.split, **sizes, **options)


if __name__ == "__main__":
    main()
