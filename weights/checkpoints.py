"""Models from files: a preset with foundation weights, the published checkpoint, and those of train.py."""

import re
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from encoder import BEiT3Encoder, BEiT3Tokenizer, OpenCLIPEncoder, open_clip_model
from model import RS2SAM2
from presets import PRESETS, Preset
from runtime.errors import UserError
from weights.names import is_published
from weights.foundation import (
    beit3_sizes,
    beit3_tokenizer_file,
    existing,
    find_open_clip,
    find_sam2,
    load_beit3,
    load_open_clip,
    load_plain,
    load_published,
    load_sam2,
    published_files,
    published_tokenizer,
    read_state,
    tag_and_file,
)


class Unfilled(TorchFunctionMode):
    """Inside `with Unfilled():` new parameters get memory but no initial values: weights that are about to fill them all
    follow. Drawing 700 million numbers for nothing takes minutes, and memory that is never written is never taken.

    `replaced`: tensors will take their place (assign=True), so what is drawn by torch.randn gets no memory either."""

    def __init__(self, replaced=False):
        super().__init__()
        self.replaced = replaced

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if self.replaced and name == "randn":
            kwargs = kwargs | {"device": "meta"}
        target = args[0] if args else kwargs.get("tensor")  # torch.nn.init's functions name theirs
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        return target if in_place and isinstance(target, nn.Parameter) else func(*args, **kwargs)


LARGEST = 4096  # pixels a side of what a model looks at


def check_image_size(image_size: int) -> int:
    """The side of SAM 2's input, if it can be one; UserError."""
    if image_size % 32 or image_size > LARGEST:
        raise UserError(f"image size {image_size}: SAM 2's windows need a multiple of 32, up to {LARGEST}; choose one")
    return image_size


def build(
    name, image_size=None, from_scratch=False, sam2_file=None, encoder=None, encoder_weights=None, encoder_size=None,
    without=(),
) -> RS2SAM2:  # fmt: skip
    """The model of a preset with its foundation weights, from files or the hub, or with none.

    name: one of PRESETS; image_size: instead of the preset's; from_scratch: random weights, all trained (`tiny` is, without a
    sam2_file); sam2_file: a SAM 2 file of the preset's size; encoder: another open_clip model as union encoder;
    encoder_weights: a pretrained tag of open_clip, a file or TAG=FILE, or BEiT-3's file with beit3.spm beside it;
    encoder_size: the side of the open_clip model's images (a pretrained position table is interpolated); without: names of
    PARTS, left out.
    UserError in one sentence.
    """
    preset = replace(PRESETS[name], without=tuple(without))
    if image_size:
        preset = replace(preset, image_size=check_image_size(image_size))
    if encoder and name not in ("base", "large"):
        raise UserError(f"--encoder {encoder}: preset {name} has a union encoder of its own; use base or large")
    if encoder:
        preset = replace(preset, encoder_name=encoder, encoder_tag=None)
    if encoder_size:
        option = f"--encoder-size {encoder_size}"
        if preset.encoder == "beit3":
            raise UserError(f"{option}: preset {name}'s BEiT-3 has a size of its own; use another preset")
        if encoder_size > LARGEST:
            raise UserError(f"{option}: the union encoder takes images of up to {LARGEST} pixels a side")
        preset = replace(preset, encoder_size=encoder_size)
    if from_scratch or (preset.train_trunk and not sam2_file):
        if preset.encoder == "beit3":
            raise UserError("preset paper can't start from scratch: BEiT-3's tokeniser comes with its weights; use large")
        if sam2_file or encoder_weights:
            raise UserError("training from scratch reads no weights: leave out --sam2 and --encoder-weights")
        return RS2SAM2(replace(preset, train_trunk=True))

    if preset.train_trunk:  # tiny, around a trained image encoder, which stays as it is
        if encoder_weights:
            raise UserError(f"preset {name} has no encoder weights to start from: leave out --encoder-weights")
        file, model = existing(sam2_file), RS2SAM2(replace(preset, train_trunk=False))
        load_sam2(model, file)
        return model

    # Files that are named are looked for first, names and sizes checked; then what is named nowhere is downloaded.
    sam2_file = existing(sam2_file) if sam2_file else None
    source = encoder_weights or preset.encoder_tag
    if preset.encoder == "beit3":
        tokenizer = beit3_tokenizer_file(source).read_bytes()
        preset = replace(preset, encoder_args=beit3_sizes(source))
        sam2_file = sam2_file or find_sam2(preset.sam2)
        with Unfilled():
            union_encoder = BEiT3Encoder(**preset.encoder_args)
        union_encoder.tokenizer = BEiT3Tokenizer(tokenizer, union_encoder.context)
        model = RS2SAM2(preset, union_encoder)
        load_beit3(model, source)
    else:
        if source is None:
            raise UserError(f"--encoder {encoder} needs --encoder-weights: a pretrained tag of open_clip or a file")
        # A tag says how its model was trained (activation, normalisation); a file alone is taken for the name's usual way.
        preset = replace(preset, encoder_tag=tag_and_file(source)[0])
        with Unfilled():
            clip = open_clip_model(preset.encoder_name, preset.encoder_tag, preset.encoder_size)
        clip_file = find_open_clip(preset.encoder_name, source)
        sam2_file = sam2_file or find_sam2(preset.sam2)
        load_open_clip(clip, preset.encoder_name, clip_file)
        model = RS2SAM2(preset, OpenCLIPEncoder(clip, **preset.encoder_args))
    load_sam2(model, sam2_file)
    return model


