"""Scenes: layout on disk, determinism, and every phrase checked against the geometry by rules of this file's own."""

import json
import math
import pickle
from collections import Counter

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from runtime.errors import UserError
from synthetic_scenes import __main__ as command
from synthetic_scenes import objects as words
from synthetic_scenes import phrases, scenes
from synthetic_scenes.phrases import HELD_OUT

NAMES = {"airplane": "airplane", "baseball field": "baseballfield", "harbor": "harbor",
         "ship": "ship", "stadium": "stadium", "storage tank": "storagetank", "tennis court": "tenniscourt",
         "vehicle": "vehicle"}
IDS = {"airplane": 2, "baseballfield": 4, "harbor": 11, "ship": 13, "stadium": 14, "storagetank": 15,
       "tenniscourt": 16, "vehicle": 18}
COLOURS = ("red", "blue", "green", "yellow", "white", "gray")


@pytest.fixture(scope="module")
def many():
    return [scenes.scene(5, split, i) for split in ("train", "val", "test") for i in range(50)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return scenes.make_scenes(tmp_path_factory.mktemp("scenes") / "a", train=4, val=2, test=2, seed=3, progress=False)


def files(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def centre(o):
    """(x, y) of the mask in fractions of the image, y down."""
    ys, xs = np.nonzero(o.mask)
    return (xs.mean() + 0.5) / o.mask.shape[1], (ys.mean() + 0.5) / o.mask.shape[0]


# A small grammar: article [superlative | adjective] name [place] [[is] relation "the" [adjective] name [place]].
# The rules are crisp, with the border in the middle of the generator's gap, and must select one object alone.

def take(text, choices):
    """The longest of choices that text starts with (or "") and the rest of the text."""
    for c in sorted(choices, key=len, reverse=True):
        if text == c or text.startswith(c + " "):
            return c, text[len(c):].strip()
    return "", text


SIZE_WORDS = {"small": "small", "tiny": "small", "large": "large", "big": "large"}
MOST = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "bottommost": (1, 1),
        "largest": (2, 1), "biggest": (2, 1), "smallest": (2, -1)}
SPOTS = ("left", "right", "top", "bottom", "upper left", "upper right", "lower left", "lower right", "middle", "center")
PLACES = {f"{p} the {s}{e}": s for p in ("on", "at", "in") for s in SPOTS for e in ("", " side")}
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "below": (0, 1), "above": (0, -1), "lower right": (1, 1),
              "lower left": (-1, 1), "upper left": (-1, -1), "upper right": (1, -1)}
RELATIONS = {"above": "above", "below": "below",
             **{f"{p} the {d} of": d for p in ("on", "to") for d in DIRECTIONS if d not in ("above", "below")}}


def at(o, spot):
    x, y = centre(o)
    if spot in ("middle", "center"):
        return max(abs(x - 0.5), abs(y - 0.5)) < 0.17
    tests = {"left": x < 0.445, "right": x > 0.555, "top": y < 0.445, "bottom": y > 0.555,
             "upper": y < 0.445, "lower": y > 0.555}
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
    adjective, text = take(text, COLOURS + tuple(SIZE_WORDS))
    name, text = take(text, NAMES)
    assert name, text
    relation, _ = take(text, RELATIONS)                    # "on the left of" is no place
    place, text = take(text, PLACES) if not relation else ("", text)
    return most, adjective, NAMES[name], PLACES.get(place), text


def select(objects, most, adjective, category, place):
    found = [o for o in objects if o.category == category]
    if most:
        axis, sign = MOST[most]
        return [max(found, key=lambda o: sign * (*centre(o), o.mask.sum())[axis])]
    if adjective in COLOURS:
        found = [o for o in found if o.colour == adjective]
    elif adjective:
        found = [o for o in found if large(o, objects) == (SIZE_WORDS[adjective] == "large")]
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


def test_every_phrase_has_one_right_answer(many):
    seen = Counter()
    for s in many:
        assert s.phrases
        for i, phrase, kind in s.phrases:
            found, parsed = answer(phrase, s.objects)
            assert len(found) == 1 and found[0] is s.objects[i], phrase
            assert parsed == kind, phrase
            seen[kind] += 1
    assert set(seen) == set(phrases.KINDS)
    assert all(0.04 < n / seen.total() < 0.35 for n in seen.values()), seen


def test_category_alone_only_for_a_sole_object(many):
    several = []
    for s in many:
        counts = Counter(o.category for o in s.objects)
        for i, _, kind in s.phrases:
            assert (counts[s.objects[i].category] == 1) == (kind == "category")
        several += [counts[s.objects[i].category] > 1 for i in {p[0] for p in s.phrases}]
    assert np.mean(several) > 0.7


def test_objects_are_apart_inside_and_coloured_as_named(many):
    for s in many:
        assert s.image.shape == (128, 128, 3) and s.image.dtype == np.uint8 and 5 <= len(s.objects) <= 8
        union = np.zeros((128, 128), np.uint8)
        for o in s.objects:
            assert o.mask.dtype == bool and o.mask.sum() >= 100 and np.allclose(o.centre, centre(o))
            ys, xs = np.nonzero(o.mask)
            assert min(ys.min(), xs.min()) >= 2 and max(ys.max(), xs.max()) <= 125
            assert not (cv2.dilate(o.mask.astype(np.uint8), np.ones((5, 5), np.uint8)) & union).any()
            union |= o.mask
            pixels = s.image[o.mask].astype(float)        # the named colour is the most frequent one on the body
            palette = np.array([words.COLOURS[c] for c in COLOURS])
            chroma = [p / np.linalg.norm(p, axis=1, keepdims=True) for p in (pixels, palette)]
            if o.colour not in ("white", "gray"):
                assert Counter((chroma[0] @ chroma[1][:4].T).argmax(1)).most_common(1)[0][0] == COLOURS.index(o.colour)


