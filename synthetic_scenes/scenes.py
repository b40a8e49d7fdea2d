"""Generated overhead scenes with referring phrases, written to disk in RRSIS-D's own layout.

    python scenes.py --out data/scenes --train 8000 --val 300 --test 300

Every phrase has exactly one right answer by construction. A word such as "left", "large" or "above" is a predicate
with three outcomes (True, False, or None for unclear); a phrase is used only if it is clearly true of the object it
refers to and clearly false of all others of its category. Language is needed, too: of several objects of a category,
none is ever called by the category alone. One addition to RRSIS-D's format: each sentence carries 'kind', of KINDS.
"""
import argparse
import json
import math
import pickle
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

from synthetic_scenes.drawing import SHAPES, ground, paint

# RRSIS-D's name -> RRSIS-D's id, name in a phrase, medium length and height in pixels of a 128-pixel image.
CATEGORIES = {
    "airplane": (2, "airplane", 33, 2.0), "baseballfield": (4, "baseball field", 25, 0.0),
    "harbor": (11, "harbor", 36, 1.0), "ship": (13, "ship", 33, 1.5), "stadium": (14, "stadium", 33, 3.5),
    "storagetank": (15, "storage tank", 22, 3.5), "tenniscourt": (16, "tennis court", 31, 0.0),
    "vehicle": (18, "vehicle", 25, 1.5),
}
COLOURS = {"red": (204, 36, 40), "blue": (36, 84, 214), "green": (24, 172, 84), "yellow": (242, 212, 36),
           "white": (242, 242, 240), "gray": (148, 150, 155)}
# Factors on a category's medium length: the smallest large one is 1.5 times the largest small one.
SIZES = {"small": (0.82, 0.9), "medium": (1.06, 1.16), "large": (1.35, 1.48)}
# Kind of phrase -> its weight when a scene's next phrase is drawn among the kinds available there. Colour
# with position, and size, are available less often than the others: their weights exceed the shares wanted.
KINDS = {"category": 0.05, "colour": 0.15, "size": 0.20, "position": 0.22, "colour+position": 0.34, "relation": 0.15,
         "superlative": 0.05}
PLACES = {"left": ("on the left", "on the left side"), "right": ("on the right", "on the right side"),
          "middle": ("in the middle", "in the center")}
PLACES |= {p: (f"on the {p}", f"at the {p}") for p in (
    "top", "bottom", "upper left", "upper right", "lower left", "lower right")}
# Direction in degrees from the object named second (x to the right, y down) -> wordings.
RELATIONS = {0: ("on the right of", "to the right of"), 180: ("on the left of", "to the left of"), 90: ("below",),
             270: ("above",), 45: ("on the lower right of",), 135: ("on the lower left of",),
             225: ("on the upper left of",), 315: ("on the upper right of",)}
SUPERLATIVES = ("leftmost", "rightmost", "topmost", "bottommost", "largest", "smallest")
SYNONYMS = {"small": ("small", "tiny"), "large": ("large", "big"), "largest": ("largest", "biggest")}
SPLITS = {"train": 0, "val": 1, "test": 2}
# One pair of colour and category each: with hold_out, no phrase of the training split says it.
HELD_OUT = tuple(f"{colour} {name}" for (_, name, *_), colour in zip(CATEGORIES.values(), [*COLOURS] * 2))


@dataclass
class Object:
    category: str        # a key of CATEGORIES
    colour: str          # a key of COLOURS
    size: str            # a key of SIZES
    centre: tuple        # (x, y), the mask's centroid in fractions of the image
    mask: np.ndarray     # (H, W) bool, the body without its shadow


@dataclass
class Scene:
    image: np.ndarray    # (H, W, 3) uint8 RGB
    objects: list        # of Object
    phrases: list        # of (index into objects, phrase, kind)


# Words: predicates with three outcomes, True, False and None (unclear) -----------------------------

def clearly(value, yes, no):
    """True from yes on, away from no; False from no on, away from yes; None between the two."""
    sign = 1 if yes > no else -1
    return True if sign * value >= sign * yes else False if sign * value <= sign * no else None


