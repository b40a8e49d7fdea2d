"""From files, written here in the layouts of the data sets, to batches: layouts, items, augmentation, order, workers."""

import csv
import json
import os
import pickle
import random
import re
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from torch.utils.data import DataLoader

from annotations.layouts import read_samples
from data import FIXED, Collate, TrainingOrder, flip_phrase, open_dataset
from imagery.pixels import resize_image
from runtime.errors import UserError

SMALL = dict(image_size=64, encoder_size=32)
IMAGE = "images/rrsisd/JPEGImages/00003.jpg"
LAKE = ("a.png", "a.png", "a lake", "train")


def picture(seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return cv2.resize(coarse, (50, 40), interpolation=cv2.INTER_CUBIC)


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


def note(number, segmentation, **changes):
    return {"segmentation": segmentation, "area": 1.0, "iscrowd": 0, "image_id": number, "bbox": [1, 2, 3, 4],
            "categories_id": 3, "id": number} | changes  # fmt: skip


def write_refer(root, refs, annotations, pictures=True):
    folder, pictures_folder = root / "rrsisd", root / "images/rrsisd/JPEGImages"
    folder.mkdir(parents=True, exist_ok=True), pictures_folder.mkdir(parents=True, exist_ok=True)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=3))
    images = [{"file_name": r["file_name"], "height": 40, "width": 50, "id": r["image_id"]} for r in refs]
    categories = [{"supercategory": name, "id": i, "name": name} for i, name in enumerate("abcd")]
    instances = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(instances))
    for r in refs if pictures else []:
        save(pictures_folder / r["file_name"], picture(seed=r["image_id"]), quality=95)
    return root


SOUND = [rle(box())]


def one_ref(root, segmentation=SOUND, phrases=("A ship on the left",), split="train"):
    return write_refer(root, [ref(3, split, phrases)], [note(3, segmentation)])


def write_lists(root, lines, ids, images="images", masks="masks", suffix=".tif", end="\n", value=255):
    for n, id in enumerate(ids):
        save(root / images / (id + suffix), picture(seed=n))
        save(root / masks / (id + suffix), box(value=value))
    (root / "output_phrase_train.txt").write_bytes(end.join([*lines, ""]).encode())
    return root


