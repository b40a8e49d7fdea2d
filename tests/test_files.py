"""Files of others: every kind is read to its right pixels, alike in prediction, training and without rasterio, or refused."""

import contextlib
import io
import os
import resource
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from test_imagery import stretched

from imagery.foreground import foreground
from imagery.pixels import read_image
from imagery.results import write_files
from imagery.scenes import as_scene, open_scene
from runtime.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of rasterio and Pillow, as the tests themselves call them
y, x = np.mgrid[:96, :128]
A = np.stack([x * 2, y * 2, x * y % 256], axis=2).astype(np.uint8)  # a colourful picture
GREY = np.asarray(Image.fromarray(A).convert("L"))
LEFT = np.arange(128)[None, :].repeat(96, 0) < 64
OPAQUE = np.where(LEFT, 0, 255).astype(np.uint8)
UTM = {"crs": "EPSG:32631", "transform": (1, 0, 5e5, 0, -1, 5e6)}
NOWHERE = {"crs": None, "transform": None}
PLACED_XML = "<PAMDataset><SRS>EPSG:32631</SRS><GeoTransform>5e5,2,0,5e6,0,-2</GeoTransform></PAMDataset>"


def tiff(path, image, kinds=(), after=None, **options):
    """A file that rasterio writes, a GeoTIFF in UTM by default. kinds: the colour interpretation of its bands."""
    rasterio = pytest.importorskip("rasterio")
    bands = np.atleast_3d(image).transpose(2, 0, 1)
    options = {"driver": "GTiff", "dtype": bands.dtype.name} | UTM | options
    options["transform"] = options["transform"] and rasterio.Affine(*options["transform"])
    with rasterio.open(path, "w", **dict(zip(("count", "height", "width"), bands.shape)), **options) as file:
        if kinds:
            file.colorinterp = [rasterio.enums.ColorInterp[kind] for kind in kinds]
        file.write(bands)
        if after:
            after(file)
    return path


def pil(path, image, beside=(), **options):
    """A file that Pillow writes, and texts beside it: {name: text}."""
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    for name, text in dict(beside).items():
        path.with_name(name).write_text(text)
    return path


def bmp(path, header, pixels, masks=b""):
    size = 14 + len(header) + len(masks)
    path.write_bytes(b"BM" + struct.pack("<IHHI", size + len(pixels), 0, 0, size) + header + masks + pixels)
    return path


def bitfields(path, bits, masks, pixels, header=40):
    """A BMP of these masks; pixels: rows from the bottom, as integers."""
    head = struct.pack("<IiiHHIIiiII", header, 128, 96, 1, bits, 3, 0, 0, 0, 0, 0)
    kind = np.uint32 if bits == 32 else np.uint16
    return bmp(path, head, pixels[::-1].astype(kind).tobytes(), struct.pack("<III", *masks).ljust(header - 40, b"\0"))


def packed(*shifts, bits=8):
    return sum((A[..., n].astype(np.uint32) >> 8 - bits) << shift for n, shift in enumerate(shifts))


def expand(values, bits):
    return np.round(values * (255 / (2**bits - 1)))


def grey(values):
    values = np.atleast_3d(values)
    return values if values.shape[2] == 3 else np.repeat(values, 3, axis=2)


def deep(bands, valid=True):
    """(H, W, C) stretched from the 2nd to the 98th percentile of what is valid (H, W), as floats (H, W, 3)."""
    return grey(stretched(np.atleast_3d(bands).transpose(2, 0, 1), valid).transpose(1, 2, 0))