def is_at(o, place):
    x, y = o.centre
    if place == "middle":
        return clearly(max(abs(x - 0.5), abs(y - 0.5)), 0.12, 0.22)
    if " " in place:
        vertical, side = place.split()
        parts = is_at(o, "top" if vertical == "upper" else "bottom"), is_at(o, side)
        return False if False in parts else None if None in parts else True
    value = x if place in ("left", "right") else y
    return clearly(value, 0.39, 0.5) if place in ("left", "top") else clearly(value, 0.61, 0.5)


def is_towards(o, anchor, direction):
    bearing = math.degrees(math.atan2(o.centre[1] - anchor.centre[1], o.centre[0] - anchor.centre[0]))
    off = abs((bearing - direction + 180) % 360 - 180)
    # "On the right of" is loosely said of the lower right, too: the four axes have a wide unclear zone.
    return clearly(off, 22, 62) if direction % 90 == 0 else clearly(off, 20, 42)


def is_most(o, others, superlative):
    """Whether o comes first, by 8 % of the image or a factor of 1.5 in area; False where another one is before it."""
    if superlative in ("largest", "smallest"):
        first, *rest = (math.log(p.mask.sum()) / math.log(1.5) for p in (o, *others))
    else:
        first, *rest = (p.centre[superlative in ("topmost", "bottommost")] / 0.08 for p in (o, *others))
    sign = 1 if superlative in ("largest", "rightmost", "bottommost") else -1
    return clearly(min(sign * (first - r) for r in rest), 1, 0)


def descriptions(me, others):
    """All (kind, adjective, place) that pick out the object me from the others of its category."""
    def alone(holds):
        return holds(me) is True and all(holds(o) is False for o in others)
    if not others:
        return [("category", "", "")]
    found = [("size", me.size, "")] if alone(lambda o: None if o.size == "medium" else o.size == me.size) else []
    unique_colour = alone(lambda o: o.colour == me.colour)
    found += [("colour", me.colour, "")] if unique_colour else []
    for place in PLACES:
        if alone(lambda o, place=place: is_at(o, place)):
            found.append(("position", "", place))
        elif not unique_colour and alone(lambda o, place=place: o.colour == me.colour and is_at(o, place)):
            found.append(("colour+position", me.colour, place))  # neither would do without the other
    return found


def pick(rng, items):
    return items[rng.integers(len(items))]


def noun(rng, o, adjective="", place=""):
    """For example "red storage tank on the left"."""
    adjective, place = pick(rng, SYNONYMS.get(adjective, (adjective,))), pick(rng, PLACES.get(place, (place,)))
    return f"{adjective} {CATEGORIES[o.category][1]} {place}".strip()


def phrases(rng, objects, count):
    """Up to count (index, phrase, kind), at most one of a kind for an object; kinds are drawn by KINDS' weights."""
    others = [[o for o in objects if o.category == me.category and o is not me] for me in objects]
    named, options, chosen = [descriptions(*pair) for pair in zip(objects, others)], {}, []
    for i, me in enumerate(objects):
        ways = named[i] + [("superlative", s, "") for s in SUPERLATIVES if others[i] and is_most(me, others[i], s)]
        for j, a in enumerate(objects):
            if others[i] and named[j] and a.category != me.category:  # an anchor must have a name of its own
                ways += [("relation", d, j) for d in RELATIONS
                         if is_towards(me, a, d) and all(is_towards(o, a, d) is False for o in others[i])]
        for kind, *rest in ways:
            options.setdefault((kind, i), []).append(rest)
    while options and len(chosen) < count:
        kinds = [k for k in KINDS if any(k == o[0] for o in options)]
        weights = np.array([KINDS[k] for k in kinds])
        kind = kinds[rng.choice(len(kinds), p=weights / weights.sum())]
        i = pick(rng, [o[1] for o in options if o[0] == kind])
        a, b = pick(rng, options.pop((kind, i)))
        if kind == "relation":
            anchor = noun(rng, objects[b], *pick(rng, named[b])[1:])
            a, b = "", f"{pick(rng, ('is ', 'is ', ''))}{pick(rng, RELATIONS[a])} the {anchor}"
        text = noun(rng, objects[i], a, b)
        indefinite = kind != "superlative" and rng.random() < 0.4
        chosen.append((i, f"{('An' if text[0] in 'aeiou' else 'A') if indefinite else 'The'} {text}", kind))
    return chosen


# Scenes --------------------------------------------------------------------------------------------

