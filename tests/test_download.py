"""Data sets, foundation weights and checkpoints by name, from a hub on the loopback; what is said where none answers."""
# ruff: noqa: F811 (fixtures of another file)

import errno
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import ModelCard, constants, file_download
from loopback_hub import Hub
from PIL import Image
from test_weights import AROUND, SMALL, assert_refused, facts, published, sam2_file, save_pretrained, small_clip, spm  # noqa: F401

import annotations.download
import evaluate
import predict
import train
from annotations.download import SOURCES, download
from annotations.layouts import read_samples
from model import RS2SAM2
from predict import RS2SAM2Predictor
from presets import PRESETS, RECIPES
from runtime.hub import PATIENCE
from weights.checkpoints import build_model, load_checkpoint, read_checkpoint, stored_recipe
from weights.hub import resolve
from weights.provenance import in_words, provenance

ROOT = Path(__file__).parent.parent
NOBODY = "http://127.0.0.1:9"  # the port of "discard", where nobody listens


def name_hub(monkeypatch, url: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", url)  # of programs that are started
    monkeypatch.setattr(constants, "ENDPOINT", url)
    for module in (constants, file_download):  # the first in today's library, the second in older ones
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with nothing on it, an empty cache, and a working directory of one's own."""
    server = Hub()
    name_hub(monkeypatch, server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield server
    server.shutdown()
    server.server_close()


# Data sets --------------------------------------------------------------------------------------------------------------


def png(value: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(value).save(file, kind)
    return file.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def refsegrs() -> dict[str, bytes]:
    rng, files = np.random.default_rng(0), {}
    for number, split in enumerate(("train", "val", "test")):
        files[f"output_phrase_{split}.txt"] = f"{number} the road\n".encode()
        files[f"images/{number}.tif"] = png(rng.integers(0, 256, (64, 64, 3), np.uint8), "TIFF")
        files[f"masks/{number}.tif"] = png(np.full((64, 64), 255, np.uint8), "TIFF")
    return files


def test_refsegrs_is_fetched_through_a_kill_and_a_broken_connection_then_checked(hub):
    """By the command line; what follows goes on where the last stopped, to the library's 10 MiB."""
    archive = zipped(refsegrs() | {"large.bin": bytes(2_500_000) * 10})
    hub.repositories["datasets/JessicaYuan/RefSegRS"] = {"RefSegRS.zip": archive, "README.md": b""}
    hub.cuts["RefSegRS.zip"], hub.redirects = [-11_000_000, 11_000_000], True
    command = [sys.executable, ROOT / "data.py", "--download", "RefSegRS"]
    quick = [sys.executable, "-c", "from annotations.download import download; download('RefSegRS')"]
    pipes, began = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}, time.time()
    first = subprocess.Popen(quick, env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}, **pipes)
    while not (parts := [path.stat().st_size for path in Path("data").glob("*.part/*.part")]) or parts[0] < 10 * 2**20:
        time.sleep(0.05)
        assert time.time() - began < 60 and first.poll() is None
    first.kill()
    first.communicate()
    assert not Path("data/RefSegRS").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:  # older versions of the library don't go on by themselves
        assert "RefSegRS.zip, after 21.0 MB of 25.1 MB (the same command goes on there)" in done.stderr
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ranges = [wanted for method, path, wanted in hub.asked if method == "GET" and path.startswith("/cdn")]
    assert ranges == [None, "bytes=10485760-", "bytes=20971520-"]
    for word in ("CC-BY-4.0", Hub.COMMIT, hub.url, f"{len(archive) / 1e6:.1f} MB", "train"):
        assert word in done.stdout
    name, root, samples = read_samples("RefSegRS")
    assert (name, root, len(samples)) == ("RefSegRS", Path("data/RefSegRS"), 3)
    assert Path("data/RefSegRS/images/1.tif").read_bytes() == refsegrs()["images/1.tif"]
    assert os.listdir("data") == ["RefSegRS"] and Hub.COMMIT in Path("data/RefSegRS/SOURCE.txt").read_text()
    assert_refused(lambda: download("RefSegRS"), "data/RefSegRS exists, nothing is overwritten")


def rrsis_d() -> dict[str, bytes]:
    """The mirror's three files; one sample a split, the left half of each image."""
    refs, images, annotations, pictures = [], [], [], {}
    for number, split in enumerate(("train", "val", "test")):
        sentence = {"sent_id": number, "sent": "the left half", "raw": "the left half", "tokens": []}
        ids = {"ref_id": number, "ann_id": number, "image_id": number, "category_id": 0}
        refs.append({**ids, "split": split, "file_name": f"{number}.jpg", "sent_ids": [number], "sentences": [sentence]})
        images.append({"id": number, "file_name": f"{number}.jpg", "height": 64, "width": 64})
        polygon = [0, 0, 32, 0, 32, 64, 0, 64]
        annotations.append({"id": number, "image_id": number, "segmentation": [polygon], "categories_id": 0})
        picture = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
        pictures[f"JPEGImages/{number}.jpg"] = png(picture, "JPEG")
    instances = {"images": images, "annotations": annotations, "categories": [{"id": 0, "name": "half"}]}
    pictures["__MACOSX/._JPEGImages"] = b"litter"
    return {"JPEGImages.zip": zipped(pictures), "instances.json": json.dumps(instances).encode(),
            "refs(unc).p": pickle.dumps(refs, protocol=2)}  # fmt: skip


def test_rrsis_d_is_laid_out_as_its_authors_do_and_called_a_mirror(hub, capsys):
    hub.repositories["datasets/VoyageWang/rrsis-d"] = rrsis_d()
    root = download("RRSIS-D")
    assert "a third party's mirror, not the authors'" in (told := capsys.readouterr().out) and "CC BY-NC 4.0" in told
    assert sorted(path.name for path in root.iterdir()) == ["SOURCE.txt", "images", "rrsisd"]
    name, _, samples = read_samples("RRSIS-D")
    assert name == "RRSIS-D" and [sample.split for sample in samples] == ["train", "val", "test"]
    assert all(Path(sample.image).is_file() for sample in samples)


def test_of_sets_that_lie_elsewhere_the_address_is_told(hub, capsys):
    for name in ("RISBench", "NWPU-Refer", "RRSIS-HR", "RemoteSAM-270K"):
        assert download(name) is None
        told = capsys.readouterr().out
        assert f"make the folder data/{name} with" in told and SOURCES[name].licence in told and SOURCES[name].address in told
    assert not hub.asked and not Path("data").exists() and "and new_instances.json in" in SOURCES["NWPU-Refer"].layout


@pytest.mark.parametrize("entry", ["../out.txt", "a/../../out.txt", "/out.txt", "C:/out.txt", "..\\out.txt"])
def test_a_zip_whose_entries_leave_the_folder_is_refused_whole(hub, entry):
    hub.repositories["datasets/JessicaYuan/RefSegRS"] = {"RefSegRS.zip": zipped(refsegrs() | {entry: b"x"})}
    assert_refused(lambda: download("RefSegRS"), "RefSegRS.zip has an entry that leaves its folder")
    assert not list(Path("..").rglob("out.txt")) and not list(Path("data").rglob("*.tif"))


def test_what_hinders_a_download_is_one_sentence(hub, monkeypatch):
    assert_refused(lambda: download("Nothing"), "no way known here to get 'Nothing': name one of RefSegRS, RRSIS-D")
    assert_refused(lambda: download("RefSegRS"), r"JessicaYuan/RefSegRS\): http.* says no, there is no such repository")
    files = hub.repositories["datasets/JessicaYuan/RefSegRS"] = {"other.zip": b""}
    assert_refused(lambda: download("RefSegRS"), "has no RefSegRS.zip any more, it has other.zip")
    files["RefSegRS.zip"] = zipped(refsegrs())[:-100]
    assert_refused(lambda: download("RefSegRS"), "RefSegRS.zip is no zip that can be unpacked")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    assert_refused(lambda: download("RefSegRS"), r"RefSegRS needs 0.\d MB on the disk of data, which has 0.0 MB left")
    assert not Path("data/RefSegRS").exists()


def test_an_interruption_says_what_goes_on(hub, monkeypatch):
    hub.repositories["datasets/JessicaYuan/RefSegRS"] = {"RefSegRS.zip": zipped(refsegrs())}
    for error, expected in (
        (KeyboardInterrupt(), "interrupted: the same command goes on where it stopped"),
        (ConnectionError("gone"), r"RefSegRS.zip, after 0.0 MB of 0.\d MB .the same command goes on there.: .*not reached"),
        (OSError(errno.ENOSPC, "No space left on device"), "can't be written .No space left on device.: see to it"),
    ):
        monkeypatch.setattr(annotations.download, "http_get", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        assert_refused(lambda: download("RefSegRS"), expected)


def test_a_file_whose_checksum_is_wrong_is_not_kept(hub, monkeypatch):
    hub.repositories["datasets/JessicaYuan/RefSegRS"] = {"RefSegRS.zip": zipped(refsegrs())}
    monkeypatch.setattr(annotations.download, "sha256", lambda path: "0" * 64)
    assert_refused(lambda: download("RefSegRS"), "RefSegRS.zip arrived damaged")
    assert not list(Path("data/RefSegRS.part").iterdir())


# Foundation weights -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_names(hub, small_clip, sam2_file, monkeypatch):
    """A preset whose tag and SAM 2 lie on the loopback hub, both small."""
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small-clip", {"far": {"url": "", "hf_hub": "laion/small/"}})
    hub.repositories["laion/small"] = {"open_clip_pytorch_model.bin": small_clip[1].read_bytes()}
    hub.repositories["facebook/sam2.1-hiera-tiny"] = {"sam2.1_hiera_tiny.pt": sam2_file[1].read_bytes()}
    return replace(AROUND, encoder_name="small-clip", encoder_tag="far", encoder_size=64)


def test_foundation_weights_are_told_at_once_downloaded_once_and_found_without_network(
    hub, small_names, small_clip, sam2_file, capsys, monkeypatch
):
    model = build_model("base", small_names)
    told = capsys.readouterr().out
    size = len(hub.repositories["facebook/sam2.1-hiera-tiny"]["sam2.1_hiera_tiny.pt"])
    assert "laion/small open_clip_pytorch_model.bin, about" in told and "--encoder-weights far=FILE" in told
    assert f"sam2.1_hiera_tiny.pt, about {size / 1e6:.1f} MB (by hand: --sam2 FILE)" in told and hub.url in told
    assert torch.equal(model.union_encoder.visual.conv1.weight, small_clip[0].visual.conv1.weight)
    assert torch.equal(model.no_mem_embed, sam2_file[0].no_mem_embed)
    name_hub(monkeypatch, NOBODY)
    again = build_model("base", small_names)
    assert torch.equal(again.no_mem_embed, model.no_mem_embed) and not capsys.readouterr().out


def test_missing_weights_are_one_sentence_within_five_seconds_and_before_any_scene(hub, monkeypatch, capfd):
    """Where nobody listens, where a server listens and never answers, and where no name server does; nothing else is said."""
    assert PATIENCE < 5
    hub.silent, look_up = 30, socket.getaddrinfo
    slow = lambda host, *more, **kw: time.sleep(30) if "invalid" in str(host) else look_up(host, *more, **kw)  # noqa: E731
    monkeypatch.setattr(socket, "getaddrinfo", slow)
    for url, patience in ((NOBODY, PATIENCE), (hub.url, 1), ("http://hub.invalid", 1)):
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", str(patience))
        name_hub(monkeypatch, url)
        began = time.perf_counter()
        with pytest.raises(SystemExit) as end:
            train.main(["--model", "large", "--gpus", "0"])
        assert time.perf_counter() - began < 5 and end.value.code == 1
        told = capfd.readouterr().err
        for word in ("laion/CLIP-ViT-L-14-laion2B-s32B-b82K open_clip_model.safetensors, about 1.71 GB", "897.8 MB", url,
                     "--encoder-weights laion2b_s32b_b82k=FILE", "facebook/sam2.1-hiera-large", "--sam2 FILE", "HF_ENDPOINT"):
            assert word in told
        assert told.count("\n") == 1 and not Path("data").exists()
    expected = "BEiT-3 is .*--encoder-weights; missing too.*sam2_hiera_large.pt, about 897.7 MB"
    assert_refused(lambda: build_model("paper", PRESETS["paper"]), expected)


def test_weights_that_the_hub_refuses_or_the_disk_has_no_room_for(hub, small_names, monkeypatch):
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
        expected = r"downloading laion/small .* needs \d+.\d MB on the disk of .*cache, which has 0.0 MB left"
        assert_refused(lambda: build_model("base", small_names), expected)
    hub.repositories.pop("laion/small")
    assert_refused(lambda: build_model("base", small_names), "weights are missing: .* says no, there is no such repository")


# Checkpoints ------------------------------------------------------------------------------------------------------------


def test_the_published_weights_are_scored_in_one_line(hub, published, spm, tmp_path, monkeypatch, capsys):
    expected, state = published
    hub.repositories["datasets/VoyageWang/rrsis-d"] = rrsis_d()
    download("RRSIS-D")
    for form in ("bin shards", "safetensors"):
        folder = save_pretrained(tmp_path / form, state, form)
        (folder / "sentencepiece.bpe.model").write_bytes(spm)
        (folder / "config.json").write_text("{}")
        files = {f"rrsisd/{path.name}": path.read_bytes() for path in folder.iterdir()}
        hub.repositories["ReeF2025/RS2-SAM2"] = files | {"refseg/pytorch_model.bin": b"another", "README.md": b""}
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"cache of {form}"))
        line = f"evaluate.py --ckpt ReeF2025/RS2-SAM2:rrsisd --data RRSIS-D --protocol paper --json {form[:3]}.json"
        monkeypatch.setattr(sys, "argv", line.split())
        evaluate.main()
        assert "samples" in (out := capsys.readouterr().out) and "trained on RRSIS-D" in out
        hub.redirects = True
        result = json.loads(Path(f"{form[:3]}.json").read_text())
        assert (result["model_name"], result["protocol"], len(result["rows"])) == ("paper", "paper", 1)
        assert load_checkpoint("ReeF2025/RS2-SAM2:rrsisd")[1]["hub"] == f"ReeF2025/RS2-SAM2@{Hub.COMMIT}"
        assert not [path for _, path, _ in hub.asked if "refseg/" in path]
    assert json.loads(Path("bin.json").read_text())["scores"] == result["scores"]
    train.main([*"--data RRSIS-D --gpus 0 --workers 0 --epochs 1 --batch-size 1 --out tuned --init".split(), str(folder)])
    tuned, checkpoint = load_checkpoint("tuned/best.pt")
    assert checkpoint["init"]["file"] == str(folder) and tuned.preset == expected.preset
    assert not torch.equal(tuned.text_features.weight, expected.text_features.weight)


