"""What rasterio reads by windows: georeferenced files, and what is larger or deeper than a plain picture."""

import contextlib
import functools
from pathlib import Path

import numpy as np

from imagery.bands import NO_ALPHA, finite, is_alpha, pick_bands, stretch, stretch_limits
from imagery.plain import NODATA, OVERVIEW, Scene, quiet
from runtime.errors import UserError

RGB = ("red", "green", "blue")
OTHER_COLOURS = ("hue", "saturation", "lightness", "cyan", "magenta", "yellow", "black", "Y", "Cb", "Cr")
TRUE_ALPHA = ("PNG", "WEBP", "JP2OpenJPEG", "GIF", "BMP")  # drivers of formats whose fourth channel is never infrared


def named_bands(file) -> list[int] | None:
    """The 1-based numbers of the bands that the file names red, green and blue, None where it doesn't name all three."""
    descriptions = [(text or "").strip().lower() for text in file.descriptions]
    for names in (descriptions, [kind.name for kind in file.colorinterp]):
        if all(colour in names for colour in RGB):
            return [names.index(colour) + 1 for colour in RGB]
    return None


def is_placed(file) -> bool:
    """Whether the file says anything of its place on the Earth."""
    return bool(file.crs or not file.transform.is_identity or file.gcps[0] or file.rpcs)


def pages_note(file) -> list[str]:
    """A note where the file has several pages, of which the first is read. file: None where rasterio was not asked."""
    pages = len(file.subdatasets) if file else 1
    return [f"The file has {pages} pages, of which the first was looked at."] if pages > 1 else []


def place_note(file) -> list[str]:
    """A note where pixels can't be placed on the Earth."""
    if file.crs and not file.transform.is_identity:
        return []
    if file.gcps[0]:
        found = "is placed by ground control points alone"
    elif file.rpcs:
        found = "is placed by rational polynomials (RPCs) alone"
    else:
        found = "has a coordinate system but no geotransform" if file.crs else "has no coordinate system"
    return [f"The image {found}, so no polygons on the Earth are written."]


