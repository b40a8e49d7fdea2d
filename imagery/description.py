"""What a raster file says of itself: its bands, where it has data, where it lies. `file` is an open file of rasterio's."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from imagery.bands import NO_ALPHA, is_alpha, pick_bands
from runtime.errors import UserError

RGB = ("red", "green", "blue")
OTHER_COLOURS = ("hue", "saturation", "lightness", "cyan", "magenta", "yellow", "black", "Y", "Cb", "Cr")
TRUE_ALPHA = ("PNG", "WEBP", "JP2OpenJPEG", "GIF", "BMP")  # drivers of formats whose fourth channel is never infrared


@dataclass
class Description:
    """The bands to look at and what their values mean."""

    bands: list[int]  # 1-based numbers of three, for red, green and blue
    alpha: int | None  # the number of the band that is 0 where there is no data
    masked: bool  # whether nodata or a mask says where the bands have data
    averages: bool  # whether GDAL may average where it reduces
    floats: bool  # which may be NaN, infinite or a fill value
    highest: int | None  # the value that becomes 255; None where values are stretched
    palette: np.ndarray | None  # uint8 (n, 3), RGB of the value n
    inverted: bool  # whether 0 is white
    notes: list[str] = field(default_factory=list)


def describe(file, path: Path, bands: tuple[int, ...] | None, reduced: tuple[int, int]) -> Description:
    """bands: by the user's choice, which no alpha among the others outvotes. reduced: the size (h, w) at which values are
    looked at. UserError for what can't be shown as red, green and blue."""
    if file.count == 0:
        raise UserError(f"{path} is a {file.driver} container of {len(file.subdatasets)} images: extract the one you mean.")
    kinds, notes = [kind.name for kind in file.colorinterp], [*pages_note(file), *place_note(file), *shape_note(file)]
    if set(kinds) == {"alpha"}:
        raise UserError(f"{path} has an alpha band alone: there is nothing to look at.")
    alpha = None if bands else find_alpha(file, kinds, reduced, notes)
    chosen = choose_bands(file, path, bands, [n for n, kind in enumerate(kinds, 1) if kind != "alpha" or not alpha], notes)
    meanings, types = [kinds[n - 1] for n in chosen], {file.dtypes[n - 1] for n in chosen}
    if other := [kind for kind in meanings if kind in OTHER_COLOURS]:
        raise UserError(f"{path} has {', '.join(dict.fromkeys(other))} bands: convert it to red, green and blue.")
    if any("complex" in kind for kind in types):
        raise UserError(f"{path} has complex numbers for pixels: convert it to magnitudes first.")
    palette = None
    if set(meanings) == {"palette"} and len(set(chosen)) == 1:
        colours = file.colormap(chosen[0])
        # black where it names no colour, and so at its end, which stands for all beyond
        palette = np.array([colours.get(i, (0, 0, 0))[:3] for i in range(max(colours) + 2)], np.uint8)
    flags = [{flag.name for flag in file.mask_flag_enums[n - 1]} for n in chosen]
    return Description(
        bands=chosen,
        alpha=alpha,
        masked=any(names.isdisjoint({"all_valid", "alpha"}) for names in flags),
        # GDAL leaves out what a band tagged as alpha masks, so it must not average where that band is none.
        averages=palette is None and ("alpha" not in kinds or alpha is not None),
        floats=any("float" in kind for kind in types),
        highest=max(highest_value(file, n) for n in chosen) if types == {"uint8"} else None,
        palette=palette,
        inverted=palette is None and file.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES",
        notes=notes,
    )


def find_alpha(file, kinds: list[str], reduced: tuple[int, int], notes: list[str]) -> int | None:
    """The number of the band that is 0 where there is no data. A note is added where one is called so that is none."""
    alpha = kinds.index("alpha") + 1 if "alpha" in kinds else None
    if alpha == file.count == 4 and file.driver not in TRUE_ALPHA:
        values = file.read(alpha, out_shape=reduced)
        if not is_alpha(values, values.max() if values.dtype.kind == "f" else highest_value(file, alpha)):
            notes.append(NO_ALPHA)
            return None
    return alpha


def highest_value(file, band: int) -> int:
    """The highest value of a band of integers."""
    depth = file.tags(band, ns="IMAGE_STRUCTURE").get("NBITS")
    return 2 ** int(depth) - 1 if depth else np.iinfo(file.dtypes[band - 1]).max


def choose_bands(file, path: Path, bands: tuple[int, ...] | None, colours: list[int], notes: list[str]) -> list[int]:
    """The user's bands, those named red, green and blue, or the first of `colours`; a note where it is a guess."""
    if bands:
        return [n + 1 for n in pick_bands(bands, file.count, str(path))]
    if named := named_bands(file):
        if named != sorted(named):
            notes.append(f"Bands {', '.join(map(str, named))} were taken for red, green and blue, by their names.")
        return named
    chosen = [colours[n] for n in pick_bands(None, len(colours), str(path))]
    if len(colours) == 2:
        notes.append(f"Band {chosen[0]} of {file.count} was taken for grey: --bands takes others.")
    elif len(colours) > 3:
        notes.append(f"Bands {', '.join(map(str, chosen))} of {file.count} were taken for red, green and blue: "
                     "--bands takes others.")  # fmt: skip
    return chosen


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
    """A note where the file has several pages, of which the first is read."""
    pages = len(file.subdatasets)
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


def shape_note(file) -> list[str]:
    """A note where the pixel in the middle is over 1.5 times as high on the ground as wide, or the other way round."""
    if place_note(file):
        return []
    from rasterio.warp import transform

    row, column = file.height / 2, file.width / 2
    corners = [file.transform * point for point in ((column, row), (column + 1, row), (column, row + 1))]
    with contextlib.suppress(Exception):  # a coordinate system that isn't the Earth's
        longitude, latitude = map(np.array, transform(file.crs, "EPSG:4326", *zip(*corners)))
        east = ((longitude - longitude[0] + 180) % 360 - 180) * np.cos(np.radians(latitude[0]))
        width, height = np.hypot(east, latitude - latitude[0])[1:]
        if max(width, height) > 1.5 * min(width, height):
            return [f"Pixels are {height / width:.2g} times as high on the ground as wide, so shapes look squeezed: "
                    "warp the image to square pixels."]  # fmt: skip
    return []
