"""What each part is worth: models without some of them, boundary IoU, the tools that measure."""

import argparse
import dataclasses
import importlib.util
import json
import pickle
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import random_batch, small_preset
from test_scenes import answer

import evaluate
import losses
import train
from checkpoints import CheckpointError, load_checkpoint
from model import PARTS, PRESETS, RS2SAM2, check_parts, count_parameters
from recipe import RECIPES, parameter_groups
from runs import UsageError
from scenes import HELD_OUT, make_scenes, scene

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import ablate  # noqa: E402
import bhfm  # noqa: E402
import language  # noqa: E402

VARIANTS = [
    *PARTS,
    "fusion,decoder-fusion,mask-prompt,boundary",  # what the phrase says comes through the sparse tokens alone
    "fusion,decoder-fusion,mask-prompt",
    "fusion,decoder-fusion",
    "mask-prompt,sparse-prompt",  # the class token and the visual tokens are not read
    "fusion,decoder-fusion,boundary,sparse-prompt",  # the text tokens are not read
]
LOSS_PARTS = {"cross-entropy", "dice", "soft-edges", "pseudo"}


def variant(parts: str, encoder: str = "open_clip") -> RS2SAM2:
    torch.manual_seed(0)
    return RS2SAM2(dataclasses.replace(small_preset(encoder), without=tuple(parts.split(","))))


def loss_without(parts: str, output, target) -> dict:
    recipe = dataclasses.replace(RECIPES["tiny"], boundary=0.2, pseudo=1.0).without(tuple(parts.split(",")))
    return losses.total_loss(output, target, recipe.ce, recipe.dice, recipe.boundary, recipe.pseudo, recipe.soft_edges)


# ---- models without parts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["open_clip", "beit3"])
@pytest.mark.parametrize("parts", VARIANTS)
def test_without_parts_every_trained_parameter_gets_a_gradient_and_no_other(parts, encoder):
    model = variant(parts, encoder)
    with torch.no_grad():  # every parameter of order one, so that each matters
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p) / max(1, p[0].numel() if p.dim() > 1 else 1) ** 0.5)
    output = model(*random_batch(model, [7, 4]))
    target = torch.zeros(2, 64, 64)
    target[:, 10:40, 20:50] = 1
    loss_without(parts, output, target)["loss"].backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.abs().max() > 0, name
        else:
            assert p.grad is None, name
    groups = parameter_groups(model, 1e-3, 0.5)
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("parts", VARIANTS)
def test_what_is_left_out_is_not_built(parts):
    whole, less = count_parameters(variant("soft-edges")), count_parameters(variant(parts))
    if set(parts.split(",")) <= LOSS_PARTS:
        assert less == whole
    else:
        assert less["trained"] < whole["trained"] and less["total"] < whole["total"]
    kept = variant(parts).state_dict().keys()
    gone = {
        "fusion": "adapter.", "rewriting": "text_reads_vision", "decoder-fusion": "decoder_fusion.",
        "mask-prompt": "mask_prompt.", "sparse-prompt": "sparse_prompt.", "boundary": "text_weight.",
    }  # fmt: skip
    for part in set(parts.split(",")) - LOSS_PARTS:
        assert not [key for key in kept if gone[part] in key], part


def test_the_whole_model_is_what_it_was():
    """The parts are drawn in the order they always were, so a seed gives the same weights."""
    torch.manual_seed(7)
    model = RS2SAM2(PRESETS["tiny"])
    assert count_parameters(model) == {"total": 4_635_539, "trained": 1_354_678, "frozen": 3_280_861}
    state = model.state_dict()
    assert len(state) == 451
    last = state["mask_decoder.pred_obj_score_head.layers.2.weight"]  # drawn after everything else
    assert last.flatten()[0].item() == pytest.approx(-0.06832161545753479, abs=1e-7)


