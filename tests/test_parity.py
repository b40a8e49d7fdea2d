"""Number for number: our modules against tensors that the published architecture produced on random weights.

The fixtures are found in the folder that the environment variable FIXTURES names; two compact ones of the whole model
are part of the tests. Every .safetensors file in each folder is compared, whatever its seed, sizes and phrase lengths.
"""

import json
import os
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from sam2.modeling.backbones.hieradet import Hiera, MultiScaleBlock
from torch import nn

import losses
from encoder import BEiT3Encoder
from evaluate import iou_counts, summarise
from fusion import BidirectionalAdapter, Bottleneck, DecoderFusion, FusedBlock, FusedHiera
from model import RS2SAM2, Preset, dense_prompt
from prompt_gen import MaskPromptGenerator
from weights import is_unused, load_state, our_name

HERE = Path(__file__).parent
FIXTURES = Path(os.environ["FIXTURES"]) if os.environ.get("FIXTURES") else None


def cases(folder: str, suffix: str = ".safetensors") -> list:
    """The fixture files of one folder, as pytest parameters; one skipped parameter where there are none."""
    files = sorted((FIXTURES / folder).glob(f"*{suffix}")) if FIXTURES else []
    if folder == "10_whole_compact":
        files = files or sorted((HERE / "fixtures").glob("*.safetensors"))
    if not files:
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"FIXTURES names no folder with {folder}"), id="none")]
    return [pytest.param(f, id=f.name.removesuffix(suffix)) for f in files]


def read(path: Path) -> tuple[dict, dict]:
    with safe_open(path, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["config"])


def part(tensors: dict, prefix: str) -> dict:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def assert_close(ours, published, tolerance=1e-5, what=""):
    """Largest difference within `tolerance` of the published tensor's maximum."""
    assert ours.shape == published.shape, f"{what}: {tuple(ours.shape)} against {tuple(published.shape)}"
    error = (ours - published).abs().max().item()
    scale = max(published.abs().max().item(), 1e-12)
    assert error <= tolerance * scale, f"{what}: off by {error:.2e}, maximum {scale:.2e}"


def load(module: nn.Module, weights: dict, prefix: str) -> dict:
    """Load published weights into a part of the model. prefix: the published place of the part. -> {published: parameter}"""
    state, outer = module.state_dict(keep_vars=True), {}
    names = {name: our_name(prefix + name) for name in weights}
    inner = os.path.commonprefix(list(names.values()))
    inner = inner[: inner.rindex(".") + 1]  # our place of the part
    for name, ours in names.items():
        outer[name] = state[ours.removeprefix(inner)]
    assert set(map(id, outer.values())) == set(map(id, state.values()))  # nothing of ours is left at random
    with torch.no_grad():
        for name, tensor in weights.items():
            outer[name].copy_(tensor)
    return outer


def check_component(tensors, weights: dict, inputs: dict, outputs: dict):
    """Outputs, and the gradients of sum(mean(output^2)) with respect to inputs and weights, where the file has them."""
    for name, out in outputs.items():
        assert_close(out, tensors[f"out/{name}"], what=name)
    scalar = sum(out.square().mean() for out in outputs.values())
    assert_close(scalar, tensors["out_scalar/value"], what="scalar")
    wanted = {f"gin/{k}": v for k, v in inputs.items()} | {f"gw/{k}": v for k, v in weights.items()}
    wanted = {k: v for k, v in wanted.items() if k in tensors}
    if wanted:
        for (name, _), grad in zip(wanted.items(), torch.autograd.grad(scalar, wanted.values(), allow_unused=True)):
            grad = torch.zeros_like(tensors[name]) if grad is None else grad
            assert_close(grad, tensors[name], what=name)


BLOCK = "visual_model.image_encoder.trunk.blocks.0."


