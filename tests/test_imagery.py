"""Images of any kind: what is read, what is refused and how; tiles; georeferenced files, their masks and polygons; pictures."""

import json
import sys
import unicodedata
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps

from imagery import scenes
from imagery.foreground import foreground, probabilities
from imagery.pictures import captioned, fitted, grid, lit, outlined, shaped
from imagery.pixels import read_image, resize_image
from imagery.plain import NODATA, PlainImage
from imagery.raster import PlacedPicture, RasterFile
from imagery.results import MaskResult, ReducedMask, overlay, slug, stems
from imagery.scenes import as_scene, open_scene
from imagery.tiles import CoarseMask, at_size, blend, starts, tiled_rows
from runtime.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
rng = np.random.default_rng(0)
RGBA = rng.integers(0, 256, (40, 30, 4), dtype=np.uint8)
RGB = RGBA[..., :3]
SMOOTH = np.stack(np.broadcast_arrays(*np.ogrid[50:250:40j, 20:220:30j], 90), axis=2).astype(np.uint8)
HERE = {"crs": "EPSG:32633", "transform": (0.5, 0, 399_960, 0, -0.5, 5_800_020)}  # UTM 33 north, half a metre


def save(path, image, **options):
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def refused(path, sentence, bands=None):
    """The file is refused in one sentence that names it."""
    with pytest.raises(UserError, match=sentence) as error:
        open_scene(path, bands)
    assert path.name in str(error.value) and "\n" not in str(error.value)


def clear(image, rows, alpha=255):
    """The image (H, W, 3) with an alpha channel that is 0 in the first rows."""
    image = np.dstack([image, np.full(image.shape[:2], alpha, np.uint8)])
    image[:rows, :, 3] = 0
    return image


def stretched(bands, valid=True):
    """Bands (C, H, W) from the 2nd to the 98th percentile of what is valid (H, W)."""
    low, high = np.percentile(bands[:, np.broadcast_to(valid, bands.shape[1:])], (2, 98), axis=1)[..., None, None]
    return np.clip((bands.astype(float) - low) / (high - low) * 255, 0, 255)


def check(scene, kind, bands, valid=None, within=0):
    """The scene has these pixels (3, H, W), black where they are not valid (H, W), and its windows are parts of it."""
    seen = scene.read_all()
    assert type(scene) is kind and seen.dtype == np.uint8 and seen.shape == (*bands.shape[1:], 3)
    expected = np.where(True if valid is None else valid, bands, 0.0).transpose(1, 2, 0)
    assert np.abs(seen - expected).max() <= within and np.array_equal(scene.read(13, 14, 5, 6), seen[13:18, 14:20])
    for top, height in ((0, scene.height), (5, 20)):
        found = scene.valid(top, height)
        assert found is None if valid is None else np.array_equal(found, valid[top : top + height])


