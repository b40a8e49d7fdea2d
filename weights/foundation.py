"""Reading weights by their own key names: SAM 2's, open_clip's, BEiT-3's, and the published RS2-SAM 2's.

The published state dict is renamed key by key, nothing is reshaped: RENAMES are the rules, UNUSED what such files hold
and this model does not use. SAM 2's own files name their parts as the published one does, less a prefix, and so do
BEiT-3's: they take the same road. Files are read without running code: `torch.load(weights_only=True)` or safetensors.
"""

import itertools
import json
import math
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import open_clip
import torch
from safetensors import safe_open
from torch import Tensor, nn

from runtime.errors import UserError
from weights.names import is_published, is_unused, our_name


# All that a pickle of tensors has to name. What torch.load would admit besides can make a few bytes fill the memory.
NAMES = re.compile(
    r"collections OrderedDict|(__builtin__|builtins) set|torch(\.storage)? \w+Storage|torch (Size|device|b?float\d+|u?int\d+|"
    r"bool|complex\d+|float8_\w+)|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch\.nn\.parameter Parameter"
)


def is_archive(path: Path) -> bool:
    """Whether torch.load will take the file for a zip file, as torch.save has long written, and not for its older kind."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\3\4"


def check_pickle(file: IO[bytes]) -> None:
    for code, argument, _ in pickletools.genops(file):
        if code.name in ("GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4") and not NAMES.fullmatch(str(argument)):
            raise ValueError(f"it asks for {str(argument)[:60]!r}, which weights don't need")


def check_plain(path: Path, checksums: bool = False) -> None:
    """Refuse (ValueError) a .pt file that could fill the memory: its parts are stored as they are, and no larger than the
    file; its pickles name nothing but tensors. checksums: compare those of all parts too, which reads the whole file."""
    with open(path, "rb") as file:
        if not is_archive(path):
            for _ in range(5):  # in the older kind: two numbers, the system, the object, the names of its storages
                check_pickle(file)
            return
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
            if any(part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size for part in parts):
                raise ValueError("it is compressed, which weights are not")
            if sum(part.file_size for part in parts) > path.stat().st_size:
                raise ValueError("its parts claim to be larger than it is")
            for part in parts:
                if part.filename.endswith(".pkl"):
                    with archive.open(part) as pickled:
                        check_pickle(pickled)
            if checksums and (damaged := archive.testzip()):
                raise ValueError(f"the checksum of {damaged} is wrong")


def load_plain(path: Path, checksums: bool = False):
    """torch.load of a .pt file of unknown origin, on the CPU: no code from it is run, and it takes no more memory than its
    size. An exception of nearly any kind where the file is damaged or hostile."""
    check_plain(path, checksums)
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive(path))
    waiting, seen = [state], set()
    while waiting:  # not by recursion: it may be nested to any depth
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError("a tensor claims more values than are stored")
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple, set)):
            waiting.extend(value)
    return state


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pt, .pth, .bin or .safetensors file, unwrapped from {"model": ...} or {"state_dict": ...}.

    They stay in the file until they are used (but for the oldest kind of .pt, which is not a zip file)."""
    path = existing(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        state = load_plain(path)
    except Exception as error:  # a dozen kinds, from zip errors to refused pickles: one sentence serves for all
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} can't be read as a file of weights alone ({reason}): download it again") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} holds no state dict (names with tensors), nor one under 'model' or 'state_dict'")
    return state


