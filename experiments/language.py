"""How much of a model's answers is due to language: a checkpoint's scores on phrases as they are, and on changed phrases.

    python -m experiments.language --ckpt best.pt                         on generated scenes that no training set holds
    python -m experiments.language --ckpt best.pt --figure language.png   and a picture: one image, several phrases
    python -m experiments.language --ckpt best.pt --data RRSIS-D          any data set: as it is, and phrases shuffled

Generated scenes are drawn anew (--scenes, --seed) from the generator's test split: their images and layouts occur in no
training set. A model that reads the phrase fails on a wrong one, and one that picks the most striking object scores the
same. Two tables are printed, in Markdown: by what the phrase says and by how many others of the target's category are
in the image; and with phrases from other images, with the category alone, and with left and right swapped. "Moved": the
share of answers whose IoU with the answer to the phrase as it is lies below 0.5.
"""

import argparse
import re
import tempfile
from pathlib import Path

from runtime.arguments import answer_early, at_least


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.language", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ckpt", default="best.pt")
    add("--data", help="a data set, to shuffle its phrases; default: new generated scenes")
    add("--split", default="val", help="of --data (default: val)")
    add("--scenes", type=at_least(int, 2), default=300, help="generated scenes, about five phrases each (default: 300)")
    add("--seed", type=at_least(int, 0), default=1, help="of the scenes and of the shuffle (default: 1)")
    add("--figure", type=Path, metavar="FILE", help="draw scenes with the answers to several phrases")
    return parser


if __name__ == "__main__":
    answer_early(command_line())

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from annotations.layouts import read_samples
from annotations.predicates import POSITION_WORDS, is_at, is_most
from data import Collate, flip_phrase, open_dataset
from evaluate import bootstrap, iou_counts, masks_at, sample_iou, score, summarise, summarise_rows, table
from experiments.stand_ins import load
from imagery.pictures import captioned, fitted, grid, lit
from runtime.devices import autocast, pick_device, to_device
from runtime.errors import UserError, exit_on_user_error
from synthetic_scenes.objects import CATEGORIES, COLOURS, Object
from synthetic_scenes.scenes import make_scenes, scene
from weights.provenance import weights_line

POSITION_OF = {words: position for position, wordings in POSITION_WORDS.items() for words in wordings}
NAMES = "|".join(name for _, name, *_ in CATEGORIES.values())
SWAPPED = re.compile(  # phrases with a position or "leftmost", without an anchor
    rf"(?:an?|the) (?:(?P<word>{'|'.join(COLOURS)}|leftmost|rightmost) )?(?P<name>{NAMES})"
    rf"(?: (?P<position>{'|'.join(POSITION_OF)}))?"
)


class Shuffled(Dataset):
    """A data set in which every sample gets the phrase of a sample of another image."""

    def __init__(self, dataset, seed: int):
        self.dataset = dataset
        by_image = {}
        for index, (i, _) in enumerate(dataset.items):
            by_image.setdefault(dataset.samples[i].image, []).append(index)
        groups = [by_image[image] for image in np.random.default_rng(seed).permutation(list(by_image))]
        order = [index for group in groups for index in group]
        step = max(map(len, groups))  # far enough along the shuffled images to be in another one
        donors = dict(zip(order, order[step:] + order[:step]))
        self.donors = [dataset.items[donors[index]] for index in range(len(dataset))]  # (sample, phrase) numbers

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        sample, phrase = self.donors[index]
        return self.dataset[index] | {"phrase": self.dataset.samples[sample].phrases[phrase]}


class Rephrased(Dataset):
    """Items of a data set with other phrases, {index: phrase}; `mirror` turns the pictures' left and right."""

    def __init__(self, dataset, phrases: dict[int, str], mirror: bool = False):
        self.dataset, self.phrases, self.mirror = dataset, list(phrases.items()), mirror

    def __len__(self) -> int:
        return len(self.phrases)

    def __getitem__(self, number: int) -> dict:
        index, phrase = self.phrases[number]
        item = self.dataset[index] | {"phrase": phrase}
        if self.mirror:
            item |= {key: item[key].flip(-1) for key in ("image", "encoder_image", "target", "mask")}
        return item