def test_plain_images(tmp_path):
    for name in ("a.jpg", "a.png", "a.tif", "a.bmp", "a.webp"):
        check(open_scene(save(tmp_path / name, RGB)), PlainImage, read_image(tmp_path / name).transpose(2, 0, 1))
    path, bands, palette = tmp_path / "a.png", RGB.transpose(2, 0, 1), Image.fromarray(RGB).quantize(16)
    for image, expected, valid, within in (
        (RGB[..., 0], bands[[0, 0, 0]], None, 0),
        (Image.fromarray(RGB[..., 0] > 128), (bands[[0, 0, 0]] > 128) * 255, None, 0),
        (palette, np.asarray(palette.convert("RGB")).transpose(2, 0, 1), None, 0),
        (clear(RGB, 10, 128), bands, clear(RGB, 10)[..., 3] > 0, 0),
    ):  # fmt: skip
        check(open_scene(save(path, image)), PlainImage, expected, valid, within)
        check(scene := as_scene(Image.open(path)), PlainImage, expected, valid, within)
    with scene.mask_file(path) as file:  # of the last one, in which rows have no data
        file.write(0, np.where(valid, 255, NODATA).astype(np.uint8))
    assert np.array_equal(np.asarray(Image.open(path)), valid * np.uint8(255))
    assert as_scene(Image.fromarray(RGBA).convert("La")).read_all().shape == (40, 30, 3)
    deep = np.linspace(1000, 3000, 1200).reshape(1, 40, 30).astype(np.uint16)  # black, were it divided by 256
    check(as_scene(Image.fromarray(deep[0])), PlainImage, stretched(deep[[0, 0, 0]]), within=1)
    heights = np.linspace(0, 1, 1200, dtype=np.float32).reshape(1, 40, 30)
    heights[0, 3, 4] = np.nan
    valid = np.isfinite(heights[0])
    check(as_scene(Image.fromarray(heights[0])), PlainImage, stretched(heights[[0, 0, 0]], valid), valid, 1)
    for name in ("c.jpg", "c.tif"):
        cmyk = save(tmp_path / name, Image.fromarray(SMOOTH).convert("CMYK"))
        check(open_scene(cmyk), PlainImage, SMOOTH.transpose(2, 0, 1), within=16)
    save(path, RGB)
    check(open_scene(path, (3, 2, 1)), PlainImage, bands[::-1])
    check(open_scene(path, (2,)), PlainImage, bands[[1, 1, 1]])
    for wrong in ((4, 2, 1), (0,), (1, 2)):
        refused(path, "3 bands", wrong)
    check(open_scene(save(path, clear(RGB, 10)), (1, 2, 3)), PlainImage, bands)  # the alpha is not among them
    assert PlainImage(np.full((3, 5000, 3), 77, np.uint8)).overview.shape == (1, 2048, 3)


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
def test_the_exif_orientation_is_obeyed(tmp_path, kind):
    exif = Image.Exif()
    for turn in range(1, 9):
        exif[ExifTags.Base.Orientation] = turn
        path = save(tmp_path / f"a.{kind}", SMOOTH, exif=exif)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB")).astype(int)
        assert all(np.abs(as_scene(image).read_all() - expected).max() < 4 for image in (path, Image.open(path)))


def test_what_can_t_be_read_is_said_in_one_sentence(tmp_path, monkeypatch):
    jpeg, png = (save(tmp_path / f"whole.{kind}", RGB).read_bytes() for kind in ("jpg", "png"))
    for name, content, sentence in (
        ("zero.png", b"", "empty"), ("zero.tif", b"", "empty"), ("cut.jpg", jpeg[:-400], "cut off"),
        ("cut.png", png[:500], "cut off"), ("text.jpg", b"hello", "not a sound image"), ("text.tif", b"hello", "not a sound"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, sentence)
    refused(tmp_path / "none.png", "no image"), refused(tmp_path, "no regular file")
    for name in ("a.gif", "a.png", "a.webp"):
        film = save(tmp_path / name, RGB, save_all=True, append_images=[Image.fromarray(RGB[::-1])])
        refused(film, "animation of 2 frames")
    monkeypatch.setitem(sys.modules, "rasterio", None)
    assert np.array_equal(open_scene(save(tmp_path / "plain.tif", RGB)).read_all(), RGB)
    refused(save(tmp_path / "geo.tif", RGB, tiffinfo={33550: (1.0, 1.0, 0.0)}), "pip install rasterio")
    for name in ("deep.tif", "deep.png"):
        assert cv2.imwrite(str(tmp_path / name), RGB.astype(np.uint16))
        refused(tmp_path / name, "pip install rasterio")


class Look:
    """A model of which the answer is known: answer(image float (3, S, S), phrase) -> logits (S, S)."""

    def __init__(self, answer, size):
        self.answer, self.size, self.seen = answer, size, []

    def __call__(self, images, phrases):
        self.seen.append(len(images))
        images = [resize_image(image, self.size).float() for image in images]
        return torch.stack([self.answer(image, phrase)[None] for image, phrase in zip(images, phrases)])


def red(image, phrase):
    """Logits of redness: sharp, and right at every pixel of an image that is not resized."""
    return (image[0] - torch.maximum(image[1], image[2]) - 40) / 10


def red_logits(image):
    return red(torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32)), "").numpy()


def whole(strips, shape):
    """Strips of rows put together; they must be consecutive and as wide as the scene."""
    tops, rows = zip(*[(top, rows.copy()) for top, rows in strips])
    logits = np.concatenate(rows)
    assert [*tops, len(logits)] == [0, *np.cumsum([len(strip) for strip in rows])] and logits.shape == shape
    return logits


