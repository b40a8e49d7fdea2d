"""Command lines: numbers in them, and what is answered before a program loads its libraries."""

import argparse
import math
import sys

from runtime.errors import UserError

DTYPES = ("auto", "float32", "bfloat16")  # of --dtype: what is computed in


def answer_early(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> None:
    """Answer --help and mistyped flags; from here on Ctrl-C prints one line and exits with code 130.

    A program calls it before its other imports, which take seconds, and parses again later. arguments: by default sys.argv's.
    """

    def say(kind, error, trace) -> None:
        if kind is not KeyboardInterrupt:
            return sys.__excepthook__(kind, error, trace)
        print(f"\n{parser.prog}: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)

    sys.excepthook = say
    parser.parse_args(arguments)


def parse_again(
    parser: argparse.ArgumentParser, arguments: list[str] | None, before: dict, free: set[str], flag: str
) -> argparse.Namespace:
    """The command line with the values of an earlier one, `before`, for defaults; UserError where it changes one that is not
    free. flag: what asks for it."""
    parser.set_defaults(**before)
    earlier, now = parser.parse_args([]), parser.parse_args(arguments)
    if fixed := [k for k, v in vars(now).items() if k not in free and v != getattr(earlier, k)]:
        raise UserError(f"--{fixed[0].replace('_', '-')} can't be changed by {flag}: leave it out, or start a new run")
    return now


def at_least(kind: type, least: float):
    """A `type=` of argparse: an int or float of at least `least`; a sentence for anything else."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not value >= least:
            what = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} of {least} or more")
        return value

    return parse


def band_numbers(text: str) -> tuple[int, ...]:
    """A `type=` of argparse: one band number or three."""
    numbers = text.split(",")
    if len(numbers) not in (1, 3) or not all(n.strip().isdecimal() and int(n) for n in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not one band number or three, as 4,3,2")
    return tuple(map(int, numbers))


def share(text: str) -> float:
    """A `type=` of argparse: a number between 0 and 1, neither of which it is."""
    value = at_least(float, 0)(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value
