"""Data sets of referring segmentation, from samples to batches: decoding, preparation, augmentation, collation.

    python data.py --check RRSIS-D            statistics and a contact sheet of a data set, by name or by path

Which samples a data set has is read by layouts.py. Files that are broken raise DataError with the sample's name.
"""

import argparse
import hashlib
import io
import random
import re
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco

from layouts import NAMES, DataError, NoSamples, file_bytes, missing_files, read_samples
from runs import free_path

MAX_PIXELS = 2**26  # 8192 x 8192: a file that claims more is taken for a decompression bomb


def open_dataset(
    data, split, *, image_size=1024, encoder_size=224, one_phrase=False, augment=None, seed=0, skip_missing=False
):
    """The split of a data set as a ReferringDataset; DataError if it can't be had.

    data: a name (its folder is in ./data) or a folder's path. split: 'train' and 'val' are matched exactly, 'test' takes every
    split with 'test' in its name. one_phrase, as in training: an item is a sample with one of its phrases, drawn anew at every
    access, instead of every phrase. augment, in training only: None, 'paper' or 'ours'. skip_missing: samples whose files are
    missing are left out, and how many is printed, instead of an error.
    """
    if augment not in (None, "paper", "ours") or (augment and split != "train"):
        raise ValueError(f"augment={augment!r} for split {split!r}: 'paper' and 'ours' are for train")
    name, root, everything = read_samples(data)
    splits = Counter(sample.split for sample in everything)
    samples = [s for s in everything if s.split == split or (split == "test" and "test" in s.split)]
    if not samples:
        known = ", ".join(f"{key} ({n:,})" for key, n in splits.items()) or "none"
        raise NoSamples(f"{root} has no samples in split {split!r}, its splits are: {known}.")
    missing = missing_files(samples)
    absent = {number for numbers in missing.values() for number in numbers}
    if len(absent) == len(samples) or (missing and not skip_missing):
        listed = ", ".join(list(missing)[:5]) + (", ..." if len(missing) > 5 else "")
        raise DataError(f"{len(missing):,} files of split {split!r} are missing ({listed}): fetch them, or leave out "
                        f"their {len(absent):,} of {len(samples):,} samples with --skip-missing.")
    if missing:
        print(f"{name} {split}: left out {len(absent):,} of {len(samples):,} samples, whose files are missing")
        samples = [sample for number, sample in enumerate(samples) if number not in absent]
    return ReferringDataset(name, root, split, samples, splits, image_size, encoder_size, one_phrase, augment, seed)


# From files to arrays. What goes wrong here is a ValueError that names the file; the data set adds the sample.


def decode(path, flags, limit=MAX_PIXELS):
    """The pixels of an image file as cv2 gives them: (H, W) or, with channels in the order BGRA, (H, W, 3 or 4)."""
    try:
        data = file_bytes(path)
        with Image.open(io.BytesIO(data)) as header:  # reads no more than the header
            (width, height), kind = header.size, header.format
    except Image.DecompressionBombError:
        raise ValueError(f"{path} claims more than {limit:,} pixels") from None
    except Exception as error:  # a hostile header can raise nearly anything
        other = ", or not 8-bit grey or RGB" if str(path).lower().endswith((".tif", ".tiff")) else ""
        raise ValueError(f"{path} can't be read: {getattr(error, 'strerror', None) or f'not a sound image{other}'}") from None
    if width * height > limit:
        raise ValueError(f"{path} claims {width} x {height} pixels, more than {limit:,}")
    if kind in ("JPEG", "MPO") and not ends(data):  # it decodes, with grey for the rest; other formats fail by themselves
        raise ValueError(f"{path} is cut off")
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise ValueError(f"{path} is damaged or of an unknown format")
    return pixels


def ends(jpeg):
    """Whether an end marker, FFD9, comes after the start of the first scan, FFDA. What goes before a scan, a thumbnail with
    markers of its own perhaps, is passed over segment by segment; what follows the end does not matter."""
    place = 2
    while jpeg[place : place + 1] == b"\xff" and jpeg[place + 1 : place + 2] != b"\xda":
        place += 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
    return jpeg.find(b"\xff\xd9", place) >= 0