@torch.inference_mode()
def answers(model, dataset) -> list[np.ndarray]:
    """The model's masks of a data set's items, bool (H, W) at the size that theirs are stored at."""
    device = next(model.parameters()).device
    masks = []
    for batch in DataLoader(dataset, batch_size=8, collate_fn=Collate(model.union_encoder.tokenizer)):
        batch = to_device(batch, device)
        with autocast(device):
            output = model(*model.normalise(batch["image"], batch["encoder_image"]), batch["ids"], batch["lengths"])
        logits = output.logits.float().split(1)
        masks += [masks_at(z, mask.shape) for z, mask in zip(logits, batch["mask"])]
    return masks


def swapped_target(phrase: str, objects: list[Object]) -> Object | None:
    """The object that a phrase with left or right names by the generator's own rules: clearly this one and clearly no
    other of its category; None where that is not so, or where the phrase refers to another object."""
    match = SWAPPED.fullmatch(phrase.lower())
    if not match:
        return None
    word, name, position = match["word"], match["name"], POSITION_OF.get(match["position"])
    same = [o for o in objects if CATEGORIES[o.category][1] == name]

    def fits(o: Object) -> bool | None:
        if word in ("leftmost", "rightmost"):
            return is_most(o, [p for p in same if p is not o], word) if len(same) > 1 else None
        return False if word and o.colour != word else is_at(o, position)

    found = [fits(o) for o in same]
    return same[found.index(True)] if found.count(True) == 1 and None not in found else None


def describe(dataset, seed: int) -> list[dict]:
    """Of each phrase of generated scenes: its kind, the objects of its scene, which of them it names, and "others", how
    many more there are of that category."""
    scenes, facts = {}, []
    for i, j in dataset.items:
        sample = dataset.samples[i]
        number = int(Path(sample.image).stem)
        s = scenes.setdefault(number, scene(seed, "test", number))
        target = s.objects[next(k for k, phrase, _ in s.phrases if phrase == sample.phrases[j])]
        others = sum(o.category == target.category for o in s.objects) - 1
        facts.append({"phrase": sample.phrases[j], "kind": sample.kinds[j], "file": sample.image, "others": others,
                      "target": target, "objects": s.objects})  # fmt: skip
    return facts


# ---- tables ------------------------------------------------------------------------------------------------------------


def rows_of(masks: list[np.ndarray], targets: list[np.ndarray], files: list[str]) -> list[dict]:
    """As `score` gives them, as far as they are needed here."""
    rows = []
    for mask, target, file in zip(masks, targets, files):
        intersection, union = iou_counts(mask, target)
        iou = float(sample_iou(intersection, union, "ours"))
        rows.append({"scene": file, "intersection": intersection, "union": union, "iou": iou})
    return rows


def line(name: str, rows: list[dict], *more: str) -> str:
    """A row of a Markdown table: mIoU with its 95 % interval over images, Pr@0.5, number of phrases."""
    if not rows:
        return ""
    scores = summarise([r["intersection"] for r in rows], [r["union"] for r in rows])
    low, high = bootstrap(rows, "ours")["mIoU interval"]
    cells = [name, f"{scores['mIoU']:.1f} ({low:.1f}–{high:.1f})", f"{scores['Pr@0.5']:.1f}", *more, str(len(rows))]
    return f"| {' | '.join(cells)} |\n"


def head(*columns: str) -> str:
    """The first two lines of a Markdown table."""
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"


def without_article(phrase: str) -> str:
    """A phrase in lower case, without its first word."""
    return phrase.lower().partition(" ")[2]


