"""A referring data set made of masks: phrases for the objects of a file in COCO's format.

    python -m annotations.phrases instances.json --images images --out data/isaid
    python -m annotations.phrases dota.json --images images --out data/dota --tile 512 --scale 0.5
    python train.py --data data/isaid --model tiny --set image_size=256

Written are images/, masks/ and phrases.csv, which people can read and correct: see docs/data.md. A phrase names its target by
category, position, size, relation to another object or superlative, or names a group ("the two ships on the left"). It is
clearly true of its target and clearly false of every other object of the category, also of those too small to be named.
Split `absent` has a phrase for each image of `val` and `test` whose category is not there; its masks are empty. With --absent
some training images have such a phrase too.
"""

import argparse
import csv
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

from runtime.arguments import answer_early, at_least


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m annotations.phrases", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("instances", type=Path, metavar="INSTANCES.json", help="a file in COCO's format")
    add("--images", type=Path, required=True, metavar="DIR", help="where its images lie")
    add("--out", type=Path, required=True, metavar="DIR", help="the new data set's folder")
    add("--tile", type=at_least(int, 32), metavar="N", help="cut the images into tiles of N x N pixels, after scaling")
    add("--scale", type=at_least(float, 0.01), default=1.0, metavar="S", help="scale the images by S (default: 1)")
    add("--min-share", type=at_least(float, 0), default=0.003, metavar="X",
        help="objects that cover less of the image are not named (default: 0.003)")  # fmt: skip
    add("--phrases", type=at_least(int, 1), default=4, metavar="N",
        help="of a target of split train, at most; elsewhere one (default: 4)")  # fmt: skip
    add("--absent", type=at_least(float, 0), default=0.0, metavar="SHARE",
        help="share of the training images that get a phrase of something absent (default: 0)")  # fmt: skip
    add("--seed", type=at_least(int, 0), default=0, help="of the phrases (default: 0)")
    return parser


if __name__ == "__main__":
    answer_early(command_line())

import cv2
import numpy as np

from annotations.instances import Instance, InstancesFile, Picture, scaled
from annotations.predicates import (
    DIRECTIONS,
    POSITION_WORDS,
    POSITIONS,
    RELATION_WORDS,
    SUPERLATIVES,
    SYNONYMS,
    both,
    gap,
    is_at,
    is_most,
    is_near,
    is_sized,
    is_towards,
    pick,
    picks_out,
)
from imagery.pixels import read_image
from runtime.errors import UserError, exit_on_user_error
from runtime.progress import Progress

# Kind of phrase -> its weight when one is drawn for a target among the kinds that are true of it.
KINDS = {"category": 0.15, "position": 0.25, "size": 0.15, "size+position": 0.15, "superlative": 0.15, "relation": 0.25}
# Names of categories in phrases, the first of which is drawn most often; other categories are called by their own name.
NOUNS = {
    "plane": ("plane", "airplane", "aircraft"), "airplane": ("airplane", "plane", "aircraft"),
    "ship": ("ship", "boat", "vessel"), "storage tank": ("storage tank", "tank"), "harbor": ("harbor", "dock"),
    "small vehicle": ("small vehicle", "car"), "soccer ball field": ("soccer field", "football field"),
    "ground track field": ("ground track field", "running track"), "baseball diamond": ("baseball field", "baseball diamond"),
    "swimming pool": ("swimming pool", "pool"), "roundabout": ("roundabout", "traffic circle"),
    "helicopter": ("helicopter", "aircraft"),
}  # fmt: skip
MOST_GROUPS = 1  # of a picture: there are many, which would outnumber the objects
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}


@dataclass
class Target:
    """What phrases of a picture refer to: one object or a group of them."""

    members: list[Instance]
    ways: dict[str, list[tuple]]  # kind -> descriptions of that kind: (adjective, position, direction, anchor)
    phrases: dict[str, str] = field(default_factory=dict)  # phrase -> kind, once they are drawn

    @property
    def category(self) -> str:
        """What all members are: of ships and container ships "ship"."""
        return min((o.category for o in self.members), key=len)


def applies(name: str, category: str) -> bool:
    """Whether objects of the category can be called so, by a synonym or its last words."""
    return any(called == name or called.endswith(f" {name}") for called in (category, *NOUNS.get(category, ())))


