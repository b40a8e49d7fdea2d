"""From image and phrase to mask: the predictor in Python, and the command line as people use it."""

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
from test_imagery import Look, ramps, red, red_mask, write_tiff

import predict as command
from data import open_dataset
from evaluate import score
from imagery import raster, results
from model import RS2SAM2
from predict import RS2SAM2Predictor, find_jobs
from presets import PRESETS, RECIPES
from runtime.errors import UserError
from synthetic_scenes.scenes import make_scenes


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    """A checkpoint as train.py writes it, of a tiny model with random weights, set to find about half of an image."""
    torch.manual_seed(0)
    model = RS2SAM2(dataclasses.replace(PRESETS["tiny"], image_size=64)).eval()
    with torch.no_grad():  # its hypernetwork gives weights around 0: larger ones, so that masks are not empty
        model.mask_decoder.output_hypernetworks_mlps[0].layers[-1].weight *= 30
    checkpoint = {"preset": dataclasses.asdict(model.preset), "recipe": dataclasses.asdict(RECIPES["tiny"]), "left_out": []}
    checkpoint |= {"model": model.state_dict(), "tokenizer": None, "model_name": "tiny", "data": "scenes", "revision": ""}
    path = tmp_path_factory.mktemp("ckpt") / "best.pt"
    torch.save(checkpoint | {"epoch": 0}, path)
    return path


@pytest.fixture(scope="module")
def predictor(ckpt) -> RS2SAM2Predictor:
    return RS2SAM2Predictor.from_pretrained(ckpt, "cpu")


@pytest.fixture
def picture(tmp_path) -> Path:
    """Smooth colours, 90 x 120."""
    y, x = np.mgrid[:90, :120]
    Image.fromarray(np.stack([x * 2, y * 2, 255 - x], axis=2).astype(np.uint8)).save(tmp_path / "plane.png")
    return tmp_path / "plane.png"


