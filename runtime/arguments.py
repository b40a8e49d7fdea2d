"""Numbers of a command line."""

import argparse
import math


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
