"""Is it language that does it? Score a checkpoint on phrases as they are, and on phrases that were tampered with.

    python tools/language.py --ckpt best.pt                         on generated scenes that no training set holds
    python tools/language.py --ckpt best.pt --figure language.png   and a picture: one image, several phrases
    python tools/language.py --ckpt best.pt --data RRSIS-D          any data set: as it is, and phrases shuffled

Generated scenes are drawn anew (--scenes, --seed) from the generator's test split: their images and layouts occur in no
training set. A model that reads the phrase fails on a wrong one, and one that picks the most striking object scores the
same. Two tables are printed, in Markdown: by what the phrase says and by how many others of the target's category are
in the image; and with phrases from other images, with the category alone, and with left and right swapped. "Moved": the
share of answers whose IoU with the answer to the phrase as it is lies below 0.5.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoints import UserError, load_checkpoint  # noqa: E402
from data import Collate, flip_phrase, open_dataset  # noqa: E402
from evaluate import autocast, bootstrap, iou_counts, masks_at, sample_iou, score, summarise, table, to_device  # noqa: E402
from evaluate import summarise_rows as summarise_scored  # noqa: E402
from layouts import UserError, read_samples  # noqa: E402
from scenes import CATEGORIES, COLOURS, PLACES, Object, is_at, is_most, make_scenes, scene  # noqa: E402

PLACE_OF = {words: place for place, wordings in PLACES.items() for words in wordings}
NAMES = "|".join(name for _, name, *_ in CATEGORIES.values())
SWAPPED = re.compile(  # phrases with a place or "leftmost", without an anchor
    rf"(?:an?|the) (?:(?P<word>{'|'.join(COLOURS)}|leftmost|rightmost) )?(?P<name>{NAMES})"
    rf"(?: (?P<place>{'|'.join(PLACE_OF)}))?"
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


class Asked(Dataset):
    """Items of a data set, {index: phrase to ask}; `mirror` turns the pictures' left and right."""

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
    """The masks of a data set's items, bool (H, W) at the size that theirs are stored at."""
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
    word, name, place = match["word"], match["name"], PLACE_OF.get(match["place"])
    same = [o for o in objects if CATEGORIES[o.category][1] == name]

    def fits(o: Object) -> bool | None:
        if word in ("leftmost", "rightmost"):
            return is_most(o, [p for p in same if p is not o], word) if len(same) > 1 else None
        return False if word and o.colour != word else is_at(o, place)

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
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"


def heard(phrase: str) -> str:
    """A phrase without its article and capitals."""
    return phrase.lower().partition(" ")[2]


def by_novelty(rows: list[dict], facts: list[dict], told: set[str]) -> str:
    """Rows of the first table by what training has said: of the kinds of which it has said some phrases and others not,
    both; and where colours and categories were kept apart (scenes.py --hold-out), phrases with such a pair and the like."""
    text, pairs = "", [f"{colour} {name}" for colour in COLOURS for _, name, *_ in CATEGORIES.values()]
    new = [pair for pair in pairs if not any(pair in t for t in told)]
    groups = {}
    for row, fact in zip(rows, facts):
        said = heard(fact["phrase"])
        groups.setdefault((fact["kind"], said in told), []).append(row)
        if new and any(pair in said for pair in pairs):
            groups.setdefault(("a colour and a category", not any(pair in said for pair in new)), []).append(row)
    for kind in sorted({kind for kind, _ in groups}):
        if (kind, True) in groups and (kind, False) in groups:
            how = ("together", "together") if kind.startswith("a colour") else ("word for word", "so")
            text += line(f"{kind}, said {how[0]} in training", groups[kind, True])
            text += line(f"{kind}, never said {how[1]} in training", groups[kind, False])
    return text


def tables(model, dataset, facts: list[dict], seed: int, told: set[str] | None) -> str:
    """The two tables; told: what the training set's phrases say (`heard`), or None where it is not at hand."""
    files, phrases = [f["file"] for f in facts], [f["phrase"] for f in facts]
    truth = [f["target"].mask for f in facts]
    plain = answers(model, Asked(dataset, dict(enumerate(phrases))))
    rows = rows_of(plain, truth, files)

    def chosen(holds) -> list[dict]:
        return [row for row, fact in zip(rows, facts) if holds(fact)]

    text = head("phrases", "mIoU (95 %)", "Pr@0.5", "number") + line("all", rows)
    for kind in sorted({f["kind"] for f in facts}):
        text += line(kind, chosen(lambda f, kind=kind: f["kind"] == kind))
    for n in sorted({f["others"] for f in facts}):
        name = f"{n or 'no'} other{'s' * (n != 1)} of the category in the image"
        text += line(name, chosen(lambda f, n=n: f["others"] == n))
    if told is not None:
        text += by_novelty(rows, facts, told)

    def asked(name: str, index: list[int], say: list[str] | None, targets=None, mirror: bool = False) -> str:
        """The row of phrases said in place of those at `index`; targets: masks by index, else the phrases' own."""
        if not index:
            return ""
        targets = targets or truth
        masks = [plain[i] for i in index]
        if say:
            masks = answers(model, Asked(dataset, dict(zip(index, say)), mirror))
            masks = [mask[:, ::-1] for mask in masks] if mirror else masks
        moved = np.mean([sample_iou(*iou_counts(mask, plain[i]), "ours") < 0.5 for mask, i in zip(masks, index)])
        changed = rows_of(masks, [targets[i] for i in index], [files[i] for i in index])
        return line(name, changed, f"{100 * moved:.1f}" if say else "")

    every = list(range(len(facts)))
    samples = dataset.samples
    shuffled = [samples[i].phrases[j] for i, j in Shuffled(dataset, seed).donors]
    several = [i for i in every if facts[i]["others"]]
    alone = [f"The {CATEGORIES[facts[i]['target'].category][1]}" for i in several]
    sided = [i for i in every if flip_phrase(phrases[i], True, False) != phrases[i]]
    flipped = {i: flip_phrase(phrases[i], True, False) for i in sided}
    found = {i: swapped_target(flipped[i], facts[i]["objects"]) for i in sided}
    found = {i: o.mask for i, o in found.items() if o is not None}

    text += "\n" + head("what is said", "mIoU (95 %)", "Pr@0.5", "moved", "number")
    text += asked("the phrase", every, None)
    text += asked("a phrase of another image", every, shuffled)
    text += asked("the phrase, where others of the category are in the image", several, None)
    text += asked("the category alone there", several, alone)
    text += asked("the phrase, where it says left or right", sided, None)
    text += asked("left and right swapped there", sided, list(flipped.values()))
    text += asked("... against what it then names, where it clearly names something", list(found),
                  [flipped[i] for i in found], found)  # fmt: skip
    text += asked("left and right swapped in the phrase and in the image", sided, list(flipped.values()), mirror=True)
    return text