@pytest.fixture
def run(ckpt, monkeypatch, capsys):
    """The command line, without a process of its own: run(*args, code=0) -> (stdout, stderr)."""

    def run(*args, ckpt=ckpt, code=0):
        monkeypatch.setattr(sys, "argv", ["predict.py", "--ckpt", str(ckpt), *map(str, args)])
        monkeypatch.setattr(command.signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as stop:
            sys.exit(command.main() or 0)
        out, err = capsys.readouterr()
        assert stop.value.code == code, (out, err)
        return out, err

    return run


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def test_predict_finds_what_evaluate_scores(predictor, tmp_path):
    scenes, model = make_scenes(tmp_path / "scenes", train=1, val=3, test=0, size=96, progress=False), predictor.model
    dataset = open_dataset(str(scenes), "val", image_size=64, encoder_size=model.union_encoder.image_size)
    rows = score(model, dataset)
    masks, *_ = predictor.predict([dataset.samples[i].image for i, _ in dataset.items], [row["phrase"] for row in rows])
    assert any(mask.any() and not mask.all() for mask in masks)
    for n, (row, mask) in enumerate(zip(rows, masks)):
        target = dataset[n]["mask"].numpy() > 0
        assert mask.dtype == bool and mask.shape == target.shape
        assert abs(int((mask & target).sum()) - row["intersection"]) <= 2  # batches are rounded differently
        assert abs(int((mask | target).sum()) - row["union"]) <= 2


def test_mask_score_and_logits_of_paths_pil_images_arrays_and_lists(predictor, picture):
    assert predictor.device.type == "cpu" and predictor.dtype == torch.float32
    array, phrase = np.asarray(Image.open(picture)), "the ship on the left"
    mask, confidence, logits = predictor.predict(picture, phrase)
    assert mask.shape == logits.shape == (90, 120) and mask.any() and not mask.all()
    assert (mask.dtype, logits.dtype) == (bool, np.float32) and np.array_equal(mask, logits > 0)
    assert isinstance(confidence, float)
    assert confidence == pytest.approx(torch.from_numpy(logits).sigmoid()[mask].mean().item(), abs=1e-5)
    for image in (str(picture), Image.open(picture), array):
        assert np.array_equal(predictor.predict(image, phrase)[2], logits)
    masks, scores, many = predictor.predict([picture, array[:50]], [phrase, "a car"])
    assert [m.shape for m in masks] == [(90, 120), (50, 120)] and len(scores) == 2
    assert np.allclose(many[0], logits, atol=1e-3)
    for images, phrases, count in ((picture, ["a", "b", "c"], 3), ([array, array], "a", 2), ([picture], "a", 1), ([], [], 0)):
        assert [len(x) for x in predictor.predict(images, phrases)] == [count] * 3
    transparent = np.dstack([array, np.where(np.arange(120) < 60, 0, np.full((90, 120), 255)).astype(np.uint8)])
    assert not predictor.predict(Image.fromarray(transparent), phrase)[0][:, :60].any()
    predictor.model.train()
    half = RS2SAM2Predictor(predictor.model, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    rounded = half.predict(picture, phrase)[2]
    assert rounded.dtype == np.float32 and 0 < np.abs(rounded - logits).max() < 0.2 * np.ptp(logits)
    assert predictor.model.training  # as it was
    predictor.model.eval()


def test_what_is_wrong_is_said_in_one_sentence(predictor, picture):
    cut = picture.with_name("cut.png")
    cut.write_bytes(picture.read_bytes()[:200])
    array = np.asarray(Image.open(picture))
    for image, phrase, sentence in (
        (torch.zeros(3, 9, 9), "a", "not Tensor"), (cut, "a", "cut.png"), (Image.open(cut), "a", "PIL image can't be read"),
        (array.astype(float), "a", "float64"), (array[..., 0], "a", "uint8"), (array[:0], "a", "empty"), (None, "a", "None"),
        (picture, " ", "empty"), (picture, 7, "empty"), (picture, "a\0", "control"), (picture, "a" * 10_001, "10,001"),
        ([picture] * 2, ["a"] * 3, "pairs"), ("no.png", "a", "no image"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=sentence) as error:
            predictor.predict(image, phrase)
        assert "\n" not in str(error.value)
    for options in ({"tiling": "other"}, {"batch": 0}, {"tile": 0}):
        with pytest.raises(UserError, match="independent|1 or more"):
            predictor.predict(picture, "a", **options)
    # A phrase that is too long is cut, with a word about it.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor.predict(picture, "a ship " * 30)
    with pytest.warns(UserWarning, match="first 77"):
        predictor.predict(picture, ("a ship " * 900)[:5000])
    assert not predictor.cut_note("ship " * 75) and "78 tokens" in predictor.cut_note("ship " * 76)


def test_large_images_are_tiled_and_odd_shapes_kept(picture, predictor, monkeypatch):
    array = np.asarray(Image.open(picture)).copy()
    array[20:50, 30:80] = (250, 20, 20)
    monkeypatch.setattr(predictor, "look", look := Look(red, 40))
    (small, large), *_ = predictor.predict([array[:40, :40], array], "red", tile=40, tiling="independent", batch=4)
    assert np.array_equal(small, red_mask(array[:40, :40])) and np.array_equal(large, red_mask(array))
    assert look.seen == [1, *[4] * 3]  # 3 x 4 tiles
    wide, confidence, _ = predictor.predict(np.zeros((4, 2049, 3), np.uint8), "red")  # by itself, beyond 2,048
    assert wide.shape == (4, 2049) and not wide.any() and confidence == 0.0 and look.seen[4:] == [1]
    monkeypatch.undo()
    for shape in ((1, 1), (1, 3000), (3000, 2), (2, 40)):
        assert predictor.predict(np.full((*shape, 3), 90, np.uint8), "a ship")[0].shape == shape


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
    for paths, phrases, sentence in (
        ([tmp_path / "empty"], ["x"], "no image"), ([tmp_path / "none"], ["x"], "no image"), ([table], ["x"], "of its own"),
        ([tmp_path / "b.png"], [], "--phrase"), ([tmp_path / "b.png", table], [], "--phrase"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=sentence):
            find_jobs(paths, phrases)
    assert len(find_jobs([tmp_path / "b.png", table], ["x"])) == 5
    for text, sentence in (("file,phrase\na,b\n", "column image"), ("image,phrase\n", "no rows"), ("", "columns? image")):
        table.write_text(text)
        with pytest.raises(UserError, match=sentence):
            find_jobs([table], [])


def test_one_image_two_phrases(predictor, picture, run):
    """The files are what the model says, nothing is overwritten, and --overwrite does."""
    phrases = ("the airplane on the right", "the ship")
    wanted = ("--image", picture, "--phrase", phrases[0], "--phrase", phrases[1])
    folder = picture.parent / "predictions"
    out, _ = run(*wanted, "--out", folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "plane-1-the-airplane-on-the-right-overlay.png", "plane-1-the-airplane-on-the-right.png",
        "plane-2-the-ship-overlay.png", "plane-2-the-ship.png", "results.jsonl",
    ]  # fmt: skip
    for line, phrase, mask, confidence in zip(lines(folder), phrases, *predictor.predict(picture, list(phrases))[:2]):
        written = np.asarray(Image.open(folder / line["mask"]))
        assert written.dtype == np.uint8 and written.shape == (90, 120) and set(np.unique(written)) <= {0, 255}
        assert ((written > 0) == mask).mean() > 0.999
        left, top, width, height = line["bbox"]
        y, x = np.nonzero(written)
        assert (x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1) == (left, top, width, height)
        assert line["area_share"] == pytest.approx((written > 0).mean())
        assert line["confidence"] == pytest.approx(confidence, abs=1e-3)
        assert (line["image"], line["phrase"], line["width"], line["height"]) == (str(picture), phrase, 120, 90)
        assert phrase in out and f"confidence {line['confidence']:.2f}" in out
    before = {path: path.read_bytes() for path in folder.iterdir()}
    _, err = run(*wanted, "--out", folder, code=1)
    assert "2 of 2 failed" in err and "--overwrite" in err
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    run(*wanted, "--out", folder, "--overwrite")
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
    arguments = [sys.executable, command.__file__, "--ckpt", ckpt, "--image", "list.csv", "--out", "results", "--batch", "3"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(arguments, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    out, err = process.stdout, process.stderr
    assert process.returncode == 1 and "Traceback" not in err, out + err
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


def test_an_image_that_fails_in_a_batch_costs_itself_alone(run, picture, monkeypatch):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 20), "red").save(picture.with_name(name))

    def read_all(scene):  # as of a raster whose header is well and whose pixels are not
        if scene.height == 90:
            raise UserError("plane.png can't be read: damaged block.")
        return scene.pixels

    monkeypatch.setattr(raster.Scene, "read_all", read_all)
    out = picture.parent / "out"
    _, err = run("--image", picture.parent, "--phrase", "x", "--phrase", "y", "--out", out, code=1)
    assert "2 of 6 failed" in err and err.count("damaged block") == 2
    assert sorted(Path(line["image"]).name for line in lines(out)) == ["a.png", "a.png", "b.png", "b.png"]


def test_wrong_usage_is_exit_code_2(run, picture, tmp_path, monkeypatch):
    table, taken, phrase = tmp_path / "list.csv", tmp_path / "taken", ("--phrase", "x")
    table.write_text("file,text\na,b\n")
    taken.touch()
    for args, sentence in (
        (("--image", "gone.png", *phrase), "no image"), (("--image", table), "image and phrase"),
        (("--image", picture), "--phrase"), (("--image", picture, *phrase, "--bands", "1,2"), "4,3,2"),
        (("--image", picture, *phrase, "--tile", "0"), "32 or more"), (("--image", picture, *phrase, "--out", taken), "taken"),
    ):  # fmt: skip
        assert sentence in run(*args, code=2)[1], sentence
    assert "no.pt" in run("--image", picture, *phrase, ckpt="no.pt", code=2)[1]
    assert "list.csv" in run("--image", picture, *phrase, ckpt=table, code=2)[1]

    def refuse(prefix, dir):  # a mode of 0500 does not keep root out
        raise PermissionError(13, "Permission denied", str(dir))
    monkeypatch.setattr(results.tempfile, "TemporaryDirectory", refuse)
    _, err = run("--image", picture, *phrase, "--out", tmp_path / "locked", code=2)
    assert "Permission denied" in err and "locked" in err and "--out" in err


def test_nothing_half_written_stays(run, picture, monkeypatch):
    broken, overlay = iter([OSError(28, "No space left on device", "overlay.png")]), results.overlay

    def full(*args):
        for error in broken:
            raise error
        return overlay(*args)

    monkeypatch.setattr(results, "overlay", full)
    out = picture.parent / "out"
    assert "No space left" in run("--image", picture, "--phrase", "x", "--phrase", "y", "--out", out, code=1)[1]
    assert sorted(path.name for path in out.iterdir()) == ["plane-2-y-overlay.png", "plane-2-y.png", "results.jsonl"]


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_a_geotiff_becomes_a_geotiff_and_geojson(run, tmp_path, monkeypatch):
    rasterio = pytest.importorskip("rasterio")
    pytest.importorskip("imagery.polygons")
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
    monkeypatch.delitem(sys.modules, "imagery.polygons")
    monkeypatch.setitem(sys.modules, "shapely", None)
    nowhere = write_tiff(tmp_path / "nowhere.tif", ramps(3, 60, 50, np.uint16), crs=None, transform=None)
    for image, out, note in ((path, "bare", "pip install rasterio shapely pyproj"), (nowhere, "none", "no coordinate system")):
        said, _ = run("--image", image, "--phrase", "x", "--out", tmp_path / out)
        (line,) = lines(tmp_path / out)
        assert note in line["notes"][0] and line["notes"][0] in said and "polygons" not in line
        with rasterio.open(image) as scene, rasterio.open(tmp_path / out / line["mask"]) as mask:
            assert mask.shape == scene.shape
