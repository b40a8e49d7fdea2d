"""Every number that fixes a network (Preset) and its training (Recipe), for the five models that `--model` names.

    tiny    learns generated scenes on a CPU in minutes    small, base, large    SAM 2.1 with a CLIP of open_clip
    paper   the published network and recipe: SAM 2 Hiera-L with BEiT-3-L

A model of your own is an entry in PRESETS, and in RECIPES only where the default Recipe is not its own. Checkpoints hold
both records completely, as plain values, so a checkpoint means the same after this file has changed. `--set name=value` of
train.py changes one number of a run.
"""

import ast
import math
import re
import textwrap
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from types import GenericAlias
from typing import get_origin

from fusion import PUBLISHED, Architecture
from losses import TERMS
from runtime.errors import UserError

OURS = Architecture(
    text_kept=1.0, text_added=1.0, residual=1.0, positions=True, zero_start=True, sparse_tokens=4, pseudo_mask_as_logits=True,
)  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """A network. Sizes are in pixels."""

    sam2: str  # a YAML file of the sam2 package, under its configs/
    encoder: str  # 'open_clip' or 'beit3'
    architecture: Architecture = PUBLISHED
    encoder_args: dict = field(default_factory=dict)  # of OpenCLIPEncoder or BEiT3Encoder
    encoder_name: str | dict = ""  # open_clip's model name, or the arguments of open_clip.CLIP
    encoder_tag: str | None = None  # open_clip's pretrained tag
    encoder_size: int | None = None  # side of the open_clip model's images; None: the size it was trained at
    image_size: int = 1024  # S, the side of SAM 2's input, a multiple of 32
    trunk: dict = field(default_factory=dict)  # changes to the trunk of the YAML
    decoder: dict = field(default_factory=lambda: {"dim": 256, "heads": 8, "mlp": 2048})  # the sam2 package's own sizes
    reduction: int = 4  # adapters are D / reduction wide
    train_trunk: bool = False  # train SAM 2's image encoder too: only where it starts from random weights


@dataclass(frozen=True)
class Recipe:
    """The training of a preset. An epoch is a pass over the training set, where `epoch_range` does not bound it."""

    epochs: int = 40
    epoch_range: tuple[int, float] = (1, math.inf)  # samples: several passes over a small set, a part of a large one
    samples: int = 0  # a budget in samples that replaces `epochs`: the same whatever the data set's size; 0: none
    batch_size: int = 8  # of an optimiser step, over all cards
    lr: float = 1e-4  # of the fusion modules
    foundation_rate: float = 0.5  # share of lr for everything else that is trained
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    muon: float = 0.0  # Muon's learning rate for matrices, as a multiple of the group's; 0: AdamW for these too
    schedule: str = "cosine"  # with 5 % of warm-up; or 'constant': lr / 10 after 50 epochs, as published
    clip: float = 1.0  # largest gradient norm
    cpu_processes: int = 1  # at most, without a card: many small operations gain more from processes than from threads
    ema: float = 0.999  # decay of the averaged weights; 0 keeps the weights themselves
    augment: str | None = "ours"  # of data.py: None, 'paper' or 'ours'
    losses: dict = field(  # coefficients of losses.TERMS
        default_factory=lambda: {"cross_entropy": 1.0, "dice": 0.1, "boundary": 0.2}
    )


def learning_rate(recipe: Recipe, progress: float, epoch: int) -> float:
    """The learning rate as a share of its peak, after a share `progress` of all samples and so many whole epochs."""
    if recipe.schedule == "constant":
        return 1.0 if epoch < 50 else 0.1
    return max(1e-3, min(progress / 0.05, 0.5 * (1 + math.cos(math.pi * (progress - 0.05) / 0.95))))


TINY_CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 128, "patch_size": 8, "width": 96, "head_width": 32, "layers": 2},
    "text_cfg": {"width": 64, "heads": 4, "layers": 1},
}

