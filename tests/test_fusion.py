"""The fusion modules by themselves: where they start, how they rewrite the text, attention, memory for time."""

import pytest
import torch
import torch.nn.functional as F
from sam2.modeling.backbones.hieradet import Hiera
from torch import nn

from fusion import PUBLISHED, Architecture, BidirectionalAdapter, CrossAttention, FusedHiera, sincos_2d
from presets import OURS


def small_hiera(architecture: Architecture) -> FusedHiera:
    torch.manual_seed(0)
    trunk = Hiera(embed_dim=16, num_heads=1, stages=(1, 2, 1), q_pool=2, window_spec=(8, 4, 4), global_att_blocks=(2,))
    return FusedHiera(trunk, text_dim=24, architecture=architecture)


@pytest.mark.parametrize("architecture", [OURS, PUBLISHED], ids=["ours", "published"])
def test_the_first_step_of_ours_sees_the_trunk_as_it_was(architecture):
    """Zeroed output layers, which learn at once, in ours only: the published trunk starts disturbed. Those of the rewritten
    text learn from the second step on, for nothing reads the text before."""
    model = small_hiera(architecture)
    image, text = torch.randn(2, 3, 64, 64), torch.randn(2, 5, 24)
    stages = model(image, text)
    x = model.trunk.patch_embed(image)
    x = x + model.trunk._get_pos_embed(x.shape[1:3])
    for block in model.trunk.blocks:
        x = block.block(x)  # sam2's own forward
    assert torch.allclose(stages[-1], x.permute(0, 3, 1, 2), atol=1e-5) == architecture.zero_start
    stages[-1].square().sum().backward()
    assert all(adapter.up.weight.grad.abs().max() > 0 for adapter in model.adapters())
    torch.optim.SGD(model.parameters(), lr=0.001).step()
    model.zero_grad()
    model(image, text)[-1].square().sum().backward()
    rewriting = [adapter for adapter in model.adapters() if hasattr(adapter, "text_up")]
    assert len(rewriting) == len(model.trunk.blocks) - 1  # nothing reads what the last block would write
    assert all(adapter.text_up.weight.grad.abs().max() > 0 for adapter in rewriting)


def test_what_is_rewritten_is_added_to_the_text_in_ours_and_blended_into_it_as_published():
    """The published 0.8 / 0.2, by hand, against the sum of ours, on the same weights."""
    torch.manual_seed(0)
    published = BidirectionalAdapter(32, 24, 16)
    ours = BidirectionalAdapter(32, 24, 16, architecture=Architecture(text_kept=1.0, text_added=1.0, zero_start=True))
    x, text, mask = (
        torch.randn(2, 4, 6, 32),
        torch.randn(2, 5, 24),
        torch.tensor([[True] * 5, [True] * 3 + [False] * 2]),
    )
    for before, after in zip((x, text), ours(x, text, mask)):
        assert torch.equal(before, after)  # nothing is added at the start
    ours.load_state_dict(published.state_dict())
    (x_published, text_published), (x_ours, text_ours) = published(x, text, mask), ours(x, text, mask)
    assert torch.equal(x_published, x_ours)
    torch.testing.assert_close(text_published - 0.8 * text, 0.2 * (text_ours - text))
    assert (text_ours - text).abs().min(-1).values.max() > 1e-3  # it is rewritten indeed


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("itself", [True, False], ids=["self", "cross"])
def test_attention_by_hand(training, itself):
    """The soft-max written out, with padding; in evaluation too, where torch has a road of its own."""
    torch.manual_seed(0)
    attention = CrossAttention(12, 3).train(training)
    nn.init.normal_(attention.in_proj_bias)
    memory = torch.randn(2, 5, 12)
    query, mask = memory if itself else torch.randn(2, 7, 12), torch.tensor([[True] * 5, [True, True] + [False] * 3])
    with torch.set_grad_enabled(training):
        ours = attention(query, memory, mask)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (3, 4)).transpose(1, 2)
        for x, w, b in zip((query, memory, memory), attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3))
    )
    scores = (q @ k.mT / 2).masked_fill(~mask[:, None, None], -torch.inf)
    torch.testing.assert_close(ours, attention.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("training", [True, False])
def test_the_fused_kernel_is_what_runs(training):
    attention = CrossAttention(16, 2).train(training)
    x, mask = torch.randn(2, 9, 16), torch.ones(2, 9, dtype=torch.bool)
    with torch.set_grad_enabled(training), torch.profiler.profile() as profile:
        attention(x, x, mask)
    names = {event.name for event in profile.events()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names and "aten::softmax" not in names


@pytest.mark.parametrize("heads", [1, 3, 6], ids=lambda heads: f"of {24 // heads} channels")
@pytest.mark.parametrize("masked", [True, False])
def test_the_form_for_the_flash_kernel_is_the_same_attention(heads, masked, monkeypatch):
    """Values and gradients; no mask goes to the kernel, heads of a multiple of 8; what is padded weighs nothing."""
    torch.manual_seed(0)
    attention, calls = CrossAttention(24, heads), []
    nn.init.normal_(attention.in_proj_bias)
    query, memory = torch.randn(2, 7, 24), torch.randn(2, 5, 24)
    mask = torch.tensor([[True] * 5, [True, True] + [False] * 3]) if masked else None

    def gradients(form):
        read = form(query, memory, mask)
        return read, *torch.autograd.grad(read.square().sum(), list(attention.parameters()))

    expected, kernel = gradients(attention.forward), F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kw: calls.append((args, kw)) or kernel(*args, **kw))
    for a, b in zip(expected, gradients(attention.flash), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    ((args, options),) = calls
    assert len({x.shape[-1] % 8 for x in args}) == 1 and args[0].shape[-1] % 8 == 0 and {*options} == {"scale"}
    monkeypatch.undo()
    for a, b in zip(expected, gradients(torch.compile(attention.flash, backend="aot_eager", fullgraph=True)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    if masked:
        half = attention.half()
        read = half.flash(query.half(), memory.half(), mask)
        memory[1, 2:] = 9.0  # padding
        assert read.isfinite().all() and torch.equal(read, half.flash(query.half(), memory.half(), mask))


def test_computing_activations_again_changes_no_gradient():
    model = small_hiera(PUBLISHED)
    image, text = torch.randn(1, 3, 64, 64), torch.randn(1, 5, 24)
    gradients = []
    for model.checkpoint_activations in (False, True):
        gradients.append(
            torch.autograd.grad(model(image, text)[-1].square().sum(), list(model.adapters()[0].parameters()))
        )
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_position_codes_do_not_depend_on_the_resolution():
    coarse, fine = sincos_2d(3, 5, 8, torch.zeros(1)), sincos_2d(9, 15, 8, torch.zeros(1))
    assert coarse.shape == (1, 3, 5, 8)
    torch.testing.assert_close(coarse, fine[:, 1::3, 1::3])  # the middles of 3 x 3 cells
    assert len(coarse.flatten(0, 2).unique(dim=0)) == 15
    with pytest.raises(ValueError, match="multiple of 4 channels, got 6"):
        sincos_2d(2, 2, 6, torch.zeros(1))
