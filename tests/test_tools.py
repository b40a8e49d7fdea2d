"""The tools beside the method."""

import dataclasses
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sam2.build_sam import build_sam2

import train
from checkpoints import build, load_checkpoint
from data import open_dataset
from recipe import RECIPES
from scenes import make_scenes

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import pretrain  # noqa: E402
from language import Shuffled  # noqa: E402


def test_shuffled_phrases_come_from_other_images(tmp_path):
    make_scenes(tmp_path / "scenes", train=1, val=7, test=0, size=96, progress=False)
    dataset = open_dataset(str(tmp_path / "scenes"), "val", image_size=64, encoder_size=64)
    shuffled = Shuffled(dataset, seed=0)
    assert sorted(shuffled.donors) == sorted(dataset.items)  # every phrase is used once
    for index, ((i, _), (donor, j)) in enumerate(zip(dataset.items, shuffled.donors)):
        assert dataset.samples[donor].image != dataset.samples[i].image
        assert shuffled[index]["phrase"] == dataset.samples[donor].phrases[j]
        assert (shuffled[index]["mask"] == dataset[index]["mask"]).all()


# ---- pretraining of a small SAM 2 -----------------------------------------------------------------------------------


def masks_of(*boxes: tuple[int, int, int, int], size: int = 128) -> torch.Tensor:
    """Full rectangles (left, top, right, bottom), the last pixel inside -> (B, size, size) uint8."""
    masks = torch.zeros(len(boxes), size, size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes):
        mask[top : bottom + 1, left : right + 1] = 1
    return masks


def test_prompts_are_clicks_inside_or_boxes():
    boxes = [(3, 5, 20, 30), (60, 64, 60, 64), (0, 0, 127, 127)] * 10
    masks = masks_of(*boxes)
    points, labels = pretrain.prompts(masks, np.random.default_rng(0))
    kinds = {tuple(label) for label in labels.tolist()}
    assert kinds == {(1, -1), (2, 3)}  # SAM 2's labels: inside and none, upper left and lower right corner
    for mask, box, point, label in zip(masks, boxes, points.int().tolist(), labels.tolist()):
        if label == [2, 3]:
            assert (*point[0], *point[1]) == box
        else:
            x, y = point[0]
            assert mask[y, x]


def test_an_empty_mask_gets_a_click_that_says_not_here():
    empty, rng = torch.zeros(6, 8, 8, dtype=torch.uint8), np.random.default_rng(0)
    points, labels = pretrain.prompts(empty, rng)
    assert labels.tolist() == [[0, -1]] * 6 and (points < 8).all()
    for answers in (empty - 0.5, empty + 0.5):  # all right, all wrong
        assert pretrain.correction(empty, answers, rng)[1].tolist() == [[0]] * 6


def test_a_correction_points_at_what_is_wrong():
    masks = masks_of((10, 10, 29, 29), (10, 10, 29, 29), (10, 10, 29, 29))
    too_much, too_little = masks_of((10, 10, 29, 39), (10, 10, 29, 19))
    answers = torch.stack([too_much, too_little, masks[2]]).float() - 0.5
    for seed in range(20):
        points, labels = pretrain.correction(masks, answers, np.random.default_rng(seed))
        assert labels.tolist() == [[0], [1], [1]]
        rows = points[:, 0, 1].tolist()
        assert 30 <= rows[0] <= 39 and 20 <= rows[1] <= 29 and 10 <= rows[2] <= 29


def test_pretraining_reaches_all_of_sam2_and_nothing_else():
    torch.manual_seed(0)
    model = pretrain.bare_sam2()
    target = masks_of(*[(8 * i, 10, 8 * i + 30, 60) for i in range(8)])
    images = torch.randint(0, 256, (8, 3, 128, 128), dtype=torch.uint8)
    answers = pretrain.both_answers(
        model, {"image": images, "encoder_image": images, "target": target}, np.random.default_rng(0)
    )
    sum(pretrain.loss(logits, target) for logits in answers).backward()
    away = "prompt_encoder.point_embeddings.0.weight"  # unused: untrained, it finds nothing anywhere, so nothing too much
    for name, p in model.named_parameters():
        assert name == away or (p.grad is not None and p.grad.any()) == p.requires_grad, name
        assert p.requires_grad or name.startswith(("union_encoder", "sparse_prompt", "mask_decoder.")), name
    names = set(pretrain.sam2_state(model))
    real = set(build_sam2("configs/sam2.1/sam2.1_hiera_t.yaml", device="meta", apply_postprocessing=False).state_dict())
    any_block = partial(re.sub, r"blocks\.\d+", "blocks.N")  # tiny widens in others
    assert set(map(any_block, names)) <= set(map(any_block, real))  # SAM 2's own names
    assert {name.split(".")[0] for name in names} == {"image_encoder", "sam_prompt_encoder", "sam_mask_decoder", "no_mem_embed"}


def test_pretraining_is_not_lost_by_what_comes_after_it(tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    make_scenes("both", train=4, val=2, test=0, size=96, progress=False)
    make_scenes("alone", train=4, val=0, test=0, size=96, progress=False)
    monkeypatch.setattr(pretrain, "train", lambda *_: print("trained"))
    monkeypatch.setattr(pretrain, "validate", interrupt)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--data", "both", "--out", "sam2.pt"])
    with pytest.raises(KeyboardInterrupt):
        pretrain.main()
    assert "image_encoder.trunk.patch_embed.proj.weight" in torch.load("sam2.pt", weights_only=True)["model"]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--data", "alone", "--out", "other.pt"])
    with pytest.raises(SystemExit):
        pretrain.main()
    told = capsys.readouterr()
    assert "alone has no samples in split 'val'" in told.err and not told.out


def test_tiny_trains_around_a_frozen_sam2_of_the_tool(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_scenes("data/scenes", train=6, val=2, test=0, size=96, progress=False)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--data", "data/scenes", "--samples", "16", "--out", "runs/sam2.pt"])
    pretrain.main()
    assert "16 samples in" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        pretrain.main()
    assert "runs/sam2.pt exists already" in capsys.readouterr().err
    before = build("tiny", sam2_file="runs/sam2.pt")
    state = torch.load("runs/sam2.pt", weights_only=True)["model"]
    for ours, theirs in (
        ("image_encoder.trunk.blocks.2.block.attn.qkv.weight", "image_encoder.trunk.blocks.2.attn.qkv.weight"),
        ("prompt_encoder.mask_downscaling.0.weight", "sam_prompt_encoder.mask_downscaling.0.weight"),
    ):
        assert torch.equal(before.get_parameter(ours), state[theirs])
    trunk = [k for k, _ in before.named_parameters() if k.startswith(("image_encoder.trunk", "neck"))]
    frozen = {k for k in trunk if "adapter" not in k}
    assert len(frozen) > 70 and not any(before.get_parameter(k).requires_grad for k in frozen)

    command = "train.py --data scenes --model tiny --sam2 runs/sam2.pt --gpus 0 --workers 0 --epochs 1 --out runs/x"
    monkeypatch.setattr(sys, "argv", command.split())
    monkeypatch.setitem(RECIPES, "tiny", dataclasses.replace(RECIPES["tiny"], epoch_range=(16, 16)))
    train.main()
    after = load_checkpoint("runs/x/best.pt")[0]
    assert not after.preset.train_trunk
    changed = {k for k, p in before.named_parameters() if not torch.equal(p, after.get_parameter(k))}
    assert not changed & frozen and any(k.startswith("mask_decoder") for k in changed)
    assert any("adapter" in k for k in changed)
