"""Import paths of version 0.1, which work until version 0.3 with a DeprecationWarning."""

import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = __name__.partition(".")[0]
# former module -> the modules that now define its names
MOVED: dict[str, tuple[str, ...]] = {
    "adaptation.adapting": ("adaptation.adapt",),
    "adaptation.exporting": ("adaptation.export",),
    **{f"algorithms.{name}": ("algorithms.meta_learner",) for name in ("base", "learner", "outer")},
    "checkpoints": ("runs.checkpoint_callback", "runs.checkpoint_file"),
    "comparison": ("compare",),
    **{f"comparison.{name}": (f"compare.{name}",) for name in ("command", "figure", "report", "runs", "summary")},
    "compiling": ("inner.compiling",),
    "contact_sheet": ("drawing",),
    "dashboard.figures": ("dashboard.curves",),
    "data.base": ("data.module",),
    "data.images": ("data.image_module",),
    "data.show": ("show",),
    "hardware": ("checks",),
    "inner_loop": ("inner.params", "inner.loop", "inner.rules"),
    "loading": ("data.loading",),
    "losses": ("inner.task_network", "scores"),
    "machine": ("runs.machine",),
    "metrics": ("scores",),
    "outer_loop": ("outer.update",),
    "predictions": ("runs.prediction_table",),
    "resnet": ("networks.resnet12",),
    "restoring": ("train",),
    "resuming": ("runs.resume", "runs.checkpoint_file"),
    "run_record": ("runs.record",),
    "task_parallel": ("inner.kernels",),
    "tasks": ("data.tasks",),
}


class FormerModules(MetaPathFinder, Loader):
    """Import hook that builds each former module from the names of its replacements."""

    def find_spec(self, fullname: str, *rest: Any) -> ModuleSpec | None:
        """Find a former module; it is a package because it may have had submodules."""
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self, is_package=True) if package == PACKAGE and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Copy the names of the replacements into the module, and warn."""
        now = [f"{PACKAGE}.{name}" for name in MOVED[module.__name__.partition(".")[2]]]
        message = f"{module.__name__} is now {' and '.join(now)}; the former path will be removed in version 0.3"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        for name in now:
            module.__dict__.update({n: v for n, v in vars(import_module(name)).items() if not n.startswith("__")})
