"""Data sets on disk: the layouts, masks, and what is said of broken and hostile files, on files written here.

The long one: python -m pytest -m slow -s tests/test_annotations.py
"""

import contextlib
import csv
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from string import Template

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

import data
from annotations.masks import decode_rle, survives_encoding
from data import open_dataset
from runtime.errors import UserError

ROOT = Path(__file__).parent.parent
MINI = ROOT.parent / "shared" / "rrsisd-mini"
SMALL = dict(image_size=64, encoder_size=32)
IMAGE, REFS, INSTANCES = "images/rrsisd/JPEGImages/00003.jpg", "rrsisd/refs(unc).p", "rrsisd/instances.json"
LAKE = ("a.png", "a.png", "a lake", "train")

# Writing data sets ----------------------------------------------------------------------------------------------------


def picture(height=40, width=50, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def box(height=40, width=50, top=5, left=10, bottom=25, right=30, value=1):
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = value
    return mask


def rle(mask):
    encoded = coco.encode(np.asfortranarray(mask))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def ref(number, split="train", phrases=("A ship on the left",), **changes):
    sentences = [{"tokens": p.lower().split(), "raw": p, "sent_id": number, "sent": p.lower()} for p in phrases]
    return {"image_id": number, "split": split, "sentences": sentences, "file_name": f"{number:05d}.jpg",
            "category_id": 3, "ann_id": number, "sent_ids": [number], "ref_id": number} | changes  # fmt: skip


def annotation(number, segmentation, **changes):
    return {"segmentation": segmentation, "area": 1.0, "iscrowd": 0, "image_id": number, "bbox": [1, 2, 3, 4],
            "categories_id": 3, "id": number} | changes  # fmt: skip


def write_refer(root, refs, annotations, size=(40, 50), pictures=True):
    folder = root / "rrsisd"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=3))
    images = [{"file_name": r["file_name"], "height": size[0], "width": size[1], "id": r["image_id"]} for r in refs]
    categories = [{"supercategory": name, "id": i, "name": name} for i, name in enumerate("abcd")]
    instances = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(instances))
    (root / "images/rrsisd/JPEGImages").mkdir(parents=True, exist_ok=True)
    for r in refs if pictures else []:
        save(root / "images/rrsisd/JPEGImages" / r["file_name"], picture(*size, seed=r["image_id"]), quality=95)
    return root


SOUND = [rle(box())]


def one_ref(root, segmentation=SOUND, phrases=("A ship on the left",), split="train"):
    return write_refer(root, [ref(3, split, phrases)], [annotation(3, segmentation)])


def write_lists(root, lines, ids, layout="RefSegRS", end="\n", split="train", value=255):
    images, masks, suffix = ("images", "masks", ".tif") if layout == "RefSegRS" else ("img_rgb", "mask", ".png")
    for n, id in enumerate(ids):
        save(root / images / (id + suffix), picture(seed=n))
        save(root / masks / (id + suffix), box(value=value))
    (root / f"output_phrase_{split}.txt").write_bytes(end.join([*lines, ""]).encode())
    return root


