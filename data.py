"""Data sets of referring segmentation, from samples to batches: preparation, augmentation, order, collation.

    python data.py --check RRSIS-D            what is in a data set and what is wrong with it, by name or by path
    python data.py --download RefSegRS        fetch a data set by name, then check it

annotations/ reads which samples a data set has and their masks, imagery/ decodes and resizes. Whatever is broken raises
UserError: one sentence with the sample's name.
"""

import argparse
import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from annotations.download import SOURCES, download
from annotations.layouts import NAMES, Sample, is_test, missing_files, read_samples
from runtime.arguments import answer_early, at_least


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Check a data set: decode it, name what is wrong, draw a contact sheet.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", metavar="DATA", help=f"a folder, or one of {', '.join(NAMES)}")
    what.add_argument("--download", metavar="NAME", help=f"fetch a data set into ./data and check it: {', '.join(SOURCES)}")
    parser.add_argument("--sheet", default="data-check.png", help="contact sheet, a PNG; a new name is taken if it exists")
    parser.add_argument("--sample", type=at_least(int, 1), metavar="N", help="decode the files of N samples only")
    parser.add_argument("--strict", action="store_true", help="exit with code 1 for notes too, not for faults alone")
    return parser


if __name__ == "__main__":
    answer_early(command_line())

import cv2
import numpy as np
import torch

from annotations.check import check
from annotations.masks import load_mask
from imagery.pixels import read_image, resize_image, resize_mask
from runtime.errors import UserError, exit_on_user_error


