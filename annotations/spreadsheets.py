"""Spreadsheets as people save them: data of your own in phrases.csv, or any list with named columns."""

import csv
import functools
import io
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from annotations.samples import Sample, clean_phrase, read_text
from runtime.errors import UserError

COLUMNS, OPTIONAL = ("image", "mask", "phrase"), ("split", "category", "kind")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
          "test": "test", "testing": "test"}  # fmt: skip


def read_rows(path: Path, needed: tuple, optional: tuple = ()) -> Iterator[tuple[int, dict[str, str], bool]]:
    """(line, {column: text}, whether it has the header's fields) of the rows that are not blank.

    Fields are cut at commas, semicolons or tabs, whichever gives the most of the columns; case, blanks and order in the header
    do not matter, other columns are ignored, and the optional ones are in the dict where the header has them."""
    def names(row):
        return [name.strip().lower() for name in row]

    text = read_text(path)
    first = text.lstrip().split("\n", 1)[0]
    known = {*needed, *optional}
    try:
        delimiter = max(",;\t", key=lambda mark: len(known.intersection(*map(names, csv.reader([first], delimiter=mark)))))
    except csv.Error:  # said below, with its line
        delimiter = ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        header = names(next((row for row in reader if any(row)), []))
        header = header[: 1 + max((n for n, name in enumerate(header) if name), default=-1)]  # Excel adds empty ones
        if absent := [column for column in needed if column not in header]:
            raise UserError(f"{path} has the columns {', '.join(header)} but lacks {', '.join(absent)}: "
                            f"its first line must name {', '.join(needed)}.")
        for row in reader:
            row = [field.strip() for field in row]
            if any(row):
                whole = len(row) >= len(header) and not any(row[len(header) :])
                yield reader.line_num, {name: field for name, field in zip(header, row) if name in known}, whole
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not sound CSV ({error}): mend it.") from None


def read_csv(path: Path) -> list[Sample]:
    """Data of your own; rows with the same image and mask are one sample with several phrases, rows without a mask are
    phrases that have no target in the image."""
    rows, targets, categories = [], {}, {}
    for line, row, whole in read_rows(path, COLUMNS, OPTIONAL):
        where = f"{path}, line {line}"
        if not whole:
            raise UserError(f"{where} has not as many fields as the first line: quote phrases with commas.")
        rows.append((where, row | {"image": below("images", row["image"]), "mask": below("masks", row["mask"])}))
    drawn = {} if rows and "split" in rows[0][1] else draw_splits(path, {row["image"] for _, row in rows})
    for where, row in rows:
        image, mask, category = row["image"], row["mask"], row.get("category", "")
        split = row["split"] if "split" in row else drawn[image]
        if not (image and split):
            raise UserError(f"{where} has no image or split: fill them in.")
        if mask and categories.setdefault((image, mask), category) != category:
            raise UserError(f"{where} gives {mask} the category {category!r}, a row above {categories[image, mask]!r}: "
                            "a target has one.")
        phrases = targets.setdefault((image, mask, SPLITS.get(split.lower(), split), category), [])
        phrases.append((clean_phrase(row["phrase"], where), row.get("kind", "")))
    root = path.parent
    return [Sample(mask if image == mask else f"{image}+{mask or category}", split, os.path.join(root, "images", image),
                   *map(tuple, zip(*phrases)), category,
                   mask=os.path.join(root, "masks", mask) if mask else (),
                   threshold=127 if mask.lower().endswith((".jpg", ".jpeg")) else None)  # JPEG blurs 0 and 255
            for (image, mask, split, category), phrases in targets.items()]


def below(folder: str, path: str) -> str:
    """`images\\x.jpg`, `./images/x.jpg` and `x.jpg` -> x.jpg, for folder 'images'."""
    return path.replace("\\", "/").removeprefix("./").removeprefix(f"{folder}/")


def draw_splits(path: Path, images: Iterable[str]) -> dict[str, str]:
    """{image: split}: a tenth of the images, at least one, is val and as many are test, in an order that is drawn with each
    image's name as the seed: the same at every call, and nearly the same where images are added."""
    order = sorted(images, key=lambda image: random.Random(image).random())
    tenth = max(1, len(order) // 10)
    drawn = dict(zip(order, ["train"] * max(1, len(order) - 2 * tenth) + ["val"] * tenth + ["test"] * tenth))
    numbers = ", ".join(f"{split} {n:,}" for split, n in Counter(drawn.values()).items())
    say_once(f"{path} names no splits: they are drawn by image ({numbers}), the same every time")
    return drawn


@functools.cache
def say_once(sentence: str) -> None:
    print(sentence)
