"""The layouts of data sets on disk: from index files to a list of samples.

The files in the folder decide between four (LAYOUTS below): RRSIS-D and other REFER-like sets, RefSegRS, RISBench, and a
plain one for data of your own. Index files are read without running code from them. Whatever is broken raises UserError.
"""

import io
import json
import os
import pickle
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from annotations.samples import Sample, clean_phrase, read_text
from annotations.spreadsheets import read_csv
from runtime.errors import UserError
from runtime.files import file_bytes

NAMES = ("RRSIS-D", "RefSegRS", "RISBench", "scenes")  # below ./data; so may be any other folder
RELATIVES = ("RRSIS-HR", "RemoteSAM-270K", "NWPU-Refer")  # of RRSIS-D, by the same layout
LAYOUTS = """
  RRSIS-D and relatives: rrsisd/refs(unc).p, rrsisd/instances.json, images/rrsisd/JPEGImages/*.jpg
  RefSegRS: output_phrase_<split>.txt ("<id> <phrase>" a line), images/<id>.tif, masks/<id>.tif
  RISBench: output_phrase_<split>.txt ("<file.png> <phrase>" a line), img_rgb/<file.png>, mask/<file.png>
  your own: phrases.csv (columns image,mask,phrase,split), images/, masks/"""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")


# Each reader returns the samples of all splits and opens no image.


class PlainUnpickler(pickle._Unpickler):
    """Loads dicts, lists, strings and numbers; whatever names a class or a function, and so could run code, is refused.

    It is the Python version of the class, without byte arrays: elsewhere a claimed length alone reserves memory."""

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}

    def find_class(self, module, name):
        raise ValueError(f"it asks for {module}.{name}, which phrases don't need and which could run code")


def read_json(path: Path):
    def refuse(constant):
        raise ValueError(f"it holds {constant}")
    try:
        return json.loads(read_text(path), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not sound JSON ({error}): get it again from its source.") from None


def read_pickle(path: Path) -> list:
    data = io.BytesIO(file_bytes(path))
    try:
        refs = PlainUnpickler(data, encoding="utf-8").load()
        if not isinstance(refs, list):
            raise ValueError(f"it holds {type(refs).__name__}, not a list")
        return refs
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"{path} is not read ({reason}): get it again from its source.") from None


def read_refer(refs_file: Path) -> list[Sample]:
    """RRSIS-D and relatives: refs(unc).p with the phrases, instances.json with the masks."""
    instances_file = refs_file.with_name(refs_file.name.replace("refs(unc).p", "instances.json"))
    refs, instances = read_pickle(refs_file), read_json(instances_file)
    samples, where = [], str(instances_file)
    try:
        images = {image["id"]: image for image in instances["images"]}
        categories = {category["id"]: category["name"] for category in instances.get("categories", [])}
        annotations = {}
        for annotation in instances["annotations"]:
            if annotations.setdefault(annotation["id"], annotation) != annotation:
                raise ValueError(f"two different annotations have id {annotation['id']}")
        for number, ref in enumerate(refs):
            where = f"{refs_file}, ref number {number}"
            samples.append(refer_sample(ref, images, annotations, categories, where))
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        raise UserError(f"{where} is not as in RRSIS-D ({reason}): mend the file or get it again.") from None
    if twice := [id for id, n in Counter(sample.id for sample in samples).items() if n > 1]:
        raise UserError(f"{refs_file} has a ref_id more than once ({', '.join(twice[:5])}): make them unique.")

    # The images lie in <root>/images/rrsisd/JPEGImages or, for relatives, somewhere like it: where most are found.
    folder, names = refs_file.parent, {sample.image for sample in samples}
    below = (f"{folder.name}/JPEGImages", folder.name, "JPEGImages", "")
    folders = [parent / "images" / name for parent in (folder.parent, folder) for name in below] + [folder]
    images = max(filter(Path.is_dir, folders), key=lambda path: len(names.intersection(os.listdir(path))))
    return [replace(sample, image=os.path.join(images, sample.image)) for sample in samples]


def refer_sample(ref: dict, images: dict, annotations: dict, categories: dict, where: str) -> Sample:
    parts, category = [], ref.get("category_id")
    for ann_id in ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]:
        if ann_id in (None, -1):  # how relatives say that the phrase has no target in the image
            continue
        if ann_id not in annotations:
            raise ValueError(f"annotation {ann_id} is not among the instances")
        annotation = annotations[ann_id]
        segmentation = annotation["segmentation"]  # a list with one RLE (RRSIS-D), an RLE, or a list of polygons
        parts += segmentation if isinstance(segmentation, list) else [segmentation]
        category = annotation.get("categories_id", annotation.get("category_id", category))
    if not all(isinstance(part, (dict, list)) for part in parts):
        raise ValueError("a segmentation is neither RLE nor polygons")
    if not isinstance(ref["ref_id"], (int, str)) or not ref["sentences"]:
        raise ValueError("no ref_id or no sentences")
    image = images.get(ref["image_id"], {})
    file = image.get("file_name") or ref["file_name"]
    if not isinstance(file, str):
        raise ValueError("a file_name is no text")
    kinds = (sentence.get("kind") for sentence in ref["sentences"])
    return Sample(
        id=str(ref["ref_id"]), split=sys.intern(ref["split"]), image=file,
        phrases=tuple(clean_phrase(s.get("raw") or s.get("sent"), where) for s in ref["sentences"]),
        kinds=tuple(kind if isinstance(kind, str) else "" for kind in kinds),
        category=str(categories.get(category, "")), mask=tuple(parts),
        size=(int(image["height"]), int(image["width"])) if "height" in image and "width" in image else None)


