"""Generated overhead scenes with referring phrases, written to disk in RRSIS-D's own layout.

Every phrase has exactly one right answer by construction: see objects.py. One addition to RRSIS-D's format: each
sentence carries 'kind', one of phrases.KINDS.
"""

import json
import math
import pickle
import tempfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from annotations.predicates import pick
from runtime.errors import UserError
from runtime.progress import Progress
from synthetic_scenes.drawing import SHAPES, ground, paint
from synthetic_scenes.objects import CATEGORIES, COLOURS, SIZES, Object
from synthetic_scenes.phrases import HELD_OUT, draw_phrases

SPLITS = {"train": 0, "val": 1, "test": 2}
JPEG = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]


@dataclass
class Scene:
    """A picture, what is in it, and what is said of that."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    objects: list[Object]
    phrases: list[tuple[int, str, str]]  # (index into objects, phrase, kind)


@dataclass
class Placed:
    """An object with its picture, whose upper left corner lies at (top, left)."""

    object: Object
    rgb: np.ndarray  # (h, w, 3) float32
    coverage: np.ndarray  # (h, w) float32 in 0..1
    top: int
    left: int


def place_objects(rng: np.random.Generator, categories: list[str], water: np.ndarray) -> list[Placed]:
    """Draws an object of each category and places them apart, without those that find no room; water (H, H) bool."""
    size, placed = len(water), []
    lean, gap = rng.uniform(0, 360), round(2.5 * size / 128)
    palette = {c: rng.permutation(list(COLOURS))[: rng.integers(2, 4)] for c in dict.fromkeys(categories)}
    taken = np.zeros((size, size), np.uint8)
    for category in sorted(categories, key=lambda c: -CATEGORIES[c][2]):  # the largest find room first
        kind, colour = str(rng.choice([*SIZES], p=(0.35, 0.25, 0.4))), str(pick(rng, palette[category]))
        length = CATEGORIES[category][2] * rng.uniform(*SIZES[kind]) * size / 128
        # The gloss of the tanks lies on one side in all of a scene.
        angle = lean + rng.normal() * 6 if category == "storagetank" else rng.uniform(0, 360)
        rgb, cover = paint(SHAPES[category], COLOURS[colour], length, angle)
        h, w = cover.shape
        body = cover >= 0.5
        for trial in range(80):
            top, left = int(rng.integers(gap, size - gap - h + 1)), int(rng.integers(gap, size - gap - w + 1))
            spot = np.s_[top : top + h, left : left + w]
            # Ships and harbors go to water and the others to land, as long as there is such room.
            astray = (water[spot][body] != (category in ("ship", "harbor"))).mean() > 0.1
            if (astray and trial < 60) or taken[spot][body].any():
                continue
            mask = np.zeros((size, size), bool)
            mask[spot] = body
            taken |= cv2.dilate(mask.astype(np.uint8), np.ones((2 * gap + 1, 2 * gap + 1), np.uint8))
            centre = tuple(float(axis.mean() + 0.5) / size for axis in np.nonzero(mask)[::-1])
            placed.append(Placed(Object(category, colour, kind, centre, mask), rgb, cover, top, left))
            break
    return placed


def draw_objects(rng: np.random.Generator, image: np.ndarray, placed: list[Placed]) -> np.ndarray:
    """The ground (H, H, 3) float32 with shadows, objects, light and noise: uint8. All shadows come before all bodies, so
    none falls on a body."""
    size = len(image)
    sun, dark = rng.uniform(0, 2 * np.pi), np.zeros((size, size), np.float32)
    for p in placed:
        height = CATEGORIES[p.object.category][3] * size / 128
        for reach in np.linspace(0, height, 1 + math.ceil(height)):
            shift = np.float32([[1, 0, p.left + reach * np.cos(sun)], [0, 1, p.top + reach * np.sin(sun)]])
            np.maximum(dark, cv2.warpAffine(p.coverage, shift, (size, size)), out=dark)
    image *= 1 - 0.5 * dark[..., None]
    for p in placed:
        height, width = p.coverage.shape
        spot = image[p.top : p.top + height, p.left : p.left + width]
        spot += p.coverage[..., None] * (p.rgb - spot)
    slope = np.linspace(-0.07, 0.07, size, dtype=np.float32)
    light = rng.uniform(0.92, 1.05) * (1 + rng.uniform(-1, 1) * slope[:, None] + rng.uniform(-1, 1) * slope)
    image = image * light[..., None] + 2.5 * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def scene(seed: int, split: str, index: int, size: int = 128) -> Scene:
    """Scene number `index` of a split ('train', 'val', 'test'), size x size pixels; the same arguments, the same scene."""
    if not 96 <= size <= 256:
        raise UserError(f"scenes of {size} pixels can't be drawn: choose a size from 96 to 256")
    rng = np.random.default_rng([seed, SPLITS[split], index])
    # By difficulty: one category 2, then up to 3, then 3 or 4 times; mostly a second one 2 or 3 times, others once.
    difficulty = int(rng.integers(3))
    total, main = 5 + difficulty + int(rng.integers(2)), int(rng.integers(2 + difficulty // 2, 3 + difficulty))
    second = min(2 + int(rng.random() < 0.25), total - main - 1) if rng.random() < 0.85 else 1
    names = [str(n) for n in rng.permutation(list(CATEGORIES))]
    categories = [names[0]] * main + [names[1]] * second + names[2 : 2 + total - main - second]
    image, water = ground(rng, size, (difficulty + rng.random()) / 3, bool({"ship", "harbor"} & set(categories)))
    placed = []
    while len(placed) < 5:
        placed = place_objects(rng, categories, water)
    image, objects = draw_objects(rng, image, placed), [p.object for p in placed]
    return Scene(image, objects, draw_phrases(rng, objects, int(rng.integers(4, 7))))


class Annotations:
    """RRSIS-D's two annotation files, filled scene by scene. A ref is one object of an image with its phrases; a bbox is
    x1, y1, x2, y2 with the last pixel's index."""

    def __init__(self):
        self.refs, self.images, self.annotations, self.sentences = [], [], [], 0

    def add(self, s: Scene, split: str, file_name: str) -> None:
        image_id, (height, width) = len(self.images), s.image.shape[:2]
        self.images.append({"file_name": file_name, "height": height, "width": width, "id": image_id})
        for j in sorted({index for index, _, _ in s.phrases}):
            mask, ref_id = s.objects[j].mask.astype(np.uint8, order="F"), len(self.refs)
            category = CATEGORIES[s.objects[j].category][0]
            phrases = [(phrase, phrase.lower(), kind) for index, phrase, kind in s.phrases if index == j]
            sentences = [
                {"tokens": sent.split(), "raw": raw, "sent_id": self.sentences + n, "sent": sent, "kind": kind}
                for n, (raw, sent, kind) in enumerate(phrases)
            ]
            self.sentences += len(sentences)
            self.refs.append({
                "image_id": image_id, "split": split, "sentences": sentences, "file_name": file_name,
                "category_id": category, "ann_id": ref_id, "ref_id": ref_id, "sent_ids": [t["sent_id"] for t in sentences],
            })  # fmt: skip
            rle, (x, y, w, h) = coco_mask.encode(mask), cv2.boundingRect(mask)
            self.annotations.append({
                "segmentation": [{"size": [height, width], "counts": rle["counts"].decode("ascii")}],
                "bbox": [x, y, x + w - 1, y + h - 1], "categories_id": category, "iscrowd": 0,
                "area": float(mask.sum()), "image_id": image_id, "id": ref_id,
            })  # fmt: skip

    def write(self, folder: Path) -> None:
        categories = [{"supercategory": name, "id": c[0], "name": name} for name, c in CATEGORIES.items()]
        instances = {"info": {}, "licenses": [], "images": self.images, "annotations": self.annotations}
        text = json.dumps(instances | {"categories": categories})
        (folder / "instances.json").write_text(text, encoding="ascii")
        (folder / "refs(unc).p").write_bytes(pickle.dumps(self.refs, protocol=2))


