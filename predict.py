"""From an image and a phrase to a mask, at any size.

    python predict.py --ckpt best.pt --image plane.jpg --phrase "the airplane on the right"
    python predict.py --ckpt best.pt --image harbour.tif --phrase "the ships" --tiling independent --tile 512
    python predict.py --ckpt best.pt --image list.csv                     columns image,phrase

Into the folder --out go, for phrase n of an image, all or none of:

    <image's stem>-<n>-<phrase>.png           the mask, 0 and 255, as large as the image; for a GeoTIFF, or an image too
                                              large to be decoded whole, a .tif in the same place on Earth
    <image's stem>-<n>-<phrase>-overlay.png   the image with the mask lit and the phrase below, at most 1,600 pixels a side
    <image's stem>-<n>-<phrase>.geojson       for a GeoTIFF, the mask's polygons in WGS 84 with phrase,
                                              confidence (the whole mask's) and area_m2 (each polygon's)
    results.jsonl                             a line for each result is added; a later line for the same mask replaces it

Where two images of a run share a stem, eight digits of a digest of their path follow it. In results.jsonl: area_share
is the mask's share of the image (of its pixels with data), bbox its [left, top, width, height] in pixels or null,
confidence the mean probability inside it, 0 where it is empty. Exit code: 0 all done, 1 some failed, 2 wrong usage.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from checkpoints import UserError
from layouts import IMAGE_SUFFIXES, UserError, clean_phrase, read_text
from model import RS2SAM2
from overlay import SmallMask, overlay
from polygons import write_polygons
from raster import NODATA, open_scene
from runs import number
from tiles import LARGE, TILE, TILINGS, at_size, cut_note, is_large, model_logits, segment_rows


class Job(NamedTuple):
    image: Path
    phrase: str
    n: int  # which phrase of the image
    fault: str = ""  # why it can't be done, where that is known before


def find_jobs(places: list[Path], phrases: list[str]) -> list[Job]:
    """What is asked for: every phrase for every image, and the rows of CSV files. UserError where there is nothing."""
    lists = [place for place in places if place.suffix.lower() == ".csv"]
    if phrases and len(lists) == len(places):
        raise UserError("A CSV has phrases of its own: leave out --phrase, or name images too.")
    if not phrases and len(lists) < len(places):
        raise UserError("There is nothing to find: give the images a --phrase, or name a CSV with rows image,phrase.")
    wanted = []
    for place in places:
        if place.is_dir():
            files = sorted(path for path in place.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
            if not files:
                raise UserError(f"{place} holds no image ({', '.join(IMAGE_SUFFIXES)}): name another folder.")
            wanted += [(path, phrase, "") for path in files for phrase in phrases]
        elif not place.exists():
            raise UserError(f"There is no image, folder or CSV {place}: check the name.")
        elif place in lists:
            wanted += read_list(place)
        else:
            wanted += [(place, phrase, "") for phrase in phrases]
    if not wanted:
        raise UserError(f"{', '.join(map(str, places))} has no rows: write image,phrase and what to find below it.")
    by_image = {}  # an image is opened once, for all its phrases
    for image, phrase, fault in wanted:
        by_image.setdefault(image, []).append((phrase, fault))
    return [
        Job(i, phrase, n, fault) for i, asked in by_image.items() for n, (phrase, fault) in enumerate(asked, start=1)
    ]


def read_list(path: Path) -> list[tuple[Path, str, str]]:
    """(image, phrase, fault) of each row of a CSV with the columns image and phrase; paths from the CSV's folder."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        if absent := {"image", "phrase"} - set(reader.fieldnames or []):
            raise UserError(f"{path} lacks the column {' and '.join(sorted(absent))}: its first line must name them.")
        rows = []
        for row in reader:
            sound = None not in row and None not in row.values() and row["image"].strip()
            fault = "" if sound else "the row has not the fields of the first line: quote phrases with commas"
            fault = fault and f"{path}, line {reader.line_num}: {fault}."
            rows.append((path.parent / (row["image"] or "").strip(), row["phrase"] or "", fault))
        return rows
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not sound CSV ({error}): mend it.") from None


def stems(images: list[Path]) -> dict[Path, str]:
    """The name that each image's results begin with; see the head of this file."""
    short = {image: image.stem[:80] for image in images}
    shared = Counter(stem.lower() for stem in short.values())
    digests = {image: hashlib.sha256(os.path.abspath(image).encode()).hexdigest()[:8] for image in short}
    return {image: stem + (f"-{digests[image]}" if shared[stem.lower()] > 1 else "") for image, stem in short.items()}


def slug(phrase: str) -> str:
    """The phrase's letters and digits for a file's name, cut between words where there are any to 40 characters."""
    text = "-".join("".join(c if c.isalnum() else " " for c in phrase.lower()).split())
    if len(text) > 40:
        text = text[:41].rpartition("-")[0] or text[:40]
    return text or "phrase"