class RasterFile(Scene):
    """A file that rasterio has opened.

    Pixels that are not of 8 bits are stretched from the 2nd to the 98th percentile of each band, taken from a reduced picture
    of the scene. What is nodata, masked, NaN or infinite, or where an alpha is 0, has no data. The bands are `bands`, or
    those that the file names red, green and blue, or its first three (its first, where it has fewer).
    """

    suffix = ".tif"  # of its mask

    def __init__(self, file, path: Path, bands: tuple[int, ...] | None = None):
        self.file, self.path, self.notes = file, path, [*pages_note(file), *place_note(file)]
        self.height, self.width, self.crs, self.transform = file.height, file.width, file.crs, file.transform
        self.placed = not place_note(file)
        if file.count == 0:
            raise UserError(f"{path} is a {file.driver} container of {len(file.subdatasets)} images: extract the one you mean.")
        scale = min(1, OVERVIEW / max(self.height, self.width))
        self.reduced = max(1, round(self.height * scale)), max(1, round(self.width * scale))
        kinds = [kind.name for kind in file.colorinterp]
        self.palette = self.inverted = self.highest = None
        self.alpha = None if bands else self.find_alpha(kinds)
        self.bands = self.choose_bands(bands, kinds)
        self.interpret_values([kinds[n - 1] for n in self.bands])
        flags, ours = file.mask_flag_enums, dict.fromkeys(self.bands)
        self.masked = any({"all_valid", "alpha"}.isdisjoint(flag.name for flag in flags[n - 1]) for n in ours)
        # GDAL leaves out what a band tagged as alpha masks where it averages, so it must not average by one that is none.
        self.averages = self.palette is None and ("alpha" not in kinds or self.alpha is not None)
        if any(file.dtypes[n - 1] != "uint8" for n in self.bands):
            self.limits = stretch_limits(*self.read_bands(None, self.reduced))

    def find_alpha(self, kinds: list[str]) -> int | None:
        """The number of the band that says where there is data."""
        alpha = kinds.index("alpha") + 1 if "alpha" in kinds else None
        if kinds == ["alpha"]:
            raise UserError(f"{self.path} has an alpha band alone: there is nothing to look at.")
        if alpha == self.file.count == 4 and self.file.driver not in TRUE_ALPHA:
            with self.errors_as_user_errors():
                values = self.file.read(alpha, out_shape=self.reduced)
            if not is_alpha(values, self.highest_of(alpha)):
                self.notes.append(NO_ALPHA)
                return None
        return alpha

    def highest_of(self, band: int) -> float:
        """The highest value of a band's type; of floats the highest that is found, for a fully opaque alpha is 1 or 255."""
        kind = np.dtype(self.file.dtypes[band - 1])
        if kind.kind == "f":
            return float(self.file.read(band, out_shape=self.reduced).max())
        depth = self.file.tags(band, ns="IMAGE_STRUCTURE").get("NBITS")
        return 2 ** int(depth) - 1 if depth else np.iinfo(kind).max

    def choose_bands(self, bands: tuple[int, ...] | None, kinds: list[str]) -> list[int]:
        """1-based numbers of the bands to take for red, green and blue."""
        if bands:
            return [n + 1 for n in pick_bands(bands, self.file.count, str(self.path))]
        colours = [n for n, kind in enumerate(kinds, start=1) if kind != "alpha" or self.alpha is None]
        named = named_bands(self.file)
        chosen = named or [colours[n] for n in pick_bands(None, len(colours), str(self.path))]
        if named and named != sorted(named):
            self.notes.append(f"Bands {', '.join(map(str, named))} were taken for red, green and blue, by their names.")
        elif not named and len(colours) not in (1, 3):
            taken = f"Band 1 of {len(kinds)} was taken for grey" if len(colours) == 2 else (
                f"Bands {', '.join(map(str, chosen))} of {len(kinds)} were taken for red, green and blue")  # fmt: skip
            self.notes.append(f"{taken}: --bands takes others.")
        return chosen

    def interpret_values(self, kinds: list[str]) -> None:
        """What the chosen bands' numbers mean: a palette, white at 0, fewer than 8 bits. Other colours are a UserError."""
        if other := [kind for kind in kinds if kind in OTHER_COLOURS]:
            raise UserError(f"{self.path} has {', '.join(dict.fromkeys(other))} bands: convert it to red, green and blue.")
        types = {self.file.dtypes[n - 1] for n in self.bands}
        if any("complex" in kind for kind in types):
            raise UserError(f"{self.path} has complex numbers for pixels: convert it to magnitudes first.")
        self.floats = any("float" in kind for kind in types)
        if set(kinds) == {"palette"} and len(set(self.bands)) == 1:
            colours = self.file.colormap(self.bands[0])
            # black where it names no colour, and so at its end, which stands for all beyond
            self.palette = np.array([colours.get(i, (0, 0, 0))[:3] for i in range(max(colours) + 2)], np.uint8)
        else:
            self.inverted = self.file.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES"
            self.highest = max(map(self.highest_of, self.bands)) if types == {"uint8"} else None

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

        resampling = Resampling.average if self.averages else Resampling.nearest
        with self.errors_as_user_errors():
            pixels = self.file.read(self.bands, window=window, out_shape=(3, *shape), resampling=resampling)
        return (pixels := pixels.transpose(1, 2, 0)), self.read_valid(window, shape, pixels)

    def read_valid(self, window, shape: tuple[int, int], pixels: np.ndarray | None = None) -> np.ndarray | None:
        """bool (h, w): where there is data; None: everywhere. pixels: the bands there, which matter where they are floats."""
        parts = []
        with self.errors_as_user_errors():
            if self.masked:
                parts.append(self.file.read_masks(self.bands, window=window, out_shape=(3, *shape)).any(axis=0))
            if self.alpha:
                parts.append(self.file.read(self.alpha, window=window, out_shape=shape) > 0)
            if self.floats:
                parts.append(finite(self.read_bands(window, shape)[0] if pixels is None else pixels))
        return np.logical_and.reduce(parts) if parts else None

    def to_rgb(self, pixels: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
        """What `read_bands` gives -> uint8 RGB, black where it is not valid."""
        if self.palette is not None:
            pixels = self.palette.take(pixels[..., 0], axis=0, mode="clip")
        elif self.limits is not None:
            pixels = stretch(pixels, self.limits)
        elif self.highest < 255:
            pixels = (pixels * (255 / self.highest)).round().clip(0, 255).astype(np.uint8)
        pixels = 255 - pixels if self.inverted else pixels
        return np.ascontiguousarray(pixels if valid is None else pixels * valid[..., None])

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        return self.to_rgb(*self.read_bands(((top, top + height), (left, left + width)), (height, width)))

    def valid(self, top: int, height: int) -> np.ndarray | None:
        return self.read_valid(((top, top + height), (0, self.width)), (height, self.width))

    @contextlib.contextmanager
    def mask_file(self, path: Path):
        """A GeoTIFF with the scene's georeferencing, tiled and compressed; NODATA where the scene has no data."""
        import rasterio

        partial = self.masked or self.floats or self.alpha
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