def namesakes(category: str, instances: list[Instance]) -> list[Instance]:
    """The objects that the category's name applies to: to a "container ship" also "ship"."""
    return [o for o in instances if o.category == category or o.category.endswith(f" {category}")]


def names(category: str, here: set[str]) -> tuple[str, ...]:
    """What its objects are called where those of the categories `here` are: beside a helicopter no plane is an "aircraft"."""
    first, *rest = NOUNS.get(category, (category,))
    others = [c for c in here if c != category and not c.endswith(f" {category}")]
    return first, *(name for name in rest if not any(applies(name, c) for c in others))


def holds(predicate, o: Instance, *arguments) -> bool | None:
    """The outcome of a predicate; of a crowd, whose objects lie anywhere in its mask, none is clear."""
    return None if o.crowd else predicate(o, *arguments)


def sizeable(category: str) -> bool:
    return category.split()[0] not in ("small", "large", "big", "tiny")  # no "large small vehicle", nor the "largest" one


def descriptions(me: Instance, others: list[Instance]) -> dict[str, list[tuple]]:
    """Kind -> all (adjective, position) that pick out `me` from the others of its name."""
    alone, found = partial(picks_out, me=me, others=others), defaultdict(list)
    if not others:
        found["category"].append(("", ""))
    positions = [p for p in POSITIONS if alone(lambda o, p=p: holds(is_at, o, p))]
    found["position"] += [("", position) for position in positions]
    if not others or any(o.crowd for o in others):
        return found
    if sizeable(me.category):
        beside = {id(o): [p for p in (me, *others) if p is not o] for o in (me, *others)}
        for size in ("large", "small"):
            if alone(lambda o, s=size: is_sized(o, beside[id(o)], s)):
                found["size"].append((size, ""))
            elif is_sized(me, others, size):
                found["size+position"] += [
                    (size, p) for p in POSITIONS if p not in positions
                    and alone(lambda o, s=size, p=p: both(is_sized(o, beside[id(o)], s), is_at(o, p)))
                ]  # fmt: skip
    superlatives = [s for s in SUPERLATIVES if sizeable(me.category) or s not in ("largest", "smallest")]
    found["superlative"] += [(s, "") for s in superlatives if is_most(me, others, s)]
    return found


def is_related(o: Instance, anchor: Instance, direction: int | None) -> bool | None:
    """Whether o lies towards the direction from the anchor, or, for None, next to it."""
    if o.crowd or (direction is not None and not gap(o, anchor)):
        return None
    return is_near(o, anchor) if direction is None else is_towards(o, anchor, direction)


def relations(me: Instance, others: list[Instance], anchors: list[tuple[Instance, dict]]) -> list[tuple]:
    """All ("", "", direction, anchor) that pick out `me`: towards one of DIRECTIONS of an anchor, or None: next to it."""
    found = []
    for anchor, named in anchors:
        rest = [o for o in others if o is not anchor]
        for direction in (*DIRECTIONS, None) if anchor is not me else ():
            if picks_out(partial(is_related, anchor=anchor, direction=direction), me, rest):
                found.append(("", "", direction, (anchor, named)))
    return found


def groups(category: str, same: list[Instance], large_enough) -> list[Target]:
    """All objects of a name, and those at a position, where at least half of them could be named by themselves."""
    found = {tuple(map(id, same)): Target(same, {"group": [("", "")]})} if len(same) > 1 or same[0].crowd else {}
    for position in POSITIONS:
        outcomes = [holds(is_at, o, position) for o in same]
        members = [o for o, outcome in zip(same, outcomes) if outcome]
        if None not in outcomes and 1 < len(members) < len(same):
            target = found.setdefault(tuple(map(id, members)), Target(members, {"group": []}))
            target.ways["group"].append(("", position))
    return [g for g in found.values() if sum(map(large_enough, g.members)) >= len(g.members) / 2]


