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
        expected = f"{cls.argument} must be of the class {cls.__name__}, such as {default.__name__}()"
        if isinstance(part, Mapping):
            path, arguments = str(part["class_path"]), part.get("init_args", {})
            try:
                kind = resolve_name(path)
            except (ImportError, AttributeError, ValueError) as error:
                raise InputError(f"{cls.argument} must be given: {path} cannot be imported ({error})") from None
            # before it is called: a checkpoint may name anything
            require(isinstance(kind, type) and issubclass(kind, cls), f"{expected}, got {path}")
            try:
                return kind(**arguments)  # type: ignore[no-any-return]
            except (TypeError, InputError) as error:
                expected = f"{cls.argument} must be a {path} with arguments that it takes"
                raise InputError(f"{expected}, got {arguments}: {error}") from None
        require(isinstance(part, cls), f"{expected}, got {given!r}")
        copied: Self = copy.deepcopy(part)
        return copied