PRESETS = {
    "tiny": Preset(
        architecture=OURS,
        sam2="sam2.1/sam2.1_hiera_t.yaml",
        trunk={
            "embed_dim": 16, "num_heads": 1, "stages": [1, 1, 3, 1], "global_att_blocks": [4],
            "window_spec": [8, 4, 8, 4], "window_pos_embed_bkg_spatial_size": [7, 7],
        },
        decoder={"dim": 64, "heads": 4, "mlp": 256},
        encoder="open_clip",
        encoder_name=TINY_CLIP,
        # Random vectors tell words apart as well as trained ones, and their table is 68 % of the weights.
        encoder_args={"width": 64, "joint_layers": 2, "joint_heads": 2, "train_tokens": False},
        image_size=128,
        reduction=1,
        train_trunk=True,
    ),
    "small": Preset(
        architecture=OURS,
        sam2="sam2.1/sam2.1_hiera_t.yaml",
        encoder="open_clip",
        encoder_name="ViT-B-32",
        encoder_tag="laion2b_s34b_b79k",
        encoder_args={"width": 512, "joint_layers": 4, "joint_heads": 8},
        image_size=512,
    ),
    "base": Preset(
        architecture=OURS,
        sam2="sam2.1/sam2.1_hiera_b+.yaml",
        encoder="open_clip",
        encoder_name="ViT-B-16",
        encoder_tag="laion2b_s34b_b88k",
        encoder_args={"width": 512, "joint_layers": 4, "joint_heads": 8},
    ),
    "large": Preset(
        architecture=OURS,
        sam2="sam2.1/sam2.1_hiera_l.yaml",
        encoder="open_clip",
        encoder_name="ViT-L-14",
        encoder_tag="laion2b_s32b_b82k",
        encoder_args={"width": 768, "joint_layers": 4, "joint_heads": 12},
    ),
    "paper": Preset(sam2="sam2/sam2_hiera_l.yaml", encoder="beit3"),
}  # fmt: skip

RECIPES = dict.fromkeys(PRESETS, Recipe()) | {
    "tiny": Recipe(
        samples=24_000, epoch_range=(280, 4000), cpu_processes=4, lr=1.4e-3, foundation_rate=1.0, betas=(0.5, 0.98),
        weight_decay=0.02, muon=2.0, ema=0.995, augment=None,
        # The boundary loss's coefficient was measured: at the paper's 0.2 the term is worth less than another seed.
        losses={"cross_entropy": 1.0, "dice": 1.0, "boundary": 1.0, "pseudo_mask": 5.0},
    ),
    "paper": Recipe(
        schedule="constant", clip=math.inf, ema=0.0, augment="paper",
        losses={"cross_entropy": 1.0, "dice": 0.1, "published_boundary": 0.2},
    ),
}  # fmt: skip


def find_preset(name: str) -> Preset:
    """The preset of a name; UserError where it is none."""
    if name not in PRESETS:
        raise UserError(f"--model {name} is no preset: it is one of {', '.join(PRESETS)}")
    return PRESETS[name]


CHOICES = {"encoder": ("open_clip", "beit3"), "schedule": ("cosine", "constant"), "augment": (None, "paper", "ours")}


def with_settings(preset: Preset, recipe: Recipe, settings: list[str]) -> tuple[Preset, Recipe]:
    """The records with "name=value" settings applied, in their order; UserError for what no run could be made of.

    name: a field of Preset or Recipe, or NAME.KEY for a key of a dictionary or of `architecture`. value: a Python literal,
    or text that stands for itself; `inf` is a number. A setting of `epochs` takes the budget in samples away.
    """
    for setting in settings:
        name, equals, text = setting.partition("=")
        top = name.partition(".")[0]
        if not equals or top not in {f.name for record in (preset, recipe) for f in fields(record)}:
            known = ", ".join(f.name for record in (preset, recipe) for f in fields(record))
            raise UserError(f"--set {setting}: write name=value, where name is one of {known}")
        if top in {f.name for f in fields(preset)}:
            preset, before = _with_setting(preset, name, _value(text), setting), preset
            if preset.train_trunk != before.train_trunk:
                raise UserError(f"--set {setting}: --from-scratch trains SAM 2's image encoder, --sam2 freezes it, --set can't")
        else:
            recipe = _with_setting(recipe, name, _value(text), setting)
            recipe = replace(recipe, samples=0) if name == "epochs" else recipe
        _check(preset, recipe, setting)
    return preset, recipe


