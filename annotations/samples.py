"""What every layout is read to: samples, with their phrases and text files checked."""

import re
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import UserError
from runtime.files import file_bytes

MAX_PHRASE = 10_000  # characters


@dataclass(frozen=True, slots=True)
class Sample:
    """One target in one image, and every phrase for it."""
    id: str                             # unique within a split: the ref_id, the list's id, or the names of the files
    split: str
    image: str                          # path
    phrases: tuple[str, ...]
    kinds: tuple[str, ...]              # of each phrase; '' where the data set doesn't say
    category: str                       # '' if unknown
    mask: str | tuple                   # path of a mask file, or COCO RLEs and polygons: their union; (): no target
    size: tuple[int, int] | None = None  # (H, W) that polygons are drawn at; None: the image's
    threshold: int | None = 0           # foreground of a mask file is what lies above; None: its one colour but black
    annotation: object = None           # id or ids of the mask, where the data set numbers them


def read_text(path: Path) -> str:
    data = file_bytes(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line} is not UTF-8: save the file in that encoding.") from None
    if "\0" in text:  # the csv module refuses it on Python 3.10 and takes it from 3.11 on
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise UserError(f"{path}, line {line} holds NUL: take it out.")
    return text


def clean_phrase(text, where: str) -> str:
    """The phrase without the blanks around it; double spaces and typos inside stay."""
    text = text.strip() if isinstance(text, str) else ""
    if not any(c.isprintable() and c != " " for c in text):  # nor are zero-width characters alone a phrase
        raise UserError(f"{where}: the phrase is empty; write one, or take the sample out.")
    if len(text) > MAX_PHRASE:
        raise UserError(f"{where}: the phrase has {len(text):,} characters, at most {MAX_PHRASE:,} are taken.")
    if re.search("[\x00-\x08\x0e-\x1f\ud800-\udfff]", text):
        raise UserError(f"{where}: the phrase holds NUL or other control characters; take them out.")
    return text
