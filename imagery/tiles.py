"""Mask logits of images of any size, for any model: small images in one look, large ones in overlapping tiles.

    for rows in scene_rows(look, scenes, phrases):     for each scene with its phrase
        for top, logits in rows: ...                   float32 (h, W) strips, from top to bottom

`look(images, phrases)` is the model: uint8 RGB images (H, W, 3) of any sizes and a phrase for each -> mask logits
(B, 1, h, w), float32 on the CPU.

A scene (see scenes.py) larger than a tile is covered by tiles of tile x tile pixels, each resized to the model's size.
Neighbours overlap by a quarter; their logits are averaged with a raised-cosine window, so that logits near a tile's own
border, where objects are cut off, count little. Only the rows of one band of tiles are in memory. Two ways (TILINGS):

    scene        The phrase is about the whole scene ("the ship on the upper left"), so a coarse pass over the scene at
                 the model's size finds where it points. Tiles that touch the coarse mask, grown by MARGIN cells of the
                 coarse grid, are looked at again with the same phrase, and their logits are added to the coarse ones.
                 A tile does not know which of several ships is the one on the upper left, so nothing outside the grown
                 coarse mask is foreground, whatever a tile says; and a tile's logits are weighted by its agreement with
                 the coarse mask (their IoU inside the tile): a tile that sees nothing, or something else, changes nothing.
                 What is too small to be seen in the whole scene at the model's size is not found.
    independent  Every tile is searched for the phrase on its own: for phrases that name all of a kind ("the ships") and
                 objects that are small in the scene. Position words then refer to each tile.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

from imagery.plain import Scene
from runtime.progress import Progress

LARGE = 2048  # pixels a side: larger scenes are tiled even where no tile is given
TILE = 1024  # pixels a side of a tile, where none is given
COARSE = 4  # times that a look is reduced, from which on objects of usual size may be lost
STRIP = 256  # rows that are given out at once
MARGIN = 2  # cells of the coarse mask, by which it is grown
TILINGS = ("scene", "independent")

Look = Callable[[list[np.ndarray], list[str]], torch.Tensor]
Rows = Iterable[tuple[int, np.ndarray]]  # (top, logits (h, W) float32) of consecutive strips from top to bottom


def scene_rows(
    look: Look, scenes: list[Scene], phrases: list[str], tile: int | None = None, tiling: str = "scene", batch: int = 8
) -> Iterator[Rows]:
    """The rows of each scene, with its phrase: the small scenes in one look, the large ones in tiles, `batch` at a time."""
    small = [(scene.read_all(), phrase) for scene, phrase in zip(scenes, phrases) if not is_large(scene, tile)]
    looks = iter(look(*map(list, zip(*small))).split(1) if small else ())
    for scene, phrase in zip(scenes, phrases):
        if is_large(scene, tile):
            yield tiled_rows(look, scene, phrase, tile, tiling, batch)
        else:
            yield [(0, at_size(next(looks), (scene.height, scene.width)))]


def at_size(logits: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Logits (1, 1, h, w) -> float32 (H, W), resized as for scoring."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)[0, 0].numpy()


def is_large(scene: Scene, tile: int | None) -> bool:
    """Whether the scene is cut into tiles: it is larger than the given tile or, without one, than LARGE."""
    return max(scene.height, scene.width) > (tile or LARGE)


def coarseness_note(scene: Scene, tile: int | None, tiling: str, side: int) -> str:
    """A sentence for where nothing is found in a scene that a model of `side` pixels has seen much reduced, else ''."""
    looked_at = min(tile or TILE, max(scene.height, scene.width)) if tiling == "independent" and is_large(scene, tile) else 0
    times = (looked_at or max(scene.height, scene.width)) / side
    if times < COARSE:
        return ""
    what = "each tile" if looked_at else "the whole image"
    return (f"Nothing was found, but {what} was reduced {times:.0f} times to the model's {side} pixels: with --tiling "
            f"independent --tile {side} each part of it is looked at by itself, unreduced.")  # fmt: skip


def tiled_rows(look: Look, scene: Scene, phrase: str, tile: int | None, tiling: str, batch: int) -> Rows:
    """The rows of a large scene, in tiles."""
    coarse = None if tiling == "independent" else CoarseMask(look, scene, phrase)
    for top, logits in blend(look, scene, phrase, tile or TILE, batch, coarse):
        yield top, coarse.refined(top, logits) if coarse else logits


class CoarseMask:
    """The model's logits for the whole scene at the model's own size, and how far tiles may change them."""

    def __init__(self, look: Look, scene: Scene, phrase: str):
        logits = look([scene.overview], [phrase])  # (1, 1, h, w)
        grown = F.max_pool2d(logits, 2 * MARGIN + 1, stride=1, padding=MARGIN)  # (1, 1, h, w)
        self.logits, self.grown = logits[0, 0].numpy(), grown[0, 0].numpy()  # (h, w), positive on the (grown) mask
        self.size = scene.height, scene.width

    def at(self, grid: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
        """A window of the grid at the scene's size, as `at_size` would give it."""
        down = interpolation(grid.shape[0], self.size[0], top, top + height)  # (height, h)
        across = interpolation(grid.shape[1], self.size[1], left, left + width)  # (width, w)
        return down @ grid @ across.T

    def touches(self, top: int, left: int, height: int, width: int) -> bool:
        """Whether the grown mask has a foreground cell that pixels of the window are interpolated from."""
        down = interpolation(self.grown.shape[0], self.size[0], top, top + height).any(axis=0)  # (h,)
        across = interpolation(self.grown.shape[1], self.size[1], left, left + width).any(axis=0)  # (w,)
        return bool((self.grown[np.ix_(down, across)] > 0).any())

    def agreement(self, logits: np.ndarray, *window: int) -> float:
        """The weight of a tile's logits: the IoU, in its window, of its mask inside the grown one and the coarse mask."""
        coarse = self.at(self.logits, *window) > 0
        fine = (logits > 0) & (self.at(self.grown, *window) > 0)
        return (coarse & fine).sum() / max(1, (coarse | fine).sum())

    def refined(self, top: int, logits: np.ndarray) -> np.ndarray:
        """The tiles' weighted logits (h, W) added to the coarse ones, and no foreground outside the grown mask."""
        window = top, 0, *logits.shape
        return np.minimum(self.at(self.logits, *window) + logits, self.at(self.grown, *window))


