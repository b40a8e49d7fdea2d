"""What is on disk: masks, `--check`, and what is said of broken and hostile data sets."""

import io
import json
import os
import pickle
import shutil
import struct
import sys
import tempfile
import zlib
from functools import partial
from pathlib import Path
from string import Template

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco
from test_data import (
    IMAGE,
    LAKE,
    SOUND,
    box,
    note,
    one_ref,
    opened,
    picture,
    ref,
    rle,
    save,
    write_csv,
    write_lists,
    write_refer,
)  # fmt: skip

import data
from annotations.masks import decode_rle, draw_polygon, survives_encoding
from imagery.pixels import read_image
from runtime.errors import UserError

MINI = Path(__file__).parent.parent.parent / "shared" / "rrsisd-mini"
REFS, INSTANCES = "rrsisd/refs(unc).p", "rrsisd/instances.json"


def test_masks_of_refs_and_their_encodings(tmp_path):
    polygons = [[10, 5, 30, 5, 30, 25, 10, 25], [12, 6, 20, 6, 20, 20, 12, 20], [45, -9, 80, -9, 80, 3, 45, 3]]
    counts = np.diff(np.flatnonzero(np.r_[True, np.diff(box().T.ravel()) != 0, True])).tolist()
    for segmentation in ([rle(box())], rle(box()), {"size": [40, 50], "counts": counts}, polygons):
        mask = box()
        mask[0:3, 45:50] = segmentation is polygons  # the third one is cut off at the border; the second is covered twice
        assert np.array_equal(opened(one_ref(tmp_path, segmentation))[0]["mask"], mask)
    rng = np.random.default_rng(0)
    for density in (0, 0.01, 0.5, 1):
        for shape in ((1, 1), (7, 300), (200, 90)):
            mask = (rng.random(shape) < density).astype(np.uint8)
            assert np.array_equal(decode_rle(rle(mask)), mask) and survives_encoding(rle(mask))
    empty_runs = {"size": [2, 2], "counts": [1, 0, 1, 2, 0]}  # rare, but an RLE
    assert decode_rle(empty_runs).tolist() == [[0, 1], [0, 1]] and not survives_encoding(empty_runs)


def test_polygons_are_drawn_as_pycocotools_draws_them_on_no_more_than_they_need(monkeypatch):
    rng, decode, sizes = np.random.default_rng(0), coco.decode, []
    monkeypatch.setattr(coco, "decode", lambda encoded: sizes.append(encoded[0]["size"]) or decode(encoded))
    for number in range(1000):
        height, width = (int(side) for side in rng.integers(1, 200, 2))
        points = (rng.uniform(0, 1, 2) * (width, height) + rng.normal(0, rng.choice([3, 60]), (6, 2))).round(number % 3)
        if (points.max(0) > 0).all() and (points.min(0) < (width, height)).all():
            polygon = points.ravel().tolist()
            whole = decode(coco.frPyObjects([polygon], height, width))[..., 0]
            assert np.array_equal(draw_polygon(polygon, height, width), whole)
    draw_polygon([10, 5, 30, 5, 30, 25, 10, 25], 4000, 4000)
    assert sizes[-1] == [27, 32]


def test_mask_files(tmp_path):
    write_csv(tmp_path, [("a.png", "m.png", "a lake", "train"), ("a.png", "m.jpg", "a lake", "train")])
    Image.fromarray(box(value=255)).save(tmp_path / "masks/m.jpg", quality=30)
    palette, red = Image.fromarray(box()), box()[..., None] * np.array([200, 0, 0], np.uint8)
    palette.putpalette([0, 0, 0, 0, 0, 9] + [0] * 762)
    opaque = np.dstack([red, np.full((40, 50), 255, np.uint8)])
    others = [Image.fromarray(form) for form in (box(value=255), red, opaque, box().astype(np.uint16) * 65535, box() > 0)]
    for form in (palette, *others):
        form.save(tmp_path / "masks/m.png")
        assert all(np.array_equal(item["mask"], box()) for item in opened(tmp_path))


