"""What is on disk: masks, `--check`, and what is said of broken and hostile data sets."""

import json
import os
import pickle
import shutil
import sys
import tempfile
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
from test_data import IMAGE, LAKE, SMALL, SOUND, annotation, box, one_ref, ref, rle, write_csv, write_lists, write_refer

import data
from annotations.masks import decode_rle, survives_encoding
from data import open_dataset
from imagery.pixels import read_image
from runtime.errors import UserError

MINI = Path(__file__).parent.parent.parent / "shared" / "rrsisd-mini"
REFS, INSTANCES = "rrsisd/refs(unc).p", "rrsisd/instances.json"


@pytest.mark.parametrize("form", ["list", "bare", "counts", "polygons"])
def test_refer_masks(tmp_path, form):
    mask = box()
    runs = np.diff(np.flatnonzero(np.r_[True, np.diff(mask.T.ravel()) != 0, True])).tolist()
    polygons = [[10, 5, 30, 5, 30, 25, 10, 25], [12, 6, 20, 6, 20, 20, 12, 20], [45, -9, 80, -9, 80, 3, 45, 3]]
    counts = {"size": [40, 50], "counts": runs}
    segmentation = {"list": [rle(mask)], "bare": rle(mask), "counts": counts, "polygons": polygons}[form]
    mask[0:3, 45:50] = form == "polygons"  # the third one is cut off at the border; the second is covered twice
    item = open_dataset(one_ref(tmp_path, segmentation), "train", **SMALL)[0]
    assert np.array_equal(item["mask"], mask)


def test_rle():
    rng = np.random.default_rng(0)
    for density in (0, 0.01, 0.5, 1):
        for shape in ((1, 1), (7, 300), (200, 90)):
            mask = (rng.random(shape) < density).astype(np.uint8)
            assert np.array_equal(decode_rle(rle(mask)), mask) and survives_encoding(rle(mask))
    empty_runs = {"size": [2, 2], "counts": [1, 0, 1, 2, 0]}  # rare, but an RLE
    assert decode_rle(empty_runs).tolist() == [[0, 1], [0, 1]] and not survives_encoding(empty_runs)


def test_mask_files(tmp_path):
    write_csv(tmp_path, [("a.png", "m.png", "a lake", "train")])
    palette, red = Image.fromarray(box()), box()[..., None] * np.array([200, 0, 0], np.uint8)
    palette.putpalette([0, 0, 0, 0, 0, 9] + [0] * 762)
    opaque = np.dstack([red, np.full((40, 50), 255, np.uint8)])
    others = [Image.fromarray(form) for form in (box(value=255), red, opaque, box().astype(np.uint16) * 65535, box() > 0)]
    for form in (palette, *others):
        form.save(tmp_path / "masks/m.png")
        assert np.array_equal(open_dataset(tmp_path, "train", **SMALL)[0]["mask"], box())
    write_csv(tmp_path, [("a.png", "m.jpg", "a lake", "train")])
    Image.fromarray(box(value=255)).save(tmp_path / "masks/m.jpg", quality=30)
    assert np.array_equal(open_dataset(tmp_path, "train", **SMALL)[0]["mask"], box())


def test_kinds_of_images(tmp_path):
    colours = Image.fromarray(np.kron(LARGE[:5, :5], np.ones((8, 10, 1), np.uint8)))
    for mode, suffix in (("P", ".png"), ("RGBA", ".png"), ("RGB", ".bmp"), ("CMYK", ".tif"), ("LA", ".png"), ("1", ".png")):
        colours.convert(mode).save(tmp_path / f"{mode}{suffix}")
        image = read_image(tmp_path / f"{mode}{suffix}")
        assert image.dtype == np.uint8 and np.array_equal(image, np.asarray(colours.convert(mode).convert("RGB")))
    jpeg = encoded(".jpg", LARGE)
    (tmp_path / "a.jpg").write_bytes(jpeg)
    (tmp_path / "b.jpg").write_bytes(jpeg + b"\xff\xda" + bytes(range(256)))  # anything may follow its end
    assert np.array_equal(read_image(tmp_path / "a.jpg"), read_image(tmp_path / "b.jpg"))


