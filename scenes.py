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


# Shapes --------------------------------------------------------------------------------------------

def box(x0, y0, x1, y1):
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def oval(x, y, rx, ry, start=0, stop=360, n=40):
    a = np.radians(np.linspace(start, stop, n))
    return np.stack([x + rx * np.cos(a), y + ry * np.sin(a)], 1)


def mirror(*half):
    """Closes half an outline (y >= 0, from front to back) with its mirror image."""
    return np.concatenate([half, np.array(half)[::-1] * (1, -1)])


def spin(polygon, degrees):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return polygon @ np.array([(c, s), (-s, c)])


DARK, PALE = (30, 35, 45), (225, 225, 220)
# What tells a category apart besides its outline, as overhead: glass, clay infields, grass, timber, painted surrounds.
CLAY, GRASS, TIMBER, PURPLE, TEAL, ORANGE = (
    (150, 104, 66), (70, 116, 52), (200, 168, 124), (104, 76, 150), (36, 158, 168), (238, 124, 28))
HULL = mirror((0.5, 0), (0.36, 0.1), (0.2, 0.155), (-0.4, 0.15), (-0.5, 0.1))
CAR = mirror((0.5, 0), (0.49, 0.16), (0.44, 0.235), (0.36, 0.255), (-0.4, 0.255), (-0.48, 0.22), (-0.5, 0))
TIP = np.array([(0.03, 0.3), (-0.08, 0.5), (-0.26, 0.5), (-0.21, 0.3)])
FAN = np.concatenate([[(-0.45, 0)], oval(-0.45, 0, 1, 1, -44, 44)])
# Polygons painted in order, of unit length along x, each with its colour: RGB, or a shade of the object's
# colour (below 1 darker, above 1 towards white), or None for lines that stand out. Their union is the mask.
SHAPES = {
    "airplane": [
        (mirror((0.22, 0), (-0.08, 0.5), (-0.26, 0.5), (-0.15, 0)), 0.88),
        (TIP, ORANGE), (TIP * (1, -1), ORANGE),
        (mirror((-0.26, 0), (-0.38, 0.24), (-0.5, 0.24), (-0.47, 0)), 0.88),
        (mirror((0.5, 0), (0.46, 0.075), (0.36, 0.11), (-0.25, 0.1), (-0.48, 0.04)), 1),
        (mirror((0.44, 0), (0.41, 0.055), (0.36, 0.055), (0.37, 0)), DARK)],
    "baseballfield": [
        (FAN, 0.8), (FAN * 0.93 - (0.01, 0), 1), (FAN * 0.6 - (0.14, 0), CLAY),
        (spin(box(-0.12, -0.12, 0.12, 0.12), 45) - (0.13, 0), 0.92), (oval(-0.13, 0, 0.045, 0.045), CLAY)],
    "harbor": [(box(-0.5, 0.1, 0.5, 0.3), 0.9), (box(-0.46, 0.16, 0.46, 0.24), TIMBER)] + [
        (box(x - w, y, x + w, 0.16), c) for x in (-0.42, 0, 0.42) for w, y, c in ((0.08, -0.3, 1), (0.04, -0.26, TIMBER))],
    "ship": [
        (HULL, 0.72), (HULL * (0.88, 0.75), 1), (box(-0.4, -0.09, -0.27, 0.09), PALE),
        (box(-0.2, -0.09, -0.02, 0.09), TEAL), (box(0.05, -0.08, 0.21, 0.08), TEAL)],
    "stadium": [(oval(0, 0, 0.5, 0.37), 0.75), (oval(0, 0, 0.46, 0.33), 1)] + [
        (spin(box(-0.46, -0.02, 0.46, 0.02), a) * (1, 0.72), 0.6) for a in (0, 45, 90, 135)] + [
        (oval(0, 0, 0.3, 0.2), PALE), (oval(0, 0, 0.27, 0.17), GRASS), (box(-0.012, -0.17, 0.012, 0.17), PALE)],
    "storagetank": [
        (oval(0, 0, 0.5, 0.5), 0.6), (oval(0, 0, 0.45, 0.45), 1), (oval(0, 0, 0.3, 0.3), DARK),
        (oval(0, 0, 0.21, 0.21), 1), (oval(0.03, 0.03, 0.1, 0.1), 1.45)],
    "tenniscourt": [
        (box(-0.5, -0.32, 0.5, 0.32), PURPLE), (box(-0.44, -0.26, 0.44, 0.26), None), (box(-0.41, -0.23, 0.41, 0.23), 1),
        (box(-0.2, -0.015, 0.2, 0.015), None), (box(-0.215, -0.23, -0.185, 0.23), None),
        (box(0.185, -0.23, 0.215, 0.23), None), (box(-0.015, -0.29, 0.015, 0.29), DARK)],
    "vehicle": [
        (CAR, 0.8), (CAR * (0.94, 0.84), 1), (mirror((0.29, 0), (0.27, 0.2), (0.08, 0.18), (0.08, 0)), DARK),
        (box(-0.42, -0.18, -0.27, 0.18), DARK), (box(-0.22, -0.13, 0.04, 0.13), 1.25)],
}


