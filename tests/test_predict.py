"""From image and phrase to mask: the predictor in Python, and the command line as people use it."""

import csv
import dataclasses
import itertools
import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from threading import Event
from unittest.mock import Mock, patch

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from test_imagery import Look, clear, ramps, red, red_logits, save, write_tiff

import predict
from annotations.jobs import find_jobs
from data import open_dataset
from evaluate import score
from experiments import page
from imagery import plain, results
from imagery.tiles import ahead
from model import RS2SAM2
from predict import RS2SAM2Predictor
from presets import PRESETS, RECIPES
from runtime.errors import UserError
from synthetic_scenes.scenes import make_scenes

ROOT = Path(predict.__file__).parent


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    """A checkpoint as train.py writes it, of a tiny model with random weights, set to find about half of an image."""
    torch.manual_seed(0)
    model = RS2SAM2(dataclasses.replace(PRESETS["tiny"], image_size=64)).eval()
    with torch.no_grad():  # its hypernetwork gives weights around 0: larger ones, so that masks are not empty
        model.mask_decoder.output_hypernetworks_mlps[0].layers[-1].weight *= 30
    checkpoint = {"preset": dataclasses.asdict(model.preset), "recipe": dataclasses.asdict(RECIPES["tiny"]), "left_out": []}
    checkpoint |= {"model": model.state_dict(), "tokenizer": None, "model_name": "tiny", "data": "scenes", "revision": ""}
    torch.save(checkpoint | {"epoch": 0}, path := tmp_path_factory.mktemp("ckpt") / "best.pt")
    return path


@pytest.fixture(scope="module")
def predictor(ckpt) -> RS2SAM2Predictor:
    return RS2SAM2Predictor.from_pretrained(ckpt, "cpu")


@pytest.fixture
def picture(tmp_path) -> Path:
    y, x = np.mgrid[:90, :120]  # smooth colours
    return save(tmp_path / "plane.png", np.stack([x * 2, y * 2, 255 - x], axis=2).astype(np.uint8))


