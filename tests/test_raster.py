"""Images of any kind: what is read, what is refused and how; georeferenced files, their masks and polygons."""

import io
import json
import sys

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

import raster
from data import read_image
from layouts import DataError
from polygons import moved, signed_area, simplified, write_polygons
from raster import NODATA, PlainImage, RasterFile, open_scene, pil_pixels

rng = np.random.default_rng(0)
RGBA = rng.integers(0, 256, (40, 30, 4), dtype=np.uint8)
RGB = RGBA[..., :3]
SMOOTH = np.stack(np.broadcast_arrays(*np.ogrid[50:250:40j, 20:220:30j], 90), axis=2).astype(np.uint8)


def save(path, image, **options):
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


# ---- plain images -----------------------------------------------------------------------------------------------------


def test_a_common_image_is_read_as_the_data_sets_are(tmp_path):
    for name in ("a.jpg", "a.png", "a.tif", "a.bmp", "a.webp"):
        scene = open_scene(save(tmp_path / name, RGB))
        assert type(scene) is PlainImage and scene.valid(0, 40) is None
        assert np.array_equal(scene.read_all(), read_image(tmp_path / name))
        assert np.array_equal(scene.read(3, 4, 5, 6), scene.read_all()[3:8, 4:10])


def test_other_kinds_of_images(tmp_path):
    grey = open_scene(save(tmp_path / "l.png", RGB[..., 0])).read_all()
    assert np.array_equal(grey, np.repeat(RGB[..., :1], 3, axis=2))
    bits = open_scene(save(tmp_path / "1.png", Image.fromarray(RGB[..., 0] > 128))).read_all()
    assert set(np.unique(bits)) == {0, 255}
    palette = Image.fromarray(RGB).quantize(16)
    assert np.array_equal(open_scene(save(tmp_path / "p.png", palette)).read_all(), np.asarray(palette.convert("RGB")))
    for name in ("c.jpg", "c.tif"):
        options = {"quality": 95} if name == "c.jpg" else {}
        cmyk = open_scene(save(tmp_path / name, Image.fromarray(SMOOTH).convert("CMYK"), **options)).read_all()
        assert np.abs(cmyk.astype(int) - SMOOTH).mean() < 6


def test_where_alpha_is_zero_there_is_no_data(tmp_path):
    pixels = RGBA.copy()
    pixels[..., 3] = 128
    pixels[:10, :, 3] = 0
    for scene in (open_scene(save(tmp_path / "a.png", pixels)), PlainImage(pil_pixels(Image.fromarray(pixels)))):
        assert (scene.read_all()[:10] == 0).all() and np.array_equal(scene.read_all()[10:], RGB[10:])
        assert not scene.valid(0, 10).any() and scene.valid(10, 30).all()
    with scene.mask_file(tmp_path / "mask.png") as file:
        file.write(0, np.where(scene.valid(0, 40), 255, NODATA).astype(np.uint8))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "mask.png")), scene.valid(0, 40) * np.uint8(255))


