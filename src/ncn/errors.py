"""The one exception that means "you, the user, can mend this"."""


class UserError(ValueError):
    """A mistake that its maker can mend: one line that says what is wrong, what was expected, and what to do.

    The command line prints the message without a traceback and exits with a non-zero status.
    """
