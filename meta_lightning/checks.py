"""Checks of what the user gives: one way to say which argument is wrong, what was expected and what came."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Self

import numpy as np
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

PRECISIONS = ("32-true", "bf16-mixed", "64-true")


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


def require_precision(precision: str) -> None:
    """Refuse precisions that lose the steps of the inner loop."""
    reason = (
        "its scaler covers the outer loss only, and gradients of the inner loop underflow"
        if precision == "16-mixed"
        else "θ itself would be held in it, and rounded to 8 or 11 bits the inner steps vanish"
    )
    require(
        precision in PRECISIONS,
        f"trainer.precision must be one of {', '.join(PRECISIONS)}, got {precision}: {reason}",
    )


def require_whole_network(strategy: Strategy) -> None:
    """Refuse strategies that shard the network."""
    require(
        not isinstance(strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy),
        "trainer.strategy must leave the whole network to every process, as ddp does, got "
        f"{type(strategy).__name__}: it shards θ, of whose whole parameters the inner loop makes a copy for every task",
    )


def from_command_line() -> bool:
    """Whether Lightning's command line is constructing the object; it then passes the hyperparameters itself."""
    return _given_hyperparameters.get() is not None


class NamedOptions:
    """A class whose constructor names the class and the nearest option where it is given one that it has not."""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Refuse options that no constructor of the class takes."""
        constructors = [base for base in cls.__mro__ if issubclass(base, NamedOptions) and "__init__" in base.__dict__]
        parameters = [(base, p) for base in constructors for p in signature(base.__init__).parameters.values()]
        named = {p.name for _, p in parameters if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)}
        # a subclass of one's own that takes any keyword knows what to do with it
        open_to_any = {base.__module__.partition(".")[0] for base, p in parameters if p.kind is Parameter.VAR_KEYWORD}
        for name in options.keys() - named if open_to_any <= {__name__.partition(".")[0]} else ():
            near = [f"the nearest is {nearest!r}" for nearest in get_close_matches(name, named - {"self"}, n=1)]
            known = ", ".join(sorted(named - {"self"}))
            raise TypeError(f"{cls.__name__} has no option {name!r}; {near[0] if near else f'it has {known}'}")
        return super().__new__(cls)


def plain(value: Any) -> Any:
    """An argument as a checkpoint that is loaded with weights_only can hold it; None in place of other objects."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    return value if isinstance(value, bool | int | float | str) else None
