"""Images of any kind behind one interface, read by windows; masks written by rows.

    scene = open_scene(path)                a plain image (PNG, JPEG ...) or, by rasterio, a GeoTIFF of any size
    scene.read(top, left, height, width)    uint8 RGB (height, width, 3), black where there is no data
    scene.read_all()                        the same of the whole scene
    scene.valid(top, height)                bool (height, W), False where there is no data, or None: data everywhere
    scene.overview                          uint8 RGB, the whole scene, its longest side at most 2,048
    scene.mask_file(path)                   a context whose write(top, uint8 rows (h, W)) makes the mask's file

Plain images are decoded whole by Pillow, so their size is bounded; what is larger, or says more than a plain image can
(georeferencing, 16 bits a band, many bands, nodata), is read by rasterio, window by window. Where pixels are not 8-bit, each
band is stretched from its 2nd to its 98th percentile, taken from a reduced picture of the scene. A pixel whose alpha is
0, or that is NaN or infinite, has no data. What can't be read is a UserError of one sentence.
"""

import contextlib
import warnings
from pathlib import Path

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from runtime.errors import UserError

MAX_PLAIN = 2**27  # pixels of an image that is decoded whole: 400 MB of RGB
OVERVIEW = 2048
NODATA = 127  # of a mask file, where the scene has no data: 0 and 255 are taken
WORLD_FILES = (".tfw", ".jgw", ".pgw", ".j2w", ".wld")  # the georeferencing, in a text beside the image
GEO_TAGS = (33550, 33922, 34264, 34735, 42113)  # of TIFF: scale, tie points, matrix, coordinate system, nodata