def place_objects(rng, categories, water):
    """Draws objects and places them apart, without those that find no room: [(Object, rgb, coverage, top, left)]."""
    size, placed = len(water), []
    lean, gap = rng.uniform(0, 360), round(2.5 * size / 128)
    palette = {c: rng.permutation(list(COLOURS))[:rng.integers(2, 4)] for c in dict.fromkeys(categories)}
    taken = np.zeros((size, size), np.uint8)
    for category in sorted(categories, key=lambda c: -CATEGORIES[c][2]):  # the largest find room first
        kind, colour = str(rng.choice([*SIZES], p=(0.35, 0.25, 0.4))), str(pick(rng, palette[category]))
        length = CATEGORIES[category][2] * rng.uniform(*SIZES[kind]) * size / 128
        # The gloss of the tanks lies on one side in all of a scene.
        angle = lean + rng.normal() * 6 if category == "storagetank" else rng.uniform(0, 360)
        rgb, cover = paint(SHAPES[category], COLOURS[colour], length, angle)
        h, w = cover.shape
        body = cover >= 0.5
        for trial in range(80):
            top, left = int(rng.integers(gap, size - gap - h + 1)), int(rng.integers(gap, size - gap - w + 1))
            spot = np.s_[top:top + h, left:left + w]
            # Ships and harbors go to water and the others to land, as long as there is such room.
            astray = (water[spot][body] != (category in ("ship", "harbor"))).mean() > 0.1
            if (astray and trial < 60) or taken[spot][body].any():
                continue
            mask = np.zeros((size, size), bool)
            mask[spot] = body
            taken |= cv2.dilate(mask.astype(np.uint8), np.ones((2 * gap + 1, 2 * gap + 1), np.uint8))
            centre = tuple(float(axis.mean() + 0.5) / size for axis in np.nonzero(mask)[::-1])
            placed.append((Object(category, colour, kind, centre, mask), rgb, cover, top, left))
            break
    return placed


