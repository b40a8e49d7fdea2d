"""The data sets' layouts and traps, on files written here in exactly those layouts."""

import csv
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

import data
from data import Collate, DataError, flip_phrase, open_dataset

ROOT = Path(__file__).parent.parent
MINI = ROOT.parent / "shared" / "rrsisd-mini"
SMALL = dict(image_size=64, encoder_size=32)


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
            "category_id": 3, "ann_id": number, "sent_ids": [number], "ref_id": number} | changes


def annotation(number, segmentation, **changes):
    return {"segmentation": segmentation, "area": 1.0, "iscrowd": 0, "image_id": number, "bbox": [1, 2, 3, 4],
            "categories_id": 3, "id": number} | changes


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


def one_ref(root, segmentation=None, phrases=("A ship on the left",), split="train", **changes):
    segmentation = [rle(box())] if segmentation is None else segmentation
    return write_refer(root, [ref(3, split, phrases)], [annotation(3, segmentation, **changes)])


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


def message(root, split="train", key=0, **options):
    """What the user is told: one sentence that the data set raises when opened or at the item."""
    with pytest.raises(DataError) as caught:
        open_dataset(str(root), split, **SMALL, **options)[key]
    text = str(caught.value)
    assert "Traceback" not in text and text.split("\n")[0].endswith(".")
    return text


# REFER layout


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
    assert (item["id"], item["category"], item["kind"], item["phrase"]) == ("3", "d", "", "A ship on the left")
    assert item["image"].shape == (3, 64, 64) and item["image"].dtype == torch.uint8
    assert item["encoder_image"].shape == (3, 32, 32) and item["encoder_image"].dtype == torch.uint8
    assert item["target"].shape == (64, 64) and item["target"].dtype == item["mask"].dtype == torch.uint8


def test_rle_decoder_equals_pycocotools():
    rng = np.random.default_rng(0)
    for density in (0, 0.01, 0.5, 1):
        for shape in ((1, 1), (7, 300), (200, 90)):
            mask = (rng.random(shape) < density).astype(np.uint8)
            assert np.array_equal(data.decode_rle(rle(mask)), mask)


def test_category_key_split_names_and_phrases(tmp_path):
    phrases = ("A ship", "the  very long " + "word " * 80 + "end", "Boat in the middle")
    refs = [ref(1, "train", phrases), ref(2, "val", phrases), ref(4, "testA"), ref(5, "test"), ref(6, "train_extra")]
    notes = [annotation(r["ref_id"], [rle(box())]) for r in refs]
    notes[1] = notes[1] | {"category_id": 1}
    del notes[1]["categories_id"]
    write_refer(tmp_path, refs, notes)
    train, val = (open_dataset(tmp_path, split, one_phrase=split == "train", **SMALL) for split in ("train", "val"))
    assert len(train) == 1 and len(val) == 3 and len(open_dataset(tmp_path, "test", **SMALL)) == 2
    assert [val[i]["phrase"] for i in range(3)] == list(phrases)
    assert {train[0, epoch]["phrase"] for epoch in range(20)} == set(phrases)
    assert val[0]["category"] == "b" and train[0]["category"] == "d"
    assert train.splits() == {"train": 1, "val": 1, "testA": 1, "test": 1, "train_extra": 1}
    assert [item["phrase"] for item in val] == list(phrases)  # iteration ends by IndexError
    told = message(tmp_path, "validation")
    assert "'validation'" in told and "val (1)" in told


def test_no_target_and_several_targets(tmp_path):
    left, right = box(right=20), box(left=20)
    refs = [ref(1, ann_id=[-1]), ref(2, ann_id=[7, 8])]
    write_refer(tmp_path, refs, [annotation(7, [rle(left)]), annotation(8, [rle(right)])])
    dataset = open_dataset(tmp_path, "train", **SMALL)
    assert dataset[0]["mask"].shape == (40, 50) and not dataset[0]["mask"].any()
    assert np.array_equal(dataset[1]["mask"], box())


