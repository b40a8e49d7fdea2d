"""Foundation weights, found or downloaded, and loaded: SAM 2's, open_clip's, BEiT-3's, and the published RS2-SAM 2's."""

import json
import math
import pickle
import re
from pathlib import Path

import open_clip
import torch
from sam2.build_sam import HF_MODEL_ID_TO_FILENAMES
from torch import nn

from encoder import open_clip_config
from model import check_sides
from presets import Preset
from runtime.errors import UserError
from runtime.hub import gigabytes
from weights.files import NUMBERS, load_named, read_state, require_file
from weights.hub import TOKENIZERS, HubFile, cached, fetch

# Sizes of the presets' own files in bytes, by the numbers of their float32 parameters: told where the hub can't be asked.
SIZES = {
    "sam2/sam2_hiera_l.yaml": 897.7e6, "sam2.1/sam2.1_hiera_l.yaml": 897.8e6, "sam2.1/sam2.1_hiera_b+.yaml": 323.4e6,
    "laion2b_s34b_b88k": 598.5e6, "laion2b_s32b_b82k": 1710.5e6, "beit3": 2690.8e6,
    "sam2.1/sam2.1_hiera_t.yaml": 155.8e6, "laion2b_s34b_b79k": 605.1e6,
}  # fmt: skip


def find_weights(
    name: str, preset: Preset, from_scratch: bool = False, sam2_file: str | Path | None = None,
    encoder_weights: str | Path | None = None,
) -> tuple[Path | None, Path | None]:  # fmt: skip
    """The files of SAM 2 and of the union encoder that `build_model` starts from, None where it draws random weights.

    Files that are named are looked for first; what is named nowhere is looked up in the hub's cache and on the hub, told all
    at once, then downloaded. UserError for whatever can't be had. Arguments are those of `build_model`.
    """
    check_sides(preset)
    refuse_contradictions(name, preset, from_scratch, sam2_file, encoder_weights)
    if from_scratch or preset.train_trunk and not sam2_file:
        return None, None
    if preset.train_trunk:  # tiny, around a trained image encoder, which stays as it is
        return require_file(sam2_file), None
    sam2 = require_file(sam2_file) if sam2_file else sam2_on_hub(preset.sam2)
    source = encoder_weights or preset.encoder_tag
    if preset.encoder == "beit3":
        encoder = beit3_file(source, besides=sam2 if isinstance(sam2, HubFile) and not cached(sam2) else None)
    elif source is None:
        raise UserError(f"preset {name} names no tag of {preset.encoder_name}: give a tag or a file by --encoder-weights")
    else:
        open_clip_config(preset.encoder_name)  # refuses a model that is not plain
        encoder = open_clip_file(preset.encoder_name, source)
    fetched = iter(fetch([file for file in (encoder, sam2) if isinstance(file, HubFile)]))
    encoder, sam2 = (next(fetched) if isinstance(file, HubFile) else file for file in (encoder, sam2))
    return sam2, encoder


def refuse_contradictions(name: str, preset: Preset, from_scratch: bool, sam2_file, encoder_weights) -> None:
    """UserError for options that contradict the preset or each other."""
    beit3 = preset.encoder == "beit3"
    if beit3 and (given := [key for key in ("encoder_name", "encoder_size") if getattr(preset, key)]):
        raise UserError(f"--set {given[0]}=...: preset {name}'s BEiT-3 has its own; leave it out, or use base or large")
    if from_scratch or (preset.train_trunk and not sam2_file):
        if beit3:
            raise UserError(
                f"preset {name} can't start from scratch: BEiT-3's tokeniser comes with its weights; use --model large"
            )
        if sam2_file or encoder_weights:
            raise UserError("training from scratch reads no weights: leave out --sam2 and --encoder-weights")
    elif preset.train_trunk and encoder_weights:
        raise UserError(f"preset {name} has no encoder weights to start from: leave out --encoder-weights")


def sam2_on_hub(config: str) -> HubFile:
    """The file of SAM 2 that belongs to a YAML of the sam2 package; UserError where none is published."""
    for repository, (yaml, filename) in HF_MODEL_ID_TO_FILENAMES.items():
        if yaml == f"configs/{config}":
            return HubFile(repository, (filename,), "--sam2 FILE", SIZES.get(config, 0))
    raise UserError(f"no SAM 2 weights are published for {config}: name a file with --sam2 FILE")


def load_sam2(model: nn.Module, path: str | Path) -> None:
    """Fill the SAM 2 part (trunk, neck, prompt encoder, mask decoder) from a SAM 2 or 2.1 file of the same size."""
    added = re.compile(r"adapter\.|^(union_encoder|text_|sparse_prompt|mask_prompt|decoder_fusion)")
    state = {f"visual_model.{name}": tensor for name, tensor in read_state(path).items()}
    load_named(model, state, str(path), required=lambda key: not added.search(key))


def tag_and_file(source: str | Path) -> tuple[str | None, str | Path | None]:
    """A pretrained tag, a file, or TAG=FILE -> (the tag or None, the file or None)."""
    if Path(source).is_file():
        return None, source
    tag, _, file = str(source).partition("=")
    return tag, file or None