def one_by_one(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a weights file with their names, such that memory holds few of them at a time."""
    names = list(read_state(path))
    mapped = path.suffix == ".safetensors" or is_archive(path)
    step = 128 if mapped else len(names)  # some 100 MB of the published file, whose opening takes half a second
    for first in range(0, len(names), step):
        state = read_state(path)  # opened anew: what has been read stays in memory until the file is closed
        for name in names[first : first + step]:
            yield name, state.pop(name)


def load_named(
    model: nn.Module, shapes: dict[str, torch.Size], tensors: Iterable[tuple[str, Tensor]], source: str,
    required: Callable[[str], bool],
) -> None:  # fmt: skip
    """Copy published-named tensors into the model, whatever their floating-point type.

    shapes: of all that `tensors` will give. required(our_key) says which of the model's entries the source has to fill. A
    missing, misshapen or unknown key raises UserError naming it (`source` is for that message); nothing has been
    copied then.
    """
    blocks = len(model.image_encoder.trunk.blocks)
    ours = model.state_dict(keep_vars=True)
    used = {name: our_name(name) for name in shapes if not is_unused(name, blocks)}
    there = set(used.values())
    unknown = [name for name, key in used.items() if key not in ours]
    missing = [key for key in ours if required(key) and key not in there]
    misshapen = [
        f"{name} is {tuple(shapes[name])}, expected {tuple(ours[key].shape)}"
        for name, key in used.items()
        if key in ours and shapes[name] != ours[key].shape
    ]
    for what, names in (("lacks", missing), ("holds unknown keys:", unknown), ("has other sizes:", misshapen)):
        if names:
            raise UserError(
                f"{source} does not fit this model: it {what} {', '.join(names[:3])}"
                f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            )
    with torch.no_grad():
        for name, tensor in tensors:
            if name in used:
                ours[used[name]].copy_(tensor)


def load_state(model: nn.Module, state: dict[str, Tensor], source: str, required: Callable[[str], bool]) -> None:
    """`load_named` from a state dict."""
    load_named(model, {name: tensor.shape for name, tensor in state.items()}, state.items(), source, required)


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
    raise UserError(
        f"{folder} holds {inside}: expected best.pt, or model.safetensors or pytorch_model.bin (also in shards)"
    )


def published_tokenizer(folder: Path) -> Path:
    """The SentencePiece model among a published checkpoint's tokeniser files."""
    for name in ("sentencepiece.bpe.model", "beit3.spm"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"no tokeniser in {folder}: put sentencepiece.bpe.model, which comes with the checkpoint, or beit3.spm beside it"
    )


def load_published(model: nn.Module, files: list[Path]) -> None:
    """Fill the whole model from a published RS2-SAM 2 checkpoint (preset `paper`, or a small model of its kind)."""
    shapes = {}
    for file in files:
        shapes |= {name: tensor.shape for name, tensor in read_state(file).items()}
    tensors = itertools.chain.from_iterable(map(one_by_one, files))
    load_named(model, shapes, tensors, str(files[0].parent if len(files) > 1 else files[0]), required=lambda key: True)


def load_sam2(model: nn.Module, path: str | Path) -> None:
    """Fill the SAM 2 part (trunk, neck, prompt encoder, mask decoder) from a SAM 2 or 2.1 file of the same size."""
    added = re.compile(r"adapter\.|^(union_encoder|text_|sparse_prompt|mask_prompt|decoder_fusion)")
    state = {f"visual_model.{k}": v for k, v in read_state(path).items()}
    load_state(model, state, str(path), required=lambda key: not added.search(key))


def load_beit3(model: nn.Module, path: str | Path) -> None:
    """Fill the union encoder from a BEiT-3 file such as beit3_large_patch16_224.pth; heads it may hold are left out."""
    state = {f"mm_extractor.{k}": v for k, v in read_state(path).items() if k.startswith("beit3.")}
    load_state(model, state, str(path), required=lambda key: key.startswith("union_encoder."))


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


def beit3_tokenizer_file(weights: str | None) -> Path:
    """The SentencePiece model beit3.spm beside BEiT-3's weights."""
    if weights is None:
        raise UserError(
            "BEiT-3 is not on a hub: download beit3_large_patch16_224.pth and beit3.spm from its authors' release page, "
            "keep them in one folder and name the first with --encoder-weights"
        )
    spm = existing(weights).with_name("beit3.spm")
    if not spm.is_file():
        raise UserError(f"no BEiT-3 tokeniser at {spm}: put beit3.spm beside the weights")
    return spm


def existing(path: str | Path) -> Path:
    """The path, if a file is there."""
    if not Path(path).is_file():
        raise UserError(f"no weights file at {path}: give the path of an existing .pt, .pth, .bin or .safetensors file")
    return Path(path)


def find_sam2(config: str) -> Path:
    """The SAM 2 file that belongs to a YAML of the sam2 package, from the hub's cache or downloaded."""
    from huggingface_hub import hf_hub_download
    from sam2.build_sam import HF_MODEL_ID_TO_FILENAMES

    for repository, (yaml, filename) in HF_MODEL_ID_TO_FILENAMES.items():
        if yaml == f"configs/{config}":
            try:
                return Path(hf_hub_download(repository, filename))
            except Exception as error:  # no network, no such file, no permission: the way out is the same
                raise UserError(
                    f"SAM 2 weights could not be downloaded ({repository}, {filename}): fetch {filename} from the model hub "
                    f"or from SAM 2's release page and name it with --sam2 FILE"
                ) from error
    raise UserError(f"no weights are published for {config}")


def tag_and_file(source: str) -> tuple[str | None, str | None]:
    """A pretrained tag, a file, or TAG=FILE -> (the tag or None, the file or None)."""
    if Path(source).is_file():
        return None, source
    tag, _, file = source.partition("=")
    return tag, file or None


def find_open_clip(name: str, source: str) -> Path:
    """The file of an open_clip model's weights: the one that `source` names, or its tag's, downloaded or cached."""
    tag, file = tag_and_file(source)
    if tag is not None and not open_clip.is_pretrained_cfg(name, tag):
        raise UserError(
            f"{tag!r} is neither a file nor a pretrained tag of open_clip's {name}: its tags are "
            f"{', '.join(open_clip.list_pretrained_tags_by_model(name)) or 'none'}"
        )
    if file:
        return existing(file)
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
        if Path(path).suffix != ".safetensors":
            check_plain(Path(path))
        open_clip.load_checkpoint(clip, str(path))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a checkpoint of open_clip's {name} ({reason})") from error