def read_image(path):
    """uint8 RGB (H, W, 3): grayscale becomes RGB; EXIF rotation is ignored, since masks aren't rotated."""
    pixels = decode(path, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels.dtype != np.uint8:  # 12 bits in 16 would come out black
        raise ValueError(f"{path} has {8 * pixels.itemsize} bits a channel: stretch it to 8-bit RGB, all of a set alike")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def load_mask(sample, size):
    """uint8 (H, W) of 0/1 as stored; `size` (H, W) is the image's, and the mask's where the data set gives none."""
    if isinstance(sample.mask, str):
        pixels = decode(sample.mask, cv2.IMREAD_UNCHANGED)
        (height, width), (rows, columns) = pixels.shape[:2], size
        if abs(height * columns / (width * rows) - 1) > 0.05:  # real ones are a few rows off
            raise ValueError(f"{sample.mask} ({width} x {height}) and the image ({columns} x {rows}, unturned) differ in shape")
        pixels = pixels if pixels.ndim == 2 else pixels[..., :3].max(axis=2)  # any colour, a palette's too; not alpha
        return (pixels > sample.threshold).astype(np.uint8)
    # The union: the published loader keeps pixels that exactly one part covers, and so drops those that two cover.
    height, width = sample.size or size
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"instances.json gives the image {height} x {width} pixels")
    planes = [decode_rle(part) for part in sample.mask if isinstance(part, dict)]
    planes += [draw_polygon(part, height, width) for part in sample.mask if isinstance(part, list)]
    if len({plane.shape for plane in planes}) > 1:
        raise ValueError("the parts of the mask differ in size")
    return np.maximum.reduce(planes) if planes else np.zeros((height, width), np.uint8)