@pytest.fixture
def run(ckpt, monkeypatch, capsys):
    """The script, in this process: run(*args, code=0) -> (stdout, stderr)."""
    monkeypatch.setattr(predict.signal, "signal", lambda *_: None)

    def run(*args, ckpt=ckpt, code=0):
        monkeypatch.setattr(sys, "argv", ["predict.py", "--ckpt", str(ckpt), *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            sys.exit(runpy.run_path(predict.__file__, run_name="__main__") and 0)
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
    assert all(np.array_equal(predictor.predict(x, phrase)[2], logits) for x in (str(picture), Image.open(picture), array))
    masks, scores, many = predictor.predict([picture, array[:50]], [phrase, "a car"])
    assert [m.shape for m in masks] == [(90, 120), (50, 120)] and len(scores) == 2 and np.allclose(many[0], logits, atol=1e-3)
    for images, phrases, count in ((picture, ["a", "b", "c"], 3), ([array, array], "a", 2), ([picture], "a", 1), ([], [], 0)):
        assert [len(x) for x in predictor.predict(images, phrases)] == [count] * 3
    assert not predictor.predict(Image.fromarray(clear(array, 60)), phrase)[0][:60].any()
    predictor.model.train()
    rounded = RS2SAM2Predictor(predictor.model, dtype=torch.bfloat16).predict(picture, phrase)[2]
    assert rounded.dtype == np.float32 and 0 < np.abs(rounded - logits).max() < 0.2 * np.ptp(logits)
    assert predictor.model.training  # as it was
    predictor.model.eval()


def test_arrays_and_tensors_of_other_kinds_are_seen_as_files_of_them(predictor, picture, tmp_path):
    array, phrase = np.asarray(Image.open(picture)), "the ship on the left"
    deep = array.astype(np.uint16) * 200 + 7
    see = lambda image, **options: predictor.predict(image, phrase, **options)[2]  # noqa: E731
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for image, like in ((array[..., 1], array[..., [1, 1, 1]]), (array[..., 1:2], array[..., [1, 1, 1]]), (tensor, array),
                        (tensor[0], array[..., [0, 0, 0]]), (tensor.float(), array.astype(np.int64))):  # fmt: skip
        assert np.array_equal(see(image), see(like))
    assert np.array_equal(see(torch.from_numpy(deep.astype(np.int32)).permute(2, 0, 1)), see(deep))
    assert np.array_equal(see(deep[..., 0]), see(save(tmp_path / "deep.png", deep[..., 0])))  # stretched alike
    clouds = clear(array, 60)
    for image in (clouds, torch.from_numpy(clouds).permute(2, 0, 1)):
        assert np.array_equal(see(image), see(save(tmp_path / "clouds.png", clouds)))
        assert not predictor.predict(image, phrase)[0][:60].any()
    holes = array.astype(np.float32)
    holes[:60] = np.nan
    assert not predictor.predict(holes, phrase)[0][:60].any()
    many = np.concatenate([array, array[..., ::-1], array[..., :1]], axis=2)  # (H, W, 7)
    assert np.array_equal(see(many, bands=(4, 5, 6)), see(array[..., ::-1]))
    assert np.array_equal(see(array, bands=(2,)), see(array[..., 1]))
    assert np.array_equal(see(picture, bands=(3, 2, 1)), see(array[..., ::-1]))


def test_probabilities_a_threshold_and_a_least_area(predictor, picture, run, tmp_path):
    mask, score, logits = predictor.predict(picture, "the ship")
    probable = torch.from_numpy(logits).sigmoid().numpy()
    same, _, p = predictor.predict(picture, "the ship", probabilities=True)
    assert np.array_equal(same, mask) and p.dtype == np.float32 and np.allclose(p, probable, atol=1e-6)
    run("--image", picture, "--phrase", "the ship", "--out", tmp_path / "out", "--probabilities", "--device", "cpu")
    written = np.asarray(Image.open(tmp_path / "out" / lines(tmp_path / "out")[0]["probabilities"]))
    assert written.dtype == np.float32 and np.abs(written - p).max() < 1e-6
    middle = float(np.quantile(probable[mask], 0.7))
    fewer, surer, _ = predictor.predict(picture, "the ship", threshold=middle)
    assert np.array_equal(fewer, probable > middle) and surer > score and 0 < fewer.sum() < mask.sum()
    count, _, facts, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    assert predictor.predict(picture, "the ship", min_area=int(facts[1:, 4].max()))[0].sum() >= facts[1:, 4].max()
    none, zero, _ = predictor.predict(picture, "the ship", min_area=mask.size)
    assert not none.any() and zero == 0.0


def test_several_threads(predictor, picture):
    """They all get the answers of one, and a model in training is left so."""
    phrases = ["the ship", "a red car on the left", "the airplane"] * 4
    expected = [predictor.predict(picture, phrase)[2] for phrase in phrases]
    predictor.model.train()
    program = [*warnings.filters], Image.MAX_IMAGE_PIXELS
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda phrase: predictor.predict(picture, phrase)[2], phrases)]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected)) and predictor.model.training
    assert program == ([*warnings.filters], Image.MAX_IMAGE_PIXELS)  # the host's own, whichever thread was the last
    with pytest.raises(RuntimeError), patch.object(type(predictor.model), "forward", side_effect=RuntimeError("memory")):
        predictor.predict(picture, "the ship")
    assert predictor.model.training
    predictor.model.eval()