def by_novelty(rows: list[dict], facts: list[dict], trained: set[str]) -> str:
    """Rows of the first table by what training has said: of the kinds of which it has said some phrases and others not,
    both; and where colours and categories were kept apart (--hold-out), phrases with such a pair and the like.

    trained: the training set's phrases, `without_article`."""
    text, pairs = "", [f"{colour} {name}" for colour in COLOURS for _, name, *_ in CATEGORIES.values()]
    new = [pair for pair in pairs if not any(pair in t for t in trained)]
    groups = {}
    for row, fact in zip(rows, facts):
        phrase = without_article(fact["phrase"])
        groups.setdefault((fact["kind"], phrase in trained), []).append(row)
        if new and any(pair in phrase for pair in pairs):
            groups.setdefault(("a colour and a category", not any(pair in phrase for pair in new)), []).append(row)
    for kind in sorted({kind for kind, _ in groups}):
        if (kind, True) in groups and (kind, False) in groups:
            how = ("together", "together") if kind.startswith("a colour") else ("word for word", "so")
            text += line(f"{kind}, said {how[0]} in training", groups[kind, True])
            text += line(f"{kind}, never said {how[1]} in training", groups[kind, False])
    return text


def by_phrase(rows: list[dict], facts: list[dict], trained: set[str] | None) -> str:
    """The first table: by what the phrase says, and by how many others of the target's category are in the image."""
    text = head("phrases", "mIoU (95 %)", "Pr@0.5", "number") + line("all", rows)
    for kind in sorted({f["kind"] for f in facts}):
        text += line(kind, [row for row, fact in zip(rows, facts) if fact["kind"] == kind])
    for n in sorted({f["others"] for f in facts}):
        name = f"{n or 'no'} other{'s' * (n != 1)} of the category in the image"
        text += line(name, [row for row, fact in zip(rows, facts) if fact["others"] == n])
    return text + (by_novelty(rows, facts, trained) if trained is not None else "")


def tables(model, dataset, facts: list[dict], seed: int, trained: set[str] | None) -> str:
    """The two tables; trained: see `by_novelty`, or None where the training set is not at hand."""
    files, phrases = [f["file"] for f in facts], [f["phrase"] for f in facts]
    truth = dict(enumerate(f["target"].mask for f in facts))
    plain = answers(model, Rephrased(dataset, dict(enumerate(phrases))))

    def changed(name: str, new: dict[int, str], targets=truth, mirror: bool = False) -> str:
        """The row of new phrases, {index: phrase}, scored against targets, {index: mask}."""
        if not new:
            return ""
        masks = answers(model, Rephrased(dataset, new, mirror))
        masks = [mask[:, ::-1] for mask in masks] if mirror else masks
        moved = np.mean([sample_iou(*iou_counts(mask, plain[i]), "ours") < 0.5 for mask, i in zip(masks, new)])
        return line(name, rows_of(masks, [targets[i] for i in new], [files[i] for i in new]), f"{100 * moved:.1f}")

    def unchanged(name: str, index) -> str:
        return line(name, rows_of([plain[i] for i in index], [truth[i] for i in index], [files[i] for i in index]), "")

    shuffled = [dataset.samples[i].phrases[j] for i, j in Shuffled(dataset, seed).donors]
    alone = {i: f"The {CATEGORIES[f['target'].category][1]}" for i, f in enumerate(facts) if f["others"]}
    flipped = {i: flip_phrase(phrase, True, False) for i, phrase in enumerate(phrases)}
    flipped = {i: phrase for i, phrase in flipped.items() if phrase != phrases[i]}
    found = {i: swapped_target(phrase, facts[i]["objects"]) for i, phrase in flipped.items()}
    found = {i: o.mask for i, o in found.items() if o is not None}

    text = by_phrase(rows_of(plain, list(truth.values()), files), facts, trained)
    text += "\n" + head("what is said", "mIoU (95 %)", "Pr@0.5", "moved", "number")
    text += unchanged("the phrase", truth)
    text += changed("a phrase of another image", dict(enumerate(shuffled)))
    text += unchanged("the phrase, where others of the category are in the image", alone)
    text += changed("the category alone there", alone)
    text += unchanged("the phrase, where it says left or right", flipped)
    text += changed("left and right swapped there", flipped)
    text += changed("... against what it then names, where it clearly names something", {i: flipped[i] for i in found}, found)
    return text + changed("left and right swapped in the phrase and in the image", flipped, mirror=True)


