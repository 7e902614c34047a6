"""Checks of arguments, with messages that name the argument, the expected and the given value."""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib.util import find_spec
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Self

import numpy as np
from lightning import Callback
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    GradientAccumulationScheduler,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch.nn import Module

PRECISIONS = ("32-true", "bf16-mixed", "64-true")
# options of the Trainer that need automatic optimization, their defaults, and what to use instead
AUTOMATIC = {
    "accumulate_grad_batches": (1, "data.meta_batch_size, of which model.tasks_per_pass are computed at once"),
    "gradient_clip_val": (None, "gradient_clip_val of MAML and FOMAML"),
    "gradient_clip_algorithm": (None, "gradient_clip_algorithm of MAML and FOMAML"),
}
UNSUPPORTED: dict[type[Callback], str] = {
    StochasticWeightAveraging: "ends with an epoch of automatic optimization; use WeightAveraging or "
    "EMAWeightAveraging, and scheduler for swa_lrs",
    GradientAccumulationScheduler: "needs automatic optimization; use data.meta_batch_size and model.tasks_per_pass",
    ModelPruning: "replaces parameters of θ by masked ones; use outer_freeze, or prune the network of an adapted "
    "Predictor",
}


class InputError(ValueError):
    """An invalid argument or input; the message names it, what was expected and what came."""


class MissingPackageError(InputError, ImportError):
    """An optional package that is not installed; the message names the extra that installs it."""


@contextmanager
def optional(user: str, extra: str) -> Iterator[None]:
    """Import optional packages of an extra; MissingPackageError says that ``user`` needs one that is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise MissingPackageError(f"{user} needs {package}: pip install 'meta-lightning[{extra}]'") from error


def require_installed(user: str, extra: str, *packages: str) -> None:
    """Raise MissingPackageError unless optional packages of an extra can be imported; they are not imported yet."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise MissingPackageError(f"{user} needs {', '.join(missing)}: pip install 'meta-lightning[{extra}]'")


def require(condition: bool, message: str) -> None:
    """Raise InputError with this message unless the condition holds."""
    if not condition:
        raise InputError(message)


def require_positive(**arguments: float) -> None:
    """Raise InputError unless every argument is finite and greater than 0."""
    for name, value in arguments.items():
        require(value > 0 and math.isfinite(value), f"{name} must be greater than 0, got {value}")


def require_at_least(minimum: int, **arguments: int) -> None:
    """Raise InputError unless every argument is at least ``minimum``."""
    for name, value in arguments.items():
        require(value >= minimum, f"{name} must be at least {minimum}, got {value}")


def require_choice(choices: Iterable[str], **arguments: str) -> None:
    """Raise InputError unless every argument is one of ``choices``."""
    names = list(choices)
    for name, value in arguments.items():
        require(value in names, f"{name} must be one of {', '.join(map(repr, names))}, got {value!r}")


def require_matches(names: Collection[str], **patterns: Sequence[str]) -> set[str]:
    """The names that match the glob patterns of the arguments; InputError for a pattern without a match."""
    matching: set[str] = set()
    for argument, globs in patterns.items():
        for glob in globs:
            matches = {name for name in names if fnmatchcase(name, glob)}
            require(bool(matches), f"{argument} must match names among {', '.join(names)}, got {glob!r}")
            matching |= matches
    return matching


def require_not_compiled(**arguments: Any) -> None:
    """Raise InputError for modules and functions that torch.compile has made, which have no second derivative."""
    for name, value in arguments.items():
        parts = value.named_modules() if isinstance(value, Module) else [("", value)]
        # torch has no public way to tell
        marks = ("_orig_mod", "_compiled_call_impl", "_torchdynamo_orig_callable")
        compiled = [f"{name}.{part}".strip(".") for part, of in parts if any(getattr(of, m, None) for m in marks)]
        came = f"got {', '.join(compiled)}; compile_passes=True compiles whole passes, with their derivatives"
        require(not compiled, f"{name} must not come from torch.compile, {came}")


def require_supported(precision: str, strategy: Strategy) -> None:
    """Raise InputError for precisions in which inner steps are lost, and strategies that shard the network."""
    unscaled = "the gradient scaler does not cover the inner loop, whose gradients underflow"
    reason = unscaled if precision == "16-mixed" else "θ would be rounded to 8 or 11 bits, and inner steps vanish"
    allowed = f"trainer.precision must be one of {', '.join(PRECISIONS)}"
    require(precision in PRECISIONS, f"{allowed}, got {precision}: {reason}")
    require(
        not isinstance(strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy),
        "trainer.strategy must keep the whole network in every process, as ddp does, got "
        f"{type(strategy).__name__}: it shards θ, which the inner loop copies for every task",
    )


def require_own_options(trainer: Any, learner: Any) -> None:
    """Raise InputError for options and callbacks of a Trainer that expect automatic optimization."""
    for name, (default, instead) in AUTOMATIC.items():
        came = getattr(trainer, name)
        require(came in (default, None), f"trainer.{name} must be {default}, got {came}: use {instead}")
    synced = vars(trainer.strategy).get("_layer_sync") is not None  # there is no public name
    require(not synced, "trainer.sync_batchnorm must be False, got True: it mixes the statistics of tasks")
    for callback in trainer.callbacks:
        for kind, reason in learner.unsupported.items():
            name = type(callback).__name__
            require(not isinstance(callback, kind), f"trainer.callbacks must not hold {name}, which {reason}")
        alone = isinstance(callback, BackboneFinetuning) and not hasattr(learner, "backbone")
        require(not alone, "BackboneFinetuning needs the attribute backbone, got none: subclass BaseFinetuning instead")


def from_command_line() -> bool:
    """Whether Lightning's command line is constructing the object; it then passes the hyperparameters itself."""
    return _given_hyperparameters.get() is not None


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of these names that this one may have been meant to be, if any is near."""
    return next(iter(get_close_matches(name, sorted({*names}), n=1)), None)


class NamedOptions:
    """Mixin whose constructor rejects unknown options and suggests the nearest name."""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Raise TypeError for options that no constructor of the class takes."""
        constructors = [base for base in cls.__mro__ if issubclass(base, NamedOptions) and "__init__" in base.__dict__]
        parameters = [(base, p) for base in constructors for p in signature(base.__init__).parameters.values()]
        named = {p.name for _, p in parameters if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)}
        # a user-defined subclass may take any keyword
        open_to_any = {base.__module__.partition(".")[0] for base, p in parameters if p.kind is Parameter.VAR_KEYWORD}
        for name in options.keys() - named if open_to_any <= {__name__.partition(".")[0]} else ():
            known, near = sorted(named - {"self"}), nearest(name, named - {"self"})
            hint = f"it has {', '.join(known)}" if near is None else f"the nearest is {near!r}"
            raise TypeError(f"{cls.__name__} has no option {name!r}; {hint}")
        return super().__new__(cls)


def plain(value: Any) -> Any:
    """Convert an argument to types that ``weights_only`` loading permits; None for other objects."""
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
