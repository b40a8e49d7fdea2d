"""The records of the five models, what `--set` may change of them, and the paper's against the published configuration."""

import ast
import math
import os
from dataclasses import asdict, fields, replace
from pathlib import Path

import open_clip
import pytest
import torch
from torch.utils._device import DeviceContext

import presets
from encoder import BEiT3Encoder
from fusion import PUBLISHED, Architecture
from losses import TERMS
from model import RS2SAM2, count_parameters
from presets import OURS, PRESETS, RECIPES, Recipe, differences, find_preset, in_words, settings_of, with_settings
from runtime.errors import UserError
from runtime.optimizers import parameter_groups
from train import learning_rate
from weights.checkpoints import skip_initialisation
from weights.foundation import SIZES, sam2_on_hub
from weights.names import is_unused, our_name
from weights.recipes import news, resolve

PUBLISHED_FACTS = Path(os.environ.get("FIXTURES", "")) / "full" / "state_dict_keys.tsv"


def test_every_preset_has_a_recipe_whose_loss_is_known():
    assert PRESETS.keys() == RECIPES.keys() and RECIPES["small"] == RECIPES["base"] == RECIPES["large"] == Recipe()
    for recipe in RECIPES.values():
        assert recipe.losses.keys() <= TERMS.keys() and len(recipe.losses) >= 3


def test_preset_small():
    """SAM 2.1 Hiera-T and a CLIP ViT-B-32, RemoteCLIP's size, whose files are known to the hub and to open_clip."""
    with skip_initialisation():
        model = RS2SAM2(preset := find_preset("small"))
    assert count_parameters(model) == {"total": 201_699_739, "trained": 173_795_190, "frozen": 27_904_549}
    assert (model.union_encoder.grid, model.union_encoder.image_size, preset.image_size) == (7, 224, 512)
    assert sam2_on_hub(preset.sam2).repository == "facebook/sam2.1-hiera-tiny" and SIZES[preset.sam2] < 156e6
    assert preset.encoder_tag in open_clip.list_pretrained_tags_by_model("ViT-B-32") and SIZES[preset.encoder_tag] < 606e6
    with pytest.raises(UserError, match="--model huge is no preset: it is one of tiny, small, base, large, paper"):
        find_preset("huge")


def test_a_preset_of_one_s_own_is_one_line_with_the_default_recipe():
    mine = 'PRESETS = {\n    "mine": Preset(sam2="x", encoder="y"),'
    exec(Path(presets.__file__).read_text().replace("PRESETS = {", mine, 1), names := {"__name__": "presets"})
    assert names["RECIPES"]["mine"] == names["Recipe"]() and asdict(names["RECIPES"]["tiny"]) == asdict(RECIPES["tiny"])


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
    for settings, epochs, samples in ((["epochs=3"], 3, 0), (["epochs=3", "samples=99"], 3, 99)):  # tiny has samples
        assert [getattr(with_settings(preset, recipe, settings)[1], key) for key in ("epochs", "samples")] == [epochs, samples]


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_printed_of_a_preset_and_its_recipe_is_what_set_takes(name):
    preset, recipe = PRESETS[name], RECIPES[name]
    text = f"{in_words('preset', preset)}\n{in_words('recipe', recipe)}"
    assert all(len(line) <= 120 for line in text.splitlines())
    settings = [word for word in text.split() if "=" in word]
    assert len(settings) == len(settings_of(preset, recipe)) and {"lr", "losses.dice"} < {s.partition("=")[0] for s in settings}
    blank = replace(recipe, lr=9.0, clip=9.0, betas=(0.0, 0.0), epoch_range=(9, 9), schedule="constant", augment=None)
    for start in (recipe, blank):
        assert with_settings(preset, start, settings) == (preset, recipe)


def test_differences_are_named_as_set_names_them():
    old = (PRESETS["tiny"], RECIPES["tiny"])
    new = with_settings(*old, ["losses.dice=0.5", "losses.published_boundary=1", "trunk.embed_dim=8", "lr=1.4e-3"])
    assert differences(old, old) == {}
    assert differences(old, new) == {"losses.dice": (1.0, 0.5), "losses.published_boundary": (None, 1.0),
                                     "trunk.embed_dim": (16, 8)}  # fmt: skip


def stored(preset, recipe, **args) -> dict:
    return {"preset": asdict(preset), "recipe": asdict(recipe), "args": {"set": []} | args}


def test_what_a_run_that_goes_on_may_change_and_is_told():
    preset, recipe = with_settings(PRESETS["tiny"], RECIPES["tiny"], ["losses.dice=0.5"])
    checkpoint = stored(preset, recipe, set=["losses.dice=0.5"])
    assert resolve("tiny", [], checkpoint, resume=True) == (preset, recipe)
    new = resolve("tiny", ["lr=1e-5", "epochs=9", "batch_size=4"], checkpoint, resume=True)
    assert new == (preset, replace(recipe, lr=1e-5, epochs=9, samples=0, batch_size=4))
    assert news(checkpoint, new, "tiny") == [
        f"from here on {name} is {now}, it was {was}"
        for name, was, now in (("epochs", 40, 9), ("samples", 24000, 0), ("batch_size", 8, 4), ("lr", 0.0014, 1e-05))]
    for setting, told in (("losses.dice=1", "losses.dice is 0.5 in the checkpoint, 1.0 is asked for; --resume can change lr, "),
                          ("muon=0", "muon is 2.0 in the checkpoint, 0.0 is asked for"),
                          ("image_size=96", "image_size is 128 in the checkpoint, 96 is asked for")):  # fmt: skip
        with pytest.raises(UserError, match=f"^--set lr=1 {setting}: {told}"):
            resolve("tiny", ["lr=1", setting], checkpoint, resume=True)
    drifted = stored(preset, replace(recipe, ema=0.5))  # presets.py, and what it says of Dice, has changed since
    assert news(drifted, resolve("tiny", [], drifted, resume=True), "tiny") == [
        "the run goes on with its own ema, 0.5: in presets.py it is 0.995 now",
        "the run goes on with its own losses.dice, 0.5: in presets.py it is 1.0 now"]
    around = stored(replace(preset, train_trunk=False, encoder_tag="openai"), recipe)  # as the weights it was given ask for
    assert news(around, resolve("tiny", [], around, resume=True), "tiny") == [
        "the run goes on with its own losses.dice, 0.5: in presets.py it is 1.0 now"]


def test_fine_tuning_takes_the_recipe_of_the_preset_s_name_and_fixes_the_network():
    preset, recipe = with_settings(PRESETS["tiny"], RECIPES["tiny"], ["reduction=2", "lr=9"])
    checkpoint = stored(preset, recipe)
    assert resolve("tiny", ["image_size=96"], checkpoint) == (replace(preset, image_size=96), RECIPES["tiny"])
    assert resolve("a stranger's", [], checkpoint) == (preset, Recipe())  # a name that presets.py doesn't know
    with pytest.raises(UserError, match="reduction is 2 in the checkpoint, 1 is asked for; --init fixes the network"):
        resolve("tiny", ["reduction=1"], checkpoint)


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
        "train_trunk=False": "--sam2 freezes it",
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
