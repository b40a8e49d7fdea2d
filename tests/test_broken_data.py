"""Broken and hostile data: every case with the sentence the user sees, or "loads"; and mutations of sound files.

The long one: python -m pytest -m slow -s tests/test_broken_data.py
"""
# ruff: noqa: E501 (sentences stand here as they are seen)

import contextlib
import io
import json
import os
import pickle
import shutil
import tempfile
import zlib
from pathlib import Path
from string import Template

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data import SMALL, annotation, box, one_ref, picture, ref, rle, save, write_csv, write_lists, write_refer

from data import DataError, open_dataset

# ---- what is broken: a function of the folder, which writes a data set into it ----------------------------------------------

IMAGE, REFS, INSTANCES = "images/rrsisd/JPEGImages/00003.jpg", "rrsisd/refs(unc).p", "rrsisd/instances.json"
SOUND = [rle(box())]


def encoded(suffix, share=1.0):
    content = cv2.imencode(suffix, picture(200, 200))[1].tobytes()
    return content[: int(len(content) * share)]


def png_header(width, height):
    """A PNG that claims a size and holds no pixels."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    raw = bytearray(file.getvalue())
    raw[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    return bytes(raw)


def image(content):
    return lambda root: (one_ref(root) / IMAGE).write_bytes(content)


def turned(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(one_ref(root) / IMAGE, picture(), exif=exif, quality=95)


def mask(array):
    return lambda root: save(write_csv(root, [("a.png", "m.png", "a lake", "train")]) / "masks/m.png", array)


def palette(root):
    form = Image.fromarray(box())
    form.putpalette([0, 0, 0, 0, 0, 9] + [0] * 762)
    form.save(write_csv(root, [("a.png", "m.png", "a lake", "train")]) / "masks/m.png")


def segmentation(*parts):
    return lambda root: one_ref(root, list(parts))


def runs(counts, size=(40, 50)):
    return segmentation({"size": list(size), "counts": counts})


def phrase(text):
    def make(root):
        refs = [ref(3), ref(4, sentences=[{"raw": text, "sent": text}])]
        write_refer(root, refs, [annotation(3, SOUND), annotation(4, SOUND)])
    return make


def surrogate(root):
    phrase("SURROGATE")(root)
    file = root / REFS
    file.write_bytes(file.read_bytes().replace(b"SURROGATE", b"\xed\xa0\x80 ghost"))


def refer(refs, annotations, **options):
    return lambda root: write_refer(root, refs, annotations, **options)


def content(file, change):
    """A sound set with one file's content changed."""
    def make(root):
        path = one_ref(root) / file
        path.write_bytes(change(path.read_bytes()) if callable(change) else change)
    return make


def lists(file_content, layout="RefSegRS"):
    def make(root):
        (write_lists(root, ["1 a road"], ["1", "2"], layout) / "output_phrase_train.txt").write_bytes(file_content)
    return make


def list_twice(root):
    write_lists(root, ["1 a road"], ["1"])
    (root / "phrase_txts").mkdir()
    (root / "phrase_txts/output_phrase_train.txt").write_text("1 a road\n")


def no_masks(root):
    (write_lists(root, ["1 a road"], ["1"]) / "masks").rename(root / "annotations")


def table(*rows, **options):
    return lambda root: write_csv(root, rows, **options)


def table_content(text):
    return lambda root: (write_csv(root, []) / "phrases.csv").write_bytes(text)


def both(first, second):
    return lambda root: (first(root), second(root))


def instead(file, replace):
    """A sound set, one of whose files or folders becomes something else."""
    def make(root):
        path = one_ref(root) / file
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        replace(path)
    return make


class Marker:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def code(root):
    one_ref(root)
    (root / REFS).write_bytes(pickle.dumps([ref(3), Marker(root / "marker")]))