@pytest.fixture
def two():
    """Two red ellipses on green, one left, one right; their masks."""
    y, x = np.mgrid[:512, :512]
    shapes = [((x - cx) / 37) ** 2 + ((y - cy) / 59) ** 2 < 1 for cx, cy in ((130, 200), (390, 330))]
    image = np.full((512, 512, 3), (30, 90, 30), np.uint8)
    image[shapes[0] | shapes[1]] = (220, 20, 20)
    return image, *shapes


@pytest.mark.parametrize("shape", [(384, 512), (130, 300), (64, 65), (40, 200), (3, 150), (200, 1)])
def test_blended_tiles_say_what_a_look_at_every_pixel_says(two, shape):
    image, look = two[0][120 : 120 + shape[0], : shape[1]], Look(red, 64)
    logits = whole(blend(look, PlainImage(image), "red", 64, batch=3), shape)
    if min(shape) >= 64:  # tiles are not resized: right to rounding
        assert np.allclose(logits, red_logits(image), atol=1e-3)
    assert ((logits > 0) == (red_logits(image) > 0)).mean() > 0.98 and max(look.seen) <= 3


def test_tiles_overlap_and_leave_no_seams():
    """A model that finds all of its image but a border of 6 pixels, where it sees objects cut off."""
    for length in (1, 63, 64, 65, 112, 113, 1000, 20_000):
        first = starts(length, 64)
        assert first[0] == 0 and first[-1] == max(0, length - 64) and len(first) <= 2 + length / 48
        assert all(0 < step <= 49 for step in np.diff(first))  # a quarter of 64, to a pixel
    look = Look(lambda *_: F.pad(torch.ones(52, 52), (6, 6, 6, 6), value=-1.0), 64)  # of which a plain mean has seams
    strips = blend(look, PlainImage(np.zeros((200, 300, 3), np.uint8)), "", 64, batch=8)
    assert (whole(strips, (200, 300))[6:-6, 6:-6] > 0).all()


def test_the_coarse_grid_is_enlarged_as_the_model_s_logits_are():
    coarse, grid = CoarseMask.__new__(CoarseMask), rng.normal(size=(8, 8)).astype(np.float32)
    for size in ((8, 8), (50, 31), (5, 3), (1, 90)):
        coarse.size, expected = size, at_size(torch.from_numpy(grid)[None, None], size)
        assert np.allclose(coarse.at(grid, 0, 0, *size), expected, atol=1e-5)
        top, left = size[0] // 2, size[1] // 3
        assert np.allclose(coarse.at(grid, top, left, size[0] - top, 1), expected[top:, left : left + 1], atol=1e-5)


def sided(image, phrase):
    """Redness in the half of the image that the phrase names: what a model that reads position words does."""
    logits, half = red(image, phrase), image.shape[2] // 2
    logits[:, slice(half, None) if phrase == "left" else slice(half)] = -20
    return logits


def tiled(answer, image, phrase, tile=128, tiling="scene"):
    """The mask of an image of 512 x 512, found in tiles."""
    return whole(tiled_rows(Look(answer, 32), PlainImage(image), phrase, tile, tiling, 8), (512, 512)) > 0


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def test_position_words_refer_to_the_scene_whose_coarse_outline_tiles_refine_or_leave(two):
    image, left, right = two
    for side, shape, other in (("left", left, right), ("right", right, left)):
        mask = tiled(sided, image, side)
        assert overlap(mask, shape) > 0.85 and not (mask & other).any()
        assert (tiled(sided, image, side, tiling="independent") & other).any()  # what each tile's own left and right picks

    def far(image, phrase):  # finds it among a lot of ground only
        logits = red(image, phrase)
        return logits if (logits > 0).float().mean() < 0.07 else torch.full_like(logits, -20)

    coarse = at_size(Look(red, 32)([image], ["red"]), (512, 512)) > 0  # 16 pixels a cell, in tiles 4 and 2
    assert overlap(tiled(red, image, "red"), left | right) > overlap(coarse, left | right) + 0.02
    assert overlap(coarse, left | right) > 0.7 and overlap(tiled(far, image, "red", 64), coarse) > 0.9


