"""What each part is worth: the table of the paper's ablation, by training every variant with several seeds.

    python -m experiments.ablate --out runs/ablation                                  tiny, generated scenes, a CPU
    python -m experiments.ablate --out runs/ablation --variants whole no-boundary hard-edges --seeds 0 1 2 3 4
    python -m experiments.ablate --out runs/refsegrs --data RefSegRS --model base --samples 100000 -- --gpus 1 --sam2 FILE
    python -m experiments.ablate --score runs/ablation/mpg-0/best.pt                  the scores of one checkpoint again

A variant is a name of VARIANTS, or parts to leave out with commas between, such as rewriting,dice. All runs get the same
budget in samples, the same schedule and, seed by seed, the same order of samples; what follows `--` goes to train.py as
it is. A run ends with its best weights scored (on the test split, or the validation split where there is none). Called
again, the tool goes on: finished runs are skipped, begun ones are resumed. Written into --out: a folder and a log for each
run; ablation.md, the mean over the seeds and their standard deviation; ablation.png, the validation mIoU against the
training time, which needs matplotlib.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

from experiments.parts import CHOICES
from runtime.arguments import answer_early, at_least

# name -> (what the table calls it, the parts left out). BHFM is both fusions of the text: in the image encoder and before
# the decoder. Without either, and without the mask prompt, the phrase reaches SAM 2 through the sparse tokens alone.
VARIANTS = {
    "sam2": ("union encoder + SAM 2", "fusion,decoder-fusion,mask-prompt,boundary"),
    "sam2-boundary": ("+ boundary loss", "fusion,decoder-fusion,mask-prompt"),
    "mpg": ("+ boundary loss + MPG", "fusion,decoder-fusion"),
    "bhfm": ("+ boundary loss + BHFM", "mask-prompt"),
    "whole": ("all", ""),
    "one-direction": ("all, BHFM in one direction", "rewriting"),
    "no-product": ("all but the product before the decoder", "decoder-fusion"),
    "hard-edges": ("all, boundary loss as published (hard edges)", "soft-edges"),
    "no-boundary": ("all but the boundary loss", "boundary"),
    "no-sparse": ("all but the sparse tokens", "sparse-prompt"),
    "no-pseudo": ("all but the pseudo-mask's own loss", "pseudo"),
    "no-dice": ("all but the Dice loss", "dice"),
}


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="parts: " + "; ".join(f"{name} ({what})" for name, what in CHOICES.items()),
    )  # fmt: skip
    add = parser.add_argument
    # fmt: off
    add("--out", type=Path, default=Path("runs/ablation"), metavar="DIR", help="folder of the runs (default: runs/ablation)")
    add("--data", help="data set of train.py, by name or path (default: scenes; with --score, the checkpoint's)")
    add("--model", default="tiny", metavar="PRESET", help="of presets.py (default: tiny)")
    add("--variants", nargs="+", default=list(VARIANTS), metavar="NAME", help=f"of {', '.join(VARIANTS)} (default: all)")
    add("--seeds", nargs="+", type=at_least(int, 0), default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    add("--samples", type=at_least(int, 1), default=20_000, help="budget of a run, rounded up to whole epochs (default: 20000)")
    add("--jobs", type=at_least(int, 1), default=1, metavar="N", help="runs at a time, which share the cores (default: 1)")
    add("--only", nargs=2, metavar=("NAME", "SEED"), help="do this run alone, in this process")  # torchrun has a --run-path
    add("--score", type=Path, metavar="CKPT", help="score a checkpoint, of an ablation or not, and do nothing else")
    add("--split", help="of --score: train, val or test (default: test, or val where there is none)")
    # fmt: on
    return parser


def cut_off(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before `--`, and what behind it, for train.py."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:cut], arguments[cut + 1 :]


if __name__ == "__main__":
    answer_early(command_line(), cut_off(sys.argv[1:])[0])

import numpy as np
import torch

import train
from annotations.layouts import read_samples
from evaluate import open_for, print_results, results_by_group, score
from experiments.stand_ins import check_parts, leave_out, load, losses_without
from model import count_parameters
from presets import PRESETS, RECIPES, find_preset, with_settings
from runtime.devices import default_workers, pick_device
from runtime.errors import UserError, exit_on_user_error
from runtime.processes import launched
from runtime.run_folder import RunFolder, write_whole
from synthetic_scenes.scenes import ensure_scenes
from weights.provenance import weights_line

COLUMNS = ("mIoU", "oIoU", "Pr@0.5", "Pr@0.9", "bIoU")


def variant(name: str) -> tuple[str, list[str]]:
    """(what the table calls it, the parts left out) of a name of VARIANTS or of a list of parts; UserError."""
    label, parts = VARIANTS.get(name, (f"without {name.replace(',', ', ')}", name))
    return label, sorted(check_parts(parts.split(","))) if parts else []


# ---- one run -----------------------------------------------------------------------------------------------------------


def training_arguments(args: argparse.Namespace, name: str, seed: int) -> list[str]:
    """The command line of train.py for a run, or for what is left of it."""
    folder = args.out / f"{name}-{seed}"
    if RunFolder(folder).taken():
        return ["--resume", str(folder)]
    recipe, epochs, _ = budget(args)
    losses = losses_without(recipe.losses, variant(name)[1])
    flags = ["--data", args.data, "--model", args.model, "--seed", seed, "--epochs", epochs, "--out", folder]
    flags += [] if torch.cuda.is_available() else ["--gpus", 0]  # one process: other runs are beside it
    return [*map(str, flags), *args.train, "--set", f"losses={losses}"]


def run(args: argparse.Namespace, name: str, seed: int) -> None:
    """Train a variant with a seed, or go on with that, and write its folder's scores.json."""
    _, parts = variant(name)
    train.main(training_arguments(args, name, seed), edit=partial(leave_out, parts=parts), left_out=tuple(parts))
    if launched():  # one of several cards' processes: the one that launched them scores
        return
    path = args.out / f"{name}-{seed}" / "best.pt"
    result = scored(path, skip_missing="--skip-missing" in args.train)
    text = json.dumps(result, indent=1)
    write_whole(path.with_name("scores.json"), lambda file: file.write(text.encode()))