def targets(rng: np.random.Generator, picture: Picture, min_share: float, left_out: Counter) -> list[Target]:
    """The targets of a picture with all descriptions that are true of each alone; counts the objects `left_out`, by reason."""
    instances, found = picture.instances, []
    least = min_share * picture.shape[0] * picture.shape[1]
    nameable = [o for o in instances if o.area >= least and o.seen >= 0.5 and not o.crowd]
    left_out["cover no pixel"] += picture.unseen
    chosen = {id(o) for o in nameable}
    for o in instances:
        if id(o) not in chosen:
            left_out["a crowd" if o.crowd else "too small" if o.area < least else "cut by a tile's border"] += 1
    others = {id(o): [p for p in namesakes(o.category, instances) if p is not o] for o in nameable}
    named = {id(o): descriptions(o, others[id(o)]) for o in nameable}
    anchors = [(o, ways) for o in nameable if any((ways := named[id(o)]).values())]
    for o in nameable:
        ways = named[id(o)] | {"relation": relations(o, others[id(o)], anchors)}
        if any(ways.values()):
            found.append(Target([o], {kind: options for kind, options in ways.items() if options}))
        else:
            left_out["no phrase is true of it alone"] += 1
    gathered = []
    for category in sorted({o.category for o in instances}):
        gathered += groups(category, namesakes(category, instances), lambda o: o.area >= least)
    return found + [gathered[i] for i in rng.permutation(len(gathered))[:MOST_GROUPS]]


def plural(noun: str) -> str:
    if noun.endswith("aircraft"):
        return noun
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "x", "ch", "sh")) else f"{noun}s"


def noun(rng: np.random.Generator, named: tuple[str, ...], adjective: str = "", position: str = "", count: int = 1) -> str:
    """One of a category's names with what describes it, as "large ship on the left"; count: of a group's members."""
    first, *rest = named
    name = pick(rng, rest) if rest and rng.random() < 0.4 else first
    if count > 1:
        number = f"{NUMBERS[count]} " if count in NUMBERS and rng.random() < 0.4 else ""
        name = number + plural(name)
    adjective = pick(rng, SYNONYMS.get(adjective, (adjective,)))
    position = pick(rng, POSITION_WORDS.get(position, (position,)))
    return f"{adjective} {name} {position}".strip()


def word(rng: np.random.Generator, target: Target, kind: str, here: set[str]) -> str:
    """One of the target's descriptions of a kind, in words; here: the picture's categories."""
    adjective, position, *relation = pick(rng, target.ways[kind])
    count = 1 if kind != "group" else 0 if any(o.crowd for o in target.members) else len(target.members)
    text = noun(rng, names(target.category, here), adjective, position, count or 99)
    if relation:
        direction, (anchor, ways) = relation
        how = pick(rng, [options for options in ways.values() if options])
        verb = pick(rng, ("is ", "is ", "")) if direction is not None else ""
        said = pick(rng, RELATION_WORDS[direction] if direction is not None else ("next to", "near"))
        text += f" {verb}{said} the {noun(rng, names(anchor.category, here), *pick(rng, how)[:2])}"
    if kind == "group":
        return f"{pick(rng, ('The', 'All'))} {text}".replace("All two", "Both")
    indefinite = kind != "superlative" and rng.random() < 0.4
    return f"{('An' if text[0] in 'aeiou' else 'A') if indefinite else 'The'} {text}"


def draw(rng: np.random.Generator, target: Target, count: int, here: set[str]) -> None:
    """Put up to `count` phrases into the target, kinds by KINDS' weights; another wording of a kind counts as a phrase."""
    kinds = list(target.ways)
    weights = np.array([KINDS.get(kind, 1.0) for kind in kinds])
    for _ in range(count):
        kind = kinds[rng.choice(len(kinds), p=weights / weights.sum())]
        target.phrases[word(rng, target, kind, here)] = kind


def absent_phrase(rng: np.random.Generator, picture: Picture) -> str | None:
    """A phrase of a category of which nothing is in the picture; None where all are there."""
    here = {o.category for o in picture.instances}
    gone = [c for c in picture.categories if not any(applies(c, category) for category in here)]
    if not gone:
        return None
    return f"The {noun(rng, names(pick(rng, gone), here), position=pick(rng, ('', *POSITIONS)))}"


# ---- writing ----------------------------------------------------------------------------------------------------------


