"""Foundation weights: SAM 2's, open_clip's and BEiT-3's own files, with the right keys and shapes, written here."""

import dataclasses
import json
import pickle

import open_clip
import pytest
import sentencepiece
import torch
from sam2.build_sam import build_sam2
from test_model import SMALL_BEIT3, OnMeta

import weights
from checkpoints import build, rebuild
from encoder import BEiT3Encoder, BEiT3Tokenizer, OpenCLIPEncoder
from model import PRESETS, RS2SAM2
from weights import WeightsError, find_open_clip, load_beit3, load_open_clip, load_sam2, open_clip_model

SIZES = ["t", "s", "b+", "l"]
CONFIGS = [f"sam2/sam2_hiera_{s}.yaml" for s in SIZES] + [f"sam2.1/sam2.1_hiera_{s}.yaml" for s in SIZES]


def preset(config: str, **changes):
    """Real SAM 2 of a size with the small union encoder."""
    return dataclasses.replace(
        PRESETS["base"], sam2=config, encoder_name=PRESETS["tiny"].encoder_name, encoder_tag=None, image_size=128,
        encoder_args=PRESETS["tiny"].encoder_args, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sam2_tiny(tmp_path_factory):
    """SAM 2.1's smallest model with random weights, and its file as SAM 2's are."""
    torch.manual_seed(0)
    sam = build_sam2("configs/sam2.1/sam2.1_hiera_t.yaml", device="cpu", apply_postprocessing=False)
    with torch.no_grad():
        for p in (sam.image_encoder.trunk.pos_embed, sam.image_encoder.trunk.pos_embed_window):
            p.normal_()
    path = tmp_path_factory.mktemp("sam2") / "sam2.1_hiera_tiny.pt"
    torch.save({"model": sam.state_dict()}, path)
    return sam, path


def test_with_silent_adapters_the_image_encoder_is_sam2_s_own(sam2_tiny):
    sam, path = sam2_tiny
    model = RS2SAM2(preset("sam2.1/sam2.1_hiera_t.yaml"))
    load_sam2(model, path)
    with torch.no_grad():
        for adapter in model.image_encoder.adapters():
            adapter.up.weight.zero_(), adapter.up.bias.zero_()
        image = torch.randn(1, 3, 128, 128)
        ours = model.neck(model.image_encoder(image, torch.randn(1, 5, 256)))[0][:3]
        theirs = sam.image_encoder(image)["backbone_fpn"]
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for ours, theirs in ((model.mask_decoder, sam.sam_mask_decoder), (model.prompt_encoder, sam.sam_prompt_encoder)):
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
            assert torch.equal(a, b), name
    assert torch.equal(model.no_mem_embed, sam.no_mem_embed)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_key_of_every_size_finds_its_place(config):
    with OnMeta(torch.device("meta")):
        sam = build_sam2(f"configs/{config}", device="meta", apply_postprocessing=False)
        model = RS2SAM2(preset(config))
    ours = {k: v.shape for k, v in model.state_dict().items()}
    blocks = len(model.image_encoder.trunk.blocks)
    named = {f"visual_model.{k}": v.shape for k, v in sam.state_dict().items()}
    mapped = {weights.our_name(k): shape for k, shape in named.items() if not weights.is_unused(k, blocks)}
    assert mapped == {k: ours[k] for k in mapped}
    added = (
        "adapter.",
        "union_encoder",
        "text_features",
        "text_weight",
        "sparse_prompt",
        "mask_prompt",
        "decoder_fusion",
    )
    assert all(any(part in k for part in added) for k in ours.keys() - mapped.keys())


@pytest.mark.parametrize("damage", ["missing", "misshapen", "unknown"])
def test_a_sam2_file_that_does_not_fit_is_named(sam2_tiny, tmp_path, damage):
    state = dict(sam2_tiny[0].state_dict())
    key = "image_encoder.trunk.blocks.3.attn.qkv.weight"
    if damage == "missing":
        del state[key]
    elif damage == "misshapen":
        state[key] = state[key][:-1]
    else:
        state["image_encoder.trunk.surprise"] = torch.zeros(1)
    torch.save({"model": state}, tmp_path / "bad.pt")
    model = RS2SAM2(preset("sam2.1/sam2.1_hiera_t.yaml"))
    before = model.no_mem_embed.clone()
    with pytest.raises(WeightsError, match="surprise" if damage == "unknown" else r"blocks\.3\..*attn\.qkv\.weight"):
        load_sam2(model, tmp_path / "bad.pt")
    assert torch.equal(before, model.no_mem_embed)  # nothing was copied


class Evil:
    """Unpickled, it would write the marker."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def test_files_that_are_no_weights(tmp_path):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"model": Evil(tmp_path / "marker")}))
    torch.save({"model": {"x": 1}}, tmp_path / "numbers.pt")
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 100)
    for name in ("evil.pt", "numbers.pt", "noise.safetensors", "absent.pt"):
        with pytest.raises(WeightsError, match=name):
            weights.read_state(tmp_path / name)
    assert not (tmp_path / "marker").exists()


# ---- open_clip -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    """A small model that open_clip knows by name, with a file of its weights."""
    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
        "text_cfg": {"width": 16, "heads": 2, "layers": 2},
    }
    (folder / "small-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "small-clip.json")
    torch.manual_seed(1)
    clip = open_clip.create_model("small-clip")
    torch.save(clip.state_dict(), folder / "small.pt")
    return clip.eval(), folder / "small.pt"


def test_the_towers_are_open_clip_s(small_clip):
    theirs, path = small_clip
    clip = open_clip_model("small-clip")
    load_open_clip(clip, "small-clip", find_open_clip("small-clip", str(path)))
    encoder = OpenCLIPEncoder(clip, width=48, joint_layers=1, joint_heads=4).eval()
    phrases = ["The ship on the upper left", "a windmill"]
    ids, lengths = encoder.tokenizer(phrases)
    full = open_clip.get_tokenizer("small-clip")(phrases)
    assert torch.equal(ids, full[:, : ids.shape[1]]) and lengths.tolist() == [8, 4]
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        vision, text = encoder.encode_image(image), encoder.encode_text(ids)
        end = text[torch.arange(2), lengths - 1] @ theirs.text_projection
        torch.testing.assert_close(vision[:, 0] @ theirs.visual.proj, theirs.encode_image(image), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(end, theirs.encode_text(full), rtol=1e-4, atol=1e-5)
    assert encoder.tokenizer([" ".join(["ship"] * 100)])[0].shape == (1, 77)  # cut, its end kept
    assert encoder.tokenizer([" ".join(["ship"] * 100)])[0][0, -1] == encoder.tokenizer.bpe.eot_token_id


@pytest.mark.parametrize("form", ["plain", "half", "module", "state_dict"])
def test_open_clip_files_as_they_are_published(small_clip, tmp_path, form):
    """RemoteCLIP's and GeoRSCLIP's files are state dicts of open_clip models; others wrap them once or twice."""
    theirs, _ = small_clip
    state = theirs.state_dict()
    if form == "half":
        state = {k: v.half() for k, v in state.items()}
    if form in ("module", "state_dict"):
        state = {f"module.{k}": v for k, v in state.items()}
    torch.save({"state_dict": state, "epoch": 5} if form == "state_dict" else state, tmp_path / "RemoteCLIP.pt")
    clip = open_clip_model("small-clip")
    load_open_clip(clip, "small-clip", tmp_path / "RemoteCLIP.pt")
    for (name, ours), expected in zip(clip.state_dict().items(), theirs.state_dict().values()):
        torch.testing.assert_close(ours, expected.half().float() if form == "half" else expected, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14", "ViT-B-32-quickgelu", "ViT-L-14-336", "ViT-H-14"])
def test_the_remote_sensing_clips_are_accepted_at_full_size(name):
    """Their files hold the keys of open_clip's own model of that name."""
    with OnMeta(torch.device("meta")):
        ours, theirs = open_clip_model(name), open_clip.create_model(name, load_weights=False, device="meta")
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_another_resolution_interpolates_the_position_table(small_clip, sam2_tiny, monkeypatch):
    theirs, path = small_clip
    monkeypatch.setitem(PRESETS, "base", preset("sam2.1/sam2.1_hiera_t.yaml"))
    model = build("base", sam2_file=sam2_tiny[1], encoder="small-clip", encoder_weights=path, encoder_size=64)
    encoder = model.union_encoder
    assert (encoder.image_size, encoder.grid) == (64, 8)
    reference = open_clip.create_model("small-clip", pretrained=str(path), force_image_size=64)
    table = encoder.visual.positional_embedding
    assert table.shape == (1 + 64, 32) and torch.equal(table, reference.visual.positional_embedding)
    assert torch.equal(table[0], theirs.visual.positional_embedding[0])  # the class token's
    assert torch.equal(encoder.visual.conv1.weight, theirs.visual.conv1.weight)
    assert torch.equal(model.no_mem_embed, sam2_tiny[0].no_mem_embed)
    layers = [layer for a in model.image_encoder.adapters() for layer in (a.up, getattr(a, "text_up", None)) if layer]
    zeroed = {id(p) for layer in layers for p in layer.parameters()}
    for name, p in model.named_parameters():  # what no file holds was drawn at random all the same, or starts at zero
        if id(p) in zeroed:
            assert p.count_nonzero() == 0, name
        else:
            assert p.isfinite().all() and ("weight" not in name or p.dim() < 2 or p.std() > 0), name
    again = rebuild({"preset": dataclasses.asdict(model.preset), "model": model.state_dict()})
    assert again.union_encoder.image_size == 64
    with pytest.raises(WeightsError, match="--encoder-size|patches of 8"):
        build("base", sam2_file=sam2_tiny[1], encoder="small-clip", encoder_weights=path, encoder_size=60)
    with pytest.raises(WeightsError, match="--encoder-size 64: preset paper's BEiT-3 has a size of its own"):
        build("paper", encoder_size=64)


def test_the_file_of_a_tag_is_normalised_as_the_tag_says(small_clip, sam2_tiny, monkeypatch):
    """As for large's laion2b_s32b_b82k, whose images have mean and deviation 0.5, where its file was fetched by hand."""
    monkeypatch.setitem(PRESETS, "base", preset("sam2.1/sam2.1_hiera_t.yaml"))
    tag = {"url": "", "mean": (0.5,) * 3, "std": (0.25,) * 3, "quick_gelu": True}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small-clip", {"half": tag})
    options = {"sam2_file": sam2_tiny[1], "encoder": "small-clip"}
    alone = build("base", **options, encoder_weights=str(small_clip[1]))
    model = build("base", **options, encoder_weights=f"half={small_clip[1]}")
    assert model.union_encoder.mean == (0.5,) * 3 and model.union_encoder.std == (0.25,) * 3
    assert alone.union_encoder.mean != model.union_encoder.mean
    for m in (alone, model):
        assert torch.equal(m.union_encoder.visual.conv1.weight, small_clip[0].visual.conv1.weight)
    again = rebuild({"preset": dataclasses.asdict(model.preset), "model": model.state_dict()})
    assert torch.equal(again.encoder_norm, model.encoder_norm) and not torch.equal(again.encoder_norm, alone.encoder_norm)
    with pytest.raises(WeightsError, match="no weights file at gone.pt"):
        build("base", **options, encoder_weights="half=gone.pt")
    with pytest.raises(WeightsError, match="'third' is neither a file nor a pretrained tag of open_clip's small-clip"):
        build("base", **options, encoder_weights=f"third={small_clip[1]}")


def test_a_union_encoder_that_starts_from_random_weights_takes_another_size_too():
    model = build("tiny", encoder_size=64)
    assert (model.union_encoder.image_size, model.union_encoder.grid) == (64, 8)
    again = rebuild({"preset": dataclasses.asdict(model.preset), "model": model.state_dict()})
    assert again.union_encoder.image_size == 64
    with pytest.raises(WeightsError, match="the preset's encoder needs a multiple of its patches of 8"):
        build("tiny", encoder_size=60)


def test_what_is_not_a_plain_vit_is_refused_in_one_sentence():
    accepted = []
    for name in open_clip.list_models():
        with OnMeta(torch.device("meta")):
            try:
                open_clip_model(name)
                accepted.append(name)
            except WeightsError as error:
                assert name in str(error)
    assert {"ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-B-32-quickgelu"} <= set(accepted)
    assert not {"RN50", "ViT-B-16-SigLIP", "roberta-ViT-B-32", "coca_ViT-B-32", "convnext_base"} & set(accepted)
    assert len([n for n in accepted if n != "small-clip"]) >= 30
    with pytest.raises(WeightsError, match="no model 'ViT-Z'"):
        open_clip_model("ViT-Z")


def test_openai_s_weights_bring_their_activation_and_normalisation():
    with OnMeta(torch.device("meta")):
        quick = open_clip_model("ViT-B-16", "openai")
        plain = open_clip_model("ViT-L-14", "laion2b_s32b_b82k")
    assert "QuickGELU" in str(quick.visual) and "QuickGELU" not in str(plain.visual)
    assert plain.visual.preprocess_cfg["mean"] == (0.5, 0.5, 0.5)


def test_open_clip_s_errors(small_clip, tmp_path):
    clip, _ = small_clip
    with pytest.raises(WeightsError, match="neither a file nor a pretrained tag"):
        find_open_clip("small-clip", "no_such_tag")
    torch.save({"wrong": torch.zeros(1)}, tmp_path / "wrong.pt")
    with pytest.raises(WeightsError, match="not a checkpoint of open_clip's small-clip"):
        load_open_clip(clip, "small-clip", str(tmp_path / "wrong.pt"))
    torch.save({"visual.proj": Evil(tmp_path / "marker")}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match="not a checkpoint of open_clip's small-clip"):
        load_open_clip(clip, "small-clip", tmp_path / "evil.pt")
    assert not (tmp_path / "marker").exists()


# ---- BEiT-3 --------------------------------------------------------------------------------------------------------------


def test_beit3_s_own_file(tmp_path):
    chosen = dataclasses.replace(PRESETS["tiny"], encoder="beit3", encoder_args=SMALL_BEIT3, encoder_name="")
    source, model = RS2SAM2(chosen), RS2SAM2(chosen)
    state = {f"beit3.{k}": v for k, v in source.union_encoder.state_dict().items()}
    extra = {"beit3.vision_embed.mask_token": torch.zeros(1, 1, 32), "mim_head.weight": torch.zeros(2, 2)}
    torch.save({"model": state | extra}, tmp_path / "beit3.pth")
    load_beit3(model, tmp_path / "beit3.pth")
    for (name, a), b in zip(model.union_encoder.state_dict().items(), source.union_encoder.state_dict().values()):
        assert torch.equal(a, b), name
    del state["beit3.encoder.layers.1.ffn.B.fc2.bias"]
    torch.save({"model": state}, tmp_path / "short.pth")
    with pytest.raises(WeightsError, match=r"layers\.1\.ffn\.B\.fc2\.bias"):
        load_beit3(model, tmp_path / "short.pth")


@pytest.fixture(scope="module")
def toy_tokenizer(tmp_path_factory) -> bytes:
    """A SentencePiece model of some phrases."""
    folder = tmp_path_factory.mktemp("spm")
    words = ["the ship on the left", "a large dam", "the red storage tank at the bottom", "two airplanes"] * 5
    (folder / "text.txt").write_text("\n".join(words))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "toy"), vocab_size=60, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    return (folder / "toy.model").read_bytes()


