"""What goes wrong by the user's input or surroundings: one sentence, one exit code, printed in one place."""

import contextlib
import sys


class UserError(Exception):
    """A sentence for the user: what was found, what was expected, what to do.

    exit_code: 2 for a mistake of the user's (a wrong flag, a broken file), 1 for a failure (a full disk, a loss of NaN).
    """

    def __init__(self, sentence: str, exit_code: int = 2):
        # A DataLoader raises a worker's error anew with the worker's traceback as its text: keep the sentence.
        super().__init__(sentence.rpartition("UserError: ")[2].strip())
        self.exit_code = exit_code


@contextlib.contextmanager
def exit_on_user_error(program: str):
    """Print a UserError as "program: sentence" on stderr and exit with its code, without a stack trace."""
    try:
        yield
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
