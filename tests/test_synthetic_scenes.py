"""Scenes: layout on disk, determinism, and every phrase checked against the geometry by rules of this file's own."""

import json
import math
import pickle
from collections import Counter
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from annotations import predicates
from runtime.errors import UserError
from synthetic_scenes import __main__ as command
from synthetic_scenes import objects as words
from synthetic_scenes import phrases, scenes

NAMES = ("airplane", "baseball field", "harbor", "ship", "stadium", "storage tank", "tennis court", "vehicle")
IDS = dict(zip((name.replace(" ", "") for name in NAMES), (2, 4, 11, 13, 14, 15, 16, 18)))  # RRSIS-D's
COLOURS = ("red", "blue", "green", "yellow", "white", "gray")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return scenes.make_scenes(tmp_path_factory.mktemp("scenes") / "a", train=3, val=1, test=1, seed=3, progress=False)


def files(root):
    return {p.name: p.read_bytes() for p in root.rglob("*") if p.is_file()}


# A small grammar: article [superlative | adjective] name [place] [[is] relation "the" [adjective] name [place]].
# The rules are crisp, with the border in the middle of the generator's gap, and must select one object alone.

SIZE_WORDS = ("small", "tiny", "large", "big")
MOST = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "bottommost": (1, 1)}
MOST |= {"largest": (2, 1), "biggest": (2, 1), "smallest": (2, -1)}
SPOTS = ("left", "right", "top", "bottom", "upper left", "upper right", "lower left", "lower right", "middle", "center")
PLACES = {f"{p} the {s}{e}": s for p in ("on", "at", "in") for s in SPOTS for e in ("", " side")}
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "below": (0, 1), "above": (0, -1), "lower right": (1, 1),
              "lower left": (-1, 1), "upper left": (-1, -1), "upper right": (1, -1)}  # fmt: skip
RELATIONS = {f"{p} the {d} of": d for p in ("on", "to") for d in DIRECTIONS if d not in ("above", "below")}
RELATIONS |= {"above": "above", "below": "below"}


def centre(o):
    """(x, y) of the mask in fractions of the image, y down."""
    ys, xs = np.nonzero(o.mask)
    return (xs.mean() + 0.5) / o.mask.shape[1], (ys.mean() + 0.5) / o.mask.shape[0]


def take(text, choices):
    """The longest of choices that text starts with (or "") and the rest of the text."""
    for c in sorted(choices, key=len, reverse=True):
        if text == c or text.startswith(c + " "):
            return c, text[len(c) :].strip()
    return "", text


def at(o, spot):
    x, y = centre(o)
    if spot in ("middle", "center"):
        return max(abs(x - 0.5), abs(y - 0.5)) < 0.17
    tests = {"left": x < 0.445, "right": x > 0.555, "top": y < 0.445, "bottom": y > 0.555}
    tests |= {"upper": tests["top"], "lower": tests["bottom"]}
    return all(tests[w] for w in spot.split())


def towards(o, anchor, direction):
    (x, y), (ax, ay), (dx, dy) = centre(o), centre(anchor), DIRECTIONS[direction]
    cosine = ((x - ax) * dx + (y - ay) * dy) / math.hypot(x - ax, y - ay) / math.hypot(dx, dy)
    return cosine > math.cos(math.radians(31 if dx and dy else 42))


def large(o, objects):
    """Large or small from the areas alone: the object against the mean of its category's extremes."""
    areas = [p.mask.sum() for p in objects if p.category == o.category]
    return o.mask.sum() > math.sqrt(min(areas) * max(areas))


def parse_noun(text):
    most, text = take(text, MOST)
    adjective, text = take(text, COLOURS + SIZE_WORDS)
    name, text = take(text, NAMES)
    assert name, text
    place, text = take(text, PLACES) if not take(text, RELATIONS)[0] else ("", text)  # "on the left of" is no place
    return most, adjective, name.replace(" ", ""), PLACES.get(place), text


def select(objects, most, adjective, category, place):
    found = [o for o in objects if o.category == category]
    if most:
        axis, sign = MOST[most]
        return [max(found, key=lambda o: sign * (*centre(o), o.mask.sum())[axis])]
    if adjective in COLOURS:
        found = [o for o in found if o.colour == adjective]
    elif adjective:
        found = [o for o in found if large(o, objects) == (adjective in ("large", "big"))]
    return [o for o in found if at(o, place)] if place else found