@pytest.mark.parametrize("parts", VARIANTS[-5:])
def test_a_checkpoint_rebuilds_its_variant(parts, tmp_path):
    model = variant(parts).eval()
    facts = {"data": "scenes", "model_name": "tiny", "revision": ""}
    torch.save(facts | {"preset": dataclasses.asdict(model.preset), "model": model.state_dict()}, tmp_path / "m.pt")
    again, _ = load_checkpoint(tmp_path / "m.pt")
    assert again.preset == model.preset
    batch = random_batch(model, [5, 3])
    with torch.no_grad():
        for ours, theirs in zip(model(*batch), again(*batch)):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_a_checkpoint_of_before_is_the_whole_model(tmp_path):
    model = RS2SAM2(small_preset("open_clip"))
    preset = dataclasses.asdict(model.preset)
    del preset["without"]
    facts = {"data": "scenes", "model_name": "tiny", "revision": "", "model": model.state_dict()}
    torch.save(facts | {"preset": preset}, tmp_path / "m.pt")
    assert load_checkpoint(tmp_path / "m.pt")[0].preset == model.preset
    del preset["version"]  # from when adapters blended what they add to the text now
    torch.save(facts | {"preset": preset, "revision": "abc1234"}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="m.pt .*older form of architecture ours.*: use the revision abc1234"):
        load_checkpoint(tmp_path / "m.pt")
    published = RS2SAM2(small_preset("beit3"))  # which has stayed the same
    preset = dataclasses.asdict(published.preset)
    del preset["version"]
    torch.save(facts | {"preset": preset, "model": published.state_dict(), "tokenizer": None}, tmp_path / "p.pt")
    assert load_checkpoint(tmp_path / "p.pt")[0].preset == published.preset
    preset = dataclasses.asdict(model.preset)
    torch.save(facts | {"preset": preset | {"without": ["wings"]}}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="unknown part 'wings'"):
        load_checkpoint(tmp_path / "m.pt")


@pytest.mark.parametrize(
    "parts, expected",
    [
        ("wings", "unknown part 'wings': the parts are fusion, rewriting"),
        ("fusion,decoder-fusion,mask-prompt,sparse-prompt", "the phrase has no way to SAM 2"),
        ("dice,cross-entropy", "nothing teaches the mask"),
        ("", "unknown part ''"),
    ],
)
def test_what_can_t_be_left_out_is_one_sentence(parts, expected, capsys, monkeypatch):
    with pytest.raises(ValueError, match=expected):
        check_parts(parts.split(","))
    monkeypatch.setattr(sys, "argv", ["train.py", "--without", parts])
    with pytest.raises(SystemExit):
        train.main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("train.py: error: argument --without: ") and expected in last


def test_the_loss_leaves_out_its_terms():
    model = variant("soft-edges")
    output, target = model(*random_batch(model, [5, 3])), torch.zeros(2, 64, 64)
    target[:, 10:40, 20:50] = 1
    whole = losses.total_loss(output, target, dice_weight=1.0, boundary_weight=0.2, pseudo=1.0)
    assert set(whole) == {"loss", "ce", "dice", "boundary", "pseudo"}
    for part, name in (("cross-entropy", "ce"), ("dice", "dice"), ("boundary", "boundary"), ("pseudo", "pseudo")):
        less = loss_without(part, output, target)
        assert set(less) == set(whole) - {name}
        torch.testing.assert_close(less["loss"], whole["loss"] - whole[name])
    hard = loss_without("soft-edges", output, target)["boundary"]
    z = torch.nn.functional.interpolate(output.logits, (64, 64), mode="bilinear", align_corners=False)[:, 0]
    expected = [
        losses.published_boundary(z[i : i + 1], target[i : i + 1], output.log_weight[i]).item() for i in range(2)
    ]
    assert hard.item() == pytest.approx(0.2 * np.mean(expected), rel=1e-5)  # samples do not mix


# ---- boundary IoU ---------------------------------------------------------------------------------------------------


def square(top: int, left: int, side: int, size: int = 30) -> np.ndarray:
    mask = np.zeros((size, size), np.uint8)
    mask[top : top + side, left : left + side] = 1
    return mask


def test_the_boundary_region_is_as_wide_as_two_per_cent_of_the_diagonal():
    assert evaluate.boundary_region(square(5, 5, 10)).sum() == 100 - 64  # diagonal 42: 1 pixel
    assert evaluate.boundary_region(square(30, 30, 40, size=100)).sum() == 1600 - 34**2  # diagonal 141: 3 pixels
    assert evaluate.boundary_region(square(0, 0, 10, size=12)).sum() == 100 - 64  # never less than 1
    # the border of the image is an outline too
    assert evaluate.boundary_region(np.ones((30, 30), np.uint8)).sum() == 900 - 28**2