@pytest.mark.skipif(not MINI.is_dir(), reason="the real cases are not here")
def test_real_cases():
    for split, n in (("train", 20), ("val", 5), ("test", 5)):
        dataset = opened(MINI, split)
        assert len(dataset) == n and dataset.name == "RRSIS-D"
        for item, sample in zip(dataset, dataset.samples):
            assert item["mask"].shape == (800, 800) and item["mask"].any() and item["category"]
            assert read_image(sample.image).shape == (512, 512, 3) and np.array_equal(item["mask"], coco.decode(sample.mask[0]))


@pytest.fixture
def checked(tmp_path, monkeypatch, capsys):
    """Runs `python data.py --check tmp_path/set ...` -> (exit code, {what is printed before a colon: what follows}, names)."""
    monkeypatch.chdir(tmp_path)

    def run(*options, root="set"):
        monkeypatch.setattr(sys, "argv", ["data.py", "--check", root, *options])
        try:
            code = data.main() or 0
        except SystemExit as exit:
            code = exit.code
        output, errors = capsys.readouterr()
        assert "Traceback" not in errors
        lines = [line.strip().rpartition(": ") for line in output.splitlines() if line[:4].strip()]
        said = {key: value for key, _, value in lines} | {"error": errors}
        return code, said, Path(said["all names"]).read_text() if "all names" in said else ""
    return run


def check_set(root):
    """12 training images and 3 of validation, sound."""
    rows = [(f"{n}.png", f"{n}.png", f"lake {n}", "train" if n < 12 else "val") for n in range(15)]
    write_csv(root, rows)
    for n in range(15):
        Image.fromarray(picture(n)).save(root / f"images/{n}.png")
        Image.fromarray(box(right=20 + n)).save(root / f"masks/{n}.png")
    return root, rows


def test_check_of_a_sound_set(tmp_path, checked):
    check_set(tmp_path / "set")
    for name in ("data-check.png", "data-check-2.png"):
        code, said, names = checked("--strict")
        assert (code, names, said["error"]) == (0, "", "") and said["contact sheet"] == name
        assert Image.open(name).size == (4 * 320, 4 * 346) and said["decoded"] == "15 of 15 samples, 15 images"
    assert checked("--sample", "4")[1]["decoded"] == "4 of 15 samples, 4 images" and said["image sizes"] == "50 x 40 (15)"
    code, said, _ = checked(root="nowhere")
    assert code == 2 and said["error"].startswith("data.py: There is no folder nowhere")


def test_check_names_every_fault(tmp_path, checked):
    root, rows = check_set(tmp_path / "set")
    for n in range(6):
        (root / f"images/{n}.png").write_bytes(b"")
    (root / "images/6.png").unlink()
    Image.fromarray(box(50, 40)).save(root / "masks/7.png")
    code, said, names = checked()
    assert code == 1 and (said["missing files"], said["broken files"]) == ("1", "6")
    assert said["masks of another shape than their image"] == "1" and said["splits that are not there"] == "0"
    assert all(f"set/images/{n}.png" in names for n in range(7)) and "train 7.png: set/masks/7.png (40 x 50)" in names
    assert said["error"] == "data.py: set: faults 8, notes 0; mend what is listed above.\n"
    write_csv(root, [("8.png", "8.png", "lake", "train"), ("9.png", "9.png", "lake", "test")])
    code, said, names = checked()
    assert code == 1 and said["splits that are not there"] == "1" and "\nval\n" in names


def test_check_notes_what_may_be_meant(tmp_path, checked):
    root, rows = check_set(tmp_path / "set")
    Image.fromarray(box(value=0)).save(root / "masks/0.png")
    Image.fromarray(box(41)).save(root / "masks/1.png")
    Image.fromarray(box(80, 100)).save(root / "masks/2.png")  # twice the size is the same shape
    Image.fromarray(picture(3)).save(root / "images/12.bmp")
    write_csv(root, [*rows[:12], ("12.bmp", "12.png", "LAKE  3", "val"), ("4.png", "", "a ship", "train"),
                     ("5.png", "6.png", "word " * 75, "train"), ("5.png", "6.png", "word " * 76, "train")])  # fmt: skip
    code, said, names = checked()
    counts = {"phrases over 77 tokens, which are cut": "1", "masks with nothing in them": "1", "broken files": "0",
              "masks up to 5 % off their image's shape": "1", "phrases that mean several targets of one image": "1",
              "masks of another size than their image": "2", "phrases that say to have no target": "1",
              "images in more than one split": "1"}  # fmt: skip
    assert code == 0 and {key: said[key] for key in counts} == counts
    assert "train 0.png: set/images/0.png" in names and "lake 3: train 3.png, val 12.bmp+12.png" in names
    assert "train set/images/3.png, val set/images/12.bmp" in names and "train 1.png: mask 50 x 41, image 50 x 40" in names
    assert checked("--strict")[0] == 1


