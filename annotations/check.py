"""`python data.py --check DATA`: what is in a data set, and what is wrong with it."""

import hashlib
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image

from annotations.layouts import Sample, is_test, missing_files, read_samples
from annotations.masks import ShapeError, holds_zeros_and_ones, load_mask, survives_encoding
from imagery.pictures import captioned, fitted, grid, outlined
from imagery.pixels import read_image
from imagery.plain import quiet
from runtime.errors import UserError
from runtime.progress import Progress
from runtime.run_folder import free_path, write_whole


@dataclass
class Target:
    """A mask that was read: its shape (H, W), the per cent of the image that it covers, a digest, and what is unusual."""
    sample: Sample
    shape: tuple[int, int]
    percent: float
    digest: bytes
    odd_rle: bool
    of_zeros_and_ones: bool


@dataclass
class Look:
    """What decoding an image and its masks has shown."""
    path: str
    shape: tuple[int, int] | None = None            # of the image, (H, W)
    digest: bytes = b""                             # of its pixels
    broken: list[str] = field(default_factory=list)  # sentences
    shapes: list[str] = field(default_factory=list)  # of masks that can't lie on it
    targets: list[Target] = field(default_factory=list)


def check(
    data: str | Path, sheet: str | Path, length: Callable[[str], int], context: int,
    number: int | None = None, strict: bool = False,
) -> None:  # fmt: skip
    """Print what is in a data set and what is wrong with it; draw 16 samples into a new file named like `sheet`, and write all
    names beside it. UserError with exit code 1 where there are faults, or, if `strict`, notes.

    Of the files all are decoded, or those of `number` samples. Phrases whose length(phrase) is over `context` will be cut."""
    name, root, samples = read_samples(data)
    print(f"{name} at {root}")
    print_index(samples)
    missing = missing_files(samples)
    absent = {index for indices in missing.values() for index in indices}
    there = [sample for index, sample in enumerate(samples) if index not in absent]
    random.Random(0).shuffle(there)
    chosen = there[:number]
    looks = look_at_all(chosen)
    print(f"  decoded: {len(chosen):,} of {len(samples):,} samples, {len(looks):,} images")
    print_targets(looks)
    splits = {sample.split for sample in samples}
    faults = {
        "missing files": list(missing),
        "splits that are not there": [split for split in ("train", "val") if split not in splits],
        "broken files": sorted({sentence for look in looks for sentence in look.broken}),
        "masks of another shape than their image": [sentence for look in looks for sentence in look.shapes],
    }
    pairs = ((sample, phrase) for sample in samples for phrase in sample.phrases)
    cut = [f"{sample.split} {sample.id}: {phrase}" for sample, phrase in pairs if length(phrase) > context]
    notes = {f"phrases over {context:,} tokens, which are cut": cut} | notes_on_targets(looks) | notes_on_images(looks)
    for title, findings in (("faults", faults), ("notes", notes)):
        print(f"{title}:")
        for kind, names in findings.items():
            print(f"  {kind}: {len(names):,}", *names[:3], *["..."] * (len(names) > 3), sep="\n    ")
    picture = draw_sheet(chosen, looks)
    write_results(Path(sheet), picture, faults | notes)
    counts = [sum(map(len, findings.values())) for findings in (faults, notes)]
    if counts[0] or strict and counts[1]:
        raise UserError(f"{root}: faults {counts[0]:,}, notes {counts[1]:,}; mend what is listed above.", exit_code=1)


def print_index(samples: list[Sample]) -> None:
    """What the index files say: splits, phrases, categories."""
    splits = {}
    for sample in samples:
        splits.setdefault(sample.split, []).append(sample)
    for split, part in splits.items():
        words = [len(phrase.split()) for sample in part for phrase in sample.phrases]
        taken = ", taken for test" if is_test(split) and split != "test" else ""
        print(f"  {split}{taken}: {len(part):,} samples, {len(words):,} phrases of {min(words)} to {max(words)} words, "
              f"median {np.median(words):g}")
    categories = Counter(sample.category or "unknown" for sample in samples).most_common()
    print("  categories:", ", ".join(f"{category} {n:,}" for category, n in categories))
    print(f"  phrases that say to have no target: {sum(len(sample.phrases) for sample in samples if not sample.mask):,}")


def look_at_all(samples: list[Sample]) -> list[Look]:
    """Each image once, with all its masks; decoding runs in threads."""
    groups = defaultdict(list)
    for sample in samples:
        groups[sample.image].append(sample)
    with quiet, ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        return list(Progress(pool.imap(look_at, groups.values()), "images", len(groups)))