def test_boundary_iou_by_hand():
    a = square(5, 5, 10)
    assert evaluate.boundary_iou(a, a, "ours") == 1
    # Two rings of 36 pixels, one pixel apart: they share two sides of 9 and cross nowhere else.
    assert evaluate.boundary_iou(a, square(5, 6, 10), "ours") == pytest.approx(18 / (72 - 18))
    assert evaluate.boundary_iou(a, square(20, 20, 5), "ours") == 0
    # A mask without its middle has the same outer ring and one around the hole: (36) of (36 + ring of the hole)
    hollow = a.copy()
    hollow[8:12, 8:12] = 0
    ring = 6 * 6 - 4 * 4
    assert evaluate.boundary_iou(hollow, a, "ours") == pytest.approx(36 / (36 + ring))
    empty = np.zeros_like(a)
    assert evaluate.boundary_iou(empty, empty, "ours") == 1 and evaluate.boundary_iou(empty, empty, "paper") == 0
    assert evaluate.boundary_iou(empty, a, "ours") == evaluate.boundary_iou(a, empty, "paper") == 0


def test_boundary_iou_minds_the_outline_more_than_iou_does():
    a, b = square(20, 20, 60, size=100), square(20, 23, 60, size=100)
    iou = evaluate.sample_iou(*evaluate.iou_counts(a, b), "ours")
    assert evaluate.boundary_iou(a, b, "ours") < 0.6 < 0.9 < iou


def test_rows_carry_it_and_the_table_shows_their_mean():
    rows = [{"intersection": 5, "union": 10, "boundary_iou": b} for b in (0.25, 0.75)]
    scores = evaluate.summarise_rows(rows, "ours")
    assert scores["bIoU"] == 50 and scores["mIoU"] == 50
    header, line = evaluate.table({"all": scores}).splitlines()
    assert header.split()[-2:] == ["bIoU", "samples"] and line.split()[-2:] == ["50.00", "2"]
    assert json.dumps(rows)


# ---- the ablation ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("data") / "scenes", train=6, val=2, test=2, size=96, progress=False)


