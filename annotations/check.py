"""`python data.py --check DATA`: what is in a data set, and what is wrong with it."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from annotations.layouts import Sample, missing_files, read_samples
from annotations.masks import load_mask, survives_encoding
from imagery.pictures import captioned, fitted, grid, outlined
from imagery.pixels import read_image
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
    cells = check_files(random.Random(0).sample(there, min(200, len(there))))
    if cells:
        picture = Image.fromarray(grid([cells[i : i + 4] for i in range(0, len(cells), 4)]))
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
    """Decode images and masks and print what they are like -> pictures of the first 16, phrase below, mask outlined."""
    sizes, percent, cells, broken, resized, odd = Counter(), [], [], [], 0, 0
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
        if len(cells) < 16:
            picture = outlined(fitted(image, 320, 320), mask, colour=(255, 0, 0))
            cells.append(captioned(picture, sample.phrases[0], below=True, lines=3))
    print(f"  broken: {len(broken)} of {len(samples)} decoded", *broken[:5], sep="\n    ")
    if cells:
        print("  image sizes:", ", ".join(f"{size} ({n})" for size, n in sizes.most_common(5)))
        quartiles = ", ".join(f"{value:.2f} %" for value in np.percentile(percent, (25, 50, 75)))
        print(f"  mask's share of the image, quartiles: {quartiles}")
        print(f"  masks of another size than their image: {resized}; RLEs that encoding their mask doesn't give: {odd}")
    return cells