def test_memory_is_a_band_and_only_tiles_that_matter_are_read(two):
    image, left, _ = two
    scene, look = PlainImage(image), Look(red, 32)
    scene.read = Mock(wraps=scene.read)
    assert all(len(rows) <= 64 for _, rows in tiled_rows(Look(sided, 32), scene, "left", 64, "scene", 8))
    assert 0 < scene.read.call_count < 60  # of 121
    for top, first, *size in (call.args for call in scene.read.call_args_list):
        assert size == [64, 64] and left[max(0, top - 64) : top + 128, max(0, first - 64) : first + 128].any()
    for _, rows in tiled_rows(look, PlainImage(image[:, :80]), "red", 64, "scene", 8):  # nothing is red: the coarse pass alone
        assert not (rows > 0).any() and look.seen == [1]


def write_tiff(path, bands, crs=HERE["crs"], transform=HERE["transform"], **options):
    """bands (C, H, W) -> a tiled GeoTIFF."""
    rasterio = pytest.importorskip("rasterio")
    options = {"driver": "GTiff", "tiled": True, "blockxsize": 64, "blockysize": 64, "dtype": bands.dtype, "crs": crs} | options
    options |= dict(zip(("count", "height", "width"), bands.shape)) | {"transform": transform and rasterio.Affine(*transform)}
    with rasterio.open(path, "w", **options) as file:
        file.write(bands)
    return path


def ramps(count, height=300, width=200, kind=np.uint8, top=250):
    """Bands (count, height, width): different slopes."""
    y, x = np.mgrid[:height, :width]
    return np.stack([(x * (n + 1) + y) % 97 * (top / 97) for n in range(count)]).astype(kind)


def test_geotiffs(tmp_path):
    bands, deep = ramps(5), ramps(4, kind=np.uint16, top=4000)
    deep[:, :100] = 0  # nodata: would pull the lower limit down
    alpha = clear(bands[:3].transpose(1, 2, 0), 50).transpose(2, 0, 1)
    floats, dark = ramps(3, kind=np.float32), np.zeros((3, 30, 30), np.uint16)
    floats[:, 100:120, 100:120] = np.nan
    infrared = {"photometric": "RGB", "alpha": "NO", "crs": None, "transform": None}
    seen, finite = (deep[1:] != 0).any(axis=0), np.isfinite(floats[0])
    for written, options, chosen, expected, valid, within in (
        (bands, {}, None, bands[:3], None, 0), (bands, {}, (5, 4, 2), bands[[4, 3, 1]], None, 0),
        (bands, {}, (4,), bands[[3, 3, 3]], None, 0), (bands[:1], {}, None, bands[[0, 0, 0]], None, 0),
        (alpha, {"photometric": "RGB", "alpha": "YES"}, None, alpha[:3], alpha[3] > 0, 0),
        (alpha, infrared, None, alpha[:3], None, 0),  # its fourth band is 0 over water
        (deep, {"nodata": 0}, (4, 3, 2), stretched(deep[[3, 2, 1]], seen), seen, 1),
        (dark, {"nodata": 0}, None, dark, dark[0] > 0, 0), (floats, {}, None, stretched(floats, finite), finite, 1),
    ):  # fmt: skip
        kind = PlainImage if options is infrared else RasterFile
        check(open_scene(write_tiff(tmp_path / "a.tif", written, **options), chosen), kind, expected, valid, within)
    refused(write_tiff(tmp_path / "a.tif", bands), "5 bands", (6, 1, 2))
    refused(write_tiff(tmp_path / "a.tif", np.ones((1, 20, 20), np.complex64)), "complex")
    path = write_tiff(tmp_path / "a.tif", rng.integers(0, 256, (3, 300, 200), dtype=np.uint8), compress="deflate")
    path.write_bytes(path.read_bytes()[:90_000])
    with pytest.raises(UserError, match="a.tif is damaged or cut off"):
        open_scene(path).read_all()