def test_sixteen_bits_are_stretched(tmp_path):
    values = np.linspace(1000, 3000, 1200).reshape(40, 30).astype(np.uint16)  # black, were they divided by 256
    assert cv2.imwrite(str(tmp_path / "g.png"), values)
    grey = open_scene(tmp_path / "g.png").read_all()
    expected = np.clip((values - 1040.0) / 1920 * 255, 0, 255)  # from the 2nd to the 98th percentile
    assert np.abs(grey[..., 0] - expected).max() < 1.5 and (grey[..., :1] == grey).all()
    assert cv2.imwrite(str(tmp_path / "c.png"), np.stack([values // 4, values // 2, values], axis=2))
    assert np.abs(open_scene(tmp_path / "c.png").read_all() - expected[..., None]).max() < 2
    pil = PlainImage(pil_pixels(Image.open(tmp_path / "g.png")))
    assert np.array_equal(pil.read_all(), grey)


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_the_exif_orientation_is_obeyed(tmp_path, turn, kind):
    image = Image.fromarray(SMOOTH)
    exif = image.getexif()
    exif[0x0112] = turn
    path = save(tmp_path / f"a.{kind}", image, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB")).astype(int)
    assert np.abs(open_scene(path).read_all() - expected).max() < 4
    assert np.abs(PlainImage(pil_pixels(Image.open(path))).read_all() - expected).max() < 4


def test_pillow_s_rarer_modes(tmp_path):
    half = Image.fromarray(RGBA).convert("La")
    assert PlainImage(pil_pixels(half)).read_all().shape == (40, 30, 3)
    heights = np.linspace(0, 1, 1200, dtype=np.float32).reshape(40, 30)
    heights[3, 4] = np.nan
    scene = PlainImage(pil_pixels(Image.fromarray(heights)))
    seen = scene.read_all()
    assert seen[3, 4, 0] == 0 and 120 < np.median(seen) < 135
    assert np.array_equal(scene.valid(0, 40), np.isfinite(heights))  # as a RasterFile has it


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
        with pytest.raises(DataError, match=said.get(name, name)) as error:
            open_scene(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    for name in ("a.gif", "a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(DataError, match="animation of 2 frames"):
            open_scene(tmp_path / name)
    with pytest.raises(DataError, match="not an image|can't be read|no image"):
        open_scene(tmp_path)


def test_bands_of_a_plain_image(tmp_path):
    path = save(tmp_path / "a.png", RGB)
    assert np.array_equal(open_scene(path, (3, 2, 1)).read_all(), RGB[..., ::-1])
    assert np.array_equal(open_scene(path, (2,)).read_all(), RGB[..., [1, 1, 1]])
    for bands in ((4, 2, 1), (0,), (1, 2)):
        with pytest.raises(DataError, match="3 bands"):
            open_scene(path, bands)


def test_odd_shapes_have_an_overview(tmp_path):
    for shape in ((1, 1), (1, 5000), (5000, 1), (3, 2049)):
        scene = open_scene(save(tmp_path / "a.png", np.full((*shape, 3), 77, np.uint8)))
        assert (scene.height, scene.width) == shape
        assert max(scene.overview.shape[:2]) == min(2048, max(shape)) and (scene.overview == 77).all()


def test_without_rasterio_a_geotiff_is_one_sentence_and_a_plain_tiff_works(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    assert np.array_equal(open_scene(save(tmp_path / "plain.tif", RGB)).read_all(), RGB)
    geo = save(tmp_path / "geo.tif", RGB, tiffinfo={33550: (1.0, 1.0, 0.0)})
    deep = tmp_path / "deep.tif"
    assert cv2.imwrite(str(deep), RGB.astype(np.uint16))
    for path in (geo, deep):
        with pytest.raises(DataError, match="pip install rasterio") as error:
            open_scene(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


# ---- through rasterio -------------------------------------------------------------------------------------------------

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
    with pytest.raises(DataError, match="5 bands"):
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


def test_a_palette_of_sixteen_bits(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    path = write_tiff(tmp_path / "p.tif", np.full((1, 20, 20), 432, np.uint16), photometric="palette")
    with rasterio.open(path, "r+") as file:
        file.write_colormap(1, {432: (1, 2, 3, 255)})
    scene = open_scene(path)
    assert (scene.read_all() == (1, 2, 3)).all()
    scene.palette = scene.palette[:432]  # as of a file whose palette ends before its pixels' values
    scene.palette[-1] = 0
    assert (scene.read_all() == 0).all()


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


def test_a_large_scene_s_limits_come_from_a_reduced_picture(tmp_path):
    bands = ramps(1, 3000, 2500, np.uint16, 10_000)
    scene = open_scene(write_tiff(tmp_path / "a.tif", bands))
    assert scene.overview.shape == (2048, 1707, 3)
    low, high = scene.limits[:, 0]
    assert abs(low - np.percentile(bands, 2)) < 500 and abs(high - np.percentile(bands, 98)) < 500


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

    path = write_tiff(tmp_path / "p.tif", (ramps(1) % 3), photometric="palette")
    with rasterio.open(path, "r+") as file:
        file.write_colormap(1, {0: (255, 0, 0, 255), 1: (0, 255, 0, 255), 2: (0, 0, 255, 255)})
    assert set(map(tuple, open_scene(path).read_all().reshape(-1, 3))) == {(255, 0, 0), (0, 255, 0), (0, 0, 255)}

    with pytest.raises(DataError, match="complex"):
        open_scene(write_tiff(tmp_path / "c.tif", np.ones((1, 20, 20), np.complex64)))


def test_a_damaged_geotiff_is_one_sentence(tmp_path):
    path = write_tiff(tmp_path / "a.tif", rng.integers(0, 256, (3, 300, 200), dtype=np.uint8), compress="deflate")
    path.write_bytes(path.read_bytes()[:90_000])
    with pytest.raises(DataError, match="a.tif") as error:
        open_scene(path).read_all()
    assert "\n" not in str(error.value)


def test_an_image_too_large_to_be_decoded_whole_is_read_by_windows(tmp_path, monkeypatch):
    pytest.importorskip("rasterio")
    monkeypatch.setattr(raster, "MAX_PLAIN", 1000)
    scene = open_scene(save(tmp_path / "a.png", RGB))
    assert type(scene) is RasterFile and scene.crs is None and np.array_equal(scene.read(5, 6, 7, 8), RGB[5:12, 6:14])


def discs(height=300, width=260):
    """A mask (uint8 0/255) of a disc with a hole, and one more disc."""
    y, x = np.mgrid[:height, :width]
    ring = ((x - 100) ** 2 + (y - 90) ** 2 < 70**2) & ((x - 90) ** 2 + (y - 100) ** 2 > 20**2)
    return (ring | ((x - 200) ** 2 + (y - 240) ** 2 < 30**2)).astype(np.uint8) * 255


def write_mask(scene, pixels, path):
    with scene.mask_file(path) as file:
        for top in range(0, len(pixels), 37):
            file.write(top, pixels[top : top + 37])
    return path


def test_the_mask_file_lies_where_the_scene_lies(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    turned = (0.4, 0.3, 399_960, 0.3, -0.4, 5_800_020)
    bands = ramps(3, 300, 260)
    bands[:, :20] = 7
    for transform, nodata in ((HERE["transform"], None), (turned, 7)):
        scene = open_scene(write_tiff(tmp_path / "a.tif", bands, transform=transform, nodata=nodata))
        pixels = discs() if nodata is None else np.where(scene.valid(0, 300), discs(), np.uint8(NODATA))
        with rasterio.open(write_mask(scene, pixels, tmp_path / "mask.tif")) as file:
            assert file.crs == rasterio.crs.CRS.from_epsg(32633) and file.transform == rasterio.Affine(*transform)
            assert (file.count, file.dtypes[0], file.nodata) == (1, "uint8", None if nodata is None else NODATA)
            assert file.profile["tiled"] and file.compression.name == "deflate"
            assert np.array_equal(file.read(1), pixels)
            assert file.xy(10, 20) == scene.file.xy(10, 20)


@pytest.mark.parametrize(
    "crs, transform",
    [
        ("EPSG:6933", (2.0, 0, 900_000, 0, -2.0, 5_000_000)),  # equal-area: the true area is that of the grid
        ("EPSG:32633", (0.5, 0, 399_960, 0, -0.5, 5_800_020)),
        ("EPSG:32633", (0.4, 0.3, 500_000, 0.3, -0.4, 5_800_020)),  # turned
        ("EPSG:3857", (1.0, 0, 1_000_000, 0, -1.0, 8_000_000)),  # Mercator at 58 degrees: 3.5 times too large
        ("EPSG:4326", (0.001, 0, 10.0, 0, -0.001, 52.0)),
    ],
)
def test_polygons_lie_where_the_mask_lies_and_have_its_area(tmp_path, crs, transform):
    rasterio = pytest.importorskip("rasterio")
    from rasterio.features import rasterize
    from rasterio.warp import transform as to
    from rasterio.warp import transform_geom

    mask = discs()
    scene = open_scene(write_tiff(tmp_path / "a.tif", ramps(3, *mask.shape), crs=crs, transform=transform))
    path = write_mask(scene, mask, tmp_path / "mask.tif")
    facts = write_polygons(path, tmp_path / "a.geojson", {"phrase": "the ring", "confidence": 0.75})
    collection = json.loads((tmp_path / "a.geojson").read_text())
    assert collection["type"] == "FeatureCollection" and facts["polygon_count"] == len(collection["features"]) == 2
    for feature in collection["features"]:
        assert feature["properties"]["phrase"] == "the ring" and feature["properties"]["confidence"] == 0.75
        for n, ring in enumerate(np.array(ring) for ring in feature["geometry"]["coordinates"]):
            assert np.array_equal(ring[0], ring[-1])
            assert (signed_area(ring[:-1]) < 0) == (n > 0)  # as RFC 7946 wants them
    first = max(collection["features"], key=lambda feature: feature["properties"]["area_m2"])
    assert len(first["geometry"]["coordinates"]) == 2  # the hole
    outline = np.array(first["geometry"]["coordinates"][0])
    steps = sum(len(r) for s, v in rasterio.features.shapes(mask) if v for r in s["coordinates"])
    assert len(outline) < 0.75 * steps

    # Back in the scene's coordinates they cover the same pixels, but for those that the half pixel may turn.
    shapes = [transform_geom("EPSG:4326", crs, feature["geometry"]) for feature in collection["features"]]
    again = rasterize(shapes, mask.shape, transform=rasterio.Affine(*transform)) > 0
    edge = cv2.dilate(mask, np.ones((3, 3))) != cv2.erode(mask, np.ones((3, 3)))
    assert np.array_equal(again[~edge], mask[~edge] > 0) and (again != (mask > 0)).mean() < 0.01
    place = moved(np.array([[100.0, 90.0]]), transform)
    longitude, latitude = to(crs, "EPSG:4326", *place.T)
    assert np.allclose(outline.mean(axis=0), (longitude[0], latitude[0]), atol=6 * np.ptp(outline) / 140)

    # The area: every pixel's own, by the scale of the projection there.
    a, b, _, d, e, _ = transform
    pixel = abs(a * e - b * d)
    if crs == "EPSG:6933":
        truth = pixel * (mask > 0).sum()
    elif crs == "EPSG:4326":
        top = 52.0 - 0.001 * np.arange(mask.shape[0])
        truth = (wgs84_belt(top, top - 0.001) * 0.001 / 360 * (mask > 0).sum(axis=1)).sum()
    else:
        x, y = moved(np.argwhere(mask)[:, ::-1] + 0.5, transform).T
        truth = pixel * np.mean(cell_areas(crs, x, y)) * (mask > 0).sum()
    assert facts["area_m2"] == pytest.approx(truth, rel=2e-5)
    assert sum(f["properties"]["area_m2"] for f in collection["features"]) == pytest.approx(facts["area_m2"], abs=0.02)


def wgs84_belt(upper, lower):
    """Area in m2 of the ellipsoid between two latitudes in degrees, by the closed formula."""
    a, flat = 6378137.0, 1 / 298.257223563
    b, e = a * (1 - flat), np.sqrt(flat * (2 - flat))

    def north(latitude):
        s = np.sin(np.radians(latitude))
        return np.pi * b**2 * (np.log((1 + e * s) / (1 - e * s)) / (2 * e) + s / (1 - (e * s) ** 2))

    return north(upper) - north(lower)


def cell_areas(crs, x, y):
    """True area of 1 x 1 cells of a projected system at some places, through their corners' longitudes and latitudes."""
    from rasterio.warp import transform

    x, y = x[::500], y[::500]
    corners = [transform(crs, "EPSG:4326", x + dx * 50, y + dy * 50) for dx, dy in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    lon, lat = np.array([c[0] for c in corners]), np.array([c[1] for c in corners])
    middle = lat.mean(axis=0)
    a, e2 = 6378137.0, 0.00669437999014
    s = np.sin(np.radians(middle))
    east = np.radians(lon) * a * np.cos(np.radians(middle)) / np.sqrt(1 - e2 * s**2)
    north = np.radians(lat) * a * (1 - e2) / (1 - e2 * s**2) ** 1.5
    area = (east * np.roll(north, -1, 0) - np.roll(east, -1, 0) * north).sum(axis=0) / 2
    return np.abs(area) / 100**2


def crossings(rings):
    """Pairs of edges of closed outlines that cross properly."""
    a = np.concatenate(rings).astype(float)
    b = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings]).astype(float)

    def side(p, q, r):  # (n, n): on which side of the line p-q lies r
        return np.sign((q - p)[..., 0] * (r - p)[..., 1] - (q - p)[..., 1] * (r - p)[..., 0])

    p, q, r, s = a[:, None], b[:, None], a[None], b[None]
    return int(((side(p, q, r) * side(p, q, s) < 0) & (side(r, s, p) * side(r, s, q) < 0)).sum()) // 2


@pytest.mark.parametrize("blur", [0, 1, 2, 4])
def test_simplified_outlines_stay_near_and_never_cross(blur):
    shapes = pytest.importorskip("rasterio.features").shapes
    noise = np.random.default_rng(blur).normal(size=(60, 60))
    mask = ((cv2.GaussianBlur(noise, (0, 0), blur) if blur else noise) > -0.05).astype(np.uint8)
    checked = fewer = 0
    for shape, value in shapes(mask):
        if not value:
            continue
        rings = [np.array(ring[:-1], np.int32) for ring in shape["coordinates"]]
        lines = [simplified(ring) for ring in rings]
        assert crossings(lines) == 0
        for line, ring in zip(lines, rings):
            assert len(line) >= 3 and abs(abs(signed_area(line)) - abs(signed_area(ring))) <= 0.5 * len(ring)
            for point in ring:  # to the nearest of the outline's edges
                p, q = line.astype(float), np.roll(line, -1, axis=0).astype(float)
                along = np.clip(((point - p) * (q - p)).sum(1) / ((q - p) ** 2).sum(1), 0, 1)
                assert np.hypot(*(p + along[:, None] * (q - p) - point).T).min() <= 0.5 + 1e-6
            checked, fewer = checked + len(ring), fewer + len(line)
    assert checked > 100 and fewer < checked


def test_an_empty_mask_has_no_polygons_and_nodata_is_none(tmp_path):
    pytest.importorskip("rasterio")
    bands = ramps(3)
    bands[:, :100] = 0
    scene = open_scene(write_tiff(tmp_path / "a.tif", bands, nodata=0))
    pixels = np.where(scene.valid(0, 300), np.uint8(0), np.uint8(NODATA))
    path = write_mask(scene, pixels, tmp_path / "mask.tif")
    assert write_polygons(path, tmp_path / "a.geojson", {}) == {"polygon_count": 0, "area_m2": 0}
    assert json.loads((tmp_path / "a.geojson").read_text())["features"] == []


def test_a_coordinate_system_that_is_not_of_the_earth_is_said(tmp_path):
    pytest.importorskip("rasterio")
    local = 'LOCAL_CS["site",LOCAL_DATUM["site",0],UNIT["metre",1],AXIS["X",EAST],AXIS["Y",NORTH]]'
    scene = open_scene(write_tiff(tmp_path / "a.tif", ramps(3, 300, 260), crs=local))
    path = write_mask(scene, discs(), tmp_path / "mask.tif")
    with pytest.raises(DataError, match="WGS 84"):
        write_polygons(path, tmp_path / "a.geojson", {})
