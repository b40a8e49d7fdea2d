"""Phrases made of masks: each is true of its target alone, recomputed here without the generator's predicates."""

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco

from annotations import phrases, predicates
from annotations.instances import InstancesFile, cut
from annotations.masks import load_mask
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
    rows = made(tmp_path, "--phrases", "8", "--absent", "0.3")
    assert max(Counter(row["mask"] for row in rows if row["split"] == "val").values()) == 1
    for row in rows:
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
    assert all(text.startswith("The ") for text in texts(rows, "superlative"))  # there is but one


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


# ---- the predicates, by values on both sides of each margin -------------------------------------------------------------


def thing(x=0.5, y=0.5, area=100.0, apart=1.0):
    return SimpleNamespace(centre=(x, y), area=area, box=(x, y, x, y), distance=lambda other: apart)


@pytest.mark.parametrize(("outcome", "true", "unclear", "false"), [
    (lambda x: predicates.is_at(thing(x=x), "left"), (0, 0.39), (0.4, 0.49), (0.5, 1)),
    (lambda x: predicates.is_at(thing(x=x), "right"), (0.61, 1), (0.51, 0.6), (0, 0.5)),
    (lambda y: predicates.is_at(thing(y=y), "top"), (0, 0.39), (0.4, 0.49), (0.5, 1)),
    (lambda y: predicates.is_at(thing(y=y), "bottom"), (0.61, 1), (0.51, 0.6), (0, 0.5)),
    (lambda x: predicates.is_at(thing(x=x), "middle"), (0.39, 0.61), (0.37, 0.7), (0.27, 0.73)),
    (lambda x: predicates.is_at(thing(x=x, y=0.2), "upper left"), (0, 0.39), (0.4, 0.49), (0.5, 1)),
    (lambda x: predicates.is_at(thing(x=x, y=0.45), "upper left"), (), (0, 0.49), (0.5, 1)),
    (lambda a: predicates.is_towards(thing(*turned(a)), thing(), 0), (-22, 22), (-61, 23, 61), (62, 180, 298)),
    (lambda a: predicates.is_towards(thing(*turned(a)), thing(), 270), (249, 291), (-30, 240), (0, 90, 180)),
    (lambda a: predicates.is_towards(thing(*turned(a)), thing(), 45), (26, 64), (4, 24, 66, 86), (2, 88, 225)),
    (lambda x: predicates.is_most(thing(x), [thing(0.5), thing(0.7)], "leftmost"), (0.1, 0.41), (0.43, 0.49), (0.5, 0.9)),
    (lambda y: predicates.is_most(thing(y=y), [thing(y=0.5)], "bottommost"), (0.59, 1), (0.51, 0.57), (0.1, 0.5)),
    (lambda a: predicates.is_most(thing(area=a), [thing(), thing(area=50)], "largest"), (151, 900), (110, 149), (99, 10)),
    (lambda a: predicates.is_most(thing(area=a), [thing()], "smallest"), (1, 66), (68, 99), (100, 900)),
    (lambda a: predicates.is_sized(thing(area=a), [*[thing()] * 2, thing(area=9)], "large"), (200, 900), (126, 199), (1, 125)),
    (lambda a: predicates.is_sized(thing(area=a), [thing()], "small"), (1, 50), (51, 79), (80, 900)),
    (lambda d: predicates.is_near(thing(apart=d), thing()), (0, 0.04), (-0.01, 0.05, 0.11), (0.12, 1)),
    (lambda x: predicates.is_near(thing(x=x, apart=0), thing()), (0.5, 0.61), (), (0.63, 0.9)),
])  # fmt: skip
def test_three_outcomes(outcome, true, unclear, false):
    assert [[outcome(v) for v in values] for values in (true, unclear, false)] == [
        [True] * len(true), [None] * len(unclear), [False] * len(false)]  # fmt: skip


def turned(angle: float) -> tuple[float, float]:
    """A place that lies at an angle from the middle, in degrees: 0 is to the right, 90 below."""
    return 0.5 + 0.3 * math.cos(math.radians(angle)), 0.5 + 0.3 * math.sin(math.radians(angle))


