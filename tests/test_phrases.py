"""Phrases made of masks: each is true of its target alone, recomputed here without the generator's predicates."""

import csv
import json
import math
import re
from collections import Counter

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco

from annotations import phrases
from data import open_dataset
from runtime.errors import UserError

CATEGORIES = ("ship", "storage tank", "large vehicle", "container ship")
SIDE = 100


def rectangles(rng, count: int) -> list[tuple[int, int, int, int]]:
    """Up to `count` boxes x, y, w, h that are apart."""
    taken, out = np.zeros((SIDE, SIDE), bool), []
    for _ in range(count):
        w, h = rng.integers(3, 24, 2)
        x, y = rng.integers(0, SIDE - w), rng.integers(0, SIDE - h)
        if not taken[max(0, y - 1) : y + h + 1, max(0, x - 1) : x + w + 1].any():
            taken[y : y + h, x : x + w] = True
            out.append((int(x), int(y), int(w), int(h)))
    return out


def coco_file(folder, pictures: int, seed: int = 0, crowds: bool = True):
    """Writes instances.json and images/ -> the content. Masks are polygons, RLEs and some crowds."""
    rng, images, annotations = np.random.default_rng(seed), [], []
    (folder / "images").mkdir()
    for i in range(pictures):
        cv2.imwrite(str(folder / "images" / f"{i}.png"), rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8))
        images.append({"id": i, "file_name": f"{i}.png", "height": SIDE, "width": SIDE, "split": ("train", "val")[i % 4 == 3]})
        for x, y, w, h in rectangles(rng, int(rng.integers(2, 10))):
            mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
            mask[y : y + h, x : x + w] = 1
            rle = coco.encode(mask)
            polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            crowd = crowds and rng.random() < 0.03
            annotations.append({
                "id": len(annotations), "image_id": i, "category_id": int(rng.choice(4, p=(0.45, 0.25, 0.2, 0.1))) + 1,
                "segmentation": {"size": [SIDE, SIDE], "counts": rle["counts"].decode()} if crowd or x % 2 else polygon,
                "area": float(w * h), "bbox": [x, y, w, h], "iscrowd": int(crowd),
            })  # fmt: skip
    content = {"images": images, "annotations": annotations,
               "categories": [{"id": n, "name": name} for n, name in enumerate(CATEGORIES, start=1)]}  # fmt: skip
    (folder / "instances.json").write_text(json.dumps(content))
    return content