def paint(shape, colour, length, angle, over=4):
    """A shape at a length in pixels and an angle in degrees: RGB (h, w, 3) f32, coverage (h, w) f32 in 0..1."""
    n, body = math.ceil(1.5 * length) + 2, np.array(colour)
    rgb, cover = np.zeros((n * over, n * over, 3), np.float32), np.zeros((n * over, n * over), np.float32)
    for polygon, tone in shape:
        if tone is None:
            tone = PALE if body[1] < 200 and body.std() > 20 else (70, 70, 75)
        elif not isinstance(tone, tuple):
            tone = body * tone if tone <= 1 else 255 - (255 - body) * (2 - tone)
        points = [np.round((spin(polygon, angle) * length + n / 2) * over).astype(np.int32)]
        cv2.fillPoly(rgb, points, tuple(float(t) for t in tone))
        cv2.fillPoly(cover, points, 1.0)
    rgb, cover = (cv2.resize(a, (n, n), interpolation=cv2.INTER_AREA) for a in (rgb, cover))
    rows, cols = np.flatnonzero(cover.max(1)), np.flatnonzero(cover.max(0))
    crop = np.s_[rows[0]:rows[-1] + 1, cols[0]:cols[-1] + 1]
    return rgb[crop] / np.maximum(cover[crop], 1e-6)[..., None], cover[crop]


# Ground --------------------------------------------------------------------------------------------

GROUNDS = {"grass": ((66, 92, 50), (94, 112, 62)), "soil": ((112, 86, 64), (142, 112, 82)),  # two tones, blended
           "sand": ((176, 156, 120), (200, 182, 146)), "urban": ((84, 82, 82), (104, 99, 95))}


def noise(rng, size, cells):
    """Smooth noise (size, size) f32 of about unit variance, with features of size / cells pixels."""
    coarse = rng.standard_normal((cells, cells), dtype=np.float32)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def ground(rng, size, clutter, wet):
    """Ground, roads, and trees by clutter in 0..1: (size, size, 3) f32 in 0..255; where water is: (size, size) bool."""
    y, x = (np.mgrid[:size, :size].astype(np.float32) + 0.5) / size - 0.5
    a = rng.uniform(0, 2 * np.pi)
    u, v = x * np.cos(a) + y * np.sin(a), y * np.cos(a) - x * np.sin(a)
    broad, kind = noise(rng, size, 4), rng.choice([*GROUNDS, "fields"])
    if kind == "fields":  # a patchwork of crops with furrows
        tones = np.array([*GROUNDS["grass"], *GROUNDS["soil"], (118, 116, 68)], np.float32)
        row = np.floor(u / rng.uniform(0.22, 0.4)).astype(int)
        patch = row % 7 * 7 + np.floor(v / rng.uniform(0.22, 0.4) + row * 0.37).astype(int) % 7
        image = (tones[rng.integers(5, size=49)] * rng.uniform(0.9, 1.1, (49, 1)))[patch]
        image = image * (1 + 0.05 * np.sin(u * rng.uniform(120, 200)))[..., None]
    else:
        low, high = np.array(GROUNDS[kind], np.float32)
        image = low + (high - low) / (1 + np.exp(-1.5 * broad))[..., None]

    (cx, cy), (rx, ry), shift = rng.uniform(-0.3, 0.3, 2), rng.uniform(0.25, 0.45, 2), rng.uniform(-0.2, 0.2)
    depth = (rng.uniform(0.12, 0.19) - np.abs(u + shift + 0.08 * np.sin(v * 7 + 30 * shift)),  # a river,
             0.35 * (1 - np.hypot((u - cx) / rx, (v - cy) / ry)),                              # a lake,
             u + shift)[rng.integers(3)]                                                       # a coast, or none
    depth = depth + 0.02 * broad + 0.006 * noise(rng, size, 12) - 2 * (rng.random() > (0.85 if wet else 0.25))
    water, shore = depth > 0, (np.abs(depth + 0.008) < 0.012)[..., None]
    sea = np.array((38, 70, 88)) + (14 * np.clip(1 - depth * 6, 0, 1) + 3 * noise(rng, size, 10))[..., None]
    image = np.where(shore, image * 0.5 + 92, np.where(water[..., None], sea, image))
    texture = 0.5 * noise(rng, size, 8) + 0.6 * noise(rng, size, size // 4) + 0.6 * noise(rng, size, size)
    image = image * (1 + (0.03 + 0.04 * clutter) * np.where(water, 0.4, 1) * texture)[..., None]
    image = np.ascontiguousarray(image, np.float32)

    def pixel(p):
        return tuple(int(c) for c in np.round((p + 0.5) * size))
    for _ in range(rng.choice(3, p=(0.45, 0.4, 0.15))):  # roads; across water they are bridges
        a, start, width = rng.uniform(0, np.pi), rng.uniform(-0.35, 0.35, 2), rng.uniform(0.05, 0.075) * size
        along = np.array((np.cos(a), np.sin(a)))
        for tone, extra in (((116, 112, 106), 2), ((78, 77, 79), 0)):
            cv2.line(image, pixel(start - 2 * along), pixel(start + 2 * along), tone, round(width + extra), cv2.LINE_AA)
        for t in np.arange(-1.5, 1.5, 0.09):
            cv2.line(image, pixel(start + t * along), pixel(start + (t + 0.04) * along), (150, 148, 140), 1)
    for _ in range(int(clutter * 45)):  # trees, each with its shadow and a lit side
        p, r, tone = rng.uniform(-0.49, 0.49, 2), rng.uniform(0.012, 0.028), rng.uniform(0.8, 1.2)
        if not water[pixel(p)[::-1]]:
            for shift, part, c in ((0.008, 1, (30, 36, 26)), (0, 1, (36, 60, 30)), (-0.3 * r, 0.5, (56, 84, 44))):
                cv2.circle(image, pixel(p + shift), round(part * r * size), tuple(tone * t for t in c), -1)
    return image, water


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
        # What is tall leans in the scene's one direction of view, and so does the gloss of the tanks.
        angle = lean + rng.normal() * 6 if category in ("chimney", "storagetank") else rng.uniform(0, 360)
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
