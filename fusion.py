"""The bidirectional hierarchical fusion module (BHFM): image and text rewrite each other in every block of SAM 2's
image encoder, and the text is multiplied into the image embedding once more before the mask decoder.

This file stands alone: it needs torch and the `sam2` package (for Hiera and its window helpers) and nothing else of
this project. To put the module into your own SAM 2:

    trunk = FusedHiera(sam2_model.image_encoder.trunk, text_dim=256)
    features = trunk(image, text, text_mask)     # the stage outputs that SAM 2's neck takes

Letters: B batch, H W height and width of a feature map, D its channels, h hidden width of an adapter, L text
tokens, C width of the text (and of the decoder). Masks: True = a real token, False = padding.
Source: "RS2-SAM 2: Customized SAM 2 for Referring Remote Sensing Image Segmentation" (AAAI 2026).
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from sam2.modeling.backbones.hieradet import Hiera, MultiScaleBlock, do_pool
from sam2.modeling.backbones.utils import window_partition, window_unpartition
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MOST_WINDOWS = 65535  # in one call of attention: CUDA's flash kernel takes no more; 64 images of 1024 pixels have 65,536


@dataclass(frozen=True)
class Architecture:
    """The numbers by which one architecture of the method differs from another. The defaults are the published network's.

    text_kept, text_added: an adapter returns text_kept * text + text_added * (what the text read in the image). The
        published 0.8 and 0.2 leave 0.8^47 = 3e-5 of the phrase in the last block of Hiera-L; 1 and 1 are a residual connection.
    residual: the two products, of the class token and of the decoder's embedding, multiply by residual + (what was read).
        The published 0 starts training from an embedding that is all but erased; 1 starts from the embedding itself.
    positions: sine-cosine position codes are added to the image tokens of every adapter, to the queries of the decoder's
        fusion and to the visual tokens of the mask prompt generator.
    zero_start: the output layers of the adapters start at zero, so the first step sees SAM 2's image encoder unchanged.
    sparse_tokens: how many prompt tokens are made of the class token.
    pseudo_mask_as_logits: the pseudo-mask enters SAM 2's mask path as logits, for which that path was trained. The
        published network gives it probabilities.
    """

    text_kept: float = 0.8
    text_added: float = 0.2
    residual: float = 0.0
    positions: bool = False
    zero_start: bool = False
    sparse_tokens: int = 1
    pseudo_mask_as_logits: bool = False


PUBLISHED = Architecture()


def sincos_2d(height: int, width: int, dim: int, like: Tensor) -> Tensor:
    """Sine-cosine encoding of the cell centres of a height x width grid, (1, height, width, dim), in `like`'s dtype and device.

    Coordinates run over (0, 1) whatever the grid, so the encoding of a point does not depend on the resolution.
    `dim` must be a multiple of 4 (sine and cosine of x and of y), else ValueError; frequencies go from half a turn to 16 turns.
    """
    if dim % 4:
        raise ValueError(f"a 2-D sine-cosine encoding needs a multiple of 4 channels, got {dim}")
    n = dim // 4
    frequency = math.pi * 32 ** (torch.arange(n, device=like.device, dtype=torch.float32) / max(n - 1, 1))
    y = (torch.arange(height, device=like.device, dtype=torch.float32) + 0.5) / height
    x = (torch.arange(width, device=like.device, dtype=torch.float32) + 0.5) / width
    y = (y[:, None] * frequency)[:, None].expand(height, width, n)  # (H, W, n)
    x = (x[:, None] * frequency)[None].expand(height, width, n)  # (H, W, n)
    code = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=-1)  # (H, W, dim)
    return code[None].to(like.dtype)


class PositionCode(nn.Module):
    """Adds `sincos_2d` to a grid of tokens. (B, H, W, dim) -> (B, H, W, dim)."""

    def forward(self, grid: Tensor) -> Tensor:
        return grid + sincos_2d(*grid.shape[1:], like=grid)  # (B, H, W, dim)


def position_code(architecture: Architecture) -> nn.Module:
    """The architecture's position code: a PositionCode, or nn.Identity where it has none."""
    return PositionCode() if architecture.positions else nn.Identity()


