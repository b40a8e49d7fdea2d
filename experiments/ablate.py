"""What each part is worth: the table of the paper's ablation, by training every variant with several seeds.

    python tools/ablate.py --out runs/ablation                                  tiny, generated scenes, a CPU
    python tools/ablate.py --out runs/ablation --variants whole no-boundary hard-edges --seeds 0 1 2 3 4
    python tools/ablate.py --out runs/refsegrs --data RefSegRS --model base --samples 100000 -- --gpus 1 --sam2 FILE

All runs get the same budget in samples, the same schedule and, seed by seed, the same order of samples; what follows `--`
goes to train.py as it is. A run ends with its best weights scored (on the test split, or the validation split where there is
none). Called again, the tool goes on: finished runs are skipped, begun ones are resumed. Written into --out: a folder and a
log for each run; ablation.md, the mean over the seeds and their standard deviation; ablation.png, the validation mIoU
against the training time, which needs matplotlib.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from layouts import UserError, read_samples  # noqa: E402
from model import PRESETS  # noqa: E402
from recipe import RECIPES  # noqa: E402
from runs import RunFolder, UserError, number  # noqa: E402
from scenes import make_scenes  # noqa: E402

# name -> (what the table calls it, train.py's --without). BHFM is both fusions of the text: in the image encoder and before
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
COLUMNS = ("mIoU", "oIoU", "Pr@0.5", "Pr@0.9", "bIoU")


class Runs:
    """The runs of an ablation: their command lines, and the processes that are running."""

    def __init__(self, args: argparse.Namespace, epochs: int):
        self.args, self.epochs, self.running, self.stopped = args, epochs, set(), False
        self.env = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}

    def commands(self, folder: Path, variant: str, seed: int) -> list[list]:
        """What is left to do for a run: nothing, or to train it or go on with it, then to score it."""
        if (folder / "scores.json").exists():
            return []
        if RunFolder(folder).taken():
            train = ["train.py", "--resume", folder]
        else:
            args, without = self.args, VARIANTS[variant][1]
            train = ["train.py", "--data", args.data, "--model", args.model, "--seed", seed, "--epochs", self.epochs]
            train += ["--out", folder, *(["--without", without] if without else [])]
            train += [*([] if torch.cuda.is_available() else ["--gpus", 0]), *args.train]  # one process: --jobs are beside
        score = ["evaluate.py", "--ckpt", folder / "best.pt", "--json", folder / "scores.part"]
        return [train, score]

    def do(self, variant: str, seed: int) -> str | None:
        """Train and score a run, or what is left of that -> None, or what went wrong in one sentence."""
        folder = self.args.out / f"{variant}-{seed}"
        log, part = folder.with_suffix(".log"), folder / "scores.part"
        for command in self.commands(folder, variant, seed):
            if self.stopped:
                return None
            part.unlink(missing_ok=True)  # of a scoring that was interrupted
            print(f"{folder.name}: {' '.join(map(str, command))}", flush=True)
            with open(log, "a") as f:
                # in a session of its own, so that Ctrl-C reaches it once, from here
                process = subprocess.Popen([sys.executable, ROOT / command[0], *map(str, command[1:])], env=self.env,
                                           stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT,
                                           start_new_session=True)  # fmt: skip
            self.running.add(process)
            if self.stopped:
                process.terminate()
            code = process.wait()
            self.running.discard(process)
            if code:
                said = log.read_text().strip().splitlines() or [""]
                return f"{folder.name} failed with exit code {code} ({said[-1]}): see {log}, then call this again"
        if part.exists():
            part.rename(folder / "scores.json")
        return None

    def stop(self, *_) -> None:
        """End what is running. What it saved last is gone on with when the tool is called again."""
        self.stopped = True
        for process in list(self.running):
            process.terminate()


def budget(samples: int, data: str, model: str) -> tuple[int, int]:
    """The least number of train.py's epochs with so many samples in all -> (epochs, their samples)"""
    shortest, longest = RECIPES[model].epoch_range
    targets = sum(sample.split == "train" for sample in read_samples(data)[2])
    epoch = int(max(shortest, min(longest, targets)))
    epochs = -(-samples // epoch)
    return epochs, epochs * epoch


def check_settings(out: Path, settings: dict) -> None:
    """One folder holds runs of one kind: its settings are written once and must be the same after that."""
    path = out / "ablation.json"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1))
    before = json.loads(path.read_text())
    if changed := [key for key, value in settings.items() if before.get(key) != value]:
        key = changed[0]
        raise UserError(
            f"{out} holds runs with {key} {before.get(key)!r}, this asks for {settings[key]!r}: choose another --out, "
            f"runs of unequal budgets can't be compared"
        )


def read_run(folder: Path) -> dict:
    """Of a scored run: its scores and parameters, and its curve [(training time in minutes, validation mIoU)]."""
    result = json.loads((folder / "scores.json").read_text())
    minutes, samples, curve = 0.0, 0, []
    for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()):
        minutes += (line["samples"] - samples) / line["images/s"] / 60
        samples = line["samples"]
        curve.append((minutes, line["val"]["mIoU"]))
    return {"scores": result["scores"], "parameters": result["parameters"], "split": result["split"], "curve": curve}


def mean_and_spread(values: list[float], sign: str = "") -> str:
    """'52.1 ± 1.3': mean and standard deviation of the sample; the mean alone of one value."""
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.1f}{spread}"