def interpolation(cells: int, size: int, start: int, stop: int) -> np.ndarray:
    """float32 (stop - start, cells): the weight of each cell in each pixel, bilinear, align_corners=False."""
    centre = np.clip((np.arange(start, stop) + 0.5) * (cells / size) - 0.5, 0, cells - 1)  # (stop - start,) in cells
    return np.maximum(0, 1 - np.abs(centre[:, None] - np.arange(cells))).astype(np.float32)


def starts(length: int, tile: int) -> list[int]:
    """Where tiles begin along a side: all whole, spread evenly, a quarter of overlap or more."""
    if length <= tile:
        return [0]
    steps = -(-(length - tile) // (tile - tile // 4))
    return [n * (length - tile) // steps for n in range(steps + 1)]


def window(length: int) -> np.ndarray:
    """Raised cosine over a tile's side, positive everywhere: float32 (length,)."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * (np.arange(length) + 0.5) / length)).astype(np.float32)


def blend(
    look: Look, scene: Scene, phrase: str, tile: int, batch: int, coarse: CoarseMask | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (top, logits (h, W)) of strips of rows: the tiles' logits, averaged by their windows.

    With a coarse mask, tiles that don't touch it are left out, as logits of 0, and the others weighted by agreement.
    """
    height, width = min(tile, scene.height), min(tile, scene.width)
    tops, lefts = starts(scene.height, tile), starts(scene.width, tile)
    down, across = window(height), window(width)
    weight_across = np.zeros(scene.width, np.float32)
    for left in lefts:
        weight_across[left : left + width] += across
    # The rows from `top` on that the current band of tiles covers: weighted logits and, of each row, the sum of weights.
    sums, weight_down = np.zeros((height, scene.width), np.float32), np.zeros(height, np.float32)

    chosen = {top: [x for x in lefts if coarse is None or coarse.touches(top, x, height, width)] for top in tops}
    looks = [(top, some) for top in tops for some in batches(chosen[top], batch)]
    images = ahead([scene.read(top, left, height, width) for left in some] for top, some in looks)

    for top, next_top in zip(bar := Progress(tops, "rows of tiles", leave=False), [*tops[1:], scene.height]):
        bar.set_postfix_str(f"{top * scene.width / 1e6:,.0f} of {scene.height * scene.width / 1e6:,.0f} megapixels", False)
        for some in batches(chosen[top], batch):
            for left, logits in zip(some, look(next(images), [phrase] * len(some)).split(1)):
                logits = at_size(logits, (height, width))
                weight = coarse.agreement(logits, top, left, height, width) if coarse else 1
                sums[:, left : left + width] += weight * logits * (down[:, None] * across)
        weight_down += down
        done = next_top - top  # rows that no later tile reaches
        for row in range(0, done, STRIP):
            rows = slice(row, min(row + STRIP, done))
            yield top + row, sums[rows] / (weight_down[rows, None] * weight_across)
        for band in (sums, weight_down):
            band[: height - done] = band[done:].copy()
            band[height - done :] = 0


def batches(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items each, the last one perhaps shorter."""
    items = iter(items)
    while some := list(itertools.islice(items, size)):
        yield some


def ahead(items: Iterable) -> Iterator:
    """The items in their order, each made by a thread while the one before is in use."""
    items, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item
