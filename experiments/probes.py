"""What a trained model does with its BHFM: its scores with parts of the fusion changed by hand, after training.

    python -m experiments.probes --ckpt best.pt                  on the test split of the data set it was trained on
    python -m experiments.probes --ckpt best.pt --data RRSIS-D --split val

`experiments.ablate` trains models that never had a part, and so have found another way to do its work; here a model that has
all parts loses one, or is given the reading of another image. A change that costs nothing names something that the model
does not use. Printed, in Markdown: a line a change; and, of each block, over how much of the image the text spreads its
attention (the perplexity of its weights over the number of cells: 1 is the plain mean of the image).
"""

import argparse
from contextlib import ExitStack, contextmanager

from runtime.arguments import answer_early


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.probes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", default="best.pt", help="a checkpoint of train.py (default: best.pt)")
    parser.add_argument("--data", help="data set by name or path (default: the one the checkpoint was trained on)")
    parser.add_argument("--split", help="train, val or test (default: test, or val where there is none)")
    return parser


if __name__ == "__main__":
    answer_early(command_line())

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from evaluate import open_for, score, summarise_rows
from experiments.ablate import COLUMNS
from experiments.stand_ins import load
from fusion import BidirectionalAdapter, Bottleneck, CrossAttention, DecoderFusion, TextToVisionAdapter
from runtime.devices import default_workers, pick_device
from runtime.errors import exit_on_user_error
from weights.provenance import weights_line

# Hooks on an attention or an MLP's adapter: what it returns, (..., D), changed.


def nothing(module, args, output: Tensor) -> Tensor:
    """Zeros: nothing is added."""
    return torch.zeros_like(output)  # (..., D)


def same_everywhere(module, args, read: Tensor) -> Tensor:
    """What the cells (B, HW, h) read, averaged over them."""
    return read.mean(1, keepdim=True).expand_as(read)  # (B, HW, h)


# Hooks on what rewrites image or text, one of which stays as it came.


def embedding_unchanged(module, args, output: Tensor) -> Tensor:
    """The decoder's fusion: the embedding (B, C, H, W)."""
    return args[0]


