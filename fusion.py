"""The bidirectional hierarchical fusion module (BHFM): image and text rewrite each other in every block of SAM 2's
image encoder, and the text is multiplied into the image embedding once more before the mask decoder.

This file stands alone: it needs torch and the `sam2` package (for Hiera and its window helpers) and nothing else of
this project. To put the module into your own SAM 2:

    trunk = FusedHiera(sam2_model.image_encoder.trunk, text_dim=256)
    features = trunk(image, text, text_mask)     # the stage outputs that SAM 2's neck takes

Letters: B batch, H W height and width of a feature map, D its channels, h hidden width of an adapter, L text
tokens, C width of the text (and of the decoder). Masks: True = a real token, False = padding.
Source: "RS2-SAM 2: Customized SAM 2 for Referring Remote Sensing Image Segmentation".
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from sam2.modeling.backbones.hieradet import Hiera, MultiScaleBlock, do_pool
from sam2.modeling.backbones.utils import window_partition, window_unpartition
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def sincos_2d(height: int, width: int, dim: int, like: Tensor) -> Tensor:
    """Sine-cosine encoding of the cell centres of a height x width grid, (1, height*width, dim), row-major.

    Coordinates run over (0, 1) whatever the grid, so the encoding of a place does not depend on the resolution;
    dim must be a multiple of 4 (sine and cosine of x and of y), frequencies go from half a turn to 16 turns.
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
    return code.reshape(1, height * width, dim).to(like.dtype)


class CrossAttention(nn.Module):
    """Multi-head attention of queries over a memory, on PyTorch's fused kernel.

    The arithmetic and the parameter names of `nn.MultiheadAttention(dim, heads)`, whose attention matrix nobody reads
    here. Queries (B, Nq, dim), memory (B, Nk, dim), mask (B, Nk) bool or None -> (B, Nq, dim).
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"attention width {dim} is not a multiple of its {heads} heads")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        dim = query.shape[-1]
        q = F.linear(query, self.in_proj_weight[:dim], self.in_proj_bias[:dim])  # (B, Nq, dim)
        kv = F.linear(memory, self.in_proj_weight[dim:], self.in_proj_bias[dim:])  # (B, Nk, 2 dim)
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, Nq, dim/heads)
        k, v = kv.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 2 x (B, heads, Nk, dim/heads)
        if mask is not None:
            mask = mask[:, None, None]  # (B, 1, 1, Nk)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, Nq, dim/heads)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # (B, Nq, dim)


def output_layer(hidden: int, dim: int, zero: bool) -> nn.Linear:
    """The last layer of an adapter; `zero`: what it is added to starts as it was."""
    layer = nn.Linear(hidden, dim)
    if zero:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return layer


class Bottleneck(nn.Module):
    """Linear D -> h, GELU, Linear h -> D, without skip: the adapter beside a block's MLP. (..., D) -> (..., D).

    `residual`: it starts by adding nothing."""

    def __init__(self, dim: int, hidden: int, residual=False):
        super().__init__()
        self.down = nn.Linear(dim, hidden)
        self.up = output_layer(hidden, dim, zero=residual)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.gelu(self.down(x)))  # (..., D)


class BidirectionalAdapter(nn.Module):
    """One fusion layer: vision attends to text, then text to the vision just rewritten.

    Args of forward: x (B, H, W, D), text (B, L, C), text_mask (B, L) bool or None.
    Returns (x', text') of the same shapes; text' is `text` itself where `rewrite_text` is off (the last block, whose
    rewritten text nobody reads).

    `positions` adds sine-cosine codes of the place to the vision tokens (architecture `ours`: without them words such as
    "upper left" have nothing to hold on to in a shallow trunk). The published layer lets vision attend to padded text
    when phrases of unequal length share a batch; here text_mask keeps a batch equal to its samples taken alone.
    The published layer keeps 0.8 of the text it rewrites, so that little of the phrase reaches the late blocks (0.8^47 is
    3e-5 of it in Hiera-L); `residual` (architecture `ours`) adds to the text instead, and both ways start by adding nothing.
    """

    def __init__(
        self, dim: int, text_dim: int, hidden: int, heads: int = 4, rewrite_text=True, positions=False, residual=False
    ):
        super().__init__()
        self.positions, self.rewrite_text, self.residual = positions, rewrite_text, residual
        self.down = nn.Linear(dim, hidden)
        self.up = output_layer(hidden, dim, zero=residual)
        self.text_down = nn.Linear(text_dim, hidden)
        self.vision_reads_text = CrossAttention(hidden, heads)
        if rewrite_text:
            self.text_reads_vision = CrossAttention(hidden, heads)
            self.text_up = output_layer(hidden, text_dim, zero=residual)

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        B, H, W, D = x.shape
        a = F.gelu(self.down(x)).flatten(1, 2)  # (B, HW, h)
        if self.positions:
            a = a + sincos_2d(H, W, a.shape[-1], like=a)  # (B, HW, h)
        u = self.text_down(text)  # (B, L, h)
        a = a + self.vision_reads_text(a, u, text_mask)  # (B, HW, h)  text -> vision
        if self.rewrite_text:
            u = u + self.text_reads_vision(u, a)  # (B, L, h)  vision -> text
            new = self.text_up(u)  # (B, L, C)
            text = text + new if self.residual else 0.8 * text + 0.2 * new  # (B, L, C)
        return x + self.up(a).unflatten(1, (H, W)), text  # (B, H, W, D), (B, L, C)


class FusedBlock(nn.Module):
    """A block of SAM 2's Hiera with its two adapters: forward restates the block's forward over the block's own children.

    The bidirectional adapter acts on the attention branch before the residual sum, the bottleneck beside the MLP.
    x (B, H, W, D_in), text (B, L, C) -> (B, H', W', D_out), (B, L, C); H' = H/2 in a pooling block.
    """

    def __init__(
        self, block: MultiScaleBlock, text_dim: int, hidden: int, rewrite_text=True, positions=False, residual=False
    ):
        super().__init__()
        self.block = block
        self.space_adapter = BidirectionalAdapter(
            block.dim_out, text_dim, hidden, rewrite_text=rewrite_text, positions=positions, residual=residual
        )
        self.mlp_adapter = Bottleneck(block.dim_out, hidden, residual)

    def attend(self, x: Tensor, out_hw: tuple[int, int]) -> Tensor:
        """The block's (windowed, pooling) attention on normalised x (B, H, W, D_in) -> (B, *out_hw, D_out)."""
        window = self.block.window_size
        if window == 0:
            return self.block.attn(x)  # (B, H', W', D_out)
        x, _ = window_partition(x, window)  # (B*windows, w, w, D_in)
        x = self.block.attn(x)  # (B*windows, w', w', D_out)
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


