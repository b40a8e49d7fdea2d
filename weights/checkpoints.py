"""Models from files: a preset with foundation weights, checkpoints of train.py, and the published one.

A checkpoint of train.py holds the complete Preset and Recipe as plain values, the state dict under "model", and what an
ablation left out under "left_out". Older ones, whose preset names its architecture by a word, are brought into this form.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from hydra.errors import InstantiationException
from torch import nn
from torch.overrides import TorchFunctionMode

from annotations.layouts import NAMES
from encoder import BEiT3Encoder, BEiT3Tokenizer, OpenCLIPEncoder, open_clip_model
from fusion import PUBLISHED, Architecture
from model import RS2SAM2
from presets import OURS, PRESETS, RECIPES, Preset, Recipe
from runtime.errors import UserError
from weights.files import read_file
from weights.foundation import (
    beit3_sizes,
    beit3_tokenizer_file,
    find_weights,
    load_beit3,
    load_open_clip,
    load_published,
    load_sam2,
    published_files,
    published_tokenizer,
    tag_and_file,
)
from weights.hub import commit_of, resolve
from weights.names import is_published
from weights.saved import is_saved, read_saved

IN_THE_FILE = ("model", "average", "optimizers", "tokenizer")  # entries of a checkpoint whose tensors are mapped


class skip_initialisation(TorchFunctionMode):
    """Context in which new parameters get memory but no initial values, as all of them will be loaded.

    Drawing 900 million numbers takes minutes. Buffers are filled as ever, which torch.device("meta") would not do.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        target = args[0] if args else kwargs.get("tensor")  # torch.nn.init's functions name theirs
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        return target if in_place and isinstance(target, nn.Parameter) else func(*args, **kwargs)


def build_model(
    name: str, preset: Preset, *, from_scratch: bool = False, sam2_file: str | Path | None = None,
    encoder_weights: str | Path | None = None,
) -> RS2SAM2:  # fmt: skip
    """The model of a preset with its foundation weights, from files or the hub, or with none; UserError.

    name: what errors call the preset. from_scratch: random weights, all trained (a preset with train_trunk has them without a
    sam2_file). sam2_file: a SAM 2 file of the preset's size. encoder_weights: a pretrained tag of open_clip, a file or
    TAG=FILE, or BEiT-3's file with beit3.spm beside it; a position table of another resolution is interpolated.
    """
    sam2, encoder = find_weights(name, preset, from_scratch, sam2_file, encoder_weights)
    try:
        model = _built(preset, sam2, encoder, encoder_weights)
    except (AssertionError, ValueError, InstantiationException) as error:  # of four libraries: sizes that don't fit each other
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"no network has the sizes of this preset ({reason}): change what --set gives it") from error
    if sam2 is not None:
        load_sam2(model, sam2)
    return model


def _built(preset: Preset, sam2: Path | None, encoder: Path | None, encoder_weights) -> RS2SAM2:
    """The model of a preset around the union encoder of a file; with random weights where there is none."""
    if encoder is None:
        return RS2SAM2(replace(preset, train_trunk=sam2 is None))
    if preset.encoder == "beit3":
        return _with_beit3(preset, encoder)
    # A tag says how its model was trained (activation, normalisation); a file alone is taken for the name's usual way.
    preset = replace(preset, encoder_tag=tag_and_file(encoder_weights or preset.encoder_tag)[0])
    with skip_initialisation():
        clip = open_clip_model(preset.encoder_name, preset.encoder_tag, preset.encoder_size)
    load_open_clip(clip, preset.encoder_name, encoder)
    return RS2SAM2(preset, OpenCLIPEncoder(clip, **preset.encoder_args))


def _with_beit3(preset: Preset, file: Path) -> RS2SAM2:
    """The model of a preset around the BEiT-3 of a file, whose sizes become the preset's."""
    tokenizer = beit3_tokenizer_file(file).read_bytes()
    preset = replace(preset, encoder_args=beit3_sizes(file))
    with skip_initialisation():
        union_encoder = BEiT3Encoder(**preset.encoder_args)
    union_encoder.tokenizer = BEiT3Tokenizer(tokenizer, union_encoder.context)
    model = RS2SAM2(preset, union_encoder)
    load_beit3(model, file)
    return model


