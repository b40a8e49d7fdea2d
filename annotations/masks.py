"""Masks of referring data sets: from a file, COCO RLEs or polygons to an array. What goes wrong is a ValueError."""

import functools
import re

import cv2
import numpy as np
from pycocotools import mask as coco

from annotations.layouts import Sample
from imagery.pixels import MAX_PIXELS, decode

# The numbers of a compressed RLE: of each character's six bits the highest says whether the number goes on.
NUMBERS = re.compile("(?:[P-o]{0,6}[0-O])+")


class ShapeError(ValueError):
    """A mask that can't lie on its image."""


def load_mask(sample: Sample, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W) of 0/1 as stored; `size` (H, W) is the image's, and the mask's where the data set gives none."""
    if isinstance(sample.mask, str):
        return load_mask_file(sample.mask, sample.threshold, size)
    if not sample.mask:
        return np.zeros(size, np.uint8)
    try:
        return draw_parts(sample.mask, sample.size or size, size)
    except ValueError as error:
        ids = sample.annotation if isinstance(sample.annotation, list) else [sample.annotation]
        kind = ShapeError if isinstance(error, ShapeError) else ValueError
        raise kind(f"annotation {', '.join(map(str, ids))}: {error}") from None


def load_mask_file(path: str, threshold: int | None, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W) of 0/1: what is brighter than `threshold`, or, where that is None, not black and of one colour."""
    image = decode(path, any_depth=True)
    check_shape(path, (image.height, image.width), size)
    grey = image.mode[0] in "IF" or image.mode == "L"
    pixels = np.asarray(image if grey else image.convert("RGB"))  # any colour; not alpha
    if threshold is None:
        check_colours(path, pixels)
    pixels = pixels if grey else np.maximum.reduce(cv2.split(pixels))  # (H, W), faster than max(axis=2)
    return (pixels > (threshold if threshold and pixels.max() > 1 else 0)).astype(np.uint8)  # 0 and 1 alone: 1 is foreground


def holds_zeros_and_ones(sample: Sample) -> bool:
    """Whether the mask is a file of 0 and 1 where its layout has brighter ones."""
    if not (sample.threshold and isinstance(sample.mask, str)):
        return False
    return decode(sample.mask, any_depth=True).convert("L").getextrema() == (0, 1)


def check_shape(what: str, shape: tuple[int, int], size: tuple[int, int]) -> None:
    """ShapeError where a mask of `shape` (H, W) is no mask of an image of `size`; real ones are a few rows off."""
    (height, width), (rows, columns) = shape, size
    turned = shape == size[::-1] != size
    if turned or abs(height * columns / (width * rows) - 1) > 0.05:
        hint = ": height and width are swapped" if turned else ""
        raise ShapeError(f"{what} ({width} x {height}) and the image ({columns} x {rows}, unturned) differ in shape{hint}")


def check_colours(path: str, pixels: np.ndarray) -> None:
    """ValueError for a map of several targets or classes, uint8 (H, W, 3) or any grey (H, W), instead of one target's mask."""
    coloured = pixels.ndim == 3
    codes = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGRA).view("<u4")[..., 0] & 0xFFFFFF if coloured else pixels  # (H, W)
    if ((codes == 0) | (codes == codes.max())).all():
        return
    codes, counts = np.unique(codes[codes != 0], return_counts=True)
    colours = codes[:, None] >> [16, 8, 0] & 255 if coloured else codes[:, None]  # (N, 3) or (N, 1)
    brightness = colours.max(axis=1).astype(float)
    top = counts.argmax()
    # A soft edge: many shades of one colour, of which the brightest is the commonest.
    one_hue = np.abs(colours * brightness[top] - colours[top] * brightness[:, None]).max() <= 2 * brightness[top]
    if len(codes) > 8 and one_hue and brightness[top] == brightness.max():
        return
    names = [f"#{code:06x}" if coloured else f"{code}" for code in codes[np.argsort(-counts, kind="stable")]]
    listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    raise ValueError(f"{path} has {len(names)} colours beside black ({listed}): make a mask of one colour for each target")


def draw_parts(parts: tuple, canvas: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """RLEs, and polygons on a canvas (H, W) -> their union, uint8 (H, W), on an image of `size`.

    The published loader keeps pixels that exactly one part covers, and so drops those that two cover."""
    height, width = canvas
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"instances.json gives the image {height} x {width} pixels")
    planes = [decode_rle(part) for part in parts if isinstance(part, dict)]
    planes += [draw_polygon(part, height, width) for part in parts if isinstance(part, list)]
    if len({plane.shape for plane in planes}) > 1:
        raise ValueError("the parts of the mask differ in size")
    check_shape("the mask", planes[0].shape, size)
    return functools.reduce(np.maximum, planes)


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
    corners = points.reshape(-1, 2).min(0), points.reshape(-1, 2).max(0)  # (left, top), (right, bottom)
    if (corners[1] < 0).any() or (corners[0] > (width, height)).any():
        raise ValueError("the mask has a polygon outside of the image")
    # On the least canvas that holds it, then of that its own box; drawn elsewhere, a polygon can come out a pixel different.
    left, top = np.maximum(corners[0] - 1, 0).astype(int)
    right, bottom = np.minimum(corners[1] + 2, (width, height)).astype(int)
    drawn = coco.decode(coco.frPyObjects([points.tolist()], bottom, right))[..., 0]
    plane = np.zeros((height, width), np.uint8)
    plane[top:bottom, left:right] = drawn[top:, left:]
    return plane