def read_phrase_lists(root: Path, lists: list[Path]) -> list[Sample]:
    """RefSegRS (ids without a suffix) and RISBench (file names); lines with the same id are one sample."""
    images, masks = files_by_id(root, "img_rgb", "images"), files_by_id(root, "mask", "masks")
    samples = []
    for path in lists:
        phrases = {}
        # Not splitlines(), which also cuts phrases at Unicode's rarer line separators.
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            if line.strip():
                id, _, phrase = line.strip().partition(" ")
                phrases.setdefault(id, []).append(clean_phrase(phrase, f"{path}, line {number}"))
        for id, texts in phrases.items():
            bare = not id.lower().endswith(IMAGE_SUFFIXES)
            name = id if bare else os.path.splitext(id)[0]
            image, mask = (files.get(id) or files.get(name) or os.path.join(files[""], id) for files in (images, masks))
            samples.append(Sample(
                id, path.stem.removeprefix("output_phrase_"), image, tuple(texts), kinds=("",) * len(texts),
                category="", mask=mask, threshold=50 if bare else 0))  # the rules of RefSegRS and of RISBench
    return samples


def files_by_id(root: Path, *names: str) -> dict[str, str]:
    """{file name with and without suffix: path} of the images in the folder that is there; the folder itself as ''."""
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        raise UserError(f"{root} has phrase lists but no folder {' or '.join(names)}: put it beside them.{LAYOUTS}")
    files = sorted(name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES))
    files = {os.path.splitext(name)[0]: name for name in files} | {name: name for name in files} | {"": ""}
    return {id: os.path.join(folder, name) for id, name in files.items()}


def read_samples(data: str | Path) -> tuple[str, Path, list[Sample]]:
    """(name, root, samples of all splits) of a data set given by its name, a folder of ./data, or by its folder's path."""
    root, named = Path(data), Path("data", data)
    try:
        if data in NAMES or root.parent == Path() and named.is_dir() and not root.is_dir():
            root = named
        if not root.is_dir():
            remedy = "put the data set there" if data in NAMES else f"give a folder or one of {', '.join(NAMES)}"
            raise UserError(f"There is no folder {root}: {remedy}.{LAYOUTS}")
        inside = ", ".join(sorted(os.listdir(root))[:8]) or "nothing"
        refs = sorted([*root.glob("*refs(unc).p"), *root.glob("*/*refs(unc).p")])
        lists = sorted([*root.glob("output_phrase_*.txt"), *root.glob("phrase_txts/output_phrase_*.txt")])
        if len(refs) > 1 or len({path.name for path in lists}) < len(lists):
            raise UserError(f"{root} has the same twice ({', '.join(map(str, refs or lists))}): leave one.")
        if refs:
            samples = read_refer(refs[0])
        elif lists:
            samples = read_phrase_lists(root, lists)
        elif (root / "phrases.csv").exists():
            samples = read_csv(root / "phrases.csv")
        else:
            for folder in filter(Path.is_dir, root.iterdir()):
                os.listdir(folder)  # one that may not be entered looks empty to glob
            raise UserError(f"{root} holds {inside}, no data set known here: lay it out in one of these ways.{LAYOUTS}")
    except OSError as error:
        raise UserError(f"{error.filename or root} can't be read ({error.strerror or error}): see to it.") from None
    name = data if data in NAMES else root.resolve().name
    ours = any(sample.kinds[0] for sample in samples)  # generated scenes say the kind of each phrase
    if refs and refs[0].parent.name == "rrsisd" and name not in RELATIVES and not ours:
        name = "RRSIS-D"
    return name, root, samples


def missing_files(samples: list[Sample]) -> dict[str, list[int]]:
    """{path of a file that isn't there: [its samples' numbers in `samples`]}; one look into each folder."""
    inside, missing = {}, {}
    for number, sample in enumerate(samples):
        for path in (sample.image, sample.mask) if isinstance(sample.mask, str) else (sample.image,):
            folder, name = os.path.split(path)
            if folder not in inside:
                try:
                    inside[folder] = set(os.listdir(folder))
                except PermissionError as error:
                    raise UserError(f"{folder} can't be read ({error.strerror}): see to it.") from None
                except (OSError, ValueError):  # no such folder, or NUL in its name
                    inside[folder] = set()
            if name not in inside[folder]:
                missing.setdefault(path, []).append(number)
    return missing