@pytest.mark.parametrize("path", cases("01_adapter_cross"))
def test_bidirectional_adapter(path):
    tensors, config = read(path)
    adapter = BidirectionalAdapter(config["D_features"], text_dim=256, hidden=config["D_features"] // 4)
    weights = load(adapter, part(tensors, "w/"), BLOCK + "Space_Adapter.")
    x, text = tensors["in/x"].requires_grad_(), tensors["in/text"].requires_grad_()
    new_x, new_text = adapter(x, text.transpose(0, 1), None)
    check_component(tensors, weights, {"x": x, "text": text}, {"x": new_x, "text": new_text.transpose(0, 1)})


@pytest.mark.parametrize("path", cases("02_adapter"))
def test_bottleneck(path):
    tensors, config = read(path)
    adapter = Bottleneck(config["D_features"], config["D_features"] // 4)
    weights = load(adapter, part(tensors, "w/"), BLOCK + "MLP_Adapter.")
    x = tensors["in/x"].requires_grad_()
    out = x + adapter(x) if config["skip_connect"] else adapter(x)  # ours has no skip: no block uses one
    check_component(tensors, weights, {"x": x}, {"x": out})


@pytest.mark.parametrize("path", cases("03_block"))
def test_fused_block(path):
    tensors, config = read(path)
    args = config["args"] | ({"q_stride": tuple(config["args"]["q_stride"])} if "q_stride" in config["args"] else {})
    block = FusedBlock(MultiScaleBlock(**args), text_dim=256, hidden=config["args"]["dim_out"] // 4)
    weights = load(block, part(tensors, "w/"), BLOCK)
    x, text = tensors["in/x"].requires_grad_(), tensors["in/text"].requires_grad_()
    new_x, new_text = block(x, text.transpose(0, 1), None)
    check_component(tensors, weights, {"x": x, "text": text}, {"x": new_x, "text": new_text.transpose(0, 1)})


@pytest.mark.parametrize("path", cases("04_trunk"))
def test_fused_trunk(path):
    tensors, config = read(path)
    args = {k: tuple(v) if isinstance(v, list) else v for k, v in config["args"].items()}
    trunk = FusedHiera(Hiera(**args), text_dim=256)
    blocks = len(trunk.trunk.blocks)
    used = {
        k: v for k, v in part(tensors, "w/").items() if not is_unused(f"visual_model.image_encoder.trunk.{k}", blocks)
    }
    assert len(used) < len(part(tensors, "w/"))  # the last block's text update
    weights = load(trunk.trunk, used, "visual_model.image_encoder.trunk.")
    image, text = tensors["in/image"].requires_grad_(), tensors["in/text"].requires_grad_()
    stages = trunk(image, text)
    assert f"out/feat{len(stages)}" not in tensors
    check_component(
        tensors, weights, {"image": image, "text": text}, {f"feat{i}": stage for i, stage in enumerate(stages)}
    )


@pytest.mark.parametrize("path", cases("05_maskgen"))
def test_mask_prompt_generator(path):
    tensors, config = read(path)
    mpg = MaskPromptGenerator(config["C"])
    published = {our_name(k).removeprefix("mask_prompt."): k for k in part(tensors, "w/")}
    state = mpg.state_dict(keep_vars=True)
    weights = {k: state[ours] for ours, k in published.items()}
    with torch.no_grad():
        for k, parameter in weights.items():
            parameter.copy_(tensors[f"w/{k}"])
    cls, V = tensors["in/cls"].requires_grad_(), tensors["in/V"].requires_grad_()
    token = cls * mpg.attention(cls, V)
    check_component(tensors, weights, {"cls": cls, "V": V}, {"token": token, "mask": mpg(cls, V).sigmoid()})


@pytest.mark.parametrize("path", cases("06_decoder_fusion"))
def test_decoder_fusion(path):
    tensors, config = read(path)
    fusion = DecoderFusion(config["d_model"])
    weights = {
        k: dict(fusion.named_parameters())[
            our_name(f"visual_model.sam_mask_decoder.{k}").removeprefix("decoder_fusion.")
        ]
        for k in part(tensors, "w/")
    }
    with torch.no_grad():
        for k, parameter in weights.items():
            parameter.copy_(tensors[f"w/{k}"])
    inputs = {k: v.requires_grad_() for k, v in part(tensors, "in/").items()}
    out = fusion(inputs["image_embeddings"], inputs["image_pe"], inputs["text_feat"], None)
    check_component(tensors, weights, inputs, {"image_embeddings": out})


def beit3_args(args: dict) -> dict:
    return {
        "width": args["encoder_embed_dim"], "layers": args["encoder_layers"], "heads": args["encoder_attention_heads"],
        "hidden": args["encoder_ffn_embed_dim"], "vocabulary": args["vocab_size"], "image_size": args["img_size"],
        "patch": args["patch_size"], "text_positions": args["max_source_positions"],
    }  # fmt: skip


@pytest.mark.parametrize("path", cases("07_beit3"))
def test_beit3(path):
    tensors, config = read(path)
    beit3 = BEiT3Encoder(**beit3_args(config["args"]))
    used = {k: v for k, v in part(tensors, "w/").items() if not is_unused(f"mm_extractor.{k}", 1)}
    weights = load(beit3, used, "mm_extractor.")
    image = tensors["in/image"].requires_grad_()
    out = torch.cat(beit3(image, tensors["in/input_ids"], tensors["in/attention_mask"]), dim=1)
    check_component(tensors, weights, {"image": image}, {"encoder_out": out})


@pytest.mark.parametrize("path", cases("08_losses"))
def test_losses(path):
    tensors, _ = read(path)
    pred, target = tensors["in/pred"], tensors["in/target"]
    z = (pred[:, 1] - pred[:, 0]).requires_grad_()
    assert "gin/boundary__pred" not in tensors  # the published boundary loss passes the mask no gradient
    if len(z) > 1:  # ours is the mean of what the samples give alone
        for term in (losses.cross_entropy, losses.dice):
            alone = torch.cat([term(z[i : i + 1], target[i : i + 1]) for i in range(len(z))])
            torch.testing.assert_close(term(z, target), alone, rtol=1e-6, atol=0)
        return
    for name, term in (("ce", losses.cross_entropy), ("dice", losses.dice)):
        value = term(z, target).mean()
        torch.testing.assert_close(value, tensors[f"out/{name}"], rtol=1e-6, atol=0)
        (grad,) = torch.autograd.grad(value, z)
        assert_close(grad, tensors[f"gin/{name}__pred"][:, 1], what=name)
    if torch.allclose(pred[:, 0], 1 - pred[:, 1], atol=1e-6):
        weight = tensors["in/text_weight"].requires_grad_()
        z = (2 * pred[:, 1] - 1).requires_grad_()
        value = losses.published_boundary(z, target, weight).mean()
        torch.testing.assert_close(value, tensors["out/boundary"], rtol=1e-6, atol=0)
        grad_z, grad_w = torch.autograd.grad(value, (z, weight), allow_unused=True)
        assert grad_z is None
        assert_close(grad_w, tensors["gin/boundary__text_weight"], what="text weight")


@pytest.mark.parametrize("path", cases("09_metrics"))
def test_metrics(path):
    tensors, config = read(path)
    logits, target = tensors["in/logits"], tensors["in/target"]
    counts = [iou_counts((p[1] > p[0]).numpy(), t.numpy()) for p, t in zip(logits, target)]
    intersection, union = np.array(counts).T
    assert (intersection == tensors["out/intersection"].numpy()).all()
    assert (union == tensors["out/union"].numpy()).all()
    scores = summarise(intersection, union, protocol="paper")
    assert scores["mIoU"] == pytest.approx(config["miou"], abs=1e-9)
    assert scores["oIoU"] == pytest.approx(config["oiou"], abs=1e-9)
    for threshold, value in zip(config["thresholds"], config["pr"]):
        assert scores[f"Pr@{threshold}"] == pytest.approx(value, abs=1e-9)


# ---- the whole model ------------------------------------------------------------------------------------------------

TRUNK = {
    "embed_dim": 16, "num_heads": 1, "stages": [1, 2, 3, 1], "window_spec": [8, 4, 6, 4], "global_att_blocks": [4],
    "window_pos_embed_bkg_spatial_size": [7, 7],
}  # fmt: skip


def published_preset(config: dict) -> Preset:
    return Preset(
        architecture="published", sam2="sam2/sam2_hiera_l.yaml", trunk=TRUNK, encoder="beit3",
        encoder_args=beit3_args(config["beit_kwargs"]), image_size=config["sam_image_size"],
    )  # fmt: skip


def published_model(config: dict, weights: dict) -> RS2SAM2:
    model = RS2SAM2(published_preset(config))
    load_state(model, weights, "the fixture", required=lambda key: True)
    return model.eval().requires_grad_(True)


def watch(model: RS2SAM2) -> dict:
    """Hooks that keep what flows between the stages, under the fixtures' names."""
    seen = {}

    def keep(module, name, pick=lambda out: out):
        module.register_forward_hook(lambda m, i, out: seen.__setitem__(name, pick(out)))

    keep(model.union_encoder, "encoder_out", lambda out: torch.cat(out, dim=1))
    for i, name in enumerate(("cls", "V", "text_raw")):
        keep(model.union_encoder, name, lambda out, i=i: out[i])
    keep(model.text_features, "T")
    keep(model.mask_prompt, "pseudo_mask", torch.sigmoid)
    model.mask_prompt.token.register_forward_pre_hook(lambda m, args: seen.update(vmtoken_out=args[0].transpose(0, 1)))
    keep(model.mask_prompt.token, "mask_linear_out")
    keep(model.sparse_prompt, "sparse_token")
    for i, block in enumerate(model.image_encoder.trunk.blocks):
        keep(block, f"block{i}_x", lambda out: out[0])
        if i < len(model.image_encoder.trunk.blocks) - 1:  # the published last text update has no reader
            keep(block, f"block{i}_text", lambda out: out[1].transpose(0, 1))
    for i in range(4):
        keep(model.image_encoder, f"trunk_{i}", lambda out, i=i: out[i])
        keep(model.neck, f"fpn_{i}", lambda out, i=i: out[0][i])
    keep(model.prompt_encoder, "dense_embeddings", lambda out: out[1])
    model.decoder_fusion.register_forward_pre_hook(lambda m, args: seen.update(image_embed=args[0], image_pe=args[1]))
    keep(model.decoder_fusion, "image_embed_fused")
    keep(model.mask_decoder.transformer, "dec_hs", lambda out: out[0])
    keep(model.mask_decoder.transformer, "dec_src", lambda out: out[1])
    keep(model.mask_decoder.conv_s0, "high_res_s0")
    keep(model.mask_decoder.conv_s1, "high_res_s1")
    keep(model.mask_decoder, "low_res_logits", lambda out: out[0])
    return seen


def run(model, image, image_evf, ids, lengths):
    """-> (p at the image's size (B, H, W), Output, what was seen between the stages)"""
    seen = watch(model)
    output = model(image, image_evf, ids, lengths)
    z = F.interpolate(output.logits, image.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    seen["mask_prompt_resized"] = dense_prompt(seen["pseudo_mask"], seen["dense_embeddings"].shape[-1] * 4)
    return (z + 1) / 2, output, seen


def published_loss(output, target) -> torch.Tensor:
    """The published total on our output (one sample): 0.9 CE + 0.1 Dice + 0.2 boundary, hard edges, raw weight."""
    z = F.interpolate(output.logits, target.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    ce, dice = losses.cross_entropy(z, target), losses.dice(z, target)
    boundary = losses.published_boundary(z, target, output.log_weight[:, None, None])
    return (0.9 * ce + 0.1 * dice + 0.2 * boundary).sum()


def assert_same_mask(p, published):
    """p against the published p: logits within 1e-4, the same decision wherever |z| = |2p - 1| is over 1e-4."""
    assert (p - published).abs().max() <= 1e-4
    sure = (2 * published - 1).abs() > 1e-4
    assert ((p > 0.5) == (published > 0.5))[sure].all()


# Not compared: heads that stay unused inside sam2's decoder, and what is not computed or is compared under another name.
SKIPPED = re.compile(
    r"iou_pred|obj_score_logits|block\d+_text|mask_product_(in|out)|prompt_sparse|dec_tokens_in|dec_high\d|text2one|text_weight|logits"
)


def lengths_of(ids) -> torch.Tensor:
    """Real lengths, up to the last </s> = 2: the id 3 is both padding and an unknown word."""
    return (ids.shape[1] - (ids == 2).int().flip(1).argmax(1)).to(torch.int64)


@pytest.mark.parametrize("path", cases("10_whole", "_io.safetensors"))
def test_whole_model(path):
    tensors, config = read(path)
    weights, _ = read(path.with_name(path.name.replace("_io.", "_weights.")))
    model = published_model(config, part(weights, "w/"))
    ids = tensors["in/input_ids"]
    lengths = lengths_of(ids)
    p, output, seen = run(model, tensors["in/image"], tensors["in/image_evf"], ids, lengths)
    assert_published(tensors, p, output, seen, lengths, lambda name, ours: ours)
    full = lengths == lengths.max()
    assert_same_mask(p[full], tensors["out/out"][full][:, 1])
    assert_alone(model, p, tensors["in/image"], tensors["in/image_evf"], ids, lengths)
    if len(ids) > 1:
        return
    loss = published_loss(output, tensors["in/target"])
    torch.testing.assert_close(loss, tensors["out/loss"], rtol=2e-3, atol=1e-5)
    grads = path.with_name(path.name.replace("_io.", "_grads."))
    if grads.exists():
        expected = part(read(grads)[0], "gw/")
        check_gradients(model, loss, {k: v for k, v in expected.items()}, relative_l2=2e-3)


def assert_published(tensors, p, output, seen, lengths, strided):
    """Intermediates of the samples with the longest phrase (the published batch leaks padding into the others)."""
    full = (lengths == lengths.max()).nonzero()[:, 0]
    compared = 0
    for key, published in part(tensors, "mid/").items():
        name = key.removesuffix("__sub")
        if name not in seen:
            assert SKIPPED.fullmatch(name), f"{name} is compared with nothing"
            continue
        ours = seen[name]
        batch_first = not name.endswith("_text") and name != "vmtoken_out"
        ours = strided(key, ours)
        if name == "image_pe":
            assert_close(ours, published, what=key)
        elif batch_first:
            assert_close(ours[full], published[full], tolerance=3e-5, what=key)
        else:
            assert_close(ours[:, full], published[:, full], tolerance=3e-5, what=key)
        compared += 1
    assert compared >= 20, f"only {compared} intermediates were compared"


def assert_alone(model, p, image, image_evf, ids, lengths):
    """Each sample of a batch is what it is alone."""
    for i, length in enumerate(lengths.tolist()):
        if len(ids) > 1:
            alone, *_ = run(model, image[i : i + 1], image_evf[i : i + 1], ids[i : i + 1, :length], lengths[i : i + 1])
            assert (p[i] - alone[0]).abs().max() <= 1e-4


def check_gradients(model, loss, expected: dict, relative_l2: float):
    blocks = len(model.image_encoder.trunk.blocks)
    parameters = dict(model.named_parameters())
    names = [k for k in expected if not is_unused(k, blocks) and our_name(k) in parameters]
    grads = torch.autograd.grad(loss, [parameters[our_name(k)] for k in names], allow_unused=True)
    for name, grad in zip(names, grads):
        published = expected[name]
        grad = torch.zeros_like(published) if grad is None else grad
        if name.endswith("k_proj.bias"):
            continue  # zero up to noise: soft-max does not see a shift of all keys
        error = (grad - published).norm()
        assert error <= relative_l2 * published.norm() + 1e-7, f"{name}: {error:.2e} of {published.norm():.2e}"


# ---- the compact fixtures: weights and inputs are drawn by a rule ------------------------------------------------------


def draw(seed: int, key: str, shape, scale=1.0, shift=0.0) -> torch.Tensor:
    rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
    return torch.from_numpy((shift + scale * rng.standard_normal(tuple(shape))).astype(np.float32))


def compact_weights(tensors: dict, config: dict) -> dict[str, torch.Tensor]:
    drawn = {k: draw(config["seed"], k, shape, scale, shift) for k, shape, scale, shift in config["weights"]}
    return drawn | part(tensors, "w/")


def strided(key: str, x: torch.Tensor) -> torch.Tensor:
    """The slice of an intermediate that a compact fixture holds."""
    if not key.endswith("__sub"):
        return x
    if "_text" in key:
        return x[:, :, ::8]
    return x[:, ::8, ::2, ::2] if x.shape[-1] <= 16 else x[:, ::8, ::8, ::8]


@pytest.mark.parametrize("path", cases("10_whole_compact"))
def test_whole_model_compact(path):
    tensors, config = read(path)
    seed, B, S, E = config["seed"], config["batch"], config["sam_image_size"], config["evf_image_size"]
    model = published_model(config, compact_weights(tensors, config))
    image, image_evf = draw(seed, "in/image", (B, 3, S, S)), draw(seed, "in/image_evf", (B, 3, E, E))
    ids = tensors["in/input_ids"]
    lengths = lengths_of(ids)
    p, output, seen = run(model, image, image_evf, ids, lengths)
    assert_published(tensors, p, output, seen, lengths, strided)
    full = lengths == lengths.max()
    assert_same_mask(p[full][:, 1::4, 2::4], tensors["out/out__sub"][full][:, 1])
    assert_close(output.log_weight[full], tensors["out/text_scalar"][full], what="text weight")
    assert_alone(model, p, image, image_evf, ids, lengths)
    if B > 1:
        return
    target = torch.zeros(B, S, S, dtype=torch.long)
    for b in range(B):
        target[b, 40 + 7 * b : 150, 60 : 190 - 9 * b] = 1
    loss = published_loss(output, target)
    torch.testing.assert_close(loss, tensors["out/loss"], rtol=2e-3, atol=1e-5)
    blocks, parameters = len(model.image_encoder.trunk.blocks), dict(model.named_parameters())
    digests = {
        k: d
        for k, d in zip(config["grad_keys"], tensors["grad/digest"].double())
        if not is_unused(k, blocks) and our_name(k) in parameters and not k.endswith("k_proj.bias")
    }
    grads = torch.autograd.grad(loss, [parameters[our_name(k)] for k in digests], allow_unused=True)
    for (name, (norm, dot)), grad in zip(digests.items(), grads):
        if grad is None:
            assert norm == 0, name
            continue
        grad, direction = grad.double(), draw(seed + 1, "r/" + name, grad.shape).double()
        assert grad.norm() == pytest.approx(norm.item(), rel=2e-3, abs=1e-7), name
        # The dot product with a random direction is compared at the scale it has: |grad| |direction| / sqrt(n).
        scale = norm.item() * direction.norm().item() / direction.numel() ** 0.5
        assert (grad * direction).sum().item() == pytest.approx(
            dot.item(), abs=2e-3 * max(scale, abs(dot.item())) + 1e-7
        ), name