def scored(path: Path, data: str | None = None, split: str | None = None, **options) -> dict:
    """Scores of a checkpoint, of an ablation or not, on the split asked for; None: test, or val where there is no test."""
    model, checkpoint = load(path, pick_device())
    print(weights_line(path, checkpoint))
    data, dataset = open_for(model, checkpoint, argparse.Namespace(ckpt=path, data=data, split=split), **options)
    facts = {k: checkpoint[k] for k in ("model_name", "revision", "epoch", "left_out") if k in checkpoint}
    facts |= {"ckpt": str(path), "data": str(data), "split": dataset.split, "parameters": count_parameters(model)["total"]}
    rows = score(model, dataset, workers=default_workers())
    return facts | results_by_group(rows, "ours") | {"rows": rows}


# ---- all runs ----------------------------------------------------------------------------------------------------------


class Runs:
    """The processes of an ablation's runs, each of which is this program with --only."""

    def __init__(self, args: argparse.Namespace, arguments: list[str]):
        self.out, self.arguments, self.running, self.stopped = args.out, arguments, set(), False
        self.env = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}

    def do(self, name: str, seed: int) -> str | None:
        """Train and score a run, or what is left of that -> None, or what went wrong in one sentence."""
        folder = self.out / f"{name}-{seed}"
        if self.stopped or (folder / "scores.json").exists():
            return None
        log = folder.with_name(f"{folder.name}.log")
        print(f"{folder.name}: {'going on' if RunFolder(folder).taken() else 'starting'}", flush=True)
        command = [sys.executable, "-m", "experiments.ablate", "--only", name, str(seed), *self.arguments]
        with open(log, "a") as f:
            # in a process group of its own, so that Ctrl-C reaches it once, from here
            process = subprocess.Popen(command, env=self.env, stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT,
                                       start_new_session=True)  # fmt: skip
        self.running.add(process)
        if self.stopped:
            process.terminate()
        code = process.wait()
        self.running.discard(process)
        last = (log.read_text().strip().splitlines() or [""])[-1]
        return f"{folder.name} failed with exit code {code} ({last}): see {log}, then call this again" if code else None

    def stop(self) -> None:
        """End what is running. Another call goes on from what it saved last."""
        self.stopped = True
        for process in list(self.running):
            process.terminate()


