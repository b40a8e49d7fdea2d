"""The painter of every picture that people look at: predictions, panels, contact sheets, figures.

Pictures are uint8 RGB arrays (H, W, 3). A row of a panel, with a line of text above it:

    cell = fitted(image, 256, 256)
    row = captioned(grid([[cell, lit(cell, truth), lit(cell, prediction)]]), f"IoU {iou:.2f}  {phrase}")
"""

import functools
import html
import os
import textwrap
import unicodedata
from pathlib import Path

import cv2
import numpy as np

JOINERS = "\u200c\u200d"  # they join letters and emoji, or keep letters apart


def fitted(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The picture at another size, smooth whether it shrinks or grows."""
    shrinks = image.shape[0] > height or image.shape[1] > width
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def lit(image: np.ndarray, mask: np.ndarray, dim: float = 0.2) -> np.ndarray:
    """The picture as it is where the mask is 1 and `dim` times as bright where it is 0.

    mask: bool or float (h, w) in [0, 1], of any size; stretched over the picture, smooth.
    """
    mask = fitted(mask.astype(np.float32), *image.shape[:2])  # (H, W)
    return (image * (dim + (1 - dim) * mask[..., None])).astype(np.uint8)


def outlined(image: np.ndarray, mask: np.ndarray, colour=(255, 220, 0), width: int = 2) -> np.ndarray:
    """The picture with the outline of the mask, bool (h, w) of any size, drawn `width` pixels wide."""
    shape = image.shape[1], image.shape[0]
    mask = cv2.resize(mask.astype(np.uint8), shape, interpolation=cv2.INTER_NEAREST)
    outlines, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(image.copy(), outlines, -1, colour, width)


def captioned(image: np.ndarray, text: str, below: bool = False, lines: int = 1, size: int = 14) -> np.ndarray:
    """The picture with a white strip above it (or below) that holds the text, in any script.

    The text has letters of `size` pixels and at most `lines` lines, as many as it needs; "..." stands for the rest of it.
    OpenCV's own font draws what it has and nothing needs to shape; Pango (pyvips) and the Noto fonts draw all other text.
    """
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    letters = "".join(c for c in text if c.isprintable() or c in JOINERS)
    draw = plain_text if all(map(is_plain, letters)) else shaped_text
    strip = cv2.cvtColor(draw(letters, image.shape[1], lines, size), cv2.COLOR_GRAY2RGB)
    return np.concatenate([image, strip] if below else [strip, image])


@functools.cache
def is_plain(letter: str) -> bool:
    """Whether OpenCV's own font has the letter, for which it draws "?" otherwise, and the letter stands for itself: it runs
    from left to right and changes no other."""
    if unicodedata.bidirectional(letter) in ("R", "AL") or unicodedata.category(letter)[0] == "M" or letter in JOINERS:
        return False
    return letter in "? " or not np.array_equal(*(plain_text(text, 40, 1, 14) for text in (letter, "?")))


def plain_text(letters: str, width: int, lines: int, size: int) -> np.ndarray:
    """Black text on white in OpenCV's own font: Latin, Greek, Cyrillic, Chinese, Japanese, Korean. uint8 (H, width)."""
    font = cv2.FontFace("sans")
    length = cv2.getTextSize((0, 0), letters, (0, 0), font, size)[2]
    fit = 0.95 * (width - 12) * len(letters) / max(1, length)  # letters to a line, on average
    rows = textwrap.wrap(letters, max(3, int(fit)), max_lines=lines, placeholder="...") or [""]
    strip = np.full(((size + 6) * len(rows) + 6, width), 255, np.uint8)
    for n, row in enumerate(rows, start=1):
        cv2.putText(strip, row, (6, (size + 6) * n - 3), (0,), font, size)
    return strip


def shaped_text(letters: str, width: int, lines: int, size: int) -> np.ndarray:
    """Black text on white by Pango, which joins, orders and wraps letters as their script asks. uint8 (H, width)."""
    pyvips, height, shown = load_pango(), int(1.5 * size * lines), letters
    while True:
        options = {"font": f"Noto Sans {size}px", "width": max(1, width - 12), "wrap": "word-char", "dpi": 72}
        ink = pyvips.Image.text(html.escape(shown), **options).numpy()  # (h, w), 255 for black
        if len(ink) <= height or len(letters) < 2:
            break
        letters = letters[: int(0.95 * len(letters))]
        shown = letters + "..."
    strip = np.zeros((min(len(ink), height) + 10, width), np.uint8)
    part = strip[5:-5, 6:]
    ink = ink[: part.shape[0], : part.shape[1]]
    part[:, : ink.shape[1]] = ink
    return 255 - strip


@functools.cache
def load_pango():
    """pyvips, which knows the fonts of manimgx-fonts; imported where a text needs it. Other letters are the system's fonts'."""
    import manimgx_fonts
    import pyvips

    os.environ.setdefault("FONTCONFIG_FILE", str(Path(__file__).with_name("fonts.conf")))  # complains where there is none
    for path in sorted(Path(manimgx_fonts.__file__).parent.glob("*.ttf")):
        pyvips.Image.text("x", fontfile=str(path))
    return pyvips


def grid(rows: list[list[np.ndarray]], gap: int = 0) -> np.ndarray:
    """Rows of pictures as one picture, on white: columns are as wide and rows as high as their largest picture."""
    widths = [max(row[n].shape[1] for row in rows if n < len(row)) for n in range(max(map(len, rows)))]
    heights = [max(picture.shape[0] for picture in row) for row in rows]
    canvas = np.full((sum(heights) + gap * (len(heights) - 1), sum(widths) + gap * (len(widths) - 1), 3), 255, np.uint8)
    for row, height, bottom in zip(rows, heights, np.cumsum([h + gap for h in heights])):
        for picture, right, width in zip(row, np.cumsum([w + gap for w in widths]), widths):
            top, left = bottom - gap - height, right - gap - width
            canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return canvas
