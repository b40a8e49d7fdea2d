"""The result of one phrase for one image: its numbers, its files and their names, and a line in words."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from imagery.foreground import Strips, probabilities
from imagery.pictures import captioned, fitted, lit, outlined
from imagery.plain import NODATA, Scene
from runtime.errors import UserError

LONGEST = 1600  # pixels of an overlay's longer side, reduced to
SHORTEST = 512  # and, for small images, enlarged to


class Job(NamedTuple):
    """A phrase to find in an image."""

    image: Path
    phrase: str
    n: int  # which phrase of the image, from 1
    fault: str = ""  # why it can't be done, where that is known from the start


# Numbers ---------------------------------------------------------------------------------------------------------------


class ReducedMask:
    """A mask at the overlay's size, made from bands of rows; a pixel is set if any that it covers is."""

    def __init__(self, height: int, width: int):
        scale = min(1, LONGEST / max(height, width))
        self.height, self.width = height, width
        self.pixels = np.zeros((max(1, round(height * scale)), max(1, round(width * scale))), bool)

    def add(self, top: int, rows: np.ndarray) -> None:
        """rows: bool (h, W), the band that begins at `top`."""
        height, width = self.pixels.shape
        columns = -(-np.arange(width) * self.width // width)  # the first pixel that each column covers
        reduced = np.logical_or.reduceat(rows, columns, axis=1)
        np.logical_or.at(self.pixels, np.arange(top, top + len(rows)) * height // self.height, reduced)


class MaskResult:
    """The numbers of a mask, gathered from its bands of rows."""

    def __init__(self, scene: Scene):
        self.scene, self.reduced = scene, ReducedMask(scene.height, scene.width)
        self.area = self.valid = 0  # pixels
        self.probability = 0.0  # summed over the mask
        self.left, self.top, self.right, self.bottom = scene.width, scene.height, 0, 0

    def add(self, top: int, logits: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Logits (h, W) of a strip and its mask, bool -> the rows of the mask's file: uint8, 255 foreground, NODATA where there
        is no data."""
        valid = self.scene.valid(top, len(mask))
        self.valid += mask.size if valid is None else int(valid.sum())
        self.area += int(mask.sum())
        self.probability += float(probabilities(logits[mask]).sum())
        self.reduced.add(top, mask)
        if mask.any():
            rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
            self.left, self.right = min(self.left, int(columns[0])), max(self.right, int(columns[-1]) + 1)
            self.top, self.bottom = min(self.top, top + int(rows[0])), top + int(rows[-1]) + 1
        pixels = mask.astype(np.uint8) * 255
        return pixels if valid is None else np.where(valid, pixels, np.uint8(NODATA))

    def facts(self) -> dict:
        """{"area_share", "bbox", "confidence"}: the mask's share of the pixels with data, its [left, top, width, height] or
        None, and the mean probability inside it."""
        box = [self.left, self.top, self.right - self.left, self.bottom - self.top] if self.area else None
        confidence = round(self.probability / self.area, 4) if self.area else 0.0
        return {"area_share": self.area / max(1, self.valid), "bbox": box, "confidence": confidence}


# Names -----------------------------------------------------------------------------------------------------------------


def stems(images: list[Path]) -> dict[Path, str]:
    """The beginning of the names of each image's results: its stem, and a digest of its path where others share the stem."""
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


# Files -----------------------------------------------------------------------------------------------------------------


class ResultFolder:
    """The folder that results are written into: all the files of a result, or none."""

    def __init__(self, path: Path, images: list[Path], overwrite: bool = False, kinds: tuple[str, ...] = ()):
        """images: those whose results are written, whose names must differ. kinds: files that are wanted besides,
        "probabilities". UserError where nothing can be written."""
        self.path, self.overwrite, self.stems, self.kinds = path, overwrite, stems(images), kinds
        try:
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryDirectory(prefix=".part-", dir=path).cleanup()
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}; --out names another folder") from None

    def files(self, job: Job, scene: Scene, kinds: tuple[str, ...]) -> dict[str, Path]:
        """{"mask", "overlay", `kinds` and, where the scene is georeferenced, "polygons": path}."""
        name = f"{self.stems[job.image]}-{job.n}-{slug(job.phrase)}"
        names = {"mask": f"{name}{scene.suffix}", "overlay": f"{name}-overlay.png"}
        names |= {kind: f"{name}-{kind}.tif" for kind in kinds}
        names |= {"polygons": f"{name}.geojson"} if scene.placed else {}
        return {kind: self.path / name for kind, name in names.items()}

    def refuse_existing(self, job: Job, scene: Scene) -> None:
        for path in () if self.overwrite else self.files(job, scene, self.kinds).values():
            if path.exists():
                raise UserError(f"{path} exists: --overwrite makes it anew, --out names another folder.")

    def write(self, job: Job, scene: Scene, strips: Strips, settings: dict, about: dict, notes: list[str], missed: str) -> dict:
        """Write a result from the strips of its mask -> its line of results.jsonl, with the settings and notes in it.

        about: what else than image, phrase and date the polygons' features and the TIFFs' tags say. missed: a note where the
        mask is empty, or "". UserError or OSError where the strips can't be computed or written; then there are no files of it.
        """
        paths, date = self.files(job, scene, self.kinds), datetime.now().astimezone().isoformat(timespec="seconds")
        about = {"image": str(job.image), "phrase": job.phrase} | about | {"date": date}
        with tempfile.TemporaryDirectory(prefix=".part-", dir=self.path) as scratch:
            parts = {kind: Path(scratch, path.name) for kind, path in paths.items()}
            facts, more = write_files(parts, scene, strips, about)
            self.refuse_existing(job, scene)  # another run may have written them by now
            for kind, path in self.files(job, scene, ("probabilities",)).items() if self.overwrite else ():
                if kind not in parts or not parts[kind].exists():
                    path.unlink(missing_ok=True)  # of an earlier mask
            for kind in [*paths][::-1]:  # the mask last: where it is, the rest is
                if parts[kind].exists():
                    os.replace(parts[kind], paths[kind])
                else:
                    del paths[kind]
        line = {"image": str(job.image), "phrase": job.phrase, "width": scene.width, "height": scene.height} | facts
        line |= {kind: path.name for kind, path in paths.items()} | settings | {"date": date}
        notes = [*notes, *scene.notes, *more, *([missed] if missed and not line["bbox"] else [])]
        line |= {"notes": notes} if notes else {}
        with open(self.path / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        return line


def write_files(paths: dict[str, Path], scene: Scene, strips: Strips, about: dict) -> tuple[dict, list[str]]:
    """Write the files of a result -> its facts, and notes on what it lacks."""
    result, notes = MaskResult(scene), []
    # Polygons take their confidences from a raster: the wanted one, or one of the foreground alone that is not kept.
    values = paths.get("probabilities") or ("polygons" in paths and paths["mask"].with_name("inside.tif"))
    with contextlib.ExitStack() as files:
        mask_file = files.enter_context(scene.mask_file(paths["mask"], about))
        value_file = values and files.enter_context(scene.probability_file(values, about))
        for top, logits, mask in strips:
            mask_file.write(top, pixels := result.add(top, logits, mask))
            seen = pixels != NODATA if "probabilities" in paths else mask
            if value_file and seen.any():
                known = np.full(logits.shape, np.nan, np.float32)
                known[seen] = probabilities(logits[seen])
                value_file.write(top, known)
    facts = result.facts()
    empty = 1 - result.valid / (scene.height * scene.width)
    if empty >= 0.5:
        notes.append(f"{100 * empty:.0f} % of the image has no data.")
    if "polygons" in paths:
        try:
            from imagery.polygons import write_polygons

            facts |= write_polygons(paths["mask"], values, paths["polygons"], about)
        except ImportError as error:
            notes.append(f"No polygons are written: they need {error.name}: pip install rasterio shapely pyproj.")
        except UserError as error:
            paths["polygons"].unlink(missing_ok=True)
            notes.append(f"No polygons are written: {error}.")
    picture = overlay(scene.overview, result.reduced.pixels, about["phrase"])
    Image.fromarray(picture).save(paths["overlay"], "PNG", compress_level=1)  # the default takes five times as long
    return facts, notes


def overlay(picture: np.ndarray, mask: np.ndarray, phrase: str) -> np.ndarray:
    """picture uint8 RGB of any size and the same scene's mask, bool (h, w), which gives the size -> uint8 RGB: the scene
    dimmed, the mask lit and outlined, the phrase below."""
    factor = max(1, SHORTEST // max(mask.shape))
    mask = mask.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = mask.shape
    picture = lit(fitted(picture, height, width), mask, dim=0.5)
    picture = outlined(picture, mask, width=2 if min(height, width) > 100 else 1)
    margin = max(0, SHORTEST - width)
    picture = np.pad(picture, ((0, 0), (margin // 2, margin - margin // 2), (0, 0)), constant_values=255)
    return captioned(picture, phrase, below=True, lines=3, size=18 if max(height, width) < 1000 else 26)


def readable(line: dict, mask: Path) -> str:
    """A line of results.jsonl in words."""
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