LAKE = ("a.png", "a.png", "a lake", "train")
DEEP = b"[" * 100_000
# Case -> (what makes it, what is seen). In the sentences … stands for what other versions of Python say otherwise.
CASES = {
    # images
    "image of zero bytes": (
        image(b""),
        "$SAMPLE $IMAGE can't be read: not a sound image.",
    ),
    "image is text": (
        image(b"hello " * 100),
        "$SAMPLE $IMAGE can't be read: not a sound image.",
    ),
    "image has another suffix": (image(encoded(".png")), "loads"),
    "image with a huge header": (
        image(png_header(60000, 60000)),
        "$SAMPLE $IMAGE claims more than 67,108,864 pixels.",
    ),
    "image of 16 bits": (
        image(cv2.imencode(".png", picture().astype(np.uint16) * 16)[1].tobytes()),
        "$SAMPLE $IMAGE has 16 bits a channel: stretch it to 8-bit RGB, all of a set alike.",
    ),
    "image without pixels": (
        image(png_header(50, 40)),
        "$SAMPLE $IMAGE is damaged or of an unknown format.",
    ),
    "JPEG cut at 60 %": (
        image(encoded(".jpg", 0.6)),
        "$SAMPLE $IMAGE is cut off.",
    ),
    "JPEG without its end": (
        image(encoded(".jpg")[:-2]),
        "$SAMPLE $IMAGE is cut off.",
    ),
    "PNG cut at 60 %": (
        image(encoded(".png", 0.6)),
        "$SAMPLE $IMAGE is damaged or of an unknown format.",
    ),
    "TIFF cut at 60 %": (
        image(encoded(".tif", 0.6)),
        "$SAMPLE $IMAGE can't be read: not a sound image.",
    ),
    "image turned by EXIF": (turned, "loads"),
    "image absent": (
        instead(IMAGE, lambda path: None),
        "1 files of split 'train' are missing ($IMAGE): fetch them, or leave out their 1 of 1 samples with --skip-missing.",
    ),
    "image is a folder": (
        instead(IMAGE, Path.mkdir),
        "$SAMPLE $IMAGE can't be read: it is no regular file.",
    ),
    "image is a loop of links": (
        instead(IMAGE, lambda path: path.symlink_to(path.name)),
        "$SAMPLE $IMAGE can't be read: Too many levels of symbolic links.",
    ),
    "image is an endless device": (
        instead(IMAGE, lambda path: path.symlink_to("/dev/zero")),
        "$SAMPLE $IMAGE can't be read: it is no regular file.",
    ),
    "image is a pipe": (
        instead(IMAGE, os.mkfifo),
        "$SAMPLE $IMAGE can't be read: it is no regular file.",
    ),
    "folder of images is a loop": (
        instead("images/rrsisd/JPEGImages", lambda path: path.symlink_to(path.name)),
        "1 files of split 'train' are missing (ROOT/images/rrsisd/00003.jpg): fetch them, or leave out their 1 of 1 samples with --skip-missing.",
    ),
    # masks
    "mask of another size": (mask(box(80, 100)), "loads"),
    "mask all zero": (mask(box(value=0)), "loads"),
    "mask all one": (mask(np.ones((40, 50), np.uint8)), "loads"),
    "mask of three channels": (mask(np.dstack([box(value=200)] * 3)), "loads"),
    "mask with a palette": (palette, "loads"),
    "mask is no image": (
        both(table(LAKE), lambda root: (root / "masks/a.png").write_bytes(b"no image")),
        "Sample a.png of set (ROOT/images/a.png) is broken: ROOT/masks/a.png can't be read: not a sound image.",
    ),
    "mask of another shape": (
        mask(np.zeros((50, 40), np.uint8)),
        "Sample a.png+m.png of set (ROOT/images/a.png) is broken: ROOT/masks/m.png (40 x 50) and the image (50 x 40, unturned) "
        "differ in shape.",
    ),
    "mask with a huge header": (
        both(table(LAKE), lambda root: (root / "masks/a.png").write_bytes(png_header(60000, 60000))),
        "Sample a.png of set (ROOT/images/a.png) is broken: ROOT/masks/a.png claims more than 67,108,864 pixels.",
    ),
    "RLE of another size": (segmentation(rle(box(80, 100))), "loads"),
    "RLE too short": (
        runs("0"),
        "$SAMPLE the mask is not RLE, or its runs don't add up to its size.",
    ),
    "RLE too long": (
        runs(rle(box())["counts"], (4, 5)),
        "$SAMPLE the mask is not RLE, or its runs don't add up to its size.",
    ),
    "RLE without end": (
        runs(rle(box())["counts"] + "o"),
        "$SAMPLE the mask is not RLE, or its runs don't add up to its size.",
    ),
    "RLE of other characters": (
        runs("\u00e9\u00e9"),
        "$SAMPLE the mask is not RLE, or its runs don't add up to its size.",
    ),
    "RLE empty": (
        runs(""),
        "$SAMPLE the mask is not RLE, or its runs don't add up to its size.",
    ),
    "RLE nested": (
        runs([[2000]]),
        "$SAMPLE the mask is not RLE, or its runs don't add up to its size.",
    ),
    "RLE without counts": (
        segmentation({"size": [40, 50]}),
        "$SAMPLE the mask is not RLE, or its runs don't add up to its size.",
    ),
    "RLE negative": (
        runs([2001, -1]),
        "$SAMPLE the mask is not RLE, or its runs don't add up to its size.",
    ),
    "RLE that wraps around": (
        runs([2**62, 2**62, 2**62, 2**62, 2000]),
        "$SAMPLE the mask is not RLE, or its runs don't add up to its size.",
    ),
    "RLE bomb": (
        runs([10**12], (10**6, 10**6)),
        "$SAMPLE the mask is not RLE, or its runs don't add up to its size.",
    ),
    "RLEs of two sizes": (
        segmentation(rle(box()), rle(box(41))),
        "$SAMPLE the parts of the mask differ in size.",
    ),
    "polygon outside": (
        segmentation([60, 50, 90, 50, 90, 80]),
        "$SAMPLE the mask has a polygon outside of the image.",
    ),
    "polygon across the border": (segmentation([45, -9, 80, -9, 80, 3, 45, 3]), "loads"),
    "polygon far outside": (
        segmentation([1e9] * 6),
        "$SAMPLE the mask has a polygon that is not a list of 3 or more points near the image.",
    ),
    "polygon of endless edges": (
        segmentation([-60000, 0, 60000, 9] * 1000),
        "$SAMPLE the mask has a polygon that is not a list of 3 or more points near the image.",
    ),
    "polygon is a point": (
        segmentation([1, 2]),
        "$SAMPLE the mask has a polygon that is not a list of 3 or more points near the image.",
    ),
    "polygon is a box": (
        segmentation([1, 2, 3, 4]),
        "$SAMPLE the mask has a polygon that is not a list of 3 or more points near the image.",
    ),
    "polygon is odd": (
        segmentation([1, 2, 3, 4, 5, 6, 7]),
        "$SAMPLE the mask has a polygon that is not a list of 3 or more points near the image.",
    ),
    "polygon of words": (
        segmentation(["a"] * 6),
        "$SAMPLE the mask has a polygon that is not a list of 3 or more points near the image.",
    ),
    "segmentation is a number": (
        segmentation(3),
        "$REFS, ref number 0 is not as in RRSIS-D (ValueError: a segmentation is neither RLE nor polygons): mend the file or get it again.",
    ),
    "no target": (refer([ref(3, ann_id=-1)], []), "loads"),
    # refs and annotations
    "annotation absent": (
        refer([ref(3)], []),
        "$REFS, ref number 0 is not as in RRSIS-D (ValueError: annotation 3 is not among the instances): mend the file or get it again.",
    ),
    "ref_id twice": (
        refer([ref(3), ref(3)], [annotation(3, SOUND)]),
        "$REFS has a ref_id more than once (3): make them unique.",
    ),
    "annotation twice": (
        refer([ref(3)], [annotation(3, SOUND), annotation(3, [])]),
        "$INSTANCES is not as in RRSIS-D (ValueError: two different annotations have id 3): mend the file or get it again.",
    ),
    "ref without sentences": (
        refer([ref(3, sentences=[])], [annotation(3, [])]),
        "$REFS, ref number 0 is not as in RRSIS-D (ValueError: no ref_id or no sentences): mend the file or get it again.",
    ),
    "file_name a number": (
        refer([ref(3, file_name=7)], [annotation(3, [])], pictures=False),
        "$REFS, ref number 0 is not as in RRSIS-D (ValueError: a file_name is no text): mend the file or get it again.",
    ),
    "split a number": (
        refer([ref(3, split=7)], [annotation(3, [])]),
        "$REFS, ref number 0 is not as in RRSIS-D (TypeError: intern() argument must be str, not int): mend the file or get it again.",
    ),
    "refs twice": (
        both(one_ref, lambda root: (root / "refs(unc).p").write_bytes(b"")),
        "ROOT has the same twice (ROOT/refs(unc).p, $REFS): leave one.",
    ),
    "refs cut": (
        content(REFS, lambda sound: sound[:50]),
        "$REFS is not read (EOFError): get it again from its source.",
    ),
    "refs of zero bytes": (
        content(REFS, b""),
        "$REFS is not read (EOFError): get it again from its source.",
    ),
    "refs a number": (
        content(REFS, pickle.dumps(3)),
        "$REFS is not read (it holds int, not a list): get it again from its source.",
    ),
    "refs run code": (
        code,
        "$REFS is not read (it asks for …, which phrases don't need and which could run code): get it again from its source.",
    ),
    "refs reserve memory by memo": (
        content(REFS, b"\x80\x02]r\xff\xff\xff\x7f."),
        "ROOT has no samples in split 'train', its splits are: none.",
    ),
    "refs reserve memory by bytes": (
        content(REFS, b"\x80\x05\x96\xff\xff\xff\xff\x0f\x00\x00\x00."),
        "$REFS is not read (it holds a byte array, which phrases don't need and which reserves what it claims to hold): get it again from its source.",
    ),
    "refs are a device": (
        instead(REFS, lambda path: path.symlink_to("/dev/zero")),
        "$REFS can't be read (it is no regular file): see to it.",
    ),
    "JSON cut": (
        content(INSTANCES, lambda sound: sound[:200]),
        "$INSTANCES is not sound JSON (…): get it again from its source.",
    ),
    "JSON NaN": (
        content(INSTANCES, lambda sound: sound.replace(b"1.0", b"NaN")),
        "$INSTANCES is not sound JSON (it holds NaN): get it again from its source.",
    ),
    "JSON beyond numbers": (
        content(INSTANCES, lambda sound: sound.replace(b'"height": 40', b'"height": 1e999')),
        "$REFS, ref number 0 is not as in RRSIS-D (…): mend the file or get it again.",
    ),
    "JSON nested deep": (
        content(INSTANCES, DEEP),
        "$INSTANCES is not sound JSON (…): get it again from its source.",
    ),
    "JSON not UTF-8": (
        content(INSTANCES, b"\xff{}"),
        "$INSTANCES, line 1 is not UTF-8: save the file in that encoding.",
    ),
    "JSON a list": (
        content(INSTANCES, b"[]"),
        "$INSTANCES is not as in RRSIS-D (…): mend the file or get it again.",
    ),
    "JSON absent": (
        instead(INSTANCES, lambda path: None),
        "$INSTANCES can't be read (No such file or directory): see to it.",
    ),
    # phrases
    "phrase empty": (
        phrase(""),
        "$REFS, ref number 1: the phrase is empty; write one, or take the sample out.",
    ),
    "phrase blank": (
        phrase(" \t "),
        "$REFS, ref number 1: the phrase is empty; write one, or take the sample out.",
    ),
    "phrase over-long": (
        phrase("a " * 9999),
        "$REFS, ref number 1: the phrase has 19,997 characters, at most 10,000 are taken.",
    ),
    "phrase with NUL": (
        phrase("a\0b"),
        "$REFS, ref number 1: the phrase holds NUL or other control characters; take them out.",
    ),
    "phrase with half a character": (
        surrogate,
        "$REFS, ref number 1: the phrase holds NUL or other control characters; take them out.",
    ),
    "phrase a number": (
        phrase(3),
        "$REFS, ref number 1: the phrase is empty; write one, or take the sample out.",
    ),
    # phrase lists
    "line without phrase": (
        lists(b"1 a road\n2\n"),
        "$LIST, line 2: the phrase is empty; write one, or take the sample out.",
    ),
    "line not UTF-8": (
        lists(b"1 a road\n2 caf\xe9\n"),
        "$LIST, line 2 is not UTF-8: save the file in that encoding.",
    ),
    "line with NUL": (
        lists(b"1 a \0 road\n"),
        "$LIST, line 1: the phrase holds NUL or other control characters; take them out.",
    ),
    "line of an absent image": (
        lists(b"1 a road\n3 a house\n"),
        "2 files of split 'train' are missing (ROOT/images/3, ROOT/masks/3): fetch them, or leave out their 1 of 2 samples with --skip-missing.",
    ),
    "id with NUL": (
        lists(b"\0 a road\n"),
        "2 files of split 'train' are missing (ROOT/images/\u0000, ROOT/masks/\u0000): fetch them, or leave out their 1 of 1 samples with --skip-missing.",
    ),
    "list of zero bytes": (
        lists(b""),
        "ROOT has no samples in split 'train', its splits are: none.",
    ),
    "split named twice": (
        list_twice,
        "ROOT has the same twice ($LIST, ROOT/phrase_txts/output_phrase_train.txt): leave one.",
    ),
    "no folder of masks": (
        no_masks,
        "ROOT has phrase lists but no folder mask or masks: put it beside them.",
    ),
    # a table of one's own
    "CSV without a column": (
        table(("a.png", "a.png", "a lake"), header=("image", "mask", "phrase")),
        "$CSV has the columns image, mask, phrase but lacks split: its first line must be image,mask,phrase,split.",
    ),
    "CSV unquoted comma": (
        table(LAKE, ("a.png", "a.png", "a lake", " blue", "train")),
        "$CSV, line 3 has not as many fields as the first line: quote phrases with commas.",
    ),
    "CSV without mask": (
        table(("a.png", "", "a lake", "train")),
        "$CSV, line 2 has no image, mask or split: fill them in.",
    ),
    "CSV huge field": (
        table(("a.png", "a.png", "x" * 200_000, "train")),
        "$CSV, line 1 is not sound CSV (field larger than field limit (131072)): mend it.",
    ),
    "CSV of zero bytes": (
        table_content(b""),
        "$CSV has the columns  but lacks image, mask, phrase, split: its first line must be image,mask,phrase,split.",
    ),
    "CSV not UTF-8": (
        table_content(b"image,mask,phrase,split\na.png,a.png,caf\xe9,train\n"),
        "$CSV, line 2 is not UTF-8: save the file in that encoding.",
    ),
    "CSV with NUL": (
        table_content(b"image,mask,phrase,split\na.png,a.png,a\0lake,train\n"),
        "$CSV, line 2: the phrase holds NUL or other control characters; take them out.",
    ),
    "CSV file name with NUL": (
        table_content(b"image,mask,phrase,split\na\0.png,a.png,a lake,train\n"),
        "1 files of split 'train' are missing (ROOT/images/a\u0000.png): fetch them, or leave out their 1 of 1 samples with --skip-missing.",
    ),
    # the folder
    "folder is a loop": (
        lambda root: (root.rmdir(), root.symlink_to(root.name)),
        "There is no folder ROOT: give a folder or one of RRSIS-D, RefSegRS, RISBench, scenes.",
    ),
    "folder absent": (
        lambda root: root.rmdir(),
        "There is no folder ROOT: give a folder or one of RRSIS-D, RefSegRS, RISBench, scenes.",
    ),
    "folder empty": (
        lambda root: None,
        "ROOT holds nothing, no data set known here: lay it out in one of these ways.",
    ),
    "folder of something else": (
        lambda root: (root / "readme.txt").write_text(""),
        "ROOT holds readme.txt, no data set known here: lay it out in one of these ways.",
    ),
}
SHORT = {
    "SAMPLE": f"Sample 3 of RRSIS-D (ROOT/{IMAGE}) is broken:", "IMAGE": f"ROOT/{IMAGE}", "REFS": f"ROOT/{REFS}",
    "INSTANCES": f"ROOT/{INSTANCES}", "LIST": "ROOT/output_phrase_train.txt", "CSV": "ROOT/phrases.csv",
}  # fmt: skip