def test_a_checkpoint_s_name_is_a_path_first_and_found_again_without_network(hub, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = RS2SAM2(SMALL)
    torch.save(facts(SMALL, model.state_dict()), "best.pt")
    content = Path("best.pt").read_bytes()
    hub.repositories["me/mine"] = {"best.pt": content, "run-2/other.pt": content, "README.md": b""}
    for name, file in (("me/mine", "best.pt"), ("me/mine@main:best.pt", "best.pt"), (f"me/mine@{Hub.COMMIT}", "best.pt"),
                       ("me/mine:run-2", "other.pt"), ("me/mine:run-2/other.pt", "other.pt")):  # fmt: skip
        path = resolve(name)
        assert (path if path.is_file() else path / file).read_bytes() == content, name
        checkpoint = read_checkpoint(Path(name))
        assert torch.equal(checkpoint["model"]["no_mem_embed"], model.no_mem_embed)
        assert in_words(provenance(checkpoint)).startswith(f"tiny, from me/mine@{Hub.COMMIT}, ")
    assert "hub" not in read_checkpoint("./best.pt")
    assert f"revision {Hub.COMMIT} from {hub.url}" in capsys.readouterr().out
    name_hub(monkeypatch, NOBODY)
    assert (resolve("me/mine") / "best.pt").read_bytes() == content
    assert resolve("me/mine:run-2/other.pt").read_bytes() == content
    hub.asked.clear()
    Path("runs").mkdir()
    for path in ("best.pt", "runs/gone", "gone/best.pt", str(tmp_path / "gone"), "../a/b"):  # no names, or in a folder here
        assert resolve(path) == Path(path)
    assert not hub.asked


def test_a_name_that_gives_no_checkpoint_is_one_sentence(hub, monkeypatch):
    hub.repositories["me/mine"] = {"a/model.safetensors": b"", "b/x.pt": b"", "b/y.pt": b"", "README.md": b""}
    hub.repositories["me/one"] = {"best.pt": b""}
    for name, expected in (
        ("me/none", "checkpoint me/none, which is no path here: http.* says no, there is no such repository"),
        ("me/mine@v9", "it has no such revision"),
        ("me/mine", "me/mine holds no checkpoint: name after a colon one of its files or folders with weights: a, b$"),
        ("me/mine:b", "one of its files or folders with weights: a, b/x.pt, b/y.pt$"),
        ("me/mine:gone.pt", "me/mine:gone.pt holds no checkpoint"),
        ("me/one:gone.pt", "with weights: best.pt$"),
    ):
        assert_refused(name, expected)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=-1))
    assert_refused("me/mine:a", "me/mine:a needs 0.0 MB on the disk")
    name_hub(monkeypatch, NOBODY)
    assert_refused("me/other", "me/other, which is no path here: http://127.0.0.1:9 is not reached .*HF_ENDPOINT")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_refused("me/other", "not in the cache, and HF_HUB_OFFLINE forbids to look for it")


