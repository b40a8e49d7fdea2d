"""RS2-SAM 2: an overhead image and a phrase in, the mask of what the phrase names out.

The forward pass in the order of the paper's figure:

    image, phrase --> union encoder --> class token, visual tokens, text tokens
    text tokens + image --> SAM 2's image encoder with the bidirectional hierarchical fusion module (fusion.py)
    class token + visual tokens --> mask prompt generator --> pseudo-mask: the dense prompt (prompt_gen.py)
    class token --> the sparse prompt
    everything --> SAM 2's mask decoder --> mask logits

SAM 2's classes come from the `sam2` package and are built from its YAML files; its video memory is not built.
Letters: B batch, S side of the image, E side of the union encoder's image, L text tokens, W width of the union
encoder, C width of SAM 2's decoder, g side of the union encoder's grid, s = S/16 side of SAM 2's image embedding.
"""

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

from encoder import IMAGENET_MEAN, IMAGENET_STD, build_union_encoder
from fusion import DecoderFusion, FusedHiera
from presets import Preset
from prompt_gen import DensePrompt, MaskPromptGenerator, SparsePrompt
from runtime.errors import UserError

LARGEST_SIDE = 4096  # pixels of S and E


class Output(NamedTuple):
    """What the model returns. The mask is logits > 0, its probability sigmoid(logits)."""

    logits: Tensor  # (B, 1, S/4, S/4)
    pseudo_mask: Tensor  # (B, 1, g, g) logits of the mask prompt
    text_weight: Tensor  # (B,) the boundary loss's weight of each phrase (`losses.boundary` takes it for its logarithm)


def check_sides(preset: Preset) -> None:
    """UserError for sides of images that the networks can't take."""
    if preset.image_size % 32 or not 0 < preset.image_size <= LARGEST_SIDE:
        raise UserError(f"image size {preset.image_size}: SAM 2's windows need a multiple of 32, up to {LARGEST_SIDE}")
    if preset.encoder_size is not None and not 0 < preset.encoder_size <= LARGEST_SIDE:
        raise UserError(f"encoder size {preset.encoder_size}: the union encoder takes 1 to {LARGEST_SIDE} pixels a side")


def build_image_encoder(preset: Preset) -> nn.Module:
    """SAM 2's image encoder (Hiera trunk and neck) of the preset's YAML file, with random weights; UserError.

    Hydra would import and call what a text in the trunk's settings names, so they are numbers and lists of numbers alone.
    """
    configs, changes = Path(sam2.__file__).parent / "configs", [*preset.trunk.values(), *preset.decoder.values()]
    if configs / preset.sam2 not in configs.rglob("*.yaml"):
        raise UserError(f"preset's sam2 {preset.sam2!r} is no YAML file under the sam2 package's configs/: name one of these")
    if not all(isinstance(n, (int, float)) for v in changes for n in (v if isinstance(v, (list, tuple)) else [v])):
        raise UserError("the preset's trunk and decoder hold something else than numbers and lists of numbers: correct them")
    config = OmegaConf.load(configs / preset.sam2).model.image_encoder
    config.trunk = OmegaConf.merge(config.trunk, preset.trunk)
    config.neck.d_model = preset.decoder["dim"]
    config.neck.position_encoding.warmup_cache = False  # it would be warmed on a CUDA card, whatever the model's device
    widths = [config.trunk.get("embed_dim", 96) * 2**i for i in range(len(config.trunk.get("stages", range(4))))]
    config.neck.backbone_channel_list = widths[::-1]
    encoder = instantiate(config)
    encoder.neck.position_encoding = NoPositionEncoding()
    return encoder.requires_grad_(preset.train_trunk)