def read_checkpoint(path: str | Path) -> dict:
    """The dict of a checkpoint of train.py, or the like for a published one; UserError.

    path: a file, the folder of a run (its best.pt is taken), a folder as the predictor's or the published model's
    `save_pretrained` left it, or any of these on the hub: OWNER/NAME[@REVISION][:FILE or FOLDER]. Which kind it is shows in
    the names it holds; one from the hub says its commit under "hub". Tensors are on the CPU and stay in the file until they
    are copied.
    """
    found = resolve(path)
    return _read(found) | ({"hub": commit_of(found)} if found != Path(path) else {})


def _read(path: Path) -> dict:
    if path.name == "model.safetensors" and is_saved(path.parent):
        path = path.parent
    if path.is_dir() and (path / "best.pt").is_file():
        path = path / "best.pt"
    if path.is_dir() and not is_saved(path):
        return _published(path, published_files(path))
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path} is a link to {path.readlink()}, which is not there: name another, or remove the link")
    if not path.exists():
        raise UserError(f"no checkpoint at {path}: train one with `python train.py`, or name another")
    checkpoint = read_saved(path) if path.is_dir() else read_file(path)
    names = {str(name) for name in checkpoint} if isinstance(checkpoint, dict) else set()
    if is_published(names):
        return _published(path.parent, [path])
    if missing := {"preset", "model", "data", "model_name", "revision"} - names:
        raise UserError(
            f"{path} is neither a checkpoint of train.py (it holds no {', no '.join(sorted(missing))}) nor published "
            f"RS2-SAM 2 weights (no names that begin with mm_extractor.beit3): foundation weights go to train.py, "
            f"by --sam2 or --encoder-weights"
        )
    return _renewed(checkpoint, path)


def _published(folder: Path, files: list[Path]) -> dict:
    """A published checkpoint in the form of our own, but for the weights, which stay in `files`. What it was trained on is
    told by its folder's name, as in OWNER/NAME:rrsisd."""
    said = re.sub("[^a-z]", "", folder.name.lower())  # rrsisd, refseg
    data = next((name for name in NAMES if len(said) > 4 and name.lower().replace("-", "").startswith(said)), None)
    return {
        "preset": asdict(PRESETS["paper"]), "recipe": asdict(RECIPES["paper"]), "left_out": [], "files": files,
        "tokenizer": published_tokenizer(folder).read_bytes(), "model_name": "paper", "data": data, "revision": "",
        "epoch": None,
    }  # fmt: skip


def _renewed(checkpoint: dict, path: Path) -> dict:
    """The checkpoint in today's form: older ones have a word for the architecture, `without` in the preset, no recipe."""
    preset, name = checkpoint["preset"], checkpoint["model_name"]
    if not isinstance(preset, dict) or not isinstance(word := preset.get("architecture"), str):
        return checkpoint
    architectures = {"ours": OURS, "published": PUBLISHED}
    if word not in architectures or name not in RECIPES:
        raise _misfit(checkpoint, f"architecture {word} of model {name} is unknown", path)
    if word == "ours" and preset.get("version") != 2:
        raise _misfit(checkpoint, "its weights are of an older form of architecture ours", path)
    kept = {key: value for key, value in preset.items() if key not in ("without", "version")}
    return checkpoint | {
        "preset": kept | {"architecture": asdict(architectures[word])},
        "recipe": asdict(RECIPES[name]),
        "left_out": list(preset.get("without", ())),
    }


def _misfit(checkpoint: dict, reason: str, path: str | Path) -> UserError:
    made_by = checkpoint.get("revision") or "that made it"
    return UserError(f"{path} does not fit this version of the code ({reason}): use the revision {made_by}, or train it again")


def stored_preset(checkpoint: dict, path: str | Path = "the checkpoint") -> Preset:
    """The Preset that a checkpoint holds as plain values; UserError. What its texts may name, those check who read them."""
    preset = _record(Preset, checkpoint.get("preset"), checkpoint, path)
    return replace(preset, architecture=_record(Architecture, preset.architecture, checkpoint, path))


def stored_recipe(checkpoint: dict, path: str | Path = "the checkpoint") -> Recipe:
    """The Recipe that a checkpoint holds as plain values; UserError."""
    return _record(Recipe, checkpoint.get("recipe"), checkpoint, path)


