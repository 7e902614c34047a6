"""Parts of a learner that checkpoints describe by class path and arguments."""

import copy
from collections.abc import Mapping
from inspect import signature
from pkgutil import resolve_name
from typing import Any, ClassVar, Self

from torch import nn

from meta_lightning.checks import InputError, plain, require


class Described(nn.Module):
    """A part whose constructor arguments are plain values, kept as attributes of the same name."""

    argument: ClassVar[str]  # of the learner

    def description(self) -> dict[str, Any]:
        """Class path and arguments, as in configurations and checkpoints.

        Raises:
            InputError: If an argument is not kept as an attribute of its name, or is no plain value.
        """
        arguments = {}
        for name, p in signature(type(self)).parameters.items():
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                value = getattr(self, name, self)
                arguments[name] = plain(value)
                kept = value is None or arguments[name] is not None
                require(kept, f"{self.argument} must keep its argument {name} as a plain attribute, got {value}")
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": arguments}

    @classmethod
    def of(cls, given: Self | Mapping[str, Any] | None, default: type[Self]) -> Self:
        """A copy of the given part, or the part of the given description."""
        part: Any = default() if given is None else given
        if isinstance(part, Mapping):
            try:
                part = resolve_name(part["class_path"])(**part.get("init_args", {}))
            except (ImportError, AttributeError, ValueError) as error:
                came = f"{part['class_path']} cannot be imported ({error})"
                raise InputError(f"{cls.argument} must be given: {came}") from None
        expected = f"{cls.argument} must be of the class {cls.__name__}, such as {default.__name__}()"
        require(isinstance(part, cls), f"{expected}, got {given!r}")
        copied: Self = copy.deepcopy(part)
        return copied