def test_and_of_three_outcomes():
    values = (True, None, False)
    assert [[predicates.both(a, b) for b in values] for a in values] == [[True, None, False], [None, None, False], [False] * 3]


# ---- what is said of a few objects ---------------------------------------------------------------------------------------


def said(folder, *things, options=(), **image):
    """Phrases made of an image with things (x, y, w, h, category, crowd) -> rows. Keywords change the image's entry."""
    folder.mkdir(exist_ok=True)
    content = coco_file(folder, 1)
    names = list(CATEGORIES)
    content["annotations"] = []
    for n, (x, y, w, h, *rest) in enumerate(things):
        name, crowd = (*rest, *("ship", 0)[len(rest) :])
        names += [name] if name not in names else []
        outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        if crowd:  # by columns from the top: of nothing and of the mask, in turns
            runs = [x * SIDE + y, *[h, SIDE - h] * (w - 1), h]
            outline = {"size": [SIDE, SIDE], "counts": [*runs, SIDE**2 - sum(runs)]}
        content["annotations"].append({"id": n, "image_id": 0, "category_id": names.index(name) + 1, "segmentation": outline}
                                      | ({"iscrowd": 1} if crowd else {}))  # fmt: skip
    content["categories"] = [{"id": n, "name": name} for n, name in enumerate(names, start=1)]
    content["images"][0].update(image)
    (folder / "instances.json").write_text(json.dumps(content))
    return made(folder, *(options or ("--phrases", "60")))


def texts(rows, kind: str) -> set[str]:
    return {row["phrase"] for row in rows if row["kind"] == kind}


def test_of_a_crowd_the_whole_group_alone_is_said(tmp_path):
    rows = said(tmp_path, (5, 5, 20, 20, "ship", 1), (70, 70, 20, 20), (70, 10, 20, 20, "storage tank"),
                options=("--phrases", "60", "--tile", "100"))  # fmt: skip
    assert {row["category"] for row in rows} == {"ship", "storage tank"} and {row["phrase"] for row in rows} >= {"All ships"}
    assert {row["kind"] for row in rows if row["category"] == "ship"} == {"group"}
    assert not [row for row in rows if " two " in row["phrase"] or row["phrase"].startswith("Both")]  # a crowd isn't counted
    mask = cv2.imread(str(tmp_path / "out" / "masks" / next(row["mask"] for row in rows if row["kind"] == "group")), 0)
    assert (mask > 0).sum() == 800 and (mask[5:25, 5:25] > 0).all()
    assert not re.search("ships?|boats?|vessels?", " ".join(row["phrase"] for row in rows if row["category"] != "ship"))


def test_near_is_said_of_neighbours_not_of_what_lies_in_another(tmp_path):
    ring = (10, 10, 60, 60, "large vehicle")
    near = "^The (ship|boat|vessel) (next to|near) the large vehicle"
    relations = texts(said(tmp_path / "in", ring, (30, 30, 10, 10), (85, 85, 10, 10)), "relation")
    assert not any(re.match("(A|The) (ship|boat|vessel) .*large vehicle", text) for text in relations)  # nor a direction
    relations = texts(said(tmp_path / "beside", ring, (72, 30, 10, 10), (5, 90, 10, 10)), "relation")
    assert any(re.match(near, text) for text in relations)


def test_distance_is_between_masks_not_boxes():
    corner = np.zeros((50, 100), np.uint8)
    corner[:, :10] = corner[40:] = 1  # an L, whose box holds the other
    other = np.zeros((50, 100), np.uint8)
    other[5:15, 40:60] = 1
    a, b = (cut("ship", mask, False, mask.shape) for mask in (corner, other))
    assert a.distance(b) == b.distance(a) == pytest.approx(0.25) and a.distance(a) < 0  # rows 15 to 39 between them, of 100


