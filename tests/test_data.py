"""From files, written here in the layouts of the data sets, to batches: layouts, items, augmentation, order, workers."""

import csv
import json
import os
import pickle
import random

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from torch.utils.data import DataLoader

import data
from data import Collate, TrainingOrder, flip_phrase, open_dataset
from imagery.pixels import resize_image
from runtime.errors import UserError

SMALL = dict(image_size=64, encoder_size=32)
IMAGE = "images/rrsisd/JPEGImages/00003.jpg"
LAKE = ("a.png", "a.png", "a lake", "train")


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
    instances = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
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


def test_category_key_split_names_and_phrases(tmp_path):
    phrases = ("A ship", "the  very long " + "word " * 80 + "end", "Boat in the middle")
    refs = [ref(1, "train", phrases), ref(2, "val", phrases), ref(4, "testA"), ref(5, "test"), ref(6, "train_extra")]
    notes = [annotation(r["ref_id"], SOUND) for r in refs]
    notes[1]["category_id"] = notes[1].pop("categories_id") - 2
    write_refer(tmp_path, refs, notes)
    train, val = (open_dataset(tmp_path, split, one_phrase=split == "train", **SMALL) for split in ("train", "val"))
    assert len(train) == 1 and len(val) == 3 and len(open_dataset(tmp_path, "test", **SMALL)) == 2
    assert [item["phrase"] for item in val] == list(phrases)  # iteration ends by IndexError
    assert {train[0, epoch]["phrase"] for epoch in range(20)} == set(phrases)
    assert val[0]["category"] == "b" and train[0]["category"] == "d"
    sentence = message(tmp_path, "validation")
    assert "'validation'" in sentence and "train (1), val (1), testA (1), test (1), train_extra (1)." in sentence


def test_the_split_that_is_meant_without_one(tmp_path):
    refs, notes = [ref(1), ref(2, "val"), ref(3, "testB")], [annotation(n, SOUND) for n in (1, 2, 3)]
    assert open_dataset(write_refer(tmp_path, refs[:2], notes), None, **SMALL).split == "val"
    dataset = open_dataset(write_refer(tmp_path, refs, notes), None, **SMALL)
    assert dataset.split == "test" and [sample.id for sample in dataset.samples] == ["3"]
    os.remove(tmp_path / IMAGE)  # files that are missing are no reason for another split
    assert "of split 'test' are missing" in message(tmp_path, None)
    assert "no samples in split 'val'" in message(write_refer(tmp_path, refs[:1], notes), None)


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
    assert all(part in sentence for part in ("7 files", "00001.jpg", "--skip-missing")) and "00007.jpg" not in sentence
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
    rows = [(*LAKE[:2], "the lake, on the left", "train"), LAKE, ("a.png", "b.png", "nothing", "val")]
    write_csv(tmp_path, rows)
    save(tmp_path / "masks/b.png", np.zeros((20, 25), np.uint8))
    train, val = (open_dataset(tmp_path, split, one_phrase=split == "train", **SMALL) for split in ("train", "val"))
    assert len(train) == 1 and train.samples[0].phrases == ("the lake, on the left", "a lake")
    assert np.array_equal(train[0]["mask"], box())
    assert val[0]["mask"].shape == (20, 25) and not val[0]["target"].any() and val.samples[0].id == "a.png+b.png"


def test_names_and_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "RefSegRS" in message("RRSISD") and "rrsisd/refs(unc).p" in message("RRSISD")
    assert os.path.join("data", "RRSIS-D") in message("RRSIS-D")
    assert "can't be read" in message("x" * 300)  # longer than a name may be
    for folder in ("data/other", "data/near/inside", "near"):  # ./near is meant, not ./data/near
        (tmp_path / folder).mkdir(parents=True)
    assert os.path.join("data", "other") + " holds nothing" in message("other") and "holds nothing" in message("near")
    one_ref(tmp_path / "data/RRSIS-D")
    assert open_dataset("RRSIS-D", "train", **SMALL).name == "RRSIS-D"
    os.remove(tmp_path / "data/RRSIS-D" / IMAGE)
    (tmp_path / "data/RRSIS-D" / IMAGE).symlink_to("00003.jpg")
    assert "00003.jpg can't be read" in message("RRSIS-D")


