"""Averaged weights, and Muon for the matrices of a model that is trained from scratch."""

import torch
from torch import Tensor, nn


class AveragedWeights:
    """Exponential moving average of the trained parameters: what is evaluated and saved as best.

    With decay 0 there is no average: the parameters themselves are evaluated and saved."""

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        self.live = {k: p for k, p in model.named_parameters() if p.requires_grad} if decay else {}
        self.mean = {k: p.detach().clone() for k, p in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, self.steps / (10 + self.steps))  # the first steps are soon forgotten
        if self.live:
            torch._foreach_lerp_(list(self.mean.values()), list(self.live.values()), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averaged and live weights; call it again to get them back."""
        for k, p in self.live.items():
            p.data, self.mean[k] = self.mean[k], p.data

    def state_dict(self) -> dict:
        return {"mean": self.mean, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]
        for k, v in state["mean"].items():
            self.mean[k].copy_(v)


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices with orthonormal rows or columns, nearly: U V^T of U S V^T. (N, r, c) -> (N, r, c).

    Five Newton-Schulz steps, with the coefficients of Jordan et al. ("Muon", 2024), bring all singular values that are not
    tiny into 0.7 to 1.2."""
    x = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT  # (N, r, c) with r <= c
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)  # (N, r, c)
    one = 3.4445 * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)  # (r, r)
    gram, total = torch.bmm(x, x.mT), None  # (N, r, r), all steps' factors multiplied: r x r products are the cheapest way
    for last in (False,) * 4 + (True,):
        factor = one + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)  # (N, r, r)
        total = factor if total is None else torch.bmm(factor, total)  # (N, r, r)
        gram = None if last else torch.bmm(torch.bmm(factor, gram), factor)  # (N, r, r)
    x = torch.bmm(total, x)  # (N, r, c)
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT  # (N, r, c)


class Muon(torch.optim.AdamW):
    """AdamW, but the matrices of groups with `muon` set follow Jordan et al.'s Muon: momentum, made orthogonal.

    Every direction of a matrix so moves at the same pace, not the few alone that gradients are large in. The update is scaled
    to the size that AdamW's has, sqrt(rows or columns, the larger) / 5 (Liu et al., "Muon is scalable", 2025), so
    learning rate and weight decay mean the same. Matrices of a shape are worked on in one stack and in their own
    precision; torch's own Muon, there from 2.9 on, takes one matrix after the other and bfloat16, both slow on a CPU."""

    def __init__(self, groups: list[dict], momentum: float = 0.95, **adamw):
        super().__init__(groups, **adamw)
        self.momentum = momentum
        self._step_supports_amp_scaling = False  # a GradScaler leaves out the whole step where a gradient has overflowed

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            stacks = {}
            for p in group["params"] if group["muon"] else ():
                if p.grad is not None:
                    stacks.setdefault(p.shape, []).append(p)
            for stack in stacks.values():
                self.step_matrices(stack, group["lr"], group["weight_decay"])
                for p in stack:
                    p.grad = None  # AdamW leaves it alone
        super().step()

    def step_matrices(self, stack: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        """A step for matrices of one shape."""
        gradients = [p.grad for p in stack]
        for p in stack:
            if not self.state[p]:  # "step": without it AdamW does not load a state
                self.state[p] |= {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
        means = [self.state[p]["momentum"] for p in stack]
        torch._foreach_lerp_(means, gradients, 1 - self.momentum)
        updates = torch._foreach_lerp(gradients, means, self.momentum)  # Nesterov's
        size = 0.2 * max(stack[0].shape) ** 0.5
        torch._foreach_mul_(stack, 1 - lr * weight_decay)
        torch._foreach_add_(stack, list(orthogonal(torch.stack(updates))), alpha=-lr * size)
