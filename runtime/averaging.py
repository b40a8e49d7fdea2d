"""Averaged weights."""

import torch


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
