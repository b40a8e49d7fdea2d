"""What only a CUDA card can show: that it computes what a CPU does. Skipped without one."""

import copy
from functools import partial

import pytest
import torch
from torch.nn.functional import cosine_similarity

from experiments import counting, speed
from fusion import CrossAttention
from presets import RECIPES
from runtime.devices import autocast, compute_dtype, training_attention
from runtime.optimizers import Muon
from runtime.recording import Recorded

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")]


def gradients(call, batch, precision: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the loss's gradients of all trained weights in one row, both in float32 on the CPU."""
    *inputs, target = batch
    with training_attention():
        with autocast(inputs[0].device, precision):
            output = call(*inputs)
        speed.total_loss(output, target, RECIPES["tiny"].losses)["loss"].backward()
    grads = [p.grad.flatten() for p in call.parameters() if p.grad is not None]
    return output.logits.detach().float().cpu(), torch.cat(grads).float().cpu()


@pytest.fixture(scope="module")
def on_cpu() -> tuple:
    """A model, a batch, and its logits and gradients in float32 on the CPU."""
    model = counting.random_model("tiny", None, 0)
    batch = counting.random_batch(model, 4, "cpu")
    return copy.deepcopy(model), batch, *gradients(model, batch, torch.float32)


def test_float32_on_a_card_equals_the_cpu(on_cpu):
    model, batch, logits, grads = on_cpu
    card_logits, card_grads = gradients(copy.deepcopy(model).cuda(), [x.cuda() for x in batch], torch.float32)
    torch.testing.assert_close(card_logits, logits, rtol=0, atol=2e-3 * logits.std().item())
    assert cosine_similarity(card_grads, grads, dim=0) > 0.9999
    torch.testing.assert_close(card_grads.norm(), grads.norm(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("form", ["as it is", "a block and a layer compiled"])
def test_half_precision_on_a_card_is_near_float32(on_cpu, form):
    model, batch, logits, grads = on_cpu
    (card := copy.deepcopy(model).cuda()).cast_frozen(compute_dtype())
    if form != "as it is":
        torch._dynamo.reset()
        card.image_encoder.trunk.blocks[2].compile(dynamic=False), card.union_encoder.joint[0].compile(dynamic=False)
    card_logits, card_grads = gradients(card, [x.cuda() for x in batch], compute_dtype())
    assert (card_logits - logits).std() < 0.05 * logits.std()
    assert cosine_similarity(card_grads, grads, dim=0) > 0.98


@pytest.mark.parametrize("queries, keys, dim", [(4096, 32, 36), (32, 4096, 144), (1, 256, 96)])
def test_attention_in_flash_form_equals_torch_s(queries, keys, dim):
    torch.manual_seed(0)
    attention = CrossAttention(dim, 4)
    query, memory = torch.randn(2, queries, dim), torch.randn(2, keys, dim)
    mask = torch.arange(keys) < torch.tensor([[9], [keys]])
    expected = attention(query, memory, mask)
    with autocast(torch.device("cuda")):
        read = copy.deepcopy(attention).cuda()(query.cuda(), memory.cuda(), mask.cuda()).float().cpu()
    torch.testing.assert_close(read, expected, rtol=0, atol=0.03 * expected.std().item())


def test_muon_on_a_card_is_near_the_cpu_s():
    """bfloat16 there, float32 here; every singular value of an update is near 1."""
    torch.manual_seed(0)
    weights, grad = torch.randn(48, 32), torch.randn(48, 32)
    updated = []
    for device in ("cpu", "cuda"):
        p = torch.nn.Parameter(weights.to(device, copy=True))
        p.grad = grad.to(device)
        Muon([{"params": [p], "lr": 0.1}], weight_decay=0.0).step()
        updated.append((p.detach().cpu() - weights) / 0.1)
    assert cosine_similarity(updated[0].flatten(), updated[1].flatten(), dim=0) > 0.99


def test_training_steps_lower_the_loss():
    (model := counting.random_model("tiny", None, 0).cuda()).cast_frozen(compute_dtype())
    step, batch = speed.Step(model, RECIPES["tiny"]), counting.random_batch(model, 4, "cuda")
    run = step.recorded(model, lambda: autocast(torch.device("cuda")))

    def loss() -> float:
        with torch.no_grad(), autocast(torch.device("cuda")):
            return speed.total_loss(model(*batch[:-1]), batch[-1], RECIPES["tiny"].losses)["loss"].item()

    before = loss()
    for _ in range(30):
        run(batch)
    assert loss() < 0.8 * before


def test_a_recorded_step_is_the_step_itself():
    """The same gradients, for other inputs than it was recorded with, for two lengths of phrases and for parts that add up."""
    model = counting.random_model("tiny", None, 0).cuda()
    step, precision = speed.Step(model, RECIPES["tiny"]), lambda: autocast(torch.device("cuda"))
    recorded, found = Recorded(partial(step.gradients, model, precision)), {}
    for form, compute in (("itself", partial(step.gradients, model, precision)), ("recorded", recorded)):
        torch.manual_seed(0)
        for n in range(8):
            image, encoder_image, ids, lengths, target = counting.random_batch(model, 4, "cuda")
            ids = torch.nn.functional.pad(ids, (0, 30 * (n % 2)))  # (4, 32) or (4, 62)
            for p in model.parameters():
                if p.grad is not None and n != 7:  # the last adds to the one before it
                    p.grad.zero_()
            loss = compute(image, encoder_image, ids, lengths, target)["loss"].item()
            found[form, n] = loss, torch.cat([p.grad.flatten() for p in step.trained if p.grad is not None])
    assert len(recorded.graphs) == 2
    for n in range(8):
        (loss, grads), (expected_loss, expected) = found["recorded", n], found["itself", n]
        assert abs(loss - expected_loss) < 1e-3 * abs(expected_loss) and cosine_similarity(grads, expected, dim=0) > 0.999


def test_what_cannot_be_recorded_goes_on_without(capsys):
    recorded = Recorded(lambda x: {"sum": x * x.sum().item()})  # waits for the card
    assert [recorded(torch.full((2,), float(n), device="cuda"))["sum"].tolist() for n in range(5)] == [
        [2.0 * n * n] * 2 for n in range(5)
    ]
    said = capsys.readouterr().out
    assert said.startswith("this can't be recorded as a CUDA graph and goes on without one, slower (") and said.count("\n") == 1