def open_dataset(
    data: str | Path,
    split: str | None,
    *,
    image_size: int = 1024,
    encoder_size: int = 224,
    one_phrase: bool = False,
    augment: str | None = None,
    seed: int = 0,
    skip_missing: bool = False,
) -> "ReferringDataset":
    """The split of a data set; UserError if it can't be had.

    data: a name (its folder is in ./data) or a folder's path.
    split: 'train' and 'val' are matched exactly, 'test' takes testA, test-2 ... too; None: test, or val where the data set
        has no test.
    image_size, encoder_size: pixels a side of what the image encoder and the union encoder take.
    one_phrase: an item is a sample with one of its phrases, drawn anew at every access, as in training; else each of them.
    augment: None, 'paper' or 'ours', for split 'train' alone.
    skip_missing: samples whose files are missing are left out, and their number is printed, instead of an error.
    """
    if augment not in (None, "paper", "ours") or (augment and split != "train"):
        raise ValueError(f"augment={augment!r} for split {split!r}: 'paper' and 'ours' are for train")
    name, root, everything = read_samples(data)
    splits = Counter(sample.split for sample in everything)
    if split is None:
        split = "test" if any(map(is_test, splits)) else "val"
    samples = [s for s in everything if s.split == split or (split == "test" and is_test(s.split))]
    if not samples:
        known = ", ".join(f"{key} ({n:,})" for key, n in splits.items()) or "none"
        raise UserError(f"{root} has no samples in split {split!r}, its splits are: {known}.")
    missing = missing_files(samples)
    absent = {number for numbers in missing.values() for number in numbers}
    if len(absent) == len(samples) or (missing and not skip_missing):
        listed = ", ".join(list(missing)[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(f"{len(missing):,} files of split {split!r} are missing ({listed}): fetch them, or leave out "
                        f"their {len(absent):,} of {len(samples):,} samples with --skip-missing.")
    if missing:
        print(f"{name} {split}: left out {len(absent):,} of {len(samples):,} samples, whose files are missing")
        samples = [sample for number, sample in enumerate(samples) if number not in absent]
    return ReferringDataset(name, root, split, samples, image_size, encoder_size, one_phrase, augment, seed)


# Augmentation, in training only.

HORIZONTAL = {"left": "right", "leftmost": "rightmost", "leftward": "rightward", "leftwards": "rightwards"}
VERTICAL = {"upper": "lower", "uppermost": "lowermost", "top": "bottom", "topmost": "bottommost",
            "above": "below", "upward": "downward", "upwards": "downwards"}
ENDINGS = ("", "ern", "ernmost", "most", "ward", "wards", "erly")  # of compass words
HORIZONTAL |= {f"{ns}east{end}": f"{ns}west{end}" for end in ENDINGS for ns in ("", "north", "south")}
VERTICAL |= {f"north{ew}{end}": f"south{ew}{end}" for end in ENDINGS for ew in ("", "east", "west")}
SWAPS = [words | {b: a for a, b in words.items()} for words in (HORIZONTAL, VERTICAL)]
# What a flip would make wrong and no swap of words mends: turns and clock directions, rows counted from a side that
# isn't said; 'right next to', 'on top of', which are no places in the image; 'topleft' and 'NE', written otherwise; and
# the commonest places in other languages than English, which alone is swapped.
FIXED = r"clock|\b(?:first|second|third|fourth|fifth|last)\b(?!.*\bfrom\b)|\b[ns][ew]\b"
FIXED = [re.compile(rf"{FIXED}|\bright (?:next|beside|behind|above|below|under|after|before|angle)"
                    r"|(?<!b)(?:left|right)(?!(?:most|wards?)?\b)|(?!bright|upright)\b\w+(?:left|right)"
                    r"|\b(?:izquierd|derech|esquerd|direit|sinistr|destr|droit|gauche|links|rechts)", re.IGNORECASE),
         re.compile(rf"{FIXED}|\bon top of\b|\b(?:up|down|upside|beneath|under|underneath)\b"
                    r"|\b(?:top|bottom|upper|lower)(?!(?:most)?\b)|\B(?<!s)top\b"
                    r"|\b(?:superior|inferior|arriba|abajo|cima|baixo|alto|basso|haut|bas|oben|unten)\b", re.IGNORECASE)]


def flip_phrase(phrase: str, horizontal: bool, vertical: bool) -> str:
    """The phrase with its position words (left, upper, north-east ...) swapped as the flips swap the image."""
    def swap(match):
        word = new = match.group()
        for flipped, words in zip((horizontal, vertical), SWAPS):
            new = words.get(new.lower(), new) if flipped else new
        return new.upper() if word.isupper() else new.capitalize() if word.istitle() else new
    return re.sub("[A-Za-z]+", swap, phrase)


def augment_ours(
    image: np.ndarray, mask: np.ndarray, phrase: str, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, str]:
    """Flips that swap the phrase's position words too, mild colour, and black squares on every fifth image."""
    flips = [rng.random() < 0.5 and phrase.isascii() and not fixed.search(phrase) for fixed in FIXED]
    if any(flips):
        code = {(True, False): 1, (False, True): 0, (True, True): -1}[tuple(flips)]
        image, mask, phrase = cv2.flip(image, code), cv2.flip(mask, code), flip_phrase(phrase, *flips)
    brightness, contrast, colour = rng.uniform(0.8, 1.2, 3)
    mix = contrast * brightness * (colour * np.eye(3) + (1 - colour) * np.array([0.299, 0.587, 0.114]))
    image = cv2.transform(image, np.c_[mix, np.full(3, 128 * (1 - contrast))])
    if rng.random() < 0.2:
        height, width = image.shape[:2]
        black_squares(image, rng, max(1, min(height, width) // 25), height, width)  # 32 at RRSIS-D's 800
    return image, mask, phrase


def black_squares(image: np.ndarray, rng: np.random.Generator, side: int, height: int, width: int) -> None:
    """Paint 20 to 60 black squares into the image (H, W, 3), each within height x width pixels."""
    for _ in range(rng.integers(20, 61)):
        y, x = rng.integers(max(1, height - side + 1)), rng.integers(max(1, width - side + 1))
        image[y : y + side, x : x + side] = 0


class ReferringDataset(torch.utils.data.Dataset):
    """One split of a data set; made by open_dataset.

    With one_phrase an item is a sample with one of its phrases, drawn anew at every access; otherwise each phrase of
    each sample is an item. A key is an index or a pair (index, epoch): with the seed it fixes all that is random, whatever
    the worker. An item is a dict; UserError if its files are broken:

        id, file, phrase, kind, category   str; file is the image's path
        scene                              str; one for all copies of an image (RefSegRS has a file for each phrase)
        image           uint8 (3, image_size, image_size)       RGB, aspect ratio not kept
        encoder_image   uint8 (3, encoder_size, encoder_size)   the same picture
        target          uint8 (image_size, image_size)          1 = foreground
        mask            uint8 (H, W)                            1 = foreground, at the size stored (flipped if they are)
    """

    def __init__(
        self, name: str, root: Path, split: str, samples: list[Sample], image_size: int, encoder_size: int,
        one_phrase: bool, augment: str | None, seed: int,
    ):  # fmt: skip
        self.name, self.root, self.split, self.samples = name, root, split, samples
        self.image_size, self.encoder_size, self.augment, self.seed = image_size, encoder_size, augment, seed
        self.one_phrase = one_phrase
        self.items = [(i, j) for i, sample in enumerate(samples) for j in range(len(sample.phrases))]
        self.marked = set()
        if augment == "paper" and name == "RRSIS-D":  # the published loader marks a fixed fifth, of this data set only
            self.marked = set(random.Random(2401).sample(range(len(samples)), int(0.2 * len(samples))))
        cv2.setNumThreads(0)  # OpenCV's threads don't survive the fork into a DataLoader's workers

    def __len__(self) -> int:
        return len(self.samples) if self.one_phrase else len(self.items)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        index, epoch = key if isinstance(key, (list, tuple)) else (key, 0)
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        rng = np.random.default_rng([self.seed, epoch, index])
        i, j = (index, rng.integers(len(self.samples[index].phrases))) if self.one_phrase else self.items[index]
        sample = self.samples[i]
        phrase = sample.phrases[j]
        try:
            image = read_image(sample.image)
            mask = load_mask(sample, image.shape[:2])
        except ValueError as error:
            raise UserError(f"Sample {sample.id} of {self.name} ({sample.image}) is broken: {error}.") from None
        scene = hashlib.blake2b(image[::4, ::4].tobytes(), digest_size=8).hexdigest()
        if self.augment == "ours":
            image, mask, phrase = augment_ours(image, mask, phrase, rng)
        elif i in self.marked:
            width = image.shape[1]
            black_squares(image, rng, 32, width, width)  # the published loader takes the width for the height too
        return {"id": sample.id, "file": sample.image, "scene": scene, "phrase": phrase, "kind": sample.kinds[j],
                "category": sample.category,
                "image": resize_image(image, self.image_size), "encoder_image": resize_image(image, self.encoder_size),
                "target": resize_mask(mask, self.image_size), "mask": torch.from_numpy(mask)}


class TrainingOrder(torch.utils.data.Sampler):
    """A DataLoader's batch_sampler: one endless stream of samples, pass after pass over the shuffled set, cut into batches,
    and of every batch the part of one rank.

    Position n of the stream belongs to pass n // size; its key is (index, pass), so an item's phrase and augmentation depend
    on the seed and the key alone, not on workers, interruptions or the number of processes. Batches begin at the
    positions `start`, start + batch_size, ... below `stop`; batch_size must be a multiple of `ranks`.
    """

    def __init__(self, size: int, seed: int, start: int, stop: int, batch_size: int, rank: int = 0, ranks: int = 1):
        self.size, self.seed, self.starts = size, seed, range(start, stop, batch_size)
        self.part = range(batch_size * rank // ranks, batch_size * (rank + 1) // ranks)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        number, order = -1, None
        for start in self.starts:
            keys = []
            for n in (start + offset for offset in self.part):
                if n // self.size != number:
                    number = n // self.size
                    order = np.random.default_rng([self.seed, number]).permutation(self.size)
                keys.append((int(order[n % self.size]), number))
            yield keys


class Collate:
    """Items -> batch: image, encoder_image, target stacked; 'ids' int64 (B, L) and 'lengths' int64 (B,) as
    tokenizer(phrases) gives them; lists of id, file, scene, phrase, kind, category and mask, whose sizes may differ."""

    def __init__(self, tokenizer: Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]]):
        self.tokenizer = tokenizer

    def __call__(self, items: list[dict]) -> dict:
        batch = {key: [item[key] for item in items] for key in items[0]}
        batch |= {key: torch.stack(batch[key]) for key in ("image", "encoder_image", "target")}
        batch["ids"], batch["lengths"] = self.tokenizer(batch["phrase"])
        return batch


def main() -> None:
    args = command_line().parse_args()
    with exit_on_user_error("data.py"):
        if args.download:
            args.check = download(args.download)
        if args.check is None:
            return
        from encoder import OpenCLIPTokenizer  # takes seconds, which --help need not

        tokenizer = OpenCLIPTokenizer(context=77)
        check(args.check, args.sheet, tokenizer.length, tokenizer.context, args.sample, args.strict)


if __name__ == "__main__":
    main()