@pytest.mark.skipif(not MINI.is_dir(), reason="the real cases are not here")
def test_real_cases():
    for split, n in (("train", 20), ("val", 5), ("test", 5)):
        dataset = open_dataset(MINI, split, **SMALL)
        assert len(dataset) == n and dataset.name == "RRSIS-D"
        for item, sample in zip(dataset, dataset.samples):
            assert item["mask"].shape == (800, 800) and item["mask"].any() and item["category"]
            assert read_image(sample.image).shape == (512, 512, 3)
            assert np.array_equal(item["mask"], coco.decode(sample.mask[0]))


def test_check_prints_and_draws(tmp_path, monkeypatch, capsys):
    write_csv(tmp_path, [LAKE, ("a.png", "c.png", "the lake", "val")])
    Image.fromarray(box(20, 25)).save(tmp_path / "masks/a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data.py", "--check", str(tmp_path)])
    for name in ("data-check.png", "data-check-2.png", "data-check-3.png"):
        data.main()
        output = capsys.readouterr().out
        assert name in output.splitlines()[-1] and Image.open(name).size == (320, 346)
    assert "another size than their image: 1" in output
    (tmp_path / "images/a.png").write_bytes(b"")
    data.main()
    output = capsys.readouterr().out
    assert all(part in output for part in ("missing files: 1", "c.png", "broken: 1 of 1", "more than one split: 1 of 1"))
    monkeypatch.setattr(sys, "argv", ["data.py", "--check", "nowhere"])
    with pytest.raises(SystemExit) as exit:
        data.main()
    assert exit.value.code == 2 and "data.py: There is no folder nowhere" in capsys.readouterr().err


# Functions of a folder that write a broken data set into it


def written(write, *content, **options):
    return lambda root: write(root, *content, **options)


def runs(counts, size=(40, 50)):
    return written(one_ref, [{"size": list(size), "counts": counts}])


def polygon(points):
    return written(one_ref, [points])


def content(file, change, write=one_ref):
    """A sound set with one file's content changed."""
    def make(root):
        path = write(root) / file
        path.write_bytes(change(path.read_bytes()) if callable(change) else change)
    return make


def mask(pixels):
    return content("masks/a.png", encoded(".png", pixels), written(write_csv, [LAKE]))


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