def markdown(results: dict[str, dict[int, dict]], settings: dict) -> str:
    """The table of {variant: {seed: run}}: mean ± standard deviation over the seeds."""
    splits = {run["split"] for runs in results.values() for run in runs.values()}
    lines = [
        f"{settings['model']} on {settings['data']}, {settings['samples']:,} samples a run, best weights scored on split "
        f"{', '.join(sorted(splits))}; mean ± standard deviation over the seeds, per cent. Last column: mIoU less that "
        f"of `{VARIANTS['whole'][0]}` with the same seed.",
        "",
        "| variant | `--without` | parameters | seeds | " + " | ".join(COLUMNS) + " | mIoU − all |",
        "|---|---|---|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    whole = results.get("whole", {})
    for name, runs in results.items():
        label, without = VARIANTS[name]
        scores = [mean_and_spread([run["scores"][c] for run in runs.values()]) for c in COLUMNS]
        paired = [runs[s]["scores"]["mIoU"] - whole[s]["scores"]["mIoU"] for s in runs if s in whole]
        less = mean_and_spread(paired, "+") if paired and name != "whole" else ""
        parameters = next(iter(runs.values()))["parameters"]
        seeds = ", ".join(map(str, sorted(runs)))
        cells = [label, without.replace(",", ", "), f"{parameters:,}", seeds, *scores, less]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(path: Path, results: dict[str, dict[int, dict]]) -> None:
    """Validation mIoU against training time: the mean over the seeds, and faintly each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    colours = pyplot.get_cmap("tab20").colors
    for (name, runs), colour in zip(results.items(), colours):
        curves = [np.array(run["curve"]) for run in runs.values() if run["curve"]]
        for curve in curves:
            axes.plot(*curve.T, color=colour, alpha=0.25, linewidth=0.8)
        if curves:
            shortest = min(map(len, curves))
            mean = np.mean([curve[:shortest] for curve in curves], axis=0)
            axes.plot(*mean.T, color=colour, label=VARIANTS[name][0], linewidth=2, marker="o", markersize=3)
    axes.set(xlabel="training time in minutes", ylabel="validation mIoU, per cent")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, integer = parser.add_argument, partial(partial, number, int)
    add(
        "--out",
        type=Path,
        default=Path("runs/ablation"),
        metavar="DIR",
        help="folder of the runs (default: runs/ablation)",
    )
    add("--data", default="scenes", help="data set of train.py, by name or path (default: scenes)")
    add("--model", choices=PRESETS, default="tiny", help="preset (default: tiny)")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME",
        help=f"of {', '.join(VARIANTS)} (default: all)")  # fmt: skip
    add("--seeds", nargs="+", type=integer(0), default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    add(
        "--samples",
        type=integer(1),
        default=20_000,
        help="budget of a run, rounded up to whole epochs (default: 20000)",
    )
    add("--jobs", type=integer(1), default=1, metavar="N", help="runs at a time, which share the cores (default: 1)")
    mine, train = sys.argv[1:], []
    if "--" in mine:
        cut = mine.index("--")
        mine, train = mine[:cut], mine[cut + 1 :]
    args = parser.parse_args(mine)
    own = ("--data", "--model", "--seed", "--epochs", "--out", "--without", "--resume")
    if taken := [flag for flag in train if flag.partition("=")[0] in own]:
        raise UserError(f"{taken[0]} after -- is set by this tool for every run: leave it out there")
    args.train = train
    return args


def main() -> None:
    args = parse_args()
    if args.data == "scenes" and not Path("data/scenes").exists():
        print("generating scenes under data/scenes (once, a minute or two)", flush=True)
        make_scenes(Path("data/scenes"))
    epochs, samples = budget(args.samples, args.data, args.model)
    settings = {"data": args.data, "model": args.model, "epochs": epochs, "samples": samples, "train": args.train,
                "version": PRESETS[args.model].version}  # of what the same weights compute  # fmt: skip
    check_settings(args.out, settings)
    runs = Runs(args, epochs)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    wanted = [(variant, seed) for seed in args.seeds for variant in args.variants]  # one seed for all, then the next
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            failures = [f for f in pool.map(lambda pair: runs.do(*pair), wanted) if f]
        finally:
            runs.stop()
            pool.shutdown(cancel_futures=True)
    results = {}
    for variant in VARIANTS:  # in the order of the table; what earlier calls have trained belongs to it, too
        for path in sorted(args.out.glob(f"{variant}-*/scores.json")):
            if (seed := path.parent.name.removeprefix(f"{variant}-")).isdecimal():  # 'sam2-*' finds 'sam2-boundary-0', too
                results.setdefault(variant, {})[int(seed)] = read_run(path.parent)
    if results:
        (args.out / "ablation.md").write_text(table := markdown(results, settings), encoding="utf-8")
        print(f"\n{table}\nwrote {args.out / 'ablation.md'}")
        try:
            plot(args.out / "ablation.png", results)
            print(f"wrote {args.out / 'ablation.png'}")
        except ImportError:
            failures.append(f"no {args.out / 'ablation.png'}: it needs `pip install matplotlib`; then call this again")
    if failures:
        sys.exit("\n".join(f"ablate.py: {failure}" for failure in failures))


if __name__ == "__main__":
    try:
        main()
    except (UserError, UserError) as error:
        print(f"ablate.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("ablate.py: stopped; call it again to go on")
