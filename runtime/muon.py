"""Muon, with the matrices of one shape in one batched product."""

from itertools import groupby

import torch
from timm.optim.muon import get_lr_scale, zeropower_via_newtonschulz
from torch import Tensor

# Of Newton and Schulz's iteration, step by step: timm's "quintic", https://leloykun.github.io/ponder/muon-opt-coeffs. A fifth
# step is not worth its time on a CPU.
COEFFICIENTS = [(4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046)]


class Muon(torch.optim.Optimizer):
    """What `timm.optim.Muon(groups, weight_decay=..., nesterov=True, ns_steps=4)` computes, by timm's own functions.

    timm takes one matrix after the other, 12 products each in bfloat16, which for the 149 small matrices of `tiny` is a quarter
    of a training step on a CPU, and most of it where the CPU has no bfloat16. Here matrices of one shape are stacked first, and
    on a CPU in float32, which for products this small is no slower. `groups` have `params`, matrices alone, and `lr`."""

    def __init__(self, groups: list[dict], weight_decay: float, momentum: float = 0.95):
        super().__init__(groups, {"weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = sorted((p for p in group["params"] if p.grad is not None), key=lambda p: p.shape)
            for _, alike in groupby(params, key=lambda p: p.shape):
                self.update(list(alike), **group)

    def update(self, matrices: list[Tensor], lr: float, weight_decay: float, momentum: float, **_) -> None:
        """One step for matrices of one shape, (out, in)."""
        grads, moments = [p.grad for p in matrices], [self.state[p]["momentum_buffer"] for p in matrices]
        torch._foreach_lerp_(moments, grads, 1 - momentum)
        updates = torch.stack(torch._foreach_lerp(grads, moments, momentum))  # (n, out, in), Nesterov's
        dtype = torch.bfloat16 if updates.is_cuda else torch.float32
        updates = zeropower_via_newtonschulz(updates, len(COEFFICIENTS), COEFFICIENTS, dtype=dtype)  # each orthogonal
        torch._foreach_mul_(matrices, 1 - lr * weight_decay)
        torch._foreach_add_(matrices, updates.to(matrices[0].dtype).unbind(), alpha=-lr * get_lr_scale(updates.shape))
