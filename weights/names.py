"""The published model's key names, and the keys of this model they go to. Nothing is reshaped.

SAM 2's own files name their parts as the published one does, less a prefix, and so do BEiT-3's: they take the same road.
"""

import re
from collections.abc import Iterable

WRAPPERS = r"^(module\.)?(evf_model\.)?"  # what training wrappers may have put before a published name

# Published name -> ours. Every rule is applied, in this order.
RENAMES = [
    (WRAPPERS, ""),
    (r"^mm_extractor\.beit3\.", "union_encoder."),
    (r"^text_feat_linear\.", "text_features."),
    (r"^text2one_linear\.", "text_weight."),
    (r"^text_hidden_fcs\.0\.0\.", "sparse_prompt.hidden."),
    (r"^text_hidden_fcs\.0\.2\.", "sparse_prompt.out."),
    (r"^vmtoken\.multihead_attn\.", "mask_prompt.attention."),
    (r"^mask_linear\.", "mask_prompt.token."),
    (r"^mask_product\.", "mask_prompt.score."),
    (r"^visual_model\.image_encoder\.neck\.", "neck."),
    (r"^visual_model\.sam_prompt_encoder\.", "prompt_encoder."),
    (r"^visual_model\.sam_mask_decoder\.vlfusion_module\.multihead_attn\.", "decoder_fusion.attention."),
    (r"^visual_model\.sam_mask_decoder\.", "mask_decoder."),
    (r"^visual_model\.", ""),
    (r"(trunk\.blocks\.\d+)\.(norm1|norm2|attn|mlp|proj)\.", r"\1.block.\2."),
    (r"\.MLP_Adapter\.", ".mlp_adapter."),
    (r"\.Space_Adapter\.", ".space_adapter."),
    (r"\.D_fc1\.", ".down."),
    (r"\.D_fc2\.", ".up."),
    (r"\.text_in_linear\.", ".text_down."),
    (r"\.text_out_linear\.", ".text_up."),
    (r"\.vlfusion_module\.multihead_attn\.", ".vision_reads_text."),
    (r"\.lvfusion_module\.multihead_attn\.", ".text_reads_vision."),
]

# What published and SAM 2 files hold and no forward pass here reads: the video memory, a head that was never connected,
# BEiT-3's mask token and (see `is_unused`) the last block's text update.
UNUSED = re.compile(
    r"^(visual_model\.)?(maskmem_tpos_enc|no_mem_pos_enc|no_obj_ptr|no_obj_embed_spatial|mask_downsample\.|memory_attention\.|"
    r"memory_encoder\.|obj_ptr_proj\.|obj_ptr_tpos_proj\.)|^meo_linear\.|^(mm_extractor\.)?beit3\.vision_embed\.mask_token$"
)
TEXT_UPDATE = re.compile(r"trunk\.blocks\.(\d+)\.Space_Adapter\.(lvfusion_module|text_out_linear)\.")


def our_name(published: str) -> str:
    """The key of this model that a published key's tensor goes to."""
    for pattern, replacement in RENAMES:
        published = re.sub(pattern, replacement, published)
    return published


def is_unused(published: str, blocks: int) -> bool:
    """Whether a published key is one that this model, with so many trunk blocks, has no use for."""
    published = re.sub(WRAPPERS, "", published)
    update = TEXT_UPDATE.search(published)
    return bool(UNUSED.match(published)) or (update is not None and int(update[1]) == blocks - 1)


def is_published(names: Iterable[str]) -> bool:
    """Whether these are the keys of a published RS2-SAM 2 state dict."""
    return any(re.sub(WRAPPERS, "", name).startswith("mm_extractor.beit3.") for name in names)