def write_csv(root, rows, header=("image", "mask", "phrase", "split")):
    save(root / "images/a.png", picture())
    save(root / "masks/a.png", box())
    with open(root / "phrases.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return root


def quadrants(root, phrase, n=1):
    """Images whose top left quarter is white and is the target."""
    refs = [ref(i, "train", (phrase,)) for i in range(n)]
    mask = box(80, 80, 0, 0, 40, 40)
    write_refer(root, refs, [annotation(i, [rle(mask)]) for i in range(n)], pictures=False)
    for r in refs:
        save(root / "images/rrsisd/JPEGImages" / r["file_name"], np.repeat(mask[..., None] * 255, 3, 2), quality=95)
    return root


def message(root, split="train", key=0, **options):
    """The sentence that the data set raises when it is opened or at the item."""
    with pytest.raises(UserError) as caught:
        open_dataset(str(root), split, **SMALL, **options)[key]
    text = str(caught.value)
    assert "Traceback" not in text and text.split("\n")[0].endswith(".") and caught.value.exit_code == 2
    return text


# Layouts --------------------------------------------------------------------------------------------------------------


def test_category_key_split_names_and_phrases(tmp_path):
    phrases = ("A ship", "the  very long " + "word " * 80 + "end", "Boat in the middle")
    refs = [ref(1, "train", phrases), ref(2, "val", phrases), ref(4, "testA"), ref(5, "test"), ref(6, "train_extra")]
    notes = [annotation(r["ref_id"], SOUND) for r in refs]
    notes[1] = notes[1] | {"category_id": 1}
    del notes[1]["categories_id"]
    write_refer(tmp_path, refs, notes)
    train, val = (open_dataset(tmp_path, split, one_phrase=split == "train", **SMALL) for split in ("train", "val"))
    assert len(train) == 1 and len(val) == 3 and len(open_dataset(tmp_path, "test", **SMALL)) == 2
    assert [item["phrase"] for item in val] == list(phrases)  # iteration ends by IndexError
    assert {train[0, epoch]["phrase"] for epoch in range(20)} == set(phrases)
    assert val[0]["category"] == "b" and train[0]["category"] == "d"
    sentence = message(tmp_path, "validation")
    assert "'validation'" in sentence and "train (1), val (1), testA (1), test (1), train_extra (1)." in sentence


def test_the_split_that_is_meant_without_one(tmp_path):
    refs = [ref(1), ref(2, "val")]
    write_refer(tmp_path, refs, [annotation(n, SOUND) for n in (1, 2, 3)])
    assert open_dataset(tmp_path, None, **SMALL).split == "val"
    write_refer(tmp_path, [*refs, ref(3, "testB")], [annotation(n, SOUND) for n in (1, 2, 3)])
    dataset = open_dataset(tmp_path, None, **SMALL)
    assert dataset.split == "test" and [sample.id for sample in dataset.samples] == ["3"]
    os.remove(tmp_path / "images/rrsisd/JPEGImages/00003.jpg")  # files that are missing are no reason for another split
    assert "of split 'test' are missing" in message(tmp_path, None)
    assert "no samples in split 'val'" in message(write_refer(tmp_path, refs[:1], [annotation(1, SOUND)]), None)


def test_no_target_and_several_targets(tmp_path):
    write_refer(tmp_path, [ref(1, ann_id=[-1]), ref(2, ann_id=[7, 8])],
                [annotation(7, [rle(box(right=20))]), annotation(8, [rle(box(left=20))])])  # fmt: skip
    dataset = open_dataset(tmp_path, "train", **SMALL)
    assert dataset[0]["mask"].shape == (40, 50) and not dataset[0]["mask"].any()
    assert np.array_equal(dataset[1]["mask"], box())


def test_relatives_of_rrsisd(tmp_path):
    root = one_ref(tmp_path)
    (root / "rrsisd").rename(root / "hr")
    (root / "hr/refs(unc).p").rename(root / "hr/new_refs(unc).p")
    (root / "hr/instances.json").rename(root / "hr/new_instances.json")
    (root / "images/rrsisd/JPEGImages").rename(root / "hr/images")
    dataset = open_dataset(root, "train", **SMALL)
    assert dataset[0]["mask"].sum() == 400 and dataset.name == root.name
    assert open_dataset(one_ref(tmp_path / "RRSIS-HR"), "train", **SMALL).name == "RRSIS-HR"
    assert open_dataset(one_ref(tmp_path / "elsewhere"), "train", **SMALL).name == "RRSIS-D"


def test_missing_images(tmp_path, capsys):
    write_refer(tmp_path, [ref(n) for n in range(10)], [annotation(n, SOUND) for n in range(10)])
    for n in range(1, 8):
        os.remove(tmp_path / f"images/rrsisd/JPEGImages/{n:05d}.jpg")
    sentence = message(tmp_path)
    assert "7 files" in sentence and "00001.jpg" in sentence and "00007.jpg" not in sentence
    assert "--skip-missing" in sentence
    dataset = open_dataset(tmp_path, "train", skip_missing=True, **SMALL)
    assert [sample.id for sample in dataset.samples] == ["0", "8", "9"]
    assert "left out 7 of 10" in capsys.readouterr().out


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_refsegrs(tmp_path, end):
    lines = ["007 the  paved road ", "", "7 a building", "   ", "12.5 " + "word " * 80]
    write_lists(tmp_path, lines, ["007", "7", "12.5"], end=end, value=51)
    dataset = open_dataset(tmp_path, "train", **SMALL)
    assert [sample.id for sample in dataset.samples] == ["007", "7", "12.5"]
    assert dataset[0]["phrase"] == "the  paved road" and len(dataset[2]["phrase"].split()) == 80
    assert np.array_equal(dataset[0]["mask"], box())
    save(tmp_path / "masks/007.tif", box(value=50))
    assert not dataset[0]["mask"].any() and not dataset[0]["target"].any()


def test_risbench(tmp_path):
    lines = ["00001.png a ship  in the harbor", "00001.png another phrase"]
    write_lists(tmp_path, lines, ["00001"], "RISBench", value=1)
    train = open_dataset(tmp_path, "train", one_phrase=True, **SMALL)
    assert len(train) == 1 and train.samples[0].phrases == ("a ship  in the harbor", "another phrase")
    (tmp_path / "phrase_txts").mkdir()
    (tmp_path / "img_rgb").rename(tmp_path / "images")
    (tmp_path / "mask").rename(tmp_path / "masks")
    (tmp_path / "output_phrase_train.txt").rename(tmp_path / "phrase_txts/output_phrase_test.txt")
    test = open_dataset(tmp_path, "test", **SMALL)
    assert len(test) == 2 and np.array_equal(test[1]["mask"], box())


def test_csv(tmp_path):
    rows = [("a.png", "a.png", "the lake, on the left", "train"), ("a.png", "a.png", "a second phrase", "train"),
            ("a.png", "b.png", "nothing", "val")]  # fmt: skip
    write_csv(tmp_path, rows)
    save(tmp_path / "masks/b.png", np.zeros((20, 25), np.uint8))
    train, val = (open_dataset(tmp_path, split, one_phrase=split == "train", **SMALL) for split in ("train", "val"))
    assert len(train) == 1 and train.samples[0].phrases == ("the lake, on the left", "a second phrase")
    assert np.array_equal(train[0]["mask"], box())
    assert val[0]["mask"].shape == (20, 25) and not val[0]["target"].any() and val.samples[0].id == "a.png+b.png"


def test_names_and_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "RefSegRS" in message("RRSISD") and "rrsisd/refs(unc).p" in message("RRSISD")
    assert os.path.join("data", "RRSIS-D") in message("RRSIS-D")
    (tmp_path / "data/other").mkdir(parents=True)
    assert "can't be read" in message("x" * 300)  # longer than a name may be
    assert os.path.join("data", "other") + " holds nothing" in message("other")
    (tmp_path / "folder").mkdir()
    (tmp_path / "data/folder").mkdir()  # the nearer one is meant
    (tmp_path / "data/folder/more.txt").write_text("")
    assert "holds nothing" in message("folder")
    (tmp_path / "loop").symlink_to("loop")
    message("loop")
    one_ref(tmp_path / "data/RRSIS-D")
    assert open_dataset("RRSIS-D", "train", **SMALL).name == "RRSIS-D"
    os.remove(tmp_path / "data/RRSIS-D" / IMAGE)
    (tmp_path / "data/RRSIS-D" / IMAGE).symlink_to("00003.jpg")
    assert "00003.jpg can't be read" in message("RRSIS-D")


FULL = """
import sys, time
import data
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
before, start = peak(), time.perf_counter()
n = len(data.open_dataset(sys.argv[1], "train"))
print(n, time.perf_counter() - start, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_full_size_index(tmp_path):
    n = 17_402
    text = rle((cv2.resize(picture(), (800, 800))[..., 0] > 128).astype(np.uint8))
    text["counts"] = (text["counts"] * 9)[:2000]  # opening does not decode
    phrase = "The gray vehicle is on the lower left of the gray large vehicle on the right"
    refs = [ref(i, phrases=(f"{phrase} {i}",)) for i in range(n)]
    write_refer(tmp_path, refs, [annotation(i, [text]) for i in range(n)], size=(800, 800), pictures=False)
    for i in range(n):
        os.close(os.open(tmp_path / f"images/rrsisd/JPEGImages/{i:05d}.jpg", os.O_CREAT))
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    count, seconds, megabytes = run.stdout.split()
    print(f"{float(seconds):.2f} s, {float(megabytes):.0f} MB")
    assert int(count) == n and float(seconds) < 5 and float(megabytes) < 500


# Masks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["list", "bare", "counts", "polygons"])
def test_refer_masks(tmp_path, form):
    mask = box()
    runs = np.diff(np.flatnonzero(np.r_[True, np.diff(mask.T.ravel()) != 0, True])).tolist()
    segmentation = {
        "list": [rle(mask)],
        "bare": rle(mask),
        "counts": {"size": [40, 50], "counts": runs},
        "polygons": [[10, 5, 30, 5, 30, 25, 10, 25], [12, 6, 20, 6, 20, 20, 12, 20], [45, -9, 80, -9, 80, 3, 45, 3]],
    }[form]
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
    palette = Image.fromarray(box())
    palette.putpalette([0, 0, 0, 0, 0, 9] + [0] * 762)
    red = box()[..., None] * np.array([200, 0, 0], np.uint8)
    opaque = np.dstack([red, np.full((40, 50), 255, np.uint8)])
    forms = [palette, box(value=255), red, opaque, box().astype(np.uint16) * 65535, box().astype(bool)]
    for form in forms:
        (form if isinstance(form, Image.Image) else Image.fromarray(form)).save(tmp_path / "masks/m.png")
        assert np.array_equal(open_dataset(tmp_path, "train", **SMALL)[0]["mask"], box())
    write_csv(tmp_path, [("a.png", "m.jpg", "a lake", "train")])
    save(tmp_path / "masks/m.jpg", box(value=255), quality=30)
    assert np.array_equal(open_dataset(tmp_path, "train", **SMALL)[0]["mask"], box())


def test_mask_of_another_size_grayscale_and_exif(tmp_path):
    mask = box(80, 80, 10, 20, 50, 60)
    one_ref(tmp_path, [rle(mask)])
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    save(tmp_path / IMAGE, picture()[..., 0], exif=exif, quality=95)
    item = open_dataset(tmp_path, "train", **SMALL)[0]
    assert np.array_equal(item["mask"], mask)
    assert np.array_equal(item["target"], Image.fromarray(mask).resize((64, 64), Image.NEAREST))
    expected = np.asarray(Image.open(tmp_path / IMAGE).convert("RGB").resize((64, 64), Image.BILINEAR), int)
    assert np.abs(item["image"].permute(1, 2, 0).numpy() - expected).max() <= 1


@pytest.mark.skipif(not MINI.is_dir(), reason="the real cases are not here")
def test_real_cases():
    for split, n in (("train", 20), ("val", 5), ("test", 5)):
        dataset = open_dataset(MINI, split, **SMALL)
        assert len(dataset) == n and dataset.name == "RRSIS-D"
        for item, sample in zip(dataset, dataset.samples):
            assert item["mask"].shape == (800, 800) and item["mask"].any() and item["category"]
            assert data.read_image(sample.image).shape == (512, 512, 3)
            assert np.array_equal(item["mask"], coco.decode(sample.mask[0]))


def test_check_prints_and_draws(tmp_path, monkeypatch, capsys):
    write_csv(tmp_path, [LAKE, ("a.png", "c.png", "the lake", "val")])
    save(tmp_path / "masks/a.png", box(20, 25))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data.py", "--check", str(tmp_path)])
    for name in ("data-check.png", "data-check-2.png", "data-check-3.png"):
        data.main()
        output = capsys.readouterr().out
        assert name in output.splitlines()[-1] and Image.open(name).size == (1280, 384)
    assert "another size than their image: 1" in output
    (tmp_path / "images/a.png").write_bytes(b"")
    data.main()
    output = capsys.readouterr().out
    for part in ("missing files: 1", "c.png", "broken: 1 of 1", "more than one split: 1 of 1"):
        assert part in output
    monkeypatch.setattr(sys, "argv", ["data.py", "--check", "nowhere"])
    with pytest.raises(SystemExit) as exit:
        data.main()
    assert exit.value.code == 2 and "data.py: There is no folder nowhere" in capsys.readouterr().err


# What is broken: a function of the folder, which writes a data set into it -------------------------------------------


def encoded(suffix, part=1.0):
    content = cv2.imencode(suffix, picture(200, 200))[1].tobytes()
    return content[: int(len(content) * part)]


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


def mask(content):
    def make(root):
        path = write_csv(root, [LAKE]) / "masks/a.png"
        path.write_bytes(content) if isinstance(content, bytes) else save(path, content)
    return make


def segmentation(*parts):
    return lambda root: one_ref(root, list(parts))


def runs(counts, size=(40, 50)):
    return segmentation({"size": list(size), "counts": counts})


def phrase(text):
    refs = [ref(3), ref(4, sentences=[{"raw": text, "sent": text}])]
    return refer(refs, [annotation(3, SOUND), annotation(4, SOUND)])


def refer(refs, annotations, **options):
    return lambda root: write_refer(root, refs, annotations, **options)


def content(file, change):
    """A sound set with one file's content changed."""
    def make(root):
        path = one_ref(root) / file
        path.write_bytes(change(path.read_bytes()) if callable(change) else change)
    return make


def surrogate(root):
    phrase("SURROGATE")(root)
    (root / REFS).write_bytes((root / REFS).read_bytes().replace(b"SURROGATE", b"\xed\xa0\x80 ghost"))


def lists(file_content):
    return lambda root: (write_lists(root, [], ["1", "2"]) / "output_phrase_train.txt").write_bytes(file_content)


def list_twice(root):
    lists(b"1 a road\n")(root)
    (root / "phrase_txts").mkdir()
    (root / "phrase_txts/output_phrase_train.txt").write_text("1 a road\n")


def table(*rows, **options):
    return lambda root: write_csv(root, rows, **options)


def lines(text):
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


def loop(path):
    path.symlink_to(path.name)


HEADER = b"image,mask,phrase,split\n"
# The sentence -> what makes it. … stands for what other versions of Python and of libraries say otherwise.
CASES = {
    "loads": {
        "image has another suffix": image(encoded(".png")), "no target": refer([ref(3, ann_id=-1)], []),
        "mask of another size": mask(box(80, 100)), "mask all zero": mask(box(value=0)), "mask all one": mask(box(value=1) + 1),
        "RLE of another size": segmentation(rle(box(80, 100))),
    },
    # images and mask files
    "$BROKEN $IMAGE can't be read: not a sound image.": {
        "image of zero bytes": image(b""), "image is text": image(b"hello " * 100), "TIFF cut": image(encoded(".tif", 0.6)),
    },
    "$BROKEN $IMAGE claims more than 67,108,864 pixels.": {"image with a huge header": image(png_header(60000, 60000))},
    "$BROKEN $IMAGE claims 9000 x 9000 pixels, more than 67,108,864.": {"large header": image(png_header(9000, 9000))},
    "$BROKEN $IMAGE has 16 bits a channel: stretch it to 8-bit RGB, all of a set alike.": {
        "image of 16 bits": image(cv2.imencode(".png", picture().astype(np.uint16) * 16)[1].tobytes()),
        "grey image of 16 bits": image(cv2.imencode(".png", picture()[..., 0].astype(np.uint16) * 16)[1].tobytes()),
    },
    "$BROKEN $IMAGE is damaged or of an unknown format.": {
        "image without pixels": image(png_header(50, 40)), "PNG cut": image(encoded(".png", 0.6)),
    },
    "$BROKEN $IMAGE is cut off.": {
        "JPEG cut": image(encoded(".jpg", 0.6)), "JPEG without its end": image(encoded(".jpg")[:-2]),
    },
    "$BROKEN $IMAGE can't be read: it is no regular file.": {
        "image is a folder": instead(IMAGE, Path.mkdir), "image is a pipe": instead(IMAGE, os.mkfifo),
        "image is an endless device": instead(IMAGE, lambda path: path.symlink_to("/dev/zero")),
    },
    "$BROKEN $IMAGE can't be read: Too many levels of symbolic links.": {"image is a loop of links": instead(IMAGE, loop)},
    "1 files of split 'train' are missing ($IMAGE): fetch them, or leave out $REST": {
        "image absent": instead(IMAGE, lambda path: None),
    },
    "1 files of split 'train' are missing (ROOT/images/rrsisd/00003.jpg): fetch them, or leave out $REST": {
        "folder of images is a loop": instead("images/rrsisd/JPEGImages", loop),
    },
    "Sample a.png of set (ROOT/images/a.png) is broken: $MASK can't be read: not a sound image.": {
        "mask is no image": mask(b"no image"),
    },
    "Sample a.png of set (ROOT/images/a.png) is broken: $MASK claims more than 67,108,864 pixels.": {
        "mask with a huge header": mask(png_header(60000, 60000)),
    },
    "Sample a.png of set (ROOT/images/a.png) is broken: $MASK (40 x 50) and the image (50 x 40, unturned) differ in shape.": {
        "mask of another shape": mask(np.zeros((50, 40), np.uint8)),
    },
    # RLE and polygons
    "$BROKEN the mask is not RLE, or its runs don't add up to its size.": {
        "RLE too short": runs("0"), "RLE short by one pixel": runs([1999]), "RLE too long": runs(SOUND[0]["counts"], (4, 5)),
        "RLE without end": runs(SOUND[0]["counts"] + "o"), "RLE without any end": runs("o" * 9), "RLE empty": runs(""),
        "RLE of other characters": runs("\u00e9\u00e9"), "RLE with NUL": runs("0\0"), "RLE nested": runs([[2000]]),
        "RLE without counts": segmentation({"size": [40, 50]}), "RLE a number": runs(3), "RLE negative": runs([2001, -1]),
        "RLE that wraps around": runs([2**62, 2**62, 2**62, 2**62, 2000]), "RLE that wraps at 32 bits": runs("PPPPPP4"),
        "RLE bomb": runs([10**12], (10**6, 10**6)), "RLE of negative size": runs([2000], (-40, -50)),
    },
    "$BROKEN the parts of the mask differ in size.": {"RLEs of two sizes": segmentation(rle(box()), rle(box(41)))},
    "$BROKEN the mask has a polygon outside of the image.": {"outside": segmentation([60, 50, 90, 50, 90, 80])},
    "$BROKEN the mask has a polygon that is not a list of 3 or more points near the image.": {
        "polygon far outside": segmentation([1e9] * 6), "polygon of endless edges": segmentation([-60000, 0, 60000, 9] * 1000),
        "polygon is a point": segmentation([1, 2]), "polygon is a box": segmentation([1, 2, 3, 4]),
        "polygon is odd": segmentation([1, 2, 3, 4, 5, 6, 7]), "polygon of words": segmentation(["a"] * 6),
    },
    # refs and annotations
    "$REFS, ref number 0 is not as in RRSIS-D (ValueError: a segmentation is neither RLE nor polygons)$MEND": {
        "segmentation is a number": segmentation(3),
    },
    "$REFS, ref number 0 is not as in RRSIS-D (ValueError: annotation 3 is not among the instances)$MEND": {
        "annotation absent": refer([ref(3)], []),
    },
    "$REFS, ref number 0 is not as in RRSIS-D (ValueError: no ref_id or no sentences)$MEND": {
        "ref without sentences": refer([ref(3, sentences=[])], [annotation(3, [])]),
    },
    "$REFS, ref number 0 is not as in RRSIS-D (ValueError: a file_name is no text)$MEND": {
        "file_name a number": refer([ref(3, file_name=7)], [annotation(3, [])], pictures=False),
    },
    "$REFS, ref number 0 is not as in RRSIS-D (…)$MEND": {
        "split a number": refer([ref(3, split=7)], [annotation(3, [])]),
        "JSON beyond numbers": content(INSTANCES, lambda sound: sound.replace(b'"height": 40', b'"height": 1e999')),
    },
    "$REFS has a ref_id more than once (3): make them unique.": {"twice": refer([ref(3), ref(3)], [annotation(3, SOUND)])},
    "$INSTANCES is not as in RRSIS-D (ValueError: two different annotations have id 3)$MEND": {
        "annotation twice": refer([ref(3)], [annotation(3, SOUND), annotation(3, [])]),
    },
    "$INSTANCES is not as in RRSIS-D (…)$MEND": {"JSON a list": content(INSTANCES, b"[]")},
    "ROOT has the same twice (ROOT/refs(unc).p, $REFS): leave one.": {
        "refs twice": both(one_ref, lambda root: (root / "refs(unc).p").write_bytes(b"")),
    },
    "$REFS is not read (…): get it again from its source.": {
        "refs cut": content(REFS, lambda sound: sound[:50]), "refs of zero bytes": content(REFS, b""),
        "refs a number": content(REFS, pickle.dumps(3)), "refs run code": code,
        "refs reserve memory by bytes": content(REFS, b"\x80\x05\x96\xff\xff\xff\xff\x0f\x00\x00\x00."),
    },
    "ROOT has no samples in split 'train', its splits are: none.": {
        "refs reserve memory by memo": content(REFS, b"\x80\x02]r\xff\xff\xff\x7f."), "list of zero bytes": lists(b""),
    },
    "$REFS can't be read (it is no regular file): see to it.": {
        "refs are a device": instead(REFS, lambda path: path.symlink_to("/dev/zero")),
    },
    "$INSTANCES is not sound JSON (…): get it again from its source.": {
        "JSON cut": content(INSTANCES, lambda sound: sound[:200]), "JSON nested deep": content(INSTANCES, b"[" * 100_000),
        "JSON NaN": content(INSTANCES, lambda sound: sound.replace(b"1.0", b"NaN")),
    },
    "$INSTANCES, line 1 is not UTF-8: save the file in that encoding.": {"JSON not UTF-8": content(INSTANCES, b"\xff{}")},
    "$INSTANCES can't be read (No such file or directory): see to it.": {"none": instead(INSTANCES, lambda path: None)},
    # phrases
    "$REFS, ref number 1: the phrase is empty; write one, or take the sample out.": {
        "phrase empty": phrase(""), "phrase blank": phrase(" \t "), "phrase a number": phrase(3),
    },
    "$REFS, ref number 1: the phrase has 19,997 characters, at most 10,000 are taken.": {"long": phrase("a " * 9999)},
    "$REFS, ref number 1: the phrase holds NUL or other control characters; take them out.": {
        "phrase with NUL": phrase("a\0b"), "phrase with half a character": surrogate,
    },
    "$LIST, line 2: the phrase is empty; write one, or take the sample out.": {"no phrase": lists(b"1 a road\n2\n")},
    "$LIST, line 2 is not UTF-8: save the file in that encoding.": {"list not UTF-8": lists(b"1 a road\n2 caf\xe9\n")},
    "$LIST, line 2 holds NUL: take it out.": {"NUL": lists(b"1 a\n1 a \0 b\n"), "id with NUL": lists(b"1 a\n\0 a road\n")},
    "2 files of split 'train' are missing (ROOT/images/3, ROOT/masks/3): fetch them, or leave out their 1 of 2 …": {
        "line of an absent image": lists(b"1 a road\n3 a house\n"),
    },
    "ROOT has the same twice ($LIST, ROOT/phrase_txts/output_phrase_train.txt): leave one.": {"list twice": list_twice},
    "ROOT has phrase lists but no folder mask or masks: put it beside them.": {
        "no folder of masks": both(lists(b""), lambda root: (root / "masks").rename(root / "annotations")),
    },
    # a table of one's own
    "$CSV has the columns image, mask, phrase but lacks split: its first line must be image,mask,phrase,split.": {
        "CSV without a column": table(LAKE[:3], header=("image", "mask", "phrase")),
    },
    "$CSV has the columns  but lacks image, mask, phrase, split: its first line must be image,mask,phrase,split.": {
        "CSV of zero bytes": lines(b""),
    },
    "$CSV, line 3 has not as many fields as the first line: quote phrases with commas.": {
        "CSV unquoted comma": table(LAKE, ("a.png", "a.png", "a lake", " blue", "train")),
    },
    "$CSV, line 2 has no image, mask or split: fill them in.": {"no mask": table(("a.png", "", "a lake", "train"))},
    "$CSV, line 1 is not sound CSV (field larger than field limit (131072)): mend it.": {
        "CSV huge field": table(("a.png", "a.png", "x" * 200_000, "train")),
    },
    "$CSV, line 2 is not UTF-8: save the file in that encoding.": {"latin": lines(HEADER + b"a.png,a.png,caf\xe9,train\n")},
    "$CSV, line 2 holds NUL: take it out.": {
        "CSV phrase with NUL": lines(HEADER + b"a.png,a.png,a\0lake,train\n"),
        "CSV file name with NUL": lines(HEADER + b"a\0.png,a.png,a lake,train\n"),
    },
    # the folder
    "There is no folder ROOT: give a folder or one of RRSIS-D, RefSegRS, RISBench, scenes.": {
        "folder is a loop": lambda root: (root.rmdir(), loop(root)), "folder absent": Path.rmdir,
    },
    "ROOT holds nothing, no data set known here: lay it out in one of these ways.": {"folder empty": lambda root: None},
    "ROOT holds a.txt, no data set known here: lay it out in one of these ways.": {
        "folder of something else": lambda root: (root / "a.txt").write_text(""),
    },
}  # fmt: skip
SHORT = {
    "BROKEN": f"Sample 3 of RRSIS-D (ROOT/{IMAGE}) is broken:", "IMAGE": f"ROOT/{IMAGE}", "REFS": f"ROOT/{REFS}",
    "INSTANCES": f"ROOT/{INSTANCES}", "LIST": "ROOT/output_phrase_train.txt", "CSV": "ROOT/phrases.csv",
    "MASK": "ROOT/masks/a.png", "MEND": ": mend the file or get it again.", "REST": "their 1 of 1 samples with --skip-missing.",
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
def test_what_is_said_of_broken_data(tmp_path, expected, make):
    root = tmp_path / "set"
    root.mkdir()
    make(root)
    first, *rest = Template(expected).substitute(SHORT).split("…")
    sentence = outcome(root)
    assert sentence.startswith(first) and (sentence.endswith(rest[0]) if rest else sentence == first)
    assert not (root / "marker").exists()


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
@pytest.mark.parametrize("closed", ["", "rrsisd", "images/rrsisd/JPEGImages", INSTANCES, IMAGE])
def test_files_and_folders_without_permission(closed):
    with unprivileged() as (folder, drop):
        root = one_ref(folder / "set")
        os.chmod(root / closed, 0)
        drop()
        sentence = outcome(root)
    start = f"{SHORT['BROKEN']} " if closed == IMAGE else ""
    end = ": Permission denied." if closed == IMAGE else " (Permission denied): see to it."
    assert sentence == f"{start}{os.path.join('ROOT', closed).rstrip('/')} can't be read{end}"


# Mutations of sound files ---------------------------------------------------------------------------------------------

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


def change_refs(root, draw):
    write_changed(root / REFS, draw, pickle.loads((root / REFS).read_bytes()), pickle.dumps)


def change_instances(root, draw):
    write_changed(root / INSTANCES, draw, json.loads((root / INSTANCES).read_bytes()),
                  lambda value: json.dumps(value, default=repr).encode("utf-8", "surrogatepass"))  # fmt: skip


def write_changed(file, draw, value, dump):
    for _ in range(draw(st.integers(1, 3))):
        value = changed(value, draw(st.sampled_from(list(paths(value)))), draw(ANY))
    file.write_bytes(dump(value))


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


KINDS = {
    "refs": change_refs, "instances": change_instances, "RLE": change_rle, "bytes of refs": change_bytes(REFS),
    "bytes of instances": change_bytes(INSTANCES), "bytes of an image": change_bytes(IMAGE),
    "phrase list": change_bytes("output_phrase_train.txt"), "table": change_bytes("phrases.csv"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("examples", [50, pytest.param(4000, marks=pytest.mark.slow)])
def test_mutated_files_load_or_are_refused_by_a_sentence(tmp_path, kind, examples):
    if kind in ("phrase list", "table"):
        write_lists(tmp_path, ["1 a road", "2 a lake"], ["1", "2"]) if kind == "phrase list" else write_csv(tmp_path, [LAKE])
    else:
        polygon = [[1, 2, 30, 4, 5, 30]]
        write_refer(tmp_path, [ref(3), ref(4)], [annotation(3, SOUND), annotation(4, polygon)])
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    outcomes = []

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data())
    def attempt(draws):
        try:
            KINDS[kind](tmp_path, draws.draw)
            outcomes.append(outcome(tmp_path))
            assert outcomes[-1] and "Traceback" not in outcomes[-1]
        finally:
            for path, sound in files.items():
                path.write_bytes(sound)

    attempt()
    loaded = outcomes.count("loads")
    print(f"\n{kind}: {len(outcomes):,} inputs tried, {loaded:,} loaded, the others were refused by a sentence")
    assert len(outcomes) - loaded > 5