def stored_preset(stored: dict, entries: int) -> Preset:
    """The preset of a checkpoint with so many entries, if it can but describe a network: some of its fields are handed to
    libraries that would import, fetch and run what a text in the right place names. UserError else."""
    def sound(value, key="", depth=0):
        if isinstance(value, dict):
            names = all(isinstance(k, str) and re.fullmatch("[a-z][a-z0-9_]*", k) for k in value)
            return depth < 4 and names and all(sound(v, k, depth + 1) for k, v in value.items())
        if isinstance(value, (list, tuple)):
            return len(value) < 100 and not any(isinstance(v, (dict, list, tuple)) or not sound(v, key, depth) for v in value)
        if isinstance(value, str):  # a plain name, and only in a field of the preset itself
            return depth == 1 and re.fullmatch(r"|[\w+-][\w.+-]{,99}(/[\w+-][\w.+-]{,99})?", value) is not None
        if "layers" in key or key in ("depth", "stages"):
            return isinstance(value, int) and 0 <= value <= max(entries, 100)
        large = LARGEST if "image" in key or key in ("encoder_size", "context_length") else 2**16
        return value is None or (isinstance(value, (int, float)) and 0 <= value <= large)

    if not isinstance(stored, dict) or not sound(stored):
        raise UserError("the checkpoint's preset describes no network: the file is damaged or was made to do harm")
    return Preset(**stored)


def rebuild(checkpoint: dict, image_size: int | None = None, path: str | Path = "the checkpoint") -> RS2SAM2:
    """The model of a checkpoint's dict, its weights included; UserError.

    image_size: instead of the one it was trained at; path: what an error calls it."""
    try:
        preset = stored_preset(checkpoint["preset"], len(checkpoint.get("model", ())))
        if preset.architecture == "ours" and checkpoint["preset"].get("version") != Preset.version:
            raise ValueError("its weights are of an older form of architecture ours")
        return filled(replace(preset, image_size=check_image_size(image_size)) if image_size else preset, checkpoint)
    except UserError:
        raise
    except UserError as error:
        raise UserError(str(error)) from error
    except Exception as error:  # a network of another time, or a damaged one, can fail anywhere in four libraries
        reason, made_by = (str(error).splitlines() or [""])[0][:150], checkpoint.get("revision") or "that made it"
        raise UserError(
            f"{path} does not fit this version of the code ({reason}): use the revision {made_by}, or train it again"
        ) from error


