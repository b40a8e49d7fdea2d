"""Images of any kind behind one interface, read by windows; masks written by rows.

    scene = open_scene(path)                a plain picture (PNG, JPEG ...) or, by rasterio, a raster of any size
    scene.read(top, left, height, width)    uint8 RGB (height, width, 3), black where there is no data
    scene.read_all()                        the same of the whole scene
    scene.valid(top, height)                bool (height, W), False where there is no data, or None: data everywhere
    scene.overview                          uint8 RGB, the whole scene, its longest side at most 2,048
    scene.mask_file(path, tags)             a context whose write(top, uint8 rows (h, W)) makes the mask's file
    scene.probability_file(path, tags)      the same of float32 rows, a TIFF

rasterio, where it is installed, is asked first. Where Pillow's picture says all that rasterio knows of the file's pixels (8
bits, no mask, bands in order), Pillow decodes it whole (plain.py), and so it does what rasterio doesn't know; all else, and a
TIFF or JPEG 2000 file that has a place, is a RasterFile (raster.py). Without rasterio a file gives the same pixels or is
refused. What can't be read is a UserError of one sentence.
"""

import contextlib
import os
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from imagery.bands import NO_ALPHA, is_alpha, pick_bands
from imagery.description import is_placed, named_bands, pages_note
from imagery.plain import PlainImage, Scene, bits, frames, loaded, opened, pixels_of, quiet
from imagery.raster import PlacedPicture, RasterFile, gdal
from runtime.errors import UserError

MAX_PLAIN = 2**27  # pixels of an image that is decoded whole: 400 MB of RGB
MAX_PIXELS = 2**26  # of an image to train on, 8192 x 8192: one that claims more is taken for a decompression bomb
MAX_SIDE = 65_535  # pixels: rows of the whole width are in memory
MASK_FILES = (".aux.xml", ".msk", ".MSK")  # after the image's name: nodata, a mask and more
GEO_TAGS = (33550, 33922, 34264, 34735, 50844)  # of TIFF: scale, tie points, matrix, coordinate system, RPCs
BAND_NAMES_TAG, NODATA_TAG = 42112, 42113  # of TIFF, by GDAL


def open_scene(path: str | Path, bands: tuple[int, ...] | None = None, as_stored: bool = False) -> Scene:
    """The image at `path`.

    bands: 1-based numbers of one (grey) or three bands to take for RGB, whatever an alpha among the others says.
    as_stored: for training, whose masks are not turned: the EXIF orientation is ignored, and rasterio is asked only where
        pixels can depend on it, since its answer would cost a tenth of a JPEG's decoding. Otherwise the orientation is
        obeyed where the image is decoded whole; rasterio gives pixels as they are stored.
    """
    path = Path(path)
    with quiet, opened(path) or contextlib.nullcontext() as picture:
        if as_stored and picture and picture.format not in ("TIFF", "JPEG2000") and not side_files(path, MASK_FILES):
            refuse_for_training(path, picture)
            return plain_image(picture, path, bands, as_stored, loaded(picture, path))
        with gdal(f"{path} is damaged or cut off") as rasterio:
            return asked_scene(path, picture, rasterio, bands, as_stored)


