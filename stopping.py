"""How a program ends before its end: by a signal, or by an error that is the user's to mend."""

import contextlib
import os
import signal
import sys


class Stopped(BaseException):
    """SIGTERM or Ctrl-C has ended the program; `code` is the exit code of that: 143 or 130."""

    def __init__(self, number: int):
        self.code = 128 + number


class Signals:
    """What SIGTERM and Ctrl-C do. Where `patient` is not set they raise Stopped on the spot, for all that is wanted is on
    disk. Where it is, the first is noted in `asked`, its number, for the loop to end by, and the second ends at once."""

    def __init__(self):
        self.asked, self.patient = 0, False

    def watch(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def impatient(self) -> None:
        """From here on a signal ends the program on the spot, and one that was noted does so now."""
        self.patient = False
        if self.asked:
            raise Stopped(self.asked)

    def note(self, number: int, _) -> None:
        if self.asked:  # it is ending already
            if "WORLD_SIZE" not in os.environ:  # the launcher hands on what has reached all already: no second wish
                os._exit(128 + number)
            return
        self.asked = number
        if not self.patient:
            raise Stopped(number)


def leave_signals(_worker: int) -> None:
    """For a DataLoader's workers: what a terminal or a scheduler sends to all processes is the business of the one that
    trains, which ends its workers itself."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def leave(code) -> None:
    """End the program with SystemExit's code. One of several processes ends without the interpreter's farewell, during which
    the threads of its process group, which has not been taken down, may abort it."""
    if "WORLD_SIZE" in os.environ:
        code = code if isinstance(code, int) else int(code is not None)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@contextlib.contextmanager
def one_sentence(program: str, mistakes: tuple, failures: tuple = ()):
    """End the program without a stack trace: with exit code 2 by a mistake of the user's, 1 by a failure, whose messages
    are sentences, and 143 or 130 by a signal."""
    try:
        yield
    except (*mistakes, *failures) as error:
        print(f"{program}: {error}", file=sys.stderr)
        leave(2 if isinstance(error, mistakes) else 1)
    except Stopped as stop:
        leave(stop.code)
