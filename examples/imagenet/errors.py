"""The error that ends a run with one line for the user instead of a traceback, and the names in it."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that names the file or value, what is allowed, and what to do.
    The trainer prints it and exits with status 2. Names of files may hold anything: what would break
    the line, or steer a terminal, is shown by its code.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Returns a text with codes in place of the characters that are not seen."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_utf8(name: str) -> bool:
    """Tells whether the name of a file is text, and not bytes for which Python has only stand-ins."""
    return name.isascii() or not any("\ud800" <= c <= "\udfff" for c in name)
