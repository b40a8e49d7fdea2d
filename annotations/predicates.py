"""When a word applies to an object of an image: "left", "large", "above". Generated scenes and real objects go by the same.

A predicate has three outcomes: True, False, and None for unclear. A phrase is used only where it is clearly true of the
object it refers to and clearly false of all others of its category.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

POSITIONS = (
    "left", "right", "middle", "top", "bottom", "upper left", "upper right", "lower left", "lower right",
)  # fmt: skip
DIRECTIONS = (0, 180, 90, 270, 45, 135, 225, 315)  # degrees, x to the right, y down
SUPERLATIVES = ("leftmost", "rightmost", "topmost", "bottommost", "largest", "smallest")

# How they are said: a position, a direction in degrees from the object named second, a size.
POSITION_WORDS = {
    "left": ("on the left", "on the left side"), "right": ("on the right", "on the right side"),
    "middle": ("in the middle", "in the center"),
}  # fmt: skip
POSITION_WORDS |= {
    p: (f"on the {p}", f"at the {p}")
    for p in ("top", "bottom", "upper left", "upper right", "lower left", "lower right")
}
RELATION_WORDS = {
    0: ("on the right of", "to the right of"), 180: ("on the left of", "to the left of"), 90: ("below",), 270: ("above",),
    45: ("on the lower right of",), 135: ("on the lower left of",), 225: ("on the upper left of",),
    315: ("on the upper right of",),
}  # fmt: skip
SYNONYMS = {"small": ("small", "tiny"), "large": ("large", "big"), "largest": ("largest", "biggest")}


class Located(Protocol):
    """What the predicates ask of an object."""

    centre: tuple[float, float]  # (x, y), the mask's centroid in fractions of the image
    area: float  # pixels of its mask


class Outlined(Protocol):
    """What `gap` and `is_near` ask of an object."""

    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in fractions of the image

    def distance(self, other) -> float:
        """Between the masks' nearest pixels, in fractions of the image; negative where they overlap."""


def pick(rng: np.random.Generator, items: Sequence):
    """One of the items."""
    return items[rng.integers(len(items))]


def clearly(value: float, yes: float, no: float) -> bool | None:
    """True from yes on, away from no; False from no on, away from yes; None between the two."""
    sign = 1 if yes > no else -1
    return True if sign * value >= sign * yes else False if sign * value <= sign * no else None


def both(*outcomes: bool | None) -> bool | None:
    """Three-valued "and"."""
    return False if False in outcomes else None if None in outcomes else True


def is_at(o: Located, position: str) -> bool | None:
    """Whether o lies at one of POSITIONS in the image."""
    x, y = o.centre
    if position == "middle":
        return clearly(max(abs(x - 0.5), abs(y - 0.5)), 0.12, 0.22)
    if " " in position:
        vertical, side = position.split()
        return both(is_at(o, "top" if vertical == "upper" else "bottom"), is_at(o, side))
    value = x if position in ("left", "right") else y
    return clearly(value, 0.39, 0.5) if position in ("left", "top") else clearly(value, 0.61, 0.5)


def is_towards(o: Located, anchor: Located, direction: int) -> bool | None:
    """Whether o lies in one of DIRECTIONS from the anchor."""
    bearing = math.degrees(math.atan2(o.centre[1] - anchor.centre[1], o.centre[0] - anchor.centre[0]))
    off = abs((bearing - direction + 180) % 360 - 180)
    # "On the right of" is loosely said of the lower right, too: the four axes have a wide unclear zone.
    return clearly(off, 22, 62) if direction % 90 == 0 else clearly(off, 20, 42)


def is_most(o: Located, others: Sequence[Located], superlative: str) -> bool | None:
    """Whether o comes first, by 8 % of the image or a factor of 1.5 in area; False where another one is before it."""
    if superlative in ("largest", "smallest"):
        first, *rest = (math.log(p.area) / math.log(1.5) for p in (o, *others))
    else:
        first, *rest = (p.centre[superlative in ("topmost", "bottommost")] / 0.08 for p in (o, *others))
    sign = 1 if superlative in ("largest", "rightmost", "bottommost") else -1
    return clearly(min(sign * (first - r) for r in rest), 1, 0)


def is_sized(o: Located, others: Sequence[Located], size: str) -> bool | None:
    """Whether o is "large" or "small" beside others of its category: twice their median area, or half of it."""
    ratio = o.area / float(np.median([p.area for p in others]))
    return clearly(ratio, 2, 1.25) if size == "large" else clearly(ratio, 1 / 2, 1 / 1.25)


def gap(o: Outlined, anchor: Outlined) -> float:
    """How far apart the boxes of two objects are, in fractions of the image; 0 where they overlap."""
    x, y = (max(o.box[i] - anchor.box[i + 2], anchor.box[i] - o.box[i + 2], 0) for i in (0, 1))
    return math.hypot(x, y)


def is_near(o: Outlined, anchor: Outlined) -> bool | None:
    """Whether o lies next to the anchor; one on the other, or in it, is unclear."""
    if gap(o, anchor) >= 0.12:
        return False  # and the masks are no nearer
    distance = o.distance(anchor)
    return None if distance < 0 else clearly(distance, 0.04, 0.12)


def picks_out(holds: Callable[[Located], bool | None], me: Located, others: Sequence[Located]) -> bool:
    """Whether a predicate is clearly true of `me` and clearly false of all others."""
    return holds(me) is True and all(holds(o) is False for o in others)