def test_a_predictor_is_saved_handed_on_and_loaded_by_name(hub, published, spm, tmp_path, monkeypatch, capsys):
    """With recipe, data and scores, and with BEiT-3's tokeniser; by `hf upload`, and predict.py's line with a tag."""
    torch.manual_seed(0)
    metrics, init = {"mIoU": 61.234, "oIoU": 70.5, "samples": 3}, {"model": "tiny", "data": "scenes", "file": "old.pt"}
    whole = facts(SMALL, RS2SAM2(SMALL).state_dict()) | {"data": "data/RRSIS-D", "metrics": metrics, "epoch": 4, "init": init}
    torch.save(whole | {"args": {"out": "runs/x"}}, "best.pt")
    predictor = RS2SAM2Predictor.from_pretrained("best.pt", device="cpu")
    predictor.save_pretrained("mine")
    card = ModelCard.load("mine/README.md")
    assert card.data.pipeline_tag == "image-segmentation" and "remote-sensing" in card.data.tags
    assert "trained on RRSIS-D" in card.text and "mIoU 61.23, oIoU 70.50" in card.text and "CC BY-NC 4.0" in card.text
    assert "run runs/x, trained on data/RRSIS-D, epoch 4" in card.text and "fine-tuned from old.pt (tiny, " in card.text
    json.loads(Path("mine/config.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    program, settings = Path(sys.executable).with_name("hf"), {"HF_TOKEN": "hf_x", "HF_HUB_DISABLE_XET": "1"}
    sent = subprocess.run([program, "upload", "me/mine", "mine"], env=os.environ | settings, capture_output=True, text=True)
    assert sent.returncode == 0, sent.stderr
    assert hub.repositories["me/mine"] == {path.name: path.read_bytes() for path in Path("mine").iterdir()} and hub.objects
    hub.repositories["me/mine@v1"] = dict(hub.repositories["me/mine"])
    for name in ("mine", "me/mine", "me/mine:model.safetensors"):
        again, checkpoint = load_checkpoint(name)
        torch.testing.assert_close(again.state_dict(), predictor.model.state_dict(), rtol=0, atol=0)
        assert stored_recipe(checkpoint) == RECIPES["tiny"] and again.preset == SMALL
        assert (checkpoint["data"], checkpoint["metrics"], checkpoint["init"]) == ("data/RRSIS-D", metrics, init)
        assert checkpoint["run"] == "runs/x" and "args" not in checkpoint
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save("plane.jpg")
    hub.repositories["me/mine"] = {"README.md": b"the branch went on"}
    line = ["predict.py", *"--ckpt me/mine@v1 --image plane.jpg --phrase".split(), "the airplane on the right"]
    monkeypatch.setattr(sys, "argv", line)
    monkeypatch.setattr(predict.signal, "signal", lambda *_: None)
    predict.main()
    assert f"revision {Hub.commit_of('v1')}" in capsys.readouterr().out
    (mask,) = (path for path in Path(".").rglob("plane-*.png") if "overlay" not in path.name)
    assert np.array_equal(np.array(Image.open(mask)) > 0, predictor.predict("plane.jpg", line[-1])[0])
    assert_refused(lambda: predictor.save_pretrained("mine"), "mine is not empty: name a new folder")

    torch.save(published[1], tmp_path / "pytorch_model.bin")
    (tmp_path / "beit3.spm").write_bytes(spm)
    RS2SAM2Predictor.from_pretrained(tmp_path / "pytorch_model.bin", device="cpu").save_pretrained("paper")
    model, checkpoint = load_checkpoint("paper")
    torch.testing.assert_close(model.state_dict(), published[0].state_dict(), rtol=0, atol=0)
    assert model.union_encoder.tokenizer(["the ship"])[0][0, 0] == 0 and checkpoint["model_name"] == "paper"
    RS2SAM2Predictor(model).save_pretrained("bare")
    assert "data that are not stated" in Path("bare/README.md").read_text()
    assert load_checkpoint("bare")[0].preset == model.preset
    for config, expected in (
        ({"preset": {}}, "bare is neither .*no data, no model_name, no revision"),
        ({"preset": 1, "data": "", "model_name": "x", "revision": "abc"}, "holds no preset.: use the revision abc"),
    ):
        Path("bare/config.json").write_text(json.dumps(config))
        assert_refused("bare", expected)
