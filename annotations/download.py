"""`python data.py --download NAME`: data sets by name, from a hub where they lie on one, into ./data/NAME.

Files are fetched into data/NAME.part, each gone on with where an earlier try stopped and compared with the hub's SHA-256,
unpacked there, and the folder renamed when all is in it. Of sets that lie elsewhere the address is told.
"""

import hashlib
import os
import re
import shutil
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from runtime.errors import UserError
from runtime.hub import ask, failure, gigabytes, require_space


@dataclass(frozen=True)
class Source:
    """Where a data set lies, and on what terms."""

    licence: str
    address: str = ""  # of the authors' page
    note: str = ""  # told before anything is fetched
    repository: str = ""  # of a hub; "": it lies elsewhere
    revision: str | None = None  # a commit, where one is known to be right
    files: dict[str, str] = field(default_factory=dict)  # each file's folder below data/NAME; a zip's content goes there
    layout: str = ""  # what to put where, for a set that lies elsewhere


REFER = "refs(unc).p and instances.json in rrsisd/, the images in images/rrsisd/JPEGImages/"
SOURCES = {
    "RefSegRS": Source(
        "CC-BY-4.0", repository="JessicaYuan/RefSegRS", files={"RefSegRS.zip": ""}, note="the authors' own repository",
    ),
    "RRSIS-D": Source(
        "none stated; images from DIOR, CC BY-NC 4.0", "https://github.com/Lsan2401/RMSIN", repository="VoyageWang/rrsis-d",
        note="a third party's mirror, not the authors': their folder is named in the README of https://github.com/Lsan2401/RMSIN",
        files={"refs(unc).p": "rrsisd", "instances.json": "rrsisd", "JPEGImages.zip": "images/rrsisd/JPEGImages"},
    ),
    "RISBench": Source(
        "CC-BY-4.0 by its README; its images come from DOTA (academic use) and DIOR (non-commercial use)",
        "https://github.com/HIT-SIRS/CroBIM", layout="output_phrase_{train,val,test}.txt, img_rgb/ and mask/",
    ),
    "NWPU-Refer": Source(
        "none stated", "the README of its authors' repository (Baidu)",
        layout=REFER.replace("refs(", "new_refs(").replace("inst", "new_inst"),
    ),
    "RRSIS-HR": Source("none stated", "the README of its authors' repository (Baidu, OneDrive)", layout=REFER),
    "RemoteSAM-270K": Source(
        "CC-BY-NC-4.0", "https://huggingface.co/datasets/1e12Leon/RemoteSAM_270K (about 184 GB)",
        layout="refs(unc).p, instances.json and JPEGImages/ side by side",
    ),
}  # fmt: skip


def licence_of(data: str | Path | None) -> str:
    """The licence of a data set given by name or path, as far as it is known."""
    name = Path(data).name if data else ""
    if name == "scenes":
        return "none needed, they are generated"
    return SOURCES[name].licence if name in SOURCES else "not known here"


def download(name: str, root: Path = Path("data")) -> Path | None:
    """Fetch a data set into root/name -> that folder; None for one that lies elsewhere, whose address is printed. UserError."""
    if name not in SOURCES:
        raise UserError(f"there is no way known here to get {name!r}: name one of {', '.join(SOURCES)}")
    source, target, part = SOURCES[name], root / name, root / f"{name}.part"
    if not source.repository:
        print(f"{name} can't be fetched by this program.\n  address: {source.address}\n  licence: {source.licence}\n"
              f"  make the folder {target} with {source.layout}, then: python data.py --check {name}")  # fmt: skip
        return None
    if target.exists():
        raise UserError(f"{target} exists, nothing is overwritten: look at it by `python data.py --check {name}`, or move it")
    try:
        sizes, commit = look_up(name, source)
        left = sum(size for file, size in sizes.items() if not (part / local_name(file)).exists())
        print(f"{name}: {', '.join(sizes)} ({gigabytes(sum(sizes.values()))}) from {constants.ENDPOINT}/datasets/"
              f"{source.repository}, revision {commit}\n  {source.note}\n  licence: {source.licence}", flush=True)  # fmt: skip
        require_space(root, left + sum(size for file, size in sizes.items() if file.endswith(".zip")), name)
        part.mkdir(parents=True, exist_ok=True)
        for file in sizes:
            fetch(source.repository, file, commit, part)
        shutil.rmtree(part / "whole", ignore_errors=True)  # of an unpacking that was interrupted
        for file, folder in source.files.items():
            put(part / local_name(file), part / "whole" / folder)
        (part / "whole" / "SOURCE.txt").write_text(f"{source.repository}, revision {commit}\nlicence: {source.licence}\n")
        os.replace(part / "whole", target)
    except KeyboardInterrupt:
        raise UserError(f"interrupted: the same command goes on where it stopped, {part} keeps what is there", 130) from None
    except OSError as error:
        raise UserError(f"{error.filename or part} can't be written ({error.strerror or error}): see to it", 1) from error
    shutil.rmtree(part)
    return target


