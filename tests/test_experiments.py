"""The experiments: stand-ins of an ablation, its table, language, probes, pretraining, speed."""

import dataclasses
import json
import re
import shutil
import signal
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sam2.build_sam import build_sam2
from test_synthetic_scenes import answer
from torch._dynamo.utils import counters

import losses
import train
from encoder import OpenCLIPTokenizer, padded_length
from experiments import ablate, counting, language, large_scene, loading, pretrain, probes, speed, stand_ins
from fusion import PUBLISHED, BidirectionalAdapter, CrossAttention
from model import RS2SAM2
from presets import PRESETS, RECIPES
from runtime.errors import UserError
from synthetic_scenes.scenes import make_scenes, scene
from weights.checkpoints import build_model, load_checkpoint

SMALL_BEIT3 = dict(width=32, layers=2, heads=4, hidden=64, vocabulary=100, image_size=64, text_positions=64)
LEFT_OUT = "boundary, decoder-fusion, fusion, mask-prompt"  # of the variant "sam2"
VARIANTS = [  # the last two leave the phrase a single way to SAM 2, and the text or the class token unread
    "fusion", "rewriting", "mask-prompt", "decoder-fusion", "sparse-prompt", "boundary", "cross-entropy,soft-edges,pseudo",
    "fusion,decoder-fusion,mask-prompt,boundary", "mask-prompt,sparse-prompt", "fusion,decoder-fusion,boundary,sparse-prompt",
]  # fmt: skip


def small_model(encoder: str = "open_clip", parts: str = "", **changes) -> RS2SAM2:
    """`tiny` at 64 pixels, or with the published architecture and a small BEiT-3; every parameter is of order one."""
    torch.manual_seed(0)
    preset = dataclasses.replace(PRESETS["tiny"], image_size=64, **changes)
    if encoder == "beit3":
        preset = dataclasses.replace(preset, architecture=PUBLISHED, encoder="beit3", encoder_args=SMALL_BEIT3, reduction=4)
    model = RS2SAM2(preset)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p) / max(1, p[0].numel() if p.dim() > 1 else 1) ** 0.5)
    stand_ins.leave_out(model, parts.split(",") if parts else ())
    return model


def batch_for(model: RS2SAM2, lengths: list[int]) -> tuple:
    generator, count, L = torch.Generator().manual_seed(1), len(lengths), max(lengths)
    sides = model.preset.image_size, model.union_encoder.image_size
    ids = torch.randint(4, 100, (count, L), generator=generator)
    ids = torch.where(torch.arange(L) < torch.tensor(lengths)[:, None], ids, 3)  # BEiT-3 knows padding by the id 3
    return *(torch.randn(count, 3, side, side, generator=generator) for side in sides), ids, torch.tensor(lengths)


def save(model: RS2SAM2, path: Path, **facts) -> Path:
    """A checkpoint as train.py writes it."""
    torch.save({
        "preset": dataclasses.asdict(model.preset), "recipe": dataclasses.asdict(RECIPES["tiny"]), "left_out": [],
        "model": model.state_dict(), "tokenizer": None, "model_name": "tiny", "data": "scenes", "revision": "", "epoch": 1,
    } | facts, path)  # fmt: skip
    return path


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("data") / "scenes", train=6, val=2, test=2, size=96, progress=False)


whole_keys = cache(lambda encoder: set(small_model(encoder).state_dict()))


@pytest.mark.parametrize("encoder", ["open_clip", "beit3"])
@pytest.mark.parametrize("parts", VARIANTS)
def test_without_parts_all_else_keeps_its_name_and_every_trained_parameter_gets_a_gradient(encoder, parts):
    model, out = small_model(encoder, parts), set(parts.split(","))
    gone = {
        "fusion": "_adapter.", "rewriting": "text_reads_vision.|text_up.", "decoder-fusion": "decoder_fusion.",
        "mask-prompt": "^mask_prompt.", "sparse-prompt": "^sparse_prompt.", "boundary": "^text_weight.",
    }  # fmt: skip
    patterns = [gone[part] for part in out & gone.keys()]
    patterns += ["^text_features."] * (out >= {"fusion", "decoder-fusion", "boundary"})
    kept = {key for key in whole_keys(encoder) if not any(re.search(pattern, key) for pattern in patterns)}
    assert model.state_dict().keys() == kept and (kept == whole_keys(encoder)) == (not patterns)

    output, target = model(*batch_for(model, [7, 4])), torch.zeros(2, 64, 64)
    target[:, 10:40, 20:50] = 1
    losses.total_loss(output, target, stand_ins.losses_without(RECIPES["tiny"].losses, out))["loss"].backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.abs().max() > 0) if p.requires_grad else p.grad is None, name


