"""How long a large scene takes, and how much memory: one is written, and predict.py run on it.

    python -m experiments.large_scene --ckpt best.pt [--side 20000] [--tile 1024] [--tiling scene] [--index 0]

The scene is a generated one enlarged to side x side pixels, with noise, as a georeferenced GeoTIFF with a corner of nodata,
written block by block into a temporary folder (3 bytes a pixel at most; --out keeps it). The phrase is the generated
scene's first; what it names is known, so the mask's IoU is printed too.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from runtime.arguments import answer_early, at_least


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.large_scene", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ckpt", default="best.pt")
    add("--side", type=at_least(int, 1), default=20_000)
    add("--tile", type=at_least(int, 1), default=1024)
    add("--tiling", default="scene")
    add("--index", type=at_least(int, 0), default=0, help="which of the generated test scenes")
    add("--out", type=Path, help="keep the scene and the results here")
    return parser


if __name__ == "__main__":
    answer_early(command_line())

import cv2
import numpy as np
import rasterio
from rasterio.transform import from_origin

from evaluate import iou_counts, sample_iou
from synthetic_scenes.scenes import scene

PREDICT = Path(__file__).resolve().parent.parent / "predict.py"
BLOCK = 512


def write_scene(path: Path, image: np.ndarray, side: int) -> None:
    """image uint8 (h, h, 3), enlarged to side x side pixels of 0.3 m in UTM zone 33; the lower right corner is nodata."""
    options = {
        "driver": "GTiff", "height": side, "width": side, "count": 3, "dtype": "uint8", "nodata": 0, "tiled": True,
        "blockxsize": BLOCK, "blockysize": BLOCK, "compress": "deflate", "crs": "EPSG:32633", "BIGTIFF": "IF_SAFER",
        "transform": from_origin(500_000, 5_800_000, 0.3, 0.3),
    }  # fmt: skip
    rng, scale = np.random.default_rng(0), image.shape[0] / side
    with rasterio.open(path, "w", **options) as file:
        for top in range(0, side, BLOCK):
            for left in range(0, side, BLOCK):
                height, width = min(BLOCK, side - top), min(BLOCK, side - left)
                # From a block's pixel to the small image's: a centre is half a pixel in.
                affine = np.float32([[scale, 0, (left + 0.5) * scale - 0.5], [0, scale, (top + 0.5) * scale - 0.5]])
                flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
                block = cv2.warpAffine(image, affine, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
                block = np.clip(block + rng.integers(-4, 5, block.shape), 1, 255).astype(np.uint8)
                corner = np.add.outer(np.arange(top, top + height), np.arange(left, left + width)) > 1.9 * side
                block[corner] = 0
                file.write(block.transpose(2, 0, 1), window=((top, top + height), (left, left + width)))


def main(arguments: list[str] | None = None) -> None:
    args = command_line().parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        small, path = scene(0, "test", args.index, 256), out / f"scene-{args.index}-{args.side}.tif"
        target, phrase, _ = small.phrases[0]
        start = time.time()
        if not path.exists():
            write_scene(path, small.image, args.side)
        print(f"{path}: {path.stat().st_size / 1e6:,.0f} MB, written in {time.time() - start:.0f} s", flush=True)
        command = [sys.executable, PREDICT, "--ckpt", args.ckpt, "--image", path, "--phrase", phrase, "--out", out]
        command += ["--tile", args.tile, "--tiling", args.tiling, "--overwrite"]
        start = time.time()
        subprocess.run(list(map(str, command)), check=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        print(f"{args.tiling}, tiles of {args.tile}: {time.time() - start:.0f} s, peak memory {peak:,.0f} MiB")
        result = json.loads((out / "results.jsonl").read_text().splitlines()[-1])
        with rasterio.open(out / result["mask"]) as file:
            mask = file.read(1, out_shape=(1024, 1024)) == 255
        truth = cv2.resize(small.objects[target].mask.astype(np.uint8), (1024, 1024)) > 0
        print(f"IoU with what the phrase names: {100 * sample_iou(*iou_counts(mask, truth), 'ours'):.1f} %")


if __name__ == "__main__":
    main()