def write_csv(root, rows):
    save(root / "images/a.png", picture())
    save(root / "masks/a.png", box())
    with open(root / "phrases.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "mask", "phrase", "split"), *rows])
    return root


def quadrants(root, phrase, n=1):
    """Images whose top left quarter is white and is the target."""
    refs, mask = [ref(i, "train", (phrase,)) for i in range(n)], box(80, 80, 0, 0, 40, 40)
    write_refer(root, refs, [note(i, [rle(mask)]) for i in range(n)], pictures=False)
    for r in refs:
        save(root / "images/rrsisd/JPEGImages" / r["file_name"], np.repeat(mask[..., None] * 255, 3, 2), quality=95)
    return root


def opened(root, split="train", **options):
    return open_dataset(root, split, **SMALL, **options)


def message(root, split="train"):
    """The sentence that the data set raises when it is opened or at its first item."""
    with pytest.raises(UserError) as caught:
        opened(str(root), split)[0]
    text = str(caught.value)
    assert "Traceback" not in text and text.split("\n")[0].endswith(".") and caught.value.exit_code == 2
    return text


def test_category_key_split_names_and_phrases(tmp_path):
    phrases = ("A ship", "the  very long " + "word " * 80 + "end", "Boat in the middle")
    refs = [ref(1, "train", phrases), ref(2, "val", phrases), ref(4, "testA"), ref(5, "test"), ref(6, "train_extra")]
    notes = [note(r["ref_id"], SOUND) for r in refs]
    notes[1]["category_id"] = notes[1].pop("categories_id") - 2
    write_refer(tmp_path, refs, notes)
    train, val = opened(tmp_path, one_phrase=True), opened(tmp_path, "val")
    assert len(train) == 1 and len(val) == 3 and len(opened(tmp_path, "test")) == 2
    assert [item["phrase"] for item in val] == list(phrases)  # iteration ends by IndexError
    assert {train[0, epoch]["phrase"] for epoch in range(20)} == set(phrases)
    assert val[0]["category"] == "b" and train[0]["category"] == "d"
    sentence = message(tmp_path, "validation")
    assert "'validation'" in sentence and "train (1), val (1), testA (1), test (1), train_extra (1)." in sentence


def test_the_split_that_is_meant_without_one(tmp_path):
    refs, notes = [ref(1), ref(2, "val"), ref(3, "testB")], [note(n, SOUND) for n in (1, 2, 3)]
    assert opened(write_refer(tmp_path, refs[:2], notes), None).split == "val"
    dataset = opened(write_refer(tmp_path, refs, notes), None)
    assert dataset.split == "test" and [sample.id for sample in dataset.samples] == ["3"]
    os.remove(tmp_path / IMAGE)  # files that are missing are no reason for another split
    assert "of split 'test' are missing" in message(tmp_path, None)
    assert "no samples in split 'val'" in message(write_refer(tmp_path, refs[:1], notes), None)


def test_no_target_several_targets_and_relatives_of_rrsisd(tmp_path):
    refs = [ref(1, ann_id=[-1]), ref(2, ann_id=[7, 8])]
    root = write_refer(tmp_path, refs, [note(7, [rle(box(right=20))]), note(8, [rle(box(left=20))])])
    (root / "rrsisd").rename(root / "hr")
    for old, new in (("hr/refs(unc).p", "new_refs(unc).p"), ("hr/instances.json", "new_instances.json"),
                     ("images/rrsisd/JPEGImages", "images")):  # fmt: skip
        (root / old).rename(root / "hr" / new)
    none, two = dataset = opened(root)
    assert none["mask"].shape == (40, 50) and not none["mask"].any() and np.array_equal(two["mask"], box())
    assert dataset.name == root.name and opened(one_ref(tmp_path / "RRSIS-HR")).name == "RRSIS-HR"
    assert opened(one_ref(tmp_path / "elsewhere")).name == "RRSIS-D"


@pytest.mark.parametrize("index, pictures", [
    ("refs(unc).p", "JPEGImages"), ("rrsisd/refs(unc).p", "JPEGImages"), ("rrsisd/refs(unc).p", "rrsisd/JPEGImages"),
    ("refs(umd).p", "images"), ("new_refs(google).p", "images/JPEGImages"), ("any/refs(unc).p", "images/any/JPEGImages"),
])  # fmt: skip
def test_where_refer_sets_have_their_files(tmp_path, index, pictures):
    write_refer(tmp_path / "old", [ref(3, file_name="a/3.jpg")], [note(3, SOUND)], pictures=False)
    save(tmp_path / "set" / pictures / "a/3.jpg", picture(3))
    for old, new in (("refs(unc).p", index), ("instances.json", re.sub(r"refs.*", "instances.json", index))):
        (tmp_path / "set" / new).parent.mkdir(exist_ok=True)
        (tmp_path / "old/rrsisd" / old).rename(tmp_path / "set" / new)
    item, = opened(tmp_path / "set")
    assert item["file"] == str(tmp_path / "set" / pictures / "a/3.jpg") and np.array_equal(item["mask"], box())


def test_which_splits_are_test(tmp_path):
    names = ["test", "testA", "test-2", "test_x", "test1", "latest", "contest", "tester", "train"]
    write_refer(tmp_path, [ref(n, name) for n, name in enumerate(names)], [note(n, SOUND) for n in range(9)])
    assert [sample.split for sample in opened(tmp_path, None).samples] == names[:5] and len(opened(tmp_path, "latest")) == 1
    write_refer(tmp_path, [ref(3, "latest"), ref(4, "val")], [note(n, SOUND) for n in (3, 4)])
    assert opened(tmp_path, None).split == "val"


def test_missing_images(tmp_path, capsys):
    write_refer(tmp_path, [ref(n) for n in range(10)], [note(n, SOUND) for n in range(10)])
    for n in range(1, 8):
        os.remove(tmp_path / f"images/rrsisd/JPEGImages/{n:05d}.jpg")
    sentence = message(tmp_path)
    assert all(part in sentence for part in ("7 files", "00001.jpg", "--skip-missing")) and "00007.jpg" not in sentence
    assert [sample.id for sample in opened(tmp_path, skip_missing=True).samples] == ["0", "8", "9"]
    assert "left out 7 of 10" in capsys.readouterr().out


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_refsegrs(tmp_path, end):
    lines = ["007 the  paved road ", "", "7 a building", "   ", "12.5 " + "word " * 80]
    write_lists(tmp_path, lines, ["007", "7", "12.5"], end=end, value=51)
    dataset = opened(tmp_path)
    assert [sample.id for sample in dataset.samples] == ["007", "7", "12.5"]
    assert dataset[0]["phrase"] == "the  paved road" and len(dataset[2]["phrase"].split()) == 80
    assert np.array_equal(dataset[0]["mask"], box())
    save(tmp_path / "masks/007.tif", box(value=50))
    assert not dataset[0]["mask"].any() and not dataset[0]["target"].any()
    save(tmp_path / "images/7.tif", picture(seed=0))  # a copy of another image is the same scene
    assert dataset[0]["file"] != dataset[1]["file"] and dataset[0]["scene"] == dataset[1]["scene"] != dataset[2]["scene"]


def test_risbench(tmp_path):
    lines = ["00001.png a ship  in the harbor", "00001.png another phrase"]
    train = opened(write_lists(tmp_path / "a", lines, ["00001"], "img_rgb", "mask", ".png", value=1), one_phrase=True)
    assert len(train) == 1 and train.samples[0].phrases == ("a ship  in the harbor", "another phrase")
    root = write_lists(tmp_path / "b", lines, ["00001"], suffix=".png", value=1)
    (root / "phrase_txts").mkdir()
    (root / "output_phrase_train.txt").rename(root / "phrase_txts/output_phrase_test.txt")
    assert len(opened(root, "test")) == 2 and np.array_equal(opened(root, "test")[1]["mask"], box())


def test_csv_and_collate(tmp_path):
    train, val = [(*LAKE[:2], "the lake, on the left", "train"), LAKE], [(*LAKE[:3], "val"), ("a.png", "b.png", "no", "val")]
    write_csv(tmp_path, train + val)
    save(tmp_path / "masks/b.png", np.zeros((20, 25), np.uint8))
    train, val = opened(tmp_path, one_phrase=True), opened(tmp_path, "val")
    assert len(train) == 1 and train.samples[0].phrases == ("the lake, on the left", "a lake")
    assert np.array_equal(train[0]["mask"], box()) and not val[1]["target"].any()
    batch = Collate(lambda phrases: (torch.zeros(2, 3), torch.tensor([len(phrase) for phrase in phrases])))([*val])
    assert batch["image"].shape == (2, 3, 64, 64) and batch["encoder_image"].shape == (2, 3, 32, 32)
    assert batch["target"].shape == (2, 64, 64) and [m.shape for m in batch["mask"]] == [(40, 50), (20, 25)]
    assert batch["ids"].shape == (2, 3) and batch["lengths"].tolist() == [6, 2]
    assert batch["phrase"] == ["a lake", "no"] and batch["id"] == ["a.png", "a.png+b.png"]


@pytest.mark.parametrize("text", [
    "Image; MASK ;phrase;Split;kind;note;category\nimages\\a.png;masks\\a.png; a lake, blue;Train;PLACE;x;lake\n;;;;;;\n"
    "./images/a.png;;a ship;train;;;\na.png;a.png;the lake;TRAINING;;;lake\n;;;;;;\n\n",
    "category\tsplit\tkind\tphrase\tmask\timage\t\nlake\ttrain\tPLACE\ta lake, blue\tmasks/a.png\ta.png\n"
    "\ttrain\t\ta ship\t\ta.png\t\t\nlake\tTrain\t\tthe lake\ta.png\timages/a.png\t\n",
], ids=["semicolons", "tabs"])  # fmt: skip
def test_csv_as_people_write_it(tmp_path, text):
    (write_csv(tmp_path, []) / "phrases.csv").write_text(text)
    lake, ship = (dataset := opened(tmp_path)).samples
    assert (lake.id, lake.phrases, lake.kinds, lake.category) == ("a.png", ("a lake, blue", "the lake"), ("PLACE", ""), "lake")
    assert (ship.id, ship.phrases, ship.kinds, ship.category) == ("a.png+", ("a ship",), ("",), "")
    assert np.array_equal(dataset[0]["mask"], box()) and dataset[2]["phrase"] == "a ship"  # one that is not in the image
    assert dataset[2]["mask"].shape == (40, 50) and not dataset[2]["mask"].any()


def test_a_csv_without_splits_is_split_by_image(tmp_path, capsys):
    def drawn(images):
        rows = [f"{name},,{phrase}" for name in images for phrase in ("a lake", "a ship")]
        (tmp_path / "phrases.csv").write_text("\n".join(["image,mask,phrase", *rows]))
        return {os.path.basename(sample.image): sample.split for sample in read_samples(tmp_path)[2]}
    splits = drawn(f"{n}.png" for n in range(30))
    assert Counter(splits.values()) == {"train": 24, "val": 3, "test": 3} and drawn(reversed(splits)) == splits
    assert capsys.readouterr().out.count("they are drawn by image (train 24, val 3, test 3), the same every time\n") == 1
    more = drawn(f"{n}.png" for n in range(31))
    assert sum(more[name] != split for name, split in splits.items()) <= 2
    assert drawn(["a"]) == {"a": "train"} and [sorted(drawn("abc"[:n]).values()) for n in (2, 3)] == [
        ["train", "val"], ["test", "train", "val"]]  # fmt: skip


def test_names_and_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert all(part in message("RRSISD") for part in ("RefSegRS", "rrsisd/refs(unc).p"))
    assert os.path.join("data", "RRSIS-D") in message("RRSIS-D")
    assert "can't be read" in message("x" * 300)  # longer than a name may be
    for folder in ("data/other", "data/near/inside", "near"):  # ./near is meant, not ./data/near
        (tmp_path / folder).mkdir(parents=True)
    assert os.path.join("data", "other") + " holds nothing" in message("other") and "holds nothing" in message("near")
    one_ref(tmp_path / "data/RRSIS-D")
    assert opened("RRSIS-D").name == "RRSIS-D"


def test_an_item_of_a_grey_image_with_exif_and_a_mask_of_another_size(tmp_path):
    cv2.setNumThreads(2)
    mask, exif = box(80, 100, 10, 20, 50, 60), Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    save(one_ref(tmp_path, [rle(mask)]) / IMAGE, picture()[..., 0], exif=exif, quality=95)
    item = opened(tmp_path)[0]
    words = {"id": "3", "category": "d", "kind": "", "phrase": "A ship on the left", "file": str(tmp_path / IMAGE)}
    shapes = {"image": (3, 64, 64), "encoder_image": (3, 32, 32), "target": (64, 64), "mask": (80, 100)}
    assert np.array_equal(item["mask"], mask) and words == {key: item[key] for key in words}
    assert all(item[key].shape == shape and item[key].dtype == torch.uint8 for key, shape in shapes.items())
    assert np.array_equal(item["target"], Image.fromarray(mask).resize((64, 64), Image.NEAREST))
    expected = np.asarray(Image.open(tmp_path / IMAGE).convert("RGB").resize((64, 64), Image.BILINEAR), int)
    assert np.abs(item["image"].permute(1, 2, 0).numpy() - expected).max() <= 1
    assert cv2.getNumThreads() == 1  # 0 of its own, which would not survive a fork


@pytest.mark.parametrize("shape", [(800, 800), (813, 800), (300, 417), (1500, 1100), (298, 735), (512, 512)])
def test_resize_is_within_one_of_pil(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    for size in (1024, 525, 224):
        expected = np.asarray(Image.fromarray(image).resize((size, size), Image.BILINEAR), int)
        assert np.abs(resize_image(image, size).permute(1, 2, 0).numpy() - expected).max() <= 1


@pytest.mark.parametrize("before, horizontal, vertical, after", [
    ("The ship on the Left", True, False, "The ship on the Right"), ("southeast", True, True, "northwest"),
    ("UPPER left, lower right", True, True, "LOWER right, upper left"), ("left upper", False, False, "left upper"),
    ("topmost  car above the bottom one", False, True, "bottommost  car below the top one"),
    ("north-east of the Northwestern road", True, False, "north-west of the Northeastern road"),
    ("the leftover stopped overpass is bright", True, True, "the leftover stopped overpass is bright"),
])  # fmt: skip
def test_flip_phrase(before, horizontal, vertical, after):
    assert (flip_phrase(before, horizontal, vertical), flip_phrase(after, horizontal, vertical)) == (after, before)


def test_flips_keep_image_mask_and_phrase_together(tmp_path):
    dataset = opened(quadrants(tmp_path, "the upper left field"), augment="ours")
    items = [dataset[0, epoch] for epoch in range(40)]
    assert len({item["phrase"] for item in items}) == 4
    for item in items:
        rows, columns = np.nonzero(item["target"].numpy())
        words = ("upper" if rows.mean() < 32 else "lower", "left" if columns.mean() < 32 else "right")
        assert item["phrase"] == "the {} {} field".format(*words)
        inside, outside = (item["image"][0][item["target"] == value].float().mean() for value in (1, 0))
        assert inside > outside + 50 and item["mask"].sum() == 1600
    dataset = opened(quadrants(tmp_path, "\u4e0a\u65b9"), augment="ours")
    assert all(dataset[0, epoch]["mask"][0, 0] for epoch in range(10))  # not English: not flipped


@pytest.mark.parametrize("allowed, phrases", [
    ([True, True], "the bright ship left of the upright tower; the lowermost basketball court"),
    ([True, True], "the rightmost baseball field below flowers"), ([False, True], "the leftside ship; barco de la izquierda"),
    ([True, False], "a car under the bridge; the ship underneath; un barco arriba"),
    ([False, False], "the upperleft ship; turning Clockwise; a ship in the NE corner; the topleft ship; the second ship"),
    ([False, False], "das Schiff links oben; the plane at 2 o'clock"),
])  # fmt: skip
def test_which_flips_a_phrase_allows(allowed, phrases):
    assert all([not fixed.search(phrase) for fixed in FIXED] == allowed for phrase in phrases.split("; "))


def test_published_squares(tmp_path):
    quadrants(tmp_path, "a field", 20)
    paper, plain = (opened(tmp_path, augment=augment) for augment in ("paper", None))
    changed = {i for i in range(20) if not torch.equal(paper[i]["image"], plain[i]["image"])}
    assert changed == set(random.Random(2401).sample(range(20), 4))
    first, second, again = (paper[min(changed), epoch] for epoch in (0, 1, 1))
    assert not torch.equal(first["image"], second["image"]) and torch.equal(second["image"], again["image"])
    assert torch.equal(first["mask"], plain[min(changed)]["mask"])
    assert not opened(write_lists(tmp_path / "lists", ["1 a road"] * 20, ["1"]), augment="paper").marked
    for augment, split in (("paper", "val"), ("other", "train"), ("ours", None)):
        with pytest.raises(ValueError):
            opened(tmp_path, split, augment=augment)


def keys(size=7, seed=3, start=0, stop=35, batch_size=4, **options):
    return list(TrainingOrder(size, seed, start, stop, batch_size, **options))


def test_every_pass_has_each_sample_once_in_an_order_of_its_own():
    batches = keys(stop=140)
    assert len(batches) == len(TrainingOrder(7, 3, 0, 140, 4)) == 35 and {len(batch) for batch in batches} == {4}
    passes = [sum(batches, [])[i : i + 7] for i in range(0, 140, 7)]
    assert all(sorted(part) == [(index, number) for index in range(7)] for number, part in enumerate(passes))
    assert len({tuple(index for index, _ in part) for part in passes}) > 15 and keys(seed=4) != keys(seed=3)
    assert sum(keys(stop=7), []) == sum(batches, [])[:8]  # the last batch is filled from the next pass
    assert keys(size=1, stop=3, batch_size=2) == [[(0, 0), (0, 1)], [(0, 2), (0, 3)]]


def test_an_order_can_be_cut_anywhere_and_split_among_ranks():
    for cut in range(37):
        assert sum(keys(start=cut, stop=36, batch_size=1), []) == sum(keys(stop=36), [])[cut:]
    assert keys(start=16, stop=36) == keys(stop=36)[4:]
    for ranks in (1, 2, 3, 6):
        parts = [keys(batch_size=6, rank=rank, ranks=ranks) for rank in range(ranks)]
        assert all(len(batch) == 6 // ranks for part in parts for batch in part)
        assert [sum(batches, []) for batches in zip(*parts)] == keys(batch_size=6)


def test_any_number_of_workers_gives_the_same(tmp_path):
    dataset = opened(quadrants(tmp_path, "the left field", 6), augment="ours", seed=5)
    order = TrainingOrder(6, 5, 15, 27, 2)
    runs = [list(DataLoader(dataset, batch_sampler=order, num_workers=n, collate_fn=list)) for n in (0, 2)]
    assert [len(run) for run in runs] == [6, 6]
    for a, b in zip(*(sum(run, []) for run in runs)):
        assert (a["id"], a["phrase"]) == (b["id"], b["phrase"]) and torch.equal(a["image"], b["image"])
    (tmp_path / IMAGE).write_bytes(b"no image")
    with pytest.raises(UserError, match="^Sample 3 of RRSIS-D .* is broken: .*not a sound image.$"):  # the sentence alone
        list(DataLoader(opened(tmp_path), num_workers=1, collate_fn=list))
