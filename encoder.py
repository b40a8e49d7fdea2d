"""The union encoders: image and phrase encoded together, behind one interface.

    encoder(image, ids, text_mask) -> cls (B, 1, W), V (B, g*g, W), T (B, L, W)
        image      (B, 3, S, S) float, normalised with encoder.mean and encoder.std, S = encoder.image_size
        ids        (B, L) int64, right-padded; text_mask (B, L) bool, True = a real token
        cls, V, T  the multimodal class token, the visual tokens (row-major on a square grid), the text tokens;
                   rows of T at padding hold no meaning
    encoder.width, encoder.grid (= g), encoder.image_size
    encoder.tokenizer(phrases) -> ids, lengths (B,) int64; lengths count the special tokens

`OpenCLIPEncoder` joins the two towers of a CLIP from `open_clip` by a few transformer layers; `BEiT3Encoder` is the
encoder of the paper. Letters: B batch, L text tokens, N all tokens, W width, P patches of the image (g*g).
"""

import open_clip
import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn

from fusion import CrossAttention
from presets import Preset
from runtime.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def padded_length(longest: int, context: int) -> int:
    """The length L that a batch's ids are padded to: 32 tokens, for longer phrases 128, and never more than `context`.

    A compiled model has one graph for each L, so there are two: 32 holds every phrase of most data sets. (Phrases over 128
    tokens, which BEiT-3 reads, are padded to 256, 512 ...) Padding is masked, so L changes no result, and it costs next to
    nothing: 32 text tokens stand beside 65,536 places of the image.
    """
    return min(32 if longest <= 32 else max(128, 1 << (longest - 1).bit_length()), context)


class OpenCLIPTokenizer:
    """open_clip's byte-pair encoding, padded to `padded_length` instead of to 77 tokens.

    A phrase over `context` tokens is cut, its end-of-text token kept.
    """

    def __init__(self, context: int):
        self.bpe, self.context = open_clip.SimpleTokenizer(context_length=context), context

    def length(self, phrase: str) -> int:
        """Tokens of the whole phrase, the two special ones included, before it is cut."""
        return len(self.bpe.encode(phrase)) + 2

    def __call__(self, phrases: list[str]) -> tuple[Tensor, Tensor]:
        ids = self.bpe(phrases)  # (B, context), zero after the end-of-text token
        lengths = ids.argmax(1) + 1  # (B,)  end of text is the highest id
        return ids[:, : padded_length(int(lengths.max()), self.context)], lengths