NIR = np.full((96, 128), 64, np.uint8)
INK = np.asarray(Image.fromarray(A).convert("CMYK"))
FILLED = np.where(LEFT[..., None], 255, A).astype(np.uint8)
DRONE = np.dstack([FILLED, NIR, OPAQUE])
DRONE_KINDS = ("red", "green", "blue", "undefined", "alpha")
EDGE = np.arange(128)[None].repeat(96, 0) < 8
FILLED_FLOAT = np.where(EDGE, -3.4e38, GREY).astype(np.float32)
OS2 = struct.pack("<IHHHH", 12, 128, 96, 1, 24)
VRT = ('<VRTDataset rasterXSize="128" rasterYSize="96">' + "".join(
    f'<VRTRasterBand dataType="Byte" band="{n}"><ColorInterp>{kind}</ColorInterp><SimpleSource><SourceFilename '
    f'relativeToVRT="1">v.png</SourceFilename><SourceBand>{4 - n}</SourceBand></SimpleSource></VRTRasterBand>'
    for n, kind in enumerate(("Blue", "Green", "Red"), start=1)) + "</VRTDataset>")  # fmt: skip

# name: (file, its pixels, where it has data or None, within, a word of its notes)
KINDS = {
    "near infrared tagged as alpha": (lambda p: tiff(p / "n.tif", np.dstack([A, NIR])), A, None, 0, "tagged as alpha"),
    "infrared of 0 over water": (lambda p: tiff(p / "w.tif", np.dstack([A, NIR * ~LEFT])), A, None, 0, "tagged as alpha"),
    "plain, the same": (lambda p: tiff(p / "w.tif", np.dstack([A, NIR * ~LEFT]), **NOWHERE), A, None, 0, "tagged as alpha"),
    "alpha of 128": (lambda p: pil(p / "a.tif", np.dstack([A, NIR * 2])), A, None, 0, "tagged as alpha"),
    "alpha of a GeoTIFF": (lambda p: tiff(p / "a.tif", np.dstack([FILLED, OPAQUE])), A, ~LEFT, 0, ""),
    "alpha of a TIFF": (lambda p: pil(p / "a.tif", np.dstack([FILLED, OPAQUE])), A, ~LEFT, 0, ""),
    "soft alpha of a PNG": (lambda p: pil(p / "a.png", np.dstack([FILLED, OPAQUE // 2])), A, ~LEFT, 0, ""),
    "alpha of 5 bands": (lambda p: tiff(p / "5.tif", DRONE, DRONE_KINDS, photometric="RGB"), A, ~LEFT, 0, ""),
    "and of 16 bits": (lambda p: tiff(p / "5.tif", DRONE * np.uint16(257), DRONE_KINDS, photometric="RGB"),
        deep(A, ~LEFT), ~LEFT, 1, ""),
    "and of floats": (lambda p: tiff(p / "5.tif", DRONE / np.float32(255), DRONE_KINDS, photometric="RGB"),
        deep(A, ~LEFT), ~LEFT, 1, ""),
    "an internal mask": (lambda p: tiff(p / "m.tif", A, after=lambda f: f.write_mask(OPAQUE), **NOWHERE), A, ~LEFT, 0, ""),
    "nodata beside a PNG": (lambda p: pil(p / "p.png", grey(GREY), {"p.png.aux.xml": "<PAMDataset>" + "".join(
        f'<PAMRasterBand band="{n}"><NoDataValue>{GREY[9, 99]}</NoDataValue></PAMRasterBand>' for n in (1, 2, 3))
        + "</PAMDataset>"}), grey(GREY), GREY != GREY[9, 99], 0, ""),
    **{f"{n} bits": (lambda p, n=n, where=where: tiff(p / "f.tif", GREY >> 8 - n, nbits=n, **where),
        expand(grey(GREY >> 8 - n), n), None, 0, "")
        for n, where in ((1, UTM), (2, UTM), (4, UTM), (5, NOWHERE), (7, NOWHERE), (2, NOWHERE), (4, NOWHERE))},
    "a bit and a world file": (lambda p: pil(p / "f.png", GREY > 127, {"f.pgw": "1\n0\n0\n-1\n0\n0\n"}),
        grey((GREY > 127) * 255), None, 0, ""),
    "white is 0": (lambda p: tiff(p / "w.tif", 255 - GREY, photometric="MINISWHITE"), grey(GREY), None, 0, ""),
    "white is 0, 16 bits": (lambda p: tiff(p / "w.tif", 65535 - GREY * np.uint16(90), photometric="MINISWHITE", **NOWHERE),
        deep(GREY), None, 1, ""),
    "white is 0, 1 bit": (lambda p: tiff(p / "w.tif", GREY >> 7, photometric="MINISWHITE", nbits=1),
        grey((1 - (GREY >> 7)) * 255), None, 0, ""),
    "CMYK in JPEG 2000": (lambda p: pil(p / "c.jp2", Image.fromarray(INK, "CMYK")), A, None, 1, ""),
    "YCbCr in JPEG 2000": (lambda p: pil(p / "y.jp2", Image.fromarray(A).convert("YCbCr")), A, None, 3, ""),
    "CMYK in a TIFF": (lambda p: pil(p / "c.tif", Image.fromarray(INK, "CMYK")), A, None, 1, ""),
    "BMP of OS/2": (lambda p: bmp(p / "1.bmp", OS2, A[::-1, :, ::-1].tobytes()), A, None, 0, ""),
    "BMP without alpha": (lambda p: bitfields(p / "2.bmp", 32, (0xFF0000, 0xFF00, 0xFF), packed(16, 8, 0)), A, None, 0, ""),
    "BMP, first byte unused": (
        lambda p: bitfields(p / "3.bmp", 32, (0xFF000000, 0xFF0000, 0xFF00), packed(24, 16, 8)), A, None, 0, ""),
    "BMP of 16 bits": (lambda p: bitfields(p / "4.bmp", 16, (0x7C00, 0x3E0, 0x1F), packed(10, 5, 0, bits=5), header=56),
        expand(A >> 3, 5), None, 5, ""),
    "BMP of 4 bits a colour": (lambda p: bitfields(p / "5.bmp", 16, (0xF00, 0xF0, 0xF), packed(8, 4, 0, bits=4)),
        expand(A >> 4, 4), None, 15, ""),
    "BMP of 10 bits a colour": (
        lambda p: bitfields(p / "6.bmp", 32, (0x3FF00000, 0xFFC00, 0x3FF), packed(22, 12, 2), header=56), A, None, 2, ""),
    "JPEG 2000 of reduced colours": (lambda p: tiff(p / "s.jp2", A // 4, driver="JP2OpenJPEG", YCBCR420="YES", QUALITY=100,
        REVERSIBLE="NO", **NOWHERE), A // 4, None, 6, ""),
    "blue, green, red": (lambda p: tiff(p / "b.tif", A[..., [2, 1, 0, 1]], ("blue", "green", "red", "undefined"),
        photometric="MINISBLACK", alpha="NO"), A, None, 0, "Bands 3, 2, 1"),
    "blue, green, red in words": (lambda p: tiff(p / "b.tif", A[..., ::-1], after=lambda f: setattr(
        f, "descriptions", ("Blue", "Green", "Red")), **NOWHERE), A, None, 0, "Bands 3, 2, 1"),
    "thirteen bands": (lambda p: tiff(p / "s.tif", np.dstack([A] * 4 + [NIR])), A, None, 0, "of 13"),
    "a tiny range": (lambda p: tiff(p / "t.tif", (GREY * 1e-13).astype(np.float32)), deep(GREY), None, 1, ""),
    "a large offset": (lambda p: tiff(p / "o.tif", GREY + 1e9), deep(GREY), None, 1, ""),
    "an outlier": (lambda p: tiff(p / "o.tif", np.where((x == 9) & (y == 9), 3.4e38, GREY).astype(np.float32)),
        deep(GREY, (x != 9) | (y != 9)), (x != 9) | (y != 9), 1, ""),
    "a fill value that is not declared": (
        lambda p: tiff(p / "f.tif", FILLED_FLOAT), deep(GREY, ~EDGE), ~EDGE, 1, ""),
    **{f"compressed by {name}": (lambda p, name=name: tiff(p / "k.tif", A, compress=name, **NOWHERE), A, None, 0, "")
       for name in ("ZSTD", "LZMA", "LERC", "DEFLATE", "LZW", "PACKBITS")},
    "tiles of 16 pixels": (lambda p: tiff(p / "k.tif", A, tiled=True, blockxsize=16, blockysize=16, **NOWHERE), A, None, 0, ""),
    "VRT": (lambda p: pil(p / "v.png", A) and (p / "v.vrt").write_text(VRT) and p / "v.vrt", A, None, 0, "Bands 3, 2, 1"),
    "ERDAS": (lambda p: tiff(p / "h.img", A, driver="HFA"), A, None, 0, ""),
    "ENVI": (lambda p: tiff(p / "e.dat", A, driver="ENVI"), A, None, 0, ""),
    "NITF": (lambda p: tiff(p / "n.ntf", A, driver="NITF", ICORDS="G", crs="EPSG:4326", transform=(0.1, 0, 5, 0, -0.1, 50)),
        A, None, 0, ""),
    "pages": (lambda p: pil(p / "p.tif", A, save_all=True, append_images=[Image.fromarray(A[::-1])]), A, None, 0, "2 pages"),
    "TGA": (lambda p: pil(p / "a.tga", A), A, None, 0, ""),
}  # fmt: skip

PICTURES = {  # on which other decoders print
    "JPEG with bytes before its end": lambda p: spoilt(pil(p / "n.jpg", A, quality=99, subsampling=0),
        lambda data: data[:-2] + b"abc" + data[-2:]),
    "PNG with a poor profile": lambda p: pil(p / "i.png", A, icc_profile=b"no profile"),
    "TIFF with a tag beyond its end": lambda p: spoilt(pil(p / "t.tif", A, dpi=(9, 9)), tag_beyond),
    "JPEG with a poor EXIF block": lambda p: pil(p / "e.jpg", A, quality=99, subsampling=0,
        exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\xff\x0f\0\0\0\0"),
}  # fmt: skip
KINDS |= {name: (make, A, None, 6, "") for name, make in PICTURES.items()}


def spoilt(path, change):
    path.write_bytes(change(path.read_bytes()))
    return path


def tag_beyond(data):
    """The TIFF whose resolution lies beyond its end."""
    start = struct.unpack("<I", data[4:8])[0]
    for entry in range(start + 2, len(data) - 12, 12):
        if data[entry : entry + 2] == struct.pack("<H", 282):
            return data[: entry + 8] + struct.pack("<I", len(data) + 5000) + data[entry + 12 :]


@pytest.mark.parametrize("kind", KINDS)
def test_right_pixels_in_prediction_and_training_with_and_without_rasterio(kind, tmp_path, monkeypatch, capfd):
    pytest.importorskip("rasterio")
    make, pixels, valid, within, note = KINDS[kind]
    path = make(tmp_path)
    scene = open_scene(path)
    seen, data = scene.read_all(), scene.valid(0, 96)
    assert np.array_equal(LEFT | True if data is None else data, LEFT | True if valid is None else valid)
    expected = pixels if valid is None else pixels * valid[..., None]
    assert np.abs(seen - expected.astype(float)).max() <= within
    assert note in " ".join(scene.notes) if note else not [n for n in scene.notes if "Band" in n or "pages" in n]
    for without in (False, True):
        if without:
            monkeypatch.setitem(sys.modules, "rasterio", None)
            try:
                assert np.array_equal(open_scene(path).read_all(), seen)
            except UserError as error:
                assert "rasterio" in str(error)
        try:
            assert np.array_equal(read_image(path), seen)
        except ValueError as error:
            assert any(word in str(error) for word in ("bits a channel", "pages", "needs rasterio")), error
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [
    "rpcs", "w_RPC.TXT", "w.pngw", "W.PGW", "w.wld", "w.jpgw", "w.TFW", "w.tifw", "w.bpw", "w.png.aux.xml", "w.jpg.aux.xml",
    "gcps", "gcps and crs", "no transform", "EPSG:4979", "EPSG:32631+5773", "3-D of UTM",
])  # fmt: skip
def test_a_place_goes_to_the_mask_and_none_is_invented(kind, tmp_path, monkeypatch):
    rasterio = pytest.importorskip("rasterio")
    numbers = dict.fromkeys(("line_num_coeff", "line_den_coeff", "samp_num_coeff", "samp_den_coeff"), [1.0] * 20)
    numbers |= {f"{side}_{what}": 64.0 for side in ("height", "lat", "long", "line", "samp") for what in ("off", "scale")}
    rpcs = rasterio.rpc.RPC(**numbers)
    points = [rasterio.control.GroundControlPoint(row=r, col=c, x=10 + c, y=50 - r) for r, c in ((0, 0), (0, 9), (9, 0))]
    path, crs, note = tmp_path / "w.tif", UTM["crs"], ""
    if kind == "rpcs":
        tiff(path, A, after=lambda file: setattr(file, "rpcs", rpcs), **NOWHERE)
        crs, note = None, "RPCs"
    elif kind == "w_RPC.TXT":
        sides = ("LINE", "SAMP", "LAT", "LONG", "HEIGHT")
        lines = [f"{side}_{what}: 64" for what in ("OFF", "SCALE") for side in sides]
        lines += [f"{side}_{part}_COEFF_{n}: 1" for side in ("LINE", "SAMP") for part in ("NUM", "DEN") for n in range(1, 21)]
        pil(path, A, {kind: "\n".join(lines)})
        crs, note = None, "RPCs"
    elif kind.startswith("gcps"):
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags.tagtype[33922] = 12
        tags[33922] = (0.0, 0, 0, 10, 50, 0, 128, 0, 0, 11, 50, 0, 0, 128, 0, 10, 49, 0)
        crs, note = (None, "control points") if kind == "gcps" else ("EPSG:4326", "control points")
        pil(path, A, tiffinfo=tags) if crs is None else tiff(path, A, after=lambda f: setattr(
            f, "gcps", (points, rasterio.crs.CRS.from_epsg(4326))), **NOWHERE)  # fmt: skip
    elif kind == "no transform":
        tiff(path, A, crs=crs, transform=None)
        note = "no geotransform"
    elif kind.endswith((".xml", "w", "W", "wld")):
        ending = {"b": "bmp", "j": "jpg", "t": "tif", "T": "tif"}.get(kind[2], "png")
        path = tmp_path / f"{kind[0]}.{'jpg' if 'jpg' in kind else ending}"
        pil(path, A, {kind: PLACED_XML if "xml" in kind else "2\n0\n0\n-2\n500001\n4999999\n"})
        crs, note = (crs, "") if "xml" in kind else (None, "no coordinate system")
    else:
        pyproj = pytest.importorskip("pyproj")
        crs = pyproj.CRS(32631).to_3d().to_wkt() if kind.startswith("3-D") else kind
        crs = rasterio.crs.CRS.from_user_input(crs)
        tiff(path, A, crs=crs, transform=UTM["transform"] if "79" not in kind else (1e-5, 0, 5, 0, -1e-5, 20))
    scene = open_scene(path)
    with scene.mask_file(tmp_path / "mask.tif") as file:
        file.write(0, np.zeros((96, 128), np.uint8))
    with rasterio.open(path) as source, rasterio.open(tmp_path / "mask.tif") as mask:
        assert (source.crs, source.gcps[1]) == (mask.crs, mask.gcps[1]) and source.transform == mask.transform
        assert [*map(vars, source.gcps[0])] == [*map(vars, mask.gcps[0])] and len(mask.gcps[0]) == 3 * kind.startswith("gcps")
        rational = [1.0] * 20 if note == "RPCs" else None
        assert all((file.rpcs and file.rpcs.samp_num_coeff) == rational for file in (source, mask))
        assert (mask.crs or mask.gcps[1]) == (crs and rasterio.crs.CRS.from_user_input(crs))
    assert scene.placed == (not note) and (note in " ".join(scene.notes) if note else not scene.notes)
    assert np.array_equal(scene.read_all(), read_image(path))
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(UserError, match="rasterio"):
        open_scene(path)


def png(*chunks, size=(8, 8)):
    """A PNG of these chunks after IHDR: (name, content, the length that it claims)."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", claimed[0] if claimed else len(data)) + name + data
        + struct.pack(">I", zlib.crc32(name + data)) for name, data, *claimed in chunks)  # fmt: skip


PIXELS = zlib.compress(bytes(8 * 25))
FRAME = (b"fcTL", struct.pack(">IIIIIHHBB", 0, 8, 8, 0, 0, 1, 10, 0, 0))
FILM = [Image.fromarray(A[..., order]) for order in ([1, 2, 0], [2, 0, 1])]
# name: (file, what is said of it in prediction, and in training where it differs)
REFUSED = {
    "APNG": (lambda p: pil(p / "a.png", A, save_all=True, append_images=FILM, default_image=True), "animation of"),
    "GIF": (lambda p: pil(p / "a.gif", A, save_all=True, append_images=FILM), "animation of 3 frames"),
    "WebP": (lambda p: pil(p / "a.webp", A, save_all=True, append_images=FILM), "animation of 3 frames"),
    "an APNG without a frame": (lambda p: (p / "a.png").write_bytes(png((b"acTL", struct.pack(">II", 2, 0)), (b"IDAT", PIXELS),
        FRAME, (b"fdAT", b""))) and p / "a.png", "animation of"),
    "a chunk that claims 2 GB": (lambda p: (p / "a.png").write_bytes(png((b"IDAT", PIXELS[:9], 0x80000010))) and p / "a.png",
        "damaged or cut off"),
    "a wide TIFF": (lambda p: tiff(p / "a.tif", np.zeros((1, 1), np.uint8)) and wide(p / "a.tif"), "at most 65,535 a side"),
    "a large PNG": (lambda p: (p / "a.png").write_bytes(png((b"IDAT", PIXELS), size=(65536, 65536))) and p / "a.png",
        "at most 65,535 a side"),
    "CMYK of 16 bits": (lambda p: tiff(p / "e.tif", INK * np.uint16(257), photometric="CMYK", **NOWHERE), "cyan, magenta",
        "16 bits"),
    "complex numbers": (lambda p: tiff(p / "c.tif", GREY.astype(np.complex64)), "complex numbers", "64 bits a channel"),
    "an alpha alone": (lambda p: tiff(p / "c.tif", OPAQUE, ("alpha",)), "alpha band alone"),
    "text": (lambda p: (p / "a.tif").write_text("hello") and p / "a.tif", "not a sound image"),
    "cut TIFF": (lambda p: cut(pil(p / "a.tif", A)), "damaged or cut off"),
    "cut LZW": (lambda p: cut(pil(p / "a.tif", A, compression="tiff_lzw")), "damaged or cut off|not a sound image"),
    "cut GeoTIFF": (lambda p: cut(tiff(p / "a.tif", A, compress="deflate")), "damaged or cut off|not a sound image"),
    "cut JPEG": (lambda p: cut(pil(p / "a.jpg", A)), "damaged or cut off"),
    "cut JPEG with a place": (lambda p: cut(pil(p / "a.jpg", A, {"a.jgw": "1\n0\n0\n-1\n0\n0\n"})), "damaged or cut off"),
    "cut PNG with a place": (lambda p: cut(pil(p / "a.png", A, {"a.pgw": "1\n0\n0\n-1\n0\n0\n"})), "damaged or cut off"),
    "cut JPEG 2000": (lambda p: cut(pil(p / "a.jp2", A), 20), "damaged or cut off|not a sound image"),
}  # fmt: skip


def cut(path, part=2):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // part])
    return path


def wide(path):
    rasterio = pytest.importorskip("rasterio")
    options = {"driver": "GTiff", "width": 2_100_000_000, "height": 1, "count": 1, "dtype": "uint8", "SPARSE_OK": True}
    with rasterio.open(path, "w", **options, **UTM | {"transform": rasterio.Affine(*UTM["transform"])}):
        return path


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_is_refused_in_a_sentence_with_little_memory(kind, tmp_path, capfd):
    make, *said = REFUSED[kind]
    if "place" in kind or "2000" in kind:
        pytest.importorskip("rasterio")
    path, before = make(tmp_path), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    capfd.readouterr()
    with pytest.raises(UserError, match=said[0]) as in_prediction:
        open_scene(path).read_all()
    try:
        read_image(path)
    except ValueError as error:
        in_training = str(error)
    assert all(str(path) in sentence and "\n" not in sentence for sentence in (str(in_prediction.value), in_training))
    assert any(words in in_training for words in said[-1].split("|") + ["claims more than 67,108,864 pixels"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # 300 MB, in kB
    assert capfd.readouterr() == ("", "")


def test_damaged_pil_objects_are_one_sentence(tmp_path):
    for name, options in (("t.jpg", {}), ("t.png", {}), ("t.tif", {"compression": "tiff_lzw"}), ("t.webp", {}), ("t.bmp", {})):
        data = pil(tmp_path / name, A, **options).read_bytes()
        for n in range(1, 24):
            try:
                image = Image.open(io.BytesIO(data[: len(data) * n // 24]))
            except Exception:  # it isn't even opened
                continue
            with pytest.raises(UserError, match="^The PIL image is damaged or cut off"):
                as_scene(image)


def test_damage_that_libtiff_tells_is_a_note_or_the_error(tmp_path, capfd):
    def damage(data):
        return data[:60] + bytes(byte ^ 0x5A for byte in data[60:200]) + data[200:]

    fax = spoilt(pil(tmp_path / "f.tif", GREY > 127, compression="group4"), damage)
    with Image.open(fax) as picture:
        assert picture.size == (128, 96)
    assert open_scene(fax).notes == ["A part of the file may be damaged."] and read_image(fax).shape == A.shape
    for path in (tmp_path / "l.tif", tmp_path / "m.tif"):
        spoilt(pil(path, A, compression="tiff_lzw"), damage)
        with pytest.raises(ValueError, match="damaged or cut off"):
            read_image(path)
    assert capfd.readouterr() == ("", "")


def test_pixels_that_are_not_square_on_the_ground_are_noted(tmp_path):
    for latitude, noted in ((0, False), (45, False), (60, True)):
        scene = open_scene(tiff(tmp_path / "a.tif", A, crs="EPSG:4326", transform=(1e-4, 0, 10, 0, -1e-4, latitude)))
        assert ["Pixels are 2 times as high" in note for note in scene.notes] == [True] * noted


def test_an_image_of_which_half_has_no_data_is_noted(tmp_path):
    paths = {"mask": tmp_path / "mask.png", "overlay": tmp_path / "overlay.png"}
    for alpha, noted in ((OPAQUE, ["50 % of the image has no data."]), (OPAQUE | (x > 50), [])):
        scene = as_scene(Image.fromarray(np.dstack([A, alpha.astype(np.uint8)])))
        assert write_files(paths, scene, foreground(scene, [(0, np.ones((96, 128)))]), {"phrase": "all"})[1] == noted


@pytest.mark.slow
def test_a_folder_of_any_images():
    """Each file below the folder FILES_OF_OTHERS is a mask of the size that Pillow or rasterio says, or one sentence."""
    rasterio = pytest.importorskip("rasterio")
    folder = os.environ.get("FILES_OF_OTHERS") or pytest.skip("FILES_OF_OTHERS names no folder of images")
    faults = []
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        try:
            scene = open_scene(path)
            rows = [scene.valid(top, 1) for top in (0, scene.height - 1)]
            assert scene.read_all().shape == (scene.height, scene.width, 3)
            assert all(row is None or row.shape == (1, scene.width) for row in rows)
        except UserError as error:
            assert str(error).count("\n") == 0 and str(path) in str(error)
            continue
        except Exception as error:
            faults.append(f"{path}: {type(error).__name__}: {error}")
            continue
        sizes = []
        with contextlib.suppress(Exception), Image.open(path) as picture:
            sizes += [picture.size, picture.size[::-1]]  # turned by its EXIF orientation
        with contextlib.suppress(Exception), rasterio.open(path) as file:
            sizes.append((file.width, file.height))
        if (scene.width, scene.height) not in sizes:
            faults.append(f"{path}: {scene.width} x {scene.height}, not {sizes}")
        try:
            if not np.array_equal(read_image(path), open_scene(path, as_stored=True).read_all()):
                faults.append(f"{path}: training reads other pixels")
        except ValueError as error:
            assert "\n" not in str(error)
    assert not faults, "\n".join(faults)