image, refer = partial(content, IMAGE), partial(written, write_refer)
lists = partial(content, "output_phrase_train.txt", write=written(write_lists, ["1 a road"], ["1", "2"]))
table = partial(content, "phrases.csv", write=written(write_csv, [LAKE]))
LARGE = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
HEADER = b"image,mask,phrase,split\n"
SHORT = {
    "IMAGE": f"ROOT/{IMAGE}", "BROKEN": f"Sample 3 of RRSIS-D (ROOT/{IMAGE}) is broken:", "REFS": f"ROOT/{REFS}",
    "MASK": "Sample a.png of set (ROOT/images/a.png) is broken: ROOT/masks/a.png", "CSV": "ROOT/phrases.csv",
    "REF0": f"ROOT/{REFS}, ref number 0 is not as in RRSIS-D", "PHRASE": f"ROOT/{REFS}, ref number 0: the phrase",
    "INSTANCES": f"ROOT/{INSTANCES}", "LIST": "ROOT/output_phrase_train.txt", "MEND": "mend the file or get it again.",
    "NEAR": "that is not a list of 3 or more points near the image.", "AGAIN": "get it again from its source.",
    "GO": "fetch them, or leave out their 1 of 1 samples with --skip-missing.", "EMPTY": "write one, or take the sample out.",
}  # fmt: skip
# The sentence -> what makes it. … stands for what other versions of Python and of libraries say otherwise.
CASES = {
    "loads": {
        "image has another suffix": image(encoded(".png", LARGE)), "no target": refer([ref(3, ann_id=-1)], []),
        "mask of another size": mask(box(80, 100)), "mask all zero": mask(box(value=0)), "mask all one": mask(box() + 1),
        "RLE of another size": written(one_ref, [rle(box(80, 100))])},
    # images and mask files
    "$BROKEN $IMAGE can't be read: not a sound image.": {
        "image of zero bytes": image(b""), "image is text": image(b"hello " * 100), "TIFF": image(encoded(".tif", LARGE, 0.6))},
    "$BROKEN $IMAGE claims more than 67,108,864 pixels.": {
        "huge header": image(b"P5 60000 60000 255\n"), "large header": image(b"P5 9000 9000 255\n")},
    "$BROKEN $IMAGE has 16 bits a channel: stretch it to 8-bit RGB, all of a set alike.": {
        "image of 16 bits": image(encoded(".png", LARGE.astype(np.uint16) * 16)),
        "grey image of 16 bits": image(encoded(".png", LARGE[..., 0].astype(np.uint16) * 16))},
    "$BROKEN $IMAGE is damaged or cut off.": {
        "image without pixels": image(b"P5 50 40 255\n"), "PNG cut": image(encoded(".png", LARGE, 0.6)),
        "JPEG cut": image(encoded(".jpg", LARGE, 0.6)), "JPEG without its end": image(encoded(".jpg", LARGE)[:-2])},
    "$BROKEN $IMAGE can't be read: it is no regular file.": {
        "folder": instead(IMAGE, Path.mkdir), "pipe": instead(IMAGE, os.mkfifo), "device": instead(IMAGE, "/dev/zero")},
    "$BROKEN $IMAGE can't be read: Too many levels of symbolic links.": {"image is a link": instead(IMAGE, "00003.jpg")},
    "1 files of split 'train' are missing ($IMAGE): $GO": {"image absent": instead(IMAGE, lambda path: None)},
    "1 files of split 'train' are missing (ROOT/images/rrsisd/00003.jpg): $GO": {
        "folder of images is a loop": instead("images/rrsisd/JPEGImages", "JPEGImages")},
    "$MASK can't be read: not a sound image.": {
        "mask is no image": content("masks/a.png", b"no image", written(write_csv, [LAKE]))},
    "$MASK has 16 bits a channel: stretch it to 8-bit RGB, all of a set alike.": {
        "mask of 16 bits in colour": mask(np.dstack([box().astype(np.uint16)] * 3))},
    "$MASK (40 x 50) and the image (50 x 40, unturned) differ in shape.": {"mask turned": mask(box(50, 40))},
    # RLE and polygons
    "$BROKEN the mask is not RLE, or its runs don't add up to its size.": {
        "RLE too short": runs("0"), "RLE short by one pixel": runs([1999]), "RLE too long": runs(SOUND[0]["counts"], (4, 5)),
        "RLE without end": runs(SOUND[0]["counts"] + "o"), "RLE without any end": runs("o" * 9), "RLE empty": runs(""),
        "RLE of other characters": runs("\u00e9\u00e9"), "RLE with NUL": runs("0\0"), "RLE nested": runs([[2000]]),
        "RLE without counts": written(one_ref, [{"size": [40, 50]}]), "RLE a number": runs(3), "RLE negative": runs([2001, -1]),
        "RLE that wraps around": runs([2**62, 2**62, 2**62, 2**62, 2000]), "RLE that wraps at 32 bits": runs("PPPPPP4"),
        "RLE bomb": runs([10**12], (10**6, 10**6)), "RLE of negative size": runs([2000], (-40, -50))},
    "$BROKEN the parts of the mask differ in size.": {"RLEs of two sizes": written(one_ref, [rle(box()), rle(box(41))])},
    "$BROKEN the mask has a polygon outside of the image.": {"outside": polygon([60, 50, 90, 50, 90, 80])},
    "$BROKEN the mask has a polygon $NEAR": {
        "polygon far outside": polygon([1e9] * 6), "polygon of endless edges": polygon([-60000, 0, 60000, 9] * 1000),
        "polygon is a point": polygon([1, 2]), "polygon is a box": polygon([1, 2, 3, 4]),
        "polygon is odd": polygon([1, 2, 3, 4, 5, 6, 7]), "polygon of words": polygon(["a"] * 6)},
    # refs and annotations
    "$REF0 (ValueError: a segmentation is neither RLE nor polygons): $MEND": {"segmentation a number": polygon(3)},
    "$REF0 (ValueError: annotation 3 is not among the instances): $MEND": {"annotation absent": refer([ref(3)], [])},
    "$REF0 (ValueError: no ref_id or no sentences): $MEND": {"dumb": refer([ref(3, sentences=[])], [annotation(3, [])])},
    "$REF0 (ValueError: a file_name is no text): $MEND": {"7": refer([ref(3, file_name=7)], [annotation(3, [])], pictures=0)},
    "$REF0 (…): $MEND": {
        "split a number": refer([ref(3, split=7)], [annotation(3, [])]),
        "JSON beyond numbers": content(INSTANCES, lambda sound: sound.replace(b'"height": 40', b'"height": 1e999'))},
    "$REFS has a ref_id more than once (3): make them unique.": {"twice": refer([ref(3), ref(3)], [annotation(3, SOUND)])},
    "$INSTANCES is not as in RRSIS-D (ValueError: two different annotations have id 3): $MEND": {
        "annotation twice": refer([ref(3)], [annotation(3, SOUND), annotation(3, [])])},
    "$INSTANCES is not as in RRSIS-D (…): $MEND": {"JSON a list": content(INSTANCES, b"[]")},
    "ROOT has the same twice (ROOT/refs(unc).p, $REFS): leave one.": {
        "refs twice": lambda root: (one_ref(root) / "refs(unc).p").write_bytes(b"")},
    "$REFS is not read (…): $AGAIN": {
        "refs cut": content(REFS, lambda sound: sound[:50]), "refs of zero bytes": content(REFS, b""),
        "refs a number": content(REFS, pickle.dumps(3)), "refs run code": content(REFS, b"cos\nmkdir\n(S'marker'\ntR."),
        "refs reserve memory by bytes": content(REFS, b"\x80\x05\x96\xff\xff\xff\xff\x0f\x00\x00\x00.")},
    "ROOT has no samples in split 'train', its splits are: none.": {
        "refs reserve memory by memo": content(REFS, b"\x80\x02]r\xff\xff\xff\x7f."), "list of zero bytes": lists(b"")},
    "$REFS can't be read (it is no regular file): see to it.": {"refs are a device": instead(REFS, "/dev/zero")},
    "$INSTANCES is not sound JSON (…): $AGAIN": {
        "JSON cut": content(INSTANCES, lambda sound: sound[:200]), "JSON nested deep": content(INSTANCES, b"[" * 100_000),
        "JSON NaN": content(INSTANCES, lambda sound: sound.replace(b"1.0", b"NaN"))},
    "$INSTANCES, line 1 is not UTF-8: save the file in that encoding.": {"JSON not UTF-8": content(INSTANCES, b"\xff{}")},
    "$INSTANCES can't be read (No such file or directory): see to it.": {"none": instead(INSTANCES, lambda path: None)},
    # phrases
    "$PHRASE is empty; $EMPTY": {
        "phrase empty": written(one_ref, phrases=("",)), "phrase blank": written(one_ref, phrases=(" \t ",))},
    "$PHRASE has 19,997 characters, at most 10,000 are taken.": {"phrase over-long": written(one_ref, phrases=("a " * 9999,))},
    "$PHRASE holds NUL or other control characters; take them out.": {
        "NUL": written(one_ref, phrases=("a\0b",)),
        "half a character": content(REFS, lambda sound: sound.replace(b"A ship on", b"\xed\xa0\x80 ghost"))},
    "$LIST, line 2: the phrase is empty; $EMPTY": {"line without phrase": lists(b"1 a road\n2\n")},
    "$LIST, line 2 is not UTF-8: save the file in that encoding.": {"list not UTF-8": lists(b"1 a road\n2 caf\xe9\n")},
    "$LIST, line 2 holds NUL: take it out.": {"line": lists(b"1 a\n1 a \0 b\n"), "id with NUL": lists(b"1 a\n\0 a road\n")},
    "2 files of split 'train' are missing (ROOT/images/3, ROOT/masks/3): fetch them, or leave out their 1 of 2 …": {
        "line of an absent image": lists(b"1 a road\n3 a house\n")},
    "ROOT has the same twice ($LIST, ROOT/phrase_txts/output_phrase_train.txt): leave one.": {
        "list twice": lambda root: shutil.copytree(write_lists(root, ["1 a road"], ["1"]), root / "phrase_txts")},
    "ROOT has phrase lists but no folder mask or masks: put it beside them.": {
        "no folder of masks": lambda root: (write_lists(root, [], ["1"]) / "masks").rename(root / "annotations")},
    # a table of one's own
    "$CSV has the columns image, mask, phrase but lacks split: its first line must be image,mask,phrase,split.": {
        "CSV without a column": table(b"image,mask,phrase\n")},
    "$CSV has the columns  but lacks image, mask, phrase, split: its first line must be …": {"CSV empty": table(b"")},
    "$CSV, line 3 has not as many fields as the first line: quote phrases with commas.": {
        "CSV unquoted comma": table(lambda sound: sound + b"a.png,a.png,a lake, blue,train\n")},
    "$CSV, line 2 has no image, mask or split: fill them in.": {"no mask": table(HEADER + b"a.png,,a lake,train\n")},
    "$CSV, line 1 is not sound CSV (field larger than field limit (131072)): mend it.": {
        "CSV huge field": table(HEADER + b"x" * 200_000)},
    "$CSV, line 2 is not UTF-8: save the file in that encoding.": {"latin": table(HEADER + b"a.png,a.png,caf\xe9,train\n")},
    "$CSV, line 2 holds NUL: take it out.": {
        "CSV phrase with NUL": table(HEADER + b"a.png,a.png,a\0lake,train\n"),
        "CSV file name with NUL": table(HEADER + b"a\0.png,a.png,a lake,train\n")},
    # the folder
    "There is no folder ROOT: give a folder or one of RRSIS-D, RefSegRS, RISBench, scenes.": {
        "folder is a loop": lambda root: (root.rmdir(), root.symlink_to(root.name)), "folder absent": Path.rmdir},
    "ROOT holds nothing, no data set known here: lay it out in one of these ways.": {"folder empty": lambda root: None},
    "ROOT holds a.txt, no data set known here: lay it out in one of these ways.": {
        "folder of something else": lambda root: (root / "a.txt").write_text("")},
}  # fmt: skip


