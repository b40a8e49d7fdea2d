"""A checkpoint as a folder to hand on: model.safetensors, config.json, a model card, and BEiT-3's tokeniser if it has one."""

import json
import math
from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from safetensors.torch import save

from annotations.download import licence_of
from runtime.errors import UserError
from runtime.run_folder import write_whole
from weights.files import read_file
from weights.provenance import in_words, provenance

# Entries of a checkpoint that stay behind: tensors, which have files of their own, what only resuming reads, and paths.
LEFT_BEHIND = (
    "model", "tokenizer", "files", "args", "average", "optimizers", "scaler", "samples", "best", "log", "running",
)  # fmt: skip
CARD = """---
{data}
---
# RS2-SAM 2, preset {model_name}, trained on {trained_on}

Finds what a phrase names in an overhead image: referring remote sensing image segmentation after *RS2-SAM 2: Customized SAM 2
for Referring Remote Sensing Image Segmentation* (AAAI 2026, arXiv 2503.07266).

```python
from predict import RS2SAM2Predictor

predictor = RS2SAM2Predictor.from_pretrained("OWNER/NAME")  # this folder, or its name on the hub
mask, score, logits = predictor.predict("image.jpg", "the ship on the left")
```

- Data: {trained_on}; licence of the data: {licence}
- Origin: {origin}; revision of the code: {revision}
- Scores: {scores}

The network and its recipe stand in config.json. State a licence of these weights that the data's and the foundation weights'
terms allow.
"""


def save_folder(folder: str | Path, entries: dict, facts: dict) -> None:
    """Write a checkpoint into a new or empty folder; UserError.

    entries: its "preset", "model" and "tokenizer" as `model_entries` gives them; facts: whatever else it holds.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: name a new folder, nothing is overwritten")
    except OSError as error:
        raise UserError(f"{folder} can't be written ({error.strerror}): name another folder", exit_code=1) from None
    origin = {key: value for key, value in provenance(facts).items() if key in ("run", "init")}
    facts = {key: value for key, value in facts.items() if key not in LEFT_BEHIND} | origin
    facts = {"model_name": "of one's own", "data": None, "revision": "", "epoch": None, "recipe": None, "left_out": []} | facts
    facts["preset"] = entries["preset"]
    config = json.dumps(without_infinity(facts), indent=1, allow_nan=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in entries["model"].items()}
    files = {"config.json": config.encode(), "README.md": model_card(facts).encode()}
    if entries["tokenizer"] is not None:
        files["beit3.spm"] = entries["tokenizer"].numpy().tobytes()
    for name, content in files.items():
        write_whole(folder / name, lambda file, content=content: file.write(content))
    write_whole(folder / "model.safetensors", lambda file: file.write(save(tensors, {"format": "pt"})))


def model_card(facts: dict) -> str:
    """README.md of a checkpoint that is handed on: data, their licence, scores."""
    scores = {key: value for key, value in (facts.get("metrics") or {}).items() if isinstance(value, float)}
    data = ModelCardData(
        license="unknown", pipeline_tag="image-segmentation", library_name="rs2-sam2",
        tags=["remote-sensing", "referring-image-segmentation"],
    )  # fmt: skip
    trained_on = Path(facts["data"]).name if facts["data"] else "data that are not stated"
    return CARD.format(
        data=data.to_yaml(), model_name=facts["model_name"], trained_on=trained_on, licence=licence_of(facts["data"]),
        origin=in_words(provenance(facts)), revision=facts["revision"] or "not stated",
        scores=", ".join(f"{key} {value:.2f}" for key, value in scores.items()) + " on validation" if scores else "not stated",
    )  # fmt: skip


def is_saved(folder: Path) -> bool:
    """Whether a folder is one that `save_folder` wrote."""
    return (folder / "model.safetensors").is_file() and "preset" in read_config(folder)


def read_config(folder: Path) -> dict:
    """config.json of a folder; {} where there is none, or none of ours."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return _with_infinity(config) if isinstance(config, dict) else {}


def read_saved(folder: Path) -> dict:
    """The checkpoint that `save_folder` wrote; UserError."""
    tokenizer = folder / "beit3.spm"
    tokenizer = torch.frombuffer(bytearray(tokenizer.read_bytes()), dtype=torch.uint8) if tokenizer.is_file() else None
    return read_config(folder) | {"model": read_file(folder / "model.safetensors"), "tokenizer": tokenizer}


def without_infinity(value):
    """The value with the numbers that JSON lacks as texts: "inf", "-inf", "nan"."""
    if isinstance(value, dict):
        return {key: without_infinity(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_infinity(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _with_infinity(value):
    """What `without_infinity` was given, its tuples as lists."""
    if isinstance(value, dict):
        return {key: _with_infinity(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_infinity(item) for item in value]
    return float(value) if value in ("inf", "-inf", "nan") else value
