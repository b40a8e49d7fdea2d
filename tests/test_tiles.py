"""Tiles: coverage, blending without seams, what the coarse pass decides; with models whose answer is known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tiles
from raster import PlainImage
from scenes import scene
from tiles import at_size, blend, segment_rows, starts, window


class Tokenizer:
    context = 77

    def __call__(self, phrases):
        longest = max(map(len, phrases))
        ids = torch.tensor([[ord(c) for c in p.ljust(longest)] for p in phrases])
        return ids, torch.tensor([len(p) for p in phrases])

    def length(self, phrase):
        return len(phrase.split()) + 2


class Known(torch.nn.Module):
    """A model's interface around a function: answer(image float (3, S, S), phrase) -> logits (S, S)."""

    def __init__(self, answer, size):
        super().__init__()
        self.answer, self.seen = answer, []
        self.preset = SimpleNamespace(image_size=size)
        self.union_encoder = SimpleNamespace(image_size=size, tokenizer=Tokenizer())
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def normalise(self, image, encoder_image):
        return image.float(), encoder_image.float()

    def forward(self, image, encoder_image, ids, lengths):
        self.seen.append(len(image))
        phrases = ["".join(map(chr, row[:n])) for row, n in zip(ids.tolist(), lengths)]
        return SimpleNamespace(logits=torch.stack([self.answer(i, p)[None] for i, p in zip(image, phrases)]))


def red(image, phrase):
    """Logits of redness: sharp, and right at every pixel of an image that is not resized."""
    return (image[0] - torch.maximum(image[1], image[2]) - 40) / 10


def red_mask(image):
    return red(torch.from_numpy(image).permute(2, 0, 1).float(), "").numpy() > 0


@pytest.fixture(scope="module")
def mosaic():
    """Generated scenes side by side: uint8 (384, 512, 3)."""
    rows = [[scene(0, "val", 4 * i + j).image for j in range(4)] for i in range(3)]
    return np.concatenate([np.concatenate(row, axis=1) for row in rows])


def whole(bands, shape):
    """The bands put together; they must be consecutive."""
    logits = np.full(shape, np.nan, np.float32)
    place = 0
    for top, rows in bands:
        assert top == place and rows.shape[1] == shape[1]
        logits[top : top + len(rows)] = rows
        place += len(rows)
    assert place == shape[0]
    return logits


@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 100, 112, 113, 1000, 2049, 20_000])
def test_tiles_cover_a_side_are_whole_and_overlap(length):
    first = starts(length, 64)
    assert first[0] == 0 and first[-1] == max(0, length - 64)
    steps = np.diff(first)
    assert (steps <= 49).all() and (steps > 0).all()  # a quarter of 64, to a pixel
    assert len(first) <= 2 + length / 48


@pytest.mark.parametrize("length", [1, 2, 7, 64, 4096])
def test_the_window_is_positive_symmetric_and_smooth(length):
    weights = window(length)
    assert (weights > 0).all() and np.allclose(weights, weights[::-1], atol=1e-6)
    assert np.abs(np.diff(weights)).max(initial=0) <= 1.001 * np.pi / length


@pytest.mark.parametrize("shape", [(384, 512), (130, 300), (64, 65), (40, 200), (3, 150), (200, 1)])
def test_blended_tiles_say_what_a_look_at_every_pixel_says(mosaic, shape):
    image = mosaic[: shape[0], : shape[1]]
    model = Known(lambda image, phrase: red(image, phrase), 64)
    logits = whole(blend(model, PlainImage(image), "red", 64, batch=3), shape)
    if min(shape) >= 64:  # tiles are not resized: right to rounding
        expected = red(torch.from_numpy(image).permute(2, 0, 1).float(), "").numpy()
        assert np.allclose(logits, expected, atol=1e-3)
    assert ((logits > 0) == red_mask(image)).mean() > 0.98
    assert max(model.seen) <= 3


def test_no_worse_at_the_borders_of_tiles_than_inside(mosaic, monkeypatch):
    """A model that is wrong within 6 pixels of its image's border, where it sees objects cut off."""

    def cut_off(image, phrase):
        logits = red(image, phrase)
        inside = F.pad(torch.ones(52, 52, dtype=torch.bool), (6, 6, 6, 6))
        return torch.where(inside, logits, -logits)

    shape, truth = mosaic.shape[:2], red_mask(mosaic)
    border = np.zeros(shape, bool)  # within 6 pixels of a border of tiles, not of the scene, where nobody knows better
    for axis, length in enumerate(shape):
        for first in starts(length, 64):
            for edge in {first, first + 64} - {0, length}:
                border[(slice(None),) * axis + (slice(edge - 6, edge + 6),)] = True
    inside = ~border
    for part in (border, inside):
        part[:6], part[-6:], part[:, :6], part[:, -6:] = False, False, False, False
    assert truth[border].mean() > 0.02 and border.mean() > 0.1

    def errors():
        model = Known(cut_off, 64)
        wrong = (whole(blend(model, PlainImage(mosaic), "red", 64, batch=8), shape) > 0) != truth
        return wrong[border].mean(), wrong[inside].mean()

    at_border, elsewhere = errors()
    assert at_border <= elsewhere + 0.002 and at_border < 0.002
    monkeypatch.setattr(tiles, "window", lambda length: np.ones(length, np.float32))
    assert errors()[0] > 0.05  # a plain mean has seams: the test can fail