def filled(preset: Preset, checkpoint: dict) -> RS2SAM2:
    """The model of the preset with the weights of the checkpoint's dict."""
    with Unfilled(replaced="files" not in checkpoint):
        model = RS2SAM2(preset)
    if (stored := checkpoint.get("tokenizer")) is not None:
        stored = stored.numpy().tobytes() if torch.is_tensor(stored) else stored
        model.union_encoder.tokenizer = BEiT3Tokenizer(stored, model.union_encoder.context)
    if "files" in checkpoint:
        load_published(model, checkpoint["files"])
    else:
        # Not copied: the weights stay in the file, which `read_checkpoint` has mapped, and are read as they are used; what
        # training changes goes to memory. Frozen ones may have been saved in half precision: the model is float32.
        dtypes = {key: value.dtype for key, value in model.state_dict().items()}
        state = {key: value.to(dtypes.get(key, value.dtype)) for key, value in checkpoint["model"].items()}
        model.load_state_dict(state, assign=True)
    return model


def read_published(path: Path, files: list[Path]) -> dict:
    """What `rebuild` needs of a published checkpoint, in the form of our own, but for the weights: these stay in `files`."""
    folder = path if path.is_dir() else path.parent
    return {
        "preset": asdict(PRESETS["paper"]), "files": files, "tokenizer": published_tokenizer(folder).read_bytes(),
        "model_name": "paper", "data": None, "revision": "", "epoch": None,
    }  # fmt: skip


def read_checkpoint(path: str | Path, checksums: bool = False) -> dict:
    """The dict of a checkpoint, on the CPU: what train.py wrote, or the like for a published one; UserError.

    path: a file, the folder of a run (its best.pt is taken), or a folder as `save_pretrained` left it. Which kind it is
    shows in the names it holds. No code from the file is run. checksums: read it all to compare them (.pt files).
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "best.pt").is_file():
            return read_published(path, published_files(path))
        path = path / "best.pt"
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: train one with `python train.py`, or name another")
    if path.suffix == ".safetensors":
        checkpoint = read_state(path)
    else:
        try:
            checkpoint = load_plain(path, checksums)
        except Exception as error:  # from zip errors to refused pickles: one sentence serves for all
            raise UserError(f"{path} can't be read as a checkpoint: it is damaged or of another kind") from error
    names = {str(name) for name in checkpoint} if isinstance(checkpoint, dict) else set()
    if is_published(names):
        return read_published(path, [path])
    if missing := {"preset", "model", "data", "model_name", "revision"} - names:
        raise UserError(
            f"{path} is neither a checkpoint of train.py (it holds no {', no '.join(sorted(missing))}) nor published "
            f"RS2-SAM 2 weights (no names that begin with mm_extractor.beit3): foundation weights go to train.py"
        )
    return checkpoint


def read_run(run: Path) -> tuple[dict, Path]:
    """(the state to go on with, its file) of a run's folder or of a file such as its last.pt.

    A folder's previous.pt serves where last.pt is absent or damaged, and that is said. UserError."""
    last, previous = (run / "last.pt", run / "previous.pt") if run.is_dir() else (run, run)
    if not last.exists() and not previous.exists():
        raise UserError(
            f"nothing to resume: {run if run.suffix else run / 'last.pt'} does not exist; give the folder of a run that holds "
            f"last.pt"
        )
    try:
        state, file = read_checkpoint(last, checksums=True), last
    except UserError as error:
        try:
            state, file = read_checkpoint(previous, checksums=True), previous
        except UserError:
            raise error from None
        wrong = "can't be read" if last.exists() else "is missing"
        print(f"{last} {wrong}: going on from {previous}, the state saved before it", flush=True)
    if not {"optimizer", "log", "running"} <= state.keys():
        raise UserError(
            f"{file} holds weights alone, or is an older version's, and can't be gone on with: name the run's folder or its "
            f"last.pt"
        )
    return state, file


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu", image_size: int | None = None):
    """(the model of a checkpoint in evaluation mode, the checkpoint's dict). Nothing but the file or folder is needed."""
    try:
        checkpoint = read_checkpoint(path)
    except UserError as error:
        raise UserError(str(error)) from error
    return rebuild(checkpoint, image_size, path).to(device).eval(), checkpoint