def outcome(root):
    """'loads', or the first line of the sentence that the data set raises when opened or at an item."""
    try:
        dataset = open_dataset(str(root), "train", **SMALL)
        for index in range(len(dataset)):
            dataset[index]
        return "loads"
    except UserError as error:
        return str(error).split("\n")[0].replace(str(root), "ROOT")


@pytest.mark.parametrize("expected, make", [
    pytest.param(sentence, make, id=name) for sentence, cases in CASES.items() for name, make in cases.items()
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
            os.seteuid(user)
            os.chmod(root / closed, 0o755)
    start, end = (f"{SHORT['BROKEN']} ", ": ") if closed == IMAGE else ("", " (")
    assert sentence.startswith(f"{start}{os.path.join('ROOT', closed).rstrip('/')} can't be read{end}Permission denied")


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4),
    max_leaves=6,
)  # fmt: skip


def paths(value, path=()):
    """The paths of everything in nested dicts and lists."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from paths(value[key], (*path, key))


def changed(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


def change_values(name, load, dump):
    def change(root, draw):
        value = load((root / name).read_bytes())
        for _ in range(draw(st.integers(1, 3))):
            value = changed(value, draw(st.sampled_from(list(paths(value)))), draw(ANY))
        (root / name).write_bytes(dump(value))
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


REFER = refer([ref(3), ref(4)], [annotation(3, SOUND), annotation(4, [[1, 2, 30, 4, 5, 30]])])
LISTS, TABLE = written(write_lists, ["1 a road", "2 a lake"], ["1", "2"]), written(write_csv, [LAKE])
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
        try:
            change(tmp_path, draws.draw)
            outcomes.append(outcome(tmp_path))
            assert outcomes[-1] and "Traceback" not in outcomes[-1]
        finally:
            for path, sound in files.items():
                path.write_bytes(sound)

    attempt()
    assert len(outcomes) - outcomes.count("loads") > 5
