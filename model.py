"""RS2-SAM 2: an overhead image and a phrase in, the mask of what the phrase names out.

The forward pass in the order of the paper's figure:

    image, phrase --> union encoder --> class token, visual tokens, text tokens
    text tokens + image --> SAM 2's image encoder with the bidirectional hierarchical fusion module (fusion.py)
    class token + visual tokens --> mask prompt generator --> pseudo-mask: the dense prompt (prompt_gen.py)
    class token --> the sparse prompt
    everything --> SAM 2's mask decoder --> mask logits

SAM 2's classes come from the `sam2` package and are built from its YAML files; nothing of its video memory is.
Letters: B batch, S side of the image, E side of the union encoder's image, L text tokens, W width of the union
encoder, C width of SAM 2's decoder, g side of the union encoder's grid, s = S/16 side of SAM 2's image embedding.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import sam2
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sam2.modeling.sam.mask_decoder import MaskDecoder
from sam2.modeling.sam.prompt_encoder import PromptEncoder
from sam2.modeling.sam.transformer import TwoWayTransformer
from torch import Tensor, nn

from encoder import IMAGENET_MEAN, IMAGENET_STD, BEiT3Encoder, OpenCLIPEncoder
from fusion import CrossAttention, DecoderFusion, FusedHiera
from prompt_gen import MaskPromptGenerator, SparsePrompt, dense_prompt
from weights import open_clip_model

# What an ablation may leave out, by the names of `train.py --without`.
PARTS = {
    "fusion": "the adapters in every block of SAM 2's image encoder",
    "rewriting": "their direction from vision to text",
    "decoder-fusion": "the product with the text before the mask decoder",
    "mask-prompt": "the mask prompt generator; SAM 2's embedding for 'no mask' takes its place",
    "sparse-prompt": "the sparse tokens; the decoder runs on its own tokens alone",
    "cross-entropy": "this term of the loss",
    "dice": "this term of the loss",
    "boundary": "this term of the loss, and its weight from the text",
    "soft-edges": "the boundary loss of the probability map; the published one, of the thresholded mask, takes its place",
    "pseudo": "the pseudo-mask's own loss, where the recipe has one",
}


@dataclass(frozen=True)
class Preset:
    """Everything that fixes the network. A checkpoint holds it, so it can be rebuilt from the file alone.

    architecture: 'published' (the paper's release, to the letter) or 'ours': position codes in every adapter, before the
    pseudo-mask's match and in the decoder's fusion, whose two products get a residual; the adapters add to the text and do
    not fade it, and their output layers start at zero; four sparse tokens, not one; and the pseudo-mask enters SAM 2's mask
    path as logits, for which that path was trained, not as a probability.
    """

    architecture: str
    sam2: str  # a YAML file of the sam2 package, under its configs/
    encoder: str  # 'open_clip' or 'beit3'
    encoder_args: dict  # of OpenCLIPEncoder or BEiT3Encoder
    encoder_name: str | dict = ""  # open_clip's model name, or the arguments of open_clip.CLIP
    encoder_tag: str | None = None  # open_clip's pretrained tag
    encoder_size: int | None = None  # side of the open_clip model's images, where it is not the model's own
    image_size: int = 1024  # S, a multiple of 32
    trunk: dict = field(default_factory=dict)  # changes to the trunk of the YAML
    decoder: dict = field(default_factory=lambda: {"dim": 256, "heads": 8, "mlp": 2048})  # the sam2 package's own sizes
    reduction: int = 4  # adapters are D / reduction wide
    train_trunk: bool = False  # train SAM 2's image encoder too: only where it starts from random weights
    without: tuple[str, ...] = ()  # what is left out for an ablation, of PARTS
    version: int = 2  # raised when the same weights come to mean something else in architecture 'ours'


TINY_CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 128, "patch_size": 8, "width": 96, "head_width": 32, "layers": 2},
    "text_cfg": {"width": 64, "heads": 4, "layers": 1},
}

PRESETS = {
    "tiny": Preset(
        architecture="ours",
        sam2="sam2.1/sam2.1_hiera_t.yaml",
        trunk={
            "embed_dim": 16, "num_heads": 1, "stages": [1, 1, 3, 1], "global_att_blocks": [4],
            "window_spec": [8, 4, 8, 4], "window_pos_embed_bkg_spatial_size": [7, 7],
        },
        decoder={"dim": 64, "heads": 4, "mlp": 256},
        encoder="open_clip",
        encoder_name=TINY_CLIP,
        # Random vectors tell words apart as well as trained ones, and their table is 68 % of the weights.
        encoder_args={"width": 64, "joint_layers": 2, "joint_heads": 2, "train_tokens": False},
        image_size=128,
        reduction=1,
        train_trunk=True,
    ),
    "base": Preset(
        architecture="ours",
        sam2="sam2.1/sam2.1_hiera_b+.yaml",
        encoder="open_clip",
        encoder_name="ViT-B-16",
        encoder_tag="laion2b_s34b_b88k",
        encoder_args={"width": 512, "joint_layers": 4, "joint_heads": 8},
    ),
    "large": Preset(
        architecture="ours",
        sam2="sam2.1/sam2.1_hiera_l.yaml",
        encoder="open_clip",
        encoder_name="ViT-L-14",
        encoder_tag="laion2b_s32b_b82k",
        encoder_args={"width": 768, "joint_layers": 4, "joint_heads": 12},
    ),
    "paper": Preset(architecture="published", sam2="sam2/sam2_hiera_l.yaml", encoder="beit3", encoder_args={}),
}  # fmt: skip


class Output(NamedTuple):
    """What the model puts out. The mask is logits > 0, its probability sigmoid(logits)."""

    logits: Tensor  # (B, 1, S/4, S/4)
    pseudo_mask: Tensor | None  # (B, 1, g, g) logits of the mask prompt; None without it
    log_weight: Tensor | None  # (B,) logarithm of the boundary loss's weight, from the sentence token; None without it


class NoPosition(nn.Module):
    """Stands in for the neck's sine encodings, which only the video memory reads."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


def build_image_encoder(preset: Preset) -> nn.Module:
    """SAM 2's image encoder (Hiera trunk and neck) of the preset's YAML file, with random weights."""
    config = OmegaConf.load(Path(sam2.__file__).parent / "configs" / preset.sam2).model.image_encoder
    config.trunk = OmegaConf.merge(config.trunk, preset.trunk)
    config.neck.d_model = preset.decoder["dim"]
    widths = [config.trunk.get("embed_dim", 96) * 2**i for i in range(len(config.trunk.get("stages", range(4))))]
    config.neck.backbone_channel_list = widths[::-1]
    encoder = instantiate(config)
    encoder.neck.position_encoding = NoPosition()
    return encoder


def build_union_encoder(preset: Preset) -> nn.Module:
    """The preset's union encoder with random weights; BEiT-3's has no tokeniser yet."""
    if preset.encoder == "beit3":
        return BEiT3Encoder(**preset.encoder_args)
    clip = open_clip_model(preset.encoder_name, preset.encoder_tag, preset.encoder_size)
    # Words that start almost alike (open_clip's 0.02) are not told apart for thousands of samples.
    nn.init.normal_(clip.token_embedding.weight, std=0.5)
    nn.init.normal_(clip.positional_embedding, std=0.1)
    return OpenCLIPEncoder(clip, **preset.encoder_args)


class RS2SAM2(nn.Module):
    """The whole model, with random weights but for a union encoder that is given. checkpoints.py fills it from files.

    forward(image (B, 3, S, S), encoder_image (B, 3, E, E), ids (B, L) int64, lengths (B,) int64) -> Output.
    Images are float and normalised (see `normalise`); ids and lengths come from `union_encoder.tokenizer`.
    """

    def __init__(self, preset: Preset, union_encoder: nn.Module | None = None):
        super().__init__()
        if preset.image_size % 32:
            raise ValueError(f"the image size must be a multiple of 32 (SAM 2's first window), got {preset.image_size}")
        self.preset = preset
        ours = preset.architecture == "ours"
        out = check_parts(preset.without)
        dim, heads = preset.decoder["dim"], preset.decoder["heads"]

        self.union_encoder = union_encoder or build_union_encoder(preset)
        width = self.union_encoder.width

        # What is left out is None; so are the text features where nothing reads them.
        self.text_features = None if out >= {"fusion", "decoder-fusion", "boundary"} else nn.Linear(width, dim)
        self.text_weight = None if "boundary" in out else nn.Linear(dim, 1)
        self.sparse_prompt = None if "sparse-prompt" in out else SparsePrompt(width, dim, tokens=4 if ours else 1)
        self.mask_prompt = (
            None if "mask-prompt" in out else MaskPromptGenerator(width, positions=ours, residual=ours)
        )

        image_encoder = build_image_encoder(preset)
        image_encoder.requires_grad_(preset.train_trunk)
        self.neck = image_encoder.neck
        self.image_encoder = FusedHiera(
            image_encoder.trunk, dim, preset.reduction, positions=ours, residual=ours,
            fuse="fusion" not in out, rewrite_text="rewriting" not in out,
        )  # fmt: skip
        if preset.train_trunk:
            for table in (self.image_encoder.trunk.pos_embed, self.image_encoder.trunk.pos_embed_window):
                nn.init.trunc_normal_(table, std=0.02)  # sam2 leaves them at zero
        self.no_mem_embed = nn.Parameter(torch.zeros(1, 1, dim))
        nn.init.trunc_normal_(self.no_mem_embed, std=0.02)
        self.decoder_fusion = None if "decoder-fusion" in out else DecoderFusion(dim, positions=ours, residual=ours)
        side = preset.image_size // 16
        self.prompt_encoder = PromptEncoder(
            embed_dim=dim,
            image_embedding_size=(side, side),
            input_image_size=(preset.image_size,) * 2,
            mask_in_chans=16,
        )
        self.mask_decoder = MaskDecoder(
            transformer=TwoWayTransformer(depth=2, embedding_dim=dim, num_heads=heads, mlp_dim=preset.decoder["mlp"]),
            transformer_dim=dim,
            use_high_res_features=True,
            iou_prediction_use_sigmoid=True,
            pred_obj_scores=True,
            pred_obj_scores_mlp=True,
            use_multimask_token_for_obj_ptr=True,
        )
        for unused in self.unused():
            unused.requires_grad_(False)
        for name, mean, std in (
            ("image_norm", IMAGENET_MEAN, IMAGENET_STD),
            ("encoder_norm", self.union_encoder.mean, self.union_encoder.std),
        ):
            self.register_buffer(name, torch.tensor([mean, std]).view(2, 3, 1, 1) * 255, persistent=False)
        self.train()

    def unused(self) -> list[nn.Module]:
        """What others' classes build and this model never reads: frozen, never optimised. Of sam2's prompt encoder and mask
        decoder much; of BEiT-3 the end of a modality that a model without some parts does not read."""
        p, d = self.prompt_encoder, self.mask_decoder
        heads = [*d.output_hypernetworks_mlps[1:], d.iou_prediction_head, d.pred_obj_score_head]
        heads += [p.no_mask_embed if self.mask_prompt else p.mask_downscaling]
        if self.preset.encoder == "beit3" and self.text_features is None:
            heads += self.union_encoder.end("B")
        if self.preset.encoder == "beit3" and not (self.mask_prompt or self.sparse_prompt):
            heads += self.union_encoder.end("A")
        return [p.point_embeddings, p.not_a_point_embed, *heads]

    def fusion_modules(self) -> list[nn.Module]:
        """The modules the paper adds to SAM 2 and the union encoder: trained at lr, the rest at the recipe's share of it."""
        modules = [*self.image_encoder.adapters(), self.decoder_fusion, self.mask_prompt]
        return [m for m in modules if m]

    def train(self, mode: bool = True):
        """As nn.Module's, but what is frozen stays in evaluation mode."""
        super().train(mode)
        if not self.preset.train_trunk:
            self.neck.eval()
            self.image_encoder.trunk.eval()
            for adapter in self.image_encoder.adapters():
                adapter.train(mode)
        return self

    @torch.no_grad()
    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Hold the frozen weights of products (linear layers, convolutions, attention) in the dtype autocast computes in.

        The results are those of autocast, to the bit, which otherwise converts them from float32 in every forward pass and
        keeps both for the backward one; norms and tables stay float32. For CUDA, at the start of a run. Checkpoints
        then hold these weights as the model was trained with them, in `dtype` (the published one does so too); where they
        are loaded again in float32 they are those values exactly.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.MultiheadAttention, CrossAttention)):
                for p in module.parameters(recurse=False):
                    if not p.requires_grad:
                        p.data = p.data.to(dtype)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str | None = None) -> "RS2SAM2":
        """The model of a checkpoint, ready to `segment`, on `device`: by default the CUDA card where there is one."""
        from checkpoints import load_checkpoint  # it imports this file

        return load_checkpoint(path, device or ("cuda" if torch.cuda.is_available() else "cpu"))[0]

    def segment(self, image, phrase, **options):
        """The mask of what the phrase names, bool (H, W); image: a path, a PIL image or uint8 RGB (H, W, 3).

        Lists of either give a list. Options and large images: see `tiles.segment`."""
        from tiles import segment  # it imports this file, by way of evaluate.py

        return segment(self, image, phrase, **options)

    def normalise(self, image: Tensor, encoder_image: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images (B, 3, S, S) and (B, 3, E, E), as the loader gives them, to what forward takes."""
        mean, std = self.image_norm
        encoder_mean, encoder_std = self.encoder_norm
        return (image - mean) / std, (encoder_image - encoder_mean) / encoder_std

    def forward(self, image: Tensor, encoder_image: Tensor, ids: Tensor, lengths: Tensor) -> Output:
        text_mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]  # (B, L)
        cls, V, T_raw = self.union_encoder(encoder_image, ids, text_mask)  # (B, 1, W), (B, gg, W), (B, L, W)
        T = self.text_features(T_raw) if self.text_features else None  # (B, L, C)

        pseudo_mask = self.mask_prompt(cls, V) if self.mask_prompt else None  # (B, 1, g, g)  mask prompt generator
        sparse = self.sparse_prompt(cls) if self.sparse_prompt else None  # (B, tokens, C)

        stages = self.image_encoder(image, T, text_mask)  # 4 x (B, D, S/4.., S/4..)  BHFM in SAM 2's image encoder
        fine, middle, embedding, _ = self.neck(stages)[0]  # (B, C, S/4, S/4), (B, C, S/8, S/8), (B, C, s, s), -

        logits = self.decode(fine, middle, embedding, T, text_mask, pseudo_mask, sparse)  # (B, 1, S/4, S/4)
        log_weight = self.text_weight(T[:, 0])[:, 0] if self.text_weight else None  # (B,)
        return Output(logits, pseudo_mask, log_weight)

    def decode(
        self, fine: Tensor, middle: Tensor, embedding: Tensor, T: Tensor | None, text_mask: Tensor,
        pseudo_mask: Tensor | None, sparse: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """SAM 2's prompt encoder and mask decoder, with the text multiplied into the embedding -> (B, 1, S/4, S/4).

        The arguments are those of `forward` under the same names. A prompt that is None is none to SAM 2 either."""
        with torch.autocast(embedding.device.type, enabled=False):  # angles up to 2 pi * 4 need float32
            place = self.prompt_encoder.get_dense_pe()  # (1, C, s, s)
        embedding = embedding + self.no_mem_embed.view(1, -1, 1, 1)  # (B, C, s, s)
        if self.decoder_fusion:
            embedding = self.decoder_fusion(embedding, place, T, text_mask)  # (B, C, s, s)
        prompt = pseudo_mask  # (B, 1, g, g)
        if prompt is not None:
            prompt = prompt if self.preset.architecture == "ours" else prompt.sigmoid()  # (B, 1, g, g)
            prompt = dense_prompt(prompt, 4 * embedding.shape[-1])  # (B, 1, 4s, 4s)
        _, dense = self.prompt_encoder(points=None, boxes=None, masks=prompt)  # -, (B, C, s, s); (1, C, s, s) for None
        if sparse is None:
            sparse = embedding.new_empty(len(embedding), 0, embedding.shape[1])  # (B, 0, C)
        # (B, C/8, S/4, S/4), (B, C/4, S/8, S/8)
        high_res = [self.mask_decoder.conv_s0(fine), self.mask_decoder.conv_s1(middle)]
        p, *_ = self.mask_decoder(
            image_embeddings=embedding, image_pe=place, sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense, multimask_output=False, repeat_image=False, high_res_features=high_res,
        )  # (B, 1, 4s, 4s)  # fmt: skip
        # The published output is the pair (1 - p, p); the logit of its soft-max is 2p - 1.
        return 2 * p - 1  # (B, 1, S/4, S/4)


def check_parts(names) -> set[str]:
    """Names of PARTS as a set; ValueError, in one sentence, for others and where no model would be left."""
    out = set(names)
    if unknown := out - PARTS.keys():
        raise ValueError(f"unknown part {', '.join(sorted(unknown))!r}: the parts are {', '.join(PARTS)}")
    if out >= (ways := {"fusion", "decoder-fusion", "mask-prompt", "sparse-prompt"}):
        raise ValueError(f"without {', '.join(sorted(ways))} the phrase has no way to SAM 2: keep one of them")
    if out >= {"cross-entropy", "dice"}:
        raise ValueError("without cross-entropy and dice nothing teaches the mask: keep one of them")
    return out


def compiled(model: nn.Module, mode: str | None = None) -> nn.Module:
    """The model behind torch.compile: one graph for each batch size and padded length of the phrases that occurs.

    Sizes are no variables: kernels for fixed ones are faster, and few occur. A full batch and the last one of an epoch,
    in training and in evaluation, with 32 or 64 tokens, are 8 graphs; torch gives up compiling, all but silently,
    beyond 8 by default. mode: torch.compile's; 'reduce-overhead' (CUDA graphs) is for inference.
    """
    torch._dynamo.config.cache_size_limit = max(32, torch._dynamo.config.cache_size_limit)  # as torch 2.6 calls recompile_limit
    return torch.compile(model, dynamic=False, mode=mode)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """{"total", "trained", "frozen"} numbers of parameters."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return {"total": total, "trained": trained, "frozen": total - trained}