def test_masks_of_zeros_and_ones_in_refsegrs(tmp_path, checked):
    root = write_lists(tmp_path / "set", ["1 a road", "2 a road"], ["1", "2"], value=1)
    save(root / "masks/2.tif", box(value=50))  # what is not above 50 is none of the target
    one, two = opened(root)
    assert np.array_equal(one["mask"], box()) and not two["mask"].any()
    assert checked()[1]["mask files of 0 and 1, where 1 is taken for the target"] == "1"


# Functions of a folder that write a broken data set into it


def written(write, *content, **options):
    return lambda root: write(root, *content, **options)


def runs(counts, size=(40, 50)):
    return written(one_ref, [{"size": list(size), "counts": counts}])


def content(file, change, write=one_ref):
    """A sound set, one of whose files holds `change`, or what `change` = (old, new) makes of its content."""
    def make(root):
        path = write(root) / file
        path.write_bytes(change if isinstance(change, bytes) else path.read_bytes().replace(*change))
    return make


def instead(file, target):
    """A sound set, one of whose files or folders becomes a link to `target`, or what the function `target` makes."""
    def make(root):
        path = one_ref(root) / file
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        target(path) if callable(target) else path.symlink_to(target)
    return make


def encoded(suffix, pixels, part=1.0):
    file = cv2.imencode(suffix, pixels)[1].tobytes()
    return file[: int(len(file) * part)]


def mask(pixels):
    return content("masks/a.png", encoded(".png", pixels), written(write_csv, [LAKE]))


image, refer, parts = partial(content, IMAGE), partial(written, write_refer), lambda *parts: written(one_ref, [*parts])
lists = partial(content, "output_phrase_train.txt", write=written(write_lists, ["1 a road"], ["1", "2"]))
table = partial(content, "phrases.csv", write=written(write_csv, [LAKE]))
TABLE = written(write_csv, [LAKE])
LARGE, HEADER = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8), b"image,mask,phrase,split\n"
CUT = encoded(".png", LARGE, 0.6), encoded(".jpg", LARGE, 0.6), encoded(".jpg", LARGE)[:-2]
DEEP = encoded(".png", LARGE.astype(np.uint16) * 16), encoded(".png", LARGE[..., 0].astype(np.uint16) * 16)
SHORT = {
    "IMAGE": f"ROOT/{IMAGE}", "BROKEN": f"Sample 3 of RRSIS-D (ROOT/{IMAGE}) is broken: annotation 3:", "REFS": f"ROOT/{REFS}",
    "BAD": f"Sample 3 of RRSIS-D (ROOT/{IMAGE}) is broken: ROOT/{IMAGE}", "NOT": "is not as in RRSIS-D",
    "MASK": "Sample a.png of set (ROOT/images/a.png) is broken: ROOT/masks/a.png", "CSV": "ROOT/phrases.csv",
    "REF0": f"ROOT/{REFS}, ref number 0 is not as in RRSIS-D", "PHRASE": f"ROOT/{REFS}, ref number 0: the phrase",
    "INSTANCES": f"ROOT/{INSTANCES}", "LIST": "ROOT/output_phrase_train.txt", "MISSING": "files of split 'train' are missing",
    "MEND": "mend the file or get it again.", "FIRST": "its first line must name image, mask, phrase.",
    "NEAR": "that is not a list of 3 or more points near the image.", "AGAIN": "get it again from its source.",
    "GO": "fetch them, or leave out their 1 of 1 samples with --skip-missing.", "EMPTY": "write one, or take the sample out.",
}  # fmt: skip


def film(kind, **options):
    file, frames = io.BytesIO(), [Image.new("RGB", (64, 64), colour) for colour in ("blue", "red", "green")]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], **options)
    return file.getvalue()


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


# 8 x 8 pixels, in two frames of which the second is empty, or of 2 GB; the like have crashed decoders.
HEAD = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
EMPTY_FRAME = HEAD + b"".join(chunk(*part) for part in (
    (b"acTL", struct.pack(">II", 2, 0)), (b"IDAT", zlib.compress(bytes(200))), (b"fcTL", struct.pack(">5I", 0, 8, 8, 0, 0)),
    (b"fdAT", b""), (b"IEND", b"")))  # fmt: skip
