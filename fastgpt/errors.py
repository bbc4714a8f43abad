"""The one exception that speaks to the user."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user gave or has cannot be used.

    The message is one line: what was given, what is wanted, what to do. The command line prints
    it to stderr without a traceback and exits with code 2; nothing may be half-written by then.
    """


class SharedError(UserError):
    """A UserError that all ranks raise together; rank 0 prints it."""


class RankError(UserError):
    """A UserError of one rank only, which names it; every rank prints its own."""


@contextmanager
def reading(name: object, wrong: str, *others: type[Exception]) -> Iterator[None]:
    """Turn what fails while `name` is read into one line that begins with it.

    An OSError becomes "cannot be read"; content that is not as it should be, or one of `others`,
    becomes `wrong` and the error's repr, which has no line breaks.
    """
    content: tuple[type[Exception], ...] = (ValueError, LookupError, TypeError, AttributeError)
    try:
        yield
    except OSError as e:
        raise UserError(f"{name}: cannot be read: {e.strerror or e}") from e
    except content + others as e:
        raise UserError(f"{name}: {wrong} ({repr(e)[:200]})") from e
