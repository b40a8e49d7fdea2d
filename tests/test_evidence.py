"""What each part is worth: models without some of them, boundary IoU, the tools that measure."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import random_batch, small_preset

import evaluate
import losses
import train
from checkpoints import CheckpointError, load_checkpoint
from model import PARTS, PRESETS, RS2SAM2, check_parts, count_parameters
from recipe import RECIPES, parameter_groups

ROOT = Path(__file__).parent.parent
VARIANTS = [
    *PARTS,
    "fusion,decoder-fusion,mask-prompt,boundary",  # what the phrase says comes through the sparse tokens alone
    "fusion,decoder-fusion,mask-prompt",
    "fusion,decoder-fusion",
    "mask-prompt,sparse-prompt",  # the class token and the visual tokens are not read
    "fusion,decoder-fusion,boundary,sparse-prompt",  # the text tokens are not read
]
LOSS_PARTS = {"cross-entropy", "dice", "soft-edges", "pseudo"}


def variant(parts: str, encoder: str = "open_clip") -> RS2SAM2:
    torch.manual_seed(0)
    return RS2SAM2(dataclasses.replace(small_preset(encoder), without=tuple(parts.split(","))))


def loss_without(parts: str, output, target) -> dict:
    recipe = dataclasses.replace(RECIPES["tiny"], pseudo=1.0).without(tuple(parts.split(",")))
    return losses.total_loss(output, target, recipe.ce, recipe.dice, recipe.boundary, recipe.pseudo, recipe.soft_edges)


# ---- models without parts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["open_clip", "beit3"])
@pytest.mark.parametrize("parts", VARIANTS)
def test_without_parts_every_trained_parameter_gets_a_gradient_and_no_other(parts, encoder):
    model = variant(parts, encoder)
    with torch.no_grad():  # every parameter of order one, so that each matters
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p) / max(1, p[0].numel() if p.dim() > 1 else 1) ** 0.5)
    output = model(*random_batch(model, [7, 4]))
    target = torch.zeros(2, 64, 64)
    target[:, 10:40, 20:50] = 1
    loss_without(parts, output, target)["loss"].backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.abs().max() > 0, name
        else:
            assert p.grad is None, name
    groups = parameter_groups(model, 1e-3, 0.5)
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("parts", VARIANTS)
def test_what_is_left_out_is_not_built(parts):
    whole, less = count_parameters(variant("soft-edges")), count_parameters(variant(parts))
    if set(parts.split(",")) <= LOSS_PARTS:
        assert less == whole
    else:
        assert less["trained"] < whole["trained"] and less["total"] < whole["total"]
    kept = variant(parts).state_dict().keys()
    gone = {
        "fusion": "adapter.", "rewriting": "text_reads_vision", "decoder-fusion": "decoder_fusion.",
        "mask-prompt": "mask_prompt.", "sparse-prompt": "sparse_prompt.", "boundary": "text_weight.",
    }  # fmt: skip
    for part in set(parts.split(",")) - LOSS_PARTS:
        assert not [key for key in kept if gone[part] in key], part


def test_the_whole_model_is_what_it_was():
    """The parts are drawn in the order they always were, so a seed gives the same weights."""
    torch.manual_seed(7)
    model = RS2SAM2(PRESETS["tiny"])
    assert count_parameters(model) == {"total": 4_635_539, "trained": 4_516_790, "frozen": 118_749}
    state = model.state_dict()
    assert len(state) == 451
    last = state["mask_decoder.pred_obj_score_head.layers.2.weight"]  # drawn after everything else
    assert last.flatten()[0].item() == pytest.approx(-0.06832161545753479, abs=1e-7)


@pytest.mark.parametrize("parts", VARIANTS[-5:])
def test_a_checkpoint_rebuilds_its_variant(parts, tmp_path):
    model = variant(parts).eval()
    facts = {"data": "scenes", "model_name": "tiny", "revision": ""}
    torch.save(facts | {"preset": dataclasses.asdict(model.preset), "model": model.state_dict()}, tmp_path / "m.pt")
    again, _ = load_checkpoint(tmp_path / "m.pt")
    assert again.preset == model.preset
    batch = random_batch(model, [5, 3])
    with torch.no_grad():
        for ours, theirs in zip(model(*batch), again(*batch)):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_a_checkpoint_of_before_is_the_whole_model(tmp_path):
    model = RS2SAM2(small_preset("open_clip"))
    preset = dataclasses.asdict(model.preset)
    del preset["without"]
    facts = {"data": "scenes", "model_name": "tiny", "revision": "", "model": model.state_dict()}
    torch.save(facts | {"preset": preset}, tmp_path / "m.pt")
    assert load_checkpoint(tmp_path / "m.pt")[0].preset == model.preset
    torch.save(facts | {"preset": preset | {"without": ["wings"]}}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="unknown part 'wings'"):
        load_checkpoint(tmp_path / "m.pt")


@pytest.mark.parametrize(
    "parts, expected",
    [
        ("wings", "unknown part 'wings': the parts are fusion, rewriting"),
        ("fusion,decoder-fusion,mask-prompt,sparse-prompt", "the phrase has no way to SAM 2"),
        ("dice,cross-entropy", "nothing teaches the mask"),
        ("", "unknown part ''"),
    ],
)
def test_what_can_t_be_left_out_is_one_sentence(parts, expected, capsys, monkeypatch):
    with pytest.raises(ValueError, match=expected):
        check_parts(parts.split(","))
    monkeypatch.setattr(sys, "argv", ["train.py", "--without", parts])
    with pytest.raises(SystemExit):
        train.main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("train.py: error: argument --without: ") and expected in last


def test_the_loss_leaves_out_its_terms():
    model = variant("soft-edges")
    output, target = model(*random_batch(model, [5, 3])), torch.zeros(2, 64, 64)
    target[:, 10:40, 20:50] = 1
    whole = losses.total_loss(output, target, dice_weight=1.0, boundary_weight=0.2, pseudo=1.0)
    assert set(whole) == {"loss", "ce", "dice", "boundary", "pseudo"}
    for part, name in (("cross-entropy", "ce"), ("dice", "dice"), ("boundary", "boundary"), ("pseudo", "pseudo")):
        less = loss_without(part, output, target)
        assert set(less) == set(whole) - {name}
        torch.testing.assert_close(less["loss"], whole["loss"] - whole[name])
    hard = loss_without("soft-edges", output, target)["boundary"]
    z = torch.nn.functional.interpolate(output.logits, (64, 64), mode="bilinear", align_corners=False)[:, 0]
    expected = [
        losses.published_boundary(z[i : i + 1], target[i : i + 1], output.log_weight[i]).item() for i in range(2)
    ]
    assert hard.item() == pytest.approx(0.2 * np.mean(expected), rel=1e-5)  # samples do not mix


# ---- boundary IoU ---------------------------------------------------------------------------------------------------------


def square(top: int, left: int, side: int, size: int = 30) -> np.ndarray:
    mask = np.zeros((size, size), np.uint8)
    mask[top : top + side, left : left + side] = 1
    return mask


def test_the_boundary_region_is_as_wide_as_two_per_cent_of_the_diagonal():
    assert evaluate.boundary_region(square(5, 5, 10)).sum() == 100 - 64  # diagonal 42: 1 pixel
    assert evaluate.boundary_region(square(30, 30, 40, size=100)).sum() == 1600 - 34**2  # diagonal 141: 3 pixels
    assert evaluate.boundary_region(square(0, 0, 10, size=12)).sum() == 100 - 64  # never less than 1
    # the border of the image is an outline too
    assert evaluate.boundary_region(np.ones((30, 30), np.uint8)).sum() == 900 - 28**2


def test_boundary_iou_by_hand():
    a = square(5, 5, 10)
    assert evaluate.boundary_iou(a, a, "ours") == 1
    # Two rings of 36 pixels, one pixel apart: they share two sides of 9 and cross nowhere else.
    assert evaluate.boundary_iou(a, square(5, 6, 10), "ours") == pytest.approx(18 / (72 - 18))
    assert evaluate.boundary_iou(a, square(20, 20, 5), "ours") == 0
    # A mask without its middle has the same outer ring and one around the hole: (36) of (36 + ring of the hole)
    hollow = a.copy()
    hollow[8:12, 8:12] = 0
    ring = 6 * 6 - 4 * 4
    assert evaluate.boundary_iou(hollow, a, "ours") == pytest.approx(36 / (36 + ring))
    empty = np.zeros_like(a)
    assert evaluate.boundary_iou(empty, empty, "ours") == 1 and evaluate.boundary_iou(empty, empty, "paper") == 0
    assert evaluate.boundary_iou(empty, a, "ours") == evaluate.boundary_iou(a, empty, "paper") == 0


def test_boundary_iou_minds_the_outline_more_than_iou_does():
    a, b = square(20, 20, 60, size=100), square(20, 23, 60, size=100)
    iou = evaluate.sample_iou(*evaluate.iou_counts(a, b), "ours")
    assert evaluate.boundary_iou(a, b, "ours") < 0.6 < 0.9 < iou


def test_rows_carry_it_and_the_table_shows_their_mean():
    rows = [{"intersection": 5, "union": 10, "boundary_iou": b} for b in (0.25, 0.75)]
    scores = evaluate.summarise_rows(rows, "ours")
    assert scores["bIoU"] == 50 and scores["mIoU"] == 50
    header, line = evaluate.table({"all": scores}).splitlines()
    assert header.split()[-2:] == ["bIoU", "samples"] and line.split()[-2:] == ["50.00", "2"]
    assert json.dumps(rows)