def outcome(root, **options):
    """'loads', or the first line of the sentence that the data set raises when opened or at an item."""
    try:
        dataset = open_dataset(str(root), "train", **SMALL, **options)
        for index in range(len(dataset)):
            dataset[index]
        return "loads"
    except DataError as error:
        return str(error).split("\n")[0].replace(str(root), "ROOT")


@pytest.mark.parametrize("name", CASES)
def test_what_the_user_sees(tmp_path, name):
    make, expected = CASES[name]
    root = tmp_path / "set"
    root.mkdir()
    make(root)
    first, *rest = Template(expected).substitute(SHORT).split("…")
    seen = outcome(root)
    assert seen.startswith(first) and (seen.endswith(rest[0]) if rest else seen == first)
    assert not (root / "marker").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_worker_raises_the_sentence_alone(tmp_path, workers):
    image(b"no image")(tmp_path)
    loader = torch.utils.data.DataLoader(open_dataset(tmp_path, "train", **SMALL), num_workers=workers, collate_fn=list)
    with pytest.raises(DataError, match="^Sample 3 of RRSIS-D .* is broken: .*not a sound image.$"):
        next(iter(loader))


@contextlib.contextmanager
def unprivileged():
    """As a user whom permissions bind, in a folder that such a user may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        root = not os.geteuid()
        try:
            yield Path(folder), lambda: root and os.seteuid(65534)
        finally:
            if root:
                os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="permissions as Unix has them")
@pytest.mark.parametrize(
    "closed, expected",
    [
        ("", "ROOT can't be read (Permission denied): see to it."),
        ("rrsisd", "ROOT/rrsisd can't be read (Permission denied): see to it."),
        ("images/rrsisd/JPEGImages", "ROOT/images/rrsisd/JPEGImages can't be read (Permission denied): see to it."),
        (INSTANCES, f"ROOT/{INSTANCES} can't be read (Permission denied): see to it."),
        (IMAGE, f"Sample 3 of RRSIS-D (ROOT/{IMAGE}) is broken: ROOT/{IMAGE} can't be read: Permission denied."),
    ],
)
def test_files_and_folders_without_permission(closed, expected):
    with unprivileged() as (folder, drop):
        root = one_ref(folder / "set")
        os.chmod(root / closed, 0)
        drop()
        seen = outcome(root)
    assert seen == expected


# ---- mutations --------------------------------------------------------------------------------------------------------------

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4),
    max_leaves=6,
)  # fmt: skip


def places(value, path=()):
    """The paths of everything in nested dicts and lists."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def changed(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


