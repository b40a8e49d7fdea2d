"""Prompts for SAM 2 from the union encoder's tokens: the mask prompt generator (MPG) and the sparse prompt.

With `fusion.py` beside it this file can be lifted into another project.
Letters: B batch, W width of the union encoder, g side of its visual grid, C width of SAM 2's decoder.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion import PUBLISHED, Architecture, CrossAttention, position_code


class MaskPromptGenerator(nn.Module):
    """The class token, conditioned on what it reads in the visual tokens, is matched with each of them: a pseudo-mask.

    cls (B, 1, W), V (B, g*g, W) row-major -> logits of the pseudo-mask (B, 1, g, g).
    """

    def __init__(self, width: int, heads: int = 8, architecture: Architecture = PUBLISHED):
        super().__init__()
        self.attention = CrossAttention(width, heads)
        self.token = nn.Linear(width, width)
        self.score = nn.Linear(width, 1)
        self.positions, self.residual = position_code(architecture), architecture.residual

    def forward(self, cls: Tensor, V: Tensor) -> Tensor:
        g = int(V.shape[1] ** 0.5)
        read = self.attention(cls, V)  # (B, 1, W)
        token = self.token(cls * (self.residual + read))  # (B, 1, W)
        V = self.positions(V.unflatten(1, (g, g))).flatten(1, 2)  # (B, gg, W)
        return self.score(V * token).transpose(1, 2).unflatten(2, (g, g))  # (B, 1, g, g)


class DensePrompt(nn.Module):
    """The pseudo-mask as SAM 2's prompt encoder takes it: its probability (published) or its logits, resized (bilinear).

    pseudo_mask (B, 1, g, g) logits, side in pixels -> (B, 1, side, side), in float32 at least: torch's antialiased resize
    does not take bfloat16 everywhere.
    """

    def __init__(self, architecture: Architecture = PUBLISHED):
        super().__init__()
        self.activation = nn.Identity() if architecture.pseudo_mask_as_logits else nn.Sigmoid()

    def forward(self, pseudo_mask: Tensor, side: int) -> Tensor:
        mask = self.activation(pseudo_mask)  # (B, 1, g, g)
        mask = mask.to(torch.promote_types(mask.dtype, torch.float32))  # (B, 1, g, g)
        return F.interpolate(mask, (side, side), mode="bilinear", align_corners=False, antialias=True)  # (B, 1, side, side)


class SparsePrompt(nn.Module):
    """The class token as `tokens` prompt tokens of SAM 2 (the paper: one). (B, 1, W) -> (B, tokens, C)."""

    def __init__(self, width: int, dim: int, tokens: int = 1):
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, tokens * dim)
        self.tokens = tokens

    def forward(self, cls: Tensor) -> Tensor:
        x = self.out(F.relu(self.hidden(cls)))  # (B, 1, tokens*C)
        return x.unflatten(2, (self.tokens, -1)).squeeze(1)  # (B, tokens, C)
