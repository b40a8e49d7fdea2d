"""How each preset is trained: its recipe, parameter groups, learning rate over time, averaged weights."""

import math
from dataclasses import dataclass, replace

import torch

from model import RS2SAM2


@dataclass(frozen=True)
class Recipe:
    """How a preset is trained. An epoch is a pass over the training set, where `epoch_range` does not bound it."""

    epochs: int = 40
    epoch_range: tuple[int, float] = (1, math.inf)  # samples: several passes over a small set, a part of a large one
    samples: int = 0  # the budget in samples that takes the place of `epochs`: the same whatever the data set's size
    batch_size: int = 8
    lr: float = 1e-4  # of the fusion modules
    foundation_rate: float = 0.5  # share of lr for everything else that is trained
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    schedule: str = "cosine"  # with 5 % of warm-up; or 'constant': lr / 10 after 50 epochs, as published
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.999  # decay of the averaged weights; 0 keeps the weights themselves
    augment: str | None = "ours"
    ce: float = 1.0  # coefficients of the loss's terms
    dice: float = 0.1
    boundary: float = 0.2
    pseudo: float = 0.0  # the pseudo-mask's own
    soft_edges: bool = True  # in the boundary loss; or the published one's hard edges

    def without(self, parts: tuple[str, ...]) -> "Recipe":
        """The recipe less the loss terms among the parts that an ablation leaves out (model.PARTS)."""
        terms = {"cross-entropy": "ce", "dice": "dice", "boundary": "boundary", "pseudo": "pseudo"}
        zero = {name: 0.0 for part, name in terms.items() if part in parts}
        return replace(self, **zero, soft_edges="soft-edges" not in parts)


RECIPES = {
    "tiny": Recipe(
        samples=28_000, epoch_range=(280, 4000), batch_size=8, lr=1.4e-3, foundation_rate=1.0, betas=(0.9, 0.98),
        weight_decay=0.02, augment=None, dice=1.0, pseudo=5.0,
    ),
    "base": Recipe(),
    "large": Recipe(),
    "paper": Recipe(schedule="constant", clip=math.inf, ema=0.0, augment="paper"),
}  # fmt: skip


class Average:
    """Exponential moving average of the trained parameters: what is evaluated and saved as best.

    With decay 0 there is none, and the live parameters are."""

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


def parameter_groups(model: RS2SAM2, lr: float, foundation_rate: float) -> list[dict]:
    """Two groups for the optimiser: the paper's fusion modules at lr, everything else that is trained at its share."""
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    fusion = {id(p): p for m in model.fusion_modules() for p in m.parameters() if p.requires_grad}
    foundation = {i: p for i, p in trained.items() if i not in fusion}
    assert fusion.keys() <= trained.keys() and len(fusion) + len(foundation) == len(trained)
    groups = ((fusion, lr), (foundation, lr * foundation_rate))
    return [{"params": list(p.values()), "lr": rate, "peak": rate} for p, rate in groups]


def rate_factor(schedule: str, progress: float, epoch: int) -> float:
    """The learning rate as a share of its peak, after a share `progress` of all steps."""
    if schedule == "constant":
        return 1.0 if epoch < 50 else 0.1
    return min(progress / 0.05, 0.5 * (1 + math.cos(math.pi * (progress - 0.05) / 0.95)))