def _check(preset: Preset, recipe: Recipe, setting: str) -> None:
    values = vars(preset) | vars(recipe)
    for name, known in CHOICES.items():
        if values[name] not in known:
            raise UserError(f"--set {setting}: {name} is one of {', '.join(map(str, known))}, not {values[name]}")
    for name in ("epochs", "batch_size", "lr", "cpu_processes", "reduction"):
        if not 0 < values[name] < math.inf:
            raise UserError(f"--set {setting}: {name} must be a number above 0, {values[name]} is not")
    if not recipe.losses or recipe.losses.keys() - TERMS.keys():
        raise UserError(f"--set {setting}: the loss needs one or more of the terms {', '.join(TERMS)}, and no other")


def _value(text: str):
    try:
        return ast.literal_eval(re.sub(r"(?<!\w)inf(?!\w)", "1e999", text))
    except (ValueError, SyntaxError):
        return text


def _with_setting(record, name: str, value, setting: str):
    """A copy of a dataclass or dictionary with the value put in at "KEY" or "KEY.KEY"."""
    key, _, rest = name.partition(".")
    of_record = is_dataclass(record)
    kinds = {f.name: f.type for f in fields(record)} if of_record else {k: type(v) for k, v in record.items()}
    if key not in kinds and (of_record or rest):
        raise UserError(f"--set {setting}: {key} is not one of {', '.join(sorted(kinds))}")
    old = getattr(record, key) if of_record else record.get(key)
    kind = kinds.get(key, object)
    kind = get_origin(kind) if isinstance(kind, GenericAlias) else kind  # of tuple[float, float]: tuple
    if rest:
        if not isinstance(old, dict) and not is_dataclass(old):
            raise UserError(f"--set {setting}: {key} has no parts, give it a value by {key}=...")
        value = _with_setting(old, rest, value, setting)
    elif kind is float and type(value) is int:
        value = float(value)
    elif not isinstance(value, kind) or (type(value) is bool and kind is int):
        wanted, given = getattr(kind, "__name__", kind), type(value).__name__
        raise UserError(f"--set {setting}: {name} is of kind {wanted} (now {old!r}), {value!r} is {given}")
    return replace(record, **{key: value}) if of_record else {**record, key: value}


def settings_of(*records) -> dict:
    """The numbers of records by the names that `--set` takes: {"lr": 1e-4, "losses.dice": 0.1, ...}."""
    flat = {}
    for record in records:
        for name, value in (asdict(record) if is_dataclass(record) else record).items():
            parts = settings_of(value) if isinstance(value, dict) else {}
            flat |= {f"{name}.{key}": part for key, part in parts.items()} or {name: value}
    return flat


def differences(old: tuple, new: tuple) -> dict[str, tuple]:
    """{name: (value in the old records, value in the new ones)} of what differs; None where one has no such name."""
    old, new = settings_of(*old), settings_of(*new)
    return {name: (old.get(name), new.get(name)) for name in old | new if old.get(name) != new.get(name)}


def in_words(title: str, record) -> str:
    """Lines with all numbers of a record, as `--set` takes them."""
    values = (f"{name}={value}".replace(" ", "") for name, value in settings_of(record).items())
    return textwrap.fill(" ".join(values), 120, initial_indent=f"{title}: ", subsequent_indent="  ", break_on_hyphens=False)
