"""The loss terms on values computed by hand, and the properties that the published boundary loss lacks."""

import math

import pytest
import torch

import losses
from model import Output


def blob(size=12):
    target = torch.zeros(1, size, size)
    target[:, 3:8, 4:9] = 1
    return target


def test_cross_entropy_by_hand():
    z = torch.tensor([[[2.0, -1.0], [0.5, 0.0]]])
    target = torch.tensor([[[1, 0], [0, 1]]])
    background = 0.9 * (math.log1p(math.exp(-1)) + math.log1p(math.exp(0.5)))
    foreground = 1.1 * (math.log1p(math.exp(-2)) + math.log(2))
    assert losses.cross_entropy(z, target).item() == pytest.approx((background + foreground) / 4.0, rel=1e-6)


def test_dice_by_hand():
    z, target = torch.zeros(1, 2, 2), torch.tensor([[[1, 0], [0, 0]]])
    foreground = 1 - (2 * 0.5 + 1e-6) / (2 + 1 + 1e-6)
    background = 1 - (2 * 1.5 + 1e-6) / (2 + 3 + 1e-6)
    assert losses.dice(z, target).item() == pytest.approx(foreground + background, rel=1e-6)
    assert losses.dice(torch.where(target > 0, 50.0, -50.0), target).item() == pytest.approx(0, abs=1e-6)


def test_edges_by_hand():
    mask = torch.tensor([[[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]]])
    assert losses.edges(mask).tolist() == [[[0, 1, 0], [0, 1, 2]]]


def test_published_boundary_by_hand():
    """Edges of [z > -1]: [0 1 0; 0 1 2] against the target's [0 1 0; 0 0 1], times 3: (3^2 + 3^2) / 6."""
    z = torch.tensor([[[-1.5, 0.0, -0.9], [-2.0, 5.0, -1.0]]])
    target = torch.tensor([[[0, 1, 1], [1, 1, 0]]])
    assert losses.edges(target.float()).tolist() == [[[0, 1, 0], [1, 0, 2]]]
    assert losses.published_boundary(z, target, torch.tensor([3.0])).item() == pytest.approx((9 + 9) / 6)


def test_pseudo_mask_by_hand():
    """A cell whose share of foreground is 1/4 against the logit 0, one without any against the logit -2."""
    target = torch.tensor([[[1, 0, 0, 0], [0, 0, 0, 0]]])
    pseudo = torch.tensor([[[[0.0, -2.0]]]])
    expected = (math.log(2) + math.log1p(math.exp(-2))) / 2
    assert losses.pseudo_mask_loss(pseudo, target).item() == pytest.approx(expected, rel=1e-6)


def test_boundary_moves_the_mask_where_the_published_one_does_not():
    target = blob()
    z = torch.randn(1, 12, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.zeros(1, requires_grad=True)
    grad_z, grad_w = torch.autograd.grad(losses.boundary(z, target, weight).sum(), (z, weight))
    assert grad_z.abs().max() > 0 and grad_w.abs().max() > 0
    published = losses.published_boundary(z, target, weight).sum()
    assert torch.autograd.grad(published, z, allow_unused=True)[0] is None


@pytest.mark.parametrize("exact", [False, True])
def test_the_text_weight_has_a_finite_positive_minimiser(exact):
    target = blob()
    z = torch.where(target > 0, 60.0, -60.0) if exact else torch.randn(1, 12, 12)
    error = (losses.edges(torch.sigmoid(z)) - losses.edges(target)).square().mean().item()
    best = -0.5 * math.log(2 * (error + losses.EDGE_FLOOR))  # logarithm of w* = 1 / sqrt(2 (e + floor))

    def value(log_weight):
        return losses.boundary(z, target, torch.tensor([log_weight])).item()

    assert math.isfinite(best)
    assert value(best) < value(best - 0.1) and value(best) < value(best + 0.1)
    assert value(-1e4) > 9e3  # w -> 0: to infinity
    assert value(20.0) > value(best)  # w -> infinity too


def test_samples_do_not_mix():
    generator = torch.Generator().manual_seed(1)
    z, weight = torch.randn(3, 12, 12, generator=generator), torch.randn(3, generator=generator)
    target = (torch.rand(3, 12, 12, generator=generator) > 0.7).long()
    for term in (losses.boundary, losses.published_boundary):
        alone = [term(z[i : i + 1], target[i : i + 1], weight[i : i + 1]) for i in range(3)]
        torch.testing.assert_close(term(z, target, weight), torch.cat(alone))


def random_output(samples: int) -> Output:
    generator = torch.Generator().manual_seed(2)
    shapes = ((samples, 1, 8, 8), (samples, 1, 4, 4), (samples,))
    return Output(*(torch.randn(shape, generator=generator) for shape in shapes))


def test_total_is_the_mean_over_samples_so_batches_may_be_split():
    output, target = random_output(4), (torch.rand(4, 32, 32) > 0.6).to(torch.uint8)
    coefficients = dict.fromkeys(losses.TERMS, 0.5)
    whole = losses.total_loss(output, target, coefficients)
    first, second = (
        losses.total_loss(Output(*(t[s] for t in output)), target[s], coefficients) for s in (slice(2), slice(2, 4))
    )
    assert whole.keys() == {"loss", *losses.TERMS}
    for name in whole:
        torch.testing.assert_close(whole[name], (first[name] + second[name]) / 2)


def test_the_total_holds_the_terms_that_are_named_and_no_other():
    output, target = random_output(2), torch.ones(2, 32, 32)
    both = losses.total_loss(output, target, {"dice": 0.5, "boundary": 2.0})
    assert list(both) == ["loss", "dice", "boundary"]
    torch.testing.assert_close(both["loss"], both["dice"] + both["boundary"])
    torch.testing.assert_close(2 * both["dice"], losses.total_loss(output, target, {"dice": 1.0})["loss"])


@pytest.mark.parametrize("value", [0, 1])
def test_empty_and_full_targets_are_finite(value):
    output = Output(torch.randn(1, 1, 8, 8).requires_grad_(), torch.randn(1, 1, 4, 4), torch.zeros(1))
    loss = losses.total_loss(output, torch.full((1, 32, 32), value), dict.fromkeys(losses.TERMS, 1.0))["loss"]
    (grad,) = torch.autograd.grad(loss, output.logits)
    assert torch.isfinite(loss) and torch.isfinite(grad).all()