def test_what_is_wrong_is_said_in_one_sentence(predictor, picture):
    cut = picture.with_name("cut.png")
    cut.write_bytes(picture.read_bytes()[:200])
    array = np.asarray(Image.open(picture))
    for image, phrase, sentence in (
        (torch.zeros(9), "a", r"not float32 \(9,\)"), (cut, "a", "cut.png"), (Image.open(cut), "a", "PIL image is damaged"),
        (array > 9, "a", "not bool"), (array[..., :2], "a", "2 channels"), (array[:0], "a", "empty"), (None, "a", "NoneType"),
        (picture, " ", "empty"), (picture, 7, "empty"), (picture, "a\0", "control"), (picture, "a" * 10_001, "10,001"),
        ([picture] * 2, ["a"] * 3, "pairs"), ("no.png", "a", "no image"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=sentence) as error:
            predictor.predict(image, phrase)
        assert "\n" not in str(error.value)
    for options in ({"tiling": "other"}, {"batch": 0}, {"tile": 0}, {"threshold": 1.0}, {"min_area": -1}, {"bands": (4,)}):
        with pytest.raises(UserError, match="independent|1 or more|bands 4"):
            predictor.predict(picture, "a", **options)
    with pytest.warns(UserWarning, match="first 77"):
        predictor.predict(picture, ("a ship " * 900)[:5000])
    assert not predictor.notes("ship " * 75) and "78 tokens" in predictor.notes("ship " * 76)[0]


def test_what_weights_were_not_taught_is_said(ckpt, predictor, picture, tmp_path, run):
    state = torch.load(ckpt, weights_only=True)
    state["taught"] = {"data": "scenes", "generated": True, "words": ["a", "red", "ship"]}
    torch.save(state, taught := tmp_path / "taught.pt")
    origin, unknown = "no real image", "Training never said 'asdf', 'qwer'"
    phrases = ("--phrase", "a red ship", "--phrase", "Asdf qwer")
    out, _ = run("--ckpt", taught, "--image", picture, *phrases, "--out", tmp_path / "o")
    assert (out.count(origin), out.count(unknown)) == (1, 1)
    notes = [" ".join(line["notes"]) for line in lines(tmp_path / "o")]
    assert [origin in n for n in notes] == [True, True] and [unknown in n for n in notes] == [False, True]
    with pytest.warns(UserWarning, match="Training never said") as warned:
        (untaught := RS2SAM2Predictor.from_pretrained(taught)).predict(picture, "asdf qwer")
        untaught.predict(picture, "asdf qwer"), untaught.predict([picture] * 2, ["asdf qwer", "qwer"])
    assert [sum(said in str(w.message) for w in warned) for said in (origin, unknown, "never said 'qwer'")] == [1, 1, 1]
    real = predictor.facts | {"taught": state["taught"] | {"generated": False}}
    assert not RS2SAM2Predictor(predictor.model, facts=real).notes("A red ship")
    trained_words = real | {"preset": real["preset"] | {"encoder_name": "ViT-B-16"}}  # knows more than its training set's
    assert not RS2SAM2Predictor(predictor.model, facts=trained_words).notes("asdf")


def test_large_images_are_tiled(picture, predictor, monkeypatch):
    array = np.asarray(Image.open(picture)).copy()
    array[20:50, 30:80] = (250, 20, 20)
    monkeypatch.setattr(predictor, "look", look := Look(red, 40))
    (small, large), *_ = predictor.predict([array[:40, :40], array], "red", tile=40, tiling="independent", batch=4)
    assert np.array_equal(small, red_logits(array[:40, :40]) > 0) and np.array_equal(large, red_logits(array) > 0)
    assert look.seen == [1, *[4] * 3]  # 3 x 4 tiles
    wide, confidence, _ = predictor.predict(np.zeros((4, 2049, 3), np.uint8), "red")  # by itself, beyond 2,048
    assert wide.shape == (4, 2049) and not wide.any() and confidence == 0.0 and look.seen[4:] == [1]


def test_jobs_of_folders_lists_and_images(tmp_path):
    a, b, table, empty = (tmp_path / name for name in ("a.JPG", "b.png", "list.csv", "empty"))
    for path in (a, b, tmp_path / "notes.txt"):
        path.touch()
    assert [job[:3] for job in find_jobs([tmp_path], ["x", "y"])] == [(a, "x", 1), (a, "y", 2), (b, "x", 1), (b, "y", 2)]
    table.write_text('phrase,image,more\n"the ship, left",a.JPG,1\nz,b.png,\nw,a.JPG,2\nq\n', encoding="utf-8-sig")
    *jobs, bad = find_jobs([table], [])
    assert jobs == [(a, "the ship, left", 1, ""), (a, "w", 2, ""), (b, "z", 1, "")] and "line 5" in bad.fault
    assert len(find_jobs([b, table], ["x"])) == 5
    *jobs, gone = find_jobs([b, tmp_path / "gone.png"], ["x"])  # costs itself alone
    assert jobs == [(b, "x", 1, "")] and gone[:3] == (tmp_path / "gone.png", "x", 1) and "no image" in gone.fault
    table.write_text(" Phrase;IMAGE\nthe ship, left;sub\\a.jpg\n;\n")  # as spreadsheets and Windows write it
    assert find_jobs([table], []) == [(tmp_path / "sub/a.jpg", "the ship, left", 1, "")]
    empty.mkdir()
    (tiles := tmp_path / "IMG_DATA").mkdir()
    (tiles / "B04.jp2").touch()
    assert [job.image for job in find_jobs([tiles], ["x"])] == [tiles / "B04.jp2"]
    for text, paths, phrases, sentence in (
        ("", [empty], ["x"], "no image"), ("", [tmp_path / "none"], ["x"], "no image"), ("", [table], ["x"], "of its own"),
        ("", [b], [], "--phrase"), ("", [b, table], [], "--phrase"), ("", [table], [], "lacks image, phrase"),
        ("file,phrase\na,b\n", [table], [], "lacks image"), ("image,phrase\n", [table], [], "no rows"),
    ):  # fmt: skip
        table.write_text(text)
        with pytest.raises(UserError, match=sentence):
            find_jobs(paths, phrases)


def test_one_image_two_phrases(predictor, picture, run):
    """The files are what the model says, nothing is overwritten, and --overwrite does."""
    phrases, folder = ["the airplane on the right", "the ship"], picture.parent / "predictions"
    names = ("plane-1-the-airplane-on-the-right", "plane-2-the-ship")
    wanted = ("--image", picture, "--phrase", phrases[0], "--phrase", phrases[1], "--out", folder)
    out, _ = run(*wanted)
    for line, name, phrase, mask, confidence in zip(lines(folder), names, phrases, *predictor.predict(picture, phrases)[:2]):
        assert (line["mask"], line["overlay"]) == (f"{name}.png", f"{name}-overlay.png")
        written = np.asarray(Image.open(folder / line["mask"]))
        assert written.dtype == np.uint8 and written.shape == (90, 120) and set(np.unique(written)) <= {0, 255}
        assert ((written > 0) == mask).mean() > 0.999 and line["confidence"] == pytest.approx(confidence, abs=1e-3)
        assert (line["image"], line["phrase"], line["width"], line["height"]) == (str(picture), phrase, 120, 90)
        assert phrase in out and f"confidence {line['confidence']:.2f}" in out
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert re.search("2 of 2 failed(.*\n.* exists: --overwrite makes){2}", run(*wanted, code=1)[1])
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    (folder / f"{names[0]}-probabilities.tif").touch()  # of the mask that is made anew
    run(*wanted, "--overwrite", "--dtype", "bfloat16")
    assert [line["dtype"] for line in lines(folder)] == ["float32"] * 2 + ["bfloat16"] * 2
    assert len(list(folder.iterdir())) == len(before) == 5


def test_a_batch_that_fills_the_card_is_tried_one_by_one_with_the_card_free(predictor, picture, tmp_path, monkeypatch):
    jobs = find_jobs([picture], ["a", "b", "c"])
    args = predict.command_line().parse_args(["--image", str(picture), "--phrase", "a", "--out", str(tmp_path / "o")])
    run, within = predict.PredictionRun(predictor, args, jobs), []

    def rows(look, scenes, phrases, *_):
        within.append(sys.exc_info()[1])
        if len(phrases) > 1 or phrases == ["b"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [f"rows of {phrases[0]}"]

    monkeypatch.setattr(predict, "scene_rows", rows)
    first, failed, last = run.rows([(job, None) for job in jobs])
    assert (first, last) == ("rows of a", "rows of c") and "memory is full" in str(failed)
    assert within == [None] * 4 and failed.__context__ is failed.__traceback__ is None  # else they hold what filled the card


def test_a_batch_goes_on_and_lists_its_failures(run, picture, monkeypatch):
    """What can't be read, found or written costs itself alone: images, phrases, damaged blocks, a disk that was full."""
    (folder := picture.parent).joinpath("sub").mkdir()
    (folder / "zero.png").touch()
    (folder / "text.jpg").write_text("hello")
    for name, mode, size in (("one.png", "RGB", (1, 1)), ("cmyk.jpg", "CMYK", (30, 20)), ("wide.png", "RGB", (3000, 1)),
                             ("block.png", "RGB", (7, 7)), ("sub/plane.jpg", "RGB", (20, 20))):  # fmt: skip
        Image.new(mode, size).save(folder / name)
    Image.new("L", (9, 9)).save(folder / "film.gif", save_all=True, append_images=[Image.new("L", (9, 9), 200)])
    good = [("plane.png", "the ship"), ("one.png", "x"), ("cmyk.jpg", "x"), ("wide.png", "x"), ("plane.png", "船の左"),
            ("plane.png", " ".join(["a ship"] * 714)), ("sub/plane.jpg", "x")]  # fmt: skip
    bad = [("zero.png", "x", "0 bytes"), ("plane.png", "", "phrase is empty"), ("text.jpg", "x", "can't be read"),
           ("gone.png", "x", "no image"), ("film.gif", "x", "2 frames"), ("film.gif", "y", "could not be opened"),
           ("plane.png", "x" * 20_000, "20,000 characters"), ("block.png", "x", "damaged block"), ("block.png", "y", "damaged"),
           ("plane.png", "full", "No space left"), ("plane.png", "odd", "KeyError: 'what nobody foresaw'")]  # fmt: skip
    rows = [row[:2] for pair in itertools.zip_longest(good, bad) for row in pair if row]
    with open(folder / "list.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "phrase"), *rows])

    def fail(error):
        raise error

    damaged = UserError("block.png: damaged block.")
    faults = {"full": OSError(28, "No space left on device", "overlay.png"), "odd": KeyError("what nobody foresaw")}
    read_all, overlay = plain.Scene.read_all, results.overlay
    monkeypatch.setattr(plain.Scene, "read_all", lambda scene: fail(damaged) if scene.height == 7 else read_all(scene))
    monkeypatch.setattr(results, "overlay", lambda *args: fail(faults[args[2]]) if args[2] in faults else overlay(*args))
    monkeypatch.chdir(folder)
    out, err = run("--image", "list.csv", "--out", "results", "--batch", 3, code=1)
    done = lines(folder / "results")
    assert sorted((line["image"], line["phrase"]) for line in done) == sorted(good)
    assert all(Image.open(folder / "results" / line["mask"]).size == (line["width"], line["height"]) for line in done)
    written = [name for line in done for name in (line["mask"], line["overlay"])]
    assert sorted(path.name for path in (folder / "results").iterdir()) == sorted([*written, "results.jsonl"])
    assert "11 of 18 failed" in err
    for name, phrase, reason in bad:
        assert re.search(f'{name}, "{phrase[:60]}": .*{reason}', err), (name, reason)
    (_, (reduced,)), (_, (note,)) = sorted((line["image"] != "wide.png", line["notes"]) for line in done if "notes" in line)
    assert "first 77" in note and note in out and "reduced 47 times" in reduced and reduced in out


def test_items_are_made_one_ahead_in_their_order_up_to_an_error():
    made, second = [], Event()

    def items():
        for n in range(3):
            made.append(n)
            second.set() if n else None
            yield n
        raise ValueError("the fourth")

    coming = ahead(items())
    assert next(coming) == 0 and second.wait(10) and made == [0, 1]
    assert [next(coming), next(coming)] == [1, 2]
    with pytest.raises(ValueError, match="the fourth"):
        next(coming)


def test_wrong_usage_is_exit_code_2(run, ckpt, picture, tmp_path, monkeypatch):
    (taken := tmp_path / "taken").touch()
    for args, sentence, checkpoint in (
        (("--bands", "1,2"), "4,3,2", ckpt), (("--tile", "0"), "32 or more", ckpt), (("--out", taken), "taken", ckpt),
        (("--image", "gone.png"), "no image", ckpt), ((), "no.pt", "no.pt"), ((), "plane.png", picture),
        (("--threshold", "50"), "between 0 and 1", ckpt), (("--device", "cuda:77"), "device cuda:77 can't be used", ckpt),
    ):  # fmt: skip
        assert sentence in run("--image", picture, "--phrase", "x", *args, ckpt=checkpoint, code=2)[1], sentence
    monkeypatch.chdir(tmp_path)
    refused = PermissionError(13, "Permission denied", "locked")  # a mode of 0500 does not keep root out
    monkeypatch.setattr(results.tempfile, "TemporaryDirectory", Mock(side_effect=refused))
    assert "locked: Permission denied; --out" in run("--image", picture, "--phrase", "x", code=2)[1]


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_a_geotiff_becomes_a_geotiff_and_geojson(run, tmp_path, monkeypatch):
    rasterio = pytest.importorskip("imagery.polygons").rasterio
    bands = ramps(4, 150, 130, np.uint16, 4000)
    bands[:, :20] = 0
    path = write_tiff(tmp_path / "field.tif", bands, nodata=0)
    for tiling, tile in ((None, ()), ("scene", ("--tile", 64)), ("independent", ("--tile", 64, "--tiling", "independent"))):
        run("--image", path, "--phrase", "the field", "--bands", "4,3,2", "--out", out := tmp_path / f"{tiling}", *tile)
        (line,) = lines(out)
        assert line.get("tiling") == tiling
        with rasterio.open(path) as scene, rasterio.open(out / line["mask"]) as mask:
            assert (mask.crs, mask.transform, mask.shape) == (scene.crs, scene.transform, scene.shape)
            pixels, tags = mask.read(1), mask.tags()
            assert np.array_equal(pixels == mask.nodata, ~scene.read_masks().any(axis=0))
        assert line["area_share"] == pytest.approx((pixels == 255).sum() / (pixels != 127).sum())
        assert line["area_m2"] == pytest.approx(0.25 * (pixels == 255).sum(), rel=1e-3)
        about = {"image": str(path), "phrase": "the field", "model": "tiny", "weights": "tiny, trained on scenes, epoch 0"}
        about |= {"date": line["date"]}
        assert about.items() <= tags.items()
        features = [feature["properties"] for feature in json.loads((out / line["polygons"]).read_text())["features"]]
        assert len(features) == line["polygon_count"] > 0 and all(about.items() <= f.items() for f in features)
        assert abs(datetime.now().astimezone() - datetime.fromisoformat(line["date"])).total_seconds() < 100
        mean = np.average([f["confidence"] for f in features], weights=[f["area_m2"] for f in features])
        assert mean == pytest.approx(line["confidence"], abs=2e-3)
    options = ("--probabilities", "--threshold", 0.4, "--min-area", 50)
    run("--image", path, "--phrase", "the field", "--out", out := tmp_path / "p", *options)
    (line,) = lines(out)
    assert (line["threshold"], line["min_area"]) == (0.4, 50)
    with rasterio.open(out / line["probabilities"]) as values, rasterio.open(out / line["mask"]) as mask:
        assert (values.crs, values.transform, values.dtypes) == (mask.crs, mask.transform, ("float32",))
        p, pixels = values.read(1), mask.read(1)
        assert np.array_equal(np.isnan(p), pixels == 127) and "model" in values.tags()
    _, labels, facts, _ = cv2.connectedComponentsWithStats((p > 0.4).astype(np.uint8), connectivity=4)
    assert np.array_equal(pixels == 255, np.append(False, facts[1:, 4] >= 50)[labels])
    features = [f["properties"] for f in json.loads((out / line["polygons"]).read_text())["features"]]
    assert sorted(f["area_m2"] for f in features) == pytest.approx(sorted(0.25 * facts[1:, 4][facts[1:, 4] >= 50]), rel=2e-3)
    monkeypatch.delitem(sys.modules, "imagery.polygons")
    monkeypatch.setitem(sys.modules, "shapely", None)
    nowhere = write_tiff(tmp_path / "nowhere.tif", ramps(3, 60, 50, np.uint16), crs=None, transform=None)
    for image, out, note in ((path, "bare", "pip install rasterio shapely pyproj"), (nowhere, "none", "no coordinate system")):
        said, _ = run("--image", image, "--phrase", "x", "--out", tmp_path / out)
        (line,) = lines(tmp_path / out)
        assert note in " ".join(line["notes"]) and all(note in said for note in line["notes"]) and "polygons" not in line
        assert rasterio.open(tmp_path / out / line["mask"]).shape == rasterio.open(image).shape


def test_a_page_shows_the_mask_the_pseudo_mask_and_their_files(predictor, ckpt, picture, tmp_path, monkeypatch):
    overlay, lit, words, files = page.answer(predictor, str(tmp_path), str(picture), "the ship")
    mask = predictor.predict(picture, "the ship")[0]
    assert np.array_equal(np.asarray(Image.open(files[0])) > 0, mask) and len(files) == 1 and Path(overlay).is_file()
    assert lit.shape == (90, 120, 3) and lit.dtype == np.uint8 and words.startswith('plane.png, "the ship": ')
    for path, phrase, sentence in ((None, "x", "no picture"), (str(picture), " ", "is empty"), ("a.png", "x", "no image")):
        with pytest.raises(UserError, match=sentence):
            page.answer(predictor, str(tmp_path), path, phrase)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match="pip install gradio"):
        page.main(["--ckpt", str(ckpt)])


def test_the_snippets_of_the_docs_run_in_another_folder(ckpt, picture):
    """docs/embedding.md, and its list of names, which is what stands at the top of this project."""
    text = (ROOT / "docs" / "embedding.md").read_text()
    (folder := picture.parent).joinpath("best.pt").write_bytes(ckpt.read_bytes())
    code = "\n".join(re.findall("```python\n(.*?)```", text, re.DOTALL)) + "print(len(masks), p.min() >= 0, grey.shape)"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "There is no image gone.png: check the name.\n2 True (90, 120)\n"
    assert (folder / "model.pt2").stat().st_size > 1e6
    names = re.search("takes these names(.*?)Importing", text, re.DOTALL)[1]
    top = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert set(re.findall("`(\\w+)`", names)) == top