def both_unchanged(module, args, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A fusion layer: image (B, H, W, D) and text (B, L, C)."""
    return args[0], args[1]


def text_unchanged(module, args, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A fusion layer: the text."""
    return output[0], args[1]


# Hooks before the attention of text (B, L, h) over vision (B, HW, h): what there is to read, changed.


def another_image(module, args) -> tuple:
    """The neighbour's in the batch."""
    query, vision, *rest = args
    return query, vision.roll(1, 0), *rest  # (B, L, h), (B, HW, h)


def average_image(module, args) -> tuple:
    """A single token, the mean of all."""
    query, vision, *rest = args
    return query, vision.mean(1, keepdim=True), *rest  # (B, L, h), (B, 1, h)


def modules_of(model: nn.Module, kind: type) -> list:
    """The adapters of a kind in the model's image encoder."""
    return [a for a in model.image_encoder.adapters() if isinstance(a, kind)]


def text_attentions(model: nn.Module) -> list[CrossAttention]:
    """The attention of text over vision of all blocks that have one."""
    return [a.text_reads_vision for a in modules_of(model, BidirectionalAdapter)]


def changes(model: nn.Module) -> dict[str, list[tuple[nn.Module, object]]]:
    """Name of a change -> the modules it concerns, each with a hook: `another_image` and `average_image` change what goes in,
    the others what comes out. Changes of what the model lacks are left out."""
    fused, from_vision = modules_of(model, TextToVisionAdapter), text_attentions(model)
    from_text = [a.vision_reads_text for a in fused]
    product = [m for m in [model.decoder_fusion] if isinstance(m, DecoderFusion)]
    found = {
        "no adapters": [(a, nothing) for a in modules_of(model, Bottleneck)] + [(a, both_unchanged) for a in fused],
        "no text in the image": [(m, nothing) for m in from_text],
        "the same text in every cell": [(m, same_everywhere) for m in from_text],
        "text not rewritten": [(a, text_unchanged) for a in modules_of(model, BidirectionalAdapter)],
        "text rewritten by another image": [(m, another_image) for m in from_vision],
        "text rewritten by the mean of the image": [(m, average_image) for m in from_vision],
        "no product before the decoder": [(m, embedding_unchanged) for m in product],
        "that product the same in every cell": [(m.attention, same_everywhere) for m in product],
    }
    return {name: hooks for name, hooks in found.items() if hooks}


@contextmanager
def hooked(hooks: list[tuple[nn.Module, object]]):
    """The modules with their hooks, taken off again at the end."""
    with ExitStack() as stack:
        for module, hook in hooks:
            before = hook in (another_image, average_image)
            add = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(add(hook).remove)
        yield


def spread(attention: CrossAttention, query: Tensor, memory: Tensor) -> Tensor:
    """Perplexity of each query's weights over the memory, as a share of its length, mean over the heads.

    query (B, Nq, dim), memory (B, Nk, dim) -> (B, Nq), 1/Nk where all weight lies on one token, 1 where it is even."""
    dim, heads = query.shape[-1], attention.num_heads
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    q = nn.functional.linear(query, weight[:dim], bias[:dim]).unflatten(-1, (heads, -1))  # (B, Nq, heads, dim/heads)
    k = nn.functional.linear(memory, weight[dim:-dim], bias[dim:-dim]).unflatten(-1, (heads, -1))  # (B, Nk, heads, ..)
    scores = torch.einsum("bqhc,bkhc->bhqk", q, k).float() * (dim // heads) ** -0.5  # (B, heads, Nq, Nk)
    entropy = torch.special.entr(scores.softmax(-1)).sum(-1)  # (B, heads, Nq)
    return (entropy.exp() / memory.shape[1]).mean(1)  # (B, Nq)


@contextmanager
def watched(model: nn.Module):
    """-> a list for each block that rewrites text: the mean `spread` of its real text tokens, a number a batch."""
    attentions = text_attentions(model)
    spreads, text_mask = {module: [] for module in attentions}, []

    def keep_mask(module, args):
        text_mask[:] = [args[2]]  # (B, L)

    def keep_spread(module, args, output):
        spreads[module].append(spread(module, *args[:2])[text_mask[0]].mean().item())

    with ExitStack() as stack:
        stack.callback(model.image_encoder.register_forward_pre_hook(keep_mask).remove)
        for module in attentions:
            stack.callback(module.register_forward_hook(keep_spread).remove)
        yield list(spreads.values())


def measure(model: nn.Module, dataset, workers: int = 0) -> str:
    """The table of all changes, and the line about attention."""
    # in a random order: neighbours in a batch are nearly always of different images
    dataset = Subset(dataset, np.random.default_rng(0).permutation(len(dataset)).tolist())

    def line(name: str) -> str:
        scores = summarise_rows(score(model, dataset, workers=workers, title=name), "ours")
        return f"| {name} | " + " | ".join(f"{scores[c]:.1f}" for c in COLUMNS) + " |"

    lines = ["| changed | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    with watched(model) as spreads:
        lines.append(line("nothing"))
    for name, hooks in changes(model).items():
        with hooked(hooks):
            lines.append(line(name))
    if spreads:
        means = ", ".join(f"{np.mean(values):.2f}" for values in spreads)
        lines += ["", f"The text spreads its attention, block by block, over this share of the image: {means}."]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    args = command_line().parse_args(arguments)
    model, checkpoint = load(args.ckpt, pick_device())
    data, dataset = open_for(model, checkpoint, args)
    print(weights_line(args.ckpt, checkpoint))
    print(f"{args.ckpt} on {data}, split {dataset.split}, {len(dataset)} phrases, per cent:\n")
    print(measure(model, dataset, default_workers()))


if __name__ == "__main__":
    with exit_on_user_error("probes"):
        main()
