"""The painter of every picture that people look at: predictions, panels, contact sheets, figures.

Pictures are uint8 RGB arrays (H, W, 3). A row of a panel, with a line of text above it:

    cell = fitted(image, 256, 256)
    row = captioned(grid([[cell, lit(cell, truth), lit(cell, prediction)]]), f"IoU {iou:.2f}  {phrase}")
"""

import functools
import html
import os
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
    """The picture with a white strip above it (or below) that holds the text, in any script, by Pango and the Noto fonts.

    The text has letters of `size` pixels and at most `lines` lines, as many as it needs; "..." stands for the rest of it.
    """
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    letters = shown = "".join(c for c in text if c.isprintable() or c in JOINERS)
    width, line = image.shape[1], size + 6
    while len(ink := shaped(shown, max(1, width - 12), size)) > line * lines and len(letters) > 1:
        letters = letters[: int(len(letters) * min(0.95, 1.2 * line * lines / len(ink)))]
        shown = letters + "..."
    rows = min(lines, -(-len(ink) // line))
    strip = np.full((line * rows + 6, width, 3), 255, np.uint8)
    part = strip[3:-3, 6:]
    ink = ink[: part.shape[0], : part.shape[1]]
    part[: len(ink), : ink.shape[1]] -= ink[..., None]
    return np.concatenate([image, strip] if below else [strip, image])


def shaped(text: str, width: int, size: int) -> np.ndarray:
    """The text wrapped to `width` pixels, its letters joined and ordered as their script asks. uint8 (h, w), 255 = black."""
    if not text.strip(f" {JOINERS}"):
        return np.zeros((size, 1), np.uint8)
    options = {"font": f"Noto Sans, Noto Sans CJK SC {size}px", "width": width, "wrap": "word-char", "dpi": 72}
    return load_pango().Image.text(html.escape(text), **options).numpy()


@functools.cache
def load_pango():
    """pyvips, which knows the fonts of manimgx-fonts and its CJK part; imported where a text is drawn. Letters that they lack
    are taken from the system's fonts."""
    import manimgx_fonts
    import manimgx_fonts_cjk
    import pyvips

    os.environ.setdefault("FONTCONFIG_FILE", str(Path(__file__).with_name("fonts.conf")))  # complains where there is none
    for package in (manimgx_fonts, manimgx_fonts_cjk):
        for path in sorted(Path(package.__file__).parent.glob("*.tt[fc]")):
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
