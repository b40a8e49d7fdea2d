"""Masks of images of any size: small ones in one look, large ones in overlapping tiles, rows by rows.

    for top, logits in segment_rows(model, scene, phrase, tile, tiling): ...     float32 (h, W), top to bottom

A scene (see raster.py) larger than a tile is covered by tiles of tile x tile pixels, each resized to the model's size.
Neighbours overlap by a quarter; their logits are averaged with a raised-cosine window, so that what a tile says near its
own border, where it sees objects cut off, counts little. Only the rows of one band of tiles are in memory. Two ways:

    scene        The phrase is about the whole scene ("the ship on the upper left"), so a coarse pass over the scene at
                 the model's size finds where it points. Tiles that touch the coarse mask, grown by MARGIN cells of the
                 coarse grid, are looked at again with the same phrase, and their logits are added to the coarse ones.
                 A tile does not know which of several ships is the one on the upper left, so nothing outside the grown
                 coarse mask is foreground, whatever a tile says; and a tile's vote counts as much as it agrees with the
                 coarse mask (their IoU inside the tile): one that sees nothing, or something else, leaves it as it is.
                 What is too small to be seen in the whole scene at the model's size is not found.
    independent  Every tile is asked for the phrase on its own: for phrases that name all of a kind ("the ships") and
                 objects that are small in the scene. Position words then refer to each tile.
"""

import itertools
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from data import resize_image
from evaluate import autocast
from layouts import UserError, clean_phrase
from raster import PlainImage, open_scene, pil_pixels

LARGE = 2048  # pixels a side: beyond, a scene is tiled by itself
TILE = 1024  # pixels a side of a tile, where none is given
STRIP = 256  # rows that are given out at once
MARGIN = 2  # cells of the coarse mask, by which it is grown
TILINGS = ("scene", "independent")


def segment(model, image, phrase, tile: int | None = None, tiling: str = "scene", batch: int = 8):
    """The mask of what the phrase names: bool (H, W), of the image as it is meant to be seen (EXIF rotation obeyed).

    image: a path, a PIL image or uint8 RGB (H, W, 3). phrase: a string. A list of images, of phrases or of both gives a
    list of masks; two lists are pairs. Images over LARGE pixels a side are cut into tiles by themselves, those over
    `tile` where it is given; `tiling` is one of TILINGS, see the head of this file. UserError in one sentence.
    """
    if tiling not in TILINGS:
        raise UserError(f"tiling {tiling!r} is unknown: it is one of {', '.join(TILINGS)}.")
    many = [isinstance(x, (list, tuple)) for x in (image, phrase)]
    length = max((len(x) for x, listed in zip((image, phrase), many) if listed), default=1)
    images, phrases = (list(x) if listed else [x] * length for x, listed in zip((image, phrase), many))
    if len(images) != len(phrases):
        raise UserError(f"{len(images)} images and {len(phrases)} phrases are no pairs: give as many of both.")
    phrases = [clean_phrase(text, f"phrase {n}") for n, text in enumerate(phrases, start=1)]
    for note in filter(None, (cut_note(model, text) for text in phrases)):
        warnings.warn(note, stacklevel=3)
    masks = []
    for some in batches(zip(images, phrases), batch):
        scenes = [as_scene(image) for image, _ in some]
        small = [n for n, scene in enumerate(scenes) if not is_large(scene, tile)]
        logits = iter(())
        if small:
            looks = model_logits(model, [scenes[n].read_all() for n in small], [some[n][1] for n in small])
            logits = iter(looks.split(1))
        for scene, (_, text) in zip(scenes, some):
            if is_large(scene, tile):
                mask = np.zeros((scene.height, scene.width), bool)
                for top, rows in segment_rows(model, scene, text, tile, tiling, batch):
                    mask[top : top + len(rows)] = rows > 0
            else:
                mask = at_size(next(logits), (scene.height, scene.width)) > 0
            valid = scene.valid(0, scene.height)
            masks.append(mask if valid is None else mask & valid)
    return masks if any(many) else masks[0]


def as_scene(image):
    """A scene (see raster.py) of a path, a PIL image or a uint8 array (H, W, 3)."""
    if isinstance(image, (str, Path)):
        return open_scene(image)
    if isinstance(image, Image.Image):
        return PlainImage(pil_pixels(image))
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise UserError(f"An image is a path, a PIL image or a uint8 array (H, W, 3), not {found}.")
    if 0 in image.shape:
        raise UserError(f"The image is empty: its shape is {image.shape}.")
    return PlainImage(image)


def cut_note(model, phrase: str) -> str:
    """A sentence where the phrase is longer than the model reads, else ''."""
    tokenizer = model.union_encoder.tokenizer
    length = tokenizer.length(phrase)
    if length <= tokenizer.context:
        return ""
    return f"The phrase has {length:,} tokens, the model reads the first {tokenizer.context}: what follows has no say."


