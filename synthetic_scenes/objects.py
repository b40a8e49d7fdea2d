"""Objects, and the predicates by which words apply to them: "left", "large", "above". Nothing is drawn here.

A predicate has three outcomes: True, False, and None for unclear. A phrase is used only where it is clearly true of the
object it refers to and clearly false of all others of its category.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

# RRSIS-D's name -> RRSIS-D's id, name in a phrase, medium length and height in pixels of a 128-pixel image.
CATEGORIES = {
    "airplane": (2, "airplane", 33, 2.0), "baseballfield": (4, "baseball field", 25, 0.0),
    "harbor": (11, "harbor", 36, 1.0), "ship": (13, "ship", 33, 1.5), "stadium": (14, "stadium", 33, 3.5),
    "storagetank": (15, "storage tank", 22, 3.5), "tenniscourt": (16, "tennis court", 31, 0.0),
    "vehicle": (18, "vehicle", 25, 1.5),
}  # fmt: skip
COLOURS = {
    "red": (204, 36, 40), "blue": (36, 84, 214), "green": (24, 172, 84), "yellow": (242, 212, 36),
    "white": (242, 242, 240), "gray": (148, 150, 155),
}  # fmt: skip
# Factors on a category's medium length: the smallest large one is 1.5 times the largest small one.
SIZES = {"small": (0.82, 0.9), "medium": (1.06, 1.16), "large": (1.35, 1.48)}
POSITIONS = (
    "left", "right", "middle", "top", "bottom", "upper left", "upper right", "lower left", "lower right",
)  # fmt: skip
DIRECTIONS = (0, 180, 90, 270, 45, 135, 225, 315)  # degrees, x to the right, y down
SUPERLATIVES = ("leftmost", "rightmost", "topmost", "bottommost", "largest", "smallest")


@dataclass
class Object:
    """One object of an image."""

    category: str  # a key of CATEGORIES
    colour: str  # a key of COLOURS
    size: str  # a key of SIZES
    centre: tuple[float, float]  # (x, y), the mask's centroid in fractions of the image
    mask: np.ndarray  # (H, W) bool, the body without its shadow


def clearly(value: float, yes: float, no: float) -> bool | None:
    """True from yes on, away from no; False from no on, away from yes; None between the two."""
    sign = 1 if yes > no else -1
    return True if sign * value >= sign * yes else False if sign * value <= sign * no else None


def is_at(o: Object, position: str) -> bool | None:
    """Whether o lies at one of POSITIONS in the image."""
    x, y = o.centre
    if position == "middle":
        return clearly(max(abs(x - 0.5), abs(y - 0.5)), 0.12, 0.22)
    if " " in position:
        vertical, side = position.split()
        parts = is_at(o, "top" if vertical == "upper" else "bottom"), is_at(o, side)
        return False if False in parts else None if None in parts else True
    value = x if position in ("left", "right") else y
    return clearly(value, 0.39, 0.5) if position in ("left", "top") else clearly(value, 0.61, 0.5)


def is_towards(o: Object, anchor: Object, direction: int) -> bool | None:
    """Whether o lies in one of DIRECTIONS from the anchor."""
    bearing = math.degrees(math.atan2(o.centre[1] - anchor.centre[1], o.centre[0] - anchor.centre[0]))
    off = abs((bearing - direction + 180) % 360 - 180)
    # "On the right of" is loosely said of the lower right, too: the four axes have a wide unclear zone.
    return clearly(off, 22, 62) if direction % 90 == 0 else clearly(off, 20, 42)


def is_most(o: Object, others: list[Object], superlative: str) -> bool | None:
    """Whether o comes first, by 8 % of the image or a factor of 1.5 in area; False where another one is before it."""
    if superlative in ("largest", "smallest"):
        first, *rest = (math.log(p.mask.sum()) / math.log(1.5) for p in (o, *others))
    else:
        first, *rest = (p.centre[superlative in ("topmost", "bottommost")] / 0.08 for p in (o, *others))
    sign = 1 if superlative in ("largest", "rightmost", "bottommost") else -1
    return clearly(min(sign * (first - r) for r in rest), 1, 0)


def is_of_size(o: Object, size: str) -> bool | None:
    """Whether o is small or large; a medium one is neither."""
    return None if o.size == "medium" else o.size == size


def picks_out(holds: Callable[[Object], bool | None], me: Object, others: list[Object]) -> bool:
    """Whether a predicate is clearly true of `me` and clearly false of all others."""
    return holds(me) is True and all(holds(o) is False for o in others)


def descriptions(me: Object, others: list[Object]) -> list[tuple[str, str, str]]:
    """All (kind, adjective, position) that pick out `me` from the others of its category."""
    alone = partial(picks_out, me=me, others=others)
    if not others:
        return [("category", "", "")]
    found = [("size", me.size, "")] if alone(lambda o: is_of_size(o, me.size)) else []
    unique_colour = alone(lambda o: o.colour == me.colour)
    found += [("colour", me.colour, "")] if unique_colour else []
    for position in POSITIONS:
        if alone(partial(is_at, position=position)):
            found.append(("position", "", position))
        elif not unique_colour and alone(lambda o, at=position: o.colour == me.colour and is_at(o, at)):
            found.append(("colour+position", me.colour, position))  # neither would do without the other
    return found
