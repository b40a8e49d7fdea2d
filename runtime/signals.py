"""What SIGTERM and Ctrl-C do to a run."""

import contextlib
import signal
import sys


class StopSignal:
    """Within `deferred()` a signal is noted in `number`, for the loop to end by after its step; elsewhere all that is wanted
    is on disk, and it ends the program at once. It ends with exit code 143 (SIGTERM) or 130 (Ctrl-C) and prints `farewell`."""

    def __init__(self):
        self.number, self.patient, self.farewell = 0, False, ""

    def watch(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number: int, _) -> None:
        self.number = number
        if not self.patient:
            self.exit()

    def exit(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):  # torchrun hands on what a terminal has sent to all already
            signal.signal(number, signal.SIG_IGN)
        if self.farewell:
            print(f"\n{self.farewell}", flush=True)
        sys.exit(128 + self.number)

    @contextlib.contextmanager
    def deferred(self):
        self.patient = True
        try:
            yield
        except RuntimeError:  # where another process has failed, torchrun's signal and a broken collective come together
            if not self.number:
                raise
            sys.exit(128 + self.number)  # without farewell: this step is lost
        finally:
            self.patient = False
        if self.number:
            self.exit()


def ignore_signals(_worker: int) -> None:
    """For a DataLoader's workers, which the process that trains ends itself."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
