"""Exceptions that become one line for the user, and how they do."""

import sys
from collections.abc import Callable

EXIT_CODE = 2


class UserError(Exception):
    """A mistake of the user or a failure of the system: one line that says what, where, and how to fix it."""


class BusyError(UserError):
    """Something else is using it; trying again later may work."""


class AgreedError(UserError):
    """A mistake that all ranks have agreed on and raise alike; rank 0 prints it."""


class OwnError(UserError):
    """A mistake that only this process has met, in its share of the work; it prints it itself."""


def one_line(error: BaseException, most: int = 200) -> str:
    """What an exception says, as one line of at most so many characters."""
    return " ".join(str(error).split())[:most]


def exit_on_user_error(main: Callable[[], int]) -> int:
    """Run ``main``; a :class:`UserError` becomes one line on stderr and exit code 2."""
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_CODE
