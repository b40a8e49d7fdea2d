"""The training loss: cross-entropy + Dice + the text-guided boundary loss (+ an optional one on the pseudo-mask).

This file stands alone. `total_loss(output, target, {"cross_entropy": 1.0, "dice": 0.1, "boundary": 0.2})` is the paper's
loss; the names are those of TERMS.

Everything takes one logit z a pixel. The published model puts out two channels (1 - p, p), whose soft-max is
sigmoid(2p - 1); our z is that 2p - 1: the same probability, and z > 0 the same decision as arg-max.

Every term is computed per sample and averaged over the samples, so a batch of 8, 8 cards and 8 accumulated steps mean
the same; with one sample the values of cross-entropy and Dice are the published ones.
Letters: B batch, H W image height and width. z (B, H, W) float, target (B, H, W) of 0 and 1 -> (B,) unless stated.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CLASS_WEIGHTS = (0.9, 1.1)  # background, foreground; as published
EDGE_FLOOR = 1e-3  # keeps the best boundary weight finite when the edges agree exactly


def cross_entropy(z: Tensor, target: Tensor) -> Tensor:
    """Class-weighted cross-entropy, divided by the sum of the weights of the sample's pixels. (B,)"""
    background, foreground = CLASS_WEIGHTS
    target = target.to(z.dtype)  # (B, H, W)
    weight = background + (foreground - background) * target  # (B, H, W)
    pixel = F.binary_cross_entropy_with_logits(z, target, weight, reduction="none")  # (B, H, W)
    return pixel.sum((1, 2)) / weight.sum((1, 2))  # (B,)


def dice(z: Tensor, target: Tensor) -> Tensor:
    """Dice loss of background plus that of foreground, between 0 and 2. (B,)"""
    target = target.to(z.dtype)  # (B, H, W)
    loss = 0.0
    for p, y in ((torch.sigmoid(-z), 1 - target), (torch.sigmoid(z), target)):  # background, foreground
        overlap, total = (p * y).sum((1, 2)), (p + y).sum((1, 2))  # (B,), (B,)
        loss = loss + 1 - (2 * overlap + 1e-6) / (total + 1e-6)  # (B,)
    return loss


def edges(mask: Tensor) -> Tensor:
    """Edge strength |difference to the pixel above| + |difference to the pixel on the left|, nothing before the first row
    and column. (B, H, W) -> (B, H, W) in [0, 2] for a mask in [0, 1]."""
    vertical = F.pad((mask[:, 1:] - mask[:, :-1]).abs(), (0, 0, 1, 0))  # (B, H, W)
    horizontal = F.pad((mask[:, :, 1:] - mask[:, :, :-1]).abs(), (1, 0))  # (B, H, W)
    return vertical + horizontal  # (B, H, W)


def boundary(z: Tensor, target: Tensor, log_weight: Tensor) -> Tensor:
    """Text-guided boundary loss: the squared difference of edge maps, weighted by w = exp(log_weight) > 0, one a phrase.

    log_weight (B,) comes from the sentence token. With e the mean squared difference of the edges of sigmoid(z) and of
    the target, the loss is w^2 (e + EDGE_FLOOR) - log w: for fixed edges its minimiser w = 1/sqrt(2 (e + floor)) is
    finite and positive, and it tends to infinity as w tends to 0. The edges are those of the probability map, so the
    mask gets a gradient (the published ones are of the thresholded mask and pass none, see `published_boundary`).
    """
    error = (edges(torch.sigmoid(z)) - edges(target.to(z.dtype))).square().mean((1, 2))  # (B,)
    return torch.exp(2 * log_weight) * (error + EDGE_FLOOR) - log_weight  # (B,)


def published_boundary(z: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The boundary loss as released: mean (G(m) w - G(y) w)^2 with m = [p > 0], that is [z > -1].

    weight (B,), of any sign. No gradient reaches z; w alone is trained, towards 0.
    """
    difference = edges((z > -1).to(z.dtype)) - edges(target.to(z.dtype))  # (B, H, W)
    return (difference * weight[:, None, None]).square().mean((1, 2))  # (B,)


def pseudo_mask_loss(pseudo: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the pseudo-mask's logits (B, 1, g, g) against the share of foreground in each cell. (B,)"""
    share = F.interpolate(target[:, None].to(pseudo.dtype), pseudo.shape[-2:], mode="area")  # (B, 1, g, g)
    return F.binary_cross_entropy_with_logits(pseudo, share, reduction="none").mean((1, 2, 3))  # (B,)


# name -> term(z (B, H, W), target (B, H, W), output) -> (B,); output has `pseudo_mask` and `text_weight`, see model.Output.
TERMS = {
    "cross_entropy": lambda z, target, output: cross_entropy(z, target),
    "dice": lambda z, target, output: dice(z, target),
    "boundary": lambda z, target, output: boundary(z, target, output.text_weight.to(z.dtype)),
    "published_boundary": lambda z, target, output: published_boundary(z, target, output.text_weight.to(z.dtype)),
    "pseudo_mask": lambda z, target, output: pseudo_mask_loss(output.pseudo_mask.to(z.dtype), target),
}


def total_loss(output, target: Tensor, coefficients: dict[str, float]) -> dict[str, Tensor]:
    """The weighted sum over a batch and its weighted terms, each a scalar: {"loss", and every name of `coefficients`}.

    output: a `model.Output`; target (B, H, W) of 0 and 1; coefficients: of the TERMS to compute (the paper's are 1, 0.1 and
    0.2, its released code uses 0.9, 0.1 and 0.2). The logits (B, 1, h, w) are brought to the target's size (bilinear) and to
    float32 at least first.
    """
    logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))  # (B, 1, h, w)
    z = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=False)[:, 0]  # (B, H, W)
    terms = {name: c * TERMS[name](z, target, output).mean() for name, c in coefficients.items()}
    return {"loss": sum(terms.values()), **terms}
