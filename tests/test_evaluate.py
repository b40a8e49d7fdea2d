"""Scores by hand-computed values; which samples a process scores; the command line."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import evaluate
from annotations.masks import decode_rle
from annotations.predictions import encode, read_predictions
from data import open_dataset
from model import RS2SAM2, Output
from presets import PRESETS
from runtime.errors import UserError
from synthetic_scenes.scenes import make_scenes
from weights.checkpoints import model_entries
from weights.provenance import in_words, provenance, taught, words


def test_iou_by_hand():
    a, b = np.array([[1, 1, 0], [0, 0, 0]]), np.array([[1, 0, 1], [0, 0, 0]])
    assert evaluate.iou_counts(a, b) == (1, 3)
    scores = evaluate.summarise([1, 9, 0], [3, 10, 0])
    assert scores["mIoU"] == pytest.approx(100 * (1 / 3 + 0.9 + 1) / 3) and scores["oIoU"] == pytest.approx(1000 / 13)
    assert scores["Pr@0.9"] == pytest.approx(200 / 3)  # >=, and a correct "nothing there" counts
    assert scores["Pr@0.5"] == scores["Pr@0.8"] == pytest.approx(200 / 3) and scores["samples"] == 3
    paper = evaluate.summarise([1, 9, 0], [3, 10, 0], "paper")
    assert paper["mIoU"] == pytest.approx(100 * (1 / 3 + 0.9) / 3) and paper["oIoU"] == scores["oIoU"]
    assert evaluate.summarise([0], [0])["oIoU"] == 100 and evaluate.summarise([0], [0], "paper")["oIoU"] == 0


def square(y: int, x: int, side: int, size: int = 30) -> np.ndarray:
    mask = np.zeros((size, size), np.uint8)
    mask[y : y + side, x : x + side] = 1
    return mask


def test_the_boundary_region_is_as_wide_as_two_per_cent_of_the_diagonal():
    assert evaluate.boundary_region(square(5, 5, 10)).sum() == 100 - 64  # diagonal 42: 1 pixel
    assert evaluate.boundary_region(square(30, 30, 40, size=100)).sum() == 1600 - 34**2  # diagonal 141: 3 pixels
    assert evaluate.boundary_region(square(0, 0, 10, size=12)).sum() == 100 - 64  # never less than 1
    assert evaluate.boundary_region(np.ones((30, 30), np.uint8)).sum() == 900 - 28**2  # what is outside is no mask


def test_boundary_iou_by_hand():
    a, empty = square(5, 5, 10), square(0, 0, 0)
    assert evaluate.boundary_iou(a, a, "ours") == 1
    # two rings of 36 pixels, one to the right of the other: both long sides meet in 9 pixels each
    assert evaluate.boundary_iou(a, square(5, 6, 10), "ours") == pytest.approx(18 / (72 - 18))
    assert evaluate.boundary_iou(a, square(20, 20, 5), "ours") == 0
    assert evaluate.boundary_iou(empty, empty, "ours") == 1 and evaluate.boundary_iou(empty, empty, "paper") == 0
    assert evaluate.boundary_iou(empty, a, "ours") == evaluate.boundary_iou(a, empty, "paper") == 0
    # two pixels too large on all sides: a good IoU, a bad outline
    a, b = square(20, 20, 60, size=100), square(18, 18, 64, size=100)
    assert evaluate.boundary_iou(a, b, "ours") < 0.4 < 0.85 < evaluate.sample_iou(*evaluate.iou_counts(a, b), "ours")


def test_intervals_are_the_bootstrap_s():
    """Two images, one all right and one all wrong: a draw of two has none, one or both right, with 1/4, 1/2, 1/4."""
    def row(scene, iou):
        return {"scene": scene, "iou": iou, "intersection": 50 * iou, "union": 100}

    rows = [row("a", 1.0), row("a", 1.0), row("b", 0.0), row("b", 0.0)]
    assert evaluate.bootstrap(rows, "ours") == {"mIoU interval": [0.0, 100.0], "oIoU interval": [0.0, 50.0]}
    # 400 images, half right: the interval is that of a mean of 400 coins, 50 +- 1.96 * 2.5
    low, high = evaluate.bootstrap([row(str(i), float(i % 2)) for i in range(400)], "ours")["mIoU interval"]
    assert low == pytest.approx(45.1, abs=0.8) and high == pytest.approx(54.9, abs=0.8)
    same = [row("one", 0.3), row("one", 0.5)]  # one image: nothing varies
    assert evaluate.bootstrap(same, "ours")["mIoU interval"] == pytest.approx([40, 40])


def test_results_by_group(capsys):
    names = [evaluate.size_name(share) for share in (0, 0.0099, 0.01, 0.0999, 0.1, 1)]
    assert [name.split()[0] for name in names] == ["nothing", "small", "medium", "medium", "large", "large"]
    rows = [
        {"scene": scene, "kind": kind, "size": "large (10 % and more)", "category": "", "intersection": i, "union": 10,
         "iou": i / 10, "boundary_iou": i / 20}
        for scene, kind, i in (("a", "colour", 10), ("a", "size", 4), ("b", "colour", 6))
    ]  # fmt: skip
    result = evaluate.results_by_group(rows, "ours")
    assert result.keys() == {"scores", "by kind", "by size"}  # no row has a category
    assert result["by kind"]["colour"]["mIoU"] == pytest.approx(80) and result["by kind"]["size"]["samples"] == 1
    assert result["by kind"]["colour"]["bIoU"] == pytest.approx(40) and result["scores"]["mIoU interval"] == [60, 70]
    evaluate.print_results(result)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["Pr@0.5", "Pr@0.6", "Pr@0.7", "Pr@0.8", "Pr@0.9", "oIoU", "mIoU", "bIoU", "samples"]
    assert printed[1].split() == "all 66.67 66.67 33.33 33.33 33.33 66.67 66.67 33.33 3".split()
    assert [line.split()[0] for line in printed[2:5]] == ["colour", "size", "large"]
    assert printed[5] == "95 % intervals (bootstrap over images): mIoU 60.00 to 70.00, oIoU 60.00 to 70.00"


def test_best_median_worst_covers_both_ends():
    rows = [{"iou": i / 10} for i in range(10)]
    assert evaluate.best_median_worst(rows, 5) == [9, 8, 5, 4, 0] and evaluate.best_median_worst(rows, 1) == [9]
    assert sorted(evaluate.best_median_worst(rows, 50)) == list(range(10))


def test_masks_are_the_positive_logits_at_the_size_asked_for():
    logits = torch.tensor([[-1.0, 3.0], [-1.0, 3.0]])[None, None]  # four columns: -1, 0, 2, 3; 0 is no mask
    assert evaluate.masks_at(logits, (3, 4)).tolist() == [[False, False, True, True]] * 3


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("data") / "scenes", train=1, val=2, test=1, size=96, progress=False)


class Bright(nn.Module):
    """A network that finds what is brighter than grey."""

    def __init__(self):
        super().__init__()
        self.grey = nn.Parameter(torch.tensor(0.5))
        self.union_encoder = nn.Module()
        self.union_encoder.tokenizer = lambda phrases: (torch.zeros(len(phrases), 32).long(), torch.ones(len(phrases)))
        self.batches = []

    def normalise(self, image, encoder_image):
        return image / 255, encoder_image / 255

    def forward(self, image, encoder_image, ids, lengths):
        self.batches.append(len(image))
        assert not self.training and not torch.is_grad_enabled()
        return Output(F.avg_pool2d(image.mean(1, keepdim=True), 4) - self.grey, None, ids)


@pytest.mark.parametrize("protocol", ["ours", "paper"])
def test_scoring_row_by_row(protocol, scenes):
    model, dataset = Bright().train(), open_dataset(scenes, "val", image_size=64, encoder_size=32)
    rows = evaluate.score(model, dataset, protocol, batch_size=4)
    assert model.training and model.batches == [4, 4, 2] and len(rows) == 10  # in its order
    for row, item in zip(rows, (dataset[i] for i in range(10))):
        assert all(row[key] == item[key] for key in ("id", "file", "scene", "phrase", "kind", "category"))
        truth = item["mask" if protocol == "ours" else "target"].numpy()
        logits = F.avg_pool2d((item["image"][None] / 255).mean(1, keepdim=True), 4) - 0.5
        mask = F.interpolate(logits, truth.shape, mode="bilinear")[0, 0].numpy() > 0
        assert truth.shape == ((96, 96) if protocol == "ours" else (64, 64)) and 0 < mask.mean() < 1
        assert (row["intersection"], row["union"]) == ((mask & (truth > 0)).sum(), (mask | (truth > 0)).sum())
        assert row["iou"] == row["intersection"] / row["union"] and row["share"] == pytest.approx(truth.mean())
        assert row["boundary_iou"] == evaluate.boundary_iou(mask, truth, protocol)
    assert evaluate.score(model, dataset, protocol, batch_size=5, workers=1) == rows and model.batches == [4, 4, 2, 5, 5]


@pytest.mark.parametrize("batch_size, batches", [(4, ([4, 2], [4])), (20, ([10], []))])
def test_two_processes_count_nothing_twice(scenes, monkeypatch, batch_size, batches):
    """They take batches in turn, and one of them may get none; each returns all rows."""
    dataset, parts, models = open_dataset(scenes, "val", image_size=64, encoder_size=32), [], (Bright(), Bright())
    rows = evaluate.score(Bright(), dataset, batch_size=batch_size)
    monkeypatch.setattr(evaluate, "world_size", lambda: 2)
    for rank in (1, 0):
        def gather(mine):
            parts.append(mine)
            return [mine, {i: rows[i] for i in range(10) if i not in mine}]

        monkeypatch.setattr(evaluate, "rank", lambda: rank)  # noqa: B023
        monkeypatch.setattr(evaluate, "gather", gather)
        assert evaluate.score(models[rank], dataset, batch_size=batch_size) == rows
    assert tuple(model.batches for model in models) == batches
    assert sorted([*parts[0], *parts[1]]) == list(range(10))


ORIGIN = {"file": "old/best.pt", "model": "tiny", "run": "runs/old", "data": "scenes", "epoch": 6, "score": None, "init": None}


@pytest.fixture(scope="module")
def checkpoint(scenes, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    clip = PRESETS["tiny"].encoder_name | {"vision_cfg": PRESETS["tiny"].encoder_name["vision_cfg"] | {"image_size": 32}}
    model = RS2SAM2(replace(PRESETS["tiny"], image_size=64, encoder_name=clip))
    facts = {"recipe": {}, "left_out": [], "model_name": "tiny", "revision": "abc", "epoch": 3, "data": str(scenes)}
    facts |= {"run": "runs/s-1", "metrics": {"mIoU": 71.5, "oIoU": 70.25, "samples": 10}, "init": ORIGIN}
    path = tmp_path_factory.mktemp("run") / "best.pt"
    torch.save(model_entries(model) | facts, path)
    return path


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def call(*args, code: int = 0) -> str:
        """Run evaluate.py with these arguments, which must end with this exit code -> what it prints, on both streams."""
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
        try:
            evaluate.main()
            ended = 0
        except SystemExit as end:
            ended = end.code
        printed = capsys.readouterr()
        assert ended == code, printed
        return printed.out + printed.err

    return call


def test_evaluation_needs_the_checkpoint_alone(call, scenes, checkpoint):
    Path("best.pt").symlink_to(checkpoint)
    printed = call("--json", "s.json", "--panels", 3).splitlines(keepends=True)
    assert printed[0] == (f"best.pt -> {checkpoint}: tiny, run runs/s-1, trained on {scenes}, epoch 3, validation mIoU 71.50, "
                          "oIoU 70.25, fine-tuned from old/best.pt (tiny, run runs/old, trained on scenes, epoch 6)\n")
    printed = "".join(printed[1:])
    assert printed.startswith(f"best.pt on {scenes}, split test, protocol ours\n")
    assert "95 % intervals" in printed and printed.endswith("wrote s.json\nwrote panels-test.png\n")
    result = json.loads(Path("s.json").read_text())
    rows = result["rows"]
    assert len(rows) == result["scores"]["samples"] == 5 and result["epoch"] == 3 and result["revision"] == "abc"
    assert (result["model_name"], result["split"], result["protocol"]) == ("tiny", "test", "ours")
    assert result["parameters"] > 4_000_000 and result["dtype"] == "float32"
    assert result["weights"] == {"model": "tiny", "run": "runs/s-1", "data": str(scenes), "epoch": 3, "revision": "abc",
                                 "score": {"mIoU": 71.5, "oIoU": 70.25}, "init": ORIGIN}  # fmt: skip
    assert result["scores"]["mIoU"] == pytest.approx(100 * np.mean([r["iou"] for r in rows]))
    for group in ("by kind", "by size", "by category"):
        assert sum(scores["samples"] for scores in result[group].values()) == len(rows)
    panels = cv2.imread("panels-test.png")
    assert panels.shape[1] == 5 * 256 and panels.shape[0] > 3 * 256  # image, outlines, truth, pseudo-mask, prediction
    call("--ckpt", checkpoint, "--panels", 1, "--split", "val", "--protocol", "paper")
    call("--ckpt", checkpoint, "--panels", 1, "--dtype", "bfloat16", "--json", "b.json")
    low = json.loads(Path("b.json").read_text())
    assert low["dtype"] == "bfloat16" and low["scores"]["mIoU"] == pytest.approx(result["scores"]["mIoU"], abs=2)
    assert "float32" in call("--protocol", "paper", "--dtype", "bfloat16", code=2)
    assert "torchrun --nproc-per-node 8 evaluate.py" in call("--help")
    assert {p.name for p in Path().glob("[!b]*")} == {"s.json", "panels-test.png", "panels-test-2.png", "panels-val.png"}


def test_panels_of_chosen_samples(call, scenes, checkpoint, monkeypatch):
    drawn, panel = [], evaluate.panel
    monkeypatch.setattr(evaluate, "panel", lambda item, *masks: drawn.append(item["id"]) or panel(item, *masks))
    ids = [sample.id for sample in open_dataset(scenes, "test").samples][2::-2]
    call("--ckpt", checkpoint, "--ids", *ids, "--predictions", "p.json")
    assert list(dict.fromkeys(drawn)) == ids and cv2.imread("panels-test.png").shape[1] == 5 * 256
    drawn.clear()
    call("--from", "p.json", "--data", scenes, "--ids", ids[0], "--protocol", "ours")
    assert set(drawn) == {ids[0]} and cv2.imread("panels-test-2.png").shape[1] == 4 * 256  # no pseudo-mask
    assert "--ids 99: split test has no such sample, but " in call("--ckpt", checkpoint, "--ids", 99, code=2)


def test_predictions_come_back_exactly(call, scenes, checkpoint):
    """Their scores in protocol `ours` are those of the model, row by row; in `paper` those of masks resized to 1024 pixels."""
    call("--ckpt", checkpoint, "--predictions", "p.json", "--json", "a.json")
    printed = call("--from", "p.json", "--data", scenes, "--json", "b.json")
    assert f"p.json on {scenes}, split test, protocol ours\n" in printed and "split test, protocol paper\n" in printed
    a, b, entries = (json.loads(Path(name).read_text()) for name in ("a.json", "b.json", "p.json"))
    for key in ("scores", "rows", "by kind", "protocol", "split", "data"):
        assert a[key] == b[key], key
    dataset = open_dataset(scenes, "test", image_size=1024)
    for entry, item, row in zip(entries, dataset, b["paper"]["rows"], strict=True):
        assert entry["id"] == item["id"] and entry["image"] == Path(item["file"]).name and 0 <= entry["score"] <= 1
        assert entry["phrase"] == item["phrase"] and entry["segmentation"]["size"] == [96, 96]
        mask = decode_rle(entry["segmentation"])
        large, target = np.array(Image.fromarray(mask).resize((1024, 1024), Image.NEAREST)), item["target"].numpy()
        assert (row["intersection"], row["union"]) == ((large & target).sum(), (large | target).sum())
    call("--ckpt", checkpoint, "--protocol", "paper", "--predictions", "q.json")  # of the stored size too
    assert {tuple(entry["segmentation"]["size"]) for entry in json.loads(Path("q.json").read_text())} == {(96, 96)}


def test_the_confidence_is_the_mean_probability_inside(scenes):
    dataset = open_dataset(scenes, "val", image_size=64, encoder_size=32)
    for row, item in zip(evaluate.score(Bright(), dataset, "ours", masks=True), dataset):
        logits = F.avg_pool2d((item["image"][None] / 255).mean(1, keepdim=True), 4) - 0.5
        whole = F.interpolate(logits, (96, 96), mode="bilinear")[0, 0]
        assert (decode_rle(row["segmentation"]) == (whole > 0).numpy()).all()
        assert row["confidence"] == pytest.approx(float(whole[whole > 0].sigmoid().mean()), abs=1e-6)


def test_anybody_s_predictions(call, scenes):
    """Without ids, in capitals, at another size, in another order, with others among them: each reaches its phrase."""
    dataset = open_dataset(scenes, "test", image_size=64)
    halves = [np.repeat([[1, 0]], 24, 0).repeat(24, 1), np.repeat([[0, 1]], 24, 0).repeat(24, 1)]
    entries = [
        {"image": f"somewhere/{Path(item['file']).name}", "phrase": item["phrase"].upper().replace(" ", "  "),
         "segmentation": encode(halves[n % 2])} for n, item in enumerate(dataset)
    ]  # fmt: skip
    Path("p.json").write_text(json.dumps([*entries[::-1], entries[0] | {"phrase": "nobody asks for it"}]))
    printed = call("--from", "p.json", "--data", scenes, "--protocol", "ours", "--json", "s.json")
    assert printed.startswith("1 predictions in p.json are for no phrase of split test and were left out\n")
    for n, (row, item) in enumerate(zip(json.loads(Path("s.json").read_text())["rows"], dataset, strict=True)):
        half = item["mask"].numpy()[:, :48] if n % 2 == 0 else item["mask"].numpy()[:, 48:]
        assert row["intersection"] == half.sum() and row["union"] == 96 * 48 + item["mask"].sum() - half.sum()


def test_what_is_wrong_with_predictions_is_one_sentence(call, scenes, checkpoint):
    Path("there.json").write_text("mine")
    call("--ckpt", checkpoint, "--predictions", "p.json")
    sound = json.loads(Path("p.json").read_text())
    no_id = [{k: v for k, v in entry.items() if k != "id"} for entry in sound]
    for number, (entries, told) in enumerate((
        (sound[1:], f"has no prediction for 1 of 5 phrases (the first: {sound[0]['phrase']!r} of {sound[0]['image']}, id"),
        ([], "is no JSON list of predictions"),
        ({"masks": sound}, "is no JSON list of predictions"),
        ([*sound, 3], "entry 6 is no prediction ("),
        ([*sound, {"image": "1.jpg"}], "entry 6 is no prediction (it lacks 'phrase'): it needs image, phrase and segmentation"),
        ([sound[0] | {"segmentation": {"size": [96, 96], "counts": "0"}}], "entry 1 is no prediction (the mask is not RLE"),
        ([*sound, sound[0] | {"segmentation": encode(np.ones((9, 9)))}], f"has two different masks for {sound[0]['image']}"),
        ([*no_id, no_id[0] | {"segmentation": encode(np.ones((9, 9)))}], "leave one, or give each its id"),
    )):  # fmt: skip
        Path(f"{number}.json").write_text(json.dumps(entries))
        printed = call("--from", f"{number}.json", "--data", scenes, code=2)
        assert printed.startswith(f"evaluate.py: {number}.json") and told in printed and printed.count("\n") == 1
    for args, told in (
        (("--from", "p.json"), "--from scores a file of masks: it needs --data"),
        (("--from", "p.json", "--data", scenes, "--predictions", "q.json"), "--predictions has nothing to write"),
        (("--from", "nowhere.json", "--data", scenes), "nowhere.json can't be read (No such file or directory)"),
        (("--from", "there.json", "--data", scenes), "there.json is not sound JSON"),
        (("--from", "p.json", "--ckpt", checkpoint), "argument --ckpt: not allowed with argument --from"),
        (("--ckpt", checkpoint, "--predictions", "there.json"), "there.json exists or has no folder"),
    ):
        assert told in call(*args, code=2)
    assert Path("there.json").read_text() == "mine"


def test_two_images_of_one_name_need_an_id(tmp_path):
    rle, path = encode(np.ones((2, 2))), tmp_path / "p.json"
    wanted = [("1", "a/x.png", "the ship"), ("2", "b/x.png", "the ship"), ("3", "b/x.png", "the tank")]
    entries = [{"image": "x.png", "phrase": phrase, "segmentation": rle} for phrase in ("the ship", "the tank")]
    path.write_text(json.dumps(entries))
    with pytest.raises(UserError, match="x.png is the name of two images, a/x.png and b/x.png: give each entry its id"):
        read_predictions(path, wanted)
    assert read_predictions(path, wanted[1:]) == ([rle, rle], 0)
    empty = encode(np.zeros((2, 2)))
    path.write_text(json.dumps([entries[0] | {"id": 1}, entries[0] | {"id": "2", "segmentation": empty}, entries[1]]))
    assert read_predictions(path, wanted) == ([rle, empty, rle], 0)


def test_provenance_and_what_was_taught(scenes, tmp_path):
    """Of checkpoints that know it, of older ones and of published weights."""
    assert provenance({"model_name": "paper", "data": None, "epoch": None, "revision": ""}) == dict.fromkeys(
        ("run", "data", "epoch", "score", "revision", "init")) | {"model": "paper"}  # fmt: skip
    old = {"model_name": "tiny", "data": "scenes", "epoch": 2, "args": {"out": "runs/a", "init": "x.pt"}, "metrics": {}}
    assert provenance(old)["init"] == {"file": "x.pt"}
    assert in_words(provenance(old)) == "tiny, run runs/a, trained on scenes, epoch 2, fine-tuned from x.pt"
    lesson = taught(train_set := open_dataset(scenes, "train"))
    assert lesson["data"] == "scenes" and lesson["generated"] and lesson["words"] == sorted(set(lesson["words"]))
    assert set(lesson["words"]) == {word for _, phrases in said(train_set) for word in phrases.lower().split()}
    assert words("The  Big-ship's left, 2 m") == ["the", "big-ship's", "left", "2", "m"]
    csv = tmp_path / "mine"
    for folder in (csv / "images", csv / "masks"):
        folder.mkdir(parents=True)
        cv2.imwrite(str(folder / "1.png"), np.ones((8, 8), np.uint8))
    (csv / "phrases.csv").write_text("image,mask,phrase,split\n1.png,1.png,The Café,train\n")
    assert taught(open_dataset(csv, "train")) == {"data": "mine", "generated": False, "words": ["café", "the"]}
    assert taught(open_dataset(csv, "train"), {"taught": lesson}) == {
        "data": "mine", "generated": False, "words": sorted({*lesson["words"], "café"})}  # fmt: skip
    assert taught(train_set, {"taught": lesson}) == lesson and not taught(train_set, {"published": 1})["generated"]


def said(dataset) -> list[tuple[str, str]]:
    return [(sample.id, phrase) for sample in dataset.samples for phrase in sample.phrases]


def test_evaluate_s_errors_are_one_sentence(call, checkpoint, monkeypatch):
    Path("there.json").write_text("mine")
    Path("dangling.pt").symlink_to("runs/gone/best.pt")
    for args, code, told in (
        ((), 2, "no checkpoint at best.pt"),
        (("--ckpt", "dangling.pt"), 2, "dangling.pt is a link to runs/gone/best.pt, which is not there"),
        (("--ckpt", checkpoint, "--json", "there.json"), 2, "there.json exists"),
        (("--ckpt", checkpoint, "--json", "no/s.json"), 2, "no/s.json exists or has no folder: name another file"),
        (("--ckpt", checkpoint, "--split", "dev"), 2, "has no samples in split 'dev', its splits are: train"),
        (("--ckpt", checkpoint, "--data", "nowhere"), 2, "no folder nowhere"),
        (("--ckpt", "there.json"), 2, "there.json"),
    ):
        printed = call(*args, code=code)
        assert printed.startswith("evaluate.py: ") and told in printed
    assert Path("there.json").read_text() == "mine"
    for args, name in ((("--json", "s.json"), "s.json"), (("--panels", 1), "panels-test.png")):  # a full disk
        def full(_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        printed = call("--ckpt", checkpoint, *args, code=1)
        assert f"evaluate.py: {name} can't be written (No space left on device)" in printed and not Path(name).exists()
