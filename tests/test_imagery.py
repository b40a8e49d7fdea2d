"""Images of any kind: what is read, what is refused and how; tiles; georeferenced files, their masks and polygons; pictures."""

import io
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from imagery import raster, tiles
from imagery.pictures import captioned, fitted, grid, lit, outlined
from imagery.pixels import read_image, resize_image
from imagery.raster import NODATA, PlainImage, RasterFile, as_scene, open_scene
from imagery.results import MaskResult, ReducedMask, overlay, slug, stems
from imagery.tiles import CoarseMask, at_size, blend, starts, tiled_rows
from runtime.errors import UserError

rng = np.random.default_rng(0)
RGBA = rng.integers(0, 256, (40, 30, 4), dtype=np.uint8)
RGB = RGBA[..., :3]
SMOOTH = np.stack(np.broadcast_arrays(*np.ogrid[50:250:40j, 20:220:30j], 90), axis=2).astype(np.uint8)


def save(path, image, **options):
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def test_common_images_are_read_as_those_of_data_sets_and_rarer_ones_too(tmp_path):
    for name in ("a.jpg", "a.png", "a.tif", "a.bmp", "a.webp"):
        scene = open_scene(save(tmp_path / name, RGB))
        assert type(scene) is PlainImage and scene.valid(0, 40) is None
        assert np.array_equal(scene.read_all(), read_image(tmp_path / name))
        assert np.array_equal(scene.read(3, 4, 5, 6), scene.read_all()[3:8, 4:10])
    grey = open_scene(save(tmp_path / "l.png", RGB[..., 0])).read_all()
    assert np.array_equal(grey, np.repeat(RGB[..., :1], 3, axis=2))
    assert set(np.unique(open_scene(save(tmp_path / "1.png", Image.fromarray(RGB[..., 0] > 128))).read_all())) == {0, 255}
    palette = Image.fromarray(RGB).quantize(16)
    assert np.array_equal(open_scene(save(tmp_path / "p.png", palette)).read_all(), np.asarray(palette.convert("RGB")))
    for name, options in (("c.jpg", {"quality": 95}), ("c.tif", {})):
        cmyk = open_scene(save(tmp_path / name, Image.fromarray(SMOOTH).convert("CMYK"), **options)).read_all()
        assert np.abs(cmyk.astype(int) - SMOOTH).mean() < 6


def test_where_alpha_is_zero_there_is_no_data(tmp_path):
    assert as_scene(Image.fromarray(RGBA).convert("La")).read_all().shape == (40, 30, 3)
    pixels = RGBA.copy()
    pixels[..., 3] = 128
    pixels[:10, :, 3] = 0
    for scene in (open_scene(save(tmp_path / "a.png", pixels)), as_scene(Image.fromarray(pixels))):
        assert (scene.read_all()[:10] == 0).all() and np.array_equal(scene.read_all()[10:], RGB[10:])
        assert not scene.valid(0, 10).any() and scene.valid(10, 30).all()
    with scene.mask_file(tmp_path / "mask.png") as file:
        file.write(0, np.where(scene.valid(0, 40), 255, NODATA).astype(np.uint8))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "mask.png")), scene.valid(0, 40) * np.uint8(255))


