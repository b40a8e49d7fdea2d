"""From image and phrase to mask: the predictor in Python, and the command line as people use it."""

import csv
import dataclasses
import itertools
import json
import runpy
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_imagery import Look, clear, ramps, red, red_logits, write_tiff

import predict
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
    """The script, in this process: run(*args, code=0) -> (stdout, stderr)."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(*args, ckpt=ckpt, code=0):
        monkeypatch.setattr(sys, "argv", ["predict.py", "--ckpt", str(ckpt), *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(predict.__file__, run_name="__main__")
            sys.exit(0)
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
        found = (mask & target).sum(), (mask | target).sum()
        assert found == pytest.approx((row["intersection"], row["union"]), abs=2)  # batches are rounded differently


def test_mask_score_and_logits_of_paths_pil_images_arrays_and_lists(predictor, picture):
    assert predictor.device.type == "cpu" and predictor.dtype == torch.float32
    array, phrase = np.asarray(Image.open(picture)), "the ship on the left"
    mask, confidence, logits = predictor.predict(picture, phrase)
    assert logits.shape == (90, 120) and mask.any() and not mask.all() and isinstance(confidence, float)
    assert (mask.dtype, logits.dtype) == (bool, np.float32) and np.array_equal(mask, logits > 0)
    assert confidence == pytest.approx(torch.from_numpy(logits).sigmoid()[mask].mean().item(), abs=1e-5)
    for image in (str(picture), Image.open(picture), array):
        assert np.array_equal(predictor.predict(image, phrase)[2], logits)
    masks, scores, many = predictor.predict([picture, array[:50]], [phrase, "a car"])
    assert [m.shape for m in masks] == [(90, 120), (50, 120)] and len(scores) == 2
    assert np.allclose(many[0], logits, atol=1e-3)
    for images, phrases, count in ((picture, ["a", "b", "c"], 3), ([array, array], "a", 2), ([picture], "a", 1), ([], [], 0)):
        assert [len(x) for x in predictor.predict(images, phrases)] == [count] * 3
    assert not predictor.predict(Image.fromarray(clear(array, 60)), phrase)[0][:60].any()
    predictor.model.train()
    rounded = RS2SAM2Predictor(predictor.model, dtype=torch.bfloat16).predict(picture, phrase)[2]
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
    assert np.array_equal(small, red_logits(array[:40, :40]) > 0) and np.array_equal(large, red_logits(array) > 0)
    assert look.seen == [1, *[4] * 3]  # 3 x 4 tiles
    wide, confidence, _ = predictor.predict(np.zeros((4, 2049, 3), np.uint8), "red")  # by itself, beyond 2,048
    assert wide.shape == (4, 2049) and not wide.any() and confidence == 0.0 and look.seen[4:] == [1]
    monkeypatch.undo()
    for shape in ((1, 1), (1, 3000), (3000, 2), (2, 40)):
        assert predictor.predict(np.full((*shape, 3), 90, np.uint8), "a ship")[0].shape == shape


def test_jobs_of_folders_lists_and_images(tmp_path):
    a, b, table, empty = (tmp_path / name for name in ("a.JPG", "b.png", "list.csv", "empty"))
    for path in (a, b, tmp_path / "notes.txt"):
        path.touch()
    jobs = find_jobs([tmp_path], ["x", "y"])
    assert [job[:3] for job in jobs] == [(a, "x", 1), (a, "y", 2), (b, "x", 1), (b, "y", 2)]
    table.write_text('phrase,image,more\n"the ship, left",a.JPG,1\nz,b.png,\nw,a.JPG,2\nq\n', encoding="utf-8-sig")
    *jobs, bad = find_jobs([table], [])
    assert jobs == [(a, "the ship, left", 1, ""), (a, "w", 2, ""), (b, "z", 1, "")] and "line 5" in bad.fault
    assert len(find_jobs([b, table], ["x"])) == 5
    empty.mkdir()
    for paths, phrases, sentence in (
        ([empty], ["x"], "no image"), ([tmp_path / "none"], ["x"], "no image"), ([table], ["x"], "of its own"),
        ([b], [], "--phrase"), ([b, table], [], "--phrase"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=sentence):
            find_jobs(paths, phrases)
    for text, sentence in (("file,phrase\na,b\n", "column image"), ("image,phrase\n", "no rows"), ("", "columns? image")):
        table.write_text(text)
        with pytest.raises(UserError, match=sentence):
            find_jobs([table], [])


def test_one_image_two_phrases(predictor, picture, run):
    """The files are what the model says, nothing is overwritten, and --overwrite does."""
    phrases, folder = ["the airplane on the right", "the ship"], picture.parent / "predictions"
    wanted = ("--image", picture, "--phrase", phrases[0], "--phrase", phrases[1], "--out", folder)
    out, _ = run(*wanted)
    names = ("plane-1-the-airplane-on-the-right", "plane-2-the-ship")
    for line, name, phrase, mask, confidence in zip(lines(folder), names, phrases, *predictor.predict(picture, phrases)[:2]):
        assert (line["mask"], line["overlay"]) == (f"{name}.png", f"{name}-overlay.png")
        written = np.asarray(Image.open(folder / line["mask"]))
        assert written.dtype == np.uint8 and written.shape == (90, 120) and set(np.unique(written)) <= {0, 255}
        assert ((written > 0) == mask).mean() > 0.999 and line["confidence"] == pytest.approx(confidence, abs=1e-3)
        assert (line["image"], line["phrase"], line["width"], line["height"]) == (str(picture), phrase, 120, 90)
        assert phrase in out and f"confidence {line['confidence']:.2f}" in out
    before = {path: path.read_bytes() for path in folder.iterdir()}
    _, err = run(*wanted, code=1)
    assert "2 of 2 failed" in err and "--overwrite" in err
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    run(*wanted, "--overwrite")
    assert len(lines(folder)) == 4 and len(list(folder.iterdir())) == len(before) == 5


def test_a_batch_goes_on_and_lists_its_failures(run, picture, monkeypatch):
    """What can't be read, found or written costs itself alone: images, phrases, damaged blocks, a disk that was full."""
    (folder := picture.parent).joinpath("sub").mkdir()
    (folder / "zero.png").touch()
    (folder / "text.jpg").write_text("hello")
    for name, mode, size in (("one.png", "RGB", (1, 1)), ("cmyk.jpg", "CMYK", (30, 20)), ("wide.png", "RGB", (3000, 2)),
                             ("block.png", "RGB", (7, 7)), ("sub/plane.jpg", "RGB", (20, 20))):  # fmt: skip
        Image.new(mode, size).save(folder / name)
    Image.new("L", (9, 9)).save(folder / "film.gif", save_all=True, append_images=[Image.new("L", (9, 9), 200)])
    good = [("plane.png", "the ship"), ("one.png", "x"), ("cmyk.jpg", "x"), ("wide.png", "x"), ("plane.png", "船の左"),
            ("plane.png", " ".join(["a ship"] * 714)), ("sub/plane.jpg", "x")]  # fmt: skip
    bad = [("zero.png", "x", "0 bytes"), ("plane.png", " ", "phrase is empty"), ("text.jpg", "x", "can't be read"),
           ("gone.png", "x", "no image"), ("film.gif", "x", "2 frames"), ("film.gif", "y", "could not be opened"),
           ("plane.png", "x" * 20_000, "20,000 characters"), ("block.png", "x", "damaged block"), ("block.png", "y", "damaged"),
           ("plane.png", "full", "No space left")]  # fmt: skip
    with open(folder / "list.csv", "w", newline="", encoding="utf-8") as file:
        rows = [row[:2] for pair in itertools.zip_longest(good, bad) for row in pair if row]
        csv.writer(file).writerows([("image", "phrase"), *rows])
    overlay = results.overlay

    def read_all(scene):  # as of a raster whose header is well and whose pixels are not
        if scene.height == 7:
            raise UserError("block.png can't be read: damaged block.")
        return scene.pixels

    def full(scene, mask, phrase):
        if phrase == "full":
            raise OSError(28, "No space left on device", "overlay.png")
        return overlay(scene, mask, phrase)

    monkeypatch.setattr(raster.Scene, "read_all", read_all)
    monkeypatch.setattr(results, "overlay", full)
    monkeypatch.chdir(folder)
    out, err = run("--image", "list.csv", "--out", "results", "--batch", 3, code=1)
    done = lines(folder / "results")
    assert sorted((line["image"], line["phrase"]) for line in done) == sorted(good)
    for line in done:
        assert Image.open(folder / "results" / line["mask"]).size == (line["width"], line["height"])
    written = [name for line in done for name in (line["mask"], line["overlay"])]
    assert sorted(path.name for path in (folder / "results").iterdir()) == sorted([*written, "results.jsonl"])
    assert "10 of 17 failed" in err
    for name, phrase, reason in bad:
        assert any(f'{name}, "{phrase[:60]}": ' in line and reason in line for line in err.splitlines()), (name, reason)
    (cut,) = [line for line in done if "notes" in line]
    assert "first 77" in cut["notes"][0] and cut["notes"][0] in out


