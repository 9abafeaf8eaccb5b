"""Exceptions that become one line for the user, and how they do."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_CODE = 2
EXIT_INTERRUPTED = 130  # a shell's code for a program that Ctrl-C ended


class UserError(Exception):
    """A mistake of the user or a failure of the system: one line that says what, where, and how to fix it."""


class BusyError(UserError):
    """Something else is using it; trying again later may work."""


class AgreedError(UserError):
    """A mistake that all ranks have agreed on and raise alike; rank 0 prints it."""


class OwnError(UserError):
    """A mistake that only this process has met, in its share of the work; it prints it itself."""


@contextmanager
def met_by_all() -> Iterator[None]:
    """Of a block that all ranks do alike: a mistake in it is one that all of them meet."""
    try:
        yield
    except UserError as error:
        raise AgreedError(*error.args) from error


def one_line(said: object, most: int | None = 200) -> str:
    """A text, or what an exception says, as one line of at most so many characters."""
    return " ".join(str(said).split())[:most]


def exit_on_user_error(main: Callable[[], int]) -> int:
    """Run ``main``; a :class:`UserError` becomes one line on stderr and exit code 2, Ctrl-C one and 130."""
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_CODE
    except KeyboardInterrupt:
        return interrupted()


def interrupted() -> int:
    """Say in one line that Ctrl-C ended the program, and return the exit code; another one ends it at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    say_ended("SIGINT")
    return EXIT_INTERRUPTED


def say_ended(by: str) -> None:
    """Print a line on stderr: the work ended before it was done, by a signal."""
    print(f"ended by {by}; the same command resumes from what is complete", file=sys.stderr, flush=True)