class PlainBlock(nn.Module):
    """A block of SAM 2's Hiera as it is, in the place of a FusedBlock: for a trunk without the fusion."""

    def __init__(self, block: MultiScaleBlock):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.block(x), text  # (B, H', W', D_out), (B, L, C)


class FusedHiera(nn.Module):
    """SAM 2's Hiera trunk with a fusion layer in every block.

    `trunk` is taken over: its blocks are wrapped in place, its own parameters keep their requires_grad.
    The adapters' hidden width is D / `reduction`. `residual` (architecture `ours`) adds to the text what the published form
    blends into it, and starts the adapters' output layers at zero, so that the first step sees the trunk as it was. For
    ablations: `fuse` off leaves out all adapters, `rewrite_text` off the direction from vision to text. Where
    `checkpoint_activations` is set, training keeps no more than each block's input and computes the rest again in the
    backward pass: less memory, a forward pass more of the trunk.
    forward: image (B, 3, H, W) float, text (B, L, C), text_mask (B, L) bool or None -> stage outputs, finest first,
    [(B, D_s, H/4 / 2^s, W/4 / 2^s)].
    """

    def __init__(
        self, trunk: Hiera, text_dim: int, reduction: int = 4, positions=False, residual=False, fuse=True, rewrite_text=True
    ):
        super().__init__()
        last = len(trunk.blocks) - 1
        trunk.blocks = nn.ModuleList(
            FusedBlock(b, text_dim, b.dim_out // reduction, rewrite_text and i < last, positions, residual)
            if fuse
            else PlainBlock(b)
            for i, b in enumerate(trunk.blocks)
        )
        self.trunk = trunk
        self.checkpoint_activations = False

    def adapters(self) -> list[nn.Module]:
        """The modules this class added to the trunk."""
        fused = [b for b in self.trunk.blocks if isinstance(b, FusedBlock)]
        return [m for b in fused for m in (b.space_adapter, b.mlp_adapter)]

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
    """The last fusion, before the mask decoder: the image embedding times what each of its places reads in the text.

    The published product has no residual, so training starts from an embedding that is all but erased; `residual` (in
    architecture `ours`) multiplies by 1 + what is read. embedding (B, C, H, W), place (1, C, H, W) SAM 2's dense position
    encoding, text (B, L, C) as the union encoder gave it, text_mask (B, L) bool or None -> (B, C, H, W).
    """

    def __init__(self, dim: int, heads: int = 8, positions: bool = False, residual: bool = False):
        super().__init__()
        self.positions, self.residual = positions, residual
        self.attention = CrossAttention(dim, heads)

    def forward(self, embedding: Tensor, place: Tensor, text: Tensor, text_mask: Tensor | None) -> Tensor:
        _, C, H, W = embedding.shape
        query = (embedding + place).flatten(2).transpose(1, 2)  # (B, HW, C)
        if self.positions:
            query = query + sincos_2d(H, W, C, like=query)  # (B, HW, C)
        read = self.attention(query, text, text_mask)  # (B, HW, C)
        factor = 1 + read if self.residual else read  # (B, HW, C)
        return embedding * factor.transpose(1, 2).unflatten(2, (H, W))  # (B, C, H, W)
