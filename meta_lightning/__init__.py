"""Gradient-based meta-learning on PyTorch Lightning: MAML, FOMAML and Reptile."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from meta_lightning.moved import FormerModules

if TYPE_CHECKING:
    from meta_lightning.public import *  # noqa: F403

sys.meta_path.append(FormerModules())  # finds what no other finder does

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """A public name: torch and Lightning, which take seconds to import, are imported with the first one."""
    if name.startswith("__") and name != "__all__":  # what Python and its tools look for in any module
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    public = import_module(f"{__name__}.public")
    if name in globals():  # a submodule, imported with the public names
        return globals()[name]
    if name != "__all__" and name not in public.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, getattr(public, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
