"""Objects of a generated scene, and the descriptions that pick them out. Nothing is drawn here."""

from dataclasses import dataclass
from functools import partial

import numpy as np

from annotations.predicates import POSITIONS, both, is_at, picks_out

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


@dataclass
class Object:
    """One object of an image."""

    category: str  # a key of CATEGORIES
    colour: str  # a key of COLOURS
    size: str  # a key of SIZES
    centre: tuple[float, float]  # (x, y), the mask's centroid in fractions of the image
    mask: np.ndarray  # (H, W) bool, the body without its shadow

    @property
    def area(self) -> int:
        return self.mask.sum()


def is_of_size(o: Object, size: str) -> bool | None:
    """Whether o is small or large; a medium one is neither."""
    return None if o.size == "medium" else o.size == size


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
        elif not unique_colour and alone(lambda o, at=position: both(o.colour == me.colour, is_at(o, at))):
            found.append(("colour+position", me.colour, position))  # neither would do without the other
    return found