def rows(args: argparse.Namespace, picture: Picture, stem: str, image: str, part: Path, left_out: Counter) -> Iterator[dict]:
    """The lines of phrases.csv for a picture, whose masks are written."""
    rng = np.random.default_rng([args.seed, *stem.encode()])
    evaluated, here = picture.split != "train", {o.category for o in picture.instances}
    for number, target in enumerate(targets(rng, picture, args.min_share, left_out)):
        draw(rng, target, 1 if evaluated else args.phrases, here)
        mask, union = f"{stem}-{number}.png", np.zeros(picture.shape, np.uint8)
        for o in target.members:
            union[o.spot] |= o.mask
        cv2.imwrite(str(part / "masks" / mask), 255 * union)
        common = {"image": image, "mask": mask, "split": picture.split, "category": target.category}
        for phrase, kind in target.phrases.items():
            yield common | {"phrase": phrase, "kind": kind}
    split = "absent" if evaluated else "train"
    if (evaluated or rng.random() < args.absent) and (phrase := absent_phrase(rng, picture)):
        yield {"image": image, "mask": "", "phrase": phrase, "split": split, "category": "", "kind": "absent"}


@lru_cache(maxsize=1)  # tiles of an image follow each other
def scaled_image(path: Path, size: tuple[int, int], scale: float) -> np.ndarray:
    try:
        image = read_image(path)
    except ValueError as error:
        raise UserError(f"{error}: get the image again, or take it out of the file", exit_code=1) from None
    if image.shape[:2] != size:
        raise UserError(f"{path} is {image.shape[1]} x {image.shape[0]} pixels large, and {size[1]} x {size[0]} by the file of "
                        "instances: give the images that it was made for")  # fmt: skip
    return cv2.resize(image, scaled(size, scale)[::-1], interpolation=cv2.INTER_AREA)


def write_image(args: argparse.Namespace, picture: Picture, target: Path) -> None:
    source = args.images / picture.name
    if picture.tile is None and args.scale == 1:
        shutil.copyfile(source, target)
        return
    image = scaled_image(source, picture.size, args.scale)
    left, top = picture.tile or (0, 0)
    height, width = picture.shape
    cv2.imwrite(str(target), image[top : top + height, left : left + width, ::-1])


def file_stems(names: list[str]) -> dict[str, str]:
    """{an image's name: the stem of the files made of it}; folders become part of it, and where two would be the same, the
    suffix."""
    flat = {name: name.strip("./").replace("/", "-") for name in names}
    short = Counter(Path(file).stem for file in flat.values())
    stems = {name: Path(file).stem if short[Path(file).stem] == 1 else file.replace(".", "-") for name, file in flat.items()}
    if len({*stems.values()}) < len(names):
        raise UserError("the images' names differ by - and / or . alone: rename one of them")
    return stems


def make(args: argparse.Namespace, part: Path) -> None:
    """Write the data set into the folder `part`, and say what came out."""
    source, left_out, count, used = InstancesFile(args.instances, args.images), Counter(), Counter(), set()
    stems, total = file_stems(source.names), None if args.tile else len(source.names)
    (part / "images").mkdir(parents=True)
    (part / "masks").mkdir()
    with open(part / "phrases.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["image", "mask", "phrase", "split", "category", "kind"])
        writer.writeheader()
        for picture in Progress(source.pictures(args.tile, args.scale), "phrases", total, unit=" images"):
            stem = stems[picture.name]
            stem += "" if picture.tile is None else "-{}-{}".format(*picture.tile)
            image = stem + (Path(picture.name).suffix if picture.tile is None and args.scale == 1 else ".png")
            for row in rows(args, picture, stem, image, part, left_out):
                writer.writerow(row)
                count[row["split"], row["kind"]] += 1
                used.add((row["split"], image))
            if (picture.split, image) in used or ("absent", image) in used:
                write_image(args, picture, part / "images" / image)
    if not count:
        raise UserError(f"no object of {args.instances} can be named: lower --min-share")
    for split in dict.fromkeys(split for split, _ in count):
        kinds = ", ".join(f"{kind} {n:,}" for (where, kind), n in sorted(count.items()) if where == split)
        images = sum(where == split for where, _ in used)
        print(f"{split}: {sum(n for (s, _), n in count.items() if s == split):,} phrases of {images:,} images ({kinds})")
    print("objects left out: " + (", ".join(f"{n:,} {reason}" for reason, n in left_out.most_common() if n) or "none"))


def main(arguments: list[str] | None = None) -> None:
    args = command_line().parse_args(arguments)
    if args.out.exists():
        raise UserError(f"{args.out} exists already: remove it or choose another --out")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{args.out.name}.part", dir=args.out.parent) as scratch:
        make(args, Path(scratch, args.out.name))
        Path(scratch, args.out.name).rename(args.out)


if __name__ == "__main__":
    with exit_on_user_error("phrases"):
        main()