def test_mask_of_another_size_grayscale_and_exif(tmp_path):
    mask = box(80, 80, 10, 20, 50, 60)
    one_ref(tmp_path, [rle(mask)])
    file = tmp_path / "images/rrsisd/JPEGImages/00003.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    save(file, picture()[..., 0], exif=exif, quality=95)
    item = open_dataset(tmp_path, "train", **SMALL)[0]
    assert np.array_equal(item["mask"], mask)
    assert np.array_equal(item["target"], Image.fromarray(mask).resize((64, 64), Image.NEAREST))
    expected = np.asarray(Image.open(file).convert("RGB").resize((64, 64), Image.BILINEAR), int)
    assert np.abs(item["image"].permute(1, 2, 0).numpy() - expected).max() <= 1


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
    refs = [ref(n) for n in range(10)]
    write_refer(tmp_path, refs, [annotation(n, [rle(box())]) for n in range(10)])
    for n in range(1, 8):
        os.remove(tmp_path / f"images/rrsisd/JPEGImages/{n:05d}.jpg")
    told = message(tmp_path)
    assert "7 files" in told and "00001.jpg" in told and "00007.jpg" not in told and "--skip-missing" in told
    dataset = open_dataset(tmp_path, "train", skip_missing=True, **SMALL)
    assert [sample.id for sample in dataset.samples] == ["0", "8", "9"]
    assert "left out 7 of 10" in capsys.readouterr().out


# Phrase lists and data of your own


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
            ("a.png", "b.png", "nothing", "val")]
    write_csv(tmp_path, rows)
    save(tmp_path / "masks/b.png", np.zeros((20, 25), np.uint8))
    train, val = (open_dataset(tmp_path, split, one_phrase=split == "train", **SMALL) for split in ("train", "val"))
    assert len(train) == 1 and train.samples[0].phrases == ("the lake, on the left", "a second phrase")
    assert np.array_equal(train[0]["mask"], box())
    assert val[0]["mask"].shape == (20, 25) and not val[0]["target"].any() and val.samples[0].id == "a.png+b.png"


def test_kinds_of_mask_files(tmp_path):
    write_csv(tmp_path, [("a.png", "m.png", "a lake", "train")])
    file, expected = tmp_path / "masks/m.png", box()
    palette = Image.fromarray(box())
    palette.putpalette([0, 0, 0, 0, 0, 9] + [0] * 762)
    red = box()[..., None] * np.array([200, 0, 0], np.uint8)
    opaque = np.dstack([red, np.full((40, 50), 255, np.uint8)])
    forms = [palette, box(value=255), red, opaque, box().astype(np.uint16) * 65535, box().astype(bool)]
    for form in forms:
        (form if isinstance(form, Image.Image) else Image.fromarray(form)).save(file)
        assert np.array_equal(open_dataset(tmp_path, "train", **SMALL)[0]["mask"], expected)
    write_csv(tmp_path, [("a.png", "m.jpg", "a lake", "train")])
    save(tmp_path / "masks/m.jpg", box(value=255), quality=30)
    assert np.array_equal(open_dataset(tmp_path, "train", **SMALL)[0]["mask"], expected)


def test_copies_of_an_image_are_one_scene(tmp_path):
    write_lists(tmp_path, ["1 a road", "2 a roof", "3 a road"], ["1", "2", "3"])
    save(tmp_path / "images/2.tif", picture())
    save(tmp_path / "images/1.tif", picture())
    save(tmp_path / "images/3.tif", picture(seed=1))
    items = [*open_dataset(tmp_path, "train", **SMALL)]
    assert items[0]["file"] != items[1]["file"] and items[0]["scene"] == items[1]["scene"] != items[2]["scene"]


def test_a_jpeg_may_be_followed_by_anything(tmp_path):
    root = one_ref(tmp_path)
    file = root / "images/rrsisd/JPEGImages/00003.jpg"
    jpeg = file.read_bytes()
    expected = open_dataset(root, "train", **SMALL)[0]["image"]
    file.write_bytes(jpeg + b"\xff\xda" + bytes(range(256)))
    assert torch.equal(open_dataset(root, "train", **SMALL)[0]["image"], expected)
    thumbnail = b"\xff\xe1" + (len(jpeg) + 2).to_bytes(2, "big") + jpeg  # with an end of its own
    file.write_bytes(jpeg[:2] + thumbnail + jpeg[2:])
    assert torch.equal(open_dataset(root, "train", **SMALL)[0]["image"], expected)
    file.write_bytes(jpeg[:2] + thumbnail + jpeg[2:-20])
    assert "is cut off" in message(root)


# What the user is told of broken data is in test_broken_data.py; here of names and places.