def made(folder, *options) -> list[dict]:
    phrases.main([str(folder / "instances.json"), "--images", str(folder / "images"), "--out", str(folder / "out"), *options])
    with open(folder / "out" / "phrases.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ---- what a phrase says, by rules of its own: the middle of each predicate's unclear zone decides -----------------------

WORDS = {  # words -> (x, y) tests of a centroid in 0..1
    "left": lambda x, y: x < 0.445, "right": lambda x, y: x > 0.555, "top": lambda x, y: y < 0.445,
    "bottom": lambda x, y: y > 0.555, "upper": lambda x, y: y < 0.445, "lower": lambda x, y: y > 0.555,
    "middle": lambda x, y: max(abs(x - 0.5), abs(y - 0.5)) < 0.17,
}  # fmt: skip
WORDS["center"] = WORDS["middle"]
TOWARDS = {"right": (1, 0), "left": (-1, 0), "below": (0, 1), "above": (0, -1), "lower right": (1, 1), "lower left": (-1, 1),
           "upper right": (1, -1), "upper left": (-1, -1)}  # fmt: skip
NAMES = {"boat": "ship", "vessel": "ship", "tank": "storage tank"}


def area(a):
    return a["bbox"][2] * a["bbox"][3]


def centre(a):
    x, y, w, h = a["bbox"]
    return (x + w / 2) / SIDE, (y + h / 2) / SIDE


def distance(a, b):
    gaps = [max(p["bbox"][i] - q["bbox"][i] - q["bbox"][i + 2] for p, q in ((a, b), (b, a))) for i in (0, 1)]
    return math.hypot(*(max(g, 0) for g in gaps)) / SIDE


def meant(text: str, things: list[dict]) -> list[dict]:
    """The annotations, as {"name", "bbox"}, that a phrase without its article applies to."""
    if relation := re.fullmatch(r"(.+?) (?:is )?(?:(?:on|to) the ([a-z ]+) of|(below|above)|(next to|near)) the (.+)", text):
        first, side, vertical, near, second = relation.groups()
        (anchor,) = meant(second, things)
        found = [a for a in meant(first, things) if a is not anchor]
        if near:
            return [a for a in found if distance(a, anchor) < 0.08]
        ux, uy = TOWARDS[side or vertical]
        limit = 42 if ux == 0 or uy == 0 else 31
        off = []
        for a in found:
            dx, dy = np.subtract(centre(a), centre(anchor))
            off.append(abs((math.degrees(math.atan2(dy, dx) - math.atan2(uy, ux)) + 180) % 360 - 180))
        return [a for a, angle in zip(found, off) if angle < limit]
    adjective, number, name, position = re.fullmatch(
        r"(?:(large|big|small|tiny|\w+most|largest|biggest|smallest) )?(?:(two|three|four|five) )?"
        r"((?:large vehicle|container ship|storage tank|tank|ship|boat|vessel)s?)(?: (?:on|at|in) the ([a-z ]+))?", text,
    ).groups()  # fmt: skip
    name = NAMES.get(name.removesuffix("s"), name.removesuffix("s"))
    named = [a for a in things if a["name"] == name or name == "ship" and a["name"] == "container ship"]
    found = named
    if adjective in ("large", "big", "small", "tiny"):
        for a in named:
            middle = np.median([area(b) for b in named if b is not a])
            keep = area(a) > 1.6 * middle if adjective in ("large", "big") else area(a) < middle / 1.6
            found = found if keep else [b for b in found if b is not a]
    elif adjective:
        key = {"leftmost": lambda a: centre(a)[0], "rightmost": lambda a: -centre(a)[0], "topmost": lambda a: centre(a)[1],
               "bottommost": lambda a: -centre(a)[1], "smallest": area}.get(adjective, lambda a: -area(a))  # fmt: skip
        found = [min(found, key=key)]
    for word in (position or "").removesuffix(" side").split():
        found = [a for a in found if WORDS[word](*centre(a))]
    assert not number or len(found) == ["two", "three", "four", "five"].index(number) + 2
    return found


def test_each_phrase_is_true_of_its_target_alone(tmp_path):
    content, kinds = coco_file(tmp_path, 120), Counter()
    by_image = {f"{image['id']}.png": [] for image in content["images"]}
    for a in content["annotations"]:
        by_image[f"{a['image_id']}.png"].append(a | {"name": CATEGORIES[a["category_id"] - 1]})
    for row in made(tmp_path, "--phrases", "8", "--absent", "0.3"):
        things, text = by_image[row["image"]], row["phrase"]
        kinds[row["kind"]] += 1
        _, text = text.split(" ", 1)
        found = meant(text, things)
        if row["kind"] == "absent":
            assert not row["mask"] and not meant(re.sub(" (on|at|in) the .*", "", text), things)
            continue
        union = np.zeros((SIDE, SIDE), np.uint8)
        for x, y, w, h in (a["bbox"] for a in found):
            union[y : y + h, x : x + w] = 255
        assert np.array_equal(cv2.imread(str(tmp_path / "out" / "masks" / row["mask"]), cv2.IMREAD_GRAYSCALE), union), row
        if row["kind"] == "group":
            assert len(found) > 1 or found[0]["iscrowd"]
        else:
            assert len(found) == 1 and not found[0]["iscrowd"] and area(found[0]) >= 0.003 * SIDE**2
    assert min(kinds[kind] for kind in (*phrases.KINDS, "group", "absent")) >= 5, kinds


def test_a_tiny_second_object_forbids_the_bare_category(tmp_path):
    content = coco_file(tmp_path, 1)
    boxes = [(10, 10, 20, 20), (70, 70, 3, 3)]  # the second covers 0.09 %
    content["annotations"] = [
        {"id": n, "image_id": 0, "category_id": 1, "iscrowd": 0, "bbox": [x, y, w, h], "area": w * h,
         "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]} for n, (x, y, w, h) in enumerate(boxes)
    ]  # fmt: skip
    (tmp_path / "instances.json").write_text(json.dumps(content))
    rows = made(tmp_path, "--phrases", "50")
    assert {row["mask"] for row in rows} == {"0-0.png", "0-1.png"}  # the large one, and both as a group
    assert not [row for row in rows if re.fullmatch("(A|The) (ship|boat|vessel)", row["phrase"])]
    assert {row["kind"] for row in rows} == {"position", "size", "superlative", "group"}


def test_tiles(tmp_path, capsys):
    """Masks and images are cut alike; an object of which less than half is left is not named but counts."""
    content = coco_file(tmp_path, 1)
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    boxes = [(5, 5, 20, 20), (40, 5, 30, 20), (80, 80, 10, 10)]  # of the second 10 columns are left of 50, 20 right of it
    for x, y, w, h in boxes:
        image[y : y + h, x : x + w] = 255
    cv2.imwrite(str(tmp_path / "images" / "0.png"), image)
    content["annotations"] = [
        {"id": n, "image_id": 0, "category_id": 1, "iscrowd": 0, "bbox": [x, y, w, h], "area": w * h,
         "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]} for n, (x, y, w, h) in enumerate(boxes)
    ]  # fmt: skip
    (tmp_path / "instances.json").write_text(json.dumps(content))
    rows = made(tmp_path, "--tile", "100", "--scale", "2")
    assert {row["image"] for row in rows} == {"0-0-0.png", "0-100-0.png", "0-100-100.png"}
    assert "1 cut by a tile's border" in capsys.readouterr().out
    for row in rows:
        picture = cv2.imread(str(tmp_path / "out" / "images" / row["image"]))
        mask = cv2.imread(str(tmp_path / "out" / "masks" / row["mask"]), cv2.IMREAD_GRAYSCALE)
        assert picture.shape == (100, 100, 3) and mask.shape == (100, 100)
        assert (picture[mask > 0] > 200).mean() > 0.99 and ("left" in row["phrase"] or row["image"] != "0-0-0.png" or
                                                            row["kind"] in ("superlative", "size", "size+position", "group"))
    dataset = open_dataset(str(tmp_path / "out"), "train", image_size=64, encoder_size=32)
    assert {item["kind"] for item in map(dataset.__getitem__, range(len(dataset)))} <= {*phrases.KINDS, "group"}


def test_splits_are_drawn_by_image_where_the_file_has_none(tmp_path):
    content = coco_file(tmp_path, 40)
    for image in content["images"]:
        del image["split"]
    (tmp_path / "instances.json").write_text(json.dumps(content))
    rows = made(tmp_path)
    splits = {}
    for row in rows:
        if row["kind"] != "absent":
            assert splits.setdefault(row["image"], row["split"]) == row["split"]
    assert {*splits.values()} == {"train", "val", "test"}


@pytest.mark.parametrize(("change", "words"), [
    (lambda c: c.pop("categories"), "not a file of COCO instances"),
    (lambda c: c["annotations"][0].update(segmentation=[[1, 2]]), "annotation 0 of"),
    (lambda c: c["images"][0].update(file_name="no.png"), "1 of 2 images"),
])  # fmt: skip
def test_what_is_wrong_is_one_sentence(tmp_path, change, words):
    content = coco_file(tmp_path, 2)
    change(content)
    (tmp_path / "instances.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        made(tmp_path)
    assert not (tmp_path / "out").exists()


def test_words():
    assert [phrases.plural(w) for w in ("ship", "harbor", "bus", "aircraft", "ferry", "quay")] == [
        "ships", "harbors", "buses", "aircraft", "ferries", "quays"]  # fmt: skip