def test_palettes_and_plain_images_with_more_than_pillow_reads(tmp_path, monkeypatch):
    rasterio = pytest.importorskip("rasterio")
    for kind, offset in ((np.uint8, 0), (np.uint16, 430)):
        path = write_tiff(tmp_path / "p.tif", (which := ramps(1, kind=kind) % 3) + kind(offset), photometric="palette")
        with rasterio.open(path, "r+") as file:
            file.write_colormap(1, {offset + n: (*colour, 255) for n, colour in enumerate(255 * np.eye(3, dtype=int))})
        check(open_scene(path), RasterFile, (which == np.arange(3)[:, None, None]) * 255)
    write_tiff(tmp_path / "a.jp2", ramps(3, 64, 64), driver="JP2OpenJPEG")
    save(tmp_path / "a.png", RGB)
    (tmp_path / "a.pgw").write_text("0.5\n0\n0\n-0.5\n399960.25\n5800019.75\n")
    for name, kind, crs in (("a.jp2", RasterFile, HERE["crs"]), ("a.png", PlacedPicture, None)):
        file = (scene := open_scene(tmp_path / name)).file
        assert type(scene) is kind and file.transform == rasterio.Affine(*HERE["transform"]) and file.crs == crs
    grey = Image.fromarray(clear(RGB, 9)).convert("LA")
    bands = np.asarray(grey).transpose(2, 0, 1)
    check(open_scene(save(tmp_path / "la.tif", grey)), PlainImage, bands[[0, 0, 0]], bands[1] > 0)
    deep = np.linspace(1000, 3000, 1200).reshape(40, 30).astype(np.uint16) // np.array([[[1]], [[2]], [[4]]], np.uint16)
    assert cv2.imwrite(str(tmp_path / "c.png"), deep[::-1].transpose(1, 2, 0))  # of which Pillow keeps 8 bits
    check(open_scene(tmp_path / "c.png"), RasterFile, stretched(deep), within=1)
    monkeypatch.setattr(scenes, "MAX_PLAIN", 1000)
    check(open_scene(save(tmp_path / "large.png", RGB)), RasterFile, RGB.transpose(2, 0, 1))


def discs():
    """A mask (uint8 0/255) of a disc with a hole, and one more disc."""
    y, x = np.mgrid[:300, :260]
    ring = ((x - 100) ** 2 + (y - 90) ** 2 < 70**2) & ((x - 90) ** 2 + (y - 100) ** 2 > 20**2)
    return (ring | ((x - 200) ** 2 + (y - 240) ** 2 < 30**2)).astype(np.uint8) * 255


def pixel_area(crs, transform, mask):
    """True area in m2 of the foreground's pixels, from their corners in an equal-area projection."""
    to, (a, b, c, d, e, f) = pytest.importorskip("rasterio.warp").transform, transform
    x, y = (np.argwhere(mask)[:, ::-1, None] + np.array([[0, 1, 1, 0], [0, 0, 1, 1]])).transpose(1, 0, 2)  # (n, 4)
    x, y = np.reshape(to(crs, "EPSG:6933", (a * x + b * y + c).ravel(), (d * x + e * y + f).ravel()), (2, -1, 4))
    x, y = (x - x[:, :1] + 1e7) % 34_735_060.89 - 1e7, y - y[:, :1]  # around the Earth
    return np.abs((x * np.roll(y, -1, 1) - np.roll(x, -1, 1) * y).sum(axis=1)).sum() / 2


def write_geojson(path, mask, crs, transform, **properties):
    """The polygons of a mask: (facts, features, their shapely shapes)."""
    polygons = pytest.importorskip("imagery.polygons", reason="needs rasterio, shapely and pyproj")
    scene = open_scene(write_tiff(path / "a.tif", ramps(3, *mask.shape), crs=crs, transform=transform))
    with scene.mask_file(path / "mask.tif") as file:
        for top in range(0, len(mask), 37):
            file.write(top, mask[top : top + 37])
    with scene.probability_file(path / "p.tif") as file:  # of each polygon another
        file.write(0, (cv2.connectedComponents(mask, connectivity=4)[1] % 100 / 100).astype(np.float32))
    facts = polygons.write_polygons(path / "mask.tif", path / "p.tif", path / "a.geojson", properties)
    features = json.loads((path / "a.geojson").read_text())["features"]
    return facts, features, [polygons.shapely.geometry.shape(feature["geometry"]) for feature in features]


