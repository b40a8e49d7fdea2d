"""Which bands of an image are looked at, and how their values become 8 bits."""

import numpy as np

from runtime.errors import UserError

LARGEST = 1e30  # a float beyond it is a fill value that the file does not declare, as -3.4e38
NO_ALPHA = "Band 4 is tagged as alpha, but holds more than 0 and the highest value, so it was taken for a colour band."


def is_alpha(values: np.ndarray, highest: float) -> bool:
    """Whether a band of a TIFF that is tagged as alpha is one: it holds 0 and the highest value alone.

    GDAL tags every fourth band so that it writes, near infrared too."""
    return bool(np.isin(values, (0, highest)).all())


def pick_bands(bands: tuple[int, ...] | None, count: int, name: str) -> list[int]:
    """0-based numbers of three bands for RGB: the first three of `count`, or the first one thrice (grey)."""
    bands = bands or ((1, 2, 3) if count >= 3 else (1,))
    if len(bands) not in (1, 3) or not all(1 <= band <= count for band in bands):
        raise UserError(f"{name} has {count} bands: bands {','.join(map(str, bands))} are not one or three of them.")
    return [band - 1 for band in (bands * 3)[:3]]


def finite(pixels: np.ndarray) -> np.ndarray:
    """bool (H, W): where every band of (H, W, C) holds a number that is no fill value."""
    return (np.abs(pixels) < LARGEST).all(axis=2)  # False for NaN


def stretch_limits(pixels: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    """float64 (2, C): the 2nd and 98th percentile of each band of (H, W, C), where `valid` (H, W)."""
    seen = pixels.reshape(-1, pixels.shape[-1]) if valid is None else pixels[valid]
    return np.percentile(seen.astype(np.float64), (2, 98), axis=0) if len(seen) else np.array([[0.0], [1.0]])


def stretch(pixels: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """(H, W, C) of any depth -> uint8, the limits becoming 0 and 255; where they are one value, what is above it is 255."""
    low, high = limits
    within = np.clip(np.nan_to_num(pixels.astype(np.float64)), low, np.where(high > low, high, np.inf)) - low
    return np.minimum(within * (255 / np.where(high > low, high - low, 1e-9)), 255).round().astype(np.uint8)
