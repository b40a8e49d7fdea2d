"""From an image and a phrase to a mask, at any size.

    predictor = RS2SAM2Predictor.from_pretrained("best.pt")
    mask, score, logits = predictor.predict("plane.jpg", "the airplane on the right")

    python predict.py --ckpt best.pt --image plane.jpg --phrase "the airplane on the right"
    python predict.py --ckpt best.pt --image harbour.tif --phrase "the ships" --tiling independent --tile 512
    python predict.py --ckpt best.pt --image list.csv                     columns image,phrase
    torchrun --nproc-per-node 8 predict.py --ckpt best.pt --image list.csv    on 8 cards, a share of the images on each

Into the folder --out go, for phrase n of an image, all or none of:

    <image's stem>-<n>-<phrase>.png           the mask, 0 and 255, as large as the image; for a GeoTIFF, or an image too
                                              large to be decoded whole, a .tif with the same georeferencing
    <image's stem>-<n>-<phrase>-overlay.png   the image with the mask lit and the phrase below, at most 1,600 pixels a side
    <image's stem>-<n>-<phrase>.geojson       for a GeoTIFF, the mask's polygons in WGS 84 with image, phrase, model, weights,
                                              date, and confidence and area_m2 of each
    <image's stem>-<n>-<phrase>-probabilities.tif   with --probabilities
    results.jsonl                             a line for each result is added; a later line for the same mask replaces it

Where two images of a run share a stem, eight digits of a digest of their path follow it. In results.jsonl: area_share
is the mask's share of the image (of its pixels with data), bbox its [left, top, width, height] in pixels or null,
confidence the mean probability inside it, 0 where it is empty. Exit code: 0 all done, 1 some failed, 2 wrong usage.
"""

import argparse
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from runtime.arguments import DTYPES, answer_early, at_least, band_numbers, share


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", type=Path, default="best.pt", help="a checkpoint of train.py (default: best.pt)")
    add("--image", type=Path, nargs="+", required=True, help="images, folders of images, CSV files (image,phrase)")
    add("--phrase", action="append", default=[], help="what to find; may be given several times")
    add("--out", type=Path, default="predictions", help="folder for the results (default: predictions)")
    add("--overwrite", action="store_true", help="make results anew that exist; without it they are left alone")
    add("--tile", type=at_least(int, 32), metavar="N", help="cut images over N pixels a side into tiles of N; "
        "without it, those over 2,048 into tiles of 1,024")  # fmt: skip
    add("--tiling", choices=("scene", "independent"), default="scene",
        help="what phrases are about: the whole scene or each tile")  # fmt: skip
    add("--bands", type=band_numbers, metavar="R,G,B", help="bands to look at, from 1 (default: those named red, "
        "green and blue, else the first three)")  # fmt: skip
    add("--batch", type=at_least(int, 1), default=8, help="images or tiles at once (default: 8)")
    add("--threshold", type=share, default=0.5, metavar="P", help="the mask is where the probability is above P (default: 0.5)")
    add("--min-area", type=at_least(int, 0), default=0, metavar="PIXELS", help="leave out connected parts that are smaller")
    add("--probabilities", action="store_true", help="write the probability of each pixel too, a TIFF of float32")
    add("--device", help="cpu, cuda, cuda:1 ... (default: the CUDA card where there is one, else the CPU)")
    add("--dtype", choices=DTYPES, default="auto", help="what to compute in (default: bfloat16 where that is fast, "
        "else float32)")  # fmt: skip
    return parser


if __name__ == "__main__":
    answer_early(command_line())

import numpy as np
import torch
from PIL import Image

from annotations.jobs import find_jobs
from annotations.samples import clean_phrase
from imagery.foreground import foreground, mask_score_logits
from imagery.foreground import probabilities as probability
from imagery.pixels import resize_image
from imagery.plain import Scene, quiet
from imagery.results import Job, ResultFolder, readable
from imagery.scenes import as_scene, open_scene
from imagery.tiles import TILE, TILINGS, Rows, ahead, batches, coarseness_note, is_large, scene_rows
from model import RS2SAM2, Output
from runtime.devices import autocast, card_failures, choose_threads, chosen_dtype, pick_device, usable_device
from runtime.errors import UserError, exit_on_user_error
from runtime.processes import gather, process_group, rank, rank_0_first, world_size
from runtime.progress import Progress
from weights.checkpoints import load_checkpoint, model_entries
from weights.provenance import in_words, origin_note, provenance, unknown_words_note, weights_line
from weights.saved import save_folder

OneImage = str | Path | Image.Image | np.ndarray | torch.Tensor


