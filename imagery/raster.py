"""What rasterio reads by windows: georeferenced files, and what is larger or deeper than a plain picture."""

import contextlib
import functools
from pathlib import Path

import numpy as np

from imagery.bands import finite, stretch, stretch_limits
from imagery.description import describe, place_note
from imagery.plain import NODATA, OVERVIEW, Scene, quiet
from runtime.errors import UserError


class RasterFile(Scene):
    """A file that rasterio has opened.

    Pixels that are not of 8 bits are stretched from the 2nd to the 98th percentile of each band, taken from a reduced picture
    of the scene. What is nodata, masked, NaN or infinite, or where an alpha is 0, has no data. The bands are `bands`, or
    those that the file names red, green and blue, or its first three (its first, where it has fewer).
    """

    suffix = ".tif"  # of its mask

    def __init__(self, file, path: Path, bands: tuple[int, ...] | None = None):
        self.file, self.path = file, path
        self.height, self.width, self.crs, self.transform = file.height, file.width, file.crs, file.transform
        scale = min(1, OVERVIEW / max(self.height, self.width))
        self.reduced = max(1, round(self.height * scale)), max(1, round(self.width * scale))
        with self.errors_as_user_errors():
            self.about = describe(file, path, bands, self.reduced)
        self.notes, self.placed = self.about.notes, not place_note(file)
        if self.about.highest is None and self.about.palette is None:
            self.limits = stretch_limits(*self.read_bands(None, self.reduced))

    @contextlib.contextmanager
    def errors_as_user_errors(self, what: str = "is damaged or cut off"):
        """What rasterio and GDAL raise and print, in one sentence."""
        import rasterio

        try:
            with quiet(), rasterio.Env():
                yield
        except (rasterio.errors.RasterioError, rasterio._err.CPLE_BaseError) as error:
            if "emory" in f"{error} {error.__cause__}":
                what = "needs more memory than there is"
            raise UserError(f"{self.path} {what}.") from None

    @functools.cached_property
    def overview(self) -> np.ndarray:
        return self.to_rgb(*self.read_bands(None, self.reduced))

    def read_bands(self, window, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray | None]:
        """The chosen bands (h, w, 3) at their own depth, and where they are valid (h, w) or None; reduced to `shape`."""
        from rasterio.enums import Resampling

        resampling = Resampling.average if self.about.averages else Resampling.nearest
        with self.errors_as_user_errors():
            pixels = self.file.read(self.about.bands, window=window, out_shape=(3, *shape), resampling=resampling)
        return (pixels := pixels.transpose(1, 2, 0)), self.read_valid(window, shape, pixels)

    def read_valid(self, window, shape: tuple[int, int], pixels: np.ndarray | None = None) -> np.ndarray | None:
        """bool (h, w): where there is data; None: everywhere. pixels: the bands there, which matter where they are floats."""
        parts = []
        with self.errors_as_user_errors():
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

    @contextlib.contextmanager
    def mask_file(self, path: Path):
        """A GeoTIFF with the scene's georeferencing, tiled and compressed; NODATA where the scene has no data."""
        import rasterio

        partial = self.about.masked or self.about.floats or self.about.alpha
        options = {
            "driver": "GTiff", "height": self.height, "width": self.width, "count": 1, "dtype": "uint8",
            "tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate", "BIGTIFF": "IF_SAFER",
            "crs": self.crs, "transform": self.transform, "nodata": NODATA if partial else None,
        }  # fmt: skip
        with self.errors_as_user_errors("has a mask that can't be written"), rasterio.open(path, "w", **options) as file:
            points, crs = self.file.gcps
            if points:
                file.gcps = points, crs or rasterio.crs.CRS()
            if self.file.rpcs:
                file.rpcs = self.file.rpcs
            yield RasterMask(file)


class RasterMask:
    def __init__(self, file):
        self.file = file

    def write(self, top: int, rows: np.ndarray) -> None:
        self.file.write(rows, 1, window=((top, top + rows.shape[0]), (0, rows.shape[1])))