def open_scene(path: str | Path, bands: tuple[int, ...] | None = None) -> "Scene":
    """The image at `path`. bands: 1-based numbers of one (grey) or three bands to take for RGB.

    EXIF orientation is obeyed where the image is decoded whole; rasterio gives pixels as they are stored."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no image {path}: check the name.")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes): get it again.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limits here are MAX_PLAIN and windows
        reason = reason_for_rasterio(path)
        return RasterFile(path, bands, reason) if reason else PlainImage(read_pixels(path), bands, str(path))


def as_scene(image: str | Path | Image.Image | np.ndarray) -> "Scene":
    """A scene of a path, a PIL image or a uint8 array (H, W, 3)."""
    if isinstance(image, (str, Path)):
        return open_scene(image)
    if isinstance(image, Image.Image):
        with damage_as_user_error("The PIL image"):
            pixels = pil_pixels(image)
        return PlainImage(pixels)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise UserError(f"An image is a path, a PIL image or a uint8 array (H, W, 3), not {found}.")
    if 0 in image.shape:
        raise UserError(f"The image is empty: its shape is {image.shape}.")
    return PlainImage(image)


def reason_for_rasterio(path: Path) -> str:
    """Why the file needs rasterio, or '' where it is a plain image. An animation is a UserError."""
    try:
        with Image.open(path) as header:
            if header.width * header.height > MAX_PLAIN:
                return f"has {header.width:,} x {header.height:,} pixels"
            frames = 1 if header.format in ("MPO", "TIFF") else getattr(header, "n_frames", 1)  # MPO: a stereo pair
            if frames > 1:
                raise UserError(f"{path} is an animation of {frames} frames: save the one you mean as a PNG.")
            if header.format == "JPEG2000":
                return "is a JPEG 2000 file"
            if header.format == "PNG" and header.mode != "I;16" and ";16" in str(header.tile[0][3]):
                return "has 16 bits a colour"  # Pillow would drop 8 of them
            if any(path.with_suffix(suffix).exists() for suffix in WORLD_FILES):
                return "has a world file beside it"
            if header.format != "TIFF":
                return ""
            tags = header.tag_v2
            if any(tag in tags for tag in GEO_TAGS):
                return "is a GeoTIFF"
            bits, samples, extra = tags.get(258, (1,)), tags.get(277, 1), tags.get(338, (0,))
            alpha = samples == 4 and extra[0] in (1, 2)
            colours = samples in (1, 3) or header.mode == "CMYK" or alpha
            return "" if max(bits) <= 8 and colours else f"is a TIFF of {samples} bands, {max(bits)} bits each"
    except Image.DecompressionBombError:
        return "has more pixels than are decoded whole"
    except UserError:
        raise
    except UnidentifiedImageError:
        return "is a TIFF of an uncommon kind" if path.suffix.lower() in (".tif", ".tiff") else ""
    except Exception:  # a hostile header can raise nearly anything; `read_pixels` puts it into words
        return ""


class Scene:
    height: int
    width: int

    def read_all(self) -> np.ndarray:
        return self.read(0, 0, self.height, self.width)


# Plain images ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def damage_as_user_error(name: str):
    """What Pillow raises on a damaged image, which can be nearly anything, as a UserError."""
    try:
        yield
    except Exception as error:
        reason = "it is no image" if isinstance(error, UnidentifiedImageError) else str(error).split("\n")[0][:150]
        raise UserError(f"{name} can't be read ({reason or type(error).__name__}): get it again.") from None


def read_pixels(path: Path) -> np.ndarray:
    """The decoded file, turned as its EXIF orientation says: (H, W) or (H, W, 3 or 4), RGB(A), of any depth."""
    with damage_as_user_error(str(path)), Image.open(path) as image:
        return pil_pixels(image)


def pil_pixels(image: Image.Image) -> np.ndarray:
    """A PIL image's pixels as `read_pixels` gives a file's."""
    image.load()
    with contextlib.suppress(Exception):  # an EXIF block that can't be read says nothing
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    if image.mode in ("L", "RGB", "RGBA", "F", "I") or image.mode.startswith("I;16"):
        return np.asarray(image)
    transparent = image.mode in ("LA", "La", "PA", "RGBa") or "transparency" in image.info
    image = image.convert("LA") if image.mode == "La" else image  # PIL goes on to RGBA from there alone
    return np.asarray(image.convert("RGBA" if transparent else "RGB"))


class PlainImage(Scene):
    """An image in memory. pixels: (H, W) or (H, W, 1, 3 or 4) of any depth; a fourth channel is alpha."""

    suffix = ".png"  # of its mask
    crs = None

    def __init__(self, pixels: np.ndarray, bands: tuple[int, ...] | None = None, name: str = "the image"):
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        self.height, self.width, channels = pixels.shape
        colours = pixels[..., pick_bands(bands, min(channels, 3), name)]
        valid = pixels[..., 3] > 0 if channels == 4 else np.ones((self.height, self.width), bool)
        if colours.dtype.kind == "f":
            valid &= np.isfinite(colours).all(axis=2)
        self.mask = None if valid.all() else valid
        if colours.dtype != np.uint8:
            step = max(1, max(self.height, self.width) // OVERVIEW)
            seen = None if self.mask is None else self.mask[::step, ::step]
            colours = stretch(colours, stretch_limits(colours[::step, ::step], seen))
        self.pixels = np.ascontiguousarray(colours)
        if self.mask is not None:
            self.pixels = self.pixels * self.mask[..., None]
        scale = min(1, OVERVIEW / max(self.height, self.width))
        size = (max(1, round(self.width * scale)), max(1, round(self.height * scale)))
        self.overview = self.pixels if scale == 1 else cv2.resize(self.pixels, size, interpolation=cv2.INTER_AREA)

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        return np.ascontiguousarray(self.pixels[top : top + height, left : left + width])

    def valid(self, top: int, height: int) -> np.ndarray | None:
        return None if self.mask is None else self.mask[top : top + height]

    @contextlib.contextmanager
    def mask_file(self, path: Path):
        """Rows are gathered and written as a PNG at the end: the image itself took three times as much memory."""
        rows = PlainMask(self.height, self.width)
        yield rows
        Image.fromarray(rows.pixels).save(path, "PNG")


class PlainMask:
    def __init__(self, height: int, width: int):
        self.pixels = np.zeros((height, width), np.uint8)

    def write(self, top: int, rows: np.ndarray) -> None:
        self.pixels[top : top + len(rows)] = np.where(rows == NODATA, 0, rows)  # a PNG has no such value


def pick_bands(bands: tuple[int, ...] | None, count: int, name: str) -> list[int]:
    """0-based numbers of three bands for RGB: the first three of `count`, or the first one thrice (grey)."""
    bands = bands or ((1, 2, 3) if count >= 3 else (1,))
    if len(bands) not in (1, 3) or not all(1 <= band <= count for band in bands):
        raise UserError(f"{name} has {count} bands: bands {','.join(map(str, bands))} are not one or three of them.")
    return [band - 1 for band in (bands * 3)[:3]]


def stretch_limits(pixels: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    """float (2, C): the 2nd and 98th percentile of each band of (H, W, C), where `valid` (H, W)."""
    seen = pixels.reshape(-1, pixels.shape[-1]) if valid is None else pixels[valid]
    return np.percentile(seen, (2, 98), axis=0) if len(seen) else np.array([[0.0], [1.0]])


def stretch(pixels: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """(H, W, C) of any depth -> uint8, the limits becoming 0 and 255."""
    low, high = limits.astype(np.float32)
    scaled = (pixels.astype(np.float32) - low) * (255 / np.maximum(high - low, 1e-9))
    return np.clip(np.nan_to_num(scaled), 0, 255).round().astype(np.uint8)


# Through rasterio ------------------------------------------------------------------------------------------------------


class RasterFile(Scene):
    """A file that rasterio reads by windows; see the head of this file. `reason`: why it is not a plain image.

    crs and transform georeference it; crs is None where the file says nothing.
    """

    suffix = ".tif"  # of its mask

    def __init__(self, path: Path, bands: tuple[int, ...] | None, reason: str):
        try:
            import rasterio
        except ImportError:
            raise UserError(f"{path} {reason}, which needs rasterio: pip install rasterio shapely pyproj.") from None
        self.path, self.rasterio = path, rasterio
        with self.errors_as_user_errors():
            self.file = file = rasterio.open(path)
        if file.count == 0:
            raise UserError(f"{path} is a container of {len(file.subdatasets)} images: extract the one you mean.")
        self.height, self.width, self.crs, self.transform = file.height, file.width, file.crs, file.transform
        alpha = rasterio.enums.ColorInterp.alpha
        colours = [i for i, kind in enumerate(file.colorinterp, start=1) if kind != alpha]
        if not colours:
            raise UserError(f"{path} has an alpha band alone: there is nothing to look at.")
        # By their numbers any bands can be taken, an alpha too; by default the first that are none.
        chosen = pick_bands(bands, file.count if bands else len(colours), str(path))
        self.bands = [n + 1 for n in chosen] if bands else [colours[n] for n in chosen]
        kinds = {file.dtypes[n - 1] for n in self.bands}
        if any("complex" in kind for kind in kinds):
            raise UserError(f"{path} has complex numbers for pixels: convert it to magnitudes first.")
        self.palette = None
        if len(set(self.bands)) == 1 and file.colorinterp[self.bands[0] - 1] == rasterio.enums.ColorInterp.palette:
            colormap = file.colormap(self.bands[0])
            # black where it names no colour, and so at its end, which stands for all beyond
            self.palette = np.array([colormap.get(i, (0, 0, 0))[:3] for i in range(max(colormap) + 2)], np.uint8)
        self.floats = any("float" in kind for kind in kinds)
        whole = rasterio.enums.MaskFlags.all_valid
        self.masked = self.floats or any(whole not in file.mask_flag_enums[n - 1] for n in self.bands)
        self.limits = None
        scale = min(1, OVERVIEW / max(self.height, self.width))
        shape = (max(1, round(self.height * scale)), max(1, round(self.width * scale)))
        pixels, valid = self.read_bands(None, shape)
        if kinds != {"uint8"}:
            self.limits = stretch_limits(pixels, valid)
        self.overview = self.to_rgb(pixels, valid)

    @contextlib.contextmanager
    def errors_as_user_errors(self):
        """Errors of rasterio in one sentence."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", self.rasterio.errors.NotGeoreferencedWarning)
                yield
        except self.rasterio.errors.RasterioError as error:
            reason = str(error.__cause__ or error).splitlines()[0][:150]
            raise UserError(f"{self.path} can't be read: {reason}.") from None

    def read_bands(self, window, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray | None]:
        """The chosen bands (h, w, 3) at their own depth, and where they are valid (h, w) or None; reduced to `shape`."""
        kinds = self.rasterio.enums.Resampling
        options = {"window": window, "out_shape": (len(self.bands), *shape)}
        with self.errors_as_user_errors():
            resampling = kinds.nearest if self.palette is not None else kinds.average
            pixels = self.file.read(self.bands, resampling=resampling, **options).transpose(1, 2, 0)
            valid = self.file.read_masks(self.bands, **options).any(axis=0) if self.masked else None
        if self.floats:
            valid &= np.isfinite(pixels).all(axis=2)
        return pixels, valid

    def to_rgb(self, pixels: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
        """What `read_bands` gives -> uint8 RGB, black where it is not valid."""
        if self.palette is not None:
            pixels = self.palette.take(pixels[..., 0], axis=0, mode="clip")
        elif self.limits is not None:
            pixels = stretch(pixels, self.limits)
        return np.ascontiguousarray(pixels if valid is None else pixels * valid[..., None])

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        return self.to_rgb(*self.read_bands(((top, top + height), (left, left + width)), (height, width)))

    def valid(self, top: int, height: int) -> np.ndarray | None:
        window = (top, top + height), (0, self.width)
        if self.floats:  # which may hold NaN
            return self.read_bands(window, (height, self.width))[1]
        with self.errors_as_user_errors():
            return self.file.read_masks(self.bands, window=window).any(axis=0) if self.masked else None

    @contextlib.contextmanager
    def mask_file(self, path: Path):
        """A GeoTIFF with the scene's georeferencing, tiled and compressed; NODATA where the scene has no data."""
        options = {
            "driver": "GTiff", "height": self.height, "width": self.width, "count": 1, "dtype": "uint8",
            "tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate", "BIGTIFF": "IF_SAFER",
            "crs": self.crs, "transform": self.transform, "nodata": NODATA if self.masked else None,
        }  # fmt: skip
        with self.errors_as_user_errors(), self.rasterio.open(path, "w", **options) as file:
            gcps, crs = self.file.gcps
            if gcps:
                file.gcps = gcps, crs
            yield RasterMask(file)


class RasterMask:
    def __init__(self, file):
        self.file = file

    def write(self, top: int, rows: np.ndarray) -> None:
        self.file.write(rows, 1, window=((top, top + rows.shape[0]), (0, rows.shape[1])))
