"""Pixels of plain images: decoding, and resizing to what a model takes. What goes wrong is a ValueError that names the file."""

import io

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from runtime.files import file_bytes

MAX_PIXELS = 2**26  # 8192 x 8192: a file that claims more is taken for a decompression bomb


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