def test_groups_have_members_that_can_be_seen(tmp_path):
    small = [(60, 10, 3, 3), (60, 30, 3, 3), (60, 50, 3, 3)]
    assert not texts(said(tmp_path / "a", (10, 10, 20, 20), *small), "group")
    rows = said(tmp_path / "b", (10, 10, 20, 20), (10, 50, 20, 20), *small[:1])
    assert texts(rows, "group") and all(row["mask"] for row in rows)
    two = texts(said(tmp_path / "c", (5, 5, 9, 9), (80, 80, 9, 9)), "group")
    assert {text.split()[0] for text in two} == {"The", "All", "Both"} and not any("All two" in text for text in two)


def test_names_are_not_shared_by_two_categories(tmp_path):
    apart = (10, 10, 20, 20, "plane"), (70, 70, 20, 20, "helicopter")
    assert texts(said(tmp_path / "two", *apart), "category") == {
        "A plane", "The plane", "An airplane", "The airplane", "A helicopter", "The helicopter"}  # fmt: skip
    assert "An aircraft" in texts(said(tmp_path / "one", apart[0]), "category")
    rows = said(tmp_path / "size", (5, 5, 30, 30, "large vehicle"), (70, 70, 9, 9, "large vehicle"))
    assert {row["kind"] for row in rows} == {"position", "superlative", "relation", "group"}
    assert not re.search("largest|biggest|smallest", " ".join(row["phrase"] for row in rows))


