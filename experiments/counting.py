"""Models without trained weights, and what can be counted of them without a device: FLOPs, bytes, the batch that fits.

    python -m experiments.counting            a Markdown table of all presets, in a few minutes

The model runs on fake tensors, which have shapes and no content, so any preset is counted on any machine in seconds.
"""

import argparse
import contextlib
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace

from runtime.arguments import answer_early

if __name__ == "__main__":
    answer_early(argparse.ArgumentParser(
        prog="python -m experiments.counting", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ))  # fmt: skip

import torch
from sam2.modeling.sam2_utils import LayerNorm2d
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fusion import CrossAttention
from losses import total_loss
from model import RS2SAM2, count_parameters
from presets import PRESETS, RECIPES
from weights.checkpoints import skip_initialisation

LENGTH = 32  # text tokens, as most phrases are padded to
CARDS = (8, 16, 24, 48, 80)  # GB
# Memory of a card that tensors can't have: the CUDA context and the kernels' workspaces; and the gaps between tensors, which
# torch's allocator leaves without and with checkpointed activations.
CONTEXT, GAPS = 0.8 * 2**30, {False: 1.03, True: 1.1}


def blank_model(name: str, image_size: int | None) -> RS2SAM2:
    """A preset whose parameters have no values yet."""
    with skip_initialisation():
        return RS2SAM2(replace(PRESETS[name], image_size=image_size or PRESETS[name].image_size))


def random_model(name: str, image_size: int | None, seed: int) -> RS2SAM2:
    """A preset with cheap random weights: uniform with variance 1 / fan-in; BEiT-3 gets `words_as_ids` for a tokeniser."""
    torch.manual_seed(seed)
    model = blank_model(name, image_size)
    for module in model.modules():
        for key, p in module.named_parameters(recurse=False):
            if p.dim() > 1:
                p.data.uniform_(-1, 1).mul_((3 / max(1, p[0].numel())) ** 0.5)
            else:
                p.data.fill_(key == "weight" and "Norm" in type(module).__name__)
    if model.union_encoder.tokenizer is None:
        model.union_encoder.tokenizer = words_as_ids
    return model


def words_as_ids(phrases: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L) ids that mean nothing, one a word, and lengths (B,): BEiT-3's tokeniser comes with its weights."""
    lengths = torch.tensor([min(len(p.split()), LENGTH - 2) + 2 for p in phrases])  # (B,)
    return torch.where(torch.arange(LENGTH) < lengths[:, None], 4, 3), lengths


def random_batch(model: RS2SAM2, size: int, device) -> tuple:
    """(image, encoder_image, ids, lengths, target) of a batch whose phrases have 8 to 16 tokens."""
    S, E = model.preset.image_size, model.union_encoder.image_size
    lengths = torch.arange(size, device=device) % 9 + 8  # (B,)
    ids = torch.where(torch.arange(LENGTH, device=device) < lengths[:, None], 4, 3)  # (B, L)
    target = torch.zeros(size, S, S, dtype=torch.uint8, device=device)
    target[:, S // 4 : S // 2, S // 4 : S // 2] = 1
    images = (torch.randn(size, 3, side, side, device=device) for side in (S, E))
    return *images, ids, lengths, target


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors made while it is on: `live` now, `peak` at most, with the workspace that CUDA's flash
    attention takes in its backward pass. Works on fake tensors too."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def forget(self, key: int, size: int) -> None:
        self.live -= size
        self.known.discard(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            key, size = storage._cdata, storage.nbytes()
            if key not in self.known:
                self.known.add(key)
                self.live += size
                weakref.finalize(storage, self.forget, key, size)
        workspace = 0
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            B, heads, queries, width = args[1].shape  # on a card, where the gradient of the queries is summed
            workspace = 4 * B * heads * round_up(queries, 128) * round_up(width, 32)
        self.peak = max(self.peak, self.live + workspace)
        return out


def as_on_a_card(model: RS2SAM2) -> None:
    """Let a model on a CPU compute what takes memory as CUDA does: norms in float32, attention of our own with padded heads."""
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, LayerNorm2d)):
            module.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))
        if isinstance(module, CrossAttention):
            module.forward = module.flash