def watch(model: RS2SAM2, names: dict[str, torch.nn.Module]) -> dict:
    """What goes into modules and what they return, by name, filled by the next forward pass."""
    seen = {}
    for name, module in names.items():
        module.register_forward_hook(lambda m, args, output, name=name: seen.update({name: (args, output)}))
    return seen


@torch.no_grad()
def test_stand_ins_do_what_sam2_does_and_an_adapter_in_one_direction_rewrites_the_image_as_before():
    model = small_model(parts="fusion,decoder-fusion,mask-prompt,boundary")
    seen, decoder = watch(model, {"trunk": model.image_encoder, "neck": model.neck}), {}
    model.mask_decoder.register_forward_pre_hook(lambda m, args, kwargs: decoder.update(kwargs), with_kwargs=True)
    output = model(*(batch := batch_for(model, [7, 4])))
    x = model.image_encoder.trunk.patch_embed(batch[0])
    x = x + model.image_encoder.trunk._get_pos_embed(x.shape[1:3])
    for plain in model.image_encoder.trunk.blocks:
        x = plain.block(x)  # SAM 2's own
    assert torch.equal(seen["trunk"][1][-1], x.permute(0, 3, 1, 2))
    assert torch.equal(decoder["image_embeddings"], seen["neck"][1][0][2] + model.no_mem_embed.view(1, -1, 1, 1))
    dense = model.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)
    assert torch.equal(decoder["dense_prompt_embeddings"], dense.expand(1, -1, 4, 4))
    assert output.pseudo_mask is None and output.text_weight.tolist() == [0, 0] and output.logits.shape == (2, 1, 16, 16)
    assert small_model(parts="sparse-prompt").sparse_prompt(torch.randn(3, 1, 64)).shape == (3, 0, 64)

    for encoder in ("open_clip", "beit3"):
        whole, model = small_model(encoder), small_model(encoder, "rewriting")
        both, one = (m.image_encoder.trunk.blocks[0].space_adapter for m in (whole, model))
        x, text, mask = torch.randn(2, 8, 8, 16), torch.randn(2, 5, 64), torch.arange(5) < torch.tensor([[5], [3]])
        (expected, rewritten), (image, same) = both(x, text, mask), one(x, text, mask)
        assert torch.equal(image, expected) and same is text and not torch.equal(rewritten, text)
        assert not any(isinstance(m, BidirectionalAdapter) for m in model.modules())


def test_the_loss_leaves_out_its_terms_and_a_run_has_the_recipe_s_with_the_user_s_changes(scenes):
    whole, less = {"cross_entropy": 1.0, "dice": 0.1, "boundary": 0.2, "pseudo_mask": 5.0}, stand_ins.losses_without
    for part, gone in {"cross-entropy": "cross_entropy", "dice": "dice", "boundary": "boundary", "pseudo": "pseudo_mask",
                       "mask-prompt": "pseudo_mask", "fusion": ""}.items():  # fmt: skip
        assert less(whole, [part]) == {name: c for name, c in whole.items() if name != gone}, part
    published = {"cross_entropy": 1.0, "published_boundary": 0.2}
    assert less(whole, ["soft-edges", "dice", "pseudo"]) == less(published, ["soft-edges"]) == published
    assert less(published, ["boundary", "soft-edges"]) == {"cross_entropy": 1.0}
    args = ablate.parse(["--data", str(scenes), "--out", "abl", "--", "--set", "losses.boundary=0.3"])
    arguments = ablate.training_arguments(args, "pseudo,soft-edges", 0)
    assert arguments[:6] == ["--data", str(scenes), "--model", "tiny", "--seed", "0"]
    assert arguments[-1] == "losses={'cross_entropy': 1.0, 'dice': 1.0, 'published_boundary': 0.3}"


def test_what_can_t_be_left_out_is_one_sentence():
    for parts, expected in (("wings", "unknown part 'wings': the parts are fusion, rewriting"),
                            ("fusion,decoder-fusion,mask-prompt,sparse-prompt", "the phrase has no way to SAM 2: keep one"),
                            ("dice,cross-entropy", "nothing teaches the mask: keep one of them")):  # fmt: skip
        with pytest.raises(UserError, match=expected):
            ablate.main(["--variants", parts])