def scene(seed, split, index, size=128):
    """Scene number index of a split ('train', 'val', 'test'), size x size pixels; the same arguments, the same scene."""
    if split not in SPLITS:
        raise ValueError(f"The split must be one of {', '.join(SPLITS)}, not {split!r}.")
    if not 96 <= size <= 256:
        raise ValueError(f"The size must be from 96 to 256 pixels, not {size}.")
    rng = np.random.default_rng([seed, SPLITS[split], index])
    # By difficulty: one category 2, then up to 3, then 3 or 4 times; mostly a second one 2 or 3 times, others once.
    difficulty = int(rng.integers(3))
    total, main = 5 + difficulty + int(rng.integers(2)), int(rng.integers(2 + difficulty // 2, 3 + difficulty))
    second = min(2 + int(rng.random() < 0.25), total - main - 1) if rng.random() < 0.85 else 1
    names = [str(n) for n in rng.permutation(list(CATEGORIES))]
    categories = [names[0]] * main + [names[1]] * second + names[2:2 + total - main - second]
    image, water = ground(rng, size, (difficulty + rng.random()) / 3, bool({"ship", "harbor"} & set(categories)))
    placed = []
    while len(placed) < 5:
        placed = place_objects(rng, categories, water)

    sun, dark = rng.uniform(0, 2 * np.pi), np.zeros((size, size), np.float32)
    for o, _, cover, top, left in placed:  # all shadows before all bodies: none falls on a body
        height = CATEGORIES[o.category][3] * size / 128
        for reach in np.linspace(0, height, 1 + math.ceil(height)):
            shift = np.float32([[1, 0, left + reach * np.cos(sun)], [0, 1, top + reach * np.sin(sun)]])
            np.maximum(dark, cv2.warpAffine(cover, shift, (size, size)), out=dark)
    image *= 1 - 0.5 * dark[..., None]
    for _, rgb, cover, top, left in placed:
        spot = image[top:top + cover.shape[0], left:left + cover.shape[1]]
        spot += cover[..., None] * (rgb - spot)
    slope = np.linspace(-0.07, 0.07, size, dtype=np.float32)
    light = rng.uniform(0.92, 1.05) * (1 + rng.uniform(-1, 1) * slope[:, None] + rng.uniform(-1, 1) * slope)
    image = image * light[..., None] + 2.5 * rng.standard_normal(image.shape, dtype=np.float32)
    objects = [p[0] for p in placed]
    return Scene(np.clip(image, 0, 255).astype(np.uint8), objects, phrases(rng, objects, int(rng.integers(4, 7))))


# On disk -------------------------------------------------------------------------------------------

def make_scenes(root, train=8000, val=300, test=300, size=128, seed=0, progress=True, hold_out=False):
    """Writes the scenes of three splits below root in RRSIS-D's layout; returns root as a Path.

    With hold_out, phrases that hold a pair of HELD_OUT are left out of the training split. A ref is one object of
    an image with its one or more phrases; a bbox is x1, y1, x2, y2 with the last pixel's index. The folder appears only
    when all is written; an existing one is refused (FileExistsError).
    """
    root = Path(root)
    if root.exists():
        raise FileExistsError(f"{root} exists already: remove it or choose another folder.")
    jobs = [(split, i) for split, n in zip(SPLITS, (train, val, test)) for i in range(n)]
    refs, images, annotations, sent_id = [], [], [], 0
    quality = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{root.name}.part", dir=root.parent) as scratch:
        part = Path(scratch) / root.name  # below the scratch folder, which only its owner may read
        (part / "rrsisd").mkdir(parents=True)
        (part / "images" / "rrsisd" / "JPEGImages").mkdir(parents=True)
        for image_id, (split, i) in enumerate(tqdm(jobs, desc="scenes", disable=None if progress else True)):
            s, file_name = scene(seed, split, i, size), f"{image_id:05d}.jpg"
            if hold_out and split == "train":
                s.phrases = [p for p in s.phrases if not any(pair in p[1] for pair in HELD_OUT)]
            path = part / "images" / "rrsisd" / "JPEGImages" / file_name
            if not cv2.imwrite(str(path), s.image[..., ::-1], quality):
                raise OSError(f"{path} could not be written.")
            images.append({"file_name": file_name, "height": size, "width": size, "id": image_id})
            for j in sorted({p[0] for p in s.phrases}):
                mask, ref_id = s.objects[j].mask.astype(np.uint8, order="F"), len(refs)
                category = CATEGORIES[s.objects[j].category][0]
                told = [(raw, raw.lower(), kind) for k, raw, kind in s.phrases if k == j]
                sentences = [{"tokens": sent.split(), "raw": raw, "sent_id": sent_id + n, "sent": sent, "kind": kind}
                             for n, (raw, sent, kind) in enumerate(told)]
                refs.append({"image_id": image_id, "split": split, "sentences": sentences, "file_name": file_name,
                             "category_id": category, "ann_id": ref_id, "ref_id": ref_id,
                             "sent_ids": [t["sent_id"] for t in sentences]})
                sent_id += len(told)
                rle, (x, y, w, h) = coco_mask.encode(mask), cv2.boundingRect(mask)
                annotations.append({"segmentation": [{"size": [size, size], "counts": rle["counts"].decode("ascii")}],
                                    "bbox": [x, y, x + w - 1, y + h - 1], "categories_id": category, "iscrowd": 0,
                                    "area": float(mask.sum()), "image_id": image_id, "id": ref_id})
        categories = [{"supercategory": name, "id": c[0], "name": name} for name, c in CATEGORIES.items()]
        instances = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
        (part / "rrsisd" / "instances.json").write_text(json.dumps(instances), encoding="ascii")
        (part / "rrsisd" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
        part.rename(root)
    return root


def main():
    p = argparse.ArgumentParser(description="Writes overhead scenes with referring phrases in RRSIS-D's layout.")
    p.add_argument("--out", required=True, help="folder to create")
    for split, n in zip(SPLITS, (8000, 300, 300)):
        p.add_argument(f"--{split}", type=int, default=n, help=f"number of {split} images (default {n})")
    p.add_argument("--size", type=int, default=128, help="width and height in pixels, 96 to 256 (default 128)")
    p.add_argument("--seed", type=int, default=0, help="the same seed, the same scenes (default 0)")
    p.add_argument("--hold-out", action="store_true", help="no training phrase says " + ", ".join(HELD_OUT))
    a = p.parse_args()
    try:
        print(make_scenes(a.out, a.train, a.val, a.test, a.size, a.seed, hold_out=a.hold_out))
    except (OSError, ValueError) as error:
        print(f"scenes.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
