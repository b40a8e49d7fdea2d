"""Foundation weights, found or downloaded, and loaded: SAM 2's, open_clip's, BEiT-3's, and the published RS2-SAM 2's."""

import json
import math
import re
from pathlib import Path

import open_clip
from huggingface_hub import hf_hub_download
from sam2.build_sam import HF_MODEL_ID_TO_FILENAMES
from torch import nn

from runtime.errors import UserError
from weights.files import load_named, read_state, require_file


def find_sam2(config: str) -> Path:
    """The SAM 2 file that belongs to a YAML of the sam2 package, from the hub's cache or downloaded; UserError."""
    for repository, (yaml, filename) in HF_MODEL_ID_TO_FILENAMES.items():
        if yaml == f"configs/{config}":
            try:
                return Path(hf_hub_download(repository, filename))
            except Exception as error:  # no network, no such file, no permission: the way out is the same
                raise UserError(
                    f"SAM 2 weights could not be downloaded ({repository}, {filename}): fetch {filename} from the model hub "
                    f"or from SAM 2's release page and name it with --sam2 FILE"
                ) from error
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


def find_open_clip(name: str, source: str | Path) -> Path:
    """The file of an open_clip model's weights: the one that `source` names, or its tag's, downloaded or cached; UserError."""
    tag, file = tag_and_file(source)
    if tag is not None and not open_clip.is_pretrained_cfg(name, tag):
        raise UserError(
            f"{tag!r} is neither a file nor a pretrained tag of open_clip's {name}: name one with --encoder-weights; its tags "
            f"are {', '.join(open_clip.list_pretrained_tags_by_model(name)) or 'none'}"
        )
    if file:
        return require_file(file)
    try:
        return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(name, tag)))
    except Exception as error:  # no network, no such file, no permission: the way out is the same
        raise UserError(
            f"open_clip's {name} ({tag}) could not be downloaded: fetch its file from the model hub and name it "
            f"with --encoder-weights {tag}=FILE"
        ) from error


def load_open_clip(clip: nn.Module, name: str, path: str | Path) -> None:
    """Fill a whole CLIP from a file of its weights. The position table is interpolated where the resolution differs."""
    try:
        open_clip.load_checkpoint(clip, str(path))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
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


def beit3_tokenizer_file(weights: str | Path | None) -> Path:
    """The SentencePiece model beit3.spm beside BEiT-3's weights; UserError."""
    if weights is None:
        raise UserError(
            "BEiT-3 is not on a hub: download beit3_large_patch16_224.pth and beit3.spm from its authors' release page, "
            "keep them in one folder and name the first with --encoder-weights"
        )
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
    for name in ("sentencepiece.bpe.model", "beit3.spm"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"no tokeniser in {folder}: put sentencepiece.bpe.model, which comes with the checkpoint, or beit3.spm beside it"
    )


def load_published(model: nn.Module, files: list[Path]) -> None:
    """Fill the whole model from a published RS2-SAM 2 checkpoint (preset `paper`, or a small model of its kind)."""
    state = {name: tensor for file in files for name, tensor in read_state(file).items()}
    load_named(model, state, str(files[0].parent if len(files) > 1 else files[0]), required=lambda key: True)