class CrossAttention(nn.MultiheadAttention):
    """Multi-head attention of queries over a memory: nn.MultiheadAttention that never asks for the attention matrix.

    Without need_weights torch computes it by F.scaled_dot_product_attention, whose fused kernels never hold the matrix, in
    training too; on a card `flash` sees to it.
    Queries (B, Nq, dim), memory (B, Nk, dim), mask (B, Nk) bool, True = attend, or None -> (B, Nq, dim).
    """

    def __init__(self, dim: int, heads: int):
        super().__init__(dim, heads, batch_first=True)

    def forward(self, query: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        if query.is_cuda:
            return self.flash(query, memory, mask)  # (B, Nq, dim)
        padding = None if mask is None else ~mask  # (B, Nk)
        query = query.view_as(query)  # (B, Nq, dim)  where query and memory are one, evaluation would hold the matrix
        return super().forward(query, memory, memory, key_padding_mask=padding, need_weights=False)[0]  # (B, Nq, dim)

    def flash(self, query: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """The same attention in the form that CUDA's flash kernel takes: heads of a multiple of 8 channels and no mask.

        Channels of zeros change no product. One more channel is 1 in the queries and, in the keys, 0 or so low a number that
        a padded key's weight is exactly 0.
        """
        dim = self.embed_dim
        q = F.linear(query, self.in_proj_weight[:dim], self.in_proj_bias[:dim])  # (B, Nq, dim)
        k, v = F.linear(memory, self.in_proj_weight[dim:], self.in_proj_bias[dim:]).chunk(2, dim=-1)  # (B, Nk, dim) each
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in (q, k, v))  # (B, N, heads, d)
        if mask is not None:
            low = torch.where(mask, 0.0, -3e4).to(k.dtype)[..., None, None]  # (B, Nk, 1, 1)  float16 ends at -65504
            k = torch.cat([k, low.expand(-1, -1, self.num_heads, 1)], dim=-1)  # (B, Nk, heads, d + 1)
            q = F.pad(q, (0, 1), value=1.0)  # (B, Nq, heads, d + 1)
        width = -(-q.shape[-1] // 8) * 8
        q, k, v = (F.pad(x, (0, width - x.shape[-1])).transpose(1, 2) for x in (q, k, v))  # (B, heads, N, width)
        read = F.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5)  # (B, heads, Nq, width)
        return self.out_proj(read[..., : self.head_dim].transpose(1, 2).flatten(2))  # (B, Nq, dim)


def output_layer(hidden: int, dim: int, zero_start: bool) -> nn.Linear:
    """The last layer of an adapter, Linear hidden -> dim; with `zero_start` its weights and biases are zero."""
    layer = nn.Linear(hidden, dim)
    if zero_start:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return layer


class Bottleneck(nn.Module):
    """The adapter beside a block's MLP: Linear D -> h, GELU, Linear h -> D, not residual. (..., D) -> (..., D)."""

    def __init__(self, dim: int, hidden: int, architecture: Architecture = PUBLISHED):
        super().__init__()
        self.down = nn.Linear(dim, hidden)
        self.up = output_layer(hidden, dim, architecture.zero_start)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.gelu(self.down(x)))  # (..., D)


