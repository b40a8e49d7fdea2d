"""Objects of images with their masks, from a file in COCO's format; large images can be scaled and cut into tiles."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np

from annotations.layouts import read_json
from annotations.masks import load_mask
from annotations.samples import Sample
from runtime.errors import UserError

DRAWN = {"train": 0.8, "val": 0.1, "test": 0.1}  # shares of the images, where the file names no splits


@dataclass
class Instance:
    """An object of a picture."""

    category: str
    mask: np.ndarray  # (H, W) uint8 of 0/1, not empty
    crowd: bool = False  # several objects in one mask
    seen: float = 1.0  # the share of its pixels that lies in the picture; the rest is beyond a tile's border

    @cached_property
    def area(self) -> int:
        return int(self.mask.sum())

    @cached_property
    def centre(self) -> tuple[float, float]:
        """(x, y), the mask's centroid in fractions of the picture."""
        height, width = self.mask.shape
        y, x = np.nonzero(self.mask)
        return float(x.mean() + 0.5) / width, float(y.mean() + 0.5) / height

    @cached_property
    def box(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 in fractions of the picture."""
        height, width = self.mask.shape
        x, y, w, h = cv2.boundingRect(self.mask)
        return x / width, y / height, (x + w) / width, (y + h) / height


@dataclass
class Picture:
    """An image, or a tile of one, with all its objects."""

    name: str  # of the image's file
    split: str
    instances: list[Instance]
    shape: tuple[int, int]  # H, W
    tile: tuple[int, int] | None = None  # the tile's left and top corner in the scaled image
    categories: list[str] = field(default_factory=list)  # all that the file knows


class InstancesFile:
    """A file in COCO's format, with its images in `folder`. UserError where it is not one, or an image is missing."""

    def __init__(self, path: Path, folder: Path, seed: int = 0):
        self.path, self.folder, self.seed = path, folder, seed
        content = read_json(path)
        try:
            self.images = content["images"]
            self.categories = {c["id"]: c["name"].replace("_", " ").replace("-", " ").lower() for c in content["categories"]}
            self.annotations = {image["id"]: [] for image in self.images}
            for annotation in content["annotations"]:
                self.annotations[annotation["image_id"]].append(annotation)
                self.categories[annotation["category_id"]], annotation["segmentation"], annotation["id"]
            names = [Path(image["file_name"]) for image in self.images]
            sizes = [(image["height"], image["width"]) for image in self.images]
        except (AttributeError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{path} is not a file of COCO instances ({reason}): give one with images, annotations and "
                            "categories") from None  # fmt: skip
        self.names, self.sizes = [name.as_posix() for name in names], sizes
        if missing := [name for name in self.names if not os.path.exists(folder / name)]:
            raise UserError(f"{len(missing):,} of {len(names):,} images of {path} are not in {folder} ({missing[0]} ...): "
                            "give their folder by --images")  # fmt: skip
        self.splits = self._splits()

    def _splits(self) -> list[str]:
        """The split of each image: the file's own, or drawn."""
        if all(image.get("split") for image in self.images):
            return [image["split"] for image in self.images]
        drawn = np.random.default_rng(self.seed).choice(list(DRAWN), size=len(self.images), p=list(DRAWN.values()))
        return drawn.tolist()

    def samples(self, split: str, min_share: float) -> list[Sample]:
        """The objects of a split that cover min_share of their image, as targets without words (their phrase is "")."""
        found = []
        for image, name, (height, width), where in zip(self.images, self.names, self.sizes, self.splits):
            for a in self.annotations[image["id"]] if where == split else []:
                if a.get("area", 0) >= min_share * height * width and not a.get("iscrowd"):
                    found.append(self._sample(a, name, (height, width), split))
        return found

    def _sample(self, annotation: dict, name: str, size: tuple[int, int], split: str) -> Sample:
        parts = annotation["segmentation"]
        return Sample(
            id=str(annotation["id"]), split=split, image=str(self.folder / name), phrases=("",), kinds=("",),
            category=self.categories[annotation["category_id"]], size=size,
            mask=tuple(parts) if isinstance(parts, list) else (parts,),
        )  # fmt: skip

    def pictures(self, tile: int | None = None, scale: float = 1.0) -> Iterator[Picture]:
        """Every image that has objects, or its tiles of tile x tile pixels after scaling by `scale`."""
        for image, name, size, split in zip(self.images, self.names, self.sizes, self.splits):
            instances = []
            for a in self.annotations[image["id"]]:
                try:
                    mask = load_mask(self._sample(a, name, size, split), size)
                except ValueError as error:
                    raise UserError(f"annotation {a['id']} of {self.path}: {error}; mend it or take it out") from None
                if scale != 1:
                    mask = cv2.resize(mask, scaled(size, scale)[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
                if mask.any():
                    instances.append(Instance(self.categories[a["category_id"]], mask, bool(a.get("iscrowd"))))
            whole = Picture(name, split, instances, scaled(size, scale), None, sorted(set(self.categories.values())))
            yield from [whole] if tile is None else tiles(whole, tile)


def scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def tiles(whole: Picture, side: int) -> Iterator[Picture]:
    """The picture's tiles that have objects, side by side from the upper left; a remainder under half a tile is left out."""
    height, width = whole.shape
    for top in range(0, max(1, height - side // 2), side):
        for left in range(0, max(1, width - side // 2), side):
            spot, inside = np.s_[top : top + side, left : left + side], []
            for o in whole.instances:
                if (part := o.mask[spot]).any():
                    inside.append(Instance(o.category, np.ascontiguousarray(part), o.crowd, float(part.sum() / o.area)))
            shape = min(side, height - top), min(side, width - left)
            if inside:
                yield Picture(whole.name, whole.split, inside, shape, (left, top), whole.categories)