class RS2SAM2Predictor:
    """Predicts the mask of what a phrase names in an image.

    Unlike SAM 2's predictor it has no `set_image`: the phrase enters every block of the image encoder, so nothing of an
    image can be kept for the next phrase. Several phrases for an image are a batch: `predict(image, [phrase, ...])`.
    """

    def __init__(self, model: RS2SAM2, dtype: torch.dtype | None = None, facts: dict | None = None):
        """model: on the device to predict on. dtype: to compute in, see `dtype`. facts: what its checkpoint says of it."""
        self.model, self._dtype, self.facts = model, dtype, facts or {}
        self._turn, self._said = threading.Lock(), set()

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "RS2SAM2Predictor":
        """The predictor of a checkpoint: a file of train.py's, the folder of a run, of `save_pretrained` or of the published
        checkpoint, or one of these on the hub: OWNER/NAME[@REVISION][:FILE or FOLDER].

        device: by default the CUDA card where there is one, else the CPU. UserError where the checkpoint can't be loaded.
        """
        device = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model, facts = load_checkpoint(path, device)
        return cls(model, dtype, facts)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model into a new folder to hand on: model.safetensors, config.json and a model card, README.md, which
        names data and scores. `from_pretrained` takes it, and `hf upload OWNER/NAME FOLDER`. UserError where it can't be."""
        save_folder(folder, model_entries(self.model), self.facts)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: the given dtype; without one bfloat16 or float16 on a CUDA card, bfloat16 on a CPU that has it
        for all presets but `tiny`, else float32.

        Weights stay in float32; other dtypes are autocast's. Logits are float32 always."""
        return self._dtype or chosen_dtype("auto", self.model)

    def predict(
        self, image: OneImage | list[OneImage], phrase: str | list[str], tile: int | None = None, tiling: str = "scene",
        batch: int = 8, *, bands: tuple[int, ...] | None = None, threshold: float = 0.5, min_area: int = 0,
        probabilities: bool = False,
    ) -> tuple[np.ndarray, float, np.ndarray] | tuple[list[np.ndarray], list[float], list[np.ndarray]]:  # fmt: skip
        """The mask of what the phrase names, in the image as it is meant to be seen (EXIF orientation obeyed).

        Args:
            image: a path; a PIL image; an array (H, W), (H, W, 3) or, the last one being alpha, (H, W, 4); a tensor (H, W) or
                (C, H, W); or a list of them. Values that are not of 8 bits are stretched as those of files.
            phrase: what to find; or a list of phrases. Two lists are pairs.
            tile: images over `tile` pixels a side are cut into tiles of that size; None: those over 2,048 into 1,024.
            tiling: "scene", where the phrase is about the whole image, or "independent": about each tile (imagery/tiles.py).
            batch: images or tiles in one forward pass.
            bands: numbers, from 1, of one or three bands to look at; by default the first three.
            threshold: the mask is where the probability is above it.
            min_area: connected parts of fewer pixels are left out of the mask.
            probabilities: give them in place of the logits.

        Returns:
            (mask, score, logits): the mask, bool (H, W); the mean probability inside it, 0.0 where it is empty; and the
            logits, float32 (H, W) at the image's size, positive on the mask, or the probabilities. Lists of each where image
            or phrase is a list. Where the image has no data (alpha 0, nodata of a GeoTIFF), the mask is False whatever the
            logits. UserError, in one sentence, for an image that can't be read, an empty phrase or a wrong option.
        """
        if tiling not in TILINGS:
            raise UserError(f"tiling {tiling!r} is unknown: it is one of {', '.join(TILINGS)}.")
        if batch < 1 or tile is not None and tile < 1 or min_area < 0 or not 0 < threshold < 1:
            raise UserError(f"batch {batch}, tile {tile}, min_area {min_area} and threshold {threshold}: the first two must be "
                            "1 or more, the third 0 or more, the last between 0 and 1.")  # fmt: skip
        single = not isinstance(image, (list, tuple)) and not isinstance(phrase, (list, tuple))
        images, phrases = as_pairs(image, phrase)
        notes, results = [note for phrase in phrases for note in self.notes(phrase)], []
        for some in batches(zip(images, phrases), batch):
            scenes = [as_scene(image, bands) for image, _ in some]
            rows = scene_rows(self.look, scenes, [phrase for _, phrase in some], tile, tiling, batch)
            for scene, strips in zip(scenes, rows):
                mask, score, logits = mask_score_logits(scene, strips, threshold, min_area)
                notes += [] if mask.any() else [coarseness_note(scene, tile, tiling, self.model.preset.image_size)]
                results.append((mask, score, probability(logits).astype(np.float32) if probabilities else logits))
        for note in dict.fromkeys(note for note in notes if note and note not in self._said):
            self._said.add(note)
            warnings.warn(note, stacklevel=2)
        return results[0] if single else tuple(map(list, zip(*results))) or ([], [], [])

    def look(self, images: list[np.ndarray], phrases: list[str]) -> torch.Tensor:
        """One forward pass: uint8 RGB images (H, W, 3) of any sizes, a phrase for each -> (B, 1, S/4, S/4) float32, CPU."""
        return self.output(images, phrases).logits.float().cpu()

    @torch.inference_mode()
    def output(self, images: list[np.ndarray], phrases: list[str]) -> Output:
        """All that the model says of the images of `look`. Threads take turns."""
        model, device = self.model, self.device
        image, encoder_image = (
            torch.stack([resize_image(image, size) for image in images]).to(device)
            for size in (model.preset.image_size, model.union_encoder.image_size)
        )  # (B, 3, S, S), (B, 3, E, E)
        ids, lengths = model.union_encoder.tokenizer(phrases)  # (B, L), (B,)
        with self._turn, autocast(device, self.dtype):
            training = model.training
            model.eval()
            try:
                return model(*model.normalise(image, encoder_image), ids.to(device), lengths.to(device))
            finally:
                model.train(training)

    def notes(self, phrase: str) -> list[str]:
        """What there is to doubt in an answer: weights that know no real image, words they never met, a phrase cut off."""
        tokenizer = self.model.union_encoder.tokenizer
        length, most = tokenizer.length(phrase), tokenizer.context
        cut = f"The phrase has {length:,} tokens, the model reads the first {most} of them." if length > most else ""
        return [note for note in (cut, unknown_words_note(self.facts, phrase), origin_note(self.facts)) if note]


