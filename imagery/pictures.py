"""The picture that shows a result: the scene dimmed, the mask lit and outlined, the phrase below."""

import functools
import unicodedata

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

LONGEST = 1600  # pixels of the picture's longer side, reduced to
SHORTEST = 512  # and, for small images, enlarged to
# Looked for by name in the system's font folders, for phrases with letters that PIL's own font lacks.
FONTS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "arial.ttf", "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf",
    "wqy-zenhei.ttc", "wqy-microhei.ttc", "DroidSansFallbackFull.ttf", "msyh.ttc", "PingFang.ttc", "meiryo.ttc",
    "malgun.ttf", "NotoSansArabic-Regular.ttf", "NotoSansHebrew-Regular.ttf", "NotoSansDevanagari-Regular.ttf",
    "NotoSansThai-Regular.ttf", "Nirmala.ttf", "Arial Unicode.ttf", "unifont.ttf", "unifont.otf",
)  # fmt: skip


class SmallMask:
    """A mask at the overlay's size, made from bands of rows; a pixel is set if any that it covers is."""

    def __init__(self, height: int, width: int):
        scale = min(1, LONGEST / max(height, width))
        self.height, self.width = height, width
        self.pixels = np.zeros((max(1, round(height * scale)), max(1, round(width * scale))), bool)

    def add(self, top: int, rows: np.ndarray) -> None:
        """rows: bool (h, W), the band that begins at `top`."""
        height, width = self.pixels.shape
        columns = -(-np.arange(width) * self.width // width)  # where the first pixel of each column lies
        reduced = np.logical_or.reduceat(rows, columns, axis=1)
        np.logical_or.at(self.pixels, np.arange(top, top + len(rows)) * height // self.height, reduced)


def overlay(picture: np.ndarray, mask: np.ndarray, phrase: str) -> Image.Image:
    """picture uint8 RGB of any size and the same scene's mask, bool (h, w), which gives the size -> the picture."""
    factor = max(1, SHORTEST // max(mask.shape))
    height, width = (side * factor for side in mask.shape)
    lit = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    shrinks = picture.shape[0] > height or picture.shape[1] > width
    picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    picture = np.where(lit[..., None] > 0, picture, picture // 2)
    outlines, _ = cv2.findContours(lit, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, outlines, -1, (255, 220, 0), 2 if min(height, width) > 100 else 1)

    size = 18 if max(height, width) < 1000 else 26
    font, text = font_for(phrase, size)
    lines = wrapped(text, font, max(width, SHORTEST) - 16)
    strip = len(lines) * (size + 8) + 12
    canvas = Image.new("RGB", (max(width, SHORTEST), height + strip), "white")
    canvas.paste(Image.fromarray(picture), ((canvas.width - width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    for n, line in enumerate(lines):
        draw.text((8, height + 6 + n * (size + 8)), line, "black", font)
    return canvas


@functools.lru_cache
def font_for(phrase: str, size: int) -> tuple[ImageFont.ImageFont, str]:
    """A font that has the phrase's letters, and the phrase; or, where none is installed, a line that says so."""
    text = " ".join(phrase.split())
    letters = {
        c for c in text if unicodedata.category(c)[0] in "LNPS"
    }  # marks combine: they have no glyph of their own
    default = ImageFont.load_default(size)
    if all(" " < c < "\x7f" for c in letters):
        return default, text
    for name in FONTS:
        try:
            font = ImageFont.truetype(name, size)
        except OSError:
            continue
        missing = bytes(font.getmask("\U0010fffe"))  # what the font draws for a letter it lacks
        if all(bytes(font.getmask(letter)) != missing for letter in letters):
            return font, text
    return default, "(No font of this system has the phrase's letters: see results.jsonl.)"


def wrapped(text: str, font, width: int, most: int = 3) -> list[str]:
    """The text in at most so many lines of at most so many pixels, cut between words where there are any."""
    lines = []
    while text and len(lines) < most:
        n = 1
        while n < len(text) and font.getlength(text[: n + 1]) <= width:
            n += 1
        if n < len(text):
            blank = text.rfind(" ", 0, n + 1)
            n = blank if blank > 0 else n
        lines.append(text[:n])
        text = text[n:].lstrip()
    if text:
        lines[-1] = lines[-1][:-3] + "..."
    return lines
