"""The optimisers: AdamW, and Muon with the matrices of one shape in one batched product."""

from itertools import groupby

import torch
from timm.optim.muon import get_lr_scale, zeropower_via_newtonschulz
from torch import Tensor, nn

from runtime.recording import Recorded

# Of Newton and Schulz's iteration, step by step: timm's "quintic", https://leloykun.github.io/ponder/muon-opt-coeffs. A fifth
# step is not worth its time on a CPU.
COEFFICIENTS = [(4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046)]


class Muon(torch.optim.Optimizer):
    """What `timm.optim.Muon(groups, weight_decay=..., nesterov=True, ns_steps=4)` computes, by timm's own functions.

    timm takes one matrix after the other, 12 products each in bfloat16, which for the 149 small matrices of `tiny` is a quarter
    of a training step on a CPU, and most of it where the CPU has no bfloat16. Here matrices of one shape are stacked first, and
    on a CPU in float32, which for products this small is no slower; on a card the products are recorded as one CUDA graph.
    `groups` have `params`, matrices alone, and `lr`."""

    def __init__(self, groups: list[dict], weight_decay: float, momentum: float = 0.95):
        super().__init__(groups, {"weight_decay": weight_decay, "momentum": momentum})
        params = [p for group in self.param_groups for p in group["params"]]
        for p in params:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        self.recorded = Recorded(self.directions, enabled=any(p.is_cuda for p in params))

    def stacks(self) -> list[tuple[dict, list[Tensor]]]:
        """The matrices with a gradient, those of one group and shape together."""
        found = []
        for group in self.param_groups:
            params = sorted((p for p in group["params"] if p.grad is not None), key=lambda p: p.shape)
            found += [(group, list(alike)) for _, alike in groupby(params, key=lambda p: p.shape)]
        return found

    def directions(self, *grads: Tensor) -> dict[str, Tensor]:
        """Of the gradients of all matrices, in the order of `stacks`: orthogonal updates (n, out, in) for each stack."""
        rest, found = list(grads), {}
        for n, (group, matrices) in enumerate(self.stacks()):
            grads, rest = rest[: len(matrices)], rest[len(matrices) :]
            moments = [self.state[p]["momentum_buffer"] for p in matrices]
            torch._foreach_lerp_(moments, grads, 1 - group["momentum"])
            updates = torch.stack(torch._foreach_lerp(grads, moments, group["momentum"]))  # (n, out, in), Nesterov's
            dtype = torch.bfloat16 if updates.is_cuda else torch.float32
            found[str(n)] = zeropower_via_newtonschulz(updates, len(COEFFICIENTS), COEFFICIENTS, dtype=dtype)
        return found

    @torch.no_grad()
    def step(self) -> None:
        stacks = self.stacks()
        directions = self.recorded(*(p.grad for _, matrices in stacks for p in matrices))
        for (group, matrices), updates in zip(stacks, directions.values(), strict=True):
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            scale = -group["lr"] * get_lr_scale(updates.shape)
            torch._foreach_add_(matrices, updates.to(matrices[0].dtype).unbind(), alpha=scale)

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.recorded.forget()  # which holds the moments that were here before


def parameter_groups(model: nn.Module, recipe) -> list[dict]:
    """The optimiser's groups for an RS2SAM2 and a presets.Recipe: the paper's fusion modules at lr, everything else that is
    trained at its share of it. With Muon the matrices of both (weights of linear layers and attention) follow in groups of
    their own, at `muon` times the rates."""
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    fusion = {id(p): p for m in model.fusion_modules() for p in m.parameters() if p.requires_grad}
    foundation = {i: p for i, p in trained.items() if i not in fusion}
    assert fusion.keys() <= trained.keys() and len(fusion) + len(foundation) == len(trained)
    found = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    found += [m.in_proj_weight for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    matrices = {id(p) for p in found if recipe.muon and min(p.shape) > 1}
    groups = []
    for muon, times in ((False, 1.0), (True, recipe.muon))[: 1 + bool(recipe.muon)]:
        for part, lr in ((fusion, recipe.lr * times), (foundation, recipe.lr * recipe.foundation_rate * times)):
            params = [p for i, p in part.items() if (i in matrices) == muon]
            groups.append({"params": params, "lr": lr, "peak": lr, "use_muon": muon})
    return groups


def optimizers_for(model: nn.Module, recipe) -> list[torch.optim.Optimizer]:
    """AdamW, and with Muon a second one for the matrices."""
    groups = parameter_groups(model, recipe)
    adamw = torch.optim.AdamW(groups[:2], betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True)
    return [adamw, Muon(groups[2:], recipe.weight_decay)] if recipe.muon else [adamw]
