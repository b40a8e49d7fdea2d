"""What an ablation leaves out of a model is replaced, once the model is built, by a stand-in of the same interface.

`leave_out(model, parts)` changes the network, `losses_without(coefficients, parts)` the loss. The other parameters keep
their names, so a checkpoint of an ablation fits the model that `load` builds again.
"""

from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor, nn

from experiments.parts import CHOICES
from fusion import BidirectionalAdapter, TextToVisionAdapter
from model import RS2SAM2
from runtime.errors import UserError
from weights.checkpoints import load_checkpoint, read_checkpoint

WAYS = {"fusion", "decoder-fusion", "mask-prompt", "sparse-prompt"}  # of the phrase to SAM 2


def check_parts(names: Collection[str]) -> set[str]:
    """Names of CHOICES as a set; UserError for other names and where no model would be left."""
    out = set(names)
    if unknown := out - CHOICES.keys():
        raise UserError(f"unknown part {', '.join(sorted(unknown))!r}: the parts are {', '.join(CHOICES)}")
    if out >= WAYS:
        raise UserError(f"without {', '.join(sorted(WAYS))} the phrase has no way to SAM 2: keep one of them")
    if out >= {"cross-entropy", "dice"}:
        raise UserError("without cross-entropy and dice nothing teaches the mask: keep one of them")
    return out


class PlainBlock(nn.Module):
    """For a FusedBlock: its block of SAM 2's Hiera alone. x (B, H, W, D_in), text -> (B, H', W', D_out), text."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.block(x), text  # (B, H', W', D_out), (B, L, C)


class OneDirection(TextToVisionAdapter):
    """For a BidirectionalAdapter: its modules from text to vision, in an adapter that returns the text unchanged."""

    def __init__(self, adapter: BidirectionalAdapter):
        nn.Module.__init__(self)
        self.down, self.up, self.text_down = adapter.down, adapter.up, adapter.text_down
        self.vision_reads_text, self.positions = adapter.vision_reads_text, adapter.positions


class UnchangedEmbedding(nn.Module):
    """For the DecoderFusion: the embedding (B, C, H, W) as it came."""

    def forward(self, embedding: Tensor, dense_pe: Tensor, text: Tensor, text_mask: Tensor | None) -> Tensor:
        return embedding  # (B, C, H, W)


class NoMaskPrompt(nn.Module):
    """For the MaskPromptGenerator and the DensePrompt: None, for which SAM 2 has an embedding of its own."""

    def forward(self, *inputs) -> None:
        return None


class NoSparsePrompt(nn.Module):
    """For the SparsePrompt: no tokens, (B, 0, dim)."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, cls: Tensor) -> Tensor:
        return cls.new_empty(len(cls), 0, self.dim)  # (B, 0, C)


class NoTextWeight(nn.Module):
    """For the boundary loss's weight, which no loss reads: zeros. (B, C) -> (B, 1)."""

    def forward(self, token: Tensor) -> Tensor:
        return token.new_zeros(len(token), 1)  # (B, 1)


def leave_out(model: RS2SAM2, parts: Collection[str]) -> None:
    """Replace parts of a model by stand-ins; what is then never read is frozen, what is then read is trained."""
    out = check_parts(parts)
    trunk = model.image_encoder.trunk
    if "fusion" in out:
        trunk.blocks = nn.ModuleList(PlainBlock(fused.block) for fused in trunk.blocks)
    elif "rewriting" in out:
        for fused in trunk.blocks[:-1]:  # the last has one direction only
            fused.space_adapter = OneDirection(fused.space_adapter)
    if "decoder-fusion" in out:
        model.decoder_fusion = UnchangedEmbedding()
    if "mask-prompt" in out:
        model.mask_prompt = model.dense_prompt = NoMaskPrompt()
        model.prompt_encoder.mask_downscaling.requires_grad_(False)
        model.prompt_encoder.no_mask_embed.requires_grad_(True)
    if "sparse-prompt" in out:
        model.sparse_prompt = NoSparsePrompt(model.preset.decoder["dim"])
    if "boundary" in out:
        model.text_weight = NoTextWeight()
    unread = []
    if out >= {"fusion", "decoder-fusion", "boundary"}:
        model.text_features = nn.Identity()
        unread += ["B"]
    if out >= {"mask-prompt", "sparse-prompt"}:
        unread += ["A"]
    if model.preset.encoder == "beit3":
        for module in (m for modality in unread for m in model.union_encoder.end(modality)):
            module.requires_grad_(False)


def losses_without(coefficients: dict[str, float], parts: Collection[str]) -> dict[str, float]:
    """The coefficients of a recipe's `losses` for a model without these parts."""
    out = check_parts(parts)
    gone = {"cross-entropy": ["cross_entropy"], "dice": ["dice"], "boundary": ["boundary", "published_boundary"]}
    gone |= {"pseudo": ["pseudo_mask"], "mask-prompt": ["pseudo_mask"]}
    dropped = {term for part in out & gone.keys() for term in gone[part]}
    renamed = {"boundary": "published_boundary"} if "soft-edges" in out else {}
    return {renamed.get(term, term): c for term, c in coefficients.items() if term not in dropped}


def load(path, device: torch.device | str = "cpu") -> tuple[RS2SAM2, dict]:
    """As weights.checkpoints.load_checkpoint, of an ablation's checkpoint too: (model in evaluation mode, checkpoint)."""
    left_out = read_checkpoint(path).get("left_out") or ()
    return load_checkpoint(path, device, edit=partial(leave_out, parts=left_out))
