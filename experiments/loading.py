"""What loading a sample costs: the decode, and the resizes to both models' sizes and of the mask, in milliseconds.

    python -m experiments.loading [--side 512 800 1024] [--quality 75 95] [--image-size 1024] [--data DATA]

JPEG files are generated scenes enlarged to each side, or with --data the images of a data set as they are. Medians, one
thread. The aim is that the two resizes of the image cost no more than 1.5 times its decode.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

from runtime.arguments import answer_early, at_least


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.loading", description=__doc__.split("\n\n")[0])
    add, count = parser.add_argument, at_least(int, 1)
    add("--side", type=count, nargs="+", default=[512, 800, 1024])
    add("--quality", type=count, nargs="+", default=[75, 95])
    add("--image-size", type=count, default=1024)
    add("--data", help="a data set, instead of generated files")
    return parser


if __name__ == "__main__":
    answer_early(command_line())

import cv2
import numpy as np
import torch

from annotations.layouts import read_samples
from imagery.pixels import read_image, resize_image, resize_mask
from runtime.errors import exit_on_user_error
from synthetic_scenes.scenes import scene

ENCODER_SIZE = 224


def milliseconds(function, inputs: list, repeats: int = 5) -> float:
    """Median time of one call over all inputs, several times."""
    times = []
    for item in itertools.chain.from_iterable([inputs] * repeats):
        start = time.perf_counter()
        function(item)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def row(name: str, paths: list, image_size: int) -> str:
    """A row of the table for these images."""
    images = [read_image(path) for path in paths]
    decode = milliseconds(read_image, paths)
    large, small = (milliseconds(lambda i, s=s: resize_image(i, s), images) for s in (image_size, ENCODER_SIZE))
    mask = milliseconds(lambda image: resize_mask(image[..., 0], image_size), images)
    return f"| {name} | {decode:.2f} | {large:.2f} | {small:.2f} | {mask:.2f} | {(large + small) / decode:.2f} |"


def write_scenes(root: Path, counts: dict[str, int], seed: int) -> None:
    """Generated scenes as a data set of 800 x 800 JPEG files, the size of RRSIS-D's, with one phrase each."""
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    lines = ["image,mask,phrase,split"]
    for split, i in ((split, i) for split, count in counts.items() for i in range(count)):
        s, name = scene(seed, split, i, 256), f"{split}{i}"
        j, _, phrase = s.phrases[0]
        cv2.imwrite(str(root / "images" / f"{name}.jpg"), cv2.resize(s.image[..., ::-1], (800, 800)))
        mask = 255 * s.objects[j].mask.astype(np.uint8)
        cv2.imwrite(str(root / "masks" / f"{name}.png"), cv2.resize(mask, (800, 800), interpolation=cv2.INTER_NEAREST))
        lines.append(f"{name}.jpg,{name}.png,{phrase},{split}")
    (root / "phrases.csv").write_text("\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> None:
    args = command_line().parse_args(arguments)
    torch.set_num_threads(1), cv2.setNumThreads(0)
    print(f"| images | decode | to {args.image_size} | to {ENCODER_SIZE} | mask | resizes / decode |\n" + "|---" * 6 + "|")
    if args.data:
        paths = sorted({sample.image for sample in read_samples(args.data)[2]})[:32]
        print(row(args.data, paths, args.image_size))
        return
    with tempfile.TemporaryDirectory() as folder:
        for side, quality in itertools.product(args.side, args.quality):
            paths = [Path(folder, f"{side}-{quality}-{i}.jpg") for i in range(8)]
            for i, path in enumerate(paths):
                image = cv2.resize(scene(0, "val", i, 256).image[..., ::-1], (side, side))
                cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, quality])
            print(row(f"{side} x {side}, quality {quality}", paths, args.image_size))


if __name__ == "__main__":
    with exit_on_user_error("loading"):
        main()