def cell(image: np.ndarray, mask: np.ndarray, caption: str, size: int = 256) -> np.ndarray:
    """uint8 RGB (size + 24, size, 3): the image, lit where the mask is, under a line of text."""
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)
    mask = cv2.resize(mask.astype(np.float32), (size, size), interpolation=cv2.INTER_LINEAR)[..., None]
    text = np.full((24, size, 3), 255, np.uint8)
    cv2.putText(text, caption, (4, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([text, (image * (0.25 + 0.75 * mask)).astype(np.uint8)])


def figure(path: Path, model, dataset, facts: list[dict], number: int = 4) -> None:
    """A row a scene: the image, and the answers to a phrase, to the phrase with left and right swapped, to the category alone.

    The first scenes are taken in which the swapped phrase names another object, whatever the model makes of them."""
    rows, seen = [], set()
    for i, fact in enumerate(facts):
        phrase, flipped = fact["phrase"], flip_phrase(fact["phrase"], True, False)
        other = swapped_target(flipped, fact["objects"]) if flipped != phrase else None
        if other is None or other is fact["target"] or fact["file"] in seen or len(rows) == number:
            continue
        seen.add(fact["file"])
        say = [phrase, flipped, f"The {CATEGORIES[fact['target'].category][1]}"]
        image = dataset[i]["image"].permute(1, 2, 0).numpy()
        masks = [answers(model, Asked(dataset, {i: text}))[0] for text in say]
        cells = [cell(image, mask, text) for mask, text in zip(masks, say)]
        rows.append(np.concatenate([cell(image, np.ones((1, 1)), ""), *cells], axis=1))
    if not rows:
        raise UserError(f"no scene fits the figure: ask for more --scenes than {len({f['file'] for f in facts})}")
    cv2.imwrite(str(path), cv2.cvtColor(np.concatenate(rows), cv2.COLOR_RGB2BGR))


def training_phrases(checkpoint: dict) -> set[str] | None:
    """What the phrases of the checkpoint's training set say, as `heard`; None, with a word of it, where it is not here."""
    try:
        samples = read_samples(checkpoint["data"])[2] if checkpoint["data"] else []
    except UserError:
        samples = []
    if not samples:
        name = checkpoint["data"] or "The training set"
        print(f"{name} is not at hand: not told apart is what training has said and what it has not.\n")
        return None
    return {heard(phrase) for s in samples if s.split == "train" for phrase in s.phrases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="best.pt")
    parser.add_argument("--data", help="a data set, to shuffle its phrases; default: new generated scenes")
    parser.add_argument("--split", default="val", help="of --data (default: val)")
    parser.add_argument(
        "--scenes", type=int, default=300, help="generated scenes, about five phrases each (default: 300)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the scenes and of the shuffle (default: 1)")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw scenes with the answers to several phrases")
    args = parser.parse_args()
    try:
        if args.figure and (args.data or args.figure.exists()):
            raise UserError(f"--figure {args.figure} needs a new file, and generated scenes in place of --data")
        if args.figure and not (args.figure.suffix == ".png" and args.figure.parent.is_dir()):
            raise UserError(f"--figure {args.figure}: give a name that ends in .png, in a folder that exists")
        model, checkpoint = load_checkpoint(args.ckpt, "cuda" if torch.cuda.is_available() else "cpu")
        sizes = {"image_size": model.preset.image_size, "encoder_size": model.union_encoder.image_size}
        if args.data:
            dataset = open_dataset(args.data, args.split, **sizes)
            sets = {"phrases as they are": dataset, "phrases shuffled": Shuffled(dataset, args.seed)}
            print(
                table({name: summarise_scored(score(model, data, title=name), "ours") for name, data in sets.items()})
            )
            return
        told = training_phrases(checkpoint)
        with tempfile.TemporaryDirectory() as scratch:
            make_scenes(Path(scratch) / "scenes", 0, 0, max(2, args.scenes), seed=args.seed, progress=False)
            dataset = open_dataset(str(Path(scratch) / "scenes"), "test", **sizes)
            facts = describe(dataset, args.seed)
            print(tables(model, dataset, facts, args.seed, told))
            if args.figure:
                figure(args.figure, model, dataset, facts)
                print(f"wrote {args.figure}")
    except (UserError, UserError) as error:
        print(f"language.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