@pytest.fixture
def call(scenes, tmp_path, monkeypatch, capsys):
    """Call the tool -> (what it printed and said at its end, its exit code)"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    handler = signal.getsignal(signal.SIGTERM)
    common = [
        "ablate.py",
        "--data",
        str(scenes),
        "--out",
        "abl",
        "--variants",
        "whole",
        "sam2",
        "--seeds",
        "0",
        "--jobs",
        "2",
    ]

    def run(*more) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", [*common, *map(str, more)])
        try:
            ablate.main()
            end = ""
        except SystemExit as error:
            end = str(error.code)
        return capsys.readouterr().out, end

    yield run
    signal.signal(signal.SIGTERM, handler)


def test_ablate_trains_scores_and_goes_on_where_it_was(call, tmp_path):
    plots = importlib.util.find_spec("matplotlib") is not None
    flags = ("--samples", 200, "--", "--image-size", 64, "--gpus", 0, "--workers", 0, "--batch-size", 40)
    printed, end = call(*flags)
    assert (end == "") == plots and (plots or "pip install matplotlib" in end), end
    out = tmp_path / "abl"
    assert plots == (out / "ablation.png").exists()
    assert printed.count("train.py") == 2 and printed.count("evaluate.py") == 2
    table = (out / "ablation.md").read_text()
    assert table in printed and "280 samples a run" in table  # rounded up to an epoch
    assert "split test" in table
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines() if row.startswith("|")][2:]
    assert [row[0] for row in rows] == ["union encoder + SAM 2", "all"]
    assert rows[0][1] == "fusion, decoder-fusion, mask-prompt, boundary" and rows[1][1] == ""
    counts = [int(row[2].replace(",", "")) for row in rows]
    assert counts[0] < counts[1] and rows[0][3] == "0"
    best = torch.load(out / "sam2-0" / "best.pt", weights_only=True)
    assert set(best["preset"]["without"]) == {"fusion", "decoder-fusion", "mask-prompt", "boundary"}
    scores = json.loads((out / "whole-0" / "scores.json").read_text())["scores"]
    assert rows[1][4] == f"{scores['mIoU']:.1f}" and rows[1][8] == f"{scores['bIoU']:.1f}"

    again, _ = call(*flags)
    assert "train.py" not in again and "evaluate.py" not in again and table in again
    (out / "whole-0" / "scores.json").unlink()  # as if it had been interrupted before it was scored
    runs = ablate.Runs(argparse.Namespace(out=out, jobs=1), epochs=1)
    train_again, score_again = runs.commands(out / "whole-0", "whole", 0)
    assert train_again == ["train.py", "--resume", out / "whole-0"] and score_again[0] == "evaluate.py"
    assert runs.commands(out / "sam2-0", "sam2", 0) == []
    shutil.copytree(out / "sam2-0", out / "sam2-10")  # a seed of an earlier call
    printed, _ = call(*flags)
    assert "| 0, 10 |" in printed and "| 0, 10 |" in (out / "ablation.md").read_text(encoding="utf-8")
    with pytest.raises(UsageError, match="holds runs with epochs 1, this asks for 2"):
        call(*("--samples", 400, *flags[2:]))


def test_ablate_says_which_run_failed(call):
    printed, end = call("--samples", 200, "--", "--image-size", 100)
    for run in ("whole-0", "sam2-0"):
        assert f"{run} failed with exit code 2" in end and f"abl/{run}.log" in end
    assert "multiple of 32" in end and "ablation.md" not in printed
    with pytest.raises(UsageError, match="--epochs after -- is set by this tool"):
        call("--", "--epochs", "3")


def test_every_variant_of_the_ablation_can_be_built():
    for _, without in ablate.VARIANTS.values():
        check_parts(without.split(",") if without else ())


def run_of(miou: float, seed: int) -> dict:
    scores = dict.fromkeys(ablate.COLUMNS, 10.0) | {"mIoU": miou}
    return {"scores": scores, "parameters": 1000, "split": "test", "curve": [(1.0, 5.0), (2.0 + seed, miou)]}


def test_the_ablation_s_table_by_hand(tmp_path):
    results = {
        "mpg": {0: run_of(50, 0), 1: run_of(54, 1)},
        "whole": {0: run_of(60, 0), 1: run_of(62, 1), 2: run_of(64, 2)},
    }
    table = ablate.markdown(results, {"model": "tiny", "data": "scenes", "samples": 20_000, "epochs": 5})
    mpg, whole = table.splitlines()[-2:]
    assert "| 0, 1 | 52.0 ± 2.8 | 10.0 ± 0.0 |" in mpg and mpg.endswith("| -9.0 ± 1.4 |")  # -10 and -8
    assert "| 0, 1, 2 | 62.0 ± 2.0 |" in whole and whole.endswith("|  |")
    pytest.importorskip("matplotlib")
    ablate.plot(tmp_path / "a.png", results)
    assert (tmp_path / "a.png").stat().st_size > 1000


# ---- language -------------------------------------------------------------------------------------------------------


def test_what_a_phrase_with_left_or_right_names():
    """Against the rules of test_scenes.py: what is found is the one right answer, and it's found where there is an anchor
    to no other object."""
    moved = 0
    for i in range(60):
        s = scene(3, "test", i)
        for target, phrase, kind in s.phrases:
            swapped = language.flip_phrase(phrase, True, False)
            if swapped == phrase:
                continue
            if kind != "relation":
                assert language.swapped_target(phrase, s.objects) is s.objects[target], phrase
            found = language.swapped_target(swapped, s.objects)
            if found is not None:
                right, _ = answer(swapped, s.objects)
                assert len(right) == 1 and right[0] is found, swapped
                moved += found is not s.objects[target]
    assert moved > 10


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Generated scenes and their facts, as the tool makes them."""
    root = make_scenes(tmp_path_factory.mktemp("drawn") / "scenes", 0, 0, 12, seed=4, progress=False)
    dataset = language.open_dataset(str(root), "test", image_size=64, encoder_size=64)
    return dataset, language.describe(dataset, 4)


def test_facts_are_those_of_the_files(drawn):
    dataset, facts = drawn
    assert len(facts) == len(dataset)
    for i, fact in enumerate(facts):
        item = dataset[i]
        assert (item["mask"].numpy() == fact["target"].mask).all() and item["phrase"] == fact["phrase"]
        assert (fact["kind"] == "category") == (fact["others"] == 0)


