"""The model as a whole: padding, gradients, what is frozen, precision, one graph, no branch."""

import ast
import inspect
import textwrap
from dataclasses import replace

import pytest
import torch

import losses
from fusion import PUBLISHED
from model import RS2SAM2, count_parameters
from presets import PRESETS, Preset
from runtime.errors import UserError

SMALL_BEIT3 = {
    "width": 32, "layers": 2, "heads": 4, "hidden": 64, "vocabulary": 100, "image_size": 64, "text_positions": 64,
}  # fmt: skip
LOSSES = {"cross_entropy": 1.0, "dice": 0.1, "boundary": 0.2, "pseudo_mask": 1.0}
both_encoders = pytest.mark.parametrize("encoder", ["open_clip", "beit3"])


def small_preset(encoder: str) -> Preset:
    """A small `ours` with open_clip, a small published one with BEiT-3."""
    tiny = replace(PRESETS["tiny"], image_size=64)
    beit3 = replace(tiny, architecture=PUBLISHED, encoder="beit3", encoder_args=SMALL_BEIT3, reduction=4)
    return tiny if encoder == "open_clip" else beit3


def random_model(encoder: str) -> RS2SAM2:
    """A small model whose every parameter is of order one, so that each matters."""
    torch.manual_seed(0)
    model = RS2SAM2(small_preset(encoder))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p) / max(1, p[0].numel() if p.dim() > 1 else 1) ** 0.5)
    return model


def random_batch(model: RS2SAM2, lengths: list[int]):
    generator = torch.Generator().manual_seed(1)
    S, E, B, L = model.preset.image_size, model.union_encoder.image_size, len(lengths), max(lengths)
    image = torch.randn(B, 3, S, S, generator=generator)
    encoder_image = torch.randn(B, 3, E, E, generator=generator)
    ids = torch.randint(4, 100, (B, L), generator=generator)
    if model.preset.encoder == "beit3":  # its padding is known by the id 3
        ids = torch.where(torch.arange(L) < torch.tensor(lengths)[:, None], ids, 3)
    return image, encoder_image, ids, torch.tensor(lengths)


@pytest.mark.parametrize("training", [True, False])
@both_encoders
def test_a_batch_of_unequal_phrases_gives_each_sample_what_it_gets_alone(encoder, training):
    model = random_model(encoder).train(training)
    batch = random_batch(model, [2, 30, 11, 5])
    with torch.no_grad():
        together = model(*batch)
        for i, length in enumerate(batch[-1].tolist()):
            image, encoder_image, ids, lengths = (t[i : i + 1] for t in batch)
            alone = model(image, encoder_image, ids[:, :length], lengths)
            for name, ours, theirs in zip(together._fields, together, alone):
                assert (ours[i : i + 1] - theirs).abs().max() <= 1e-5 * theirs.abs().max(), (name, length)


@both_encoders
def test_every_trained_parameter_gets_a_gradient_and_no_other(encoder):
    model = random_model(encoder)
    target = torch.zeros(2, 64, 64)
    target[:, 10:40, 20:50] = 1
    losses.total_loss(model(*random_batch(model, [7, 4])), target, LOSSES)["loss"].backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.abs().max() > 0, name
        else:
            assert p.grad is None, name


@both_encoders
def test_bfloat16_autocast_trains_and_agrees_with_float32(encoder):
    model = random_model(encoder)
    batch, target = random_batch(model, [7, 4]), torch.ones(2, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(*batch)
    loss = losses.total_loss(output, target, LOSSES)["loss"]
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    exact = model(*batch).logits
    assert (output.logits - exact).norm() < 0.05 * exact.norm()  # bfloat16 keeps 8 bits


@pytest.mark.parametrize("method", [RS2SAM2.forward, RS2SAM2.decode])
def test_the_forward_pass_has_no_branch(method):
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    assert not [
        n for n in ast.walk(tree) if isinstance(n, (ast.If, ast.IfExp, ast.BoolOp, ast.For, ast.While, ast.Match))
    ]


@pytest.mark.parametrize("encoder, training", [("open_clip", True), ("open_clip", False), ("beit3", True)])
def test_one_graph_with_the_eager_values(encoder, training):
    model = random_model(encoder).train(training)
    batch = random_batch(model, [7, 4])
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    with torch.set_grad_enabled(training):
        for ours, theirs in zip(model(*batch), compiled(*batch)):
            torch.testing.assert_close(ours, theirs)


def test_foundation_stays_frozen_and_in_eval_mode():
    model = RS2SAM2(replace(small_preset("open_clip"), train_trunk=False))
    for block in model.train().image_encoder.trunk.blocks:
        assert not any(p.requires_grad for p in block.block.parameters()) and not block.block.training
        assert all(p.requires_grad for p in block.space_adapter.parameters()) and block.space_adapter.training
    assert not any(p.requires_grad for p in [*model.neck.parameters(), model.image_encoder.trunk.pos_embed])
    assert not model.neck.training and model.union_encoder.training
    assert not any(p.requires_grad for m in model.unused() for p in m.parameters())
    counts = count_parameters(model)
    assert counts["total"] == counts["trained"] + counts["frozen"] and counts["frozen"] > 0


def test_no_video_memory_is_built():
    names = " ".join(k for k, _ in RS2SAM2(small_preset("open_clip")).named_modules())
    assert not any(word in names for word in ("memory", "maskmem", "obj_ptr"))


@pytest.mark.parametrize("size", [100, 0, 8192])
def test_image_size_is_checked(size):
    with pytest.raises(UserError, match=f"image size {size}.* multiple of 32, up to 4096"):
        RS2SAM2(replace(small_preset("open_clip"), image_size=size))


def test_normalise_takes_the_encoders_own_statistics():
    model = RS2SAM2(small_preset("beit3"))
    white = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    for image in model.normalise(white, white):
        torch.testing.assert_close(image[0, :, 0, 0], expected)