HUGE_CHUNK = HEAD + struct.pack(">I", 2**31 + 16) + b"IDAT" + bytes(24)
ANIMATIONS = [film("GIF"), film("PNG"), film("PNG", default_image=True), film("WEBP"), EMPTY_FRAME]
# The sentence -> what makes it. … stands for what other versions of Python and of libraries say otherwise.
CASES = {
    "loads": [image(encoded(".png", LARGE[:160])), refer([ref(3, ann_id=-1)], []), mask(box(80, 100)), mask(box(value=0)),
        mask(box(41)), mask(box() * 7), mask(cv2.GaussianBlur(box(value=250), (0, 0), 1)), parts(rle(box(80, 100))),
        parts(rle(box(41, 50)))],
    "$BAD is empty (0 bytes): get it again.": [image(b"")],
    "$BAD can't be read: not a sound image.": [image(b"hello " * 100), image(encoded(".tif", LARGE, 0.6))],
    "$BAD claims more than 67,108,864 pixels.": [image(b"P5 60000 60000 255\n"), image(b"P5 9000 9000 255\n")],
    "$BAD has 16 bits a channel: stretch it to 8-bit RGB, all of a set alike.": [*map(image, DEEP)],
    "$BAD is an animation of … frames: save the one you mean as a PNG.": [*map(image, ANIMATIONS)],
    "$MASK is an animation of … frames: save the one you mean as a PNG.": [
        content("masks/a.png", film, TABLE) for film in ANIMATIONS],
    "$BAD is damaged or cut off.": [*map(image, (HUGE_CHUNK, b"P5 50 40 255\n", *CUT))],
    "$BAD can't be read: it is no regular file.": [instead(IMAGE, kind) for kind in (Path.mkdir, os.mkfifo, "/dev/zero")],
    "$BAD can't be read: Too many levels of symbolic links.": [instead(IMAGE, "00003.jpg")],
    "1 $MISSING (ROOT/images/a.png): $GO": [
        lambda root: (write_csv(root, [LAKE]) / "images/a.png").unlink()],
    "None of the 1 images of $REFS (such as 00003.jpg) is in one of the folders ROOT/images/rrsisd/JPEGImages, "
    "ROOT/images/rrsisd, ROOT/images/JPEGImages, ROOT/images, …, ROOT/rrsisd: put them into one.": [
        instead(IMAGE, lambda path: None), instead("images/rrsisd/JPEGImages", "JPEGImages")],
    "None of the 1 images of $REFS (such as 00003.jpg) is in …: unpack ROOT/JPEGImages.zip.": [
        instead("images", lambda path: (path.parent / "JPEGImages.zip").touch())],
    "$MASK can't be read: not a sound image.": [content("masks/a.png", b"no image", written(write_csv, [LAKE]))],
    "$MASK has 16 bits a channel: stretch it …": [mask(np.dstack([box().astype(np.uint16)] * 3))],
    "$MASK (40 x 50) and the image (50 x 40, unturned) differ in shape: height and width are swapped.": [mask(box(50, 40))],
    "$MASK (50 x 43) and the image (50 x 40, unturned) differ in shape.": [mask(box(43))],
    "$MASK has 2 colours beside black (1, 2): make a mask of one colour for each target.": [mask(box() + 1)],
    "$MASK has 2 colours beside black (#0000ff, #00ffff): make …": [mask(np.dstack([box(value=255), box(right=12, value=255),
        box(right=12, value=0)]))],
    "$MASK has 300 colours beside black (1, 2, 3, 4, 5, ...): make …": [  # objects by number
        mask(np.arange(2000, dtype=np.uint16).reshape(40, 50) % 301)],
    "$BROKEN the mask (40 x 50) and the image (50 x 40, unturned) differ in shape: height and width are swapped.": [
        parts(rle(box(50, 40))), content(INSTANCES, (b'"height": 40, "width": 50', b'"height": 50, "width": 40'),
                                         parts([1, 2, 30, 4, 5, 30]))],
    "$BROKEN the mask (50 x 43) and the image (50 x 40, unturned) differ in shape.": [parts(rle(box(43)))],
    "$INSTANCES: annotation 3 has an empty segmentation: write its mask, or give a phrase without a target ann_id -1.": [
        written(one_ref, []), written(one_ref, None)],
    "$INSTANCES: annotation 3 has a list of numbers for its polygons: write a list of lists, [[x0, y0, x1, y1, ...]].": [
        parts(1, 2, 30, 4, 5, 30), written(one_ref, [3])],
    "$INSTANCES: annotation 3 has a polygon of pairs: write it as [x0, y0, x1, y1, ...].": [parts([[1, 2], [30, 4], [5, 30]])],
    "$INSTANCES: annotation 3 has a segmentation that is neither RLE nor polygons: mend it.": [parts("mask.png")],
    "$BROKEN the mask is not RLE, or its runs don't add up to its size.": [
        *map(runs, ("0", [1999], SOUND[0]["counts"] + "o", "o" * 9, "", "\u00e9\u00e9", "0\0", "b'0'", [[2000]], 3,
            [2001, -1])),
        runs(SOUND[0]["counts"], (4, 5)), runs([10**12], (10**6, 10**6)), runs([2000], (-40, -50)), parts({"size": [40, 50]}),
        runs([2**62, 2**62, 2**62, 2**62, 2000]), runs("PPPPPP4")],  # these wrap around, at 64 and 32 bits
    "$BROKEN the parts of the mask differ in size.": [parts(rle(box()), rle(box(41)))],
    "$BROKEN the mask has a polygon outside of the image.": [parts([60, 50, 90, 50, 90, 80])],
    "$BROKEN the mask has a polygon $NEAR": [parts([1e9] * 6), parts([-60000, 0, 60000, 9] * 1000), parts([1, 2]),
        parts([1, 2, 3, 4]), parts([1, 2, 3, 4, 5, 6, 7]), parts(["a"] * 6)],
    "$REF0 (ValueError: annotation 3 is not among the instances): $MEND": [refer([ref(3)], [])],
    "$REF0 (ValueError: no ref_id or no sentences): $MEND": [refer([ref(3, sentences=[])], [note(3, SOUND)])],
    "$REF0 (ValueError: a file_name is no text): $MEND": [refer([ref(3, file_name=7)], [note(3, SOUND)], pictures=0)],
    "$REF0 (…): $MEND": [refer([ref(3, split=7)], [note(3, SOUND)]), content(INSTANCES, (b"t\": 40", b"t\": 1e999"))],
    "$REFS has a ref_id more than once (3): make them unique.": [refer([ref(3), ref(3)], [note(3, SOUND)])],
    "$INSTANCES $NOT (ValueError: two different annotations have id 3): $MEND": [refer([], [note(3, SOUND), note(3, [])])],
    "$INSTANCES $NOT (…): $MEND": [content(INSTANCES, b"[]")],
    "ROOT has more than one list of phrases (ROOT/refs(unc).p, $REFS): leave one.": [content("refs(unc).p", b"")],
    "$REFS is not read (…): $AGAIN": [content(REFS, change) for change in (b"", pickle.dumps([ref(3)])[:50],
        pickle.dumps(3), b"cos\nmkdir\n(S'marker'\ntR.", b"\x80\x05\x96\xff\xff\xff\xff\x0f\x00\x00\x00.")],
    "ROOT has no samples in split 'train', its splits are: none.": [content(REFS, b"\x80\x02]r\xff\xff\xff\x7f."), lists(b"")],
    "$REFS had its line ends converted on the way here: get it again, in binary mode.": [
        content(REFS, pickle.dumps([ref(3)], protocol).replace(b"\n", b"\r\n")) for protocol in (0, 2)],
    "$REFS is a pickle of Python 2 whose text is not UTF-8: load it with encoding='latin1' and pickle it again.": [
        content(REFS, b"(lp0\n(dp1\nS'raw'\np2\nS'caf\\xe9'\np3\nsa."), content(REFS, b"\x80\x02]q\0}q\1U\3rawU\4caf\xe9sa.")],
    "$REFS can't be read (it is no regular file): see to it.": [instead(REFS, "/dev/zero")],
    "$INSTANCES is not sound JSON (…): $AGAIN": [
        content(INSTANCES, change) for change in (b'{"info": {}, ', b"[" * 100_000, (b"1.0", b"NaN"))],
    "$INSTANCES, line 1 is not UTF-8: save the file in that encoding.": [content(INSTANCES, b"\xff{}")],
    "$INSTANCES can't be read (No such file or directory): see to it.": [instead(INSTANCES, lambda path: None)],
    "$PHRASE is empty; $EMPTY": [written(one_ref, phrases=(text,)) for text in ("", " \t ", "\u200b\ufeff")],
    "$PHRASE has 19,997 characters, at most 10,000 are taken.": [written(one_ref, phrases=("a " * 9999,))],
    "$PHRASE holds NUL or other control characters; take them out.": [
        written(one_ref, phrases=("a\0b",)), content(REFS, (b"A ship on", b"\xed\xa0\x80 ghost"))],
    "$LIST, line 2: the phrase is empty; $EMPTY": [lists(b"1 a road\n2\n")],
    "$LIST, line 2 is not UTF-8: save the file in that encoding.": [lists(b"1 a road\n2 caf\xe9\n")],
    "$LIST, line 2 holds NUL: take it out.": [lists(b"1 a\n1 a \0 b\n"), lists(b"1 a\n\0 a road\n")],
    "2 $MISSING (ROOT/images/3, ROOT/masks/3): fetch them, or leave out their 1 of 2 …": [lists(b"1 a road\n3 a house\n")],
    "ROOT has more than one list of phrases ($LIST, ROOT/phrase_txts/output_phrase_train.txt): leave one.": [
        lambda root: shutil.copytree(write_lists(root, ["1 a road"], ["1"]), root / "phrase_txts")],
    "ROOT has phrase lists but no folder mask or masks: put it beside them.": [
        lambda root: (write_lists(root, [], ["1"]) / "masks").rename(root / "annotations")],
    "$CSV has the columns image, mask, split but lacks phrase: $FIRST": [table(b"image,mask,split\n")],
    "$CSV has the columns  but lacks image, mask, phrase: $FIRST": [table(b""), table(b"\n,,,\n")],
    "$CSV, line 3 has not as many fields as the first line: quote phrases with commas.": [
        table(HEADER + b"a.png,a.png,a lake,train\na.png,a.png,a lake, blue,train\n")],
    "$CSV, line 2 has no image or split: fill them in.": [
        table(HEADER + row) for row in (b",a.png,a lake,train\n", b"a.png,a.png,a lake,\n")],
    "$CSV, line 3 gives a.png the category 'sea', a row above 'lake': a target has one.": [
        table(b"category," + HEADER + b"lake,a.png,a.png,a lake,train\nsea,a.png,a.png,the lake,train\n")],
    "$CSV, line 2 is not sound CSV (field larger than field limit (131072)): mend it.": [table(HEADER + b"x" * 200_000)],
    "$CSV, line 2 is not UTF-8: save the file in that encoding.": [table(HEADER + b"a.png,a.png,caf\xe9,train\n")],
    "$CSV, line 2 holds NUL: take it out.": [table(HEADER + b) for b in (b"a.png,a.png,\0,train\n", b"\0.png,a.png,a,train\n")],
    "ROOT.zip is no folder: unpack it and give the folder that comes out.": [lambda root: root.rename(f"{root}.zip")],
    "ROOT holds no data set, but its folder ROOT/deeper does: give that one.": [
        lambda root: one_ref(root / "deeper"), lambda root: TABLE(root / "deeper")],
    "ROOT holds no data set, but rrsisd.zip: unpack it there.": [lambda root: (root / "rrsisd.zip").touch()],
    "There is no folder ROOT: give a folder or one of RRSIS-D, RefSegRS, RISBench, scenes.": [
        lambda root: (root.rmdir(), root.symlink_to(root.name)), Path.rmdir],
    "ROOT holds nothing, no data set known here: lay it out in one of these ways.": [lambda root: None],
    "ROOT holds a.txt, no data set known here: lay it out …": [lambda root: (root / "a.txt").write_text("")],
}  # fmt: skip


