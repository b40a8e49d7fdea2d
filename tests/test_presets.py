"""The records of the four models, what `--set` may change of them, and the paper's against the published configuration."""

import ast
import math
import os
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from torch.utils._device import DeviceContext

from encoder import BEiT3Encoder
from fusion import PUBLISHED, Architecture
from losses import TERMS
from model import RS2SAM2, count_parameters
from presets import OURS, PRESETS, RECIPES, with_settings
from runtime.errors import UserError
from train import learning_rate, parameter_groups
from weights.names import is_unused, our_name

PUBLISHED_FACTS = Path(os.environ.get("FIXTURES", "")) / "full" / "state_dict_keys.tsv"


def test_every_preset_has_a_recipe_whose_loss_is_known():
    assert PRESETS.keys() == RECIPES.keys()
    for recipe in RECIPES.values():
        assert recipe.losses.keys() <= TERMS.keys() and len(recipe.losses) >= 3


def test_records_are_plain_values():
    """A checkpoint holds them so: what `torch.load(weights_only=True)` reads."""
    for record in (*PRESETS.values(), *RECIPES.values()):
        assert ast.literal_eval(repr(asdict(record)).replace("inf", "1e999")) == asdict(record)


def test_paper_is_the_published_network_and_recipe():
    preset, recipe = PRESETS["paper"], RECIPES["paper"]
    assert preset.architecture == PUBLISHED and preset.encoder == "beit3" and not preset.train_trunk
    assert recipe.losses == {"cross_entropy": 1.0, "dice": 0.1, "published_boundary": 0.2}
    assert (recipe.lr, recipe.foundation_rate, recipe.muon, recipe.ema, recipe.clip) == (1e-4, 0.5, 0, 0, math.inf)
    assert [learning_rate(recipe, 0.0, epoch) for epoch in (0, 49, 50)] == [1.0, 1.0, 0.1]  # no warm-up, one drop
    assert recipe.augment == "paper"
    for name in PRESETS.keys() - {"paper"}:
        assert PRESETS[name].architecture == OURS and "boundary" in RECIPES[name].losses


def test_ours_differs_from_the_published_architecture_in_every_field():
    assert Architecture() == PUBLISHED
    assert all(getattr(OURS, f.name) != getattr(PUBLISHED, f.name) for f in fields(Architecture))


def test_settings_change_what_they_name():
    preset, recipe = PRESETS["tiny"], RECIPES["tiny"]
    settings = [
        "image_size=96", "architecture.positions=False", "trunk.embed_dim=8", "encoder_name=ViT-B-32", "encoder_size=64",
        "lr=1", "betas=(0.9, 0.95)", "augment=None", "losses.dice=2", "losses.published_boundary=0.5", "lr=0.5",
    ]  # fmt: skip
    new_preset, new_recipe = with_settings(preset, recipe, settings)
    assert (new_preset.image_size, new_preset.encoder_name, new_preset.encoder_size) == (96, "ViT-B-32", 64)
    assert not new_preset.architecture.positions and new_preset.architecture.residual == OURS.residual
    assert new_preset.trunk == preset.trunk | {"embed_dim": 8}
    assert (new_recipe.lr, new_recipe.betas, new_recipe.augment) == (0.5, (0.9, 0.95), None)  # the later setting stands
    assert new_recipe.losses == recipe.losses | {"dice": 2.0, "published_boundary": 0.5}
    assert type(with_settings(preset, recipe, ["lr=1"])[1].lr) is float
    assert (preset, recipe) == (PRESETS["tiny"], RECIPES["tiny"]) and preset.trunk["embed_dim"] == 16  # as before


@pytest.mark.parametrize(
    "setting, sentence",
    {
        "lr": "write name=value, where name is one of sam2, ",
        "nope=1": "write name=value, where name is one of sam2, ",
        "epochs=2.5": "epochs is of kind int .now 40., 2.5 is float",
        "epochs=True": "True is bool",
        "epochs=None": "None is NoneType",
        "epochs=0": "epochs must be a number above 0, 0 is not",
        "lr=1e999": "lr must be a number above 0, inf is not",
        "lr=nan": "'nan' is str",
        "lr.x=3": "lr has no parts",
        "encoder_size=x": "encoder_size is of kind int . None .now None., 'x' is str",
        "architecture=published": "is of kind Architecture",
        "architecture.nope=1": "nope is not one of positions, ",
        "encoder_args.x.y=3": "x is not one of joint_heads, ",
        "schedule=step": "schedule is one of cosine, constant, not step",
        "losses.hinge=1": "the loss needs one or more of the terms cross_entropy, ",
        "losses={}": "the loss needs one or more of the terms",
    }.items(),
)
def test_a_setting_that_cannot_be_is_one_sentence(setting, sentence):
    with pytest.raises(UserError, match=f"^--set {setting}: .*{sentence}".replace("{}", r"\{\}")) as error:
        with_settings(PRESETS["tiny"], RECIPES["tiny"], [setting])
    assert "\n" not in str(error.value)


class OnMeta(DeviceContext):
    """Tensors without storage, but for the one call whose values Hiera's constructor reads."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.linspace:
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


@pytest.fixture(scope="module")
def paper():
    with OnMeta(torch.device("meta")):
        return RS2SAM2(PRESETS["paper"])


def test_the_paper_s_union_encoder_is_beit3_large(paper):
    encoder = paper.union_encoder
    assert isinstance(encoder, BEiT3Encoder) and (encoder.width, encoder.grid) == (1024, 14)


def test_the_paper_s_model_counts_as_published(paper):
    """The published total less the video memory, the unconnected head, a mask token and the last text update."""
    memory = 448 + 256 + 256 + 17 + 5922304 + 1384608 + 197376
    last_update = (4 * 288 * 288 + 4 * 288) + (288 * 256 + 256)
    assert count_parameters(paper)["total"] == 934_813_404 - memory - 262_400 - 1024 - last_update


@pytest.mark.skipif(not PUBLISHED_FACTS.exists(), reason="FIXTURES names no folder with full")
def test_the_paper_s_model_has_the_published_keys_and_learning_rates(paper):
    lines = [line.split("\t") for line in PUBLISHED_FACTS.read_text().splitlines()[1:]]
    used = [
        (our_name(key), ast.literal_eval(shape), rate) for key, shape, _, _, rate in lines if not is_unused(key, 48)
    ]
    shapes = {name: shape for name, shape, _ in used}
    assert len(shapes) == len(used)  # no two keys share a place
    assert shapes == {k: list(v.shape) for k, v in paper.state_dict().items()}
    groups = parameter_groups(paper, RECIPES["paper"])
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    unused = {id(p) for module in paper.unused() for p in module.parameters()}  # never moved there, not optimised here
    published = {name: rate for name, _, rate in used}
    for name, p in paper.named_parameters():
        if id(p) not in unused:
            assert rates.get(id(p)) == (None if published[name] == "frozen" else float(published[name])), name
