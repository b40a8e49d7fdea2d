"""The model as a whole: padding, gradients, what is frozen, saving and loading, the real configurations."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from torch.utils._device import DeviceContext

import losses
from checkpoints import CheckpointError, load_checkpoint
from encoder import BEiT3Encoder
from fusion import BidirectionalAdapter
from model import PRESETS, RS2SAM2, Preset, count_parameters
from weights import is_unused, our_name

FIXTURES = Path(os.environ["FIXTURES"]) if os.environ.get("FIXTURES") else None
SMALL_BEIT3 = {
    "width": 32,
    "layers": 2,
    "heads": 4,
    "hidden": 64,
    "vocabulary": 100,
    "image_size": 64,
    "text_positions": 64,
}


def small_preset(encoder: str) -> Preset:
    tiny = dataclasses.replace(PRESETS["tiny"], image_size=64)
    if encoder == "open_clip":
        return tiny
    return dataclasses.replace(tiny, architecture="published", encoder="beit3", encoder_args=SMALL_BEIT3, reduction=4)


def random_model(encoder: str) -> RS2SAM2:
    """A small model whose every parameter is of order one, so that each matters."""
    torch.manual_seed(0)
    model = RS2SAM2(small_preset(encoder))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p) / max(1, p[0].numel() if p.dim() > 1 else 1) ** 0.5)
    return model


def random_batch(model: RS2SAM2, lengths: list[int]):
    generator = torch.Generator().manual_seed(1)
    S, E, B, L = model.preset.image_size, model.union_encoder.image_size, len(lengths), max(lengths)
    image = torch.randn(B, 3, S, S, generator=generator)
    encoder_image = torch.randn(B, 3, E, E, generator=generator)
    ids = torch.randint(4, 100, (B, L), generator=generator)
    if model.preset.encoder == "beit3":  # its padding is known by the id 3
        ids = torch.where(torch.arange(L) < torch.tensor(lengths)[:, None], ids, 3)
    return image, encoder_image, ids, torch.tensor(lengths)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("encoder", ["open_clip", "beit3"])
def test_a_batch_of_unequal_phrases_gives_each_sample_what_it_gets_alone(encoder, training):
    model = random_model(encoder).train(training)
    batch = random_batch(model, [2, 30, 11, 5])
    with torch.no_grad():
        together = model(*batch)
        for i, length in enumerate(batch[-1].tolist()):
            image, encoder_image, ids, lengths = (t[i : i + 1] for t in batch)
            alone = model(image, encoder_image, ids[:, :length], lengths)
            for name, ours, theirs in zip(together._fields, together, alone):
                assert (ours[i : i + 1] - theirs).abs().max() <= 1e-5 * theirs.abs().max(), (name, length)


@pytest.mark.parametrize("encoder", ["open_clip", "beit3"])
def test_every_trained_parameter_gets_a_gradient_and_no_other(encoder):
    model = random_model(encoder)
    output = model(*random_batch(model, [7, 4]))
    target = torch.zeros(2, 64, 64)
    target[:, 10:40, 20:50] = 1
    losses.total_loss(output, target, pseudo=1.0)["loss"].backward()
    silent = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert p.grad is None, name
        elif p.grad is None or p.grad.abs().max() == 0:
            silent.append(name)
    # sam2's hyper-network reads the mask token alone, so the last layer's other outputs still reach it: none is silent
    assert silent == [], silent


@pytest.mark.parametrize("encoder", ["open_clip", "beit3"])
def test_bfloat16_autocast_trains_and_agrees_with_float32(encoder):
    model = random_model(encoder)
    batch, target = random_batch(model, [7, 4]), torch.ones(2, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(*batch)
    loss = losses.total_loss(output, target, pseudo=1.0)["loss"]
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    exact = model(*batch).logits
    assert (output.logits - exact).norm() < 0.05 * exact.norm()  # bfloat16 keeps 8 bits


def test_key_biases_are_the_known_exception():
    """Soft-max does not see a shift of all keys: their gradient is zero up to noise."""
    model = random_model("open_clip")
    losses.total_loss(model(*random_batch(model, [7])), torch.ones(1, 64, 64))["loss"].backward()
    grad = model.decoder_fusion.attention.in_proj_bias.grad
    key = grad[len(grad) // 3 : 2 * len(grad) // 3]
    assert key.abs().max() < 1e-4 * grad.abs().max()


def test_foundation_stays_frozen_and_in_eval_mode():
    model = RS2SAM2(dataclasses.replace(small_preset("open_clip"), train_trunk=False))
    model.train()
    for block in model.image_encoder.trunk.blocks:
        assert not any(p.requires_grad for p in block.block.parameters()) and not block.block.training
        assert all(p.requires_grad for p in block.space_adapter.parameters()) and block.space_adapter.training
    assert not any(p.requires_grad for p in [*model.neck.parameters(), model.image_encoder.trunk.pos_embed])
    assert not model.neck.training and model.union_encoder.training
    assert not any(p.requires_grad for m in model.unused() for p in m.parameters())
    counts = count_parameters(model)
    assert counts["total"] == counts["trained"] + counts["frozen"] and counts["frozen"] > 0


@pytest.mark.parametrize("encoder", ["open_clip", "beit3"])
def test_the_first_step_of_ours_sees_the_trunk_as_it_was(encoder):
    """Zeroed output layers in architecture `ours` only, which learn at once: the published trunk starts disturbed.

    Those of the rewritten text learn from the second step on, for nothing reads the text before."""
    torch.manual_seed(0)
    model = RS2SAM2(small_preset(encoder))
    image, text = torch.randn(2, 3, 64, 64), torch.randn(2, 5, 64)
    stages = model.image_encoder(image, text)
    x = model.image_encoder.trunk.patch_embed(image)
    x = x + model.image_encoder.trunk._get_pos_embed(x.shape[1:3])
    for block in model.image_encoder.trunk.blocks:
        x = block.block(x)  # sam2's own forward
    same = torch.allclose(stages[-1], x.permute(0, 3, 1, 2), atol=1e-5)
    assert same == (encoder == "open_clip")
    stages[-1].square().sum().backward()
    assert all(adapter.up.weight.grad.abs().max() > 0 for adapter in model.image_encoder.adapters())
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    model.zero_grad()
    model.image_encoder(image, text)[-1].square().sum().backward()
    rewriting = [adapter for adapter in model.image_encoder.adapters() if hasattr(adapter, "text_up")]
    assert rewriting and all(adapter.text_up.weight.grad.abs().max() > 0 for adapter in rewriting)


def test_what_is_rewritten_is_added_to_the_text_in_ours_and_blended_into_it_as_published():
    """The published 0.8 / 0.2, by hand, against the sum of architecture `ours`, on the same weights."""
    torch.manual_seed(0)
    published, ours = BidirectionalAdapter(32, 24, 16), BidirectionalAdapter(32, 24, 16, residual=True)
    x, text, mask = torch.randn(2, 4, 6, 32), torch.randn(2, 5, 24), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    for before, after in zip((x, text), ours(x, text, mask)):
        assert torch.equal(before, after)  # nothing is added at the start
    ours.load_state_dict(published.state_dict())
    (x_published, text_published), (x_ours, text_ours) = published(x, text, mask), ours(x, text, mask)
    assert torch.equal(x_published, x_ours)
    torch.testing.assert_close(text_published - 0.8 * text, 0.2 * (text_ours - text))
    assert (text_ours - text).abs().min(-1).values.max() > 1e-3  # it is rewritten indeed


def test_no_video_memory_is_built():
    names = " ".join(k for k, _ in RS2SAM2(small_preset("open_clip")).named_modules())
    assert not any(word in names for word in ("memory", "maskmem", "obj_ptr"))


def test_a_checkpoint_holds_the_model(tmp_path):
    model = random_model("open_clip").eval()
    batch = random_batch(model, [5, 3])
    facts = {"data": "scenes", "model_name": "tiny", "revision": ""}
    torch.save(facts | {"preset": dataclasses.asdict(model.preset), "model": model.state_dict()}, tmp_path / "m.pt")
    again, _ = load_checkpoint(tmp_path / "m.pt")
    with torch.no_grad():
        for ours, theirs in zip(model(*batch), again(*batch)):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint", "tensor"])
def test_a_wrong_checkpoint_is_one_sentence(tmp_path, content):
    path = tmp_path / "m.pt"
    if content == "tensor":
        torch.save(torch.zeros(2), path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=str(path)):
        load_checkpoint(path)


def test_image_size_is_checked():
    with pytest.raises(ValueError, match="multiple of 32.*got 100"):
        RS2SAM2(dataclasses.replace(small_preset("open_clip"), image_size=100))


def test_normalise_is_the_field_s():
    model = RS2SAM2(small_preset("beit3"))
    white = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    for image in model.normalise(white, white):
        torch.testing.assert_close(image[0, :, 0, 0], expected)


class OnMeta(DeviceContext):
    """Tensors without storage, but for the one call whose values Hiera's constructor reads."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.linspace:
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