@pytest.mark.parametrize("crs, transform", [
    ("EPSG:32633", (0.5, 0, 399_960, 0, -0.5, 5_800_020)),
    ("EPSG:32633", (0.4, 0.3, 500_000, 0.3, -0.4, 5_800_020)),  # turned
    ("EPSG:3857", (1.0, 0, 1_000_000, 0, -1.0, 8_000_000)),  # Mercator at 58 degrees: 3.5 times too large
    ("EPSG:4326", (0.001, 0, 10.0, 0, -0.001, 52.0)),
])  # fmt: skip
def test_polygons_lie_where_the_mask_lies_and_have_its_area(tmp_path, crs, transform):
    mask, noise = discs(), np.random.default_rng(1).normal(size=(60, 80))
    mask[:60, 180:], mask[100:160, 180:] = 255 * (noise > -0.05), 255 * (cv2.GaussianBlur(noise, (0, 0), 3) > 0)
    facts, features, shapes = write_geojson(tmp_path, mask, crs, transform, phrase="the ring")
    rasterio, shapely = map(pytest.importorskip, ("rasterio", "shapely"))
    exact = [shapely.geometry.shape(s) for s, _ in rasterio.features.shapes(mask, mask)]  # in pixels
    components = cv2.connectedComponents(mask, connectivity=4)[1]
    assert facts["polygon_count"] == len(shapes) == len(exact) > 100
    for feature, shape, pixels in zip(features, shapes, exact):
        place = pixels.representative_point()
        confidence = components[int(place.y), int(place.x)] % 100 / 100
        assert feature["properties"] | {"phrase": "the ring", "confidence": confidence} == feature["properties"]
        assert shape.is_valid and len(shape.interiors) == len(pixels.interiors)
        assert shape.exterior.is_ccw and not any(ring.is_ccw for ring in shape.interiors)  # as RFC 7946 wants them
        back = shapely.geometry.shape(rasterio.warp.transform_geom("EPSG:4326", crs, feature["geometry"]))
        back = shapely.affinity.affine_transform(back, (~rasterio.Affine(*transform)).to_shapely())
        assert back.boundary.hausdorff_distance(pixels.boundary) < 1.5  # a pixel, and more where little is left of a small one
    assert shapely.get_num_coordinates(shapes).sum() < 0.6 * shapely.get_num_coordinates(exact).sum()
    assert facts["area_m2"] == pytest.approx(pixel_area(crs, transform, mask), rel=2e-6)
    assert sum(f["properties"]["area_m2"] for f in features) == pytest.approx(facts["area_m2"], abs=0.005 * len(features))


@pytest.mark.parametrize("crs, transform", [
    ("EPSG:32660", (10.0, 0, 823_700, 0, -10.0, 1_500_000)),  # its zone ends at 180 degrees
    ("EPSG:3832", (10.0, 0, 3_338_585, 0, -10.0, 1_500_000)),  # Mercator around 150 degrees
    ("EPSG:4326", (0.001, 0, 179.9, 0, -0.001, 17.0)),
])  # fmt: skip
def test_polygons_are_cut_at_the_180th_meridian(tmp_path, crs, transform):
    facts, _, shapes = write_geojson(tmp_path, mask := discs(), crs, transform)
    assert [shape.geom_type for shape in shapes] == ["MultiPolygon", "Polygon"] and shapes[0].is_valid
    west, east = sorted(shapes[0].geoms, key=lambda part: part.bounds[0])
    assert west.bounds[0] == -180 and west.bounds[2] < -179 and 179 < east.bounds[0] and east.bounds[2] == 180
    assert east.exterior.is_ccw and west.exterior.is_ccw
    assert facts["area_m2"] == pytest.approx(pixel_area(crs, transform, mask), rel=2e-6)


