"""How each preset is trained: its recipe and the command line that changes it, the optimiser and its parameter groups,
learning rate over time, averaged weights."""

import argparse
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fusion import CrossAttention
from model import PARTS, PRESETS, RS2SAM2, check_parts
from runs import number


@dataclass(frozen=True)
class Recipe:
    """How a preset is trained. An epoch is a pass over the training set, where `epoch_range` does not bound it."""

    epochs: int = 40
    epoch_range: tuple[int, float] = (1, math.inf)  # samples: several passes over a small set, a part of a large one
    samples: int = 0  # the budget in samples that takes the place of `epochs`: the same whatever the data set's size
    batch_size: int = 8
    lr: float = 1e-4  # of the fusion modules (times `muon` for their matrices, where that is set)
    foundation_rate: float = 0.5  # share of lr for everything else that is trained
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    muon: float = 0.0  # Muon's learning rate for the matrices, as a multiple of the group's; 0: AdamW for these too
    schedule: str = "cosine"  # with 5 % of warm-up; or 'constant': lr / 10 after 50 epochs, as published
    clip: float = 1.0  # largest gradient norm
    cpu_processes: int = 1  # at most, where there is no card: many small operations gain more from these than from threads
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
        samples=24_000, epoch_range=(280, 4000), batch_size=8, cpu_processes=4, lr=1.4e-3, foundation_rate=1.0,
        betas=(0.9, 0.98), weight_decay=0.02, muon=2.0, augment=None, dice=1.0, pseudo=5.0,
        boundary=1.0,  # measured: at the paper's 0.2 the term is worth less than another seed
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


def matrices(model: nn.Module) -> set[int]:
    """The ids of the weights that map a token's features to others: of linear layers and attention, convolutions and tables
    left out."""
    found = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    found += [m.in_proj_weight for m in model.modules() if isinstance(m, (nn.MultiheadAttention, CrossAttention))]
    return {id(p) for p in found if min(p.shape) > 1}


def parameter_groups(model: RS2SAM2, lr: float, foundation_rate: float, muon: float = 0.0) -> list[dict]:
    """Groups for the optimiser: the paper's fusion modules at lr, everything else that is trained at its share; with Muon,
    the matrices of both after these, at `muon` times their rates."""
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    fusion = {id(p): p for m in model.fusion_modules() for p in m.parameters() if p.requires_grad}
    foundation = {i: p for i, p in trained.items() if i not in fusion}
    assert fusion.keys() <= trained.keys() and len(fusion) + len(foundation) == len(trained)
    groups, for_muon = [], matrices(model) if muon else set()
    for chosen, times in ((False, 1.0), (True, muon)) if muon else ((False, 1.0),):
        for part, rate in ((fusion, lr), (foundation, lr * foundation_rate)):
            params = [p for i, p in part.items() if (i in for_muon) == chosen]
            groups.append({"params": params, "lr": rate * times, "peak": rate * times, "muon": chosen})
    return groups


def optimizer_for(model: RS2SAM2, recipe: Recipe, lr: float) -> torch.optim.Optimizer:
    """AdamW over the parameter groups, or Muon where the recipe says so."""
    groups = parameter_groups(model, lr, recipe.foundation_rate, recipe.muon)
    kind = Muon if recipe.muon else torch.optim.AdamW
    return kind(groups, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True)


def rate_factor(schedule: str, progress: float, epoch: int) -> float:
    """The learning rate as a share of its peak, after a share `progress` of all steps."""
    if schedule == "constant":
        return 1.0 if epoch < 50 else 0.1
    return min(progress / 0.05, 0.5 * (1 + math.cos(math.pi * (progress - 0.05) / 0.95)))


def set_rates(optimizer: torch.optim.Optimizer, schedule: str, progress: float, epoch: int) -> None:
    """Give every group its rate for the next step; never quite zero, so that the first step and the last do something."""
    factor = max(rate_factor(schedule, progress, epoch), 1e-3)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def part_names(text: str) -> tuple[str, ...]:
    """The names of --without."""
    try:
        return tuple(sorted(check_parts(text.split(","))))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def command_line(description: str) -> argparse.ArgumentParser:
    """The flags of train.py."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    integer = partial(partial, number, int)
    # fmt: off
    add("--data", default="scenes",
        help="data set: scenes (generated, the default), RRSIS-D, RefSegRS, RISBench, or a path")
    add("--model", choices=PRESETS, help="preset (default: tiny on generated scenes, large on real data)")
    add("--out", type=Path, metavar="DIR", help="folder of the run (default: runs/<data>-<model>-<number>)")
    add("--epochs", type=integer(1), help="default: the preset's recipe")
    add("--batch-size", type=integer(1),
        help="samples of an optimiser step, over all cards and --accumulate parts (default: the preset's recipe)")
    add("--accumulate", type=integer(1), default=1, metavar="N",
        help="compute each step in N parts, which needs less memory and gives the same result (default: 1)")
    add("--checkpoint-activations", action=argparse.BooleanOptionalAction, default=False,
        help="compute activations of the image encoder again in the backward pass: less memory, slower")
    add("--lr", type=partial(number, float, 1e-12),
        help="peak learning rate of the fusion modules (default: the preset's recipe)")
    add("--image-size", type=integer(1), help="side of SAM 2's input, a multiple of 32 (default: the preset's)")
    add("--seed", type=integer(0), default=0, help="of initial weights, data order and augmentation (default: 0)")
    add("--gpus", type=integer(0), metavar="N",
        help="cards of this machine, a process on each; 0: the CPU (default: 1 if there is a CUDA card, else 0); "
        "under torchrun, which starts the processes itself, only 0 makes a difference")
    add("--workers", type=integer(0), help="processes that load data, for each card (default: by the cores)")
    add("--resume", type=Path, metavar="RUN",
        help="go on with the run in this folder, with its own flags; epochs, lr, batch size, cards may be new")
    add("--init", metavar="CKPT", help="fine-tune from a checkpoint: of train.py, or the published one")
    add("--skip-missing", action="store_true", help="leave out samples whose image or mask file is missing")
    add("--from-scratch", action="store_true", help="start from random weights, all trained (tiny does without --sam2)")
    add("--sam2", metavar="FILE",
        help="SAM 2 weights of the preset's size, whose image encoder stays frozen (default: downloaded; tiny trains its own)")
    add("--encoder", metavar="NAME", help="another open_clip model as union encoder, e.g. ViT-B-32 (base, large)")
    add("--encoder-weights", metavar="TAG|FILE|TAG=FILE",
        help="its weights: a pretrained tag of open_clip, a file, or TAG=FILE, the file of a tag; BEiT-3's file")
    add("--encoder-size", type=integer(1), help="side of its images, not for paper (default: its own)")
    add("--without", type=part_names, default=(), metavar="PARTS",
        help="leave parts out, for an ablation; names with commas between: "
        + "; ".join(f"{name} ({what})" for name, what in PARTS.items()))
    # fmt: on
    return parser