class Tally:
    """What is said of a mask, gathered from its bands of rows."""

    def __init__(self, scene):
        self.scene, self.small = scene, SmallMask(scene.height, scene.width)
        self.area = self.data = 0
        self.probability = 0.0
        self.left, self.top, self.right, self.bottom = scene.width, scene.height, 0, 0

    def add(self, top: int, logits: np.ndarray) -> np.ndarray:
        """Logits (h, W) of a band -> what the mask's file holds: uint8, 255 foreground, NODATA where there is no data."""
        valid, mask = self.scene.valid(top, len(logits)), logits > 0
        if valid is not None:
            mask &= valid
        self.data += mask.size if valid is None else int(valid.sum())
        self.area += int(mask.sum())
        self.probability += float((1 / (1 + np.exp(-logits[mask].astype(np.float64)))).sum())
        self.small.add(top, mask)
        if mask.any():
            rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
            self.left, self.right = min(self.left, int(columns[0])), max(self.right, int(columns[-1]) + 1)
            self.top, self.bottom = min(self.top, top + int(rows[0])), top + int(rows[-1]) + 1
        pixels = mask.astype(np.uint8) * 255
        return pixels if valid is None else np.where(valid, pixels, np.uint8(NODATA))

    def facts(self) -> dict:
        box = [self.left, self.top, self.right - self.left, self.bottom - self.top] if self.area else None
        confidence = round(self.probability / self.area, 4) if self.area else 0.0
        return {"area_share": self.area / max(1, self.data), "bbox": box, "confidence": confidence}