class TextToVisionAdapter(nn.Module):
    """A fusion layer in one direction: vision attends to text. The last block has it, since nothing reads its text.

    x (B, H, W, D), text (B, L, C), text_mask (B, L) bool or None -> (x', text), x' of x's shape.
    The published layer attends to padded text when phrases of unequal length share a batch; the mask keeps a batch equal
    to its samples taken alone.
    """

    def __init__(self, dim: int, text_dim: int, hidden: int, heads: int = 4, architecture: Architecture = PUBLISHED):
        super().__init__()
        self.down = nn.Linear(dim, hidden)
        self.up = output_layer(hidden, dim, architecture.zero_start)
        self.text_down = nn.Linear(text_dim, hidden)
        self.vision_reads_text = CrossAttention(hidden, heads)
        self.positions = position_code(architecture)

    def read_text(self, x: Tensor, text: Tensor, text_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Vision tokens (B, HW, h) that have attended to the text, and the text tokens (B, L, h) they attended to."""
        a = self.positions(F.gelu(self.down(x))).flatten(1, 2)  # (B, HW, h)
        u = self.text_down(text)  # (B, L, h)
        return a + self.vision_reads_text(a, u, text_mask), u  # (B, HW, h), (B, L, h)  text -> vision

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        a, _ = self.read_text(x, text, text_mask)  # (B, HW, h)
        return x + self.up(a).unflatten(1, x.shape[1:3]), text  # (B, H, W, D), (B, L, C)


class BidirectionalAdapter(TextToVisionAdapter):
    """A fusion layer: vision attends to text, then text to the vision just rewritten.

    x (B, H, W, D), text (B, L, C), text_mask (B, L) bool or None -> (x', text') of the same shapes.
    """

    def __init__(self, dim: int, text_dim: int, hidden: int, heads: int = 4, architecture: Architecture = PUBLISHED):
        super().__init__(dim, text_dim, hidden, heads, architecture)
        self.text_kept, self.text_added = architecture.text_kept, architecture.text_added
        self.text_reads_vision = CrossAttention(hidden, heads)
        self.text_up = output_layer(hidden, text_dim, architecture.zero_start)

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        a, u = self.read_text(x, text, text_mask)  # (B, HW, h), (B, L, h)
        u = u + self.text_reads_vision(u, a)  # (B, L, h)  vision -> text
        text = self.text_kept * text + self.text_added * self.text_up(u)  # (B, L, C)
        return x + self.up(a).unflatten(1, x.shape[1:3]), text  # (B, H, W, D), (B, L, C)


class FusedBlock(nn.Module):
    """A block of SAM 2's Hiera with its two adapters: forward restates the block's forward over the block's own children.

    The space adapter acts on the attention branch before the residual sum, the bottleneck beside the MLP.
    x (B, H, W, D_in), text (B, L, C) -> (B, H', W', D_out), (B, L, C); H' = H/2 in a pooling block.
    """

    def __init__(self, block: MultiScaleBlock, space_adapter: nn.Module, mlp_adapter: nn.Module):
        super().__init__()
        self.block, self.space_adapter, self.mlp_adapter = block, space_adapter, mlp_adapter

    def attend(self, x: Tensor, out_hw: tuple[int, int]) -> Tensor:
        """The block's (windowed, pooling) attention on normalised x (B, H, W, D_in) -> (B, *out_hw, D_out)."""
        window = self.block.window_size
        if window == 0:
            return self.block.attn(x)  # (B, H', W', D_out)
        x, _ = window_partition(x, window)  # (B*windows, w, w, D_in)
        parts = [self.block.attn(part) for part in x.split(MOST_WINDOWS)]  # (<= MOST_WINDOWS, w', w', D_out)
        x = torch.cat(parts) if len(parts) > 1 else parts[0]  # (B*windows, w', w', D_out)
        window = x.shape[1]  # halved by query pooling
        padded_hw = tuple(math.ceil(side / window) * window for side in out_hw)
        return window_unpartition(x, window, padded_hw, out_hw)  # (B, H', W', D_out)

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        block = self.block
        normed = block.norm1(x)  # (B, H, W, D_in)
        shortcut = x if block.dim == block.dim_out else do_pool(block.proj(normed), block.pool)  # (B, H', W', D_out)
        attended = self.attend(normed, shortcut.shape[1:3])  # (B, H', W', D_out)
        attended, text = self.space_adapter(attended, text, text_mask)  # (B, H', W', D_out), (B, L, C)
        x = shortcut + attended  # (B, H', W', D_out)
        normed = block.norm2(x)  # (B, H', W', D_out)
        return x + block.mlp(normed) + 0.5 * self.mlp_adapter(normed), text  # (B, H', W', D_out), (B, L, C)


class FusedHiera(nn.Module):
    """SAM 2's Hiera trunk with a fusion layer in every block.

    `trunk` is taken over: its blocks are wrapped in place, its own parameters keep their requires_grad. The adapters'
    hidden width is D / `reduction`. Where `checkpoint_activations` is set, training keeps only each block's input and
    computes the rest again in the backward pass: less memory for one more forward pass of the trunk.
    forward: image (B, 3, H, W) float, text (B, L, C), text_mask (B, L) bool or None -> stage outputs, finest first,
    [(B, D_s, H/4 / 2^s, W/4 / 2^s)].
    """

    def __init__(self, trunk: Hiera, text_dim: int, reduction: int = 4, architecture: Architecture = PUBLISHED):
        super().__init__()
        last, blocks = len(trunk.blocks) - 1, []
        for i, block in enumerate(trunk.blocks):
            adapter = BidirectionalAdapter if i < last else TextToVisionAdapter
            dim, hidden = block.dim_out, block.dim_out // reduction
            space_adapter = adapter(dim, text_dim, hidden, architecture=architecture)
            blocks.append(FusedBlock(block, space_adapter, Bottleneck(dim, hidden, architecture)))
        trunk.blocks = nn.ModuleList(blocks)
        self.trunk = trunk
        self.checkpoint_activations = False

    def adapters(self) -> list[nn.Module]:
        """The modules that this class added to the trunk."""
        fused = [block for block in self.trunk.blocks if isinstance(block, FusedBlock)]
        return [adapter for block in fused for adapter in (block.space_adapter, block.mlp_adapter)]

    def forward(self, image: Tensor, text: Tensor, text_mask: Tensor | None = None) -> list[Tensor]:
        x = self.trunk.patch_embed(image)  # (B, H/4, W/4, D_0)
        x = x + self.trunk._get_pos_embed(x.shape[1:3])  # (B, H/4, W/4, D_0)
        stages = []
        for i, block in enumerate(self.trunk.blocks):
            if self.checkpoint_activations and torch.is_grad_enabled():
                block = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)  # draws no randomness
            x, text = block(x, text, text_mask)  # (B, H_i, W_i, D_i), (B, L, C)
            if i in self.trunk.stage_ends:
                stages.append(x.permute(0, 3, 1, 2))  # (B, D_s, H_s, W_s)
        return stages


class DecoderFusion(nn.Module):
    """The last fusion, before the mask decoder: the image embedding times what each of its cells reads in the text.

    embedding (B, C, H, W), dense_pe (1, C, H, W) SAM 2's dense position encoding, text (B, L, C) as the union encoder gave
    it, text_mask (B, L) bool or None -> (B, C, H, W).
    """

    def __init__(self, dim: int, heads: int = 8, architecture: Architecture = PUBLISHED):
        super().__init__()
        self.attention = CrossAttention(dim, heads)
        self.positions, self.residual = position_code(architecture), architecture.residual

    def forward(self, embedding: Tensor, dense_pe: Tensor, text: Tensor, text_mask: Tensor | None) -> Tensor:
        H, W = embedding.shape[-2:]
        query = self.positions((embedding + dense_pe).permute(0, 2, 3, 1)).flatten(1, 2)  # (B, HW, C)
        read = self.attention(query, text, text_mask)  # (B, HW, C)
        return embedding * (self.residual + read).transpose(1, 2).unflatten(2, (H, W))  # (B, C, H, W)
