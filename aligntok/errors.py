"""What we say where the user is mistaken."""

import math


class UserError(ValueError):
    """A mistake in what the user gave us: the message says what, where and the remedy, in a line or two.

    The command line prints the message without a traceback and exits with code 2.
    """


def check_positive(**sizes: int | None) -> None:
    """Raise a ``UserError`` that names the first size below 1; None stands for a size that was left out.

    >>> check_positive(width=64, depth=2, hidden=None)
    >>> check_positive(width=64, depth=0)
    Traceback (most recent call last):
    aligntok.errors.UserError: depth=0: give at least 1
    """
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise UserError(f"{name}={size}: give at least 1")


def check_nonnegative(**numbers: float | None) -> None:
    """Raise a ``UserError`` that names the first number that is negative, infinite or not a number.

    >>> check_nonnegative(weight=0.5, rate=None)
    >>> check_nonnegative(weight=-0.5)
    Traceback (most recent call last):
    aligntok.errors.UserError: weight=-0.5: give a finite number of at least 0
    """
    for name, number in numbers.items():
        if number is not None and not 0 <= number < math.inf:
            raise UserError(f"{name}={number}: give a finite number of at least 0")


def check(condition: bool, message: str) -> None:
    """Raise a ``UserError`` with this message unless the condition holds.

    >>> check(4 % 3 == 0, "width=4 is not divisible by num_heads=3")
    Traceback (most recent call last):
    aligntok.errors.UserError: width=4 is not divisible by num_heads=3
    """
    if not condition:
        raise UserError(message)


def shortened(text: str, length: int) -> str:
    """Return a text without its middle where it is longer.

    >>> shortened("one two three four", 11)
    'one ...four'
    """
    return text if len(text) <= length else f"{text[: (length - 3) // 2]}...{text[len(text) - (length - 3) // 2 :]}"


def words_of(error: BaseException, length: int = 200) -> str:
    """Return what an error of another library says, in a line; its name where it says nothing.

    >>> words_of(KeyError())
    'KeyError'
    """
    return shortened(" ".join(str(error).split()) or type(error).__name__, length)
