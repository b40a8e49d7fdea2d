"""The layouts of data sets on disk: from index files to a list of samples.

The files in the folder decide between four (LAYOUTS below): RRSIS-D and other REFER-like sets, RefSegRS, RISBench, and a
plain one for data of your own. Index files are read without running code from them. Whatever is broken raises UserError.
"""

import io
import json
import os
import pickle
import re
import sys
from collections import Counter
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
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".jp2", ".j2k")


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
    data = file_bytes(path)
    converted = data.count(b"\n") == data.count(b"\r\n") > 0
    try:
        if converted and not data.startswith(b"\x80"):  # one of text would load, with "\r" at the end of every string
            raise ValueError
        refs = PlainUnpickler(io.BytesIO(data), encoding="utf-8").load()
        if not isinstance(refs, list):
            raise ValueError(f"it holds {type(refs).__name__}, not a list")
        return refs
    except Exception as error:  # a damaged pickle can raise nearly anything
        if converted:
            raise UserError(f"{path} had its line ends converted on the way here: get it again, in binary mode.") from None
        if isinstance(error, UnicodeDecodeError) and not data.startswith((b"\x80\x03", b"\x80\x04", b"\x80\x05")):
            raise UserError(f"{path} is a pickle of Python 2 whose text is not UTF-8: load it with encoding='latin1' and "
                            "pickle it again.") from None
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"{path} is not read ({reason}): get it again from its source.") from None


def read_refer(refs_file: Path) -> list[Sample]:
    """RRSIS-D and relatives: refs(unc).p with the phrases, instances.json with the masks."""
    instances_file = refs_file.with_name(re.sub(r"refs\([^)]*\)\.p$", "instances.json", refs_file.name))
    refs, instances = read_pickle(refs_file), read_json(instances_file)
    names, samples, where = [], [], str(instances_file)
    try:
        images = {image["id"]: image for image in instances["images"]}
        categories = {category["id"]: category["name"] for category in instances.get("categories", [])}
        annotations = {}
        for annotation in instances["annotations"]:
            if annotations.setdefault(annotation["id"], annotation) != annotation:
                raise ValueError(f"two different annotations have id {annotation['id']}")
        for number, ref in enumerate(refs):
            where = f"{refs_file}, ref number {number}"
            names.append(images.get(ref["image_id"], {}).get("file_name") or ref["file_name"])
            if not isinstance(names[-1], str):
                raise ValueError("a file_name is no text")
        folder = image_folder(refs_file, set(names))
        for number, (ref, name) in enumerate(zip(refs, names)):
            where = f"{refs_file}, ref number {number}"
            image = images.get(ref["image_id"], {})
            samples.append(refer_sample(ref, os.path.join(folder, name), image, annotations, categories, where))
    except SegmentationError as error:
        raise UserError(f"{instances_file}: {error}.") from None
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        raise UserError(f"{where} is not as in RRSIS-D ({reason}): mend the file or get it again.") from None
    if twice := [id for id, n in Counter(sample.id for sample in samples).items() if n > 1]:
        raise UserError(f"{refs_file} has a ref_id more than once ({', '.join(twice[:5])}): make them unique.")
    return samples


def image_folder(refs_file: Path, names: set[str]) -> Path:
    """<root>/images/rrsisd/JPEGImages or, for relatives, somewhere like it: where most of the images are found."""
    folder, by_folder = refs_file.parent, {}
    for path in names:
        by_folder.setdefault(os.path.dirname(path), set()).add(os.path.basename(path))

    def found(parent):
        inside = ((parent / below, files) for below, files in by_folder.items())
        return sum(len(files.intersection(os.listdir(path))) for path, files in inside if path.is_dir())

    below = (f"{folder.name}/JPEGImages", folder.name, "JPEGImages", "")
    tried = [parent / "images" / name for parent in (folder.parent, folder) for name in below]
    tried += [folder / "JPEGImages", folder.parent / "JPEGImages", folder]
    numbers = {path: found(path) for path in tried}
    if names and not any(numbers.values()):
        archives = [path for parent in {folder, folder.parent} for path in packed(parent)]
        remedy = f"unpack {archives[0]}" if archives else "put them into one"
        raise UserError(f"None of the {len(names):,} images of {refs_file} (such as {min(names)}) is in one of the folders "
                        f"{', '.join(map(str, tried))}: {remedy}.")
    return max(tried, key=numbers.get)


class SegmentationError(Exception):
    """A mask that is written in a way not read here."""


def mask_parts(annotation: dict) -> list:
    """RLEs and polygons of an annotation: its segmentation is a list with one RLE (RRSIS-D), an RLE, or a list of polygons."""
    parts = annotation.get("segmentation") or []
    parts = parts if isinstance(parts, list) else [parts]
    fault = "" if parts else "an empty segmentation: write its mask, or give a phrase without a target ann_id -1"
    for part in parts:
        if isinstance(part, (int, float)):
            fault = "a list of numbers for its polygons: write a list of lists, [[x0, y0, x1, y1, ...]]"
        elif isinstance(part, list) and part and isinstance(part[0], list):
            fault = "a polygon of pairs: write it as [x0, y0, x1, y1, ...]"
        elif not isinstance(part, (dict, list)):
            fault = "a segmentation that is neither RLE nor polygons: mend it"
    if fault:
        raise SegmentationError(f"annotation {annotation['id']} has {fault}")
    return parts


