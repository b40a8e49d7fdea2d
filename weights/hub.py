"""Weights by the names a model hub has for them: foundation files, and checkpoints as OWNER/NAME[@REVISION][:FILE or FOLDER].

huggingface_hub keeps them in its cache, whose folder HF_HOME names; HF_ENDPOINT names a mirror.
"""

import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError

from runtime.errors import UserError
from runtime.hub import Unreachable, ask, failure, gigabytes, require_space

NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^:]+))?(:(?P<inside>.+))?")
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
TOKENIZERS = ("sentencepiece.bpe.model", "beit3.spm")
# What a folder of a checkpoint may hold its weights in: the first that is there is taken, with its shards.
WEIGHTS = ("best.pt", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class HubFile(NamedTuple):
    """A file of foundation weights on the hub."""

    repository: str
    names: tuple[str, ...]  # the first that the repository has
    option: str  # what takes it by hand
    size: float  # bytes, told where the hub can't be asked; 0: unknown

    def __str__(self) -> str:
        size = f", about {gigabytes(self.size)}" if self.size else ""
        return f"{self.repository} {self.names[0]}{size} (by hand: {self.option})"


def cached(file: HubFile) -> Path | None:
    """The file in the library's cache, or None."""
    paths = (try_to_load_from_cache(file.repository, name) for name in file.names)
    return next((Path(path) for path in paths if isinstance(path, str)), None)


def looked_up(file: HubFile) -> HubFile:
    """The file with the one name that its repository has it by, and its size there."""
    for name in file.names:
        try:
            metadata = get_hf_file_metadata(hf_hub_url(file.repository, name))
            return file._replace(names=(name,), size=metadata.size or 0)
        except EntryNotFoundError:
            if name == file.names[-1]:
                raise


def fetch(files: list[HubFile]) -> list[Path]:
    """The files' paths in the cache. What is missing there is told all at once, then downloaded; UserError."""
    missing = list(dict.fromkeys(file for file in files if cached(file) is None))
    if missing:
        what = f"weights are missing: {'; '.join(map(str, missing))}"
        missing = ask(lambda: [looked_up(file) for file in missing], what)
        size, cache = sum(file.size for file in missing), Path(constants.HF_HUB_CACHE)
        require_space(cache, size, f"downloading {'; '.join(map(str, missing))}")
        print(f"downloading weights from {constants.ENDPOINT} to {cache}:", *missing, sep="\n  ", flush=True)
        for file in missing:
            try:
                hf_hub_download(file.repository, file.names[0])
            except Exception as error:  # of three libraries
                raise failure(error, str(file)) from error
    return [cached(file) for file in files]


# Checkpoints ------------------------------------------------------------------------------------------------------------


def resolve(name: str | Path) -> Path:
    """The path of a checkpoint given as a path, or as OWNER/NAME[@REVISION][:FILE or FOLDER] on the hub; UserError.

    What exists here is a path, and so is a name in a folder that exists. What was downloaded once is found without network.
    """
    path, named = Path(name), NAME.fullmatch(str(name))
    if named is None or path.exists() or path.is_symlink():
        return path
    repository, revision, inside = named["repository"], named["revision"], named["inside"]
    if not revision and not inside and (path.parent.is_dir() or path.suffix in SUFFIXES):
        return path
    revision, inside = revision or "main", str(PurePosixPath(inside or ""))
    try:
        what = f"checkpoint {name}, which is no path here"
        info = ask(lambda: HfApi().model_info(repository, revision=revision, files_metadata=True), what)
    except Unreachable as error:
        return _in_cache(repository, revision, inside, name, error)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    files, chosen = checkpoint_files(list(sizes), inside, name)
    missing = [file for file in files if not isinstance(try_to_load_from_cache(repository, file, revision=info.sha), str)]
    if missing:
        size, cache = sum(sizes[file] for file in missing), Path(constants.HF_HUB_CACHE)
        require_space(cache, size, str(name))
        print(f"downloading {name}: {gigabytes(size)} of revision {info.sha} from {constants.ENDPOINT} to {cache}", flush=True)
    try:
        paths = [Path(hf_hub_download(repository, file, revision=revision)) for file in files]
    except Exception as error:  # of three libraries
        raise failure(error, str(name)) from error
    return paths[0].parents[files[0].count("/")] / chosen


def _in_cache(repository: str, revision: str, inside: str, name: str | Path, error: Unreachable) -> Path:
    """What `resolve` gave when the hub could be reached; the error where it never did."""
    try:
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except EntryNotFoundError:
        raise error from None
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return folder / checkpoint_files(names, inside, name)[1]


def commit_of(path: Path) -> str:
    """OWNER/NAME@COMMIT of a path in the cache, <models--OWNER--NAME>/snapshots/<commit>/..."""
    number = path.parts.index("snapshots")
    return f"{path.parts[number - 1].removeprefix('models--').replace('--', '/', 1)}@{path.parts[number + 1]}"


def checkpoint_files(names: list[str], inside: str, name: str | Path) -> tuple[list[str], str]:
    """(the files that a checkpoint needs, which of them or which folder to read) of the names in a repository; UserError.

    inside: a file or a folder of the repository, "." for its root; name: what an error calls it.
    """
    folder = PurePosixPath(inside).parent if inside in names else PurePosixPath(inside)
    here = [file for file in names if PurePosixPath(file).parent == folder]
    loose = [file for file in here if PurePosixPath(file).suffix in SUFFIXES]
    first = next((str(folder / file) for file in WEIGHTS if str(folder / file) in here), None)
    if inside in names:
        weights, chosen = [inside], inside
    elif first:
        stem, suffix = first.removesuffix(".index.json").rsplit(".", 1)
        shards = [file for file in loose if file.startswith(f"{stem}-") and file.endswith(suffix)]
        weights, chosen = [first, *shards * first.endswith(".index.json")], inside
    elif len(loose) == 1:
        weights, chosen = loose, loose[0]
    else:
        weights = [PurePosixPath(file) for file in names if PurePosixPath(file).suffix in SUFFIXES]
        known = {str(file if file.parent in (folder, PurePosixPath()) else file.parent) for file in weights}
        known = ", ".join(sorted(known)[:8]) or "none"
        raise UserError(f"{name} holds no checkpoint: name after a colon one of its files or folders with weights: {known}")
    beside = (str(folder / file) for file in ("config.json", *TOKENIZERS))
    return [*weights, *(file for file in beside if file in here and weights[0] != str(folder / "best.pt"))], chosen