def budget(args: argparse.Namespace) -> tuple:
    """(the runs' recipe, the least number of its epochs with so many samples in all, their samples)"""
    settings = train.command_line().parse_args(args.train).set
    recipe = with_settings(PRESETS[args.model], RECIPES[args.model], settings)[1]
    shortest, longest = recipe.epoch_range
    targets = sum(sample.split == "train" for sample in read_samples(args.data)[2])
    epoch = int(max(shortest, min(longest, targets)))
    epochs = -(-args.samples // epoch)
    return recipe, epochs, epochs * epoch


def check_settings(out: Path, settings: dict) -> None:
    """One folder holds runs of one kind: its settings are written once and must be the same after that."""
    path = out / "ablation.json"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1))
    before, settings = json.loads(path.read_text()), json.loads(json.dumps(settings))
    for key, value in settings.items():
        if before.get(key, value) != value:
            raise UserError(
                f"{out} holds runs with {key} {before[key]!r}, this asks for {value!r}: choose another --out, runs of unequal "
                f"budgets can't be compared"
            )


# ---- table and curves --------------------------------------------------------------------------------------------------


def read_result(folder: Path) -> dict:
    """Of a scored run: its scores and parameters, and its curve [(training time in minutes, validation mIoU)]."""
    result = json.loads((folder / "scores.json").read_text())
    minutes, samples, curve = 0.0, 0, []
    for line in (line for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "epoch" in line):
        minutes += (line["samples"] - samples) / line["images/s"] / 60
        samples = line["samples"]
        curve.append((minutes, line["val"]["mIoU"]))
    return {"scores": result["scores"], "parameters": result["parameters"], "split": result["split"], "curve": curve}


def read_results(out: Path) -> dict[str, dict[int, dict]]:
    """{variant: {seed: run}} of all scored runs, those of earlier calls too, in the order of VARIANTS."""
    results = {name: {} for name in VARIANTS}
    for path in sorted(out.glob("*-*/scores.json")):
        name, _, seed = path.parent.name.rpartition("-")
        if seed.isdecimal() and (name in VARIANTS or set(name.split(",")) <= CHOICES.keys()):
            results.setdefault(name, {})[int(seed)] = read_result(path.parent)
    return {name: runs for name, runs in results.items() if runs}


def mean_and_spread(values: list[float], sign: str = "") -> str:
    """'52.1 ± 1.3': mean and standard deviation of the sample; the mean alone of one value."""
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.1f}{spread}"


