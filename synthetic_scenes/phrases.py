"""Referring phrases: of several true descriptions of an object one is drawn, and worded.

Of several objects of a category none is ever called by the category alone, so language is needed.
"""

import numpy as np

from annotations.predicates import (
    DIRECTIONS,
    POSITION_WORDS,
    RELATION_WORDS,
    SUPERLATIVES,
    SYNONYMS,
    is_most,
    is_towards,
    pick,
    picks_out,
)
from synthetic_scenes.objects import CATEGORIES, COLOURS, Object, descriptions

# Kind of phrase -> its weight when a scene's next phrase is drawn among the kinds available there. Colour
# with position, and size, are available less often than the others: their weights exceed the shares wanted.
KINDS = {
    "category": 0.05, "colour": 0.15, "size": 0.20, "position": 0.22, "colour+position": 0.34, "relation": 0.15,
    "superlative": 0.05,
}  # fmt: skip
# One pair of colour and category each: with hold_out, no phrase of the training split says it.
HELD_OUT = tuple(f"{colour} {name}" for (_, name, *_), colour in zip(CATEGORIES.values(), [*COLOURS] * 2))


def noun(rng: np.random.Generator, o: Object, adjective: str = "", position: str = "") -> str:
    """An object worded, for example "red storage tank on the left"; an adjective or a position has several wordings."""
    adjective = pick(rng, SYNONYMS.get(adjective, (adjective,)))
    position = pick(rng, POSITION_WORDS.get(position, (position,)))
    return f"{adjective} {CATEGORIES[o.category][1]} {position}".strip()


def described(objects: list[Object]) -> tuple[list[list], dict[tuple[str, int], list]]:
    """The `descriptions` of each object, and all ways to refer to one: {(kind, index): [(adjective or direction, position
    or index of the anchor)]}."""
    others = [[o for o in objects if o.category == me.category and o is not me] for me in objects]
    named, ways = [descriptions(*pair) for pair in zip(objects, others)], {}
    for i, (me, same) in enumerate(zip(objects, others)):
        found = named[i] + [("superlative", s, "") for s in SUPERLATIVES if same and is_most(me, same, s)]
        for j, anchor in enumerate(objects):
            if same and named[j] and anchor.category != me.category:  # an anchor must have a name of its own
                found += [
                    ("relation", d, j) for d in DIRECTIONS
                    if picks_out(lambda o, a=anchor, d=d: is_towards(o, a, d), me, same)
                ]  # fmt: skip
        for kind, *rest in found:
            ways.setdefault((kind, i), []).append(rest)
    return named, ways


def draw_phrases(rng: np.random.Generator, objects: list[Object], count: int) -> list[tuple[int, str, str]]:
    """Up to count (index, phrase, kind), at most one of a kind for an object; kinds are drawn by KINDS' weights."""
    named, ways = described(objects)
    chosen = []
    while ways and len(chosen) < count:
        kinds = [k for k in KINDS if any(k == kind for kind, _ in ways)]
        weights = np.array([KINDS[k] for k in kinds])
        kind = kinds[rng.choice(len(kinds), p=weights / weights.sum())]
        i = pick(rng, [index for k, index in ways if k == kind])
        first, second = pick(rng, ways.pop((kind, i)))
        if kind == "relation":
            anchor = noun(rng, objects[second], *pick(rng, named[second])[1:])
            verb = pick(rng, ("is ", "is ", ""))
            first, second = "", f"{verb}{pick(rng, RELATION_WORDS[first])} the {anchor}"
        text = noun(rng, objects[i], first, second)
        indefinite = kind != "superlative" and rng.random() < 0.4
        article = ("An" if text[0] in "aeiou" else "A") if indefinite else "The"
        chosen.append((i, f"{article} {text}", kind))
    return chosen