class JointLayer(nn.Module):
    """A pre-norm transformer layer over the tokens of both modalities. x (B, N, W), mask (B, N) bool -> (B, N, W)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CrossAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        normed = self.norm1(x)  # (B, N, W)
        x = x + self.attention(normed, normed, mask)  # (B, N, W)
        return x + self.mlp(self.norm2(x))  # (B, N, W)


class OpenCLIPEncoder(nn.Module):
    """A CLIP of open_clip whose two towers are joined, after their own layers, by `joint_layers` transformer layers.

    `clip` is a model of class `open_clip.CLIP` with a ViT tower (see `open_clip_model`); only what the forward
    pass uses is kept of it (not the contrastive projections and the temperature). The text tower is causal, as CLIP's
    is, so padding on the right changes nothing before it. Without `train_tokens` the words keep the vectors they have.
    """

    def __init__(self, clip: nn.Module, width: int, joint_layers: int, joint_heads: int, train_tokens: bool = True):
        super().__init__()
        self.visual = clip.visual
        self.visual.proj = None
        self.token_embedding, self.positional_embedding = clip.token_embedding, clip.positional_embedding
        self.token_embedding.requires_grad_(train_tokens)
        self.transformer, self.ln_final = clip.transformer, clip.ln_final
        self.register_buffer("causal", clip.attn_mask, persistent=False)
        self.width, self.grid, self.image_size = width, self.visual.grid_size[0], self.visual.image_size[0]
        norm = getattr(clip.visual, "preprocess_cfg", {})  # set where a pretrained tag says how images were normalised
        self.mean, self.std = (
            norm.get("mean", open_clip.OPENAI_DATASET_MEAN),
            norm.get("std", open_clip.OPENAI_DATASET_STD),
        )
        self.tokenizer = OpenCLIPTokenizer(clip.context_length)

        self.project_vision = nn.Linear(self.visual.ln_post.normalized_shape[0], width)
        self.project_text = nn.Linear(self.ln_final.normalized_shape[0], width)
        self.modality = nn.Parameter(torch.zeros(3, width))  # class, vision, text
        nn.init.normal_(self.modality, std=0.02)
        self.joint = nn.ModuleList(JointLayer(width, joint_heads) for _ in range(joint_layers))
        self.norm = nn.LayerNorm(width)

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) -> class token and patch tokens of the vision tower (B, 1 + P, W_vision)."""
        out = self.visual.forward_intermediates(
            image, indices=1, output_fmt="NLC", output_extra_tokens=True,
            normalize_intermediates=True, intermediates_only=True,
        )  # fmt: skip
        return torch.cat([out["image_intermediates_prefix"][0], out["image_intermediates"][0]], dim=1)  # (B, 1+P, Wv)

    def encode_text(self, ids: Tensor) -> Tensor:
        """(B, L) -> all tokens of the text tower (B, L, W_text)."""
        L = ids.shape[1]
        x = self.token_embedding(ids) + self.positional_embedding[:L]  # (B, L, Wt)
        return self.ln_final(self.transformer(x, attn_mask=self.causal[:L, :L]))  # (B, L, Wt)

    def forward(self, image: Tensor, ids: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        vision = self.project_vision(self.encode_image(image))  # (B, 1+P, W)
        text = self.project_text(self.encode_text(ids))  # (B, L, W)
        lengths = text_mask.sum(1, keepdim=True)  # (B, 1)
        end = text.take_along_dim(lengths[..., None] - 1, dim=1)  # (B, 1, W)  end-of-text token
        mean = (text * text_mask[..., None]).sum(1, keepdim=True) / lengths[..., None]  # (B, 1, W)
        # A class token that knows only the image makes training ignore position words for a long time.
        cls = vision[:, :1] + end + mean  # (B, 1, W)
        parts = [cls, vision[:, 1:], text]
        x = torch.cat([part + code for part, code in zip(parts, self.modality)], dim=1)  # (B, 1+P+L, W)
        mask = F.pad(text_mask, (vision.shape[1], 0), value=True)  # (B, 1+P+L)
        for layer in self.joint:
            x = layer(x, mask)  # (B, 1+P+L, W)
        return self.norm(x).tensor_split((1, vision.shape[1]), dim=1)  # (B, 1, W), (B, P, W), (B, L, W)


class BEiT3Tokenizer:
    """The ids of the published model (XLM-RoBERTa's layout over a SentencePiece model such as `beit3.spm`).

    <s> = 0, </s> = 2, <unk> = padding = 3, any other piece k -> k + 1; no lower-casing. A phrase over `context` tokens is
    cut, its </s> kept. `model` is the content of the SentencePiece file, which checkpoints carry.
    """

    PAD = UNK = 3

    def __init__(self, model: bytes, context: int = 1022):
        self.model, self.context = model, context
        try:
            self.pieces = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError("BEiT-3's tokeniser file is no SentencePiece model: get beit3.spm again") from error

    def length(self, phrase: str) -> int:
        """Tokens of the whole phrase, <s> and </s> included, before it is cut."""
        return len(self.pieces.encode(phrase)) + 2

    def __call__(self, phrases: list[str]) -> tuple[Tensor, Tensor]:
        pieces = [self.pieces.encode(p)[: self.context - 2] for p in phrases]
        rows = [[0, *(k + 1 if k > 0 else self.UNK for k in row), 2] for row in pieces]
        lengths = torch.tensor([len(row) for row in rows])  # (B,)
        ids = torch.full((len(rows), padded_length(int(lengths.max()), self.context)), self.PAD)  # (B, L)
        for line, row in zip(ids, rows):
            line[: len(row)] = torch.tensor(row)
        return ids, lengths


class Multiway(nn.Module):
    """Two copies of a module: A for the tokens before `split` (vision), B for the rest (language). (B, N, .)"""

    def __init__(self, make, *args, **kwargs):
        super().__init__()
        self.A, self.B = make(*args, **kwargs), make(*args, **kwargs)

    def forward(self, x: Tensor, split: int) -> Tensor:
        return torch.cat([self.A(x[:, :split]), self.B(x[:, split:])], dim=1)  # (B, N, .)


class BEiT3Attention(nn.Module):
    """Joint attention with multiway projections and BEiT-3's norm before the output. x (B, N, W) -> (B, N, W)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = Multiway(nn.Linear, width, width), Multiway(nn.Linear, width, width)
        self.v_proj, self.out_proj = Multiway(nn.Linear, width, width), Multiway(nn.Linear, width, width)
        self.inner_attn_ln = Multiway(nn.LayerNorm, width)

    def forward(self, x: Tensor, split: int, mask: Tensor) -> Tensor:
        q, k, v = (
            proj(x, split).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, W/heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])  # (B, heads, N, W/heads)
        x = self.inner_attn_ln(x.transpose(1, 2).flatten(2), split)  # (B, N, W)
        return self.out_proj(x, split)  # (B, N, W)


class BEiT3FeedForward(nn.Module):
    """Linear, GELU, LayerNorm, Linear. (B, N, W) -> (B, N, W)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.ffn_layernorm = nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.ffn_layernorm(F.gelu(self.fc1(x))))  # (B, N, W)