def outcome(root):
    """'loads', or the first line of the sentence that the data set raises when opened or at an item."""
    try:
        dataset = opened(str(root))
        return "loads" if [dataset[index] for index in range(len(dataset))] else "empty"
    except UserError as error:
        return str(error).split("\n")[0].replace(str(root), "ROOT")


@pytest.mark.parametrize("expected, make", [
    pytest.param(sentence, make, id=sentence[:40]) for sentence, makes in CASES.items() for make in makes
])  # fmt: skip
def test_what_is_said_of_broken_data(tmp_path, monkeypatch, expected, make):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "set"
    root.mkdir()
    make(root)
    first, *rest = Template(expected).substitute(SHORT).split("…")
    sentence = outcome(root)
    assert sentence.startswith(first) and (sentence.endswith(rest[0]) if rest else sentence == first)
    assert not Path("marker").exists()


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="permissions as Unix has them")
@pytest.mark.parametrize("closed", ["", "rrsisd", "images/rrsisd/JPEGImages", INSTANCES, IMAGE])
def test_files_and_folders_without_permission(closed):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own can't be entered by others
        os.chmod(folder, 0o755)
        root, user = one_ref(Path(folder, "set")), os.geteuid()
        os.chmod(root / closed, 0)
        try:
            os.seteuid(user or 65534)  # permissions don't bind root
            sentence = outcome(root)
        finally:
            os.seteuid(user), os.chmod(root / closed, 0o755)
    start, end = (SHORT["BROKEN"].removesuffix("annotation 3:"), ": ") if closed == IMAGE else ("", " (")
    assert sentence.startswith(f"{start}{os.path.join('ROOT', closed).rstrip('/')} can't be read{end}Permission denied")