@torch.inference_mode()
def model_logits(model, images: list[np.ndarray], phrases: list[str]) -> torch.Tensor:
    """uint8 RGB images (H, W, 3) of any sizes, a phrase for each -> mask logits (B, 1, S/4, S/4) float32, on the CPU."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    planes = [
        torch.stack([resize_image(image, size) for image in images]).to(device)
        for size in (model.preset.image_size, model.union_encoder.image_size)
    ]
    ids, lengths = model.union_encoder.tokenizer(phrases)
    with autocast(device):
        output = model(*model.normalise(*planes), ids.to(device), lengths.to(device))
    model.train(training)
    return output.logits.float().cpu()


def at_size(logits: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Logits (1, 1, h, w) -> float32 (H, W), resized as evaluate.py does."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)[0, 0].numpy()


def is_large(scene, tile: int | None) -> bool:
    """Whether the scene is cut into tiles: if larger than the tile asked for, or without one, than LARGE."""
    return max(scene.height, scene.width) > (tile or LARGE)


def segment_rows(model, scene, phrase: str, tile: int | None = None, tiling: str = "scene", batch: int = 8):
    """Yield (top, logits (h, W) float32) of consecutive strips of rows from top to bottom: a large scene in tiles."""
    coarse = None if tiling == "independent" else Coarse(model, scene, phrase)
    for top, logits in blend(model, scene, phrase, tile or TILE, batch, coarse):
        yield top, coarse.refined(top, logits) if coarse else logits


class Coarse:
    """What the model says of the whole scene at its own size, and what tiles may add to it."""

    def __init__(self, model, scene, phrase: str):
        logits = model_logits(model, [scene.overview], [phrase])
        grown = F.max_pool2d(logits, 2 * MARGIN + 1, stride=1, padding=MARGIN)
        self.logits, self.grown = logits[0, 0].numpy(), grown[0, 0].numpy()  # (h, w), positive on the (grown) mask
        self.size = scene.height, scene.width

    def at(self, grid: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
        """A window of the grid at the scene's size, as `at_size` would give it."""
        down = interpolation(grid.shape[0], self.size[0], top, top + height)  # (height, h)
        across = interpolation(grid.shape[1], self.size[1], left, left + width)  # (width, w)
        return down @ grid @ across.T

    def wants(self, *window) -> bool:
        """Whether the grown mask has a cell that the window (top, left, height, width) takes from."""
        top, left, height, width = window
        down = interpolation(self.grown.shape[0], self.size[0], top, top + height).any(axis=0)  # (h,)
        across = interpolation(self.grown.shape[1], self.size[1], left, left + width).any(axis=0)  # (w,)
        return bool((self.grown[np.ix_(down, across)] > 0).any())

    def vote(self, logits: np.ndarray, *window) -> float:
        """The weight of a tile's logits at the window: the IoU of its mask, inside the grown one, and the coarse mask."""
        coarse = self.at(self.logits, *window) > 0
        fine = (logits > 0) & (self.at(self.grown, *window) > 0)
        return (coarse & fine).sum() / max(1, (coarse | fine).sum())

    def refined(self, top: int, logits: np.ndarray) -> np.ndarray:
        """The votes of the tiles (h, W) added to the coarse logits, nothing outside the grown mask."""
        window = top, 0, *logits.shape
        return np.minimum(self.at(self.logits, *window) + logits, self.at(self.grown, *window))


def interpolation(cells: int, size: int, start: int, stop: int) -> np.ndarray:
    """float32 (stop - start, cells): what each pixel takes from each cell, bilinear, align_corners=False."""
    place = np.clip((np.arange(start, stop) + 0.5) * (cells / size) - 0.5, 0, cells - 1)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(cells))).astype(np.float32)


def starts(length: int, tile: int) -> list[int]:
    """Where tiles begin along a side: all whole, spread evenly, a quarter of overlap or more."""
    if length <= tile:
        return [0]
    steps = -(-(length - tile) // (tile - tile // 4))
    return [n * (length - tile) // steps for n in range(steps + 1)]


def window(length: int) -> np.ndarray:
    """Raised cosine over a tile's side, positive everywhere: float32 (length,)."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * (np.arange(length) + 0.5) / length)).astype(np.float32)


def blend(model, scene, phrase: str, tile: int, batch: int, coarse: Coarse | None = None):
    """Yield (top, logits (h, W)) of strips of rows: the tiles' logits, averaged by their windows.

    With a coarse mask, tiles it does not want are not run and say 0, neither yes nor no; the others have their vote.
    """
    height, width = min(tile, scene.height), min(tile, scene.width)
    tops, lefts = starts(scene.height, tile), starts(scene.width, tile)
    down, across = window(height), window(width)
    weight_across = np.zeros(scene.width, np.float32)
    for left in lefts:
        weight_across[left : left + width] += across
    sums, weight_down = np.zeros((height, scene.width), np.float32), np.zeros(height, np.float32)

    for top, following in zip(tqdm(tops, "rows of tiles", leave=False, disable=None), [*tops[1:], scene.height]):
        chosen = [left for left in lefts if coarse is None or coarse.wants(top, left, height, width)]
        for some in batches(chosen, batch):
            images = [scene.read(top, left, height, width) for left in some]
            for left, logits in zip(some, model_logits(model, images, [phrase] * len(some)).split(1)):
                logits = at_size(logits, (height, width))
                vote = coarse.vote(logits, top, left, height, width) if coarse else 1
                sums[:, left : left + width] += vote * logits * (down[:, None] * across)
        weight_down += down
        done = following - top  # rows that no later tile reaches
        for row in range(0, done, STRIP):
            rows = slice(row, min(row + STRIP, done))
            yield top + row, sums[rows] / (weight_down[rows, None] * weight_across)
        for held in (sums, weight_down):
            held[: height - done] = held[done:].copy()
            held[height - done :] = 0


def batches(items, size: int):
    """Lists of `size` items each, the last one perhaps shorter."""
    items = iter(items)
    while some := list(itertools.islice(items, size)):
        yield some
