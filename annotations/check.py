"""`python data.py --check DATA`: what is in a data set, and what is wrong with it."""

import random
import textwrap
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from annotations.layouts import Sample, missing_files, read_samples
from annotations.masks import load_mask, survives_encoding
from imagery.pixels import read_image, resize_image, resize_mask
from runtime.run_folder import free_path, write_whole


def check(data: str | Path, sheet: str | Path) -> None:
    """Print what is in a data set and what is wrong with it; draw 16 samples into a new file named like `sheet`."""
    name, root, samples = read_samples(data)
    print(f"{name} at {root}")
    print_index(samples)
    missing = missing_files(samples)
    print(f"  missing files: {len(missing):,}", *list(missing)[:5], sep="\n    ")
    absent = {number for numbers in missing.values() for number in numbers}
    there = [sample for number, sample in enumerate(samples) if number not in absent]
    thumbnails = check_files(random.Random(0).sample(there, min(200, len(there))))
    if thumbnails:
        thumbnails += [np.full_like(thumbnails[0], 255)] * (-len(thumbnails) % 4)
        picture = Image.fromarray(np.vstack([np.hstack(thumbnails[i : i + 4]) for i in range(0, len(thumbnails), 4)]))
        path = free_path(Path(sheet))
        write_whole(path, lambda file: picture.save(file, "PNG"))
        print(f"  contact sheet: {path}")


def print_index(samples: list[Sample]) -> None:
    """What the index files say: splits, phrases, categories."""
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


def check_files(samples: list[Sample]) -> list[np.ndarray]:
    """Decode all images and masks, print what they are like -> pictures of the first 16."""
    sizes, percent, thumbnails, broken, resized, odd = Counter(), [], [], [], 0, 0
    for sample in samples:
        try:
            image = read_image(sample.image)
            mask = load_mask(sample, image.shape[:2])
        except ValueError as error:
            broken.append(f"{sample.id}: {error}")
            continue
        sizes[f"{image.shape[1]} x {image.shape[0]}"] += 1
        percent.append(100 * mask.mean())
        resized += mask.shape != image.shape[:2]
        odd += not all(survives_encoding(part) for part in sample.mask if isinstance(part, dict))
        if len(thumbnails) < 16:
            thumbnails.append(thumbnail(image, mask, sample.phrases[0]))
    print(f"  broken: {len(broken)} of {len(samples)} decoded", *broken[:5], sep="\n    ")
    if thumbnails:
        print("  image sizes:", ", ".join(f"{size} ({n})" for size, n in sizes.most_common(5)))
        quartiles = ", ".join(f"{value:.2f} %" for value in np.percentile(percent, (25, 50, 75)))
        print(f"  mask's share of the image, quartiles: {quartiles}")
        print(f"  masks of another size than their image: {resized}; RLEs that encoding their mask does not give: {odd}")
    return thumbnails


def thumbnail(image: np.ndarray, mask: np.ndarray, phrase: str, size: int = 320) -> np.ndarray:
    """uint8 RGB (size + 64, size, 3): the image with the mask's outline in red, the phrase below."""
    picture = resize_image(image, size).permute(1, 2, 0).contiguous().numpy()
    outlines, _ = cv2.findContours(resize_mask(mask, size).numpy(), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, outlines, -1, (255, 0, 0), 2)
    picture = cv2.copyMakeBorder(picture, 0, 64, 0, 0, cv2.BORDER_CONSTANT, value=(255, 255, 255))
    for row, line in enumerate(textwrap.wrap(phrase, 46)[:3]):
        cv2.putText(picture, line, (4, size + 18 + 18 * row), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return picture