def test_sixteen_bits_and_floats_are_stretched(tmp_path):
    heights = np.linspace(0, 1, 1200, dtype=np.float32).reshape(40, 30)
    heights[3, 4] = np.nan
    scene = as_scene(Image.fromarray(heights))
    assert scene.read_all()[3, 4, 0] == 0 and 120 < np.median(scene.read_all()) < 135
    assert np.array_equal(scene.valid(0, 40), np.isfinite(heights))  # as a RasterFile has it
    values = np.linspace(1000, 3000, 1200).reshape(40, 30).astype(np.uint16)  # black, were they divided by 256
    assert cv2.imwrite(str(tmp_path / "g.png"), values)
    grey = open_scene(tmp_path / "g.png").read_all()
    expected = np.clip((values - 1040.0) / 1920 * 255, 0, 255)  # from the 2nd to the 98th percentile
    assert np.abs(grey[..., 0] - expected).max() < 1.5 and (grey[..., :1] == grey).all()
    assert np.array_equal(as_scene(Image.open(tmp_path / "g.png")).read_all(), grey)
    pytest.importorskip("rasterio")  # for colours, of which Pillow keeps 8 bits
    assert cv2.imwrite(str(tmp_path / "c.png"), np.stack([values // 4, values // 2, values], axis=2))
    assert np.abs(open_scene(tmp_path / "c.png").read_all() - expected[..., None]).max() < 2


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_the_exif_orientation_is_obeyed(tmp_path, turn, kind):
    image = Image.fromarray(SMOOTH)
    exif = image.getexif()
    exif[0x0112] = turn
    path = save(tmp_path / f"a.{kind}", image, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB")).astype(int)
    assert np.abs(open_scene(path).read_all() - expected).max() < 4
    assert np.abs(as_scene(Image.open(path)).read_all() - expected).max() < 4


def test_what_is_no_image_is_said_in_one_sentence(tmp_path):
    frames = [Image.fromarray(RGB), Image.fromarray(RGB[::-1].copy())]
    jpeg = io.BytesIO()
    Image.fromarray(RGB).save(jpeg, "JPEG")
    cases = {"none.png": None, "zero.png": b"", "zero.tif": b"", "text.jpg": b"hello", "text.tif": b"hello",
             "cut.jpg": jpeg.getvalue()[:400], "cut.png": save(tmp_path / "x.png", RGB).read_bytes()[:500]}  # fmt: skip
    said = {"none.png": "no image", "zero.png": "empty", "zero.tif": "empty", "text.jpg": "can't be read"}
    for name, content in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=said.get(name, name)) as error:
            open_scene(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    for name in ("a.gif", "a.png", "a.webp"):
        with pytest.raises(UserError, match="animation of 2 frames"):
            open_scene(save(tmp_path / name, frames[0], save_all=True, append_images=frames[1:]))
    with pytest.raises(UserError, match="no image"):
        open_scene(tmp_path)


def test_bands_and_overview_of_a_plain_image(tmp_path):
    path = save(tmp_path / "a.png", RGB)
    assert np.array_equal(open_scene(path, (3, 2, 1)).read_all(), RGB[..., ::-1])
    assert np.array_equal(open_scene(path, (2,)).read_all(), RGB[..., [1, 1, 1]])
    for bands in ((4, 2, 1), (0,), (1, 2)):
        with pytest.raises(UserError, match="3 bands"):
            open_scene(path, bands)
    assert open_scene(save(tmp_path / "a.png", np.full((3, 5000, 3), 77, np.uint8))).overview.shape == (1, 2048, 3)


def test_without_rasterio_a_geotiff_is_one_sentence_and_a_plain_tiff_works(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    assert np.array_equal(open_scene(save(tmp_path / "plain.tif", RGB)).read_all(), RGB)
    geo = save(tmp_path / "geo.tif", RGB, tiffinfo={33550: (1.0, 1.0, 0.0)})
    deep, bits = tmp_path / "deep.tif", tmp_path / "bits.png"
    assert cv2.imwrite(str(deep), RGB.astype(np.uint16)) and cv2.imwrite(str(bits), RGB.astype(np.uint16))
    for path in (geo, deep, bits):
        with pytest.raises(UserError, match="pip install rasterio") as error:
            open_scene(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


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


def red_mask(image):
    return red(torch.from_numpy(image).permute(2, 0, 1).float(), "").numpy() > 0


def whole(strips, shape):
    """Strips of rows put together; they must be consecutive and as wide as the scene."""
    strips = [(top, rows.copy()) for top, rows in strips]
    heights = [len(rows) for _, rows in strips]
    assert [top for top, _ in strips] == [sum(heights[:n]) for n in range(len(heights))]
    logits = np.concatenate([rows for _, rows in strips])
    assert logits.shape == shape
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
        assert np.allclose(logits, red(torch.from_numpy(image.copy()).permute(2, 0, 1).float(), ""), atol=1e-3)
    assert ((logits > 0) == red_mask(image)).mean() > 0.98
    assert max(look.seen) <= 3


def test_tiles_overlap_and_leave_no_seams(monkeypatch):
    """A model that finds all of its image but a border of 6 pixels, where it sees objects cut off."""
    for length in (1, 63, 64, 65, 112, 113, 1000, 20_000):
        first = starts(length, 64)
        assert first[0] == 0 and first[-1] == max(0, length - 64) and len(first) <= 2 + length / 48
        assert all(0 < step <= 49 for step in np.diff(first))  # a quarter of 64, to a pixel
    look = Look(lambda image, phrase: F.pad(torch.ones(52, 52), (6, 6, 6, 6), value=-1.0), 64)
    image = np.zeros((200, 300, 3), np.uint8)
    inside = (slice(6, -6), slice(6, -6))
    assert (whole(blend(look, PlainImage(image), "", 64, batch=8), (200, 300))[inside] > 0).all()
    monkeypatch.setattr(tiles, "window", lambda length: np.ones(length, np.float32))  # a plain mean has seams
    assert (whole(blend(look, PlainImage(image), "", 64, batch=8), (200, 300))[inside] > 0).mean() < 0.9


def test_the_coarse_grid_is_enlarged_as_the_model_s_logits_are():
    coarse, grid = CoarseMask.__new__(CoarseMask), rng.normal(size=(8, 8)).astype(np.float32)
    for size in ((8, 8), (50, 31), (5, 3), (1, 90)):
        coarse.size, expected = size, at_size(torch.from_numpy(grid)[None, None], size)
        assert np.allclose(coarse.at(grid, 0, 0, *size), expected, atol=1e-5)
        top, left = size[0] // 2, size[1] // 3
        assert np.allclose(coarse.at(grid, top, left, size[0] - top, 1), expected[top:, left : left + 1], atol=1e-5)


def sided(image, phrase):
    """Redness in the half of the image that the phrase names: what a model that reads position words does."""
    logits = red(image, phrase)
    half = logits.shape[1] // 2
    if "left" in phrase:
        logits[:, half:] = -20
    if "right" in phrase:
        logits[:, :half] = -20
    return logits


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("side", [0, 1])
def test_position_words_refer_to_the_scene(two, side):
    image, *shapes = two
    look, phrase = Look(sided, 32), f"the red one on the {('left', 'right')[side]}"
    mask = whole(tiled_rows(look, PlainImage(image), phrase, 128, "scene", 8), (512, 512)) > 0
    assert overlap(mask, shapes[side]) > 0.85 and not (mask & shapes[1 - side]).any()
    alone = whole(tiled_rows(look, PlainImage(image), phrase, 128, "independent", 8), (512, 512)) > 0
    assert (alone & shapes[1 - side]).any()  # what each tile's own left and right would pick


def test_tiles_refine_the_coarse_outline_or_leave_it(two):
    image, left, right = two

    def far(image, phrase):  # finds it among a lot of ground only
        logits = red(image, phrase)
        return logits if (logits > 0).float().mean() < 0.07 else torch.full_like(logits, -20)

    scene = PlainImage(image)
    coarse = at_size(Look(red, 32)([scene.overview], ["red"]), (512, 512)) > 0  # 16 pixels a cell, in tiles 4 and 2
    refined = whole(tiled_rows(Look(red, 32), scene, "red", 128, "scene", 8), (512, 512)) > 0
    assert overlap(refined, left | right) > overlap(coarse, left | right) + 0.02
    left_alone = whole(tiled_rows(Look(far, 32), scene, "red", 64, "scene", 8), (512, 512)) > 0
    assert overlap(coarse, left | right) > 0.7 and overlap(left_alone, coarse) > 0.9


def test_memory_is_a_band_and_only_tiles_that_matter_are_read(two):
    image, left, _ = two
    reads, scene, look = [], PlainImage(image), Look(sided, 32)
    read = scene.read
    scene.read = lambda *box: reads.append(box) or read(*box)
    for _, rows in tiled_rows(look, scene, "left", 64, "scene", 8):
        assert len(rows) <= 64
    assert 0 < len(reads) < 60  # of 121
    for top, first, height, width in reads:
        assert (height, width) == (64, 64)
        grown = left[max(0, top - 64) : top + 128, max(0, first - 64) : first + 128]
        assert grown.any()
    look = Look(red, 32)  # nothing is red: the coarse pass alone
    for _, rows in tiled_rows(look, PlainImage(image[:, :80]), "red", 64, "scene", 8):
        assert not (rows > 0).any() and look.seen == [1]


HERE = {"crs": "EPSG:32633", "transform": (0.5, 0, 399_960, 0, -0.5, 5_800_020)}  # UTM 33 north, half a metre


def write_tiff(path, bands, crs="EPSG:32633", transform=HERE["transform"], **options):
    """bands (C, H, W) -> a tiled GeoTIFF."""
    rasterio = pytest.importorskip("rasterio")
    count, height, width = bands.shape
    colours = options.pop("colorinterp", None)
    options = {"driver": "GTiff", "tiled": True, "blockxsize": 64, "blockysize": 64} | options
    with rasterio.open(path, "w", height=height, width=width, count=count, dtype=bands.dtype, crs=crs,
                       transform=transform and rasterio.Affine(*transform), **options) as file:  # fmt: skip
        if colours:
            file.colorinterp = colours
        file.write(bands)
    return path


def ramps(count, height=300, width=200, kind=np.uint8, top=250):
    """Bands (count, height, width): different slopes."""
    y, x = np.mgrid[:height, :width]
    return np.stack([(x * (n + 1) + y) % 97 * (top / 97) for n in range(count)]).astype(kind)


def test_windows_of_a_geotiff(tmp_path):
    bands = ramps(5)
    path = write_tiff(tmp_path / "a.tif", bands)
    scene = open_scene(path)
    assert type(scene) is RasterFile and scene.valid(0, 10) is None
    assert np.array_equal(scene.read_all(), bands[:3].transpose(1, 2, 0))
    assert np.array_equal(scene.read(250, 100, 50, 100), bands[:3, 250:, 100:].transpose(1, 2, 0))
    assert np.array_equal(open_scene(path, (5, 4, 2)).read_all(), bands[[4, 3, 1]].transpose(1, 2, 0))
    assert np.array_equal(open_scene(path, (4,)).read_all(), bands[[3, 3, 3]].transpose(1, 2, 0))
    with pytest.raises(UserError, match="5 bands"):
        open_scene(path, (6, 1, 2))
    one = open_scene(write_tiff(tmp_path / "one.tif", bands[:1]))
    assert np.array_equal(one.read_all(), bands[[0, 0, 0]].transpose(1, 2, 0))


def test_a_plain_image_with_a_place_on_earth_or_other_bands_than_colours(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    write_tiff(tmp_path / "a.jp2", ramps(3, 64, 64), driver="JP2OpenJPEG")
    save(tmp_path / "a.png", RGB)
    (tmp_path / "a.pgw").write_text("0.5\n0\n0\n-0.5\n399960.25\n5800019.75\n")
    for scene, crs in ((open_scene(tmp_path / "a.jp2"), HERE["crs"]), (open_scene(tmp_path / "a.png"), None)):
        assert type(scene) is RasterFile and scene.transform == rasterio.Affine(*HERE["transform"]) and scene.crs == crs
    infrared = ramps(4)
    infrared[3, :150] = 0  # water
    scene = open_scene(write_tiff(tmp_path / "nir.tif", infrared, crs=None, transform=None, photometric="RGB", alpha="NO"))
    assert np.array_equal(scene.read_all(), infrared[:3].transpose(1, 2, 0)) and scene.valid(0, 300) is None
    grey = Image.fromarray(RGBA).convert("LA")
    grey.putalpha(Image.fromarray(np.where(np.arange(40)[:, None] < 9, 0, np.full((40, 30), 255)).astype(np.uint8)))
    scene = open_scene(save(tmp_path / "la.tif", grey))
    assert not scene.valid(0, 9).any() and scene.valid(9, 31).all()


def test_deep_bands_are_stretched_alike_in_every_window(tmp_path):
    bands = ramps(4, kind=np.uint16, top=4000)
    bands[:, :100] = 0  # nodata: would pull the lower limit down
    scene = open_scene(write_tiff(tmp_path / "a.tif", bands, nodata=0), (4, 3, 2))
    chosen = bands[[3, 2, 1]].transpose(1, 2, 0).astype(float)
    low, high = np.percentile(chosen[100:].reshape(-1, 3), (2, 98), axis=0)
    expected = np.clip((chosen - low) / (high - low) * 255, 0, 255)
    valid = scene.valid(0, 300)
    assert np.array_equal(valid, (chosen != 0).any(axis=2)) and not valid[:100].any()
    assert (scene.read_all()[~valid] == 0).all()
    assert np.abs(scene.read_all()[valid] - expected[valid]).max() <= 1
    assert np.array_equal(scene.read(150, 20, 30, 40), scene.read_all()[150:180, 20:60])
    assert np.array_equal(scene.valid(90, 20), valid[90:110])


def test_other_masks_floats_and_palettes(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    kinds = rasterio.enums.ColorInterp
    bands = ramps(4)
    bands[3] = 255
    bands[3, :50] = 0
    scene = open_scene(write_tiff(tmp_path / "alpha.tif", bands, photometric="RGB", alpha="YES"))
    assert not scene.valid(0, 50).any() and scene.valid(50, 250).all() and (scene.read_all()[:50] == 0).all()
    grey = open_scene(write_tiff(tmp_path / "la.tif", bands[[0, 3]], colorinterp=[kinds.gray, kinds.alpha]))
    assert np.array_equal(grey.read_all()[50:], bands[[0, 0, 0], 50:].transpose(1, 2, 0))
    assert not grey.valid(0, 50).any()
    floats = ramps(3, kind=np.float32)
    floats[:, 100:120, 100:120] = np.nan
    scene = open_scene(write_tiff(tmp_path / "f.tif", floats))
    assert np.array_equal(scene.valid(0, 300), np.isfinite(floats[0])) and scene.read_all().max() == 255
    dark = open_scene(write_tiff(tmp_path / "dark.tif", np.zeros((1, 30, 30), np.uint16), nodata=0))
    assert not dark.valid(0, 30).any() and (dark.read_all() == 0).all()
    for kind, offset in ((np.uint8, 0), (np.uint16, 430)):
        path = write_tiff(tmp_path / "p.tif", ramps(1, kind=kind) % 3 + kind(offset), photometric="palette")
        with rasterio.open(path, "r+") as file:
            file.write_colormap(1, {offset: (255, 0, 0, 255), offset + 1: (0, 255, 0, 255), offset + 2: (0, 0, 255, 255)})
        scene = open_scene(path)
        assert set(map(tuple, scene.read_all().reshape(-1, 3))) == {(255, 0, 0), (0, 255, 0), (0, 0, 255)}
    with pytest.raises(UserError, match="complex"):
        open_scene(write_tiff(tmp_path / "c.tif", np.ones((1, 20, 20), np.complex64)))


def test_a_damaged_geotiff_and_an_image_too_large_to_be_decoded_whole(tmp_path, monkeypatch):
    path = write_tiff(tmp_path / "a.tif", rng.integers(0, 256, (3, 300, 200), dtype=np.uint8), compress="deflate")
    path.write_bytes(path.read_bytes()[:90_000])
    with pytest.raises(UserError, match="a.tif can't be read: [^\n]*$"):
        open_scene(path).read_all()
    monkeypatch.setattr(raster, "MAX_PLAIN", 1000)
    scene = open_scene(save(tmp_path / "a.png", RGB))
    assert type(scene) is RasterFile and scene.crs is None and np.array_equal(scene.read(5, 6, 7, 8), RGB[5:12, 6:14])


def discs(height=300, width=260):
    """A mask (uint8 0/255) of a disc with a hole, and one more disc."""
    y, x = np.mgrid[:height, :width]
    ring = ((x - 100) ** 2 + (y - 90) ** 2 < 70**2) & ((x - 90) ** 2 + (y - 100) ** 2 > 20**2)
    return (ring | ((x - 200) ** 2 + (y - 240) ** 2 < 30**2)).astype(np.uint8) * 255


def pixel_areas(crs, transform, mask):
    """True area in m2 of each foreground pixel: its corners in an equal-area projection."""
    from rasterio.warp import transform as to

    a, b, c, d, e, f = transform
    x, y = (np.argwhere(mask)[:, ::-1, None] + np.array([[0, 1, 1, 0], [0, 0, 1, 1]])).transpose(1, 0, 2)  # (n, 4)
    x, y = to(crs, "EPSG:6933", (a * x + b * y + c).ravel(), (d * x + e * y + f).ravel())
    x, y = np.reshape(x, (-1, 4)), np.reshape(y, (-1, 4))
    x, y = (x - x[:, :1] + 1e7) % 34_735_060.89 - 1e7, y - y[:, :1]  # around the Earth
    return np.abs((x * np.roll(y, -1, 1) - np.roll(x, -1, 1) * y).sum(axis=1)) / 2


def write_geojson(path, mask, crs, transform, **properties):
    """The polygons of a mask: (facts, features, their shapely shapes)."""
    polygons = pytest.importorskip("imagery.polygons", reason="needs rasterio, shapely and pyproj")
    scene = open_scene(write_tiff(path / "a.tif", ramps(3, *mask.shape), crs=crs, transform=transform))
    with scene.mask_file(path / "mask.tif") as file:
        for top in range(0, len(mask), 37):
            file.write(top, mask[top : top + 37])
    facts = polygons.write_polygons(path / "mask.tif", path / "a.geojson", properties)
    features = json.loads((path / "a.geojson").read_text())["features"]
    return facts, features, [polygons.shapely.geometry.shape(feature["geometry"]) for feature in features]


@pytest.mark.parametrize("crs, transform", [
    ("EPSG:32633", (0.5, 0, 399_960, 0, -0.5, 5_800_020)),
    ("EPSG:32633", (0.4, 0.3, 500_000, 0.3, -0.4, 5_800_020)),  # turned
    ("EPSG:3857", (1.0, 0, 1_000_000, 0, -1.0, 8_000_000)),  # Mercator at 58 degrees: 3.5 times too large
    ("EPSG:4326", (0.001, 0, 10.0, 0, -0.001, 52.0)),
])  # fmt: skip
def test_polygons_lie_where_the_mask_lies_and_have_its_area(tmp_path, crs, transform):
    mask = discs()
    mask[:60, 180:] = 255 * (np.random.default_rng(1).normal(size=(60, 80)) > -0.05)
    mask[100:160, 180:] = 255 * (cv2.GaussianBlur(np.random.default_rng(2).normal(size=(60, 80)), (0, 0), 3) > 0)
    facts, features, shapes = write_geojson(tmp_path, mask, crs, transform, phrase="the ring", confidence=0.75)
    import rasterio
    import shapely
    from rasterio.warp import transform_geom

    exact = [shapely.geometry.shape(s) for s, _ in rasterio.features.shapes(mask, mask)]  # in pixels
    assert facts["polygon_count"] == len(shapes) == len(exact) > 100
    for feature, shape, pixels in zip(features, shapes, exact):
        assert feature["properties"]["phrase"] == "the ring" and feature["properties"]["confidence"] == 0.75
        assert shape.is_valid and len(shape.interiors) == len(pixels.interiors)
        assert shape.exterior.is_ccw and not any(ring.is_ccw for ring in shape.interiors)  # as RFC 7946 wants them
        back = shapely.geometry.shape(transform_geom("EPSG:4326", crs, feature["geometry"]))
        back = shapely.affinity.affine_transform(back, (~rasterio.Affine(*transform)).to_shapely())
        assert back.boundary.hausdorff_distance(pixels.boundary) < 0.51
    assert shapely.get_num_coordinates(shapes).sum() < 0.9 * shapely.get_num_coordinates(exact).sum()
    assert facts["area_m2"] == pytest.approx(pixel_areas(crs, transform, mask).sum(), rel=2e-6)
    assert sum(f["properties"]["area_m2"] for f in features) == pytest.approx(facts["area_m2"], abs=0.005 * len(features))


@pytest.mark.parametrize("crs, transform", [
    ("EPSG:32660", (10.0, 0, 823_700, 0, -10.0, 1_500_000)),  # its zone ends at 180 degrees
    ("EPSG:3832", (10.0, 0, 3_338_585, 0, -10.0, 1_500_000)),  # Mercator around 150 degrees
    ("EPSG:4326", (0.001, 0, 179.9, 0, -0.001, 17.0)),
])  # fmt: skip
def test_polygons_are_cut_at_the_180th_meridian(tmp_path, crs, transform):
    mask = discs()
    facts, features, shapes = write_geojson(tmp_path, mask, crs, transform)
    assert [shape.geom_type for shape in shapes] == ["MultiPolygon", "Polygon"] and shapes[0].is_valid
    east, west = sorted(shapes[0].geoms, key=lambda part: -part.bounds[0])
    assert 179 < east.bounds[0] and east.bounds[2] == 180 and east.exterior.is_ccw
    assert west.bounds[0] == -180 and west.bounds[2] < -179 and west.exterior.is_ccw
    assert facts["area_m2"] == pytest.approx(pixel_areas(crs, transform, mask).sum(), rel=2e-6)
    belt = np.where(np.arange(180)[:, None] // 20 == 2, np.full((180, 360), 255), 0).astype(np.uint8)
    for west in (-180.0, 0.0):  # maps of the world
        facts, _, (shape,) = write_geojson(tmp_path, belt, "EPSG:4326", (1.0, 0, west, 0, -1.0, 90.0))
        assert shape.bounds == (-180, 30, 180, 50) and shape.is_valid and facts["area_m2"] == pytest.approx(6.77e13, rel=0.01)


def test_an_empty_mask_and_a_coordinate_system_that_is_not_of_the_earth(tmp_path):
    facts, features, _ = write_geojson(tmp_path, discs() // 255 * np.uint8(NODATA), *HERE.values())
    assert facts == {"polygon_count": 0, "area_m2": 0} and features == []
    local = 'LOCAL_CS["site",LOCAL_DATUM["site",0],UNIT["metre",1],AXIS["X",EAST],AXIS["Y",NORTH]]'
    with pytest.raises(UserError, match="WGS 84"):
        write_geojson(tmp_path, discs(), local, HERE["transform"])


def test_the_numbers_of_a_mask_are_gathered_from_its_bands():
    scene = PlainImage(np.dstack([RGB, np.where(np.arange(40)[:, None] < 10, 0, np.full((40, 30), 255)).astype(np.uint8)]))
    logits = np.full((40, 30), -1.0, np.float32)
    logits[5:20, 3:7] = 2.0  # half of a third of it has no data
    result = MaskResult(scene)
    rows = np.concatenate([result.add(top, logits[top : top + 7]) for top in range(0, 40, 7)])
    assert (rows[:10] == NODATA).all() and np.array_equal(rows[10:] == 255, logits[10:] > 0)
    assert result.facts() == {"area_share": 40 / 900, "bbox": [3, 10, 4, 10], "confidence": 0.8808}
    assert MaskResult(scene).facts() == {"area_share": 0.0, "bbox": None, "confidence": 0.0}


def test_names_are_unique_and_can_be_written():
    images = [*map(Path, ("a/plane.jpg", "b/plane.png", "a/Plane.png", "a/ship.jpg"))]
    images += [Path("x" * 200 + ".jpg"), Path("y" * 90 + "_1.png"), Path("y" * 90 + "_2.png")]
    names = stems(images)
    assert len({name.lower() for name in names.values()}) == 7 and names[images[3]] == "ship"
    assert names == stems(images[::-1]) and len(names[images[4]]) == 80
    assert slug("The airplane, on the RIGHT!") == "the-airplane-on-the-right"
    assert slug("../../etc") == "etc" and slug("?!") == "phrase" and slug("船の左") == "船の左"
    assert slug("one two " * 20) == "one-two-one-two-one-two-one-two-one-two" and slug("y" * 5000) == "y" * 40
    assert len(slug("船" * 5000).encode()) <= 120


def test_the_reduced_mask_keeps_what_is_small():
    rng = np.random.default_rng(0)
    for height, width in ((5000, 3000), (1600, 7), (3, 2), (1, 9999), (1601, 1601)):
        mask = np.zeros((height, width), bool)
        points = rng.integers(0, (height, width), (5, 2))
        mask[tuple(points.T)] = True
        small = ReducedMask(height, width)
        for top in range(0, height, 700):
            small.add(top, mask[top : top + 700])
        shape = np.array(small.pixels.shape)
        assert shape.max() <= 1600 and small.pixels.sum() == len(np.unique(points * shape // (height, width), axis=0))


def test_the_painter():
    image, mask = np.full((20, 30, 3), 100, np.uint8), np.zeros((2, 3), bool)
    mask[:, 0] = True
    shown = lit(image, mask, dim=0.5)
    assert shown.dtype == np.uint8 and (shown[:, :4] == 100).all() and (shown[:, -4:] == 50).all()
    shown = outlined(image, mask, (1, 2, 3), width=1)
    assert (shown[0, :10] == (1, 2, 3)).all() and (shown[:, 10:] == 100).all() and (image == 100).all()
    table = grid([[image, image], [fitted(image, 5, 9)]], gap=2)
    assert table.shape == (27, 62, 3) and (table[:20, 30:32] == 255).all() and (table[22:, 9:] == 255).all()
    assert (table[22:, :9] == 100).all() and (table[:20, 32:] == 100).all()
    image = overlay(np.full((60, 80, 3), 200, np.uint8), np.pad(np.ones((20, 20), bool), ((20, 20), (30, 30))), "the ship")
    assert (image[6 * 60 :] < 100).any() and image.shape[1] == 512  # letters; 6 times enlarged, 16 columns of margin
    assert (image[180, 256] == 200).all() and (image[30, 46] == 100).all() and (image[120, 256] == (255, 220, 0)).all()
    for shape in ((1, 1), (1, 1600), (1600, 1)):
        overlay(np.zeros((*shape, 3), np.uint8), np.ones(shape, bool), "x" * 5000)


def test_captions_of_any_script_and_length():
    image = np.zeros((10, 300, 3), np.uint8)
    for text in ("the ship", "船の左", "корабль слева", "🚢" * 5, "é\u0301", "\u200b\n\t", "", "word " * 500, "W" * 5000):
        for below in (False, True):
            shown = captioned(image, text, below, lines=3)
            strip, picture = (shown[10:], shown[:10]) if below else (shown[:-10], shown[-10:])
            assert np.array_equal(picture, image) and 10 < len(strip) <= 70 and (strip[-1] == 255).all()
            assert (strip[:, -4:] == 255).all()  # nothing is cut off
    assert np.array_equal(captioned(image, "près d'une île"), captioned(image, "pres d'une ile"))
