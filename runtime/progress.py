"""How far a program has come."""

import sys
import time

from tqdm import tqdm

EVERY = 60  # seconds between two lines


class Progress(tqdm):
    """tqdm's bar where stderr is a terminal; elsewhere, as in a log, a line a minute. Arguments are tqdm's."""

    def __init__(self, *args, **options):
        self.lines, self.told = not sys.stderr.isatty(), time.monotonic()
        if self.lines:
            form = "{desc}: {n_fmt} of {total_fmt} in {elapsed}, {remaining} left, {rate_fmt}{postfix}"
            options |= {"leave": False, "bar_format": form}
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if not self.lines:
            return super().display(msg, pos)
        if msg is None and time.monotonic() - self.told >= EVERY:
            self.told = time.monotonic()
            print(self, file=self.fp, flush=True)
        return False

    def clear(self, nolock: bool = False) -> None:
        if not self.lines:
            super().clear(nolock)