@contextlib.contextmanager
def fake_model(name: str, image_size: int | None):
    """A preset on fake tensors, which have shapes and no content: to count FLOPs and bytes in seconds, on any machine."""
    model = blank_model(name, image_size)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for tensors in (t for module in model.modules() for t in (module._parameters, module._buffers)):
            tensors.update({key: mode.from_tensor(t) for key, t in tensors.items() if t is not None})
        yield model


def counter() -> FlopCounterMode:
    """torch's counter of FLOPs, with formulas for the CPU's kernel of attention, which torch has none for."""
    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: 4 * math.prod(q) * k[2],
        # four products where the forward pass has two; what the kernel computes a second time is not counted
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, q, k, *__, **___: 8 * math.prod(q) * k[2],
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def flops(name: str, image_size: int | None = None, backward: bool = True) -> dict[str, int]:
    """FLOPs of one image, a multiplication and an addition being two: {"forward"[, "train"]}."""
    counts = {}
    with fake_model(name, image_size) as model, counter() as count, torch.set_grad_enabled(backward):
        *inputs, target = random_batch(model, 1, "cpu")
        output = model(*inputs)
        counts["forward"] = count.get_total_flops()
        if backward:
            total_loss(output, target, RECIPES[name].losses)["loss"].backward()
            counts["train"] = count.get_total_flops()
    return counts


def training_memory(name: str, checkpointing: bool) -> tuple[float, float, float]:
    """Bytes of a training step in bfloat16 autocast, without compilation: (whatever the batch, for each image, at least).

    The first are weights, AdamW's two moments (Muon has but one, so `tiny` needs less), averaged weights and the weights'
    copies in bfloat16; the second the slope of the largest total of live tensors between 4 and 8 images. Gradients are whole
    only after the activations are gone, so they count for the least alone.
    """
    peaks = []
    with fake_model(name, None) as model:
        model.cast_frozen(torch.bfloat16)
        as_on_a_card(model)
        model.image_encoder.checkpoint_activations = checkpointing
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        trained = 4 * count_parameters(model)["trained"]
        for size in (4, 8):
            *inputs, target = random_batch(model, size, "cpu")
            model.zero_grad()
            with Live() as live:
                with torch.autocast("cpu", torch.bfloat16):
                    output = model(*inputs)
                total_loss(output, target, RECIPES[name].losses)["loss"].backward()
            peaks.append(live.peak)
            del output
    image = (peaks[1] - peaks[0]) / 4
    steady = weights + trained * (2 + (RECIPES[name].ema > 0))
    return steady + peaks[1] - 8 * image, image, steady + trained


def fitting_batch(card: int, checkpointing: bool, fixed: float, image: float, least: float) -> int:
    """The largest batch of a training step on a card of so many GB, by `training_memory`'s bytes; 0 where not one fits."""
    room = (card * 2**30 - CONTEXT) / GAPS[checkpointing]
    return max(0, math.floor((room - fixed) / image)) if room > least else 0


def memory_table() -> Iterator[str]:
    """The lines of a Markdown table, for every preset: FLOPs, and the batch that fits each card in training, computed."""
    heads = ["preset", "GFLOP forward", "GFLOP training", "checkpointing", "GiB fixed", "GiB an image"]
    heads += [f"batch, {card} GB" for card in CARDS]
    yield f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|"
    for name in PRESETS:
        work = flops(name)
        for checkpointing in (False, True):
            fixed, image, least = training_memory(name, checkpointing)
            batches = [fitting_batch(card, checkpointing, fixed, image, least) for card in CARDS]
            cells = [name, f"{work['forward'] / 1e9:,.1f}", f"{work['train'] / 1e9:,.1f}", "yes" if checkpointing else "no"]
            cells += [f"{fixed / 2**30:.2f}", f"{image / 2**30:.3f}", *(str(b or "-") for b in batches)]
            yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for line in memory_table():
        print(line, flush=True)
