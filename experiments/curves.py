"""Draw how a run went: loss terms, learning rate, validation mIoU and oIoU over samples, from its log.jsonl.

    python -m experiments.curves runs/scenes-tiny-1        writes curves.png into the run's folder; needs matplotlib
"""

import argparse
import json
from pathlib import Path

from runtime.arguments import answer_early


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.curves", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run")
    return parser


if __name__ == "__main__":
    answer_early(command_line())

from losses import TERMS
from runtime.errors import UserError, exit_on_user_error
from runtime.run_folder import write_whole


def read_log(run: Path) -> list[dict]:
    """The lines of the run's epochs; UserError where there are none."""
    try:
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{run / 'log.jsonl'} can't be read ({error}): name the folder of a run of train.py") from None
    if not (epochs := [line for line in lines if "epoch" in line]):
        raise UserError(f"{run / 'log.jsonl'} has no epoch yet: wait for the first validation")
    return epochs


def curves(epochs: list[dict]) -> dict[str, dict[str, tuple[list, list]]]:
    """{title of a plot: {name of a curve: (samples, values)}}; where a name stands in no line, or in some, so it is drawn."""
    def curve(value) -> tuple[list, list]:
        points = [(line["samples"], y) for line in epochs if (y := value(line)) is not None]
        return [x for x, _ in points], [y for _, y in points]

    plots = {
        "loss and its terms": {name: curve(lambda line, name=name: line.get(name)) for name in ("loss", *TERMS)},
        "learning rate": {"of the fusion modules": curve(lambda line: line.get("lr"))},
        "validation, per cent": {name: curve(lambda line, name=name: line["val"].get(name)) for name in ("mIoU", "oIoU")},
    }
    return {title: {name: xy for name, xy in lines.items() if xy[0]} for title, lines in plots.items()}


def draw(path: Path, plots: dict[str, dict[str, tuple[list, list]]]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the curves are drawn by matplotlib, which is missing: pip install matplotlib") from None
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(plots)), plots.items()):
        for name, (samples, values) in lines.items():
            axes.plot(samples, values, label=name, marker="o", markersize=3)
        axes.set(title=title, xlabel="samples")
        axes.grid(alpha=0.3)
        if lines:
            axes.legend(fontsize=8)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=150))


def main(arguments: list[str] | None = None) -> None:
    run = command_line().parse_args(arguments).run
    draw(run / "curves.png", curves(read_log(run)))
    print(f"wrote {run / 'curves.png'}")


if __name__ == "__main__":
    with exit_on_user_error("curves"):
        main()