def look_at(samples: list[Sample]) -> Look:
    """Decode the image of the samples, the same for all of them, and their masks."""
    look = Look(samples[0].image)
    try:
        image = read_image(look.path)
    except ValueError as error:
        look.broken.append(str(error))
        return look
    look.shape, look.digest = image.shape[:2], digest(image)
    for sample in samples:
        try:
            mask = load_mask(sample, look.shape)
        except ShapeError as error:
            look.shapes.append(f"{sample.split} {sample.id}: {error}")
        except ValueError as error:
            look.broken.append(f"{sample.split} {sample.id}: {error}")
        else:
            odd = not all(survives_encoding(part) for part in sample.mask if isinstance(part, dict))
            look.targets.append(
                Target(sample, mask.shape, 100 * mask.mean(), digest(mask), odd, holds_zeros_and_ones(sample)))
    return look


def digest(pixels: np.ndarray) -> bytes:
    return hashlib.blake2b(pixels.tobytes(), digest_size=12, salt=repr(pixels.shape).encode()[:16]).digest()


def print_targets(looks: list[Look]) -> None:
    """What images and masks are like."""
    pairs = [(look, target) for look in looks for target in look.targets]
    if not pairs:
        return
    sizes = Counter(f"{look.shape[1]} x {look.shape[0]}" for look in looks if look.shape)
    print("  image sizes:", ", ".join(f"{size} ({n:,})" for size, n in sizes.most_common(5)))
    quartiles = ", ".join(f"{value:.2f} %" for value in np.percentile([target.percent for _, target in pairs], (25, 50, 75)))
    print(f"  mask's share of the image, quartiles: {quartiles}")
    print(f"  masks of another size than their image: {sum(look.shape != target.shape for look, target in pairs):,}")
    print(f"  RLEs that encoding their mask doesn't give: {sum(target.odd_rle for _, target in pairs):,}")
    print(f"  mask files of 0 and 1, where 1 is taken for the target: {sum(t.of_zeros_and_ones for _, t in pairs):,}")


def notes_on_targets(looks: list[Look]) -> dict[str, list[str]]:
    empty, off = [], []
    for look in looks:
        for target in look.targets:
            where = f"{target.sample.split} {target.sample.id}"
            if target.sample.mask and not target.percent:
                empty.append(f"{where}: {look.path}")
            (height, width), (rows, columns) = target.shape, look.shape
            if abs(height * columns - width * rows) >= max(width, columns):  # a row or more, not what rounding leaves
                off.append(f"{where}: mask {width} x {height}, image {columns} x {rows}")
    return {"masks with nothing in them": empty, "masks up to 5 % off their image's shape": off}


def notes_on_images(looks: list[Look]) -> dict[str, list[str]]:
    """Images of more than one split, and phrases that mean several targets of one image; images are told by their pixels."""
    paths, masks = defaultdict(dict), defaultdict(dict)
    for look in looks:
        for target in look.targets:
            sample = target.sample
            paths[look.digest].setdefault(sample.split, look.path)
            for phrase in sample.phrases:
                masks[look.digest, " ".join(phrase.lower().split())].setdefault(target.digest, f"{sample.split} {sample.id}")
    shared = [", ".join(f"{split} {path}" for split, path in found.items()) for found in paths.values() if len(found) > 1]
    several = [f"{phrase}: {', '.join(found.values())}" for (_, phrase), found in masks.items() if len(found) > 1]
    return {"images in more than one split": shared, "phrases that mean several targets of one image": several}


def draw_sheet(samples: list[Sample], looks: list[Look]) -> Image.Image | None:
    """The first 16 of the samples that could be read, phrase below, mask outlined in red."""
    whole = {id(target.sample) for look in looks for target in look.targets}
    cells = []
    for sample in [sample for sample in samples if id(sample) in whole][:16]:
        image = read_image(sample.image)
        picture = outlined(fitted(image, 320, 320), load_mask(sample, image.shape[:2]), colour=(255, 0, 0))
        cells.append(captioned(picture, sample.phrases[0], below=True, lines=3))
    return Image.fromarray(grid([cells[i : i + 4] for i in range(0, len(cells), 4)])) if cells else None


def write_results(sheet: Path, picture: Image.Image | None, findings: dict[str, list[str]]) -> None:
    """The contact sheet, and all names in a text file beside it."""
    if picture:
        sheet = free_path(sheet)
        write_whole(sheet, lambda file: picture.save(file, "PNG"))
        print(f"contact sheet: {sheet}")
    if any(findings.values()):
        path = free_path(sheet.with_suffix(".txt"))
        lines = [line for kind, names in findings.items() if names for line in (f"{kind}: {len(names):,}", *names, "")]
        write_whole(path, lambda file: file.write("\n".join(lines).encode()))
        print(f"all names: {path}")