def as_pairs(image, phrase) -> tuple[list, list[str]]:
    """As many images as phrases, from one or a list of each; UserError where the numbers differ or a phrase is none."""
    many = [isinstance(x, (list, tuple)) for x in (image, phrase)]
    length = max((len(x) for x, listed in zip((image, phrase), many) if listed), default=1)
    images, phrases = (list(x) if listed else [x] * length for x, listed in zip((image, phrase), many))
    if len(images) != len(phrases):
        raise UserError(f"{len(images)} images and {len(phrases)} phrases are no pairs: give as many of both.")
    return images, [clean_phrase(text, f"phrase {n}") for n, text in enumerate(phrases, start=1)]


# The command line ------------------------------------------------------------------------------------------------------


def own_share(jobs: list[Job]) -> list[Job]:
    """The jobs of this process: the images go to the processes in turn, each with all its phrases."""
    numbers = {image: n for n, image in enumerate(dict.fromkeys(job.image for job in jobs))}
    return [job for job in jobs if numbers[job.image] % world_size() == rank()]


class PredictionRun:
    """Does this process's share of jobs one after the other, small images in batches."""

    def __init__(self, predictor: RS2SAM2Predictor, args: argparse.Namespace, jobs: list[Job]):
        self.predictor, self.args, self.jobs = predictor, args, own_share(jobs)
        kinds = ("probabilities",) if args.probabilities else ()
        self.folder = ResultFolder(args.out, [job.image for job in jobs], args.overwrite, kinds)
        self.weights = provenance(predictor.facts)
        self.about = {"model": self.weights["model"], "weights": in_words(self.weights)}
        self.failures: list[tuple[Job, str]] = []
        self.told: set[str] = set()  # notes are printed once; results.jsonl has them with every result
        self.images, self.megapixels, self.image = 0, 0.0, None  # what is done

    def run(self) -> list[tuple[Job, str]]:
        """Predict and write all -> what has failed: (job, reason). While a group is predicted, a thread reads the next and one
        writes the last; a large scene is written here, strip by strip."""
        with quiet, Progress(total=len(self.jobs), desc="phrases") as self.bar, ThreadPoolExecutor(1) as writer:
            written = writer.submit(list)
            for group in ahead(self.groups()):
                done = self.predicted(group)
                written.result()
                large = any(scene and is_large(scene, self.args.tile) for _, scene, _ in done)
                written = writer.submit(self.write_all, [] if large else done)
                self.write_all(done if large else [])
            written.result()
        return self.failures

    def groups(self) -> Iterator[list[tuple[Job, Scene | None, Exception | None]]]:
        """The jobs with their opened scenes, as many as are predicted at once; or with why they can't be done."""
        group, opened, scene = [], None, None
        for job in self.jobs:
            try:
                if job.fault:
                    raise UserError(job.fault)
                job = job._replace(phrase=clean_phrase(job.phrase, f"phrase {job.n}"))
                if job.image != opened:
                    opened, scene = job.image, None
                    scene = open_scene(job.image, self.args.bands)
                elif scene is None:
                    raise UserError("The image could not be opened, see above.")
                self.folder.refuse_existing(job, scene)
            except Exception as error:  # what nobody foresaw costs its own job alone, too
                group.append((job, None, error))
                continue
            group.append((job, scene, None))
            if len(group) >= self.args.batch or is_large(scene, self.args.tile):
                yield group
                group = []
        yield group

    def predicted(self, group: list) -> list[tuple[Job, Scene | None, Rows | Exception]]:
        """Each job with its scene and the rows of its logits, those of a large scene being made when they are asked for, or
        with why it failed."""
        rows = iter(self.rows([(job, scene) for job, scene, error in group if error is None]))
        return [(job, scene, error or next(rows)) for job, scene, error in group]

    def rows(self, pending: list[tuple[Job, Scene]]) -> list[Rows | Exception]:
        """Small scenes in one forward pass, a large one in tiles."""
        args, scenes, phrases = self.args, [scene for _, scene in pending], [job.phrase for job, _ in pending]
        try:
            with card_failures("use a smaller --batch, or --device cpu", end=False):
                return list(scene_rows(self.predictor.look, scenes, phrases, args.tile, args.tiling, args.batch))
        except Exception as error:
            if len(pending) == 1:
                error.__context__ = None  # which holds all that the card was full of
                return [error.with_traceback(None)]
        return [row for one in pending for row in self.rows([one])]  # an image that can't be read costs its own jobs alone

    def write_all(self, done: list[tuple[Job, Scene | None, Rows | Exception]]) -> None:
        for job, scene, rows in done:
            if isinstance(rows, Exception):
                self.fail(job, rows)
            else:
                self.write(job, scene, rows)
            if scene and job.image != self.image:
                self.image, self.images = job.image, self.images + 1
                self.megapixels += scene.height * scene.width / 1e6
            self.bar.set_postfix_str(f"{self.images:,} images, {self.megapixels:,.0f} megapixels", refresh=False)
            self.bar.update()

    def write(self, job: Job, scene: Scene, rows: Rows) -> None:
        args, notes = self.args, self.predictor.notes(job.phrase)
        missed = coarseness_note(scene, args.tile, args.tiling, self.predictor.model.preset.image_size)
        settings = {"tile": args.tile or TILE, "tiling": args.tiling} if is_large(scene, args.tile) else {}
        settings |= {"threshold": args.threshold, "min_area": args.min_area, "weights": self.weights}
        settings["dtype"] = str(self.predictor.dtype).removeprefix("torch.")
        try:
            with card_failures("use a smaller --batch, or --device cpu", end=False):
                strips = foreground(scene, rows, args.threshold, args.min_area)
                line = self.folder.write(job, scene, strips, settings, self.about, notes, missed)
        except Exception as error:
            return self.fail(job, error)
        fresh = [note for note in line.get("notes", []) if note not in self.told]
        self.told.update(fresh)
        Progress.write(readable(line | {"notes": fresh}, args.out / line["mask"]))

    def fail(self, job: Job, error: Exception) -> None:
        reason = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.strerror else str(error)
        if not isinstance(error, (UserError, OSError)):
            reason = f"{type(error).__name__}: {' '.join(reason.split())[:200]}"
        self.failures.append((job, reason))