def look_up(name: str, source: Source) -> tuple[dict[str, int], str]:
    """({file of the data set: its size in bytes}, the revision's commit) as the hub has them; UserError."""
    api, what = HfApi(), f"data set {name} ({source.repository})"
    info = ask(lambda: api.dataset_info(source.repository, revision=source.revision, files_metadata=True), what)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    if missing := [file for file in source.files if file not in sizes]:
        raise UserError(f"{what} has no {missing[0]} any more, it has {', '.join(list(sizes)[:8])}: fetch it by hand")
    return {file: sizes[file] for file in source.files}, info.sha


def local_name(file: str) -> str:
    return PurePosixPath(file).name


def fetch(repository: str, file: str, commit: str, folder: Path) -> None:
    """One file of a data set's repository, whole or not at all; what an earlier try left is gone on with. UserError."""
    if (folder / local_name(file)).exists():
        return
    url = hf_hub_url(repository, file, repo_type="dataset", revision=commit)
    metadata = ask(lambda: get_hf_file_metadata(url), file)
    part = folder / f"{metadata.etag}.part"  # of this content, should the hub's have changed
    with open(part, "ab") as content:
        try:
            options = {"expected_size": metadata.size, "displayed_filename": file, "headers": build_hf_headers()}
            http_get(url, content, resume_size=content.tell(), **options)
        except Exception as error:  # of three libraries
            if getattr(error, "errno", None):
                raise
            got = f"{file}, after {gigabytes(content.tell())} of {gigabytes(metadata.size or 0)}"
            raise failure(error, f"{got} (the same command goes on there)") from error
    if re.fullmatch("[0-9a-f]{64}", metadata.etag) and sha256(part) != metadata.etag:
        part.unlink()
        raise UserError(f"{file} arrived damaged (its SHA-256 is not the hub's): run the same command again", exit_code=1)
    os.replace(part, folder / local_name(file))


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def put(file: Path, folder: Path) -> None:
    """Put a file into a folder; of a zip its content, without the folders that all of it lies in. UserError."""
    if file.suffix != ".zip":
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, folder)
        return
    unpacked = file.with_suffix("")
    shutil.rmtree(unpacked, ignore_errors=True)
    unpack(file, unpacked)
    while len(inside := list(unpacked.iterdir())) == 1 and inside[0].is_dir():
        unpacked = inside[0]
    folder.parent.mkdir(parents=True, exist_ok=True)
    os.replace(unpacked, folder)


def unpack(file: Path, folder: Path) -> None:
    """Unpack a zip into a new folder; UserError for one that is damaged, too large, or has entries that leave the folder."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [entry for entry in archive.infolist() if not entry.filename.startswith("__MACOSX/")]
            for entry in entries:
                if re.match(r"[/\\]|[A-Za-z]:", entry.filename) or ".." in re.split(r"[/\\]", entry.filename):
                    raise UserError(f"{file} has an entry that leaves its folder, {entry.filename!r}: nothing was unpacked")
            require_space(folder.parent, sum(entry.file_size for entry in entries), f"unpacking {file.name}")
            archive.extractall(folder, entries)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise UserError(f"{file} is no zip that can be unpacked ({error}): move it away and run the command again", 1) from None