def test_an_item(tmp_path):
    cv2.setNumThreads(2)
    item = open_dataset(one_ref(tmp_path), "train", **SMALL)[0]
    words = {"id": "3", "category": "d", "kind": "", "phrase": "A ship on the left", "file": str(tmp_path / IMAGE)}
    shapes = {"image": (3, 64, 64), "encoder_image": (3, 32, 32), "target": (64, 64), "mask": (40, 50)}
    assert np.array_equal(item["mask"], box()) and words == {key: item[key] for key in words}
    assert all(item[key].shape == shape and item[key].dtype == torch.uint8 for key, shape in shapes.items())
    assert cv2.getNumThreads() == 1  # 0 of its own, which would not survive a fork


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


def test_copies_of_an_image_are_one_scene(tmp_path):
    write_lists(tmp_path, ["1 a road", "2 a roof", "3 a road"], ["1", "2", "3"])
    for name, seed in (("1", 0), ("2", 0), ("3", 1)):
        save(tmp_path / f"images/{name}.tif", picture(seed=seed))
    items = [*open_dataset(tmp_path, "train", **SMALL)]
    assert items[0]["file"] != items[1]["file"] and items[0]["scene"] == items[1]["scene"] != items[2]["scene"]


@pytest.mark.parametrize("shape", [(800, 800), (813, 800), (300, 417), (1500, 1100), (298, 735), (512, 512)])
@pytest.mark.parametrize("size", [1024, 525, 224])
def test_resize_is_within_one_of_pil(shape, size):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((size, size), Image.BILINEAR), int)
    assert np.abs(resize_image(image, size).permute(1, 2, 0).numpy() - expected).max() <= 1


@pytest.mark.parametrize("before, horizontal, vertical, after", [
    ("The ship on the Left", True, False, "The ship on the Right"),
    ("UPPER left, lower right", True, True, "LOWER right, upper left"),
    ("topmost  car above the bottom one", False, True, "bottommost  car below the top one"),
    ("north-east of the Northwestern road", True, False, "north-west of the Northeastern road"),
    ("southeast", True, True, "northwest"),
    ("the leftover stopped overpass is bright", True, True, "the leftover stopped overpass is bright"),
    ("left upper", False, False, "left upper"),
])  # fmt: skip
def test_flip_phrase(before, horizontal, vertical, after):
    assert flip_phrase(before, horizontal, vertical) == after
    assert flip_phrase(after, horizontal, vertical) == before


def test_flips_keep_image_mask_and_phrase_together(tmp_path):
    dataset = open_dataset(quadrants(tmp_path, "the upper left field"), "train", augment="ours", **SMALL)
    phrases = set()
    for epoch in range(40):
        item = dataset[0, epoch]
        phrases.add(item["phrase"])
        rows, columns = np.nonzero(item["target"].numpy())
        words = ("upper" if rows.mean() < 32 else "lower", "left" if columns.mean() < 32 else "right")
        assert item["phrase"] == "the {} {} field".format(*words)
        inside, outside = (item["image"][0][item["target"] == value].float().mean() for value in (1, 0))
        assert inside > outside + 50 and item["mask"].sum() == 1600
    assert len(phrases) == 4
    dataset = open_dataset(quadrants(tmp_path, "\u4e0a\u65b9"), "train", augment="ours", **SMALL)
    assert all(dataset[0, epoch]["mask"][0, 0] for epoch in range(10))  # not English: not flipped


@pytest.mark.parametrize("phrase, horizontal, vertical", [
    ("the bright ship left of the upright tower", True, True), ("the lowermost basketball court", True, True),
    ("the rightmost baseball field below flowers", True, True), ("a car under the bridge", True, False),
    ("the ship underneath", True, False), ("the leftside ship", False, True), ("the upperleft ship", False, False),
    ("el barco de la izquierda", False, True), ("un barco arriba", True, False), ("turning Clockwise", False, False),
    ("a ship in the NE corner", False, False), ("the topleft ship", False, False), ("the second ship", False, False),
    ("das Schiff links oben", False, False), ("the plane at 2 o'clock", False, False),
])  # fmt: skip
def test_which_flips_a_phrase_allows(phrase, horizontal, vertical):
    assert [not fixed.search(phrase) for fixed in data.FIXED] == [horizontal, vertical]