def decode_rle(rle):
    """COCO RLE {'size': [H, W], 'counts': str or list} -> uint8 (H, W) of 0/1. Not by pycocotools, which reads past
    the end of a string whose last number goes on, and takes runs that add up to too little without a word."""
    try:
        height, width = map(int, rle["size"])
        counts = rle["counts"]
        counts = rle_counts(counts) if isinstance(counts, str) else np.asarray(counts, np.int64)
        sound = 0 < height * width <= MAX_PIXELS and 0 <= counts.min() and counts.max() <= MAX_PIXELS
        sound = sound and counts.ndim == 1 and counts.sum() == height * width
    except (KeyError, OverflowError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError("the mask is not RLE, or its runs don't add up to its size")
    runs = (np.arange(len(counts)) & 1).astype(np.uint8)  # background first, column by column
    return np.ascontiguousarray(np.repeat(runs, counts).reshape(width, height).T)


def rle_counts(text):
    """int64 (n,) run lengths of a compressed RLE. A character from '0' on holds 5 bits, the lowest first, and a sixth
    that says whether the number goes on; from the fourth on, numbers are differences to the one two before."""
    bits = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    last = bits & 32 == 0
    start = np.flatnonzero(np.r_[True, last[:-1]])
    place = np.arange(len(bits)) - np.repeat(start, np.diff(np.r_[start, len(bits)]))
    if bits.min() < 0 or bits.max() > 63 or not last[-1] or place.max() > 6:
        raise ValueError("not a compressed RLE")
    counts = np.add.reduceat((bits & 31) << 5 * place, start) - np.where(bits[last] & 16, 32 << 5 * place[last], 0)
    counts[1::2], counts[2::2] = np.cumsum(counts[1::2]), np.cumsum(counts[2::2])
    return counts


def draw_polygon(polygon, height, width):
    """[x0, y0, x1, y1, ...] -> uint8 (H, W) of 0/1; what lies outside is cut off."""
    try:
        points = np.asarray(polygon, np.float64)
        sound = points.ndim == 1 and len(points) >= 6 and len(points) % 2 == 0
        # pycocotools reserves memory by the length of the edges
        sound = sound and np.abs(points).max() < 2**16 and np.abs(np.diff(points.reshape(-1, 2), axis=0)).sum() < 2**20
    except (OverflowError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError("the mask has a polygon that is not a list of 3 or more points near the image")
    (left, top), (right, bottom) = points.reshape(-1, 2).min(0), points.reshape(-1, 2).max(0)
    if right < 0 or bottom < 0 or left > width or top > height:
        raise ValueError("the mask has a polygon outside of the image")
    (rle,) = coco.frPyObjects([points.tolist()], height, width)
    return decode_rle({"size": rle["size"], "counts": rle["counts"].decode()})


def resize_image(image, size):
    """uint8 (H, W, 3) -> uint8 tensor (3, size, size): bilinear with antialias, within 1/255 of PIL's."""
    if size >= max(image.shape[:2]):  # nothing to smooth where an image grows: plain bilinear is the same, and faster
        planes = np.empty((3, size, size), np.uint8)
        for plane, channel in zip(planes, cv2.split(image)):
            cv2.resize(channel, (size, size), dst=plane, interpolation=cv2.INTER_LINEAR)
        return torch.from_numpy(planes)
    if size > min(image.shape[:2]):  # one side grows, one shrinks: rare, and torch is up to 2/255 off there
        image = np.array(Image.fromarray(image).resize((size, size), Image.BILINEAR))
        return torch.from_numpy(image).permute(2, 0, 1).contiguous()
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]  # uint8, channels last: torch has a fast path for that
    return F.interpolate(planes, size=(size, size), mode="bilinear", antialias=True)[0].contiguous()


def resize_mask(mask, size):
    """uint8 (H, W) -> uint8 tensor (size, size): PIL's nearest, from which torch's 'nearest-exact' can be a row off."""
    return torch.from_numpy(np.array(Image.fromarray(mask).resize((size, size), Image.NEAREST)))


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


def flip_phrase(phrase, horizontal, vertical):
    """The phrase with its position words (left, upper, north-east ...) swapped as the flips swap the image."""
    def swap(match):
        word = new = match.group()
        for flipped, words in zip((horizontal, vertical), SWAPS):
            new = words.get(new.lower(), new) if flipped else new
        return new.upper() if word.isupper() else new.capitalize() if word.istitle() else new
    return re.sub("[A-Za-z]+", swap, phrase)


def augment_ours(image, mask, phrase, rng):
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


def black_squares(image, rng, side, height, width):
    """Paint 20 to 60 black squares into the image (H, W, 3), each within height x width pixels."""
    for _ in range(rng.integers(20, 61)):
        y, x = rng.integers(max(1, height - side + 1)), rng.integers(max(1, width - side + 1))
        image[y : y + side, x : x + side] = 0


class ReferringDataset(torch.utils.data.Dataset):
    """One split of a data set; made by open_dataset.

    With one_phrase an item is a sample with one of its phrases, drawn anew at every access; otherwise each phrase of
    each sample is an item. A key is an index or a pair (index, epoch): with the seed it fixes all that is random, whatever
    the worker. An item is a dict; DataError if its files are broken:

        id, file, phrase, kind, category   str; file is the image's path
        scene                              str; one for all copies of an image (RefSegRS has a file for each phrase)
        image           uint8 (3, image_size, image_size)       RGB, aspect ratio not kept
        encoder_image   uint8 (3, encoder_size, encoder_size)   the same picture
        target          uint8 (image_size, image_size)          1 = foreground
        mask            uint8 (H, W)                            1 = foreground, at the size stored (flipped if they are)
    """

    def __init__(self, name, root, split, samples, splits, image_size, encoder_size, one_phrase, augment, seed):
        self.name, self.root, self.split, self.samples = name, root, split, samples
        self.image_size, self.encoder_size, self.augment, self.seed = image_size, encoder_size, augment, seed
        self.split_sizes = splits
        self.one_phrase = one_phrase
        self.items = [(i, j) for i, sample in enumerate(samples) for j in range(len(sample.phrases))]
        self.marked = set()
        if augment == "paper" and name == "RRSIS-D":  # the published loader marks a fixed fifth, of this data set only
            self.marked = set(random.Random(2401).sample(range(len(samples)), int(0.2 * len(samples))))
        cv2.setNumThreads(0)  # OpenCV's threads don't survive the fork into a DataLoader's workers

    def splits(self):
        """{split: its samples, those with missing files included} of the whole data set."""
        return dict(self.split_sizes)

    def __len__(self):
        return len(self.samples) if self.one_phrase else len(self.items)

    def __getitem__(self, key):
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
            raise DataError(f"Sample {sample.id} of {self.name} ({sample.image}) is broken: {error}.") from None
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


class Timed:
    """A loader, and in `seconds` how long its user has waited for it so far, the start of its workers included."""

    def __init__(self, loader):
        self.loader, self.seconds = loader, 0.0

    def __iter__(self):
        asked = time.perf_counter()
        for batch in self.loader:
            self.seconds += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()


class Collate:
    """Items -> batch: image, encoder_image, target stacked; 'ids' int64 (B, L) and 'lengths' int64 (B,) as
    tokenizer(phrases) gives them; lists of id, file, scene, phrase, kind, category and mask, whose sizes may differ."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, items):
        batch = {key: [item[key] for item in items] for key in items[0]}
        batch |= {key: torch.stack(batch[key]) for key in ("image", "encoder_image", "target")}
        batch["ids"], batch["lengths"] = self.tokenizer(batch["phrase"])
        return batch


def check(data, sheet):
    """Print what is in a data set and what is wrong with it; draw 16 samples into a new file named like `sheet`."""
    name, root, samples = read_samples(data)
    print(f"{name} at {root}")
    splits = {}
    for sample in samples:
        splits.setdefault(sample.split, []).append(sample)
    for split, part in splits.items():
        words = [len(phrase.split()) for sample in part for phrase in sample.phrases]
        print(f"  {split}: {len(part):,} samples, {len(words):,} phrases of {min(words)} to {max(words)} words, "
              f"median {np.median(words):g}")
    shared = Counter(image for part in splits.values() for image in {sample.image for sample in part})
    print(f"  image files in more than one split: {sum(n > 1 for n in shared.values()):,} of {len(shared):,}")
    categories = Counter(sample.category or "unknown" for sample in samples).most_common()
    print("  categories:", ", ".join(f"{category} {n:,}" for category, n in categories))
    missing = missing_files(samples)
    print(f"  missing files: {len(missing):,}", *list(missing)[:5], sep="\n    ")
    absent = {number for numbers in missing.values() for number in numbers}
    there = [sample for number, sample in enumerate(samples) if number not in absent]
    sizes, shares, tiles, broken = Counter(), [], [], []
    for sample in random.Random(0).sample(there, min(200, len(there))):
        try:
            image = read_image(sample.image)
            mask = load_mask(sample, image.shape[:2])
        except ValueError as error:
            broken.append(f"{sample.id}: {error}")
            continue
        sizes[f"{image.shape[1]} x {image.shape[0]}"] += 1
        shares.append(100 * mask.mean())
        if len(tiles) < 16:
            tiles.append(tile(image, mask, sample.phrases[0]))
    print(f"  broken: {len(broken)} of {len(broken) + len(shares)} decoded", *broken[:5], sep="\n    ")
    if not tiles:
        return
    print("  image sizes:", ", ".join(f"{size} ({n})" for size, n in sizes.most_common(5)))
    quartiles = ", ".join(f"{share:.2f} %" for share in np.percentile(shares, (25, 50, 75)))
    print(f"  mask's share of the image, quartiles: {quartiles}")
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % 4)
    path = free_path(Path(sheet))
    Image.fromarray(np.vstack([np.hstack(tiles[i : i + 4]) for i in range(0, len(tiles), 4)])).save(path, "PNG")
    print(f"  contact sheet: {path}")


def tile(image, mask, phrase, size=320):
    """uint8 RGB (size + 64, size, 3): the image with the mask's outline in red, the phrase below."""
    picture = resize_image(image, size).permute(1, 2, 0).contiguous().numpy()
    outlines, _ = cv2.findContours(resize_mask(mask, size).numpy(), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, outlines, -1, (255, 0, 0), 2)
    picture = cv2.copyMakeBorder(picture, 0, 64, 0, 0, cv2.BORDER_CONSTANT, value=(255, 255, 255))
    for row, line in enumerate(textwrap.wrap(phrase, 46)[:3]):
        cv2.putText(picture, line, (4, size + 18 + 18 * row), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return picture


def main():
    parser = argparse.ArgumentParser(description="Check a data set: print statistics, draw a contact sheet.")
    parser.add_argument("--check", required=True, metavar="DATA", help=f"a folder, or one of {', '.join(NAMES)}")
    parser.add_argument("--sheet", default="data-check.png", help="contact sheet, a PNG; a new name is taken if it exists")
    args = parser.parse_args()
    try:
        check(args.check, args.sheet)
    except (DataError, OSError) as error:  # the latter of the sheet
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