def one_outcome(root):
    seen = outcome(root)
    assert seen == "loads" or (seen and "Traceback" not in seen), seen
    return seen


POLYGON = [[1, 2, 30, 4, 5, 30]]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """A sound set of each kind that is mutated."""
    root = tmp_path_factory.mktemp("sets")
    write_refer(root / "refer", [ref(3), ref(4)], [annotation(3, SOUND), annotation(4, POLYGON)])
    write_lists(root / "lists", ["1 a road", "2 a lake"], ["1", "2"])
    write_csv(root / "csv", [LAKE])
    return root


def check_refs(root, draw):
    refs = pickle.loads((root / REFS).read_bytes())
    write_changed(root / REFS, draw, refs, pickle.dumps)


def check_instances(root, draw):
    write_changed(root / INSTANCES, draw, json.loads((root / INSTANCES).read_bytes()),
                  lambda value: json.dumps(value, default=repr).encode("utf-8", "surrogatepass"))  # fmt: skip


def write_changed(file, draw, value, dump):
    for _ in range(draw(st.integers(1, 3))):
        value = changed(value, draw(st.sampled_from(list(places(value)))), draw(ANY))
    file.write_bytes(dump(value))


def check_lines(root, draw):
    (root / "output_phrase_train.txt").write_bytes(mutated(b"1 a road\n2 a lake\n", draw))


