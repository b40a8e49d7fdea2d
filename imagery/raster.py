"""What rasterio reads by windows: georeferenced files, and what is larger or deeper than a plain picture."""

import contextlib
import functools
import threading
from pathlib import Path

import numpy as np

from imagery.bands import finite, stretch, stretch_limits
from imagery.description import describe, place_note, shape_note
from imagery.plain import NODATA, OVERVIEW, PlainImage, Scene, quiet
from runtime.errors import UserError


@contextlib.contextmanager
def gdal(sentence: str):
    """rasterio, or None where it is not installed. What it and GDAL raise is a UserError of this sentence; what they print is
    left out."""
    try:
        import rasterio
    except ImportError:
        rasterio = None
    if rasterio is None:
        yield None
        return
    try:
        with quiet, rasterio.Env():
            yield rasterio
    except (rasterio.errors.RasterioError, rasterio._err.CPLE_BaseError) as error:
        memory = "emory" in f"{error} {error.__cause__}"
        raise UserError(f"{sentence}{', for want of memory' if memory else ''}.") from None


class RasterFile(Scene):
    """A file that rasterio has opened.

    Pixels that are not of 8 bits are stretched from the 2nd to the 98th percentile of each band, taken from a reduced picture
    of the scene. What is nodata, masked, NaN or infinite, or where an alpha is 0, has no data. The bands are `bands`, or
    those that the file names red, green and blue, or its first three (its first, where it has fewer).
    """

    suffix = ".tif"  # of its mask

    def __init__(self, file, path: Path, bands: tuple[int, ...] | None = None):
        self.file, self.path, self.turn = file, path, threading.RLock()  # GDAL reads a file in one thread at a time
        self.height, self.width, self.crs, self.transform = file.height, file.width, file.crs, file.transform
        scale = min(1, OVERVIEW / max(self.height, self.width))
        self.reduced = max(1, round(self.height * scale)), max(1, round(self.width * scale))
        self.sentence = f"{path} is damaged or cut off"
        with gdal(self.sentence):
            self.about = describe(file, path, bands, self.reduced)
        self.notes, self.placed = self.about.notes, not place_note(file)
        if self.about.highest is None and self.about.palette is None:
            self.limits = stretch_limits(*self.read_bands(None, self.reduced))

    @functools.cached_property
    def overview(self) -> np.ndarray:
        return self.to_rgb(*self.read_bands(None, self.reduced))

    def read_bands(self, window, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray | None]:
        """The chosen bands (h, w, 3) at their own depth, and where they are valid (h, w) or None; reduced to `shape`."""
        with self.turn, gdal(self.sentence) as rasterio:
            kinds = rasterio.enums.Resampling
            resampling = kinds.average if self.about.averages else kinds.nearest
            pixels = self.file.read(self.about.bands, window=window, out_shape=(3, *shape), resampling=resampling)
        return (pixels := pixels.transpose(1, 2, 0)), self.read_valid(window, shape, pixels)

    def read_valid(self, window, shape: tuple[int, int], pixels: np.ndarray | None = None) -> np.ndarray | None:
        """bool (h, w): where there is data; None: everywhere. pixels: the bands there, which matter where they are floats."""
        parts = []
        with self.turn, gdal(self.sentence):
            if self.about.masked:
                parts.append(self.file.read_masks(self.about.bands, window=window, out_shape=(3, *shape)).any(axis=0))
            if self.about.alpha:
                parts.append(self.file.read(self.about.alpha, window=window, out_shape=shape) > 0)
            if self.about.floats:
                parts.append(finite(self.read_bands(window, shape)[0] if pixels is None else pixels))
        return np.logical_and.reduce(parts) if parts else None

    def to_rgb(self, pixels: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
        """What `read_bands` gives -> uint8 RGB, black where it is not valid."""
        if self.about.palette is not None:
            pixels = self.about.palette.take(pixels[..., 0], axis=0, mode="clip")
        elif self.limits is not None:
            pixels = stretch(pixels, self.limits)
        elif self.about.highest < 255:
            pixels = (pixels * (255 / self.about.highest)).round().clip(0, 255).astype(np.uint8)
        pixels = 255 - pixels if self.about.inverted else pixels
        return np.ascontiguousarray(pixels if valid is None else pixels * valid[..., None])

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        return self.to_rgb(*self.read_bands(((top, top + height), (left, left + width)), (height, width)))

    def valid(self, top: int, height: int) -> np.ndarray | None:
        return self.read_valid(((top, top + height), (0, self.width)), (height, self.width))

    def mask_file(self, path: Path, tags: dict | None = None):
        """A context; the mask has NODATA where the scene has no data."""
        partial = self.about.masked or self.about.floats or self.about.alpha
        return placed_raster(self.file, path, "uint8", NODATA if partial else None, tags)

    def probability_file(self, path: Path, tags: dict | None = None):
        return placed_raster(self.file, path, "float32", np.nan, tags)


class PlacedPicture(PlainImage):
    """A plain picture, decoded by Pillow, of which rasterio knows the place: JPEG has no two decoders that agree."""

    suffix = ".tif"  # of its mask

    def __init__(self, pixels: np.ndarray, file, bands: tuple[int, ...] | None, name: str):
        super().__init__(pixels, bands, name, [*place_note(file), *shape_note(file)])
        self.file, self.placed = file, not place_note(file)

    def mask_file(self, path: Path, tags: dict | None = None):
        return placed_raster(self.file, path, "uint8", None if self.mask is None else NODATA, tags)

    def probability_file(self, path: Path, tags: dict | None = None):
        return placed_raster(self.file, path, "float32", np.nan, tags)


@contextlib.contextmanager
def placed_raster(scene, path: Path, dtype: str, nodata: float | None, tags: dict | None = None):
    """A GeoTIFF of one band, tiled and compressed, with the georeferencing of the file `scene` of rasterio's and these tags:
    yields what rows are written to."""
    options = {
        "driver": "GTiff", "height": scene.height, "width": scene.width, "count": 1, "dtype": dtype,
        "tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate", "BIGTIFF": "IF_SAFER",
        "sparse_ok": dtype == "float32",
        "crs": scene.crs, "transform": scene.transform, "nodata": nodata,
    }  # fmt: skip
    with gdal(f"The result of {scene.name} can't be written") as rasterio, rasterio.open(path, "w", **options) as file:
        points, crs = scene.gcps
        if points:
            file.gcps = points, crs or rasterio.crs.CRS()
        if scene.rpcs:
            file.rpcs = scene.rpcs
        file.update_tags(**(tags or {}))
        yield RasterRows(file)


class RasterRows:
    def __init__(self, file):
        self.file = file

    def write(self, top: int, rows: np.ndarray) -> None:
        self.file.write(rows, 1, window=((top, top + rows.shape[0]), (0, rows.shape[1])))