def refer_sample(ref: dict, path: str, image: dict, annotations: dict, categories: dict, where: str) -> Sample:
    parts, category = [], ref.get("category_id")
    for ann_id in ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]:
        if ann_id in (None, -1):  # how relatives say that the phrase has no target in the image
            continue
        if ann_id not in annotations:
            raise ValueError(f"annotation {ann_id} is not among the instances")
        annotation = annotations[ann_id]
        parts += mask_parts(annotation)
        category = annotation.get("categories_id", annotation.get("category_id", category))
    if not isinstance(ref["ref_id"], (int, str)) or not ref["sentences"]:
        raise ValueError("no ref_id or no sentences")
    kinds = (sentence.get("kind") for sentence in ref["sentences"])
    return Sample(
        id=str(ref["ref_id"]), split=sys.intern(ref["split"]), image=path,
        phrases=tuple(clean_phrase(s.get("raw") or s.get("sent"), where) for s in ref["sentences"]),
        kinds=tuple(kind if isinstance(kind, str) else "" for kind in kinds),
        category=str(categories.get(category, "")), mask=tuple(parts),
        size=(int(image["height"]), int(image["width"])) if "height" in image and "width" in image else None,
        annotation=ref["ann_id"])


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


def is_test(split: str) -> bool:
    """test, testA, test-2 ... but not latest, which the published loader takes too."""
    return re.match("test(?![a-z])", split) is not None


def read_samples(data: str | Path) -> tuple[str, Path, list[Sample]]:
    """(name, root, samples of all splits) of a data set given by its name, a folder of ./data, or by its folder's path."""
    root, named = Path(data), Path("data", data)
    try:
        if data in NAMES or root.parent == Path() and named.is_dir() and not root.is_dir():
            root = named
        if not root.is_dir():
            raise UserError(no_folder(root, data in NAMES))
        refs, lists, tables = index_files(root)
        if len(refs) > 1 or len({path.name for path in lists}) < len(lists):
            raise UserError(f"{root} has more than one list of phrases ({', '.join(map(str, refs or lists))}): leave one.")
        if refs:
            samples = read_refer(refs[0])
        elif lists:
            samples = read_phrase_lists(root, lists)
        elif tables:
            samples = read_csv(tables[0])
        else:
            raise UserError(no_data_set(root))
    except OSError as error:
        raise UserError(f"{error.filename or root} can't be read ({error.strerror or error}): see to it.") from None
    name = data if data in NAMES else root.resolve().name
    ours = any(sample.kinds[0] for sample in samples)  # generated scenes say the kind of each phrase
    if refs and refs[0].parent.name == "rrsisd" and name not in RELATIVES and not ours:
        name = "RRSIS-D"
    return name, root, samples


def index_files(root: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """The files that say which samples there are: of RRSIS-D and relatives, of lists of phrases, of data of your own."""
    refs = sorted([*root.glob("*refs(*).p"), *root.glob("*/*refs(*).p")])
    lists = sorted([*root.glob("output_phrase_*.txt"), *root.glob("phrase_txts/output_phrase_*.txt")])
    return refs, lists, sorted(root.glob("phrases.csv"))


def packed(folder: Path) -> list[Path]:
    """The archives in a folder."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in (".zip", ".tar", ".tgz", ".gz", ".7z", ".rar"))


def no_folder(root: Path, known: bool) -> str:
    """What to say where `root` is no folder; `known`: it is the folder of a data set known by its name."""
    beside = packed(root.parent) if root.parent.is_dir() else []
    archives = [root] if root.is_file() else [path for path in beside if path.name.startswith(f"{root.name}.")]
    if archives:
        return f"{archives[0]} is no folder: unpack it and give the folder that comes out."
    remedy = "put the data set there" if known else f"give a folder or one of {', '.join(NAMES)}"
    return f"There is no folder {root}: {remedy}.{LAYOUTS}"


def no_data_set(root: Path) -> str:
    """What to say of a folder without the index files of a data set: they may lie deeper, or in an archive."""
    inside = sorted(root.iterdir())
    for folder in filter(Path.is_dir, inside):
        os.listdir(folder)  # one that may not be entered looks empty to glob
        if any(index_files(folder)):
            return f"{root} holds no data set, but its folder {folder} does: give that one."
    if archives := packed(root):
        return f"{root} holds no data set, but {archives[0].name}: unpack it there."
    listed = ", ".join(path.name for path in inside[:8]) or "nothing"
    return f"{root} holds {listed}, no data set known here: lay it out in one of these ways.{LAYOUTS}"


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
