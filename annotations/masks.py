"""Masks of referring data sets: from a file, COCO RLEs or polygons to an array. What goes wrong is a ValueError."""

import cv2
import numpy as np
from pycocotools import mask as coco

from imagery.pixels import MAX_PIXELS, decode


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