@pytest.fixture(scope="module")
def paper_model():
    with OnMeta(torch.device("meta")):
        return RS2SAM2(PRESETS["paper"])


@pytest.mark.skipif(FIXTURES is None, reason="FIXTURES names no folder")
def test_the_paper_s_preset_has_the_published_keys(paper_model):
    lines = (FIXTURES / "full" / "state_dict_keys.tsv").read_text().splitlines()[1:]
    published = {key: eval(shape) for key, shape, *_ in (line.split("\t") for line in lines)}
    used = {our_name(k): shape for k, shape in published.items() if not is_unused(k, blocks=48)}
    assert len(used) == sum(not is_unused(k, blocks=48) for k in published)  # no two keys share a place
    ours = {k: list(v.shape) for k, v in paper_model.state_dict().items()}
    assert used == ours


def test_the_paper_s_preset_counts_as_published(paper_model):
    """The published total less the video memory, the unconnected head, a mask token and the last text update."""
    memory = 448 + 256 + 256 + 17 + 5922304 + 1384608 + 197376
    last_update = (4 * 288 * 288 + 4 * 288) + (288 * 256 + 256)
    expected = 934_813_404 - memory - 262_400 - 1024 - last_update
    assert count_parameters(paper_model)["total"] == expected


def test_the_union_encoder_of_the_paper_is_beit3_large(paper_model):
    assert isinstance(paper_model.union_encoder, BEiT3Encoder)
    assert (paper_model.union_encoder.width, paper_model.union_encoder.grid, paper_model.preset.image_size) == (
        1024,
        14,
        1024,
    )