@pytest.fixture
def call(scenes, tmp_path, monkeypatch, capsys):
    """Run the ablation's command in a folder of its own -> what it printed, and the sentence it ended with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its own handlers

    def run(*more) -> tuple[str, str]:
        try:
            ablate.main(["--data", str(scenes), "--out", "abl", "--seeds", "0", *map(str, more)])
        except UserError as error:
            return capsys.readouterr().out, str(error)
        return capsys.readouterr().out, ""

    return run


def test_ablate_trains_scores_and_goes_on_where_it_was(call, capsys, monkeypatch):
    out, train_flags = Path("abl"), ("--", "--set", "image_size=64", "epoch_range=(24,24)", "--workers", 0)
    flags = ("--variants", "whole", "sam2", "--jobs", 2, "--samples", 20, *train_flags)
    call("--only", "whole", 0, *flags)
    printed, end = call(*flags)
    assert not end and "sam2-0: starting" in printed and "whole-0" not in printed  # which is there
    table = (out / "ablation.md").read_text(encoding="utf-8")
    assert table in printed and "24 samples a run" in table and "split test" in table  # rounded up to an epoch
    assert (out / "ablation.png").exists() or "pip install matplotlib" in printed
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines() if row.startswith("|")][2:]
    assert [row[:2] for row in rows] == [["union encoder + SAM 2", LEFT_OUT], ["all", ""]]
    counts = [int(row[2].replace(",", "")) for row in rows]
    assert counts[0] < counts[1] and rows[0][3] == "0"
    best = torch.load(out / "sam2-0" / "best.pt", weights_only=True)
    assert best["left_out"] == rows[0][1].split(", ") and list(best["recipe"]["losses"]) == ["cross_entropy", "dice"]
    scores = json.loads((out / "whole-0" / "scores.json").read_text())["scores"]
    assert rows[1][4] == f"{scores['mIoU']:.1f}" and rows[1][8] == f"{scores['bIoU']:.1f}"

    (out / "whole-0" / "scores.json").unlink()  # as if it had been interrupted before it was scored
    call("--only", "whole", 0, *flags)  # as another call would
    shutil.copytree(out / "sam2-0", out / "sam2-10")  # a seed of an earlier call
    printed, _ = call(*flags)
    assert "starting" not in printed and "going on" not in printed and "| 0, 10 |" in printed
    assert table.splitlines()[-1] in printed  # the same scores again
    ablate.main(["--score", "abl/sam2-0/best.pt"])
    assert f"without {LEFT_OUT} on " in (printed := capsys.readouterr().out)
    assert float(rows[0][4]) == pytest.approx(float(printed.splitlines()[3].split()[-3]), abs=0.06)
    assert "holds runs with epochs 1, this asks for 2: choose another --out" in call("--samples", 40, *train_flags)[1]
    monkeypatch.setitem(RECIPES, "tiny", dataclasses.replace(RECIPES["tiny"], lr=0.1))
    assert "holds runs with recipe.lr 0.0014, this asks for 0.1: " in call(*flags)[1]


def test_ablate_says_which_run_failed(call, tmp_path, monkeypatch):
    (program := tmp_path / "python").write_text("#!/bin/sh\necho begun\necho 'ablate: too cold.' >&2\nexit 2\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    printed, end = call("--variants", "dice,rewriting")
    assert end.startswith("dice,rewriting-0 failed with exit code 2 (ablate: too cold.): see abl/dice,rewriting-0.log")
    assert "ablation.md" not in printed and "--epochs after -- is set by this tool" in call("--", "--epochs", 3)[1]


def test_the_ablation_s_table_by_hand():
    def runs(*scores: float) -> dict[int, dict]:
        facts = {"parameters": 1000, "split": "test", "curve": [(1.0, 5.0), (2.0, 6.0)]}
        return {n: facts | {"scores": dict.fromkeys(ablate.COLUMNS, 10.0) | {"mIoU": x}} for n, x in enumerate(scores)}

    results = {"mpg": runs(50, 54), "whole": runs(60, 62, 64)}
    table = ablate.markdown(results, {"model": "tiny", "data": "scenes", "samples": 20_000, "epochs": 5})
    mpg, whole = table.splitlines()[-2:]
    assert "| 0, 1 | 52.0 ± 2.8 | 10.0 ± 0.0 |" in mpg and mpg.endswith("| -9.0 ± 1.4 |")  # -10 and -8
    assert "| 0, 1, 2 | 62.0 ± 2.0 |" in whole and whole.endswith("|  |")


def test_what_a_phrase_with_left_or_right_names():
    """Against the rules of test_synthetic_scenes.py: what is found is the one right answer."""
    moved = 0
    for s in (scene(3, "test", i) for i in range(20)):
        for target, phrase, kind in s.phrases:
            if (swapped := language.flip_phrase(phrase, True, False)) == phrase:
                continue
            assert kind == "relation" or language.swapped_target(phrase, s.objects) is s.objects[target], phrase
            found = language.swapped_target(swapped, s.objects)
            if found is not None:
                right, _ = answer(swapped, s.objects)
                assert len(right) == 1 and right[0] is found, swapped
                moved += found is not s.objects[target]
    assert moved > 5


def numbers(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines() if row.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def test_the_tables_of_language_with_a_model_that_ignores_the_phrase(tmp_path, monkeypatch):
    root = make_scenes(tmp_path / "scenes", 0, 0, 8, seed=4, progress=False)
    dataset = language.open_dataset(str(root), "test", image_size=64, encoder_size=64)
    assert len(facts := language.describe(dataset, 4)) == len(dataset)
    for i, fact in enumerate(facts):
        item = dataset[i]
        assert (item["mask"].numpy() == fact["target"].mask).all() and item["phrase"] == fact["phrase"]
        assert (fact["kind"] == "category") == (fact["others"] == 0)
    shuffled = language.Shuffled(dataset, seed=0)
    assert sorted(shuffled.donors) == sorted(dataset.items)  # every phrase is used once, and of another image
    for index, ((i, _), (donor, j)) in enumerate(zip(dataset.items, shuffled.donors)):
        assert dataset.samples[donor].image != dataset.samples[i].image
        assert shuffled[index]["phrase"] == dataset.samples[donor].phrases[j]
        assert (shuffled[index]["mask"] == dataset[index]["mask"]).all()
    # a model that finds each target whatever the phrase: right answers do not move with the phrase
    monkeypatch.setattr(language, "answers", lambda model, data: [item["mask"].numpy() for item in data])
    trained = {language.without_article(next(fact["phrase"] for fact in facts if fact["kind"] == "position"))}
    rows = numbers(language.tables(None, dataset, facts, 0, trained))
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

    facts = [{"kind": "colour", "phrase": f"The {pair}"} for pair in ("red ship", "blue ship", "blue vehicle")]
    rows = [{"scene": str(i), "intersection": i, "union": 2, "iou": i / 2} for i in range(3)]
    pairs = {f"{colour} {name}" for colour in language.COLOURS for _, name, *_ in language.CATEGORIES.values()}
    table = numbers(language.by_novelty(rows, facts, pairs - {"red ship"}))
    assert table["a colour and a category, said together in training"][0].startswith("75.0 ")
    assert table["a colour and a category, never said together in training"][::2] == ["0.0 (0.0–0.0)", "1"]
    assert language.by_novelty(rows, facts, pairs) == ""


def test_language_runs_end_to_end(scenes, tmp_path, capsys):
    path = save(small_model(parts="mask-prompt"), tmp_path / "m.pt", data=str(scenes), left_out=["mask-prompt"])
    picture, common = tmp_path / "f.png", ["--ckpt", str(path)]
    language.main([*common, "--scenes", "5", "--seed", "4", "--figure", str(picture)])
    rows = numbers(capsys.readouterr().out)
    assert {"all", "position", "the phrase", "left and right swapped there"} <= rows.keys() and picture.exists()
    with pytest.raises(UserError, match="without mask-prompt: score it by `python -m experiments.ablate"):
        load_checkpoint(path)
    language.main([*common, "--data", str(scenes)])
    assert "phrases shuffled" in capsys.readouterr().out
    for more, expected in ((["--figure", str(picture)], "new file"), (["--data", "nowhere"], "no folder nowhere"),
                           (["--figure", str(tmp_path / "none" / "f.png")], "a folder that exists")):  # fmt: skip
        with pytest.raises(UserError, match=expected):
            language.main([*common, *more])
    assert language.training_phrases({"data": "nowhere"}) is None and "nowhere is not at hand" in capsys.readouterr().out
    assert language.training_phrases({"data": None}) is None  # of published weights


def test_each_change_of_the_fusion_changes_the_logits_and_nothing_stays_behind():
    model = small_model().eval()
    seen = watch(model, {"stages": model.image_encoder, "block": model.image_encoder.trunk.blocks[0]})
    batch = batch_for(model, [7, 5, 3])

    def run(hooks) -> dict:
        with torch.no_grad(), probes.hooked(hooks):
            return {"logits": model(*batch).logits, "stage": seen["stages"][1][-1], "block": seen["block"][1][0]}

    whole = run([])
    assert len(names := probes.changes(model)) == 8
    for name, hooks in names.items():
        changed = {key: not torch.equal(value, whole[key]) for key, value in run(hooks).items()}
        assert changed["logits"] and changed["stage"] is not ("product" in name), name  # which comes after the image encoder
        assert changed["block"] is not ("product" in name or "rewritten" in name), name  # it has read the text as it came
    assert all(torch.equal(value, whole[key]) for key, value in run([]).items())
    for parts, word in (("fusion,decoder-fusion", ""), ("rewriting", "rewritten"), ("decoder-fusion", "product")):
        stand_ins.leave_out(model := small_model(), parts.split(","))
        assert not any(word in name for name in probes.changes(model))  # of what a model lacks there is none


def test_the_spread_of_attention_by_hand():
    attention = CrossAttention(4, 2)
    memory = torch.eye(4)[None].repeat(1, 2, 1)[:, :6]  # 6 tokens: 0 1 2 3 0 1
    with torch.no_grad():
        attention.in_proj_weight.zero_(), attention.in_proj_bias.zero_()
        torch.testing.assert_close(probes.spread(attention, memory[:, :2], memory), torch.ones(1, 2))
        attention.in_proj_weight[:8] = torch.eye(4).repeat(2, 1) * 40  # a query reads the tokens that are like it
    # token 0 occurs twice: its head sees 2 of 6 tokens, the other head, whose query is zero, all 6
    expected = torch.full((1, 2), (2 / 6 + 1) / 2)
    torch.testing.assert_close(probes.spread(attention, memory[:, :2], memory), expected)


def test_probes_run_end_to_end(scenes, tmp_path, capsys):
    path = save(RS2SAM2(dataclasses.replace(PRESETS["tiny"], image_size=64)), tmp_path / "m.pt", data=str(scenes))
    probes.main(["--ckpt", str(path), "--split", "val"])
    rows = numbers(printed := capsys.readouterr().out)
    assert len(rows) == 10 and "over this share of the image: " in printed
    assert rows["nothing"] == rows["no adapters"]  # untrained, they add nothing


def masks_of(*boxes: tuple[int, int, int, int], size: int = 128) -> torch.Tensor:
    """Full rectangles (left, top, right, bottom), the last pixel inside -> (B, size, size) uint8."""
    masks = torch.zeros(len(boxes), size, size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes):
        mask[top : bottom + 1, left : right + 1] = 1
    return masks


def test_prompts_are_clicks_inside_or_boxes_and_corrections_point_at_what_is_wrong():
    boxes, rng = [(3, 5, 20, 30), (60, 64, 60, 64), (0, 0, 127, 127)] * 10, np.random.default_rng(0)
    masks = masks_of(*boxes)
    points, labels = pretrain.prompts(masks, rng)
    assert {tuple(label) for label in labels.tolist()} == {(1, -1), (2, 3)}  # SAM 2's: inside and none, the two corners
    for mask, box, point, label in zip(masks, boxes, points.int().tolist(), labels.tolist()):
        assert (*point[0], *point[1]) == box if label == [2, 3] else mask[point[0][1], point[0][0]]
    empty = torch.zeros(6, 8, 8, dtype=torch.uint8)
    points, labels = pretrain.prompts(empty, rng)
    assert labels.tolist() == [[0, -1]] * 6 and (points < 8).all()  # "not here"
    for answers in (empty - 0.5, empty + 0.5):  # all right, all wrong
        assert pretrain.correction(empty, answers, rng)[1].tolist() == [[0]] * 6
    masks = masks_of(*[(10, 10, 29, 29)] * 3)
    too_much, too_little = masks_of((10, 10, 29, 39), (10, 10, 29, 19))
    for _ in range(20):
        points, labels = pretrain.correction(masks, torch.stack([too_much, too_little, masks[2]]).float() - 0.5, rng)
        first, second, third = points[:, 0, 1].tolist()
        assert labels.tolist() == [[0], [1], [1]] and 30 <= first <= 39 and 20 <= second <= 29 and 10 <= third <= 29


def test_pretraining_reaches_all_of_sam2_and_nothing_else():
    torch.manual_seed(0)
    model = pretrain.bare_sam2(128)
    target = masks_of(*[(8 * i, 10, 8 * i + 30, 60) for i in range(8)])
    images = torch.randint(0, 256, (8, 3, 128, 128), dtype=torch.uint8)
    batch = {"image": images, "encoder_image": images, "target": target}
    sum(pretrain.loss(logits, target) for logits in pretrain.both_answers(model, batch, np.random.default_rng(0))).backward()
    away = "prompt_encoder.point_embeddings.0.weight"  # unused: untrained, it finds nothing anywhere, so nothing too much
    for name, p in model.named_parameters():
        assert name == away or (p.grad is not None and p.grad.any()) == p.requires_grad, name
        assert p.requires_grad or name.startswith(("union_encoder", "sparse_prompt", "mask_decoder.")), name
    names = set(pretrain.sam2_state(model))
    real = set(build_sam2("configs/sam2.1/sam2.1_hiera_t.yaml", device="meta", apply_postprocessing=False).state_dict())
    any_block = partial(re.sub, r"blocks\.\d+", "blocks.N")  # tiny widens in others
    assert set(map(any_block, names)) <= set(map(any_block, real))  # SAM 2's own names
    assert {name.split(".")[0] for name in names} == {"image_encoder", "sam_prompt_encoder", "sam_mask_decoder", "no_mem_embed"}


def test_tiny_trains_around_a_frozen_sam2_of_the_tool(scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    validate = pretrain.validate
    monkeypatch.setattr(pretrain, "validate", lambda *args: [*validate(*args), 1 / 0])
    with pytest.raises(ZeroDivisionError):  # what comes after training loses nothing
        pretrain.main(["--data", str(scenes), "--samples", "16", "--out", "runs/sam2.pt"])
    assert "16 samples in" in capsys.readouterr().out
    with pytest.raises(UserError, match="runs/sam2.pt exists already"):
        pretrain.main(["--out", "runs/sam2.pt"])
    before = build_model("tiny", PRESETS["tiny"], sam2_file="runs/sam2.pt")
    state = torch.load("runs/sam2.pt", weights_only=True)["model"]
    qkv, mask = "image_encoder.trunk.blocks.2.{}attn.qkv.weight", "prompt_encoder.mask_downscaling.0.weight"
    assert torch.equal(before.get_parameter(qkv.format("block.")), state[qkv.format("")])
    assert torch.equal(before.get_parameter(mask), state[f"sam_{mask}"])
    frozen = {k for k, _ in before.named_parameters() if k.startswith(("image_encoder", "neck")) and "adapter" not in k}
    assert len(frozen) > 70 and not any(before.get_parameter(k).requires_grad for k in frozen)
    train.main(f"--data {scenes} --model tiny --sam2 runs/sam2.pt --gpus 0 --workers 0 --epochs 1 --out runs/x "
               "--set epoch_range=(16,16)".split())  # fmt: skip
    after = load_checkpoint("runs/x/best.pt")[0]
    changed = {k for k, p in before.named_parameters() if not torch.equal(p, after.get_parameter(k))}
    assert not after.preset.train_trunk and not changed & frozen
    assert any(k.startswith("mask_decoder") for k in changed) and any("adapter" in k for k in changed)


def test_flops_of_an_attention_are_counted_by_hand_and_activations_computed_again_save_memory():
    attention = CrossAttention(8, 2)
    with counting.counter() as count:
        attention(torch.randn(1, 5, 8), torch.randn(1, 7, 8))
    assert count.get_total_flops() == 2 * (5 * 8 * 8 + 7 * 8 * 16 + 2 * 5 * 7 * 8 + 5 * 8 * 8)
    peaks, model = {}, small_model("beit3")
    for model.image_encoder.checkpoint_activations in (False, True):
        with counting.Live() as live:
            model(*batch_for(model, [7] * 4)).logits.sum().backward()
        peaks[model.image_encoder.checkpoint_activations] = live.peak
    assert peaks[True] < 0.75 * peaks[False]


@pytest.mark.slow
def test_the_paper_s_preset_takes_the_flops_that_were_published(monkeypatch):
    monkeypatch.setattr(counting, "LENGTH", 10)  # of the text; all of sam2's heads are counted
    assert counting.flops("paper", backward=False)["forward"] == pytest.approx(2125827657728, rel=5e-3)


@pytest.mark.parametrize("encoder", ["open_clip", "beit3"])
def test_frozen_weights_in_bfloat16_give_what_autocast_gives_and_the_published_settings_undo_them(encoder):
    model = small_model(encoder, train_trunk=False)
    batch, results = batch_for(model, [7, 4]), []
    for cast in (lambda _: None, model.cast_frozen):
        cast(torch.bfloat16)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(*batch)
            sum(x.sum() for x in output).backward()
        results.append([*output, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    products = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.MultiheadAttention)
    for module in model.modules():
        for p in module.parameters(recurse=False):
            low = not p.requires_grad and isinstance(module, products)
            assert p.dtype == (torch.bfloat16 if low else torch.float32), type(module)

    before = {key: value.clone() for key, value in model.eval().state_dict().items()}
    with torch.inference_mode():
        with speed.published_settings(model, half_encoder=False):
            assert not any(type(m) is CrossAttention for m in model.modules())
            published = model(*batch).logits
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert any(type(m) is CrossAttention for m in model.modules())
        exact = model.float()(*batch).logits
    assert (published - exact).abs().max() <= 1e-4 * exact.abs().max()


def test_speed_and_the_cost_of_loading_are_tables_appended_to_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed.Device, "product", lambda self: 1e12)  # these take seconds
    monkeypatch.setitem(RECIPES, "tiny", dataclasses.replace(RECIPES["tiny"], muon=0.0))
    monkeypatch.setattr(speed, "flops", lambda *_: {"forward": 1e9, "train": 3e9})
    (out := tmp_path / "speed.md").write_text("# Speed\n")
    sizes = "--image-size 64 --device cpu --repeats 1 --warmup 0 --workers 0"
    speed.main([*sizes.split(), "--baseline", "--tasks", *reversed(speed.TASKS), "--out", str(out)])
    text = out.read_text()
    out, err = capsys.readouterr()
    assert text == "# Speed\n" + out and re.search(r"this will take \d+ minutes", err)
    rows = [line for line in text.splitlines() if line.startswith("| tiny |")]
    assert [row.split(" | ")[1] for row in rows] == ["train"] * 2 + ["loader"] * 2 + ["forward"] * 2 + ["evaluate"]
    assert all(float(row.split(" | ")[4]) > 0 for row in rows)
    table = speed.profile(model := small_model(), speed.Device("cpu"), counting.random_batch(model, 1, "cpu"))
    assert "| Hiera, stage 3: fusion layers |" in table
    loading.main(["--side", "96", "--quality", "75", "--image-size", "64"])
    assert "| 96 x 96, quality 75 |" in capsys.readouterr().out and large_scene.PREDICT.is_file()


@torch.inference_mode()
def test_phrases_are_padded_to_few_lengths_and_compile_once_a_length_and_batch_size():
    for context in (77, 1022):
        lengths = [padded_length(n, context) for n in range(1, context + 1)]
        assert all(n <= length <= context for n, length in enumerate(lengths, start=1)) and len(set(lengths[:128])) == 2
    assert OpenCLIPTokenizer(77)([" ".join(["ship"] * 200)])[1].tolist() == [77]
    encoder = small_model(encoder_args=PRESETS["tiny"].encoder_args | {"joint_layers": 1}).union_encoder.eval()
    torch._dynamo.reset(), counters.clear()
    traced = torch.compile(encoder, backend="eager", fullgraph=True, dynamic=False)
    for tokens, length, graphs in (((5, 8), 32, 1), ((40, 8), 77, 2), ((7,), 32, 3), ((3, 3), 32, 3), ((32, 9), 32, 3),
                                   ((33, 12), 77, 3), ((20, 31), 32, 3), ((77, 4), 77, 3), ((30,), 32, 3)):  # fmt: skip
        ids, lengths = encoder.tokenizer([" ".join(["ship"] * (n - 2)) for n in tokens])
        assert ids.shape == (len(tokens), length) and lengths.tolist() == [*tokens]
        batch = torch.randn(len(tokens), 3, 128, 128), ids, torch.arange(length) < lengths[:, None]
        assert all(torch.equal(a, b) for a, b in zip(traced(*batch), encoder(*batch)))
        assert counters["stats"]["unique_graphs"] == graphs
