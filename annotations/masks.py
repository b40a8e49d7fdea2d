"""Masks of referring data sets: from a file, COCO RLEs or polygons to an array. What goes wrong is a ValueError."""

import re

import numpy as np
from pycocotools import mask as coco

from annotations.layouts import Sample
from imagery.pixels import MAX_PIXELS, decode

# The numbers of a compressed RLE: of each character's six bits the highest says whether the number goes on.
NUMBERS = re.compile("(?:[P-o]{0,6}[0-O])+")


def load_mask(sample: Sample, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W) of 0/1 as stored; `size` (H, W) is the image's, and the mask's where the data set gives none."""
    if isinstance(sample.mask, str):
        image = decode(sample.mask, any_depth=True)
        (width, height), (rows, columns) = image.size, size
        if abs(height * columns / (width * rows) - 1) > 0.05:  # real ones are a few rows off
            raise ValueError(f"{sample.mask} ({width} x {height}) and the image ({columns} x {rows}, unturned) differ in shape")
        grey = image.mode[0] in "IF" or image.mode == "L"
        pixels = np.asarray(image) if grey else np.asarray(image.convert("RGB")).max(axis=2)  # any colour; not alpha
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


def decode_rle(rle: dict) -> np.ndarray:
    """COCO RLE {'size': [H, W], 'counts': str or list of int} -> uint8 (H, W) of 0/1.

    pycocotools writes past its memory where a string's last number goes on (hence NUMBERS), and leaves memory as it was
    where the runs add up to too little (hence `fits`: runs that fill the mask don't fit into one pixel less)."""
    try:
        rle = compressed(rle)
        height, width = rle["size"]
        if not NUMBERS.fullmatch(rle["counts"]) or fits(rle | {"size": [1, height * width - 1]}):
            raise ValueError
        return np.ascontiguousarray(coco.decode(rle))
    except (KeyError, OverflowError, TypeError, ValueError):
        raise ValueError("the mask is not RLE, or its runs don't add up to its size") from None


def compressed(rle: dict) -> dict:
    """The RLE with its size as integers, at most MAX_PIXELS, and its counts as a string."""
    height, width = size = [int(side) for side in rle["size"]]
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError
    counts = rle["counts"]
    if isinstance(counts, list):
        counts = coco.frPyObjects({"size": size, "counts": counts}, height, width)["counts"].decode()
    return {"size": size, "counts": counts}


def fits(rle: dict) -> bool:
    try:
        coco.decode(rle)
    except ValueError:
        return False
    return True


def survives_encoding(rle: dict) -> bool:
    """Whether encode(decode(rle)) is the same RLE; one with runs of length 0 is not."""
    encoded = coco.encode(np.asfortranarray(decode_rle(rle)))
    return encoded | {"counts": encoded["counts"].decode()} == compressed(rle)


def draw_polygon(polygon: list, height: int, width: int) -> np.ndarray:
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
    return np.ascontiguousarray(coco.decode(coco.frPyObjects([points.tolist()], height, width))[..., 0])
