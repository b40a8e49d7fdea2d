"""Predictions in COCO's form of results, whoever made them: a JSON list with an entry for each sample and phrase,

    {"id": "17", "image": "00017.jpg", "phrase": "the ship", "segmentation": {"size": [H, W], "counts": RLE}, "score": 0.93}

image: the file's name, without folders. id: the sample's; it may be left out. score: for whoever reads it, no metric takes it.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pycocotools import mask as coco

from annotations.layouts import read_json
from annotations.masks import decode_rle
from runtime.errors import UserError


def encode(mask: np.ndarray) -> dict:
    """Mask (H, W) of 0 and 1 -> COCO RLE, as JSON takes it."""
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(map(int, rle["size"])), "counts": rle["counts"].decode()}


def to_json(rows: list[dict]) -> bytes:
    """The file's content, of rows that hold id, file, phrase, segmentation and confidence."""
    entries = [
        {"id": row["id"], "image": os.path.basename(row["file"]), "phrase": row["phrase"],
         "segmentation": row["segmentation"], "score": round(row["confidence"], 4)}
        for row in rows
    ]  # fmt: skip
    return ("[" + ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries) + "]\n").encode()


def read_predictions(path: str | Path, wanted: Sequence[tuple[str, str, str]]) -> tuple[list[dict], int]:
    """(the RLE for each of the wanted (id, image's path, phrase), how many entries of the file are for none of these).

    An entry without an id is for every sample with its image and phrase. Phrases are compared without regard to capitals and
    repeated spaces. UserError where an entry is broken, where two for the same contradict each other, or one is missing.
    """
    by_id, by_name, used = {}, {}, set()
    for number, entry in enumerate(_entries(path), start=1):
        try:
            image, phrase, rle = os.path.basename(entry["image"]), _plain(entry["phrase"]), entry["segmentation"]
            decode_rle(rle)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{path}, entry {number} is no prediction ({reason}): it needs image, phrase and "
                            f"segmentation, an RLE") from None  # fmt: skip
        key = (str(entry["id"]), image, phrase) if entry.get("id") is not None else (image, phrase)
        if (by_id if len(key) == 3 else by_name).setdefault(key, rle) != rle:
            raise UserError(f"{path} has two different masks for {image}, {entry['phrase']!r}: leave one, or give each its id")
    _refuse_ambiguous(path, wanted, by_name)
    found = []
    for id, file, phrase in wanted:
        short = (os.path.basename(file), _plain(phrase))
        key = (id, *short) if (id, *short) in by_id else short
        used.add(key)
        found.append(by_id.get(key) or by_name.get(key))
    if missing := [sample for sample, rle in zip(wanted, found) if rle is None]:
        id, file, phrase = missing[0]
        first = f"the first: {phrase!r} of {os.path.basename(file)}, id {id}"
        raise UserError(f"{path} has no prediction for {len(missing):,} of {len(wanted):,} phrases ({first}): give each of "
                        f"them one, an empty mask where nothing is found")  # fmt: skip
    return found, len((by_id.keys() | by_name.keys()) - used)


def _entries(path: str | Path) -> list:
    try:
        entries = read_json(Path(path))
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror or error}): name a file of predictions") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} is no JSON list of predictions: it needs an entry for each phrase, with image, phrase and "
                        f"segmentation")  # fmt: skip
    return entries


def _refuse_ambiguous(path: str | Path, wanted: Sequence[tuple[str, str, str]], by_name: dict) -> None:
    """Two images of different folders may share their name and a phrase: then only an id tells them apart."""
    files = {}
    for _, file, phrase in wanted:
        key = (os.path.basename(file), _plain(phrase))
        if key in by_name and files.setdefault(key, file) != file:
            raise UserError(f"{path}: {key[0]} is the name of two images, {files[key]} and {file}: give each entry its id")


def _plain(phrase: str) -> str:
    return " ".join(phrase.lower().split())
