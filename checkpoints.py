"""Models from files: a preset with foundation weights, and the checkpoints of train.py."""

import contextlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from encoder import BEiT3Tokenizer
from model import PRESETS, RS2SAM2, Preset
from weights import (
    WeightsError,
    beit3_tokenizer_file,
    existing,
    find_open_clip,
    find_sam2,
    load_beit3,
    load_open_clip,
    load_sam2,
    open_clip_model,
)


class CheckpointError(Exception):
    """A checkpoint that can't be found, read or used. The message is one sentence for the user."""


def build(name, image_size=None, from_scratch=False, sam2_file=None, encoder=None, encoder_weights=None) -> RS2SAM2:
    """The model of a preset with its foundation weights, from files or the hub, or with none.

    name: one of PRESETS; image_size: instead of the preset's; from_scratch: random weights, all trained (`tiny` always);
    sam2_file: a SAM 2 file of the preset's size; encoder: another open_clip model as union encoder; encoder_weights: a
    pretrained tag of open_clip or a file, or BEiT-3's file with beit3.spm beside it. WeightsError in one sentence.
    """
    preset = PRESETS[name]
    if image_size:
        if image_size % 32:
            raise WeightsError(f"image size {image_size}: SAM 2's windows need a multiple of 32")
        preset = replace(preset, image_size=image_size)
    if encoder:
        if name not in ("base", "large"):
            raise WeightsError(f"--encoder {encoder}: preset {name} has a union encoder of its own; use base or large")
        preset = replace(preset, encoder_name=encoder, encoder_tag=None)
    if from_scratch or name == "tiny":
        if sam2_file or encoder_weights:
            raise WeightsError("training from scratch reads no weights: leave out --sam2 and --encoder-weights")
        if preset.encoder == "beit3":
            raise WeightsError(
                "preset paper needs BEiT-3's tokeniser, beside its weights: name them by --encoder-weights"
            )
        return RS2SAM2(replace(preset, train_trunk=True))

    # Every file is looked for before anything is downloaded, and downloaded before anything is built.
    sam2_file = existing(sam2_file) if sam2_file else None
    source = encoder_weights or preset.encoder_tag
    if preset.encoder == "beit3":
        tokenizer = BEiT3Tokenizer(beit3_tokenizer_file(source).read_bytes())
        sam2_file = sam2_file or find_sam2(preset.sam2)
        model = RS2SAM2(preset, tokenizer=tokenizer)
        load_beit3(model, source)
    else:
        if source is None:
            raise WeightsError(f"--encoder {encoder} needs --encoder-weights: a pretrained tag of open_clip or a file")
        # A tag says how its model was trained (activation, normalisation); a file is taken for the name's usual way.
        preset = replace(preset, encoder_tag=None if Path(source).is_file() else source)
        clip = open_clip_model(preset.encoder_name, preset.encoder_tag)
        clip_file = find_open_clip(preset.encoder_name, source)
        sam2_file = sam2_file or find_sam2(preset.sam2)
        load_open_clip(clip, preset.encoder_name, clip_file)
        model = RS2SAM2(preset, clip=clip)
    load_sam2(model, sam2_file)
    return model


@contextlib.contextmanager
def without_weights():
    """Modules made in here have parameters without storage (device meta), to be assigned; their buffers are as ever."""
    hook = register_module_parameter_registration_hook(
        lambda module, name, p: None if p is None else nn.Parameter(p.to("meta"), requires_grad=p.requires_grad)
    )
    try:
        yield
    finally:
        hook.remove()


def rebuild(checkpoint: dict) -> RS2SAM2:
    """The model of a checkpoint's dict, its weights included: the dict's own tensors, nothing is drawn at random or copied.

    Where `read_checkpoint` mapped the file into memory the weights stay there, and the file is read as they are used;
    training writes to memory, never to the file."""
    tokenizer = BEiT3Tokenizer(checkpoint["tokenizer"]) if checkpoint.get("tokenizer") else None
    with without_weights():
        model = RS2SAM2(Preset(**checkpoint["preset"]), tokenizer=tokenizer)
    # Frozen weights may have been saved in half precision: the model is float32.
    dtypes = {k: v.dtype for k, v in model.state_dict().items()}
    state = {k: v.to(dtypes.get(k, v.dtype)) for k, v in checkpoint["model"].items()}
    model.load_state_dict(state, assign=True)
    return model


def read_checkpoint(path: str | Path) -> dict:
    """The dict of a checkpoint that train.py wrote, on the CPU. No code from the file is run; CheckpointError."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: train one with `python train.py`, or name another")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # from zip errors to refused pickles: one sentence serves for all
        raise CheckpointError(f"{path} can't be read as a checkpoint: it is damaged or of another kind") from error
    missing = {"preset", "model", "data", "model_name", "revision"} - set(
        checkpoint if isinstance(checkpoint, dict) else ()
    )
    if missing:
        raise CheckpointError(f"{path} is not a checkpoint of train.py (it holds no {', no '.join(sorted(missing))})")
    return checkpoint


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> tuple[RS2SAM2, dict]:
    """The model of a checkpoint, in evaluation mode, and the checkpoint's dict. Nothing but the file is needed."""
    checkpoint = read_checkpoint(path)
    try:
        model = rebuild(checkpoint)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0][:150]
        raise CheckpointError(
            f"{path} does not fit this version of the code ({reason}): use the one it names"
        ) from error
    return model.to(device).eval(), checkpoint