ONE = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=9)
ANY = ONE | st.lists(ONE, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(), ONE | st.lists(ONE), max_size=4)


def changed(value, draw):
    """With one of its parts, at any depth, replaced."""
    if not isinstance(value, (dict, list)) or not value or draw(st.integers(0, 5)) == 0:
        return draw(ANY)
    copy = value.copy()
    key = draw(st.sampled_from(list(copy if isinstance(copy, dict) else range(len(copy)))))
    copy[key] = changed(copy[key], draw)
    return copy


def change_values(name, load, dump):
    def change(root, draw):
        value = changed(load((root / name).read_bytes()), draw)
        (root / name).write_bytes(dump(changed(value, draw) if draw(st.booleans()) else value))
    return change


def change_rle(root, draw):
    """An RLE of characters, near a sound one or any, of any size."""
    text = draw(st.text(max_size=30)) if draw(st.booleans()) else mutated(SOUND[0]["counts"].encode(), draw).decode("latin1")
    size = draw(st.sampled_from([[40, 50], [1, 1], [0, 0], [10**9, 10**9]]) | st.lists(st.integers(), max_size=3))
    one_ref(root, [{"size": size, "counts": text}])


def change_bytes(name):
    return lambda root, draw: (root / name).write_bytes(mutated((root / name).read_bytes(), draw))


