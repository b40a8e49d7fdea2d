"""What predict.py is to find: phrases for images, folders of images, and the rows of spreadsheets."""

from pathlib import Path

from annotations.layouts import IMAGE_SUFFIXES
from annotations.spreadsheets import read_rows
from imagery.results import Job
from runtime.errors import UserError


def find_jobs(paths: list[Path], phrases: list[str]) -> list[Job]:
    """A job for every phrase and every image, and for the rows of CSV files. Of several paths, one that can't be had is a job
    with a fault. UserError where there is nothing to do."""
    lists = [path for path in paths if path.suffix.lower() == ".csv"]
    if phrases and len(lists) == len(paths):
        raise UserError("A CSV has phrases of its own: leave out --phrase, or name images too.")
    if not phrases and len(lists) < len(paths):
        raise UserError("There is nothing to find: give the images a --phrase, or name a CSV with rows image,phrase.")
    wanted, faults = [], []
    for path in paths:
        if path in lists and path.is_file():
            wanted += read_list(path)
            continue
        files, fault = [path], ""
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            fault = "" if files else f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)}): name another folder."
        elif not path.exists():
            fault = f"There is no image, folder or CSV {path}: check the name."
        faults += [fault] if fault else []
        wanted += [(file, phrase, fault) for file in files or [path] for phrase in phrases or [""]]
    if len(faults) == len(paths):
        raise UserError(faults[0])
    if not wanted:
        raise UserError(f"{', '.join(map(str, paths))} has no rows: write image,phrase and what to find below it.")
    by_image = {}  # an image is opened once, for all its phrases
    for image, phrase, fault in wanted:
        by_image.setdefault(image, []).append((phrase, fault))
    return [Job(i, phrase, n, fault) for i, rows in by_image.items() for n, (phrase, fault) in enumerate(rows, start=1)]


def read_list(path: Path) -> list[tuple[Path, str, str]]:
    """(image, phrase, fault) of each row of a CSV with the columns image and phrase; paths from the CSV's folder."""
    rows = []
    for line, row, whole in read_rows(path, ("image", "phrase")):
        fault = f"{path}, line {line}: the row has not the fields of the first line: quote phrases with commas."
        image = row.get("image", "").replace("\\", "/")
        rows.append((path.parent / image, row.get("phrase", ""), "" if whole and image else fault))
    return rows
