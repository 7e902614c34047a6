"""Checks of what the user gives: one way to say which argument is wrong, what was expected and what came."""

import math
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase


class InputError(ValueError):
    """Something that the user gave cannot be; the message says what, what was expected and what came."""


def require(condition: bool, message: str) -> None:
    """Raise InputError with this message unless the condition holds."""
    if not condition:
        raise InputError(message)


def require_positive(**arguments: float) -> None:
    """Raise InputError, naming the argument, unless every one is a finite number greater than 0."""
    for name, value in arguments.items():
        require(value > 0 and math.isfinite(value), f"{name} must be greater than 0, got {value}")


def require_at_least(minimum: int, **arguments: int) -> None:
    """Raise InputError, naming the argument, unless every one is at least ``minimum``."""
    for name, value in arguments.items():
        require(value >= minimum, f"{name} must be at least {minimum}, got {value}")


def require_choice(choices: Iterable[str], **arguments: str) -> None:
    """Raise InputError, naming the argument, unless every one is among ``choices``."""
    names = list(choices)
    for name, value in arguments.items():
        require(value in names, f"{name} must be one of {', '.join(map(repr, names))}, got {value!r}")


def require_matches(names: Collection[str], **patterns: Sequence[str]) -> set[str]:
    """The names that an argument's glob patterns match; InputError, naming it, if a pattern matches none of them."""
    matching: set[str] = set()
    for argument, globs in patterns.items():
        for glob in globs:
            matches = {name for name in names if fnmatchcase(name, glob)}
            require(bool(matches), f"{argument} must match names among {', '.join(names)}, got {glob!r}")
            matching |= matches
    return matching
