"""Which pixels of a scene are foreground: from the rows of its logits to those of its mask."""

import itertools
import math
from collections.abc import Iterable, Iterator

import cv2
import numpy as np

from imagery.plain import Scene
from imagery.tiles import Rows

Strips = Iterable[tuple[int, np.ndarray, np.ndarray]]  # (top, logits (h, W), mask (h, W) bool) from top to bottom


def probabilities(logits: np.ndarray) -> np.ndarray:
    """float64, in [0, 1]."""
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def foreground(scene: Scene, rows: Rows, threshold: float = 0.5, min_area: int = 0) -> Strips:
    """The rows of a scene's logits with its mask: what has data and a probability above `threshold`, in connected parts of at
    least `min_area` pixels."""
    strips = masked(scene, rows, math.log(threshold / (1 - threshold)))
    return without_specks(strips, min_area) if min_area > 1 else strips


def masked(scene: Scene, rows: Rows, least: float) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    for top, logits in rows:
        valid = scene.valid(top, len(logits))
        yield top, logits, logits > least if valid is None else (logits > least) & valid


def without_specks(strips: Strips, min_area: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The strips without what is connected, side by side, in fewer than `min_area` pixels.

    That is less than `min_area` rows high, so a strip is judged with as many rows above and below it, and no more is in memory.
    """
    waiting, above = [], None
    for strip in itertools.chain(strips, [None]):
        waiting += [strip] if strip else []
        while waiting and (strip is None or sum(len(mask) for _, _, mask in waiting[1:]) >= min_area):
            (top, logits, mask), *below = waiting
            above = mask[:0] if above is None else above
            seen = np.concatenate([above, mask, *(mask for _, _, mask in below)]).astype(np.uint8)
            _, labels, facts, _ = cv2.connectedComponentsWithStats(seen, connectivity=4)
            kept = facts[:, cv2.CC_STAT_AREA] >= min_area
            kept[0] = False  # the background
            yield top, logits, kept[labels[len(above) : len(above) + len(mask)]]
            above, waiting = seen[: len(above) + len(mask)][-min_area:].astype(bool), below


def mask_score_logits(
    scene: Scene, rows: Rows, threshold: float = 0.5, min_area: int = 0
) -> tuple[np.ndarray, float, np.ndarray]:
    """The mask, bool (H, W), the mean probability inside it or 0.0, and all of the logits, float32 (H, W)."""
    _, logits, masks = zip(*foreground(scene, rows, threshold, min_area))
    logits, mask = np.concatenate(logits), np.concatenate(masks)  # (H, W)
    return mask, float(probabilities(logits[mask]).mean()) if mask.any() else 0.0, logits
