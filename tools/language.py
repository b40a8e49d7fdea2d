"""Is it language that does it? Score a checkpoint on a split as it is and with the phrases shuffled between images.

    python tools/language.py --ckpt best.pt [--data DATA] [--split val] [--seed 0]

A model that reads the phrase fails on a wrong one; one that picks the most striking object scores the same.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoints import CheckpointError, load_checkpoint  # noqa: E402
from data import open_dataset  # noqa: E402
from evaluate import score, summarise_rows, table  # noqa: E402
from layouts import DataError  # noqa: E402


class Shuffled(torch.utils.data.Dataset):
    """A data set in which every sample gets the phrase of a sample of another image."""

    def __init__(self, dataset, seed: int):
        self.dataset = dataset
        by_image = {}
        for index, (i, _) in enumerate(dataset.items):
            by_image.setdefault(dataset.samples[i].image, []).append(index)
        groups = [by_image[image] for image in np.random.default_rng(seed).permutation(list(by_image))]
        order = [index for group in groups for index in group]
        step = max(map(len, groups))  # far enough along the shuffled images to be in another one
        donors = dict(zip(order, order[step:] + order[:step]))
        self.donors = [dataset.items[donors[index]] for index in range(len(dataset))]  # (sample, phrase) numbers

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        sample, phrase = self.donors[index]
        return self.dataset[index] | {"phrase": self.dataset.samples[sample].phrases[phrase]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ckpt", default="best.pt")
    parser.add_argument("--data", help="default: what the checkpoint was trained on")
    parser.add_argument("--split", default="val")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle")
    args = parser.parse_args()
    try:
        model, checkpoint = load_checkpoint(args.ckpt, "cuda" if torch.cuda.is_available() else "cpu")
        sizes = {"image_size": model.preset.image_size, "encoder_size": model.union_encoder.image_size}
        dataset = open_dataset(args.data or checkpoint["data"], args.split, **sizes)
        sets = {"phrases as they are": dataset, "phrases shuffled": Shuffled(dataset, args.seed)}
        rows = {name: summarise_rows(score(model, data, title=name), "ours") for name, data in sets.items()}
    except (DataError, CheckpointError) as error:
        print(f"language.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(table(rows))


if __name__ == "__main__":
    main()