def asked_scene(path: Path, picture: Image.Image | None, rasterio, bands: tuple[int, ...] | None, as_stored: bool) -> Scene:
    """The scene of a file after rasterio, None where it is not installed, was asked what it knows."""
    try:
        file = rasterio and rasterio.open(path)
    except (rasterio.errors.RasterioError, rasterio._err.CPLE_BaseError):
        file = None
    if not file and not picture:
        hint = "" if rasterio or path.suffix in (".jpg", ".png") else ", or one that needs rasterio (pip install rasterio)"
        raise UserError(f"{path} can't be read: not a sound image{hint}.")
    (refuse_for_training if as_stored else refuse_by_header)(path, picture, file)
    if not rasterio and (reason := beyond_pillow(picture, path, as_stored)):
        raise UserError(f"{path} {reason}, which needs rasterio: pip install rasterio shapely pyproj.")
    # Of a BMP of 32 bits that Pillow doesn't know GDAL ignores which are red, green and blue; OpenCV reads no others of them.
    if file and not picture and file.driver == "BMP" and (pixels := cv2.imread(os.fspath(path))) is not None:
        picture = Image.fromarray(pixels[..., ::-1])
    if picture and (not file or says_all(picture, file)):
        try:
            notes = loaded(picture, path)
        except UserError:
            if not file or picture.format not in ("TIFF", "JPEG2000"):  # Pillow lacks some compressions and reduced colours
                raise
        else:
            return plain_image(picture, path, bands, as_stored, notes, file)
    return RasterFile(file, path, bands)


def plain_image(
    picture: Image.Image, path: Path, bands: tuple[int, ...] | None, as_stored: bool, notes: list[str], file=None
) -> PlainImage:
    """The scene of a decoded picture. file: the same through rasterio, where it was asked."""
    placed = bool(file) and is_placed(file)
    pixels, notes = pixels_of(picture, turn=not (as_stored or placed)), notes + (pages_note(file) if file else [])
    if placed:
        return PlacedPicture(pixels, file, bands, str(path))
    if picture.format == "TIFF" and pixels.ndim == 3 and not is_alpha(pixels[..., 3:], 255):
        pixels, notes = pixels[..., :3], [*notes, NO_ALPHA]
    return PlainImage(pixels, bands, str(path), notes)


def refuse_by_header(path: Path, picture: Image.Image | None, file=None) -> None:
    """UserError for an animation and for what is larger than can be looked at."""
    if picture and (count := frames(picture)) > 1:
        raise UserError(f"{path} is an animation of {count} frames: save the one you mean as a PNG.")
    height, width = (file or picture).height, (file or picture).width
    if max(height, width) > MAX_SIDE:
        raise UserError(f"{path} has {width:,} x {height:,} pixels: cut it into parts of at most {MAX_SIDE:,} a side.")


def refuse_for_training(path: Path, picture: Image.Image | None, file=None, any_depth: bool = False) -> None:
    """UserError for what predict.py takes and a data set may not hold, by the header. any_depth: of grey, as of masks."""
    refuse_by_header(path, picture, file)
    if (file or picture).height * (file or picture).width > MAX_PIXELS:
        raise UserError(f"{path} claims more than {MAX_PIXELS:,} pixels.")
    depth = max(np.dtype(kind).itemsize * 8 for kind in file.dtypes) if file else bits(picture)
    if depth > 8 and not (any_depth and picture.mode[0] in "IF"):
        raise UserError(f"{path} has {depth} bits a channel: stretch it to 8-bit RGB, all of a set alike.")
    if file and len(file.subdatasets) > 1:
        raise UserError(f"{path} has {len(file.subdatasets)} pages: save the one you mean.")


def as_scene(image: str | Path | Image.Image | np.ndarray | torch.Tensor, bands: tuple[int, ...] | None = None) -> Scene:
    """A scene of a path, a PIL image, an array (H, W) or (H, W, C) or a tensor (H, W) or (C, H, W).

    bands: as open_scene's. Without them an image in memory has one channel, three, or four, of which the last is alpha. As in
    files, what is not of 8 bits is stretched, and where a float is NaN there is no data."""
    if isinstance(image, (str, Path)):
        return open_scene(image, bands)
    if isinstance(image, Image.Image):
        with quiet:
            loaded(image, "The PIL image")
            return PlainImage(pixels_of(image), bands, "The PIL image")
    return PlainImage(*array_of(image, bands), "The array")


