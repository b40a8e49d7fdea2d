"""From samples to batches: items, augmentation, the order of training, workers."""

import random

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from test_annotations import IMAGE, SMALL, box, one_ref, picture, quadrants, save, write_csv, write_lists
from torch.utils.data import DataLoader

import data
from data import Collate, TrainingOrder, flip_phrase, open_dataset
from imagery.pixels import resize_image, resize_mask
from runtime.errors import UserError


def test_an_item(tmp_path):
    item = open_dataset(one_ref(tmp_path), "train", **SMALL)[0]
    assert np.array_equal(item["mask"], box())
    assert (item["id"], item["category"], item["kind"], item["phrase"]) == ("3", "d", "", "A ship on the left")
    assert item["file"] == str(tmp_path / IMAGE)
    assert item["image"].shape == (3, 64, 64) and item["image"].dtype == torch.uint8
    assert item["encoder_image"].shape == (3, 32, 32) and item["encoder_image"].dtype == torch.uint8
    assert item["target"].shape == (64, 64) and item["target"].dtype == item["mask"].dtype == torch.uint8


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
    mask = image[..., 0] & 1
    centres = [(2 * np.arange(size) + 1) * side for side in shape]  # in units of 1 / (2 size); on an edge both sides do
    (rows, columns), inside = ([c // (2 * size) for c in centres], [c % (2 * size) > 0 for c in centres])
    same = resize_mask(mask, size).numpy() == mask[rows][:, columns]
    assert same[inside[0]][:, inside[1]].all()


# Augmentation


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
        assert inside > outside + 50
        assert item["mask"].sum() == 1600
    assert len(phrases) == 4


@pytest.mark.parametrize("phrase", ["the plane at 2 o'clock", "turning Clockwise", "the second ship", "\u4e0a\u65b9",
                                    "a ship in the NE corner", "the topleft ship", "das Schiff links oben"])  # fmt: skip
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


def test_published_squares(tmp_path):
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
    for augment, split in (("paper", "val"), ("other", "train"), ("ours", None)):
        with pytest.raises(ValueError):
            open_dataset(tmp_path, split, augment=augment, **SMALL)


# The order of training


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


def test_the_last_batch_is_filled_from_the_next_pass():
    assert sum(keys(stop=7), []) == sum(keys(stop=35), [])[:8]  # 2 batches of 4 of a set of 7
    assert sum(keys(size=1, stop=3, batch_size=2), []) == [(0, 0), (0, 1), (0, 2), (0, 3)]


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


# Workers and batches


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


def test_opencv_is_single_threaded_once_a_dataset_is_made(tmp_path):
    cv2.setNumThreads(2)
    open_dataset(one_ref(tmp_path), "train", **SMALL)
    assert cv2.getNumThreads() == 1  # 0 threads of its own


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