def test_wrong_usage_is_exit_code_2(run, picture, tmp_path, monkeypatch):
    table, taken, phrase = tmp_path / "list.csv", tmp_path / "taken", ("--phrase", "x")
    table.write_text("file,text\na,b\n")
    taken.touch()
    for args, sentence in (
        (("gone.png", *phrase), "no image"), ((table,), "image and phrase"), ((picture,), "--phrase"),
        ((picture, *phrase, "--bands", "1,2"), "4,3,2"), ((picture, *phrase, "--tile", "0"), "32 or more"),
        ((picture, *phrase, "--out", taken), "taken"),
    ):  # fmt: skip
        assert sentence in run("--image", *args, code=2)[1], sentence
    for ckpt in ("no.pt", table):
        assert Path(ckpt).name in run("--image", picture, *phrase, ckpt=ckpt, code=2)[1]

    def refuse(prefix, dir):  # a mode of 0500 does not keep root out
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(results.tempfile, "TemporaryDirectory", refuse)
    _, err = run("--image", picture, *phrase, "--out", tmp_path / "locked", code=2)
    assert "Permission denied" in err and "locked" in err and "--out" in err


def test_a_geotiff_becomes_a_geotiff_and_geojson(run, tmp_path, monkeypatch):
    rasterio = pytest.importorskip("rasterio")
    pytest.importorskip("imagery.polygons")
    bands = ramps(4, 150, 130, np.uint16, 4000)
    bands[:, :20] = 0
    path = write_tiff(tmp_path / "field.tif", bands, nodata=0)
    for tile in ((), ("--tile", 64), ("--tile", 64, "--tiling", "independent")):
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
