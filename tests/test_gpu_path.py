"""What a card needs and a CPU can show: compilation by block, what fails where memory or a compiler is missing."""

import contextlib
from argparse import Namespace
from dataclasses import asdict
from functools import partial

import cv2
import numpy as np
import pytest
import torch
from test_experiments import batch_for, small_model
from torch._dynamo.utils import counters

import fusion
import predict
from experiments import counting, speed
from model import build_image_encoder, compile_blocks
from presets import PRESETS, RECIPES
from runtime import devices, processes
from runtime.errors import UserError
from runtime.recording import Recorded
from weights import checkpoints

EAGER = partial(torch.compile, backend="eager")


@pytest.fixture
def graphs():
    """How many graphs there are by now."""
    torch._dynamo.reset(), counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset(), counters.clear()


@pytest.mark.parametrize("encoder", ["open_clip", "beit3"])
def test_alike_blocks_share_a_graph_and_nothing_is_compiled_twice(encoder, graphs):
    """Two lengths of phrases, whatever they hold; a last batch that is short, in a validation which compiles nothing."""
    model = small_model(encoder, trunk=PRESETS["tiny"].trunk | {"stages": [1, 2, 4, 1]})
    kinds = compile_blocks(model, backend="eager", fullgraph=True)  # no break
    step = speed.Step(model, RECIPES["tiny"])

    def batch(size: int, words: int) -> tuple:
        image, encoder_image, ids, lengths = batch_for(model, [words] * size)
        ids = torch.nn.functional.pad(ids, (0, (32 if words <= 32 else 62) - words), value=3)
        return image, encoder_image, ids, lengths, torch.zeros(size, 64, 64)

    def train(words: int) -> int:
        step(model, batch(2, words), lambda: torch.autocast("cpu", torch.bfloat16))
        return graphs()

    first = train(words=9)
    assert kinds <= first <= kinds + 1  # the first block's image needs no gradient
    blocks = len(model.image_encoder.trunk.blocks)
    assert blocks == 8 and kinds < blocks + 4
    with torch.compiler.set_stance("force_eager"), torch.inference_mode():
        model.eval()(*batch(1, 9)[:-1])
    model.train()
    assert train(words=12) == first  # after a validation
    long = train(words=40)
    assert first < long <= 2 * first
    assert train(words=57) == train(words=5) == long


def test_what_an_ablation_leaves_is_compiled_too():
    assert compile_blocks(small_model(parts="fusion"), backend="eager") == compile_blocks(small_model(), backend="eager")


@pytest.mark.parametrize("mode", speed.BY_BLOCK)
def test_forms_by_block_have_options_that_torch_knows(mode):
    model = speed.compiled(small_model(), mode)
    assert all(block._compiled_call_impl for block in model.image_encoder.trunk.blocks)


def test_equal_parts_of_a_batch():
    with pytest.raises(UserError, match="a batch of 9 can't be divided evenly by 1 process with --accumulate 2"):
        processes.processes_for(1, 1, batch=9, parts=2)


def test_windows_are_computed_in_parts_where_there_are_more_than_a_call_takes(monkeypatch):
    model = small_model().eval()
    batch = batch_for(model, [7, 4])
    with torch.inference_mode():
        whole, calls = model(*batch).logits, []
        hook = model.image_encoder.trunk.blocks[0].block.attn.register_forward_hook(lambda *_: calls.append(1))
        monkeypatch.setattr(fusion, "MOST_WINDOWS", 3)
        parts = model(*batch).logits
    hook.remove()
    assert len(calls) == 3  # 2 x 4 windows
    torch.testing.assert_close(parts, whole)


def test_a_model_is_built_without_a_look_at_the_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert {p.device.type for p in build_image_encoder(PRESETS["tiny"]).parameters()} == {"cpu"}