def test_the_coarse_grid_is_enlarged_as_the_model_s_logits_are():
    grid = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    coarse = tiles.Coarse.__new__(tiles.Coarse)
    for size in ((8, 8), (50, 31), (5, 3), (1, 90)):
        coarse.size = size
        expected = at_size(torch.from_numpy(grid)[None, None], size)
        assert np.allclose(coarse.at(grid, 0, 0, *size), expected, atol=1e-5)
        part = coarse.at(grid, size[0] // 2, size[1] // 3, size[0] - size[0] // 2, 1)
        assert np.allclose(part, expected[size[0] // 2 :, size[1] // 3 : size[1] // 3 + 1], atol=1e-5)


def sided(image, phrase):
    """Redness in the half of the image that the phrase names: what a model that reads position words does."""
    logits = red(image, phrase)
    half = logits.shape[1] // 2
    if "left" in phrase:
        logits[:, half:] = -20
    if "right" in phrase:
        logits[:, :half] = -20
    return logits


@pytest.fixture
def two():
    """Two red ellipses on green, one left, one right; their masks."""
    y, x = np.mgrid[:512, :512]
    shapes = [((x - cx) / 37) ** 2 + ((y - cy) / 59) ** 2 < 1 for cx, cy in ((130, 200), (390, 330))]
    image = np.full((512, 512, 3), (30, 90, 30), np.uint8)
    image[shapes[0] | shapes[1]] = (220, 20, 20)
    return image, *shapes


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("side", [0, 1])
def test_position_words_refer_to_the_scene(two, side):
    image, *shapes = two
    model, phrase = Known(sided, 32), f"the red one on the {('left', 'right')[side]}"
    mask = whole(segment_rows(model, PlainImage(image), phrase, 128, "scene"), (512, 512)) > 0
    assert overlap(mask, shapes[side]) > 0.85 and not (mask & shapes[1 - side]).any()
    alone = whole(segment_rows(model, PlainImage(image), phrase, 128, "independent"), (512, 512)) > 0
    assert (alone & shapes[1 - side]).any()  # what each tile's own left and right would pick


def test_tiles_refine_the_coarse_outline(two):
    image, left, right = two
    model = Known(red, 32)  # 16 pixels of the scene a cell, 4 of a tile
    scene = PlainImage(image)
    coarse = at_size(tiles.model_logits(model, [scene.overview], ["red"]), (512, 512)) > 0
    refined = whole(segment_rows(model, scene, "red", 128, "scene"), (512, 512)) > 0
    assert overlap(refined, left | right) > overlap(coarse, left | right) + 0.02


def test_the_coarse_mask_stays_where_the_tiles_see_nothing(two):
    image, left, right = two

    def far(image, phrase):  # finds it among a lot of ground only
        logits = red(image, phrase)
        return logits if (logits > 0).float().mean() < 0.07 else torch.full_like(logits, -20)

    scene, model = PlainImage(image), Known(far, 32)
    coarse = at_size(tiles.model_logits(model, [scene.overview], ["red"]), (512, 512)) > 0
    mask = whole(segment_rows(model, scene, "red", 64, "scene"), (512, 512)) > 0
    assert overlap(coarse, left | right) > 0.7 and overlap(mask, coarse) > 0.9


def test_memory_is_a_band_and_only_tiles_that_matter_are_read(two):
    image, left, _ = two
    reads, scene, model = [], PlainImage(image), Known(sided, 32)
    read = scene.read
    scene.read = lambda *box: reads.append(box) or read(*box)
    for _, rows in segment_rows(model, scene, "left", 64, "scene"):
        assert len(rows) <= 64
    assert 0 < len(reads) < 60  # of 121
    for top, first, height, width in reads:
        assert (height, width) == (64, 64)
        grown = left[max(0, top - 64) : top + 128, max(0, first - 64) : first + 128]
        assert grown.any()


def test_a_phrase_that_points_nowhere_gives_an_empty_mask():
    image = np.full((300, 300, 3), (30, 90, 30), np.uint8)
    model = Known(red, 32)
    logits = whole(segment_rows(model, PlainImage(image), "red", 64, "scene"), (300, 300))
    assert not (logits > 0).any() and len(model.seen) == 1  # the coarse pass alone
