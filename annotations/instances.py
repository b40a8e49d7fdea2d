"""Objects of images with their masks, from a file in COCO's format; large images can be scaled and cut into tiles."""

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np

from annotations.layouts import read_json
from annotations.masks import load_mask
from annotations.samples import Sample
from annotations.spreadsheets import SPLITS, draw_splits
from runtime.errors import UserError


@dataclass
class Instance:
    """An object of a picture."""

    category: str
    mask: np.ndarray  # (h, w) uint8 of 0/1, cut to the object's box
    corner: tuple[int, int]  # left, top of that box
    shape: tuple[int, int]  # H, W of the picture
    crowd: bool = False  # several objects in one mask
    seen: float = 1.0  # the share of its pixels that lies in the picture; the rest is beyond a tile's border

    @cached_property
    def spot(self) -> tuple[slice, slice]:
        """Where in the picture the mask lies."""
        (left, top), (height, width) = self.corner, self.mask.shape
        return np.s_[top : top + height, left : left + width]

    @cached_property
    def area(self) -> int:
        return int(self.mask.sum())

    @cached_property
    def centre(self) -> tuple[float, float]:
        """(x, y), the mask's centroid in fractions of the picture."""
        y, x = np.nonzero(self.mask)
        return float(x.mean() + 0.5 + self.corner[0]) / self.shape[1], float(y.mean() + 0.5 + self.corner[1]) / self.shape[0]

    @cached_property
    def box(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 in fractions of the picture."""
        (rows, columns), (height, width) = self.spot, self.shape
        return columns.start / width, rows.start / height, columns.stop / width, rows.stop / height

    def distance(self, other: "Instance") -> float:
        """Between the nearest pixels of the two masks, in fractions of the longer side; 0 where they touch, negative where
        they overlap."""
        spots = [np.array([[side.start, side.stop] for side in o.spot]) for o in (self, other)]
        start, stop = np.minimum(*spots)[:, 0], np.maximum(*spots)[:, 1]
        outside = np.ones(stop - start, np.uint8)
        (top, left), (bottom, right) = (spots[1] - start[:, None]).T
        outside[top:bottom, left:right] -= other.mask
        (top, left), (bottom, right) = (spots[0] - start[:, None]).T
        away = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[top:bottom, left:right]
        return (float(away[self.mask > 0].min()) - 1) / max(self.shape)


def cut(category: str, mask: np.ndarray, crowd: bool, shape: tuple[int, int], corner=(0, 0), seen: float = 1.0) -> Instance:
    """The object of a mask (h, w), not empty, whose left upper corner lies at `corner` of a picture of `shape`."""
    x, y, width, height = cv2.boundingRect(mask)
    mask = mask[y : y + height, x : x + width].copy()
    return Instance(category, mask, (corner[0] + x, corner[1] + y), shape, crowd, seen)


@dataclass
class Picture:
    """An image, or a tile of one, with all its objects."""

    name: str  # of the image's file
    split: str
    instances: list[Instance]
    shape: tuple[int, int]  # H, W
    size: tuple[int, int]  # H, W of the image's file
    tile: tuple[int, int] | None = None  # the tile's left and top corner in the scaled image
    categories: list[str] = field(default_factory=list)  # all that the file has objects of
    unseen: int = 0  # annotations that cover no pixel


class InstancesFile:
    """A file in COCO's format, with its images in `folder`. UserError where it is not one, or an image is missing."""

    def __init__(self, path: Path, folder: Path):
        self.path, self.folder = path, folder
        content = read_json(path)
        try:
            self.images = content["images"]
            self.categories = {c["id"]: c["name"].replace("_", " ").replace("-", " ").lower() for c in content["categories"]}
            self.annotations = {image["id"]: [] for image in self.images}
            self.names = [Path(image["file_name"]).as_posix() for image in self.images]
            self.sizes = [(image["height"], image["width"]) for image in self.images]
            for what, values in (("id", [image["id"] for image in self.images]), ("file_name", self.names)):
                if twice := [value for value, count in Counter(values).items() if count > 1]:
                    raise UserError(f"several images of {path} have one {what} ({len(twice):,} times, {twice[0]} ...): give "
                                    "each its own")  # fmt: skip
            for a in content["annotations"]:
                if a["image_id"] not in self.annotations or a["category_id"] not in self.categories or not a["segmentation"]:
                    self._refuse(a)
                self.annotations[a["image_id"]].append(a | {"id": str(a["id"])})
        except (AttributeError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{path} is not a file of COCO instances ({reason}): give one with images, annotations and "
                            "categories") from None  # fmt: skip
        if missing := [name for name in self.names if not os.path.exists(folder / name)]:
            raise UserError(f"{len(missing):,} of {len(self.names):,} images of {path} are not in {folder} ({missing[0]} ...): "
                            "give their folder by --images")  # fmt: skip
        self.splits = self._splits()

    def _refuse(self, a: dict) -> None:
        """UserError for an annotation of no known image or category, or without a mask."""
        if not a["segmentation"]:
            problem, cure = "has no mask", "give one to each object, since a box alone names no pixels"
        else:
            what = "image_id" if a["image_id"] not in self.annotations else "category_id"
            problem, cure = f"has {what} {a[what]}, which the file doesn't list", "mend it or take it out"
        raise UserError(f"annotation {a['id']} of {self.path} {problem}: {cure}")

    def _splits(self) -> list[str]:
        """The split of each image: the file's own, or drawn."""
        given = [image["split"] for image in self.images if image.get("split")]
        if given and len(given) < len(self.images):
            raise UserError(f"{len(self.images) - len(given):,} of {len(self.images):,} images of {self.path} have no split: "
                            "give one to all of them or to none")  # fmt: skip
        drawn = {} if given else draw_splits(self.path, self.names)
        return [SPLITS.get(split.lower(), split) for split in given] or [drawn[name] for name in self.names]

    def samples(self, split: str, min_share: float) -> list[Sample]:
        """The objects of a split that cover min_share of their image, as targets without words (their phrase is "")."""
        found = []
        for image, name, size, where in zip(self.images, self.names, self.sizes, self.splits):
            for a in self.annotations[image["id"]] if where == split else []:
                area = a.get("area") or self._mask(a, name, size).sum()
                if area >= min_share * size[0] * size[1] and not a.get("iscrowd"):
                    found.append(self._sample(a, name, size, split))
        return found

    def _sample(self, annotation: dict, name: str, size: tuple[int, int], split: str) -> Sample:
        parts = annotation["segmentation"]
        return Sample(
            id=annotation["id"], split=split, image=str(self.folder / name), phrases=("",), kinds=("",),
            category=self.categories[annotation["category_id"]], size=size,
            mask=tuple(parts) if isinstance(parts, list) else (parts,),
        )  # fmt: skip

    def _mask(self, annotation: dict, name: str, size: tuple[int, int]) -> np.ndarray:
        try:
            mask = load_mask(self._sample(annotation, name, size, ""), size)
        except ValueError as error:
            raise UserError(f"annotation {annotation['id']} of {self.path}: {error}; mend it or take it out") from None
        return mask if mask.shape == size else cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)

    def pictures(self, tile: int | None = None, scale: float = 1.0) -> Iterator[Picture]:
        """Every image, or its tiles of tile x tile pixels that have objects, after scaling by `scale`."""
        used = {a["category_id"] for annotations in self.annotations.values() for a in annotations}
        categories = sorted({self.categories[number] for number in used})
        for image, name, size, split in zip(self.images, self.names, self.sizes, self.splits):
            instances, annotations = [], self.annotations[image["id"]]
            for a in annotations:
                mask = self._mask(a, name, size)
                if mask.any():
                    category = self.categories[a["category_id"]]
                    mask = scaled_mask(mask, scale)
                    instances.append(cut(category, mask, bool(a.get("iscrowd")), mask.shape))
            unseen = len(annotations) - len(instances)
            whole = Picture(name, split, instances, scaled(size, scale), size, None, categories, unseen)
            yield from [whole] if tile is None else tiles(whole, tile)


def scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def scaled_mask(mask: np.ndarray, scale: float) -> np.ndarray:
    """The mask (H, W), scaled; however small it gets, a pixel is left."""
    if scale == 1:
        return mask
    size = scaled(mask.shape, scale)[::-1]
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST_EXACT
    covered = cv2.resize(255 * mask, size, interpolation=way)
    if not covered.any():
        covered = cv2.resize(mask.astype(np.float32), size, interpolation=way)
    return (covered >= min(128, covered.max())).astype(np.uint8)


def tiles(whole: Picture, side: int) -> Iterator[Picture]:
    """The picture's tiles that have objects: all whole, side by side or, where they must, evenly overlapping."""
    tops, lefts = (np.linspace(0, max(0, size - side), -(-size // side)).astype(int).tolist() for size in whole.shape)
    unseen, shape = whole.unseen, (min(side, whole.shape[0]), min(side, whole.shape[1]))
    for top, left in itertools.product(tops, lefts):
        inside = []
        for o in whole.instances:
            x, y = o.corner[0] - left, o.corner[1] - top
            part = o.mask[max(0, -y) : max(0, shape[0] - y), max(0, -x) : max(0, shape[1] - x)]
            if part.any():
                inside.append(cut(o.category, part, o.crowd, shape, (max(0, x), max(0, y)), float(part.sum() / o.area)))
        if inside:
            yield Picture(whole.name, whole.split, inside, shape, whole.size, (left, top), whole.categories, unseen)
            unseen = 0  # counted once