def test_other_sizes():
    for size in (96, 200):
        s = scenes.scene(0, "train", 0, size)
        assert s.image.shape == (size, size, 3) and all(o.mask.shape == (size, size) for o in s.objects)
    with pytest.raises(UserError, match="scenes of 64 pixels can't be drawn: choose a size from 96 to 256"):
        scenes.scene(0, "train", 0, 64)


def test_layout(written):
    refs = pickle.loads((written / "rrsisd" / "refs(unc).p").read_bytes())
    data = json.loads((written / "rrsisd" / "instances.json").read_text())
    assert set(data) == {"info", "licenses", "images", "annotations", "categories"}
    assert {c["name"]: c["id"] for c in data["categories"]} == IDS
    images, annotations = {i["id"]: i for i in data["images"]}, {a["id"]: a for a in data["annotations"]}
    assert [i["file_name"] for i in data["images"]] == [f"{n:05d}.jpg" for n in range(8)]
    splits = {n: ("train", n) if n < 4 else ("val", n - 4) if n < 6 else ("test", n - 6) for n in range(8)}
    sentences = {n: [] for n in range(8)}
    for ref in refs:
        assert set(ref) == {"image_id", "split", "sentences", "file_name", "category_id", "ann_id", "sent_ids", "ref_id"}
        split, index = splits[ref["image_id"]]
        s = scenes.scene(3, split, index)
        assert ref["split"] == split and ref["file_name"] == images[ref["image_id"]]["file_name"]
        annotation = annotations[ref["ann_id"]]
        assert annotation["image_id"] == ref["image_id"] and annotation["categories_id"] == ref["category_id"]
        assert isinstance(annotation["segmentation"], list) and len(annotation["segmentation"]) == 1
        mask = coco_mask.decode(annotation["segmentation"][0]).astype(bool)
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
    for n, (split, index) in splits.items():
        assert sorted(sentences[n]) == sorted(scenes.scene(3, split, index).phrases)
    assert len({r["ref_id"] for r in refs}) == len(refs)
    sent_ids = [i for r in refs for i in r["sent_ids"]]
    assert len(set(sent_ids)) == len(sent_ids)


def test_deterministic(written, tmp_path):
    command.main(["--out", str(tmp_path / "b"), "--train", "4", "--val", "2", "--test", "2", "--seed", "3"])
    assert files(tmp_path / "b") == files(written)
    more = files(scenes.make_scenes(tmp_path / "c", 5, 0, 1, seed=3, progress=False))
    folder = "images/rrsisd/JPEGImages/"
    for ours, theirs in (("00000", "00000"), ("00003", "00003"), ("00005", "00006")):  # the counts do not matter
        assert more[f"{folder}{ours}.jpg"] == files(written)[f"{folder}{theirs}.jpg"]
    other = files(scenes.make_scenes(tmp_path / "d", 1, 0, 0, seed=4, progress=False))
    assert other[f"{folder}00000.jpg"] != files(written)[f"{folder}00000.jpg"]
    assert not np.array_equal(scenes.scene(3, "train", 0).image, scenes.scene(3, "val", 0).image)


def test_existing_root_is_refused_and_failure_leaves_nothing(written, tmp_path, monkeypatch):
    before = files(written)
    with pytest.raises(UserError, match="exists already: remove it or choose another folder"):
        command.main(["--out", str(written), "--train", "1"])
    scenes.ensure_scenes(written, train=1)
    assert files(written) == before

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scenes, "scene", fail)
    with pytest.raises(UserError, match=r"e can't be written \(No space left on device\)") as caught:
        scenes.make_scenes(tmp_path / "e", 1, 0, 0, progress=False)
    assert caught.value.exit_code == 1 and list(tmp_path.iterdir()) == []


def test_held_out_pairs_are_never_said_in_training(tmp_path):
    said = {}
    for name in ("all", "held"):
        root = scenes.make_scenes(tmp_path / name, 40, 20, 0, seed=2, progress=False, hold_out=name == "held")
        for ref in pickle.loads((root / "rrsisd" / "refs(unc).p").read_bytes()):
            said.setdefault((name, ref["split"]), []).extend(s["raw"] for s in ref["sentences"])

    def held(phrases):
        return [p for p in phrases if any(pair in p for pair in HELD_OUT)]

    assert len(HELD_OUT) == 8 and held(said["all", "train"]) and held(said["all", "val"])
    assert said["held", "val"] == said["all", "val"] and not held(said["held", "train"])
    assert sorted(said["held", "train"] + held(said["all", "train"])) == sorted(said["all", "train"])


def test_predicates_have_three_outcomes():
    def thing(x, y, side=10):
        mask = np.zeros((100, 100), bool)
        mask[:side, :side] = True
        return words.Object("ship", "red", "small", (x, y), mask)

    anchor = thing(0.5, 0.5)
    assert [words.is_at(thing(x, 0.5), "left") for x in (0.2, 0.45, 0.5)] == [True, None, False]
    assert [words.is_at(thing(0.2, y), "upper left") for y in (0.2, 0.45, 0.6)] == [True, None, False]
    assert [words.is_towards(thing(*xy), anchor, 0) for xy in ((0.9, 0.5), (0.8, 0.8), (0.5, 0.9))] == [True, None, False]
    assert [words.is_most(thing(x, 0.5), [anchor], "leftmost") for x in (0.2, 0.46, 0.6)] == [True, None, False]
    assert [words.is_most(thing(0, 0, side), [anchor], "largest") for side in (13, 11, 9)] == [True, None, False]
