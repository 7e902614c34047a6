"""Each option is declared and documented once, and whoever mistypes one is told the nearest."""

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from jsonargparse import ArgumentParser, set_parsing_settings
from torch import nn

from meta_lightning import (
    CIFARFS,
    FOMAML,
    MAML,
    Glyphs,
    ImageFolderTasks,
    ImageTasks,
    MetaLearner,
    Omniglot,
    RegressionTasks,
    Reptile,
    Sinusoid,
    TaskDataModule,
    TensorTasks,
)
from meta_lightning.data.cache import LabelledImages
from meta_lightning.data.form import SampleForm, form_of

PACKAGE = Path(__file__).parents[1] / "meta_lightning"
SYMBOLS = {"inner_lr", "inner_steps", "outer_lr"}  # the papers', which each algorithm's own file may have


class Option(NamedTuple):
    """An option as a class declares it."""

    default: str | None
    documented: bool


class Declared(NamedTuple):
    """A class, and the options that its own lines declare."""

    bases: list[str]
    options: dict[str, Option]


def args_of(docstring: str) -> set[str]:
    """The names in a docstring's section Args."""
    section = docstring.partition("\n    Args:\n")[2].partition("\n\n")[0].splitlines()
    return {line.split(":")[0].strip() for line in section if line.startswith("        ") and line[8] != " "}


def fields_of(node: ast.ClassDef) -> Iterator[tuple[str, Option]]:
    """The fields of a dataclass, each with whether a docstring follows it."""
    for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and "ClassVar" not in ast.unparse(statement.annotation):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            default = None if statement.value is None else ast.unparse(statement.value)
            yield ast.unparse(statement.target), Option(default, documented)


def parameters_of(node: ast.ClassDef) -> Iterator[tuple[str, Option]]:
    """The parameters of a constructor, each with whether the class' docstring has it."""
    documented = args_of(ast.get_docstring(node, clean=False) or "")
    for init in node.body:
        if isinstance(init, ast.FunctionDef) and init.name == "__init__":
            named, only = init.args.args[1:], init.args.kwonlyargs
            defaults = [*[None] * (len(named) - len(init.args.defaults)), *init.args.defaults, *init.args.kw_defaults]
            for argument, default in zip([*named, *only], defaults, strict=True):
                text = None if default is None else ast.unparse(default)
                yield argument.arg, Option(text, argument.arg in documented)