def test_published_squares(tmp_path):
    quadrants(tmp_path, "a field", 20)
    paper, plain = (open_dataset(tmp_path, "train", augment=augment, **SMALL) for augment in ("paper", None))
    changed = {i for i in range(20) if not torch.equal(paper[i]["image"], plain[i]["image"])}
    assert changed == set(random.Random(2401).sample(range(20), 4))
    i = min(changed)
    first, second, again, as_it_is = paper[i, 0], paper[i, 1], paper[i, 1], plain[i]
    assert not torch.equal(first["image"], second["image"]) and torch.equal(second["image"], again["image"])
    assert torch.equal(first["mask"], as_it_is["mask"])
    lists = write_lists(tmp_path / "lists", ["1 a road"] * 20, ["1"])
    assert not open_dataset(lists, "train", augment="paper", **SMALL).marked
    for augment, split in (("paper", "val"), ("other", "train"), ("ours", None)):
        with pytest.raises(ValueError):
            open_dataset(tmp_path, split, augment=augment, **SMALL)


def keys(size=7, seed=3, start=0, stop=35, batch_size=4, **options):
    return list(TrainingOrder(size, seed, start, stop, batch_size, **options))


def test_every_pass_has_each_sample_once_in_an_order_of_its_own():
    batches = keys(stop=140)
    assert len(batches) == len(TrainingOrder(7, 3, 0, 140, 4)) == 35 and {len(batch) for batch in batches} == {4}
    stream = sum(batches, [])
    passes = [stream[i : i + 7] for i in range(0, 140, 7)]
    assert all(sorted(part) == [(index, number) for index in range(7)] for number, part in enumerate(passes))
    assert len({tuple(index for index, _ in part) for part in passes}) > 15
    assert keys(seed=4) != keys(seed=3)
    assert sum(keys(stop=7), []) == stream[:8]  # the last batch is filled from the next pass
    assert keys(size=1, stop=3, batch_size=2) == [[(0, 0), (0, 1)], [(0, 2), (0, 3)]]


def test_an_order_can_be_cut_anywhere():
    whole = sum(keys(stop=36), [])
    for cut in range(37):
        assert sum(keys(start=cut, stop=36, batch_size=1), []) == whole[cut:]
    assert keys(start=16, stop=36) == keys(stop=36)[4:]


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_the_parts_of_the_ranks_are_the_batch_of_one_process(ranks):
    parts = [keys(batch_size=6, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert all(len(batch) == 6 // ranks for part in parts for batch in part)
    assert [sum(batches, []) for batches in zip(*parts)] == keys(batch_size=6)


def test_any_number_of_workers_gives_the_same(tmp_path):
    dataset = open_dataset(quadrants(tmp_path, "the left field", 6), "train", augment="ours", seed=5, **SMALL)
    order = TrainingOrder(6, 5, 15, 27, 2)
    runs = [list(DataLoader(dataset, batch_sampler=order, num_workers=n, collate_fn=list)) for n in (0, 2)]
    assert [len(run) for run in runs] == [6, 6]
    for a, b in zip(*(sum(run, []) for run in runs)):
        assert (a["id"], a["phrase"]) == (b["id"], b["phrase"])
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["mask"], b["mask"])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_worker_raises_the_sentence_alone(tmp_path, workers):
    (one_ref(tmp_path) / IMAGE).write_bytes(b"no image")
    loader = DataLoader(open_dataset(tmp_path, "train", **SMALL), num_workers=workers, collate_fn=list)
    with pytest.raises(UserError, match="^Sample 3 of RRSIS-D .* is broken: .*not a sound image.$"):
        next(iter(loader))


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
