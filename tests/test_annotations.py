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
from test_data import IMAGE, LAKE, SOUND, box, note, one_ref, opened, ref, rle, write_csv, write_lists, write_refer

import data
from annotations.masks import decode_rle, survives_encoding
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
LARGE, HEADER = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8), b"image,mask,phrase,split\n"
CUT = encoded(".png", LARGE, 0.6), encoded(".jpg", LARGE, 0.6), encoded(".jpg", LARGE)[:-2]
DEEP = encoded(".png", LARGE.astype(np.uint16) * 16), encoded(".png", LARGE[..., 0].astype(np.uint16) * 16)
SHORT = {
    "IMAGE": f"ROOT/{IMAGE}", "BROKEN": f"Sample 3 of RRSIS-D (ROOT/{IMAGE}) is broken:", "REFS": f"ROOT/{REFS}",
    "BAD": f"Sample 3 of RRSIS-D (ROOT/{IMAGE}) is broken: ROOT/{IMAGE}", "NOT": "is not as in RRSIS-D",
    "MASK": "Sample a.png of set (ROOT/images/a.png) is broken: ROOT/masks/a.png", "CSV": "ROOT/phrases.csv",
    "REF0": f"ROOT/{REFS}, ref number 0 is not as in RRSIS-D", "PHRASE": f"ROOT/{REFS}, ref number 0: the phrase",
    "INSTANCES": f"ROOT/{INSTANCES}", "LIST": "ROOT/output_phrase_train.txt", "MISSING": "files of split 'train' are missing",
    "MEND": "mend the file or get it again.", "FIRST": "its first line must name image, mask, phrase.",
    "NEAR": "that is not a list of 3 or more points near the image.", "AGAIN": "get it again from its source.",
    "GO": "fetch them, or leave out their 1 of 1 samples with --skip-missing.", "EMPTY": "write one, or take the sample out.",
}  # fmt: skip
# The sentence -> what makes it. … stands for what other versions of Python and of libraries say otherwise.
CASES = {
    "loads": [image(encoded(".png", LARGE)), refer([ref(3, ann_id=-1)], []), mask(box(80, 100)), mask(box(value=0)),
        mask(box() + 1), parts(rle(box(80, 100)))],
    "$BAD can't be read: not a sound image.": [image(b""), image(b"hello " * 100), image(encoded(".tif", LARGE, 0.6))],
    "$BAD claims more than 67,108,864 pixels.": [image(b"P5 60000 60000 255\n"), image(b"P5 9000 9000 255\n")],
    "$BAD has 16 bits a channel: stretch it to 8-bit RGB, all of a set alike.": [*map(image, DEEP)],
    "$BAD is damaged or cut off.": [*map(image, (b"P5 50 40 255\n", *CUT))],
    "$BAD can't be read: it is no regular file.": [instead(IMAGE, kind) for kind in (Path.mkdir, os.mkfifo, "/dev/zero")],
    "$BAD can't be read: Too many levels of symbolic links.": [instead(IMAGE, "00003.jpg")],
    "1 $MISSING ($IMAGE): $GO": [instead(IMAGE, lambda path: None)],
    "1 $MISSING (ROOT/images/rrsisd/00003.jpg): $GO": [instead("images/rrsisd/JPEGImages", "JPEGImages")],
    "$MASK can't be read: not a sound image.": [content("masks/a.png", b"no image", written(write_csv, [LAKE]))],
    "$MASK has 16 bits a channel: stretch it …": [mask(np.dstack([box().astype(np.uint16)] * 3))],
    "$MASK (40 x 50) and the image (50 x 40, unturned) differ in shape.": [mask(box(50, 40))],
    "$BROKEN the mask is not RLE, or its runs don't add up to its size.": [
        *map(runs, ("0", [1999], SOUND[0]["counts"] + "o", "o" * 9, "", "\u00e9\u00e9", "0\0", [[2000]], 3, [2001, -1])),
        runs(SOUND[0]["counts"], (4, 5)), runs([10**12], (10**6, 10**6)), runs([2000], (-40, -50)), parts({"size": [40, 50]}),
        runs([2**62, 2**62, 2**62, 2**62, 2000]), runs("PPPPPP4")],  # these wrap around, at 64 and 32 bits
    "$BROKEN the parts of the mask differ in size.": [parts(rle(box()), rle(box(41)))],
    "$BROKEN the mask has a polygon outside of the image.": [parts([60, 50, 90, 50, 90, 80])],
    "$BROKEN the mask has a polygon $NEAR": [parts([1e9] * 6), parts([-60000, 0, 60000, 9] * 1000), parts([1, 2]),
        parts([1, 2, 3, 4]), parts([1, 2, 3, 4, 5, 6, 7]), parts(["a"] * 6)],
    "$REF0 (ValueError: a segmentation is neither RLE nor polygons): $MEND": [parts(3)],
    "$REF0 (ValueError: annotation 3 is not among the instances): $MEND": [refer([ref(3)], [])],
    "$REF0 (ValueError: no ref_id or no sentences): $MEND": [refer([ref(3, sentences=[])], [note(3, [])])],
    "$REF0 (ValueError: a file_name is no text): $MEND": [refer([ref(3, file_name=7)], [note(3, [])], pictures=0)],
    "$REF0 (…): $MEND": [refer([ref(3, split=7)], [note(3, [])]), content(INSTANCES, (b"t\": 40", b"t\": 1e999"))],
    "$REFS has a ref_id more than once (3): make them unique.": [refer([ref(3), ref(3)], [note(3, SOUND)])],
    "$INSTANCES $NOT (ValueError: two different annotations have id 3): $MEND": [refer([], [note(3, SOUND), note(3, [])])],
    "$INSTANCES $NOT (…): $MEND": [content(INSTANCES, b"[]")],
    "ROOT has the same twice (ROOT/refs(unc).p, $REFS): leave one.": [content("refs(unc).p", b"")],
    "$REFS is not read (…): $AGAIN": [content(REFS, change) for change in (b"", pickle.dumps([ref(3)])[:50],
        pickle.dumps(3), b"cos\nmkdir\n(S'marker'\ntR.", b"\x80\x05\x96\xff\xff\xff\xff\x0f\x00\x00\x00.")],
    "ROOT has no samples in split 'train', its splits are: none.": [content(REFS, b"\x80\x02]r\xff\xff\xff\x7f."), lists(b"")],
    "$REFS can't be read (it is no regular file): see to it.": [instead(REFS, "/dev/zero")],
    "$INSTANCES is not sound JSON (…): $AGAIN": [
        content(INSTANCES, change) for change in (b'{"info": {}, ', b"[" * 100_000, (b"1.0", b"NaN"))],
    "$INSTANCES, line 1 is not UTF-8: save the file in that encoding.": [content(INSTANCES, b"\xff{}")],
    "$INSTANCES can't be read (No such file or directory): see to it.": [instead(INSTANCES, lambda path: None)],
    "$PHRASE is empty; $EMPTY": [written(one_ref, phrases=(text,)) for text in ("", " \t ")],
    "$PHRASE has 19,997 characters, at most 10,000 are taken.": [written(one_ref, phrases=("a " * 9999,))],
    "$PHRASE holds NUL or other control characters; take them out.": [
        written(one_ref, phrases=("a\0b",)), content(REFS, (b"A ship on", b"\xed\xa0\x80 ghost"))],
    "$LIST, line 2: the phrase is empty; $EMPTY": [lists(b"1 a road\n2\n")],
    "$LIST, line 2 is not UTF-8: save the file in that encoding.": [lists(b"1 a road\n2 caf\xe9\n")],
    "$LIST, line 2 holds NUL: take it out.": [lists(b"1 a\n1 a \0 b\n"), lists(b"1 a\n\0 a road\n")],
    "2 $MISSING (ROOT/images/3, ROOT/masks/3): fetch them, or leave out their 1 of 2 …": [lists(b"1 a road\n3 a house\n")],
    "ROOT has the same twice ($LIST, ROOT/phrase_txts/output_phrase_train.txt): leave one.": [
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
    "$CSV, line 1 is not sound CSV (field larger than field limit (131072)): mend it.": [table(HEADER + b"x" * 200_000)],
    "$CSV, line 2 is not UTF-8: save the file in that encoding.": [table(HEADER + b"a.png,a.png,caf\xe9,train\n")],
    "$CSV, line 2 holds NUL: take it out.": [table(HEADER + b) for b in (b"a.png,a.png,\0,train\n", b"\0.png,a.png,a,train\n")],
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
    start, end = (f"{SHORT['BROKEN']} ", ": ") if closed == IMAGE else ("", " (")
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
        for path, sound in files.items():
            path.write_bytes(sound)
        change(tmp_path, draws.draw)
        outcomes.append(outcome(tmp_path))
        assert outcomes[-1] and "Traceback" not in outcomes[-1]

    attempt()
    assert len(outcomes) - outcomes.count("loads") > 5