class NoPositionEncoding(nn.Module):
    """Replaces the neck's sine encodings, which only the video memory reads."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


class RS2SAM2(nn.Module):
    """The whole model, with random weights except for a union encoder that is given.

    forward(image (B, 3, S, S), encoder_image (B, 3, E, E), ids (B, L) int64, lengths (B,) int64) -> Output.
    Images are float and normalised (see `normalise`); ids and lengths come from `union_encoder.tokenizer`.
    UserError for settings of the preset that no network has.
    """

    def __init__(self, preset: Preset, union_encoder: nn.Module | None = None):
        super().__init__()
        check_sides(preset)
        self.preset = preset
        architecture, dim, heads = preset.architecture, preset.decoder["dim"], preset.decoder["heads"]

        self.union_encoder = union_encoder or build_union_encoder(preset)
        width = self.union_encoder.width
        self.text_features = nn.Linear(width, dim)
        self.text_weight = nn.Linear(dim, 1)
        self.sparse_prompt = SparsePrompt(width, dim, architecture.sparse_tokens)
        self.mask_prompt = MaskPromptGenerator(width, architecture=architecture)
        self.dense_prompt = DensePrompt(architecture)

        image_encoder = build_image_encoder(preset)
        self.neck = image_encoder.neck
        self.image_encoder = FusedHiera(image_encoder.trunk, dim, preset.reduction, architecture)
        if preset.train_trunk:
            for table in (self.image_encoder.trunk.pos_embed, self.image_encoder.trunk.pos_embed_window):
                nn.init.trunc_normal_(table, std=0.02)  # sam2 leaves them at zero
        self.no_mem_embed = nn.Parameter(torch.zeros(1, 1, dim))
        nn.init.trunc_normal_(self.no_mem_embed, std=0.02)
        self.decoder_fusion = DecoderFusion(dim, architecture=architecture)
        side, size = preset.image_size // 16, preset.image_size
        self.prompt_encoder = PromptEncoder(
            dim, image_embedding_size=(side, side), input_image_size=(size, size), mask_in_chans=16
        )
        self.mask_decoder = MaskDecoder(
            transformer=TwoWayTransformer(depth=2, embedding_dim=dim, num_heads=heads, mlp_dim=preset.decoder["mlp"]),
            transformer_dim=dim, use_high_res_features=True, iou_prediction_use_sigmoid=True, pred_obj_scores=True,
            pred_obj_scores_mlp=True, use_multimask_token_for_obj_ptr=True,
        )  # fmt: skip
        for unused in self.unused():
            unused.requires_grad_(False)
        encoder = self.union_encoder
        for name, mean, std in (("image_norm", IMAGENET_MEAN, IMAGENET_STD), ("encoder_norm", encoder.mean, encoder.std)):
            self.register_buffer(name, torch.tensor([mean, std]).view(2, 3, 1, 1) * 255, persistent=False)
        self.train()

    def unused(self) -> list[nn.Module]:
        """What sam2's prompt encoder and mask decoder build and this model never reads: frozen, never optimised."""
        p, d = self.prompt_encoder, self.mask_decoder
        heads = [*d.output_hypernetworks_mlps[1:], d.iou_prediction_head, d.pred_obj_score_head]
        return [p.point_embeddings, p.not_a_point_embed, p.no_mask_embed, *heads]

    def fusion_modules(self) -> list[nn.Module]:
        """The modules the paper adds to SAM 2 and the union encoder: trained at lr, all else at the recipe's share of it."""
        return [*self.image_encoder.adapters(), self.decoder_fusion, self.mask_prompt]

    def train(self, mode: bool = True):
        """As nn.Module's, but a frozen image encoder stays in evaluation mode."""
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
        then hold these weights in `dtype`, as the model was trained with them (the published one does so too).
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.MultiheadAttention)):
                for p in module.parameters(recurse=False):
                    if not p.requires_grad:
                        p.data = p.data.to(dtype)

    def normalise(self, image: Tensor, encoder_image: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images (B, 3, S, S) and (B, 3, E, E), as the loader gives them, to what forward takes."""
        mean, std = self.image_norm
        encoder_mean, encoder_std = self.encoder_norm
        return (image - mean) / std, (encoder_image - encoder_mean) / encoder_std

    def forward(self, image: Tensor, encoder_image: Tensor, ids: Tensor, lengths: Tensor) -> Output:
        text_mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]  # (B, L)
        cls, V, T = self.union_encoder(encoder_image, ids, text_mask)  # (B, 1, W), (B, gg, W), (B, L, W)
        T = self.text_features(T)  # (B, L, C)

        pseudo_mask = self.mask_prompt(cls, V)  # (B, 1, g, g)  mask prompt generator
        sparse = self.sparse_prompt(cls)  # (B, tokens, C)

        stages = self.image_encoder(image, T, text_mask)  # 4 x (B, D, S/4.., S/4..)  BHFM in SAM 2's image encoder
        fine, middle, embedding, _ = self.neck(stages)[0]  # (B, C, S/4, S/4), (B, C, S/8, S/8), (B, C, s, s), -

        logits = self.decode(fine, middle, embedding, T, text_mask, pseudo_mask, sparse)  # (B, 1, S/4, S/4)
        return Output(logits, pseudo_mask, self.text_weight(T[:, 0])[:, 0])

    def decode(
        self, fine: Tensor, middle: Tensor, embedding: Tensor, T: Tensor, text_mask: Tensor, pseudo_mask: Tensor, sparse: Tensor
    ) -> Tensor:  # fmt: skip
        """SAM 2's prompt encoder and mask decoder, with the text multiplied into the embedding -> (B, 1, S/4, S/4).

        The arguments are those of `forward` under the same names."""
        with torch.autocast(embedding.device.type, enabled=False):  # angles up to 2 pi * 4 need float32
            dense_pe = self.prompt_encoder.get_dense_pe()  # (1, C, s, s)
        embedding = embedding + self.no_mem_embed.view(1, -1, 1, 1)  # (B, C, s, s)
        embedding = self.decoder_fusion(embedding, dense_pe, T, text_mask)  # (B, C, s, s)
        mask = self.dense_prompt(pseudo_mask, 4 * embedding.shape[-1])  # (B, 1, 4s, 4s)
        _, dense = self.prompt_encoder(points=None, boxes=None, masks=mask)  # -, (B, C, s, s)
        high_res = [self.mask_decoder.conv_s0(fine), self.mask_decoder.conv_s1(middle)]  # (B, C/8, S/4..), (B, C/4, S/8..)
        p, *_ = self.mask_decoder(
            image_embeddings=embedding, image_pe=dense_pe, sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense, multimask_output=False, repeat_image=False, high_res_features=high_res,
        )  # (B, 1, 4s, 4s)  # fmt: skip
        # The published output is the pair (1 - p, p); the logit of its soft-max is 2p - 1.
        return 2 * p - 1  # (B, 1, S/4, S/4)


def compile_blocks(model: RS2SAM2, **options) -> int:
    """Compile in place what a step spends its time on: the blocks of SAM 2's image encoder and the layers of the union encoder.
    The model stays the object it is.

    Blocks of one kind and shape have one graph between them, so the first step comes several times sooner than with a graph
    of the whole model. Sizes are no variables: kernels for fixed ones are faster, and few occur. options: of torch.compile.
    -> how many kinds of blocks there are.
    """
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)  # of graphs; torch 2.6's name
    stacks = [m for m in model.union_encoder.modules() if isinstance(m, nn.ModuleList)]
    blocks, layers = model.image_encoder.trunk.blocks, [layer for stack in stacks for layer in stack]
    for module in [*blocks, *layers]:
        module.compile(dynamic=False, **options)
    return len({(str(b), b.block.window_size) for b in blocks} | {str(layer) for layer in layers})


def count_parameters(model: nn.Module) -> dict[str, int]:
    """{"total", "trained", "frozen"} numbers of parameters."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return {"total": total, "trained": trained, "frozen": total - trained}
