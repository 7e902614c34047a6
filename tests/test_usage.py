"""What is there at once: the bare help, the version and the import of the package."""

import pickle
import subprocess
import sys
from inspect import getmembers, ismodule
from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningCLI

import meta_lightning
from meta_lightning import MAML, public
from meta_lightning.cli import FUNCTIONS, main
from meta_lightning.usage import SUBCOMMANDS

HEAVY = {"torch", "lightning", "jsonargparse", "numpy", "matplotlib", "PIL"}


def imported(*args: str) -> tuple[set[str], str]:
    """The top-level packages that a command of Python imports, and what it prints."""
    done = subprocess.run([sys.executable, "-X", "importtime", *args], capture_output=True, text=True, check=True)
    names = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert "argparse" in names or "meta_lightning" in names
    return {name.partition(".")[0] for name in names}, done.stdout


@pytest.mark.parametrize("args", [(), ("--help",), ("-h",), ("--version",)])
def test_the_help_and_the_version_import_nothing_heavy(args: tuple[str, ...]) -> None:
    packages, shown = imported("-m", "meta_lightning", *args)
    assert not packages & HEAVY
    assert (f"meta_lightning {meta_lightning.__version__}" if "--version" in args else "usage: python -m") in shown


def test_the_import_of_the_package_imports_nothing_heavy() -> None:
    assert not imported("-c", "import meta_lightning; meta_lightning.__version__")[0] & HEAVY
    assert imported("-c", "from meta_lightning import MAML")[0] >= {"torch", "lightning"}


def test_the_help_lists_every_subcommand() -> None:
    assert SUBCOMMANDS.keys() == {*LightningCLI.subcommands(), *FUNCTIONS}
    for name, function in FUNCTIONS.items():
        assert SUBCOMMANDS[name].split()[0] == (function.__doc__ or "").split()[0], name


def test_help_is_the_same_in_process(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for args in ([], ["--help"]):
        with pytest.raises(SystemExit) as stopped:
            main(args)
        assert not stopped.value.code
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert all(f"\n    {name} " in shown[0] for name in SUBCOMMANDS)


def test_public_names_are_there_when_used() -> None:
    assert meta_lightning.__all__ == public.__all__
    assert {*public.__all__, "__version__"} <= {*dir(meta_lightning)}
    for name in public.__all__:
        assert getattr(meta_lightning, name) is getattr(public, name)
    own = {name for name, value in getmembers(public) if not name.startswith("_") and not ismodule(value)}
    assert own == {*public.__all__}
    code = "import meta_lightning; print(meta_lightning.scores.TaskMean.__name__, len(dir(meta_lightning)) > 40)"
    assert imported("-c", code)[1] == "TaskMean True\n"
    names: dict[str, object] = {}
    exec("from meta_lightning import *", names)
    assert names["MAML"] is MAML
    assert pickle.loads(pickle.dumps(MAML)) is MAML


def test_a_name_that_is_not_there_is_an_error() -> None:
    with pytest.raises(AttributeError, match=r"meta_lightning.*MAMML"):
        meta_lightning.MAMML  # noqa: B018
    with pytest.raises(ImportError, match="MAMML"):
        exec("from meta_lightning import MAMML")
    assert not hasattr(meta_lightning, "__wrapped__")


@pytest.mark.slow
def test_type_checkers_know_the_public_names(tmp_path: Path) -> None:
    mypy = pytest.importorskip("mypy.api")
    code = "from meta_lightning import MAML, Conv4\nimport meta_lightning\n"
    code += "reveal_type(Conv4(filters=4))\nreveal_type(meta_lightning.MLP())\nMAML(Conv4())\n"
    (tmp_path / "use.py").write_text(code)
    out, _, status = mypy.run(["--strict", "--cache-dir", str(tmp_path / "cache"), str(tmp_path / "use.py")])
    assert status == 0, out
    assert "networks.conv4.Conv4" in out
    assert "networks.mlp.MLP" in out