def test_polygons_of_maps_of_the_world_empty_masks_and_what_is_not_on_the_earth(tmp_path):
    belt = np.repeat(255 * (np.arange(180)[:, None] // 20 == 2), 360, axis=1).astype(np.uint8)
    for west in (-180.0, 0.0):
        facts, _, (shape,) = write_geojson(tmp_path, belt, "EPSG:4326", (1.0, 0, west, 0, -1.0, 90.0))
        assert shape.bounds == (-180, 30, 180, 50) and shape.is_valid and facts["area_m2"] == pytest.approx(6.77e13, rel=0.01)
    facts, features, _ = write_geojson(tmp_path, discs() // 255 * np.uint8(NODATA), *HERE.values())
    assert facts == {"polygon_count": 0, "area_m2": 0} and features == []
    local = 'LOCAL_CS["site",LOCAL_DATUM["site",0],UNIT["metre",1],AXIS["X",EAST],AXIS["Y",NORTH]]'
    with pytest.raises(UserError, match="WGS 84"):
        write_geojson(tmp_path, discs(), local, HERE["transform"])


def test_the_numbers_of_a_mask_are_gathered_from_its_bands():
    result = MaskResult(scene := PlainImage(clear(RGB, 10)))
    logits = np.full((40, 30), -1.0, np.float32)
    logits[5:20, 3:7] = 2.0  # a third of it has no data
    strips = foreground(scene, [(top, logits[top : top + 7]) for top in range(0, 40, 7)])
    rows = np.concatenate([result.add(*strip) for strip in strips])
    assert (rows[:10] == NODATA).all() and np.array_equal(rows[10:] == 255, logits[10:] > 0)
    assert result.facts() == {"area_share": 40 / 900, "bbox": [3, 10, 4, 10], "confidence": 0.8808}
    assert MaskResult(scene).facts() == {"area_share": 0.0, "bbox": None, "confidence": 0.0}
    # The reduced mask keeps what is small.
    for height, width in ((2500, 1700), (1600, 7), (3, 2), (1, 9999), (1601, 1601)):
        mask, points = np.zeros((height, width), bool), rng.integers(0, (height, width), (5, 2))
        mask[tuple(points.T)] = True
        small = ReducedMask(height, width)
        for top in range(0, height, 700):
            small.add(top, mask[top : top + 700])
        shape = np.array(small.pixels.shape)
        assert shape.max() <= 1600 and small.pixels.sum() == len(np.unique(points * shape // (height, width), axis=0))


@pytest.mark.parametrize("min_area", (2, 5, 30, 1000, 10**6))
def test_specks_are_left_out_exactly_whatever_the_strips(min_area):
    """Strips of rows give what the whole mask gives: parts that are connected side by side, in as many pixels or more."""
    noise = cv2.GaussianBlur(np.random.default_rng(3).normal(size=(170, 90)).astype(np.float32), (0, 0), 1.2)
    scene, logits = PlainImage(np.zeros((170, 90, 3), np.uint8)), noise - 0.02
    _, labels, facts, _ = cv2.connectedComponentsWithStats((logits > 0).astype(np.uint8), connectivity=4)
    kept = np.append(False, facts[1:, cv2.CC_STAT_AREA] >= min_area)[labels]
    for height in (170, 64, 7, 1):
        rows = [(top, logits[top : top + height]) for top in range(0, 170, height)]
        tops, same, masks = zip(*foreground(scene, rows, min_area=min_area))
        assert [*tops] == [*range(0, 170, height)] and np.array_equal(np.concatenate(same), logits)
        assert np.array_equal(np.concatenate(masks), kept)
    ((_, _, mask),) = foreground(scene, [(0, logits)], threshold=0.6)
    assert np.array_equal(mask, probabilities(logits) > 0.6) and mask.sum() < (logits > 0).sum()


def test_names_are_unique_and_can_be_written():
    long = ("x" * 200 + ".jpg", "y" * 90 + "_1.png", "y" * 90 + "_2.png")
    images = [*map(Path, ("a/plane.jpg", "b/plane.png", "a/Plane.png", "a/ship.jpg", *long))]
    names = stems(images)
    assert len({name.lower() for name in names.values()}) == 7 and names[images[3]] == "ship"
    assert names == stems(images[::-1]) and len(names[images[4]]) == 80
    assert slug("The airplane, on the RIGHT!") == "the-airplane-on-the-right" and slug("?!") == "phrase"
    assert slug("../../etc") == "etc" and slug("船の左") == "船の左" and slug("船" * 5000) == "船" * 40
    assert slug("one two " * 20) == "one-two" + 4 * "-one-two"


def test_the_painter():
    image, mask = np.full((20, 30, 3), 100, np.uint8), np.array([[True, False, False]] * 2)
    shown = lit(image, mask, dim=0.5)
    assert shown.dtype == np.uint8 and (shown[:, :4] == 100).all() and (shown[:, -4:] == 50).all()
    shown = outlined(image, mask, (1, 2, 3), width=1)
    assert (shown[0, :10] == (1, 2, 3)).all() and (shown[:, 10:] == 100).all() and (image == 100).all()
    table = grid([[image, image], [fitted(image, 5, 9)]], gap=2)
    assert table.shape == (27, 62, 3) and (table[22:, :9] == 100).all() and (table[:20, 32:] == 100).all()
    assert (table[:20, 30:32] == 255).all() and (table[22:, 9:] == 255).all()
    image = overlay(np.full((60, 80, 3), 200, np.uint8), np.pad(np.ones((20, 20), bool), ((20, 20), (30, 30))), "the ship")
    assert (image[6 * 60 :] < 100).any() and image.shape[1] == 512  # letters; 6 times enlarged, 16 columns of margin
    assert (image[180, 256] == 200).all() and (image[30, 46] == 100).all() and (image[120, 256] == (255, 220, 0)).all()
    for shape in ((1, 1), (1, 1600), (1600, 1)):
        overlay(np.zeros((*shape, 3), np.uint8), np.ones(shape, bool), "x" * 5000)
    # Captions of any script and length.
    image = np.zeros((10, 300, 3), np.uint8)
    for text in ("the ship", "船の左", "корабль слева", "🚢" * 5, "é\u0301", "\u200b\n\t", "", "word " * 500, "W" * 5000):
        strip, picture = np.split(captioned(image, text, lines=3), [-10])
        assert np.array_equal(picture, image) and 10 < len(strip) <= 70
        assert (strip[-1] == 255).all() and (strip[:, -4:] == 255).all()  # nothing is cut off
        assert np.array_equal(captioned(image, text, below=True, lines=3), np.concatenate([image, strip]))
    assert len({captioned(image, letter).tobytes() for letter in "?船左선кλقée"}) == 9


# A letter or two of each script: joined, or with a mark, or a ligature.
SCRIPTS = {"Arabic": "سفن", "Hebrew": "אב", "Thai": "กี่", "Devanagari": "क्ष", "Tamil": "கொ", "Bengali": "ক্ষ", "Telugu": "క్ష",
           "Kannada": "ಕ್ಷ", "Malayalam": "ക്ഷ", "Gujarati": "ક્ષ", "Gurmukhi": "ਕਿ", "Sinhala": "කො", "Khmer": "ក្ស", "Lao": "ກີ",
           "Burmese": "ကြ", "Amharic": "ገበ", "Georgian": "გე", "Armenian": "նա", "emoji": "🚢",
           "Chinese": "船左", "Japanese": "ふね", "Korean": "배", "Cyrillic": "кл", "Greek": "λθ", "Latin": "qé"}  # fmt: skip


def is_a_box(letter: str) -> bool:
    """Whether there is a frame with the letter's number in it, which stands for a letter that no font has."""
    dark = shaped(letter, 300, 40) > 60
    ink = dark[np.ix_(dark.any(1), dark.any(0))]
    return ink[0].all() and ink[-1].all() and ink[:, 0].all() and ink[:, -1].all()


def test_captions_in_any_script():
    image = np.zeros((4, 300, 3), np.uint8)
    assert is_a_box("\u0378") and is_a_box("\U0001f8ff")  # of no script
    for script, text in SCRIPTS.items():
        assert not any(is_a_box(letter) for letter in text if unicodedata.category(letter)[0] != "M"), script
    pictures = {script: captioned(image, text) for script, text in SCRIPTS.items()}
    assert len({picture.tobytes() for picture in pictures.values()}) == len(SCRIPTS)
    black = lambda text: int(np.ptp(np.nonzero((captioned(image, text)[:-4] < 128).any((0, 2)))[0]))  # noqa: E731 (its width)
    for script in ("Arabic", "Devanagari", "Bengali", "Khmer"):  # joined, they are narrower than letter by letter
        assert black(SCRIPTS[script]) < 0.9 * black("\u200c".join(SCRIPTS[script])), script
    ink = {text: (captioned(image, text)[:-4, :, 0] < 128).sum(0)[6:] for text in ("אב", "ב", "א")}  # by columns
    assert np.array_equal(ink["אב"][:6], ink["ב"][:6]) and not np.array_equal(ink["אב"][:6], ink["א"][:6])  # right to left
    for text in ("السفينة " * 100, "क्षत्रिय " * 100, "<b>&ก", "ก" * 3000):  # long ones end in "...", and nothing is cut off
        strip = captioned(image, text, lines=3)[:-4]
        assert 20 < len(strip) <= 73 and (strip[[0, -1]] == 255).all() and (strip[:, -3:] == 255).all()