def answer(phrase, objects):
    """Objects that the phrase fits, and its kind, by this file's rules."""
    article, text = phrase.split(" ", 1)
    assert article in ("The", "A", "An") and (article != "An" or text[0] in "aeiou")
    most, adjective, category, place, text = parse_noun(text)
    found = select(objects, most, adjective, category, place)
    if text:
        relation, text = take(text.removeprefix("is "), RELATIONS)
        assert relation and text.startswith("the "), phrase
        *anchor, text = parse_noun(text.removeprefix("the "))
        anchors = select(objects, *anchor)
        assert len(anchors) == 1 and not text, phrase
        return [o for o in found if towards(o, anchors[0], RELATIONS[relation])], "relation"
    if adjective and place:
        return found, "colour+position"
    kind = "superlative" if most else "position" if place else "colour" if adjective in COLOURS else "size"
    return found, kind if most or place or adjective else "category"


def test_objects_are_apart_and_every_phrase_has_one_right_answer():
    seen, several = Counter(), []
    for s in (scenes.scene(5, split, i) for split in ("train", "val", "test") for i in range(30)):
        counts = Counter(o.category for o in s.objects)
        for i, phrase, kind in s.phrases:
            found, parsed = answer(phrase, s.objects)
            assert len(found) == 1 and found[0] is s.objects[i] and parsed == kind, phrase
            assert (counts[s.objects[i].category] == 1) == (kind == "category")
            seen[kind] += 1
        several += [counts[s.objects[i].category] > 1 for i in {p[0] for p in s.phrases}]
        assert s.phrases and s.image.shape == (128, 128, 3) and s.image.dtype == np.uint8 and 5 <= len(s.objects) <= 8
        union = np.zeros((128, 128), np.uint8)
        for o in s.objects:
            assert o.mask.dtype == bool and o.mask.sum() >= 100 and np.allclose(o.centre, centre(o))
            ys, xs = np.nonzero(o.mask)
            assert min(ys.min(), xs.min()) >= 2 and max(ys.max(), xs.max()) <= 125
            assert not (cv2.dilate(o.mask.astype(np.uint8), np.ones((5, 5), np.uint8)) & union).any()
            union |= o.mask
            if o.colour not in ("white", "gray"):  # the named colour is the most frequent one on the body
                pixels, palette = s.image[o.mask].astype(float), np.array([words.COLOURS[c] for c in COLOURS[:4]])
                chroma = [p / np.linalg.norm(p, axis=1, keepdims=True) for p in (pixels, palette)]
                assert Counter((chroma[0] @ chroma[1].T).argmax(1)).most_common(1)[0][0] == COLOURS.index(o.colour)
    assert set(seen) == set(phrases.KINDS) and np.mean(several) > 0.7
    assert all(0.04 < n / seen.total() < 0.35 for n in seen.values()), seen
    s = scenes.scene(0, "train", 0, 96)
    assert s.image.shape == (96, 96, 3) and all(o.mask.shape == (96, 96) for o in s.objects)


def test_layout(written):
    refs = pickle.loads((written / "rrsisd" / "refs(unc).p").read_bytes())
    data = json.loads((written / "rrsisd" / "instances.json").read_text())
    assert set(data) == {"info", "licenses", "images", "annotations", "categories"}
    assert {c["name"]: c["id"] for c in data["categories"]} == IDS
    images, annotations = {i["id"]: i for i in data["images"]}, {a["id"]: a for a in data["annotations"]}
    assert [i["file_name"] for i in data["images"]] == [f"{n:05d}.jpg" for n in range(5)]
    splits = [("train", 0), ("train", 1), ("train", 2), ("val", 0), ("test", 0)]
    drawn, sentences = [scenes.scene(3, *split) for split in splits], [[] for _ in splits]
    for ref in refs:
        assert set(ref) == {"image_id", "split", "sentences", "file_name", "category_id", "ann_id", "sent_ids", "ref_id"}
        s = drawn[ref["image_id"]]
        assert ref["split"] == splits[ref["image_id"]][0] and ref["file_name"] == images[ref["image_id"]]["file_name"]
        annotation = annotations[ref["ann_id"]]
        assert annotation["image_id"] == ref["image_id"] and annotation["categories_id"] == ref["category_id"]
        (mask,) = (coco_mask.decode(rle).astype(bool) for rle in annotation["segmentation"])
        (own,) = [i for i, o in enumerate(s.objects) if (o.mask == mask).all()]
        assert ref["category_id"] == IDS[s.objects[own].category] and annotation["area"] == mask.sum()
        ys, xs = np.nonzero(mask)
        assert annotation["bbox"] == [xs.min(), ys.min(), xs.max(), ys.max()]
        assert ref["sent_ids"] == [t["sent_id"] for t in ref["sentences"]]
        for t in ref["sentences"]:
            assert set(t) == {"tokens", "raw", "sent_id", "sent", "kind"}
            assert t["sent"] == t["raw"].lower() and t["tokens"] == t["sent"].split()
            sentences[ref["image_id"]].append((own, t["raw"], t["kind"]))
        picture = cv2.imread(str(written / "images" / "rrsisd" / "JPEGImages" / ref["file_name"]))[..., ::-1]
        assert np.abs(picture.astype(int) - s.image).mean() < 4
    assert [sorted(said) for said in sentences] == [sorted(s.phrases) for s in drawn]
    for ids in ([r["ref_id"] for r in refs], [i for r in refs for i in r["sent_ids"]]):
        assert len(set(ids)) == len(ids)


