"""From image and phrase to mask: the three lines of Python, and the command line as people use it."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_raster import ramps, write_tiff
from test_tiles import Known, red, red_mask

import predict as command
from data import open_dataset
from evaluate import score
from layouts import DataError
from model import PRESETS, RS2SAM2
from overlay import SmallMask, font_for, overlay, wrapped
from predict import find_jobs, slug, stems
from scenes import make_scenes
from tiles import cut_note, segment

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    """A checkpoint as train.py writes it, of a tiny model with random weights, set to find about half of an image."""
    torch.manual_seed(0)
    model = RS2SAM2(dataclasses.replace(PRESETS["tiny"], image_size=64)).eval()
    with (
        torch.no_grad()
    ):  # the mask's hypernetwork ends in random weights around 0: louder, so that masks are not empty
        for layer in model.mask_decoder.output_hypernetworks_mlps[0].layers[-1:]:
            layer.weight *= 30
    facts = {"tokenizer": None, "model_name": "tiny", "data": "scenes", "revision": "", "epoch": 0}
    path = tmp_path_factory.mktemp("ckpt") / "best.pt"
    torch.save({"preset": dataclasses.asdict(model.preset), "model": model.state_dict()} | facts, path)
    return path


@pytest.fixture(scope="module")
def model(ckpt) -> RS2SAM2:
    return RS2SAM2.load(ckpt, "cpu")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("data") / "scenes", train=1, val=3, test=0, size=96, progress=False)


@pytest.fixture
def picture(tmp_path) -> Path:
    """Smooth colours, 90 x 120."""
    y, x = np.mgrid[:90, :120]
    pixels = np.stack([x * 2, y * 2, 255 - x], axis=2).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "plane.png")
    return tmp_path / "plane.png"


@pytest.fixture
def run(ckpt, monkeypatch, capsys):
    """The command line without a process of its own: run(*args, code=0) -> (stdout, stderr)."""

    def run(*args, ckpt=ckpt, code=0):
        monkeypatch.setattr(sys, "argv", ["predict.py", "--ckpt", str(ckpt), *map(str, args)])
        monkeypatch.setattr(command.signal, "signal", lambda *_: None)
        try:
            command.main()
            done = 0
        except SystemExit as stop:
            done = stop.code
        said = capsys.readouterr()
        assert done == code, said
        return said.out, said.err

    return run


def predict(ckpt, *args, cwd, code=0) -> tuple[str, str]:
    """Run the command line as a user does -> (stdout, stderr)."""
    command = [sys.executable, ROOT / "predict.py", "--ckpt", ckpt, *args]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout, done.stderr


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]


# ---- in Python --------------------------------------------------------------------------------------------------------


def test_segment_finds_what_evaluate_scores(model, scenes):
    dataset = open_dataset(str(scenes), "val", image_size=64, encoder_size=model.union_encoder.image_size)
    rows = score(model, dataset)
    images = [dataset.samples[i].image for i, _ in dataset.items]
    masks = model.segment(images, [row["phrase"] for row in rows])
    assert any(mask.any() and not mask.all() for mask in masks)
    for n, (row, mask) in enumerate(zip(rows, masks)):
        target = dataset[n]["mask"].numpy() > 0
        assert mask.dtype == bool and mask.shape == target.shape
        assert abs(int((mask & target).sum()) - row["intersection"]) <= 2  # batches are rounded differently
        assert abs(int((mask | target).sum()) - row["union"]) <= 2


def test_segment_takes_paths_pil_arrays_and_lists(model, picture):
    array = np.asarray(Image.open(picture))
    mask = model.segment(picture, "the ship on the left")
    assert mask.shape == (90, 120) and mask.dtype == bool and mask.any() and not mask.all()
    for image in (str(picture), Image.open(picture), array):
        assert np.array_equal(model.segment(image, "the ship on the left"), mask)
    both = model.segment([picture, array[:50]], ["the ship on the left", "a car"])
    assert [m.shape for m in both] == [(90, 120), (50, 120)] and (both[0] == mask).mean() > 0.999
    assert len(model.segment(picture, ["a", "b", "c"])) == 3 and len(model.segment([array, array], "a")) == 2
    assert model.segment([], []) == [] and len(model.segment([picture], "a")) == 1
    model.train()
    model.segment(picture, "a")
    assert model.training
    model.eval()


def test_segment_says_what_is_wrong(model, picture):
    array = np.asarray(Image.open(picture))
    for image, phrase, said in (
        (array.astype(np.float32), "a", "float32"), (array[..., 0], "a", "uint8 array"), (None, "a", "NoneType"),
        (array[:0], "a", "empty"), (picture, " ", "empty"), (picture, 7, "empty"), (picture, "a\0", "control"),
        (picture, "a" * 10_001, "10,001"), ([picture] * 2, ["a"] * 3, "pairs"), ("no.png", "a", "no image"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=said):
            model.segment(image, phrase)
    with pytest.raises(DataError, match="independent"):
        model.segment(picture, "a", tiling="other")


def test_long_phrases_are_cut_with_a_word_about_it(model, picture):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.segment(picture, "a ship " * 30)
    with pytest.warns(UserWarning, match="first 77"):
        model.segment(picture, ("a ship " * 900)[:5000])
    assert not cut_note(model, "ship " * 75) and "78 tokens" in cut_note(model, "ship " * 76)


def test_segment_tiles_large_images(picture):
    array = np.asarray(Image.open(picture)).copy()
    array[20:50, 30:80] = (250, 20, 20)
    known = Known(red, 40)
    mask = segment(known, array, "red", tile=40, tiling="independent", batch=4)
    assert np.array_equal(mask, red_mask(array)) and max(known.seen) <= 4 and sum(known.seen) == 3 * 4
    known.seen.clear()
    small, large = segment(known, [array[:40, :40], array], "red", tile=40, tiling="independent")
    assert np.array_equal(small, red_mask(array[:40, :40])) and np.array_equal(large, mask)
    known.seen.clear()
    wide = segment(known, np.zeros((4, 2049, 3), np.uint8), "red")  # by itself, beyond 2,048
    assert wide.shape == (4, 2049) and not wide.any()


def test_alpha_hides_and_exif_turns(model, picture):
    rgba = np.asarray(Image.open(picture).convert("RGBA")).copy()
    rgba[:, :60, 3] = 0
    mask = model.segment(Image.fromarray(rgba), "a ship")
    assert not mask[:, :60].any()
    turned = Image.open(picture)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(picture.with_name("turned.jpg"), exif=exif)
    assert model.segment(picture.with_name("turned.jpg"), "a ship").shape == (120, 90)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 2), (2, 40)])
def test_odd_shapes(model, shape):
    assert model.segment(np.full((*shape, 3), 90, np.uint8), "a ship").shape == shape


# ---- names, jobs, pictures --------------------------------------------------------------------------------------------


def test_names_are_unique_and_can_be_written():
    images = [
        Path("a/plane.jpg"),
        Path("b/plane.png"),
        Path("a/Plane.png"),
        Path("a/ship.jpg"),
        Path("x" * 200 + ".jpg"),
        Path("y" * 90 + "_1.png"),
        Path("y" * 90 + "_2.png"),
    ]
    names = stems(images)
    assert len({name.lower() for name in names.values()}) == 7 and names[images[3]] == "ship"
    assert names == stems(images[::-1]) and len(names[images[4]]) == 80
    assert slug("The airplane, on the RIGHT!") == "the-airplane-on-the-right"
    assert slug("../../etc") == "etc" and slug("?!") == "phrase" and slug("船の左") == "船の左"
    assert slug("one two " * 20) == "one-two-one-two-one-two-one-two-one-two" and slug("y" * 5000) == "y" * 40
    assert len(slug("船" * 5000).encode()) <= 120


def test_jobs_of_folders_lists_and_images(tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt"):
        (tmp_path / name).touch()
    jobs = find_jobs([tmp_path], ["x", "y"])
    assert [(job.image.name, job.phrase, job.n) for job in jobs] == [
        ("a.JPG", "x", 1), ("a.JPG", "y", 2), ("b.png", "x", 1), ("b.png", "y", 2),
    ]  # fmt: skip
    table = tmp_path / "list.csv"
    table.write_text('phrase,image,more\n"the ship, left",a.JPG,1\nz,b.png,\nw,a.JPG,2\nq\n', encoding="utf-8-sig")
    jobs = find_jobs([table], [])
    assert [(job.image, job.phrase, job.n) for job in jobs[:3]] == [
        (tmp_path / "a.JPG", "the ship, left", 1), (tmp_path / "a.JPG", "w", 2), (tmp_path / "b.png", "z", 1),
    ]  # fmt: skip
    assert "line 5" in jobs[3].fault and not any(job.fault for job in jobs[:3])
    (tmp_path / "empty").mkdir()
    for places, phrases, said in (
        ([tmp_path / "empty"], ["x"], "no image"), ([tmp_path / "none"], ["x"], "no image"), ([table], ["x"], "of its own"),
        ([tmp_path / "b.png"], [], "--phrase"), ([tmp_path / "b.png", table], [], "--phrase"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=said):
            find_jobs(places, phrases)
    assert len(find_jobs([tmp_path / "b.png", table], ["x"])) == 5
    for content, said in (
        ("file,phrase\na,b\n", "column image"),
        ("image,phrase\n", "no rows"),
        ("", "columns? image"),
    ):
        table.write_text(content)
        with pytest.raises(DataError, match=said):
            find_jobs([table], [])


def test_the_reduced_mask_keeps_what_is_small():
    rng = np.random.default_rng(0)
    for height, width in ((5000, 3000), (1600, 7), (3, 2), (1, 9999), (1601, 1601)):
        mask = np.zeros((height, width), bool)
        points = rng.integers(0, (height, width), (5, 2))
        mask[tuple(points.T)] = True
        small = SmallMask(height, width)
        for top in range(0, height, 700):
            small.add(top, mask[top : top + 700])
        shape = np.array(small.pixels.shape)
        assert shape.max() <= 1600 and small.pixels.sum() == len(np.unique(points * shape // (height, width), axis=0))


def test_the_overlay_lights_the_mask_and_says_the_phrase():
    picture = np.full((60, 80, 3), 200, np.uint8)
    mask = np.zeros((60, 80), bool)
    mask[20:40, 30:50] = True
    image = np.asarray(overlay(picture, mask, "the ship"))
    assert image.shape[0] > 6 * 60 and image.shape[1] >= 6 * 80  # small ones are enlarged
    left = (image.shape[1] - 6 * 80) // 2
    assert (image[180, left + 240] == 200).all() and (image[30, left + 30] == 100).all()
    assert (image[6 * 60 :] < 100).any()  # letters
    for shape in ((1, 1), (1, 1600), (1600, 1)):
        overlay(np.zeros((*shape, 3), np.uint8), np.ones(shape, bool), "x" * 5000)


def test_captions_of_any_script():
    for phrase in ("the ship", "船の左", "корабль слева", "السفينة", "🚢" * 5, "é\u0301", "\u200b\n\t"):
        font, text = font_for(phrase, 18)
        lines = wrapped(text, font, 200)
        assert "?" not in text and all(font.getlength(line) <= 200 for line in lines)
        overlay(np.zeros((90, 90, 3), np.uint8), np.zeros((90, 90), bool), phrase)
    font, text = font_for("船" * 5000, 18)
    assert len(wrapped(text, font, 300)) <= 3
    font, text = font_for("word " * 500, 18)
    assert len(wrapped(text, font, 300)) == 3 and wrapped(text, font, 300)[-1].endswith("...")


# ---- the command line -------------------------------------------------------------------------------------------------


def test_one_image_two_phrases(ckpt, model, picture, run):
    """The files are what the model says, nothing is overwritten, and --overwrite does."""
    phrases = ("the airplane on the right", "the ship")
    asked = ("--image", picture, "--phrase", phrases[0], "--phrase", phrases[1])
    out, _ = predict(ckpt, *asked, cwd=picture.parent)
    folder = picture.parent / "predictions"
    assert sorted(path.name for path in folder.iterdir()) == [
        "plane-1-the-airplane-on-the-right-overlay.png", "plane-1-the-airplane-on-the-right.png",
        "plane-2-the-ship-overlay.png", "plane-2-the-ship.png", "results.jsonl",
    ]  # fmt: skip
    for line, phrase, mask in zip(lines(folder), phrases, model.segment(picture, list(phrases))):
        written = np.asarray(Image.open(folder / line["mask"]))
        assert written.dtype == np.uint8 and written.shape == (90, 120) and set(np.unique(written)) <= {0, 255}
        assert ((written > 0) == mask).mean() > 0.999
        left, top, width, height = line["bbox"]
        y, x = np.nonzero(written)
        assert (x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1) == (left, top, width, height)
        assert line["area_share"] == pytest.approx((written > 0).mean()) and 0.5 < line["confidence"] <= 1
        assert (line["image"], line["phrase"], line["width"], line["height"]) == (str(picture), phrase, 120, 90)
        assert phrase in out and f"confidence {line['confidence']:.2f}" in out

    before = {path: path.read_bytes() for path in folder.iterdir()}
    _, err = run(*asked, "--out", folder, code=1)
    assert "2 of 2 failed" in err and "--overwrite" in err
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    run(*asked, "--out", folder, "--overwrite")
    assert len(lines(folder)) == 4 and len(list(folder.iterdir())) == 5


def test_a_batch_goes_on_and_lists_its_failures(ckpt, picture):
    folder = picture.parent
    (folder / "zero.png").touch()
    (folder / "text.jpg").write_text("hello")
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    Image.new("CMYK", (30, 20)).save(folder / "cmyk.jpg")
    Image.new("RGB", (3000, 2)).save(folder / "wide.png")
    Image.new("L", (9, 9)).save(folder / "film.gif", save_all=True, append_images=[Image.new("L", (9, 9), 200)])
    (folder / "sub").mkdir()
    Image.new("RGB", (20, 20)).save(folder / "sub/plane.jpg")
    rows = [
        ("plane.png", "the ship"), ("zero.png", "the ship"), ("plane.png", " "), ("text.jpg", "x"), ("gone.png", "x"),
        ("one.png", "x"), ("cmyk.jpg", "x"), ("wide.png", "x"), ("film.gif", "x"), ("film.gif", "y"),
        ("plane.png", "a ship " * 714), ("plane.png", "船の左"), ("sub/plane.jpg", "x" * 20_000), ("sub/plane.jpg", "x"),
    ]  # fmt: skip
    with open(folder / "list.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "phrase"), *rows])
    out, err = predict(ckpt, "--image", "list.csv", "--out", "results", "--batch", 3, cwd=folder, code=1)
    done = lines(folder / "results")
    assert sorted((Path(line["image"]).name, line["phrase"][:9].strip()) for line in done) == sorted([
        ("plane.png", "the ship"), ("one.png", "x"), ("cmyk.jpg", "x"), ("wide.png", "x"), ("plane.png", "a ship a"),
        ("plane.png", "船の左"), ("plane.jpg", "x"),
    ])  # fmt: skip
    for line in done:
        assert Image.open(folder / "results" / line["mask"]).size == (line["width"], line["height"])
        assert (folder / "results" / line["overlay"]).exists()
    assert len({line["mask"] for line in done}) == len(done)
    assert "7 of 14 failed" in err and "20,000 characters" in err
    for name, reason in (("zero.png", "0 bytes"), ("text.jpg", "can't be read"), ("gone.png", "no image"),
                         ("film.gif", "2 frames"), ("plane.png", "phrase is empty")):  # fmt: skip
        assert any(name in line and reason in line for line in err.splitlines()), name
    (cut,) = [line for line in done if "notes" in line]
    assert "first 77" in cut["notes"][0] and cut["notes"][0] in out
    assert not list((folder / "results").glob(".*"))


def test_wrong_usage_is_exit_code_2(run, picture, tmp_path):
    table, taken, phrase = tmp_path / "list.csv", tmp_path / "taken", ("--phrase", "x")
    table.write_text("file,text\na,b\n")
    taken.touch()
    for args, said in (
        (("--image", "gone.png", *phrase), "no image"), (("--image", table), "image and phrase"),
        (("--image", picture), "--phrase"), (("--image", picture, *phrase, "--bands", "1,2"), "4,3,2"),
        (("--image", picture, *phrase, "--tile", "0"), "32 or more"), (("--image", picture, *phrase, "--out", taken), "taken"),
    ):  # fmt: skip
        assert said in run(*args, code=2)[1], said
    assert "no checkpoint" in run("--image", picture, *phrase, ckpt="no.pt", code=2)[1]
    assert "damaged" in run("--image", picture, *phrase, ckpt=table, code=2)[1]


def test_a_folder_that_can_t_be_written_is_said_first(run, picture, monkeypatch):
    out = picture.parent / "locked"

    def refuse(prefix, dir):  # a mode of 0500 does not keep root out
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(command.tempfile, "TemporaryDirectory", refuse)
    _, err = run("--image", picture, "--phrase", "x", "--out", out, code=2)
    assert "Permission denied" in err and str(out) in err and "--out" in err


def test_nothing_half_written_stays(run, picture, monkeypatch):
    broken = iter([OSError(28, "No space left on device", "overlay.png")])

    def full(*args):
        for error in broken:
            raise error
        return overlay(*args)

    monkeypatch.setattr(command, "overlay", full)
    out = picture.parent / "out"
    assert "No space left" in run("--image", picture, "--phrase", "x", "--phrase", "y", "--out", out, code=1)[1]
    assert sorted(path.name for path in out.iterdir()) == ["plane-2-y-overlay.png", "plane-2-y.png", "results.jsonl"]


def test_a_geotiff_becomes_a_geotiff_and_geojson(run, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    from rasterio.warp import transform_bounds

    bands = ramps(4, 300, 260, np.uint16, 4000)
    bands[:, :40] = 0
    path = write_tiff(tmp_path / "field.tif", bands, nodata=0)
    for tile in ((), ("--tile", 128), ("--tile", 128, "--tiling", "independent")):
        out = tmp_path / f"out{len(tile)}"
        run("--image", path, "--phrase", "the field", "--bands", "4,3,2", "--out", out, *tile)
        (line,) = lines(out)
        assert line.get("tiling") == {0: None, 2: "scene", 4: "independent"}[len(tile)]
        with rasterio.open(path) as scene, rasterio.open(out / line["mask"]) as mask:
            assert (mask.crs, mask.transform, mask.shape) == (scene.crs, scene.transform, scene.shape)
            pixels = mask.read(1)
            assert np.array_equal(pixels == mask.nodata, ~scene.read_masks().any(axis=0))
        assert line["area_share"] == pytest.approx((pixels == 255).sum() / (pixels != 127).sum())
        collection = json.loads((out / line["polygons"]).read_text())
        assert len(collection["features"]) == line["polygon_count"] > 0
        assert line["area_m2"] == pytest.approx(0.25 * (pixels == 255).sum(), rel=1e-3)
        assert {f["properties"]["phrase"] for f in collection["features"]} == {"the field"}
        points = np.array([p for f in collection["features"] for ring in f["geometry"]["coordinates"] for p in ring])
        west, south, east, north = transform_bounds("EPSG:32633", "EPSG:4326", *mask.bounds)
        assert (points.min(0) >= (west - 1e-6, south - 1e-6)).all()
        assert (points.max(0) <= (east + 1e-6, north + 1e-6)).all()


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_a_geotiff_without_a_place_keeps_its_mask(run, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    path = write_tiff(tmp_path / "a.tif", ramps(3, 60, 50, np.uint16), crs=None, transform=None)
    out, _ = run("--image", path, "--phrase", "x", "--out", tmp_path / "out")
    (line,) = lines(tmp_path / "out")
    assert "polygons" not in line and "no coordinate system" in line["notes"][0] and line["notes"][0] in out
    with rasterio.open(tmp_path / "out" / line["mask"]) as mask:
        assert mask.shape == (60, 50)
