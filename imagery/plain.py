"""Plain pictures, decoded whole by Pillow, and what a scene of any kind is (scenes.py opens them)."""

import contextlib
import functools
import io
import logging
import os
import re
import stat
import tempfile
import threading
import warnings
from pathlib import Path

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps

from imagery.bands import finite, pick_bands, stretch, stretch_limits
from runtime.errors import UserError
from runtime.progress import Progress

OVERVIEW = 2048
NODATA = 127  # of a mask file, where the scene has no data: 0 and 255 are taken


class Scene:
    """An image of any kind, read by windows.

    height, width: in pixels. suffix: of its mask's file. placed: whether polygons of its mask can be placed on the Earth.
    limits: float64 (2, 3), the values that become 0 and 255, or None where the pixels are of 8 bits.
    notes: sentences for its results.
    """

    height: int
    width: int
    suffix = ".png"
    placed = False
    limits: np.ndarray | None = None
    notes: list[str]

    def read_all(self) -> np.ndarray:
        return self.read(0, 0, self.height, self.width)


class Quiet:
    """Within it warnings and log lines of Pillow and GDAL don't reach the terminal: what matters is a note or an error.

    Pillow's own limit of pixels is off: those of scenes.py hold. All this belongs to the process, so the first thread to come
    sets it and the last to leave restores it."""

    def __init__(self):
        self.lock, self.within, self.restore = threading.Lock(), 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            self.within += 1
            if self.within > 1:
                return
            for logger in map(logging.getLogger, ("PIL", "rasterio")):
                if logger.level != logging.CRITICAL:  # setting it takes longer than opening a file
                    logger.setLevel(logging.CRITICAL)
            self.restore.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
            Image.MAX_IMAGE_PIXELS = None
            self.restore.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module="PIL|rasterio")

    def __exit__(self, *_) -> None:
        with self.lock:
            self.within -= 1
            if not self.within:
                self.restore.close()


quiet = Quiet()


# Pillow's pictures -----------------------------------------------------------------------------------------------------


def opened(path: Path) -> Image.Image | None:
    """The file as Pillow opens it, the header alone; None where Pillow doesn't know it. Call it in `quiet`."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} can't be read: it is no regular file.")
        if status.st_size == 0:
            raise UserError(f"{path} is empty (0 bytes): get it again.")
        return Image.open(path)
    except FileNotFoundError:
        raise UserError(f"There is no image {path}: check the name.") from None
    except UserError:
        raise
    except Exception as error:  # a hostile header can raise nearly anything
        if getattr(error, "errno", None):
            raise UserError(f"{path} can't be read: {error.strerror}.") from None
        return None


def loaded(picture: Image.Image, name: str | Path) -> list[str]:
    """Decode the picture -> notes on it; UserError where it is damaged."""
    by_libtiff = any("libtiff" in str(tile[0]) for tile in getattr(picture, "tile", ()))
    try:
        with captured_stderr() if by_libtiff else contextlib.nullcontext(io.BytesIO()) as printed:
            picture.load()
            printed.seek(0)
            return ["A part of the file may be damaged."] if printed.read(1) else []
    except Exception:  # nearly anything
        raise UserError(f"{name} is damaged or cut off.") from None


@contextlib.contextmanager
def captured_stderr():
    """What libraries print on the process's stderr, as a file: Pillow's libtiff can't be silenced otherwise."""
    with Progress.get_lock(), tempfile.TemporaryFile() as printed:  # a bar of another thread waits
        terminal = os.dup(2)
        os.dup2(printed.fileno(), 2)
        try:
            yield printed
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def frames(picture: Image.Image) -> int:
    """The frames of an animation, 1 for other pictures: a stereo pair, pages and layers are none."""
    with contextlib.suppress(Exception):  # what a damaged file raises; decoding it says so
        return 1 if picture.format in ("MPO", "TIFF", "PSD") else getattr(picture, "n_frames", 1)
    return 1


def bits(picture: Image.Image) -> int:
    """Bits a channel. Where they are more than 8 in colour, Pillow would cut them down to 8 without a word."""
    if re.search(";16[BLNS]", f"{picture.tile}") or picture.mode.startswith("I;16"):
        return 16
    return 32 if picture.mode in ("I", "F") else 8


def pixels_of(image: Image.Image, turn: bool = True) -> np.ndarray:
    """A PIL image's pixels, (H, W) or (H, W, 3 or 4), RGB(A), of any depth; turned as its EXIF orientation says."""
    image.load()
    with contextlib.suppress(Exception):  # an EXIF block that can't be read says nothing
        if turn and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    transparent = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    if not transparent and image.mode in ("L", "RGB", "F", "I") or image.mode.startswith("I;16"):
        return np.array(image)
    image = image.convert("LA") if image.mode == "La" else image  # PIL goes on to RGBA from there alone
    return np.array(image.convert("RGBA" if transparent else "RGB"))


class PlainImage(Scene):
    """An image in memory. pixels: (H, W) or (H, W, 1, 3 or 4) of any depth; a fourth channel is alpha.

    An alpha masks nothing where `bands` are given."""

    def __init__(
        self, pixels: np.ndarray, bands: tuple[int, ...] | None = None, name: str = "the image", notes: list[str] | tuple = ()
    ):
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        self.notes = list(notes)
        self.height, self.width, channels = pixels.shape
        chosen = pick_bands(bands, min(channels, 3), name)
        colours = pixels[..., :3] if chosen == [0, 1, 2] else pixels[..., chosen]
        valid = pixels[..., 3] > 0 if channels == 4 and not bands else None
        if colours.dtype.kind == "f":
            valid = finite(colours) & (True if valid is None else valid)
        self.mask = None if valid is None or valid.all() else valid
        if colours.dtype != np.uint8:
            step = max(1, max(self.height, self.width) // OVERVIEW)
            seen = None if self.mask is None else self.mask[::step, ::step]
            self.limits = stretch_limits(colours[::step, ::step], seen)
            colours = stretch(colours, self.limits)
        self.pixels = np.ascontiguousarray(colours)
        if self.mask is not None:
            self.pixels = self.pixels * self.mask[..., None]

    @functools.cached_property
    def overview(self) -> np.ndarray:
        scale = min(1, OVERVIEW / max(self.height, self.width))
        size = (max(1, round(self.width * scale)), max(1, round(self.height * scale)))
        return self.pixels if scale == 1 else cv2.resize(self.pixels, size, interpolation=cv2.INTER_AREA)

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        return np.ascontiguousarray(self.pixels[top : top + height, left : left + width])

    def valid(self, top: int, height: int) -> np.ndarray | None:
        return None if self.mask is None else self.mask[top : top + height]

    @contextlib.contextmanager
    def mask_file(self, path: Path, tags: dict | None = None):
        """Rows are gathered and written as a PNG at the end: the image itself took three times as much memory."""
        rows = PlainRows(np.zeros((self.height, self.width), np.uint8))
        yield rows
        rows.pixels[rows.pixels == NODATA] = 0  # a PNG has no such value
        Image.fromarray(rows.pixels).save(path, "PNG")

    @contextlib.contextmanager
    def probability_file(self, path: Path, tags: dict | None = None):
        """The same of float32, as a TIFF."""
        rows = PlainRows(np.full((self.height, self.width), np.nan, np.float32))
        yield rows
        Image.fromarray(rows.pixels).save(path, "TIFF", compression="tiff_adobe_deflate")


class PlainRows:
    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def write(self, top: int, rows: np.ndarray) -> None:
        self.pixels[top : top + len(rows)] = rows
