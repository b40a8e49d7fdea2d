"""Prompts for SAM 2 from the union encoder's tokens: the mask prompt generator (MPG) and the sparse prompt.

Letters: B batch, W width of the union encoder, g side of its visual grid, C width of SAM 2's decoder.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion import CrossAttention, sincos_2d


class MaskPromptGenerator(nn.Module):
    """The class token, conditioned on what it reads in the visual tokens, is matched with each of them: a pseudo-mask.

    cls (B, 1, W), V (B, g*g, W) row-major -> logits of the pseudo-mask (B, 1, g, g).
    Architecture `ours`: `positions` adds sine-cosine codes of the place to V before the match, `residual` keeps the class
    token itself in the product.
    """

    def __init__(self, width: int, heads: int = 8, positions: bool = False, residual: bool = False):
        super().__init__()
        self.positions, self.residual = positions, residual
        self.attention = CrossAttention(width, heads)
        self.token = nn.Linear(width, width)
        self.score = nn.Linear(width, 1)

    def forward(self, cls: Tensor, V: Tensor) -> Tensor:
        g = int(V.shape[1] ** 0.5)
        read = self.attention(cls, V)  # (B, 1, W)
        token = cls * (1 + read if self.residual else read)  # (B, 1, W)
        token = self.token(token)  # (B, 1, W)
        if self.positions:
            V = V + sincos_2d(g, g, V.shape[-1], like=V)  # (B, gg, W)
        return self.score(V * token).transpose(1, 2).unflatten(2, (g, g))  # (B, 1, g, g)


def dense_prompt(pseudo_mask: Tensor, side: int) -> Tensor:
    """Resize a pseudo-mask (B, 1, g, g) to what SAM 2's prompt encoder takes, (B, 1, side, side): bilinear.

    In float32 at least: torch's antialiased resize does not take bfloat16 everywhere."""
    pseudo_mask = pseudo_mask.to(torch.promote_types(pseudo_mask.dtype, torch.float32))  # (B, 1, g, g)
    return F.interpolate(pseudo_mask, (side, side), mode="bilinear", align_corners=False, antialias=True)


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