def markdown(results: dict[str, dict[int, dict]], settings: dict) -> str:
    """The table of `read_results`: mean ± standard deviation over the seeds."""
    splits = {run["split"] for runs in results.values() for run in runs.values()}
    lines = [
        f"{settings['model']} on {settings['data']}, {settings['samples']:,} samples a run, best weights scored on split "
        f"{', '.join(sorted(splits))}; mean ± standard deviation over the seeds, per cent. Last column: mIoU less that "
        f"of `{VARIANTS['whole'][0]}` with the same seed.",
        "",
        "| variant | left out | parameters | seeds | " + " | ".join(COLUMNS) + " | mIoU − all |",
        "|---|---|---|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    whole = results.get("whole", {})
    for name, runs in results.items():
        label, parts = variant(name)
        scores = [mean_and_spread([run["scores"][c] for run in runs.values()]) for c in COLUMNS]
        paired = [runs[s]["scores"]["mIoU"] - whole[s]["scores"]["mIoU"] for s in runs if s in whole]
        less = mean_and_spread(paired, "+") if paired and name != "whole" else ""
        parameters = next(iter(runs.values()))["parameters"]
        cells = [label, ", ".join(parts), f"{parameters:,}", ", ".join(map(str, sorted(runs))), *scores, less]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(path: Path, results: dict[str, dict[int, dict]]) -> None:
    """Validation mIoU against training time: the mean over the seeds, and faintly each seed. ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    colours = pyplot.get_cmap("tab20").colors
    for n, (name, runs) in enumerate(results.items()):
        curves = [np.array(run["curve"]) for run in runs.values() if run["curve"]]
        colour = colours[n % len(colours)]
        for curve in curves:
            axes.plot(*curve.T, color=colour, alpha=0.25, linewidth=0.8)
        if curves:
            shortest = min(map(len, curves))
            mean = np.mean([curve[:shortest] for curve in curves], axis=0)
            axes.plot(*mean.T, color=colour, label=variant(name)[0], linewidth=2, marker="o", markersize=3)
    axes.set(xlabel="training time in minutes", ylabel="validation mIoU, per cent")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def write_results(out: Path, settings: dict) -> None:
    """Print and write the table, and draw the curves where there is matplotlib."""
    results = read_results(out)
    if not results:
        return
    table = markdown(results, settings)
    (out / "ablation.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\nwrote {out / 'ablation.md'}")
    try:
        plot(out / "ablation.png", results)
        print(f"wrote {out / 'ablation.png'}")
    except ImportError:
        print(f"no {out / 'ablation.png'}: it needs `pip install matplotlib`, then call this again")


# ---- command line ------------------------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; what follows `--` in it is `train`. UserError for flags there that this tool sets itself."""
    arguments, behind = cut_off(arguments)
    args = argparse.Namespace(**vars(command_line().parse_args(arguments)), train=behind)
    find_preset(args.model)
    own = ("--data", "--model", "--seed", "--epochs", "--out", "--resume", "--init")
    if taken := [flag for flag in args.train if flag.partition("=")[0] in own]:
        raise UserError(f"{taken[0]} after -- is set by this tool for every run: leave it out there")
    for name in args.variants:
        variant(name)
    return args


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(arguments)
    if args.score:
        result = scored(args.score, args.data, args.split)
        without = ", ".join(result.get("left_out") or ()) or "nothing"
        print(f"{args.score} without {without} on {result['data']}, split {result['split']}")
        return print_results(result)
    args.data = args.data or "scenes"
    if args.only:
        return run(args, args.only[0], int(args.only[1]))
    if args.data == "scenes":
        ensure_scenes(Path("data/scenes"))
    recipe, epochs, samples = budget(args)
    settings = {"data": args.data, "model": args.model, "epochs": epochs, "samples": samples, "train": args.train}
    settings |= {f"preset.{key}": value for key, value in asdict(PRESETS[args.model]).items()}
    settings |= {f"recipe.{key}": value for key, value in asdict(recipe).items()}
    check_settings(args.out, settings)
    runs = Runs(args, arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    wanted = [(name, seed) for seed in args.seeds for name in args.variants]  # one seed for all, then the next
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            failures = [f for f in pool.map(lambda pair: runs.do(*pair), wanted) if f]
        finally:
            runs.stop()
            pool.shutdown(cancel_futures=True)
    write_results(args.out, settings)
    if failures:
        raise UserError("\n".join(failures), exit_code=1)


if __name__ == "__main__":
    try:
        with exit_on_user_error("ablate"):
            main()
    except KeyboardInterrupt:
        sys.exit("ablate: stopped; call it again to go on")