def _record(kind: type, values, checkpoint: dict, path: str | Path):
    """The dataclass from the dictionary that asdict made of it."""
    known = {field.name: field.default for field in fields(kind)}
    if not isinstance(values, dict):
        raise _misfit(checkpoint, f"it holds no {kind.__name__.lower()}", path)
    for what, odd in (("lacks", known.keys() - values.keys()), ("has an unknown", values.keys() - known.keys())):
        if odd:
            raise _misfit(checkpoint, f"its {kind.__name__.lower()} {what} {sorted(map(str, odd))[0]}", path)
    return kind(**{key: tuple(value) if isinstance(known[key], tuple) else value for key, value in values.items()})


def rebuild(
    checkpoint: dict, edit: Callable[[RS2SAM2], object] | None = None, image_size: int | None = None,
    path: str | Path = "the checkpoint",
) -> RS2SAM2:  # fmt: skip
    """The model of a checkpoint's dict, its weights copied into float32; UserError.

    edit: called on the model before its weights are loaded (the stand-ins of an ablation); image_size: instead of the one it
    was trained at; path: what an error calls it.
    """
    try:
        if (left_out := checkpoint.get("left_out")) and edit is None:
            without = f"without {', '.join(left_out)}"
            raise UserError(f"{path} is an ablation's, {without}: score it by `python -m experiments.ablate`")
        preset = stored_preset(checkpoint, path)
        with skip_initialisation():
            model = RS2SAM2(replace(preset, image_size=image_size) if image_size else preset)
        if edit:
            edit(model)
        load_weights(model, checkpoint)
        return model
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a network of another time, or a damaged one, can fail anywhere in four libraries
        raise _misfit(checkpoint, " ".join(str(error).split())[:150], path) from error


def load_weights(model: RS2SAM2, checkpoint: dict) -> None:
    """Copy the weights of a checkpoint's dict into its model, and give it the tokeniser."""
    if (tokenizer := checkpoint.get("tokenizer")) is not None:
        tokenizer = tokenizer.numpy().tobytes() if torch.is_tensor(tokenizer) else tokenizer
        model.union_encoder.tokenizer = BEiT3Tokenizer(tokenizer, model.union_encoder.context)
    if "files" in checkpoint:
        load_published(model, checkpoint["files"])
    else:
        model.load_state_dict(checkpoint["model"])


def load_checkpoint(
    path: str | Path, device: torch.device | str = "cpu", edit: Callable[[RS2SAM2], object] | None = None,
    image_size: int | None = None,
) -> tuple[RS2SAM2, dict]:  # fmt: skip
    """(the model of a checkpoint in evaluation mode, the checkpoint's dict less its tensors). Only the file is needed, and
    not once it is loaded. `edit` and `image_size` are those of `rebuild`."""
    checkpoint = read_checkpoint(path)
    model = rebuild(checkpoint, edit, image_size, path).to(device).eval()
    return model, {key: value for key, value in checkpoint.items() if key not in IN_THE_FILE}


def read_run(path: str | Path) -> tuple[dict, Path]:
    """(the state to go on with, its file) of a run's folder or of a file such as its last.pt; UserError."""
    path = Path(path)
    last = path if path.suffix == ".pt" else path / "last.pt"
    if not last.is_file():
        raise UserError(f"nothing to resume: {last} does not exist; give the folder of a run that holds last.pt")
    state = read_checkpoint(last)
    if "optimizer" in state:
        raise UserError(
            f"{last} was written by an earlier revision ({state['revision']}): finish the run with that one, or start from its "
            f"weights by --init"
        )
    if missing := [name for name in ("optimizers", "log", "running", "samples") if name not in state]:
        raise UserError(
            f"{last} holds weights alone (no {missing[0]}) and can't be gone on with: name the run's folder or its last.pt, or "
            f"start from these weights by --init"
        )
    return state, last


def model_entries(model: RS2SAM2) -> dict:
    """What a checkpoint holds of its model: "preset" as plain values, the state dict "model", the "tokenizer" as bytes."""
    tokenizer = getattr(model.union_encoder.tokenizer, "model", None)
    tokenizer = tokenizer and torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8)
    return {"preset": asdict(model.preset), "model": model.state_dict(), "tokenizer": tokenizer}