def mutated(sound, draw):
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=60))
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, len(sound))), draw(st.integers(0, 8))
        sound = sound[:at] + draw(st.binary(max_size=8)) + sound[at + length :]
    return sound


REFER = refer([ref(3), ref(4)], [note(3, SOUND), note(4, [[1, 2, 30, 4, 5, 30]])])
LISTS = written(write_lists, ["1 a road", "2 a lake"], ["1", "2"])
KINDS = {
    "refs": (REFER, change_values(REFS, pickle.loads, pickle.dumps)), "bytes of refs": (REFER, change_bytes(REFS)),
    "instances": (REFER, change_values(INSTANCES, json.loads, lambda value: json.dumps(value, default=repr).encode())),
    "bytes of instances": (REFER, change_bytes(INSTANCES)), "bytes of an image": (REFER, change_bytes(IMAGE)),
    "RLE": (REFER, change_rle), "lists": (LISTS, change_bytes("output_phrase_train.txt")),
    "table": (TABLE, change_bytes("phrases.csv")),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("examples", [50, pytest.param(4000, marks=pytest.mark.slow)])
def test_mutated_files_load_or_are_refused_by_a_sentence(tmp_path, kind, examples):
    write, change = KINDS[kind]
    write(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    outcomes = []

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def attempt(draws):
        for path, sound in files.items():
            path.write_bytes(sound)
        change(tmp_path, draws.draw)
        outcomes.append(outcome(tmp_path))
        assert outcomes[-1] and "Traceback" not in outcomes[-1]

    attempt()
    assert len(outcomes) - outcomes.count("loads") > 5