def test_deterministic(written, tmp_path):
    command.main(["--out", str(tmp_path / "b"), "--train", "3", "--val", "1", "--test", "1", "--seed", "3"])
    assert files(tmp_path / "b") == (first := files(written)) and len(first) == 7
    fewer = files(scenes.make_scenes(tmp_path / "c", 2, 0, 1, seed=3, progress=False))  # the counts do not matter
    assert [fewer[f"0000{i}.jpg"] for i in (0, 1, 2)] == [first[f"0000{i}.jpg"] for i in (0, 1, 4)]
    assert files(scenes.make_scenes(tmp_path / "d", 1, 0, 0, seed=4, progress=False))["00000.jpg"] != first["00000.jpg"]
    assert not np.array_equal(scenes.scene(3, "train", 0).image, scenes.scene(3, "val", 0).image)


def test_existing_root_is_refused_and_failure_leaves_nothing(written, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="scenes of 64 pixels can't be drawn: choose a size from 96 to 256"):
        scenes.scene(0, "train", 0, 64)
    before = files(written)
    with pytest.raises(UserError, match="exists already: remove it or choose another folder"):
        command.main(["--out", str(written), "--train", "1"])
    scenes.ensure_scenes(written, train=1)
    assert files(written) == before
    monkeypatch.setattr(scenes, "scene", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"e can't be written \(No space left on device\)") as caught:
        scenes.make_scenes(tmp_path / "e", 1, 0, 0, progress=False)
    assert caught.value.exit_code == 1 and list(tmp_path.iterdir()) == []

    monkeypatch.undo()
    draw = scenes.scene

    def made_meanwhile(*args):
        (tmp_path / "f" / "rrsisd").mkdir(parents=True)  # by a training that was started together with this one
        return draw(*args)

    monkeypatch.setattr(scenes, "scene", made_meanwhile)
    scenes.ensure_scenes(tmp_path / "f", train=1, val=0, test=0)


def test_held_out_pairs_are_never_said_in_training(tmp_path):
    root, said = scenes.make_scenes(tmp_path / "held", 30, 10, 0, seed=2, progress=False, hold_out=True), {}
    for ref in pickle.loads((root / "rrsisd" / "refs(unc).p").read_bytes()):
        said.setdefault(ref["split"], []).extend(s["raw"] for s in ref["sentences"])
    counts = {"train": 30, "val": 10}
    whole = {split: [p[1] for i in range(n) for p in scenes.scene(2, split, i).phrases] for split, n in counts.items()}
    held = {split: [p for p in lines if any(pair in p for pair in phrases.HELD_OUT)] for split, lines in whole.items()}
    assert len(phrases.HELD_OUT) == 8 and held["train"] and held["val"] and sorted(said["val"]) == sorted(whole["val"])
    assert sorted(said["train"] + held["train"]) == sorted(whole["train"])


def test_predicates_have_three_outcomes():
    def thing(x, y, side=10):
        return words.Object("ship", "red", "small", (x, y), np.ones((side, side), bool))

    anchor = thing(0.5, 0.5)
    assert [predicates.is_at(thing(x, 0.5), "left") for x in (0.2, 0.45, 0.5)] == [True, None, False]
    assert [predicates.is_at(thing(0.2, y), "upper left") for y in (0.2, 0.45, 0.6)] == [True, None, False]
    assert [predicates.is_towards(thing(*xy), anchor, 0) for xy in ((0.9, 0.5), (0.8, 0.8), (0.5, 0.9))] == [True, None, False]
    assert [predicates.is_most(thing(x, 0.5), [anchor], "leftmost") for x in (0.2, 0.46, 0.6)] == [True, None, False]
    assert [predicates.is_most(thing(0, 0, side), [anchor], "largest") for side in (13, 11, 9)] == [True, None, False]