def numbers(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines() if row.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def test_a_model_deaf_to_the_phrase_is_told(drawn, monkeypatch):
    """It finds each target whatever it is asked: right answers do not move with the phrase."""
    dataset, facts = drawn
    monkeypatch.setattr(language, "answers", lambda model, data: [item["mask"].numpy() for item in data])
    told = {language.heard(next(fact["phrase"] for fact in facts if fact["kind"] == "position"))}
    rows = numbers(language.tables(None, dataset, facts, 0, told))
    for name in ("all", "the phrase", "a phrase of another image", "the category alone there",
                 "left and right swapped there", "left and right swapped in the phrase and in the image"):  # fmt: skip
        assert rows[name][0] == "100.0 (100.0–100.0)", name
    assert rows["a phrase of another image"][2] == rows["left and right swapped there"][2] == "0.0"  # moved
    others = [v for k, v in rows.items() if "of the category in the image" in k and "the phrase" not in k]
    assert sum(int(row[-1]) for row in others) == len(facts) == int(rows["all"][-1])
    assert float(rows["... against what it then names, where it clearly names something"][1]) < 50
    said = int(rows["position, said word for word in training"][-1])
    assert said >= 1 and said + int(rows["position, never said so in training"][-1]) == int(rows["position"][-1])
    assert "relation, never said so in training" not in rows  # where all are new it is the kind's own row


def test_pairs_kept_apart_in_training_are_told():
    facts = [{"kind": "colour", "phrase": f"The {pair}"} for pair in ("red ship", "blue ship", "blue vehicle")]
    rows = [{"scene": str(i), "intersection": i, "union": 2, "iou": i / 2} for i in range(3)]
    pairs = {f"{colour} {name}" for colour in language.COLOURS for _, name, *_ in language.CATEGORIES.values()}
    table = numbers(language.by_novelty(rows, facts, pairs - {"red ship"}))
    assert table["a colour and a category, said together in training"][0].startswith("75.0 ")
    assert table["a colour and a category, never said together in training"][::2] == ["0.0 (0.0–0.0)", "1"]
    assert language.by_novelty(rows, facts, pairs) == ""


def test_the_tool_runs_end_to_end(scenes, tmp_path, capsys, monkeypatch):
    model = RS2SAM2(small_preset("open_clip"))
    facts = {"data": str(scenes), "model_name": "tiny", "revision": ""}
    checkpoint = facts | {"preset": dataclasses.asdict(model.preset), "model": model.state_dict()}
    torch.save(checkpoint, tmp_path / "m.pt")
    picture = tmp_path / "f.png"
    common = ["language.py", "--ckpt", str(tmp_path / "m.pt")]
    monkeypatch.setattr(sys, "argv", [*common, "--scenes", "12", "--seed", "4", "--figure", str(picture)])
    language.main()
    rows = numbers(capsys.readouterr().out)
    assert {"all", "position", "the phrase", "left and right swapped there"} <= rows.keys() and picture.exists()
    monkeypatch.setattr(sys, "argv", [*common, "--data", str(scenes)])
    language.main()
    assert "phrases shuffled" in capsys.readouterr().out
    for more, expected in ((["--figure", str(picture)], "new file"), (["--data", "nowhere"], "no folder nowhere"),
                           (["--figure", str(tmp_path / "none" / "f.png")], "a folder that exists")):  # fmt: skip
        monkeypatch.setattr(sys, "argv", [*common, *more])
        with pytest.raises(SystemExit):
            language.main()
        assert expected in capsys.readouterr().err
    torch.save(checkpoint | {"data": "nowhere"}, tmp_path / "m.pt")
    monkeypatch.setattr(sys, "argv", [*common, "--scenes", "2"])
    language.main()
    assert "nowhere is not at hand" in capsys.readouterr().out
    assert language.training_phrases({"data": None}) is None  # of published weights


# ---- what a trained model uses -------------------------------------------------------------------------------------


def test_each_change_of_the_fusion_changes_what_it_says_and_nothing_stays_behind():
    torch.manual_seed(0)
    model = RS2SAM2(small_preset("open_clip")).eval()
    for adapter in model.image_encoder.adapters():  # as after training: nothing is zero
        for layer in (adapter.up, getattr(adapter, "text_up", adapter.up)):
            torch.nn.init.normal_(layer.weight, std=0.3)
    seen = {}

    def keep(name):
        return lambda module, args, output: seen.update({name: output})

    model.image_encoder.register_forward_hook(keep("stages"))
    model.image_encoder.trunk.blocks[0].register_forward_hook(keep("block"))
    batch = random_batch(model, [7, 5, 3])

    def run(hooks) -> dict:
        with torch.no_grad(), bhfm.hooked(hooks):
            return {"logits": model(*batch).logits, "stage": seen["stages"][-1], "block": seen["block"][0]}

    whole = run([])
    names = bhfm.changes(model)
    assert len(names) == 8
    for name, hooks in names.items():
        changed = {key: not torch.equal(value, whole[key]) for key, value in run(hooks).items()}
        product, rewriting = "product" in name, "rewritten" in name
        assert changed["logits"], name
        assert changed["stage"] is not product, name  # the product comes after the image encoder
        assert changed["block"] is not (product or rewriting), name  # the first block's image has read the text as it came
    assert all(torch.equal(value, whole[key]) for key, value in run([]).items())


def test_changes_of_parts_that_are_not_there_are_left_out():
    assert list(bhfm.changes(variant("fusion,decoder-fusion"))) == []
    assert not any("rewritten" in name for name in bhfm.changes(variant("rewriting")))
    assert not any("product" in name for name in bhfm.changes(variant("decoder-fusion")))


def test_the_spread_of_attention_by_hand():
    attention = bhfm.CrossAttention(4, 2)
    memory = torch.eye(4)[None].repeat(1, 2, 1)[:, :6]  # 6 tokens: 0 1 2 3 0 1
    with torch.no_grad():
        attention.in_proj_weight.zero_()
        torch.testing.assert_close(bhfm.spread(attention, memory[:, :2], memory), torch.ones(1, 2))
        attention.in_proj_weight[:8] = torch.eye(4).repeat(2, 1) * 40  # a query reads the tokens that are like it
    # token 0 occurs twice: its head sees 2 of 6 tokens, the other head, whose query is zero, all 6
    expected = torch.full((1, 2), (2 / 6 + 1) / 2)
    torch.testing.assert_close(bhfm.spread(attention, memory[:, :2], memory), expected)


def test_the_tool_about_the_fusion_runs_end_to_end(scenes, tmp_path, capsys, monkeypatch):
    model = RS2SAM2(small_preset("open_clip"))
    facts = {"data": str(scenes), "model_name": "tiny", "revision": "", "preset": dataclasses.asdict(model.preset)}
    torch.save(facts | {"model": model.state_dict()}, tmp_path / "m.pt")
    monkeypatch.setattr(sys, "argv", ["bhfm.py", "--ckpt", str(tmp_path / "m.pt"), "--split", "val"])
    bhfm.main()
    said = capsys.readouterr().out
    rows = numbers(said)
    assert len(rows) == 10 and rows["nothing"] == rows["no adapters"]  # untrained, the adapters add nothing
    assert "over this share of the image: " in said
    monkeypatch.setattr(sys, "argv", ["bhfm.py", "--ckpt", str(tmp_path / "m.pt"), "--data", "nowhere"])
    with pytest.raises(SystemExit):
        bhfm.main()
    assert "no folder nowhere" in capsys.readouterr().err


def test_held_out_pairs_are_never_said_in_training(tmp_path):
    sizes = {"train": 40, "val": 20, "test": 0, "seed": 2, "progress": False}
    said = {}
    for name in ("all", "held"):
        root = make_scenes(tmp_path / name, **sizes, hold_out=name == "held")
        for ref in pickle.loads((root / "rrsisd" / "refs(unc).p").read_bytes()):
            said.setdefault((name, ref["split"]), []).extend(s["raw"] for s in ref["sentences"])

    def held(phrases):
        return [p for p in phrases if any(pair in p for pair in HELD_OUT)]

    assert len(HELD_OUT) == 8 and held(said["all", "train"]) and held(said["all", "val"])
    assert said["held", "val"] == said["all", "val"] and not held(said["held", "train"])
    assert sorted(said["held", "train"] + held(said["all", "train"])) == sorted(said["all", "train"])
