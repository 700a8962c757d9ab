"""The error that ends a run with one line for the user instead of a traceback."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that names the file or value, what is allowed, and what to do.
    The trainer prints it and exits with status 2.
    """