def test_a_full_card_is_not_called_a_damaged_checkpoint(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = small_model()
    checkpoint = checkpoints.model_entries(model) | {"model_name": "tiny"}
    monkeypatch.setattr(checkpoints, "RS2SAM2", full)
    with pytest.raises(torch.OutOfMemoryError):
        checkpoints.rebuild(checkpoint)


def test_a_compiler_that_is_missing_is_one_line_and_the_run_goes_on(monkeypatch, capsys):
    def backend(*_):
        raise RuntimeError("Failed to find\n C compiler. Set TORCHDYNAMO_VERBOSE=1")

    compiled = []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    devices.compile_here(compiled.append, torch.nn.Linear(1, 1))
    said = capsys.readouterr().out
    assert said.startswith("torch.compile does not work here, training goes on without it, slower (") and not compiled
    assert said.endswith("Failed to find C compiler.)\n") and said.count("\n") == 1
    torch._dynamo.reset()


def test_compiling_is_announced_and_its_progress_told(monkeypatch, capsys):
    callbacks, seconds, model = [], [0.0], torch.nn.Linear(1, 1)
    monkeypatch.setattr(torch, "compile", EAGER)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/kernels")
    monkeypatch.setattr("os.makedirs", lambda *_, **__: None)
    monkeypatch.setattr(torch._dynamo.callback, "on_compile_end", callbacks.append)
    monkeypatch.setattr(devices.time, "monotonic", lambda: seconds[0])
    devices.compile_here(lambda given: 3 if given is model else 0, model)
    said = capsys.readouterr().out
    assert said.startswith("compiling 3 kinds of blocks in the first step: minutes, once on this machine, as /kernels")
    assert "TORCH_COMPILE_DISABLE=1 starts at once" in said and said.count("\n") == 1
    for seconds[0] in (5.0, 21.0, 30.0, 50.0):
        callbacks[0]()
    assert capsys.readouterr().out == "compiled 2 of about 6 graphs in 21 s\ncompiled 4 of about 6 graphs in 50 s\n"
    with torch._dynamo.config.patch(disable=True):  # TORCH_COMPILE_DISABLE=1
        devices.compile_here(callbacks.append, model)
    assert len(callbacks) == 1 and not capsys.readouterr().out


def test_what_fails_on_a_card_alone_is_one_sentence(monkeypatch):
    def backend(*_):
        raise RuntimeError("it is\n broken")

    with pytest.raises(UserError, match="the card's memory is full: take a smaller --model, or a card") as error:
        with devices.card_failures():
            raise torch.OutOfMemoryError("CUDA out of memory")
    assert error.value.exit_code == 1
    told = r"torch.compile failed \(.*it is broken.*\): train slower by TORCH_COMPILE_DISABLE=1 in the environment"
    with pytest.raises(UserError, match=told), devices.card_failures():
        torch.compile(torch.sin, backend=backend)(torch.ones(1))
    waited = []
    monkeypatch.setattr(processes, "wait_for_the_end", lambda: waited.append(1))
    monkeypatch.setattr(processes, "rank", lambda: 1)  # the other process says it too, and its end is the end of both
    with pytest.raises(UserError, match="the card's memory is full: try less"), devices.card_failures("try less"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert waited


@pytest.mark.parametrize(
    "samples, accumulate, checkpointing, ways",
    [
        (8, 1, False, "use --accumulate 8 (now 1) and --checkpoint-activations, or take a smaller --set image_size or --model"),
        (4, 4, False, "use --checkpoint-activations, or take a smaller --set image_size or --model"),
        (4, 2, True, "use --accumulate 4 (now 2), or take a smaller --set image_size or --model"),
        (4, 4, True, "take a smaller --set image_size or --model"),
    ],
)
def test_only_flags_that_are_left_are_named(samples, accumulate, checkpointing, ways):
    given = Namespace(accumulate=accumulate, checkpoint_activations=checkpointing)
    assert devices.ways_to_fit(samples, given) == ways


def test_memory_is_counted_as_a_card_takes_it():
    model, dtypes, peaks = small_model(), [], []
    model.image_encoder.trunk.blocks[1].block.norm1.register_forward_hook(lambda _, __, out: dtypes.append(out.dtype))
    for cast in (lambda _: None, counting.as_on_a_card):
        cast(model)
        with counting.Live() as live, torch.autocast("cpu", torch.bfloat16):
            model(*batch_for(model, [7] * 4))
        peaks.append(live.peak)
    assert dtypes[1] == torch.float32 and peaks[0] < peaks[1]
    own = [module for module in model.modules() if isinstance(module, fusion.CrossAttention)]
    assert own and all(attention.forward == attention.flash for attention in own)


def test_a_prediction_that_fills_the_card_names_the_batch_and_costs_itself_alone(tmp_path, monkeypatch, capsys):
    def look(self, images, phrases):
        if len(images) > 1 or phrases == ["too much"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert not any(p.requires_grad for p in self.model.parameters())  # and cast to the dtype on a card
        return torch.zeros(len(images), 1, 16, 16)

    made = {"model_name": "tiny", "data": None, "revision": "x", "recipe": asdict(RECIPES["tiny"]), "left_out": [], "epoch": 1}
    torch.save(checkpoints.model_entries(small_model()) | made, tmp_path / "best.pt")
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((32, 32, 3), np.uint8))
    monkeypatch.setattr(predict.RS2SAM2Predictor, "look", look)
    arguments = f"--ckpt {tmp_path}/best.pt --image {tmp_path}/a.png --out {tmp_path}/out --phrase it --phrase"
    monkeypatch.setattr(predict.signal, "signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["predict.py", *arguments.split(), "too much"])
    with pytest.raises(SystemExit) as end:
        predict.main()
    said = capsys.readouterr().err
    assert end.value.code == 1 and "1 of 2 failed" in said and "memory is full: use a smaller --batch, or --device cpu" in said


def test_dtypes_are_timed_beside_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(speed.Device, "product", lambda self: 1e12)  # this and the next take seconds
    monkeypatch.setattr(speed, "flops", lambda *_: {"forward": 1e9, "train": 3e9})
    dtypes = "--image-size 64 --device cpu --repeats 1 --warmup 0 --dtype float32 bfloat16 --tasks forward --out"
    speed.main([*dtypes.split(), str(out := tmp_path / "speed.md")])
    head, *rows = [line.split(" | ") for line in out.read_text().splitlines() if line.startswith("| ") and "---" not in line]
    assert head[-1] == "times float32 |" and [row[2] for row in rows] == ["float32", "bfloat16"]
    assert rows[0][-1] == "1.00 |" and float(rows[1][-1][:-2]) == pytest.approx(float(rows[1][4]) / float(rows[0][4]), rel=0.02)
    with pytest.raises(UserError, match="--dtype times the tasks forward and evaluate"):
        speed.main(["--dtype", "bfloat16", "--out", str(out)])


class Graph:
    """In place of CUDA's: counts how often it is replayed, which computes nothing."""

    made = []

    def __init__(self):
        self.replays, _ = 0, Graph.made.append(self)

    def replay(self):
        self.replays += 1


@pytest.fixture
def recording(monkeypatch):
    """What a CPU lacks to record; what is yielded are the pools of memory that were asked for."""
    pools = []

    @contextlib.contextmanager
    def graph_of(graph, pool, capture_error_mode):
        assert capture_error_mode == "thread_local"
        pools.append(pool)
        yield

    monkeypatch.setattr(Graph, "made", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph_of)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return pools


def test_gradients_have_a_place_before_they_are_recorded(recording):
    weight = torch.nn.Parameter(torch.ones(2))
    recorded = Recorded(lambda x: (weight * x).sum().backward() or {"x": x}, [weight])
    for _ in range(2):
        recorded(torch.ones(2))
        weight.grad = None
    found = []
    recorded.function = lambda x: found.append(weight.grad.tolist()) or {"x": x}
    recorded(torch.ones(2))
    assert found == [[0.0, 0.0]] and recorded.graphs


def test_a_function_is_recorded_for_each_shape_and_replayed_on_new_inputs(recording):
    calls = []
    recorded = Recorded(lambda x, y: calls.append(len(x)) or {"sum": x + y})
    for n in range(5):
        for size in (2, 3):
            x = torch.full((size,), float(n))
            found = recorded(x, x + 1)["sum"]
            if n < 2:  # as it is
                assert found.tolist() == [2 * n + 1] * size
            else:
                _, (first, second), results = recorded.graphs[x.shape, x.shape]
                assert found is results["sum"] and first is not x
                assert first.tolist() == [n] * size and second.tolist() == [n + 1] * size
    assert calls == [2, 3] * 3 and [graph.replays for graph in Graph.made] == [3, 3]
    assert len(recording) == 2 and len({*recording}) == 1  # one pool
    recorded(torch.ones(5), torch.ones(5))  # runs as it is and gets the graphs' memory
    assert not recorded.graphs
    recorded(torch.ones(2), torch.ones(2))  # recorded anew
    assert len(Graph.made) == 3 and len({*recording}) == 2


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_what_cannot_be_recorded_goes_on_as_it_is(recording, capsys, error):
    def function(x):
        if recording:
            recording.clear()
            raise error("operation not permitted\nwhen stream is capturing")
        return {"double": 2 * x}

    recorded = Recorded(function)
    assert [recorded(torch.full((1,), float(n)))["double"].item() for n in range(5)] == [0, 2, 4, 6, 8]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "slower (operation not permitted when stream is capturing)" in said


def test_training_leaves_attention_to_other_kernels_than_cudnn_s():
    """In the backward pass too, where checkpointed activations are computed again; and not outside."""
    state, seen = torch.backends.cuda.cudnn_sdp_enabled, []
    model = small_model()
    model.image_encoder.checkpoint_activations = True
    model.image_encoder.trunk.blocks[0].register_forward_pre_hook(lambda *_: seen.append(state()))
    step, before = speed.Step(model, RECIPES["tiny"]), state()
    step(model, counting.random_batch(model, 2, "cpu"), contextlib.nullcontext)
    assert seen == [False, False] and state() == before