def test_absent_phrases_name_nothing_that_is_there(tmp_path):
    """A container ship is a ship: only categories that the file has elsewhere can be absent, and by no word of one here."""
    content = coco_file(tmp_path, 2)
    box = {"segmentation": [[10, 10, 40, 10, 40, 40, 10, 40]]}  # neither area nor iscrowd
    content["categories"].append({"id": 9, "name": "background"})
    content["annotations"] = [{"id": n, "image_id": n // 3, "category_id": c} | box for n, c in enumerate((4, 4, 4, 1, 2, 4))]
    (tmp_path / "instances.json").write_text(json.dumps(content))
    rows = [row for row in made(tmp_path, "--absent", "1") if row["kind"] == "absent"]
    assert len(rows) == 1 and rows[0]["image"] == "0.png" and "tank" in rows[0]["phrase"]


def test_as_many_training_images_as_asked_for_have_an_absent_phrase(tmp_path):
    coco_file(tmp_path, 200)
    for options, least, most in (((), 0, 0), (("--absent", "0.3"), 0.2, 0.4)):
        rows = [row for row in made(tmp_path, *options) if row["split"] == "train"]
        absent = sum(row["kind"] == "absent" for row in rows)
        assert least <= absent / len({row["image"] for row in rows}) <= most
        shutil.rmtree(tmp_path / "out")


def test_tiles_cover_all_of_an_image(tmp_path):
    rows = said(tmp_path, (2, 2, 14, 14), (82, 82, 14, 14), options=("--tile", "40"))
    assert {row["image"] for row in rows} == {"0-0-0.png", "0-60-60.png"}
    masks = [cv2.imread(str(tmp_path / "out" / "masks" / row["mask"]), 0) for row in rows]
    assert {mask.shape for mask in masks} == {(40, 40)}
    assert {cv2.boundingRect(mask) for mask in masks} == {(2, 2, 14, 14), (22, 22, 14, 14)}


def test_an_object_that_scaling_would_lose_still_counts(tmp_path):
    rows = said(tmp_path, (10, 10, 40, 40), (81, 81, 1, 1), options=("--scale", "0.25", "--phrases", "60"))
    assert not texts(rows, "category") and {row["mask"] for row in rows} >= {"0-0.png"}


def test_names_of_files(tmp_path, capsys):
    """Images in folders and of one name keep files of their own; one without annotations gets an absent phrase alone."""
    content, names = coco_file(tmp_path, 4, crowds=False), ("a/0.png", "0.png", "0.jpg", "1.png")
    (tmp_path / "images" / "a").mkdir()
    for image, name, split in zip(content["images"], names, ("Training", "train", "train", "val")):
        cv2.imwrite(str(tmp_path / "images" / name), np.zeros((SIDE, SIDE, 3), np.uint8))
        image.update(file_name=name, split=split)
    content["annotations"] = [a | {"area": None, "iscrowd": 0} for a in content["annotations"] if a["image_id"] != 3]
    content["annotations"][0]["segmentation"] = [[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]]  # covers no pixel
    (tmp_path / "instances.json").write_text(json.dumps(content))
    rows = made(tmp_path)
    assert {(row["image"], row["split"]) for row in rows} == {
        ("a-0.png", "train"), ("0-png.png", "train"), ("0-jpg.jpg", "train"), ("1.png", "absent")}  # fmt: skip
    assert "1 cover no pixel" in capsys.readouterr().out
    named = [row["mask"] for row in rows if row["mask"]]
    assert {*named} == {path.name for path in (tmp_path / "out" / "masks").iterdir()}
    assert {row["image"] for row in rows} == {path.name for path in (tmp_path / "out" / "images").iterdir()}
    samples = InstancesFile(tmp_path / "instances.json", tmp_path / "images").samples("train", 0.005)
    assert samples and all(load_mask(sample, (SIDE, SIDE)).mean() >= 0.005 for sample in samples)


@pytest.mark.parametrize(("change", "words"), [
    (lambda c: c.pop("categories"), "not a file of COCO instances"),
    (lambda c: c["annotations"][0].update(segmentation=[[1, 2]]), "annotation 0 of"),
    (lambda c: c["images"][0].update(file_name="no.png"), "1 of 2 images"),
    (lambda c: c["annotations"][0].update(image_id=77), "annotation 0 of .* has image_id 77, which the file doesn't list"),
    (lambda c: c["annotations"][0].update(category_id=77), "has category_id 77"),
    (lambda c: c["annotations"][0].update(segmentation=[]), "annotation 0 of .* has no mask"),
    (lambda c: c["annotations"][0].pop("segmentation"), "KeyError: 'segmentation'"),
    (lambda c: c["images"][0].pop("split"), "1 of 2 images of .* have no split"),
    (lambda c: c["images"][0].update(id=1), "several images of .* have one id"),
    (lambda c: c["images"][0].update(file_name="1.png"), "several images of .* have one file_name"),
    (lambda c: [image.update(width=150, height=150) for image in c["images"]], "is 100 x 100 pixels large, and 150 x 150"),
    (lambda c: [image.update(file_name=name) for image, name in zip(c["images"], ("a/0.png", "a-0.png"))], "rename one"),
])  # fmt: skip
def test_what_is_wrong_is_one_sentence(tmp_path, change, words):
    content = coco_file(tmp_path, 2, crowds=False)
    content["annotations"] = [a for a in content["annotations"] if isinstance(a["segmentation"], list)]
    content["annotations"][0]["id"] = 0
    (tmp_path / "images" / "a").mkdir()
    for name in ("a/0.png", "a-0.png"):
        (tmp_path / "images" / name).write_bytes((tmp_path / "images" / "0.png").read_bytes())
    change(content)
    (tmp_path / "instances.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        made(tmp_path, "--tile", "50")
    assert not (tmp_path / "out").exists()


def test_words():
    assert [phrases.plural(w) for w in ("ship", "harbor", "bus", "aircraft", "ferry", "quay")] == [
        "ships", "harbors", "buses", "aircraft", "ferries", "quays"]  # fmt: skip


def test_the_example_of_another_domain(tmp_path):
    pytest.importorskip("skimage")
    (code,) = re.findall(r"```python\n([^`]*skimage[^`]*)```", (Path(__file__).parent.parent / "docs" / "data.md").read_text())
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, check=True)
    rows = made(tmp_path / "ihc")
    count = Counter(row["split"] for row in rows)
    assert count["train"] > 3000 and count["val"] > 100 and count["test"] > 100
    assert {"cell", "gland"} <= {row["category"] for row in rows}