def array_of(image, bands: tuple[int, ...] | None) -> tuple[np.ndarray, tuple[int, ...] | None]:
    """The pixels of an array or a tensor, of at most four channels, and the bands to take of them; UserError."""
    if isinstance(image, torch.Tensor):
        image = (image.float() if image.dtype == torch.bfloat16 else image).detach().cpu().numpy()
        image = image.transpose(1, 2, 0) if image.ndim == 3 else image
    if not isinstance(image, np.ndarray) or image.dtype.kind not in "uif" or image.ndim not in (2, 3):
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise UserError(f"An image is a path, a PIL image, an array (H, W, C) or a tensor (C, H, W) of numbers, not {found}.")
    if 0 in image.shape:
        raise UserError(f"The image is empty: its shape is {image.shape}.")
    image = image[..., None] if image.ndim == 2 else image
    if bands:
        return image[..., pick_bands(bands, image.shape[2], "The array")], (1, 2, 3)
    if image.shape[2] not in (1, 3, 4):
        raise UserError(f"The array has {image.shape[2]} channels, in (H, W, C) {image.shape}: name one or three by bands=.")
    return np.array(image), None


def says_all(picture: Image.Image, file) -> bool:
    """Whether Pillow's picture has the pixels that rasterio means, all of them at once, and where they have data.

    A georeferenced TIFF or JPEG 2000 file is read by windows, however small it is."""
    kinds = [kind.name for kind in file.colorinterp]
    flags = [{flag.name for flag in flags} for flags in file.mask_flag_enums]
    masked = any({"all_valid", "alpha"}.isdisjoint(names) for names in flags) and "transparency" not in picture.info
    by_windows = file.height * file.width > MAX_PLAIN or picture.format in ("TIFF", "JPEG2000") and is_placed(file)
    in_order = named_bands(file) in (None, [1, 2, 3]) and "alpha" not in kinds[4:]
    infrared = picture.mode == "RGBA" and kinds[-1] != "alpha"
    return set(file.dtypes) == {"uint8"} and in_order and not (masked or by_windows or infrared)


def beyond_pillow(picture: Image.Image, path: Path, as_stored: bool) -> str:
    """What a file has that Pillow would not read or lose, where rasterio is not there to be asked; '' if nothing."""
    if picture.width * picture.height > MAX_PLAIN:
        return f"has {picture.width:,} x {picture.height:,} pixels"
    if bits(picture) > 8:
        return f"has {bits(picture)} bits a channel"
    if picture.format == "JPEG2000":
        return "is a JPEG 2000 file"
    letters = path.suffix[1:].lower() or "-"
    places = [f".{letters[0]}{letters[-1]}w", f".{letters}w", ".wld", ".tab", ".rpb", "_rpc.txt"]
    places = [] if as_stored else places + [ending.upper() for ending in places]
    beside = side_files(path, MASK_FILES) + side_files(path.with_suffix(""), places)
    if beside:
        return f"has {beside[0]} beside it"
    if picture.format == "TIFF":
        tags = picture.tag_v2
        by_jpeg = tags.get(259) in (6, 7)  # of which GDAL's decoder gives slightly other values
        if NODATA_TAG in tags or any(tag in tags for tag in GEO_TAGS) and (by_jpeg or not as_stored):
            return "is a GeoTIFF"
        if "role=" in str(tags.get(BAND_NAMES_TAG)):
            return "is a TIFF with names of its bands"
        if (samples := tags.get(277, 1)) != len(picture.getbands()):
            return f"is a TIFF of {samples} bands"
        try:
            pages = picture.n_frames
        except Exception:  # of a kind that Pillow doesn't know
            pages = 2
        return "is a TIFF with a mask or several pages" if pages > 1 else ""
    return ""


def side_files(path: Path, endings: tuple[str, ...] | list[str]) -> list[str]:
    """The names of the files beside the image that are named like it, with these endings."""
    name = os.fspath(path)
    return [os.path.basename(name + ending) for ending in endings if os.path.exists(name + ending)]
