"""Pixels of the images and mask files of data sets, and resizing to what a model takes. Errors are ValueErrors that name
the file."""

from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from imagery.plain import loaded, opened, quiet
from imagery.scenes import MAX_PIXELS, open_scene, refuse_for_training
from runtime.errors import UserError

__all__ = ["MAX_PIXELS", "decode", "read_image", "resize_image", "resize_mask"]


def decode(path: str | Path, any_depth: bool = False) -> Image.Image:
    """The image in the file, decoded; the first one where there are several.

    any_depth: grey of more than 8 bits is taken too (modes I;16, I and F). More bits in colour, which Pillow would cut down to
    8 without a word, are always a ValueError, as are animations, truncated files and those of more than MAX_PIXELS."""
    try:
        with quiet, opened(Path(path)) or Image.fromarray(read_image(path)) as picture:
            refuse_for_training(path, picture, None, any_depth)
            loaded(picture, path)
            return picture
    except UserError as error:
        raise ValueError(str(error).rstrip(".")) from None


def read_image(path: str | Path) -> np.ndarray:
    """uint8 RGB (H, W, 3), black where there is no data: the pixels that predict.py sees (imagery/scenes.py).

    EXIF rotation is ignored, since masks aren't rotated (a TIFF's own tag is obeyed by Pillow, in images and masks alike)."""
    try:
        return open_scene(path, as_stored=True).read_all()
    except UserError as error:
        raise ValueError(str(error).rstrip(".")) from None


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
