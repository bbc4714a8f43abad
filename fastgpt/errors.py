"""The one exception that speaks to the user."""


class UserError(Exception):
    """Something the user gave or has cannot be used.

    The message is one line: what was given, what is wanted, what to do. The command line prints
    it to stderr without a traceback and exits with code 2; nothing may be half-written by then.
    """


class SharedError(UserError):
    """A UserError that all ranks raise together; rank 0 prints it."""


class RankError(UserError):
    """A UserError of one rank only, which names it; every rank prints its own."""