def declared() -> dict[str, Declared]:
    """The learners and data modules of the package by name."""
    nodes = {
        node.name: node
        for folder in ("algorithms", "data")
        for path in sorted((PACKAGE / folder).glob("*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    bases = {name: [ast.unparse(base) for base in node.bases] for name, node in nodes.items()}

    def is_a(name: str, root: str) -> bool:
        return name == root or any(is_a(base, root) for base in bases.get(name, []))

    found = {}
    for name, node in nodes.items():
        if is_a(name, "MetaLearner"):
            found[name] = Declared(bases[name], dict(parameters_of(node)))
        elif is_a(name, "TaskDataModule"):
            found[name] = Declared(bases[name], dict(fields_of(node)))
    return found


def inherited(classes: dict[str, Declared], name: str) -> dict[str, Option]:
    """The options of a class' ancestors, of several the nearest one's."""
    options: dict[str, Option] = {}
    for base in reversed(order(classes, name)[1:]):
        options |= classes[base].options
    return options


def order(classes: dict[str, Declared], name: str) -> list[str]:
    """A class and its ancestors in the order in which Python looks them up."""
    orders = [order(classes, base) for base in classes[name].bases if base in classes]
    merged: list[str] = [name]
    while orders := [rest for rest in orders if rest]:
        ahead = next(rest[0] for rest in orders if not any(rest[0] in other[1:] for other in orders))
        merged.append(ahead)
        orders = [[other for other in rest if other != ahead] for rest in orders]
    return merged


def test_the_order_is_pythons() -> None:
    classes = declared()
    for data in (RegressionTasks, TensorTasks, ImageFolderTasks, Omniglot):
        assert order(classes, data.__name__) == [c.__name__ for c in data.__mro__ if c.__name__ in classes]


def repetitions(classes: dict[str, Declared]) -> list[str]:
    """What is declared or documented again, or not documented anywhere."""
    found = []
    places: dict[str, list[str]] = {}
    for name, (_, options) in classes.items():
        above = inherited(classes, name)
        for option, (default, documented) in options.items():
            if documented:
                places.setdefault(option, []).append(name)
            if option in SYMBOLS:
                continue
            if option not in above and not documented:
                found.append(f"{name}.{option} is not documented")
            if option in above and default == above[option].default:
                found.append(f"{name}.{option} repeats its ancestor's")
    found += [f"{option} is documented in {where}" for option, where in places.items() if len(where) > 1]
    return [repetition for repetition in found if repetition.split()[0] not in SYMBOLS]


def test_each_option_has_one_documented_declaration() -> None:
    classes = declared()
    assert {"MetaLearner", "MAML", "FOMAML", "Reptile", "TaskDataModule", "Omniglot", "MiniImagenet"} <= classes.keys()
    assert sum(len(options) for _, options in classes.values()) > 50
    assert repetitions(classes) == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("class B(TaskDataModule):\n    seed: int = 0", "B.seed repeats its ancestor's"),
        ("class B(TaskDataModule):\n    seed: int = 1\n    'Again.'", "seed is documented in ['TaskDataModule', 'B']"),
        ("class B(TaskDataModule):\n    other: int = 1", "B.other is not documented"),
    ],
)
def test_a_repetition_is_found(source: str, said: str) -> None:
    classes = declared()
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    classes["B"] = Declared(["TaskDataModule"], dict(fields_of(node)))
    assert said in repetitions(classes)


@pytest.mark.parametrize("root", [MetaLearner, TaskDataModule])
def test_the_command_line_has_a_help_text_for_every_option(root: type) -> None:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    leaves = {MetaLearner: [MAML, FOMAML, Reptile], TaskDataModule: [Glyphs, Omniglot, CIFARFS, Sinusoid, TensorTasks]}
    for leaf in leaves[root]:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(leaf, "x")
        silent = [a.dest for a in parser._actions if a.dest.startswith("x.") and not a.help]
        assert silent == [], leaf


NETWORK = nn.Linear(2, 2)
POINTS = [(torch.randn(9, 1), torch.randn(9, 1))] * 5


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (MAML, {"iner_lr": 0.1}, "MAML has no option 'iner_lr'; the nearest is 'inner_lr'"),
        (FOMAML, {"max_skiped": 1}, "FOMAML has no option 'max_skiped'; the nearest is 'max_skipped'"),
        (Reptile, {"inner_batchsize": 1}, "Reptile has no option 'inner_batchsize'; the nearest is 'inner_batch_size'"),
        (Glyphs, {"way": 5}, "Glyphs has no option 'way'; the nearest is 'ways'"),
        (Sinusoid, {"train_shot": 5}, "Sinusoid has no option 'train_shot'; the nearest is 'train_shots'"),
        (TensorTasks, {"split": {}}, "TensorTasks has no option 'split'; the nearest is 'splits'"),
        (RegressionTasks, {"shot": 1}, "RegressionTasks has no option 'shot'; the nearest is 'shots'"),
        (ImageFolderTasks, {"imagesize": 1}, "ImageFolderTasks has no option 'imagesize'; the nearest is 'image_size'"),
    ],
)
def test_a_mistyped_option_names_the_class_and_the_nearest(make: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError) as error:
        make(NETWORK, **options)
    assert str(error.value) == said


def test_an_option_that_is_near_to_none_lists_them_all() -> None:
    with pytest.raises(TypeError, match=r"Glyphs has no option 'qqq'; it has cache_dir, epoch_length, .*ways"):
        Glyphs(qqq=1)  # type: ignore[call-arg]


class Mine(ImageTasks):
    """A data set of a user's own, in the style of version 0.1."""

    cache_name = "mine"

    def __init__(self, folder: str, image_size: int = 32, channels: int = 3, **options: Any) -> None:
        super().__init__(**options)
        self.folder, self.image_size, self.channels = folder, image_size, channels  # type: ignore[misc]

    def build(self) -> LabelledImages:
        """Nothing."""
        raise NotImplementedError


def test_the_options_of_a_subclass_with_a_constructor_are_kept() -> None:
    data = Mine("here", 24, ways=3)
    assert {name: data.hparams[name] for name in ("folder", "image_size", "channels", "ways", "shots")} == {
        "folder": "here",
        "image_size": 24,
        "channels": 3,
        "ways": 3,
        "shots": 1,
    }
    assert form_of(data.hparams, Mine) == SampleForm(24, 3)
    assert pickle.loads(pickle.dumps(data)).hparams == data.hparams


def test_a_subclass_of_ones_own_takes_what_it_likes() -> None:
    class Mine(MAML):
        def __init__(self, *args: Any, **options: Any) -> None:
            self.colour = options.pop("colour")
            super().__init__(*args, **options)

    assert Mine(NETWORK, colour="red", inner_lr=0.5).inner_lr == 0.5


def test_network_and_loss_may_be_positional() -> None:
    loss = nn.MSELoss()
    assert MAML(NETWORK, loss).loss is loss
    assert Reptile(NETWORK, loss, outer_lr=0.5).outer_lr == 0.5
    with pytest.raises(TypeError, match=r"positional"):
        MAML(NETWORK, loss, 0.1)  # type: ignore[misc]