def check_table(root, draw):
    (root / "phrases.csv").write_bytes(mutated(b"image,mask,phrase,split\r\na.png,a.png,the lake,train\r\n", draw))


def check_bytes(name):
    def check(root, draw):
        (root / name).write_bytes(mutated((root / name).read_bytes(), draw))
    return check


def mutated(sound, draw):
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=60))
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, len(sound))), draw(st.integers(0, 8))
        sound = sound[:at] + draw(st.binary(max_size=8)) + sound[at + length :]
    return sound


def check_runs(root, draw):
    """An RLE of characters, near a sound one or any, of any size."""
    text = draw(st.text(max_size=30)) if draw(st.booleans()) else mutated(SOUND[0]["counts"].encode(), draw).decode("latin1")
    size = draw(st.sampled_from([[40, 50], [1, 1], [0, 0], [10**9, 10**9]]) | st.lists(st.integers(), max_size=3))
    one_ref(root, [{"size": size, "counts": text}])


KINDS = {
    "refs": ("refer", check_refs), "instances": ("refer", check_instances), "RLE": ("refer", check_runs),
    "phrase list": ("lists", check_lines), "table": ("csv", check_table), "bytes of refs": ("refer", check_bytes(REFS)),
    "bytes of instances": ("refer", check_bytes(INSTANCES)), "bytes of an image": ("refer", check_bytes(IMAGE)),
}  # fmt: skip


def explore(kind, sets, examples):
    """Try so many mutations -> how many loaded, how many were refused."""
    name, check = KINDS[kind]
    root, counts = sets / name, {True: 0, False: 0}
    files = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data())
    def attempt(draws):
        try:
            check(root, draws.draw)
            counts[one_outcome(root) == "loads"] += 1
        finally:
            for path, sound in files.items():
                path.write_bytes(sound)

    attempt()
    return counts[True], counts[False]


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_load_or_are_refused_by_a_sentence(sets, kind):
    loaded, refused = explore(kind, sets, 60)
    assert refused > 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutated_files(sets, kind):
    loaded, refused = explore(kind, sets, 4000)
    print(f"\n{kind}: {loaded + refused:,} inputs tried, {loaded:,} loaded, {refused:,} refused by a sentence")