class BEiT3Layer(nn.Module):
    """A pre-norm layer of BEiT-3; modules bear the published names. (B, N, W) -> (B, N, W)."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.self_attn_layer_norm = Multiway(nn.LayerNorm, width)
        self.self_attn = BEiT3Attention(width, heads)
        self.final_layer_norm = Multiway(nn.LayerNorm, width)
        self.ffn = Multiway(BEiT3FeedForward, width, hidden)

    def forward(self, x: Tensor, split: int, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x, split), split, mask)  # (B, N, W)
        return x + self.ffn(self.final_layer_norm(x, split), split)  # (B, N, W)


class BEiT3Encoder(nn.Module):
    """BEiT-3 as a joint encoder of image and text (Wang et al., 2023); modules bear the published names.

    `tokenizer` is a BEiT3Tokenizer, or None for a model that is only given ids. The id 3 (padding and unknown words
    share it) is zeroed and never attended to wherever it stands, as published; text_mask plays no part in here.
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD  # as published; BEiT-3 itself was trained with 0.5 and 0.5

    def __init__(
        self, width=1024, layers=24, heads=16, hidden=4096, vocabulary=64010, image_size=224, patch=16,
        text_positions=1024,
    ):  # fmt: skip
        super().__init__()
        self.width, self.grid, self.image_size = width, image_size // patch, image_size
        self.context, self.tokenizer = text_positions - 2, None  # the most tokens of a phrase
        self.text_embed = nn.Embedding(vocabulary, width)
        self.vision_embed = nn.Module()
        self.vision_embed.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.vision_embed.proj = nn.Conv2d(3, width, patch, patch)
        self.encoder = nn.Module()
        # Both tables start at row 2: the first two are fairseq's, for padding, and stay unused.
        self.encoder.embed_positions = nn.ModuleDict(
            {"A": nn.Embedding(self.grid**2 + 3, width), "B": nn.Embedding(text_positions, width)}
        )
        self.encoder.layers = nn.ModuleList(BEiT3Layer(width, heads, hidden) for _ in range(layers))
        self.encoder.layer_norm = Multiway(nn.LayerNorm, width)
        self.apply(self._initialise)
        nn.init.trunc_normal_(self.vision_embed.cls_token, std=0.02)

    def end(self, modality: str) -> list[nn.Module]:
        """What only the outputs of the vision ('A') or text tokens ('B') depend on: all behind their last keys and values."""
        layer = self.encoder.layers[-1]
        attention = layer.self_attn
        last = (attention.q_proj, attention.inner_attn_ln, attention.out_proj, layer.final_layer_norm, layer.ffn)
        return [getattr(m, modality) for m in (*last, self.encoder.layer_norm)]

    @staticmethod
    def _initialise(module: nn.Module):
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=0.02, a=-0.02, b=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def forward(self, image: Tensor, ids: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        vision = self.vision_embed.proj(image).flatten(2).transpose(1, 2)  # (B, P, W)
        cls = self.vision_embed.cls_token.expand(len(vision), -1, -1)  # (B, 1, W)
        vision = torch.cat([cls, vision], dim=1)  # (B, 1+P, W)
        split = vision.shape[1]
        positions = self.encoder.embed_positions
        vision = vision + positions["A"].weight[2 : 2 + split]  # (B, 1+P, W)
        text = self.text_embed(ids) + positions["B"].weight[2 : 2 + ids.shape[1]]  # (B, L, W)
        known = ids != BEiT3Tokenizer.PAD  # (B, L)
        x = torch.cat([vision, text * known[..., None]], dim=1)  # (B, N, W)
        mask = F.pad(known, (split, 0), value=True)  # (B, N)
        for layer in self.encoder.layers:
            x = layer(x, split, mask)  # (B, N, W)
        x = self.encoder.layer_norm(x, split)  # (B, N, W)
        return x.tensor_split((1, split), dim=1)  # (B, 1, W), (B, P, W), (B, L, W)


def build_union_encoder(preset: Preset) -> nn.Module:
    """The preset's union encoder with random weights; BEiT-3's has no tokeniser yet."""
    if preset.encoder == "beit3":
        return BEiT3Encoder(**preset.encoder_args)
    clip = open_clip_model(preset.encoder_name, preset.encoder_tag, preset.encoder_size)
    # Words that start almost alike (open_clip's 0.02) are not told apart for thousands of samples.
    nn.init.normal_(clip.token_embedding.weight, std=0.5)
    nn.init.normal_(clip.positional_embedding, std=0.1)
    return OpenCLIPEncoder(clip, **preset.encoder_args)


def open_clip_model(model: str | dict, tag: str | None = None, image_size: int | None = None) -> nn.Module:
    """A CLIP of open_clip with random weights: by name, or from a dict of open_clip.CLIP's own arguments.

    image_size: side of its images, a multiple of its patches, instead of the one it was trained with.
    The pretrained tag decides image normalisation and activation (OpenAI's weights use QuickGELU). Only names whose towers
    are open_clip's own ViT and text transformer with its byte-pair tokeniser are accepted (about 32); UserError else.
    """
    config = open_clip_config(model)
    vision = config["vision_cfg"]
    if image_size and image_size % (patch := vision["patch_size"]):
        name = "the preset's encoder" if isinstance(model, dict) else model
        raise UserError(f"union encoder at {image_size} pixels: {name} needs a multiple of its patches of {patch}")
    pretrained = open_clip.get_pretrained_cfg(model, tag) if tag else {}
    config["quick_gelu"] = pretrained.get("quick_gelu", config.get("quick_gelu", False))
    clip = open_clip.CLIP(**config | {"vision_cfg": vision | {"image_size": image_size or vision["image_size"]}})
    if "mean" in pretrained:
        clip.visual.preprocess_cfg = {"mean": pretrained["mean"], "std": pretrained["std"]}
    return clip


def open_clip_config(model: str | dict) -> dict:
    """The arguments of open_clip.CLIP for a plain model's name, or those given; UserError for what is not plain.

    Other towers, and names with a scheme such as hf-hub:, would be fetched when they are built.
    """
    if isinstance(model, str) and model not in open_clip.list_models():
        listing = "python -c 'import open_clip; print(open_clip.list_models())'"
        raise UserError(f"open_clip has no model {model!r}: choose one that `{listing}` lists")
    config = open_clip.get_model_config(model) if isinstance(model, str) else dict(model)
    vision, text = config["vision_cfg"], config["text_cfg"]
    others = config.get("custom_text") or {"hf_model_name", "hf_tokenizer_name"} & text.keys()
    if others or "timm_model_name" in vision or not isinstance(vision.get("layers"), int):
        raise UserError(
            f"open_clip's {model if isinstance(model, str) else 'model of this preset'} is not made of its own ViT and text "
            f"transformer with the byte-pair tokeniser: choose a plain one such as ViT-B-32, ViT-B-16 or ViT-L-14"
        )
    return config
