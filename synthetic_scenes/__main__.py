"""Write generated overhead scenes with referring phrases in RRSIS-D's layout.

    python -m synthetic_scenes --out data/scenes --train 8000 --val 300 --test 300
"""

import argparse

from runtime.arguments import answer_early, at_least
from runtime.errors import exit_on_user_error
from synthetic_scenes.phrases import HELD_OUT
from synthetic_scenes.scenes import SPLITS, make_scenes


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m synthetic_scenes", description=__doc__.split("\n")[0])
    add, count = parser.add_argument, at_least(int, 0)
    add("--out", required=True, metavar="DIR", help="folder to create")
    for split, n in zip(SPLITS, (8000, 300, 300)):
        add(f"--{split}", type=count, default=n, help=f"number of {split} images (default: {n})")
    add("--size", type=count, default=128, help="width and height in pixels, 96 to 256 (default: 128)")
    add("--seed", type=count, default=0, help="the same seed, the same scenes (default: 0)")
    add("--hold-out", action="store_true", help="no training phrase says " + ", ".join(HELD_OUT))
    return parser


def main(arguments: list[str] | None = None) -> None:
    a = command_line().parse_args(arguments)
    print(make_scenes(a.out, a.train, a.val, a.test, a.size, a.seed, hold_out=a.hold_out))


if __name__ == "__main__":
    answer_early(command_line())
    with exit_on_user_error("synthetic_scenes"):
        main()