def test_the_paper_s_preset_is_built_from_files_of_beit3_base_or_large(sam2_tiny, toy_tokenizer, tmp_path, monkeypatch):
    """The file's shapes say which; here a small one."""
    sizes = {
        "width": 128, "layers": 3, "heads": 2, "hidden": 96, "vocabulary": 80, "image_size": 64, "patch": 16,
        "text_positions": 40,
    }  # fmt: skip
    monkeypatch.setitem(PRESETS, "paper", dataclasses.replace(PRESETS["paper"], sam2="sam2.1/sam2.1_hiera_t.yaml"))
    torch.manual_seed(3)
    source = BEiT3Encoder(**sizes)
    file = tmp_path / "beit3_base_patch16_224.pth"
    torch.save({"model": {f"beit3.{k}": v for k, v in source.state_dict().items()}}, file)
    (tmp_path / "beit3.spm").write_bytes(toy_tokenizer)
    model = build("paper", sam2_file=sam2_tiny[1], encoder_weights=file)
    assert model.preset.encoder_args == sizes and model.preset.architecture == "published"
    for (name, a), b in zip(model.union_encoder.state_dict().items(), source.state_dict().values()):
        assert torch.equal(a, b), name
    assert model.union_encoder.tokenizer(["the ship"])[1].item() > 2
    assert model.union_encoder.tokenizer(["the ship " * 99])[0].shape == (1, 38)  # two rows of the table stay unused
    (tmp_path / "beit3.spm").write_bytes(b"nonsense")
    with pytest.raises(WeightsError, match="is no SentencePiece model"):
        build("paper", sam2_file=sam2_tiny[1], encoder_weights=file)
    (tmp_path / "beit3.spm").write_bytes(toy_tokenizer)
    torch.save({"model": {"beit3.other": torch.zeros(1)}}, file)
    with pytest.raises(WeightsError, match="is not a BEiT-3 file: it lacks 'beit3.text_embed.weight'"):
        build("paper", sam2_file=sam2_tiny[1], encoder_weights=file)


def test_beit3_s_ids_are_the_published_ones(toy_tokenizer):
    """<s> 0, </s> 2, <unk> = padding 3, every other piece k -> k + 1, checked against the model's own pieces."""
    tokenizer = BEiT3Tokenizer(toy_tokenizer)
    pieces = tokenizer.pieces
    assert [pieces.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    ids, lengths = tokenizer(["the ship\n", "a dam at the left \u2603"])
    ship = [0, *(pieces.piece_to_id(p) + 1 for p in pieces.encode("the ship", out_type=str)), 2]
    assert ids[0, : lengths[0]].tolist() == ship and (ids[0, lengths[0] :] == 3).all()
    unknown = pieces.encode("\u2603", out_type=str)
    assert ids[1, lengths[1] - 1] == 2 and 3 in ids[1, : lengths[1] - 1].tolist(), unknown
    cut, length = BEiT3Tokenizer(tokenizer.model, context=5)(["the ship on the left"])
    assert length.item() == 5 and cut[0, -1] == 2