def make_scenes(
    root, train: int = 8000, val: int = 300, test: int = 300, size: int = 128, seed: int = 0, progress: bool = True,
    hold_out: bool = False,
) -> Path:  # fmt: skip
    """Writes the scenes of three splits below root in RRSIS-D's layout; returns root as a Path.

    With hold_out, phrases that say a pair of HELD_OUT are left out of the training split. The folder appears only when all
    is written. UserError for an existing one, and where it can't be written.
    """
    root = Path(root)
    if root.exists():
        raise UserError(f"{root} exists already: remove it or choose another folder")
    jobs = [(split, i) for split, n in zip(SPLITS, (train, val, test)) for i in range(n)]
    annotations = Annotations()
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{root.name}.part", dir=root.parent) as scratch:
            part = Path(scratch) / root.name  # below the scratch folder, which only its owner may read
            pictures = part / "images" / "rrsisd" / "JPEGImages"
            for folder in (part / "rrsisd", pictures):
                folder.mkdir(parents=True)
            for number, (split, i) in enumerate(Progress(jobs, desc="scenes", disable=not progress)):
                s, file_name = scene(seed, split, i, size), f"{number:05d}.jpg"
                if hold_out and split == "train":
                    s.phrases = [p for p in s.phrases if not any(pair in p[1] for pair in HELD_OUT)]
                jpeg = cv2.imencode(".jpg", s.image[..., ::-1], JPEG)[1]
                (pictures / file_name).write_bytes(jpeg.tobytes())
                annotations.add(s, split, file_name)
            annotations.write(part / "rrsisd")
            part.rename(root)
    except OSError as error:
        raise UserError(f"{root} can't be written ({error.strerror or error}): make room there", exit_code=1) from None
    return root


def ensure_scenes(root: Path, **options) -> None:
    """`make_scenes` where there is no folder `root` yet."""
    if not root.exists():
        print(f"generating scenes under {root} (once, a minute or two)", flush=True)
        try:
            make_scenes(root, **options)
        except UserError:
            if not root.exists():  # else another program has made them meanwhile
                raise
