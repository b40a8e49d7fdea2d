"""Pixels of plain images: decoding, and resizing to what a model takes. Errors are ValueErrors that name the file."""

import io
import re
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from runtime.files import file_bytes

MAX_PIXELS = 2**26  # 8192 x 8192: a file that claims more is taken for a decompression bomb


def decode(path: str | Path, any_depth: bool = False) -> Image.Image:
    """The image in the file, decoded; the first one where there are several.

    any_depth: grey of more than 8 bits is taken too (modes I;16, I and F). More bits in colour, which Pillow would cut down to
    8 without a word, are always a ValueError, as are truncated files and those that claim more than MAX_PIXELS."""
    try:
        image = Image.open(io.BytesIO(file_bytes(path)))  # reads no more than the header
        too_large = image.width * image.height > MAX_PIXELS
    except Image.DecompressionBombError:
        too_large = True
    except Exception as error:  # a hostile header can raise nearly anything
        other = ", or not 8-bit grey or RGB" if str(path).lower().endswith((".tif", ".tiff")) else ""
        raise ValueError(f"{path} can't be read: {getattr(error, 'strerror', None) or f'not a sound image{other}'}") from None
    if too_large:
        raise ValueError(f"{path} claims more than {MAX_PIXELS:,} pixels")
    bits = 16 if re.search(";16[BLNS]", f"{image.tile}") or image.mode.startswith("I;16") else 32 if image.mode in "IF" else 8
    if bits > 8 and not (any_depth and image.mode[0] in "IF"):
        raise ValueError(f"{path} has {bits} bits a channel: stretch it to 8-bit RGB, all of a set alike")
    try:
        image.load()
    except Exception:
        raise ValueError(f"{path} is damaged or cut off") from None
    return image


def read_image(path: str | Path) -> np.ndarray:
    """uint8 RGB (H, W, 3): grayscale becomes RGB; EXIF rotation is ignored, since masks aren't rotated (a TIFF's own tag
    is obeyed by Pillow, in images and masks alike)."""
    return np.array(decode(path).convert("RGB"))


def resize_image(image: np.ndarray, size: int) -> torch.Tensor:
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


def resize_mask(mask: np.ndarray, size: int) -> torch.Tensor:
    """uint8 (H, W) -> uint8 tensor (size, size): PIL's nearest, from which torch's 'nearest-exact' can be a row off."""
    return torch.from_numpy(np.array(Image.fromarray(mask).resize((size, size), Image.NEAREST)))