def open_clip_file(name: str, source: str | Path) -> Path | HubFile:
    """The file of an open_clip model's weights that a tag, a file or TAG=FILE names, on the disk or on the hub; UserError."""
    tag, file = tag_and_file(source)
    if tag is not None and not open_clip.is_pretrained_cfg(name, tag):
        raise UserError(
            f"{tag!r} is neither a file nor a pretrained tag of open_clip's {name}: name one with --encoder-weights; its tags "
            f"are {', '.join(open_clip.list_pretrained_tags_by_model(name)) or 'none'}"
        )
    if file:
        return require_file(file)
    config = open_clip.get_pretrained_cfg(name, tag)
    if not config.get("hf_hub"):
        raise UserError(f"open_clip's {name} ({tag}) is on no hub: fetch {config.get('url') or 'its file'} and name it with "
                        f"--encoder-weights {tag}=FILE")  # fmt: skip
    repository, _, filename = config["hf_hub"].rpartition("/")
    names = (filename,) if filename else ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    return HubFile(repository, names, f"--encoder-weights {tag}=FILE", SIZES.get(tag, 0))


def load_open_clip(clip: nn.Module, name: str, path: str | Path) -> None:
    """Fill a whole CLIP from a file of its weights. The position table is interpolated where the resolution differs."""
    try:
        with torch.serialization.safe_globals(NUMBERS):
            open_clip.load_checkpoint(clip, str(path))
    except Exception as error:
        refused = isinstance(error, pickle.UnpicklingError)  # at length
        reason = "it is damaged or of another kind" if refused else " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a checkpoint of open_clip's {name} ({reason}): name another file") from error


def beit3_sizes(path: str | Path) -> dict[str, int]:
    """The arguments of BEiT3Encoder that a BEiT-3 file was made with, by its shapes: base or large, at any resolution."""
    shapes = {name: tensor.shape for name, tensor in read_state(path).items()}
    try:
        vocabulary, width = shapes["beit3.text_embed.weight"]
        patch = shapes["beit3.vision_embed.proj.weight"][-1]
        tables = "beit3.encoder.embed_positions.{}.weight".format
        return {
            "width": width, "heads": width // 64, "vocabulary": vocabulary, "patch": patch,
            "layers": sum(name.endswith(".self_attn.q_proj.A.weight") for name in shapes),
            "hidden": shapes["beit3.encoder.layers.0.ffn.A.fc1.weight"][0],
            "image_size": patch * math.isqrt(shapes[tables("A")][0] - 3), "text_positions": shapes[tables("B")][0],
        }  # fmt: skip
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{path} is not a BEiT-3 file: it lacks {error}, or has it in another shape") from None


def beit3_file(file: str | Path | None, besides: HubFile | None) -> Path:
    """The path of BEiT-3's weights, if they are there with their tokeniser; UserError, which names `besides` as missing too."""
    if file is None:
        too = f"; missing too, and downloaded then: {besides}" if besides else ""
        raise UserError(
            f"BEiT-3 is not on a hub: download beit3_large_patch16_224.pth ({gigabytes(SIZES['beit3'])} in float32) and "
            f"beit3.spm from its authors' release page, keep them in one folder and name the first with --encoder-weights{too}"
        )
    beit3_tokenizer_file(file)
    beit3_sizes(file)
    return Path(file)


def beit3_tokenizer_file(weights: str | Path) -> Path:
    """The SentencePiece model beit3.spm beside BEiT-3's weights; UserError."""
    spm = require_file(weights).with_name("beit3.spm")
    if not spm.is_file():
        raise UserError(f"no BEiT-3 tokeniser at {spm}: put beit3.spm beside the weights")
    return spm


def load_beit3(model: nn.Module, path: str | Path) -> None:
    """Fill the union encoder from a BEiT-3 file such as beit3_large_patch16_224.pth; heads it may hold are left out."""
    state = {f"mm_extractor.{name}": tensor for name, tensor in read_state(path).items() if name.startswith("beit3.")}
    load_named(model, state, str(path), required=lambda key: key.startswith("union_encoder."))


def published_files(folder: Path) -> list[Path]:
    """The weights in a folder as `save_pretrained` leaves it: one file or all shards; UserError if incomplete."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if not index.is_file():
            if (folder / name).is_file():
                return [folder / name]
            continue
        try:
            shards = sorted({folder / Path(shard).name for shard in json.loads(index.read_text())["weight_map"].values()})
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{index} is no index of shards (weight_map: names with files): download it again") from error
        if absent := [shard.name for shard in shards if not shard.is_file()]:
            raise UserError(f"{folder} lacks {', '.join(absent[:3])}, which {index.name} names: download them too")
        return shards
    inside = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise UserError(f"{folder} holds {inside}: expected best.pt, or model.safetensors or pytorch_model.bin (also in shards)")


def published_tokenizer(folder: Path) -> Path:
    """The SentencePiece model among a published checkpoint's tokeniser files; UserError."""
    for name in TOKENIZERS:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"no tokeniser in {folder}: put sentencepiece.bpe.model, which comes with the checkpoint, or beit3.spm beside it"
    )


def load_published(model: nn.Module, files: list[Path]) -> None:
    """Fill the whole model from a published RS2-SAM 2 checkpoint (preset `paper`, or a small model of its kind)."""
    state = {name: tensor for file in files for name, tensor in read_state(file).items()}
    load_named(model, state, str(files[0].parent if len(files) > 1 else files[0]), required=lambda key: True)