def main() -> None:
    os.environ.setdefault("GDAL_CACHEMAX", "256")  # MB; by itself GDAL takes a twentieth of the machine's memory
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as on an interrupt, nothing half-written stays
    args = command_line().parse_args()
    choose_threads()
    sys.stdout.reconfigure(errors="replace")  # a phrase may hold what the terminal has no letters for
    way_out = "name another card by --device, or use --device cpu"
    with process_group(), exit_on_user_error("predict.py"), card_failures(way_out):
        with rank_0_first():
            jobs = find_jobs(args.image, args.phrase)
            dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
            predictor = RS2SAM2Predictor.from_pretrained(args.ckpt, args.device or pick_device(), dtype)
        predictor.model.requires_grad_(False).cast_frozen(predictor.dtype)  # once: autocast would in every forward pass
        print(weights_line(args.ckpt, predictor.facts), flush=True)
        failures = [failure for part in gather(PredictionRun(predictor, args, jobs).run()) for failure in part]
        if failures:
            if not rank():
                print(f"predict.py: {len(failures)} of {len(jobs)} failed:", file=sys.stderr)
                for job, reason in failures:
                    print(f'  {job.image}, "{job.phrase[:60]}": {reason}', file=sys.stderr)
            gather(None)  # torchrun ends the others with the first that fails
            sys.exit(1)


if __name__ == "__main__":
    main()
