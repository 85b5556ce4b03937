"""Values of a file in a message: short, whatever somebody has put there."""

import reprlib

MOST = 200  # characters; the longest name of a tensor in the public files has 130

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = MOST


def brief(value: object) -> str:
    """Return what `repr` does, with dots in place of what is too much for a line."""
    return _short.repr(value)