# ---- figure ------------------------------------------------------------------------------------------------------------


def figure(path: Path, model, dataset, facts: list[dict], number: int = 4) -> None:
    """A row a scene: the image, and the answers to a phrase, to the phrase with left and right swapped, to the category alone.

    The first scenes are taken in which the swapped phrase names another object, whatever the model makes of them."""
    rows, files = [], set()
    for i, fact in enumerate(facts):
        phrase, flipped = fact["phrase"], flip_phrase(fact["phrase"], True, False)
        other = swapped_target(flipped, fact["objects"]) if flipped != phrase else None
        if other is None or other is fact["target"] or fact["file"] in files or len(rows) == number:
            continue
        files.add(fact["file"])
        phrases = [phrase, flipped, f"The {CATEGORIES[fact['target'].category][1]}"]
        image = fitted(dataset[i]["image"].permute(1, 2, 0).numpy(), 256, 256)
        masks = [answers(model, Rephrased(dataset, {i: text}))[0] for text in phrases]
        pictures = [image, *(lit(image, mask) for mask in masks)]
        rows.append([captioned(picture, text) for picture, text in zip(pictures, ["", *phrases])])
    if not rows:
        raise UserError(f"no scene fits the figure: draw more --scenes than {len({f['file'] for f in facts})}")
    Image.fromarray(grid(rows)).save(path)


# ---- command line ------------------------------------------------------------------------------------------------------


def training_phrases(checkpoint: dict) -> set[str] | None:
    """The phrases of the checkpoint's training set, `without_article`; None, and a line that says so, where it is not here."""
    try:
        samples = read_samples(checkpoint["data"])[2] if checkpoint["data"] else []
    except UserError:
        samples = []
    if not samples:
        name = checkpoint["data"] or "The training set"
        print(f"{name} is not at hand: phrases are not split by what training has said.\n")
        return None
    return {without_article(phrase) for s in samples if s.split == "train" for phrase in s.phrases}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    args = command_line().parse_args(arguments)
    if args.figure and (args.data or args.figure.exists()):
        raise UserError(f"--figure {args.figure} needs a new file, and generated scenes in place of --data")
    if args.figure and not (args.figure.suffix == ".png" and args.figure.parent.is_dir()):
        raise UserError(f"--figure {args.figure}: give a name that ends in .png, in a folder that exists")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    model, checkpoint = load(args.ckpt, pick_device())
    print(weights_line(args.ckpt, checkpoint))
    sizes = {"image_size": model.preset.image_size, "encoder_size": model.union_encoder.image_size}
    if args.data:
        dataset = open_dataset(args.data, args.split, **sizes)
        sets = {"phrases as they are": dataset, "phrases shuffled": Shuffled(dataset, args.seed)}
        print(table({name: summarise_rows(score(model, data, title=name), "ours") for name, data in sets.items()}))
        return
    trained = training_phrases(checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        root = make_scenes(Path(scratch) / "scenes", 0, 0, args.scenes, seed=args.seed, progress=False)
        dataset = open_dataset(str(root), "test", **sizes)
        facts = describe(dataset, args.seed)
        print(tables(model, dataset, facts, args.seed, trained))
        if args.figure:
            figure(args.figure, model, dataset, facts)
            print(f"wrote {args.figure}")


if __name__ == "__main__":
    with exit_on_user_error("language"):
        main()