class Predictor:
    """Does jobs one after the other, small images in batches; `failures` are (job, reason)."""

    def __init__(self, model, args: argparse.Namespace, jobs: list[Job]):
        self.model, self.args, self.jobs = model, args, jobs
        self.stems = stems([job.image for job in jobs])
        self.failures, self.pending = [], []

    def run(self) -> None:
        with tqdm(total=len(self.jobs), desc="phrases", disable=None) as self.bar:
            opened, scene = None, None
            for job in self.jobs:
                try:
                    if job.fault:
                        raise UserError(job.fault)
                    phrase = clean_phrase(job.phrase, f"phrase {job.n}")
                    if job.image != opened:
                        opened, scene = job.image, None
                        scene = open_scene(job.image, self.args.bands)
                    elif scene is None:
                        raise UserError("The image could not be opened, see above.")
                    job = job._replace(phrase=phrase)
                    self.refuse_existing(job, scene)
                except (UserError, OSError) as error:
                    self.fail(job, error)
                    continue
                if is_large(scene, self.args.tile):
                    options = self.args.tile, self.args.tiling, self.args.batch
                    self.finish(job, scene, partial(segment_rows, self.model, scene, phrase, *options))
                    continue
                self.pending.append((job, scene))
                if len(self.pending) == self.args.batch:
                    self.flush()
            self.flush()

    def flush(self) -> None:
        """One pass of the model over the small images that wait for it."""
        ready = []
        for job, scene in self.pending:
            try:
                ready.append((job, scene, scene.read_all()))
            except (UserError, OSError) as error:
                self.fail(job, error)
        self.pending = []
        if ready:
            logits = model_logits(self.model, [pixels for *_, pixels in ready], [job.phrase for job, *_ in ready])
            for (job, scene, _), one in zip(ready, logits.split(1)):
                self.finish(job, scene, lambda one=one, scene=scene: [(0, at_size(one, (scene.height, scene.width)))])

    def fail(self, job: Job, error: Exception) -> None:
        reason = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.strerror else str(error)
        self.failures.append((job, reason))
        self.bar.update()

    def paths(self, job: Job, scene) -> dict[str, Path]:
        name = f"{self.stems[job.image]}-{job.n}-{slug(job.phrase)}"
        paths = {"mask": f"{name}{scene.suffix}", "overlay": f"{name}-overlay.png"}
        paths |= {"polygons": f"{name}.geojson"} if scene.crs else {}
        return {kind: self.args.out / path for kind, path in paths.items()}

    def refuse_existing(self, job: Job, scene) -> None:
        if not self.args.overwrite:
            for path in self.paths(job, scene).values():
                if path.exists():
                    raise UserError(f"{path} exists: --overwrite makes it anew, --out names another folder.")

    def finish(self, job: Job, scene, rows) -> None:
        """Write a result and say what it is. rows() yields (top, logits (h, W))."""
        paths = self.paths(job, scene)
        notes = [cut_note(self.model, job.phrase)]
        if scene.suffix == ".tif" and not scene.crs:
            notes.append("The image has no coordinate system, so its polygons have no place on Earth and are left out.")
        try:
            with tempfile.TemporaryDirectory(prefix=".part-", dir=self.args.out) as scratch:
                facts = self.write(job, scene, rows, {kind: Path(scratch, p.name) for kind, p in paths.items()}, notes)
                self.refuse_existing(job, scene)  # by now, perhaps
                for kind in [*paths][::-1]:  # the mask last: where it is, the rest is
                    if Path(scratch, paths[kind].name).exists():
                        os.replace(Path(scratch, paths[kind].name), paths[kind])
                    else:
                        del paths[kind]
            line = {"image": str(job.image), "phrase": job.phrase, "width": scene.width, "height": scene.height} | facts
            line |= {kind: path.name for kind, path in paths.items()}
            if is_large(scene, self.args.tile):
                line |= {"tile": self.args.tile or TILE, "tiling": self.args.tiling}
            line |= {"notes": notes} if (notes := [note for note in notes if note]) else {}
            with open(self.args.out / "results.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except (UserError, OSError) as error:
            self.fail(job, error)
            return
        self.bar.update()
        tqdm.write(readable(line, paths["mask"]))

    def write(self, job: Job, scene, rows, paths: dict[str, Path], notes: list[str]) -> dict:
        """The files of a result, into a folder that is not seen yet -> what is said of it."""
        tally = Tally(scene)
        with scene.mask_file(paths["mask"]) as file:
            for top, logits in rows():
                file.write(top, tally.add(top, logits))
        facts = tally.facts()
        if "polygons" in paths:
            properties = {"phrase": job.phrase, "confidence": facts["confidence"]}
            try:
                facts |= write_polygons(paths["mask"], paths["polygons"], properties)
            except UserError as error:
                paths["polygons"].unlink(missing_ok=True)
                notes.append(f"No polygons are written: {error}.")
        overlay(scene.overview, tally.small.pixels, job.phrase).save(paths["overlay"], "PNG")
        return facts


def readable(line: dict, mask: Path) -> str:
    """A result in words."""
    phrase = " ".join(line["phrase"].split())
    phrase = phrase if len(phrase) <= 60 else phrase[:57] + "..."
    if line["bbox"]:
        left, top, width, height = line["bbox"]
        found = f"{100 * line['area_share']:.2f} % of the image, {width} x {height} pixels at ({left}, {top})"
        found += f", {line['area_m2']:,.0f} m2" if "area_m2" in line else ""
        found += f", confidence {line['confidence']:.2f}"
    else:
        found = "nothing found"
    return "\n  ".join([f'{line["image"]}, "{phrase}": {found} -> {mask}', *line.get("notes", [])])


def band_numbers(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if len(numbers) not in (1, 3) or not all(n.strip().isdecimal() and int(n) for n in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not one band number or three, as 4,3,2")
    return tuple(map(int, numbers))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", type=Path, default="best.pt", help="a checkpoint of train.py (default: best.pt)")
    add("--image", type=Path, nargs="+", required=True, help="images, folders of images, CSV files (image,phrase)")
    add("--phrase", action="append", default=[], help="what to find; may be given several times")
    add("--out", type=Path, default="predictions", help="folder for the results (default: predictions)")
    add("--overwrite", action="store_true", help="make results anew that exist; without it they are left alone")
    add("--tile", type=partial(number, int, 32), metavar="N", help="cut images over N pixels a side into tiles of N; "
        f"without it, those over {LARGE:,} into tiles of {TILE:,}")  # fmt: skip
    add("--tiling", choices=TILINGS, default="scene", help="whether phrases refer to the whole scene, which tiles then "
        "refine, or to each tile on its own (default: scene); see tiles.py")  # fmt: skip
    add("--bands", type=band_numbers, metavar="R,G,B", help="bands to look at, from 1 (default: the first three)")
    add("--batch", type=partial(number, int, 1), default=8, help="images or tiles at once (default: 8)")
    return parser.parse_args()


def main() -> None:
    os.environ.setdefault("GDAL_CACHEMAX", "256")  # MB; by itself GDAL takes a twentieth of the machine's memory
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as on an interrupt, nothing half-written stays
    args = parse_args()
    sys.stdout.reconfigure(errors="replace")  # a phrase may hold what the terminal has no letters for
    try:
        jobs = find_jobs(args.image, args.phrase)
        model = RS2SAM2.load(args.ckpt)
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(prefix=".part-", dir=args.out).cleanup()  # can anything be written there?
    except (UserError, UserError) as error:
        print(f"predict.py: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"predict.py: {error.filename}: {error.strerror}; --out names another folder", file=sys.stderr)
        sys.exit(2)
    predictor = Predictor(model, args, jobs)
    predictor.run()
    if predictor.failures:
        print(f"predict.py: {len(predictor.failures)} of {len(jobs)} failed:", file=sys.stderr)
        for job, reason in predictor.failures:
            print(f'  {job.image}, "{job.phrase[:60]}": {reason}', file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