def test_unknown_data(tmp_path, monkeypatch):
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
    (tmp_path / "folder/readme.txt").write_text("")
    assert "holds readme.txt" in message("folder")
    (tmp_path / "loop").symlink_to("loop")
    message("loop")
    one_ref(tmp_path / "data/RRSIS-D")
    assert open_dataset("RRSIS-D", "train", **SMALL).name == "RRSIS-D"
    os.remove(tmp_path / "data/RRSIS-D/images/rrsisd/JPEGImages/00003.jpg")
    (tmp_path / "data/RRSIS-D/images/rrsisd/JPEGImages/00003.jpg").symlink_to("00003.jpg")
    assert "00003.jpg can't be read" in message("RRSIS-D")


# Preparation and augmentation


@pytest.mark.parametrize("shape", [(800, 800), (813, 800), (300, 417), (1500, 1100), (298, 735), (512, 512)])
@pytest.mark.parametrize("size", [1024, 525, 224])
def test_resize_is_within_one_of_pil(shape, size):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((size, size), Image.BILINEAR), int)
    assert np.abs(data.resize_image(image, size).permute(1, 2, 0).numpy() - expected).max() <= 1
    mask = image[..., 0] & 1
    centres = [(2 * np.arange(size) + 1) * side for side in shape]  # in units of 1 / (2 size); on an edge both sides do
    (rows, columns), inside = ([c // (2 * size) for c in centres], [c % (2 * size) > 0 for c in centres])
    same = data.resize_mask(mask, size).numpy() == mask[rows][:, columns]
    assert same[inside[0]][:, inside[1]].all()


@pytest.mark.parametrize("before, horizontal, vertical, after", [
    ("The ship on the Left", True, False, "The ship on the Right"),
    ("UPPER left, lower right", True, True, "LOWER right, upper left"),
    ("topmost  car above the bottom one", False, True, "bottommost  car below the top one"),
    ("north-east of the Northwestern road", True, False, "north-west of the Northeastern road"),
    ("southeast", True, True, "northwest"),
    ("the leftover stopped overpass is bright", True, True, "the leftover stopped overpass is bright"),
    ("left upper", False, False, "left upper"),
])
def test_flip_phrase(before, horizontal, vertical, after):
    assert flip_phrase(before, horizontal, vertical) == after
    assert flip_phrase(after, horizontal, vertical) == before


def quadrants(root, phrase, n=1):
    """Images whose top left quarter is white and is the target."""
    refs = [ref(i, "train", (phrase,)) for i in range(n)]
    mask = box(80, 80, 0, 0, 40, 40)
    write_refer(root, refs, [annotation(i, [rle(mask)]) for i in range(n)], pictures=False)
    for r in refs:
        save(root / "images/rrsisd/JPEGImages" / r["file_name"], np.repeat(mask[..., None] * 255, 3, 2), quality=95)
    return root


def test_flips_keep_image_mask_and_phrase_together(tmp_path):
    dataset = open_dataset(quadrants(tmp_path, "the upper left field"), "train", augment="ours", **SMALL)
    seen = set()
    for epoch in range(40):
        item = dataset[0, epoch]
        seen.add(item["phrase"])
        rows, columns = np.nonzero(item["target"].numpy())
        place = ("upper" if rows.mean() < 32 else "lower", "left" if columns.mean() < 32 else "right")
        assert item["phrase"] == "the {} {} field".format(*place)
        inside, outside = (item["image"][0][item["target"] == value].float().mean() for value in (1, 0))
        assert inside > outside + 50
        assert item["mask"].sum() == 1600
    assert len(seen) == 4


@pytest.mark.parametrize("phrase", ["the plane at 2 o'clock", "turning Clockwise", "the second ship", "\u4e0a\u65b9",
                                    "a ship in the NE corner", "the topleft ship", "das Schiff links oben"])
def test_phrases_that_forbid_flips(tmp_path, phrase):
    dataset = open_dataset(quadrants(tmp_path, phrase), "train", augment="ours", **SMALL)
    assert all(dataset[0, epoch]["mask"][0, 0] == 1 and dataset[0, epoch]["phrase"] == phrase for epoch in range(10))


@pytest.mark.parametrize("phrase, horizontal, vertical", [
    ("the bright ship left of the upright tower", True, True), ("the lowermost basketball court", True, True),
    ("the rightmost baseball field below flowers", True, True), ("a car under the bridge", True, False),
    ("the ship underneath", True, False), ("the leftside ship", False, True), ("the upperleft ship", False, False),
    ("el barco de la izquierda", False, True), ("un barco arriba", True, False),
])  # fmt: skip
def test_which_flips_a_phrase_allows(phrase, horizontal, vertical):
    assert [not fixed.search(phrase) for fixed in data.FIXED] == [horizontal, vertical]


def test_published_squares(tmp_path, monkeypatch):
    quadrants(tmp_path, "a field", 20)
    paper, plain = (open_dataset(tmp_path, "train", augment=augment, **SMALL) for augment in ("paper", None))
    changed = {i for i in range(20) if not torch.equal(paper[i]["image"], plain[i]["image"])}
    assert changed == set(random.Random(2401).sample(range(20), 4))
    i = min(changed)
    assert not torch.equal(paper[i, 0]["image"], paper[i, 1]["image"])
    assert torch.equal(paper[i, 1]["image"], paper[i, 1]["image"])
    assert torch.equal(paper[i]["mask"], plain[i]["mask"])
    lists = write_lists(tmp_path / "lists", ["1 a road"] * 20, ["1"])
    assert not open_dataset(lists, "train", augment="paper", **SMALL).marked
    for augment, split in (("paper", "val"), ("other", "train")):
        with pytest.raises(ValueError):
            open_dataset(tmp_path, split, augment=augment, **SMALL)


def test_any_number_of_workers_gives_the_same(tmp_path):
    dataset = open_dataset(quadrants(tmp_path, "the left field", 6), "train", augment="ours", seed=5, **SMALL)
    keys = [(i, 3) for i in range(6)]
    runs = [list(torch.utils.data.DataLoader(dataset, sampler=keys, batch_size=2, num_workers=n, collate_fn=list))
            for n in (0, 2)]
    for a, b in zip(*(sum(run, []) for run in runs)):
        assert a["phrase"] == b["phrase"] and torch.equal(a["image"], b["image"]) and torch.equal(a["mask"], b["mask"])


def test_collate(tmp_path):
    root = write_csv(tmp_path, [("a.png", "a.png", "a lake", "val"), ("a.png", "b.png", "the long lake", "val")])
    save(root / "masks/b.png", box(20, 25))

    def tokenizer(phrases):
        lengths = torch.tensor([len(phrase.split()) for phrase in phrases])
        return torch.zeros(len(phrases), int(lengths.max()), dtype=torch.int64), lengths

    dataset = open_dataset(root, "val", **SMALL)
    batch = Collate(tokenizer)([dataset[0], dataset[1]])
    assert batch["image"].shape == (2, 3, 64, 64) and batch["encoder_image"].shape == (2, 3, 32, 32)
    assert batch["target"].shape == (2, 64, 64) and [tuple(m.shape) for m in batch["mask"]] == [(40, 50), (20, 25)]
    assert batch["ids"].shape == (2, 3) and batch["lengths"].tolist() == [2, 3]
    assert batch["phrase"] == ["a lake", "the long lake"] and batch["id"] == ["a.png", "a.png+b.png"]


# Size, the command line, real files


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


def test_check_prints_and_draws(tmp_path, monkeypatch, capsys):
    write_csv(tmp_path, [("a.png", "a.png", "the lake", "train"), ("a.png", "c.png", "the lake", "val")])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data.py", "--check", str(tmp_path)])
    for name in ("data-check.png", "data-check-2.png", "data-check-3.png"):
        data.main()
        assert name in capsys.readouterr().out.splitlines()[-1] and Image.open(name).size == (1280, 384)
    (tmp_path / "images/a.png").write_bytes(b"")
    data.main()
    told = capsys.readouterr().out
    for part in ("missing files: 1", "c.png", "broken: 1 of 1", "more than one split: 1 of 1"):
        assert part in told
    monkeypatch.setattr(sys, "argv", ["data.py", "--check", "nowhere"])
    with pytest.raises(SystemExit) as exit:
        data.main()
    assert exit.value.code == 2 and "nowhere" in capsys.readouterr().err


@pytest.mark.skipif(not MINI.is_dir(), reason="the real cases are not here")
def test_real_cases():
    for split, n in (("train", 20), ("val", 5), ("test", 5)):
        dataset = open_dataset(MINI, split, image_size=64, encoder_size=32)
        assert len(dataset) == n and dataset.name == "RRSIS-D"
        for item, sample in zip(dataset, dataset.samples):
            assert item["mask"].shape == (800, 800) and item["mask"].any() and item["category"]
            assert data.read_image(sample.image).shape == (512, 512, 3)
            assert np.array_equal(item["mask"], coco.decode(sample.mask[0]))
