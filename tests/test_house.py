"""The house itself: files that can be lifted out, floors that import downwards only, sizes, links."""

import ast
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from train import command_line

ROOT = Path(__file__).parent.parent
# From the bottom up: a file imports of the project what stands on lower floors, or in its own folder.
FLOORS = [
    ["runtime", "fusion", "losses"], ["presets", "prompt_gen", "imagery"], ["encoder", "annotations"],
    ["model", "data", "synthetic_scenes"], ["weights"], ["evaluate"], ["predict"], ["train"], ["experiments"],
]  # fmt: skip
TOP = {"model", "fusion", "prompt_gen", "encoder", "losses", "presets", "data", "train", "evaluate", "predict"}
ROOMS = {"weights", "annotations", "synthetic_scenes", "imagery", "runtime", "experiments"}
FILES = sorted([*ROOT.glob("*.py"), *(f for room in ROOMS for f in (ROOT / room).rglob("*.py"))])
TREES = {f.relative_to(ROOT): ast.parse(f.read_text()) for f in FILES}

ALONE = {
    ("fusion.py",): """
import torch, fusion
from sam2.modeling.backbones.hieradet import Hiera
trunk = Hiera(embed_dim=16, num_heads=1, stages=(1, 2, 1), q_pool=2, window_spec=(8, 4, 4), global_att_blocks=(2,))
stages = fusion.FusedHiera(trunk, text_dim=24)(torch.randn(2, 3, 64, 64), torch.randn(2, 5, 24), torch.ones(2, 5) > 0)
assert [tuple(s.shape) for s in stages] == [(2, 16, 16, 16), (2, 32, 8, 8), (2, 64, 4, 4)]
fused = fusion.DecoderFusion(64)(stages[-1], torch.randn(1, 64, 4, 4), torch.randn(2, 5, 64), None)
assert fused.shape == stages[-1].shape
""",
    ("losses.py",): """
import torch, losses
from types import SimpleNamespace
output = SimpleNamespace(logits=torch.randn(2, 1, 8, 8), pseudo_mask=torch.randn(2, 1, 4, 4), text_weight=torch.zeros(2))
loss = losses.total_loss(output, torch.ones(2, 32, 32), {"cross_entropy": 1.0, "dice": 0.1, "boundary": 0.2})["loss"]
assert torch.isfinite(loss)
""",
    ("prompt_gen.py", "fusion.py"): """
import torch, prompt_gen
from fusion import PUBLISHED
mask = prompt_gen.MaskPromptGenerator(32)(torch.randn(2, 1, 32), torch.randn(2, 16, 32))
assert mask.shape == (2, 1, 4, 4) and prompt_gen.DensePrompt(PUBLISHED)(mask, 32).shape == (2, 1, 32, 32)
assert prompt_gen.SparsePrompt(32, 8, tokens=4)(torch.randn(2, 1, 32)).shape == (2, 4, 8)
""",
}


@pytest.mark.parametrize("files", ALONE, ids=" ".join)
def test_a_file_can_be_lifted_out(files, tmp_path):
    for file in files:
        shutil.copy(ROOT / file, tmp_path)
    command = [sys.executable, "-W", "ignore", "-c", ALONE[files]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ten_files_at_the_top_and_folders_by_concern():
    assert {f.stem for f in ROOT.glob("*.py")} == TOP
    assert {f.parent.name for f in ROOT.glob("*/*.py") if not f.parent.name.startswith(".")} == ROOMS | {"tests"}
    for room in ROOMS:
        assert [type(node) for node in TREES[Path(room, "__init__.py")].body] == [ast.Expr]  # a docstring


def imported(tree) -> set[str]:
    """The files and folders of the project that a file imports from, wherever in it the import stands."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in TOP | ROOMS}


def test_imports_go_down_alone():
    floor = {name: height for height, names in enumerate(FLOORS) for name in names}
    assert floor.keys() == TOP | ROOMS
    for path, tree in TREES.items():
        here = path.parts[0].removesuffix(".py")
        for there in {name.split(".")[0] for name in imported(tree)} - {here}:
            assert floor[there] < floor[here], f"{path} imports {there}, which stands no lower"


def test_no_circle_within_a_folder():
    graph = {}
    for path, tree in TREES.items():
        targets = {"/".join(name.split(".")[:2]) + ".py" for name in imported(tree)}
        graph[path.as_posix()] = {t for t in targets if Path(t) in TREES}
    while leaves := {file for file, targets in graph.items() if not targets}:
        graph = {file: targets - leaves for file, targets in graph.items() if file not in leaves}
    assert not graph, f"these import each other: {graph}"


def test_sizes():
    for path, tree in TREES.items():
        assert len((ROOT / path).read_text().splitlines()) <= 400, path
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                most = 60 if isinstance(node, ast.FunctionDef) else 120
                assert node.end_lineno - node.lineno < most, f"{path}: {node.name} is over {most} lines"
    assert len([action for action in command_line()._actions if action.dest != "help"]) <= 17


PROGRAMS = [path for path in TREES if 'if __name__ == "__main__":' in (ROOT / path).read_text()]


@pytest.mark.parametrize("path", PROGRAMS, ids=str)
def test_help_and_a_mistyped_flag_need_no_library_that_takes_seconds(path):
    program = [path] if len(path.parts) == 1 else ["-m", ".".join(path.with_suffix("").parts).removesuffix(".__main__")]
    for flag, code in (("--help", 0), ("--misspelt", 2)):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-X", "importtime", *program, flag], cwd=ROOT, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == code and ("usage: " in done.stdout if code == 0 else "error: " in done.stderr), done.stderr
        assert not re.search(r"\| +(torch|open_clip|sam2|timm)$", done.stderr, re.MULTILINE)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_no_file_changes_the_import_path():
    others = [f for f in (ROOT / "tests").glob("*.py") if f.name not in ("conftest.py", Path(__file__).name)]
    assert not [f for f in (*FILES, *others) if "sys.path" in f.read_text()]


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_exist(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = document.parent / path if path else document
        assert found.exists(), f"{document.name} links to {target}"
        if anchor and found.suffix == ".md":
            titles = re.findall(r"^#+ (.*)", found.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target
