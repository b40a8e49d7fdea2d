"""Reading files of weights: .pt, .pth and .bin by torch, .safetensors by safetensors, neither of which runs code from them.

What is read stays in the file, mapped into memory, until it is copied; a .pt file of before torch 1.6 is read whole.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from runtime.errors import UserError
from weights.names import is_unused, our_name

_scalar = np.float64(0).__reduce__()[0]
# numpy's numbers, which other programs keep beside weights as epochs and losses: plain values too
NUMBERS = [
    np.dtype, *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.bool_)),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]  # fmt: skip


def require_file(path: str | Path) -> Path:
    """The path, if a file is there; UserError."""
    if not Path(path).is_file():
        raise UserError(f"no weights file at {path}: give the path of an existing .pt, .pth, .bin or .safetensors file")
    return Path(path)


def read_file(path: str | Path):
    """What a file of tensors and plain values holds, on the CPU; UserError."""
    path = require_file(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(NUMBERS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a dozen kinds, from zip errors to refused pickles
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is damaged or of another kind"
        raise UserError(f"{path} can't be read as a file of tensors and plain values: {reason}") from error


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, unwrapped from {"model": ...} or {"state_dict": ...}; UserError."""
    state = read_file(path)
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict (names with tensors), nor one under 'model' or 'state_dict'")
    return state


@torch.no_grad()
def load_named(model: nn.Module, state: dict[str, Tensor], source: str, required: Callable[[str], bool]) -> None:
    """Copy published-named tensors of any floating-point type into the model.

    required(our_key): whether the source must fill this entry of the model. A missing, misshapen or unknown key raises
    UserError naming it and `source`; nothing has been copied then.
    """
    blocks = len(model.image_encoder.trunk.blocks)
    ours = model.state_dict()
    used = {our_name(name): (name, tensor) for name, tensor in state.items() if not is_unused(name, blocks)}
    missing = [key for key in ours if required(key) and key not in used]
    unknown = [name for key, (name, _) in used.items() if key not in ours]
    misshapen = [
        f"{name} is {tuple(tensor.shape)}, expected {tuple(ours[key].shape)}"
        for key, (name, tensor) in used.items()
        if key in ours and tensor.shape != ours[key].shape
    ]
    for what, names in (("lacks", missing), ("holds unknown keys:", unknown), ("has other sizes:", misshapen)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{source} does not fit this model: it {what} {', '.join(names[:3])}{more}")
    for key, (_, tensor) in used.items():
        ours[key].copy_(tensor)
