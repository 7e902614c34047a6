"""The command line: ``python -m meta_lightning fit --config maml.yaml``."""

import json
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, get_origin

import lightning as L
import yaml
from jsonargparse import ArgumentParser, set_parsing_settings
from lightning import Callback
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from meta_lightning.adaptation.command import adapt
from meta_lightning.algorithms import MetaLearner
from meta_lightning.checks import InputError
from meta_lightning.compare.command import compare
from meta_lightning.dashboard import Dashboard
from meta_lightning.data import TaskDataModule
from meta_lightning.runs.checkpoint_callback import Checkpoints
from meta_lightning.runs.checkpoint_file import LAST, PREVIOUS, read_checkpoint
from meta_lightning.runs.prediction_table import PredictionTable
from meta_lightning.runs.record import RunRecord
from meta_lightning.runs.resume import continue_logs
from meta_lightning.show import show_data

PACKAGE = Path(__file__).parent

# Warnings of libraries that say nothing to a user of this program, each with its place upstream
LIGHTNING = "https://github.com/Lightning-AI/pytorch-lightning"
IGNORED_WARNINGS = {
    r".*isinstance\(treespec, LeafSpec\).*is deprecated": f"{LIGHTNING}/issues/21326",
    # Reptile has no optimizer
    r".*configure_optimizers.*returned.*None": f"{LIGHTNING}/blob/2.6.0/src/lightning/pytorch/core/optimizer.py#L183",
    # the state after a step is what these checkpoints are meant to hold
    r"Using ModelCheckpoint with manual optimization": f"{LIGHTNING}/pull/21239",
    # the arguments are the process' own, with configurations found
    r"LightningCLI's args parameter": f"{LIGHTNING}/blob/2.6.0/src/lightning/pytorch/cli.py#L552",
    # tasks are numbered, not shuffled; overfitting takes the first ones
    r"You requested to overfit but enabled": f"{LIGHTNING}/blob/2.6.0/src/lightning/pytorch/trainer/connectors/"
    "data_connector.py#L261",
    # predictions come in the order of the tasks
    r"Couldn't infer the batch indices": f"{LIGHTNING}/blob/2.6.0/src/lightning/pytorch/loops/prediction_loop.py#L307",
}

IGNORED_WHEN_RESUMED = {
    # they are the run's own
    r"Checkpoint directory .* exists and is not empty": f"{LIGHTNING}/blob/2.6.0/src/lightning/pytorch/callbacks/"
    "model_checkpoint.py#L724",
}


# what the command line runs beside the Trainer's methods: typed functions, which return what is to be said
FUNCTIONS: dict[str, Callable[..., str]] = {"adapt": adapt, "compare": compare}


class MetaLightningCLI(LightningCLI):
    """LightningCLI for a ``MetaLearner`` and a ``TaskDataModule``.

    A configuration that is not at the path given is taken from the project's own; and a checkpoint's model and data are
    defaults, which configuration and command line override.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--checkpoint.…``, ``--dashboard.…`` and ``--print_data``."""
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_lightning_class_args(Dashboard, "dashboard")
        parser.add_argument(
            "--print_data",
            action="store_true",
            help="Print what the configuration will use, draw a task of each split into data.png, and exit.",
        )

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Let ``--help`` list what is no method of the Trainer, and is run by ``main``."""
        super()._add_subcommands(parser, **kwargs)
        listed = parser._subcommands_action
        assert listed is not None
        for name, function in FUNCTIONS.items():
            listed.add_subcommand(name, ArgumentParser(), help=(function.__doc__ or "").partition("\n")[0])

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, with configurations found and the checkpoint's hyperparameters before what the user gives."""
        arguments = sys.argv[1:] if args is None else args
        if isinstance(arguments, Sequence):
            arguments = with_checkpoint_defaults(with_last_checkpoint(with_configs([str(a) for a in arguments])))
        super().parse_arguments(parser, arguments)

    def after_instantiate_classes(self) -> None:
        """Show the data instead of running, if that was asked for."""
        if self.config_init[self.subcommand].print_data:
            self.datamodule.prepare_data()
            path = Path("data.png")
            sys.stdout.write(f"{show_data(self.datamodule, path)}\n  drawn in {path.resolve()}\n")
            sys.exit()

    def before_instantiate_classes(self) -> None:
        """Do without the origin of weights that a checkpoint brings."""
        config = self.config[self.subcommand]
        if config.ckpt_path is not None and not Path(config.get("model.init_args.init_from") or "").is_file():
            config.model.init_args.init_from = None

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Refuse a checkpoint that does not fit, before anything is written, and go on in the logs of the last one."""
        trainer = super().instantiate_trainer(**kwargs)
        path = Path(self._get(self.config, "ckpt_path") or "")
        if path.is_file():
            resume = self.subcommand == "fit"
            checkpoint = read_checkpoint(path, "--ckpt_path", resume)
            self.model.accept(checkpoint)
            if resume and path.stem.startswith((LAST, PREVIOUS)):
                ignore(IGNORED_WHEN_RESUMED)
                continue_logs(trainer.loggers, path, checkpoint)
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone.

        Lightning lets a checkpoint's hyperparameters silently override the command line
        (https://github.com/Lightning-AI/pytorch-lightning/pull/21455).
        """


def configs_dir() -> Path:
    """The project's configurations: inside an installed package, beside it in a checkout."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def find_config(path: str) -> str:
    """A configuration's path: as given, or among the project's own."""
    if Path(path).is_file():
        return path
    own = configs_dir()
    if (own / path).is_file():
        return str(own / path)
    names = ", ".join(sorted(p.relative_to(own).as_posix() for p in own.rglob("*.yaml")))
    raise InputError(f"--config {path}: no such file, and the project's own configurations are: {names}")


def with_configs(args: list[str]) -> list[str]:
    """The arguments, every ``--config`` found."""
    found = list(args)
    for i, argument in enumerate(args):
        if argument in ("-c", "--config") and i + 1 < len(args):
            found[i + 1] = find_config(args[i + 1])
        elif argument.startswith("--config="):
            found[i] = "--config=" + find_config(argument.removeprefix("--config="))
    return found


def with_last_checkpoint(args: list[str]) -> list[str]:
    """The arguments, ``--ckpt_path last`` found: the newest of those that the runs of these settings leave.

    Without any, Lightning says so and begins anew, so that one command serves the first start and every restart.
    """
    if setting(args, "ckpt_path") != "last":
        return args
    root = Path(setting(args, "trainer.logger.save_dir") or setting(args, "trainer.default_root_dir") or "")
    runs = root / (setting(args, "trainer.logger.name") or "lightning_logs")
    folder = setting(args, "checkpoint.dirpath")
    folders = [Path(folder)] if folder else [root / "checkpoints", *runs.glob("*/checkpoints")]
    found = [path for folder in folders for name in (LAST, PREVIOUS) for path in folder.glob(f"{name}*.ckpt")]
    return [*args, "--ckpt_path", str(max(found, key=lambda path: path.stat().st_mtime))] if found else args


def with_checkpoint_defaults(args: list[str]) -> list[str]:
    """The arguments, with the model and data of the checkpoint that they name before them: later ones win."""
    path = value_of(args, "--ckpt_path")
    if path is None or args[0].startswith("-") or path in ("best", "last", "hpc") or path.startswith("registry:"):
        return args
    checkpoint = read_checkpoint(path, "--ckpt_path")
    defaults = ["--weights_only=true"]
    for option, key in (("--model", "hyper_parameters"), ("--data", "datamodule_hyper_parameters")):
        hparams: dict[str, Any] = dict(checkpoint.get(key, {}))
        hparams.pop("_instantiator", None)
        if class_path := hparams.pop("_class_path", None):
            defaults.append(f"{option}={json.dumps({'class_path': class_path, 'init_args': hparams})}")
    return [args[0], *defaults, *args[1:]]


def values_of(args: list[str], *options: str) -> list[str]:
    """The values given to an option under any of its names, as ``--option value`` or ``--option=value``, in order."""
    values = []
    for argument, after in zip(args, [*args[1:], None], strict=True):
        name, equals, value = argument.partition("=")
        if name in options and (equals or after is not None):
            values.append(value if equals else str(after))
    return values


def value_of(args: list[str], option: str) -> str | None:
    """The last value given to an option."""
    return next(reversed(values_of(args, option)), None)


def with_lists(args: list[str], function: Callable[..., str]) -> list[str]:
    """The arguments, with ``--seeds 0 1 2`` as jsonargparse reads the list that the function takes: ``[0,1,2]``."""
    lists = {f"--{p.name}" for p in signature(function).parameters.values() if get_origin(p.annotation) is tuple}
    found: list[str] = []
    for argument in args:
        if len(found) > 1 and found[-2] in lists and not argument.startswith("-"):
            found[-1] = f"{found[-1].removesuffix(']')},{argument}]"
        elif found and found[-1] in lists and not argument.startswith(("-", "[")):
            found.append(f"[{argument}]")
        else:
            found.append(argument)
    return found


def run(name: str, args: list[str]) -> None:
    """Run a function of FUNCTIONS with these arguments, and say what it returns."""
    function = FUNCTIONS[name]
    args = with_lists(args, function)
    parser = ArgumentParser(prog=f"python -m meta_lightning {name}")
    if takes_config := "config" in signature(function).parameters:  # that of fit
        args = with_configs(args)
    else:
        parser.add_argument("--config", action="config", help="Path to a configuration file.")
    parser.add_function_arguments(function, skip={"overwrite"})
    parser.add_argument("--overwrite", action="store_true", help="Replace files that exist.")
    options = parser.instantiate(parser.parse_args(args)).as_dict()
    if not takes_config:
        del options["config"]
    sys.stdout.write(f"{function(**options)}\n")


def command_line(args: ArgsType = None, callbacks: Sequence[Callback] = ()) -> MetaLightningCLI:
    """Run a subcommand of the Trainer, with callbacks beside the configuration's, and return what it was run with."""
    return MetaLightningCLI(
        MetaLearner,
        TaskDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=RunRecord,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"max_epochs": -1, "callbacks": [PredictionTable(), *callbacks]},
        args=args,
    )


def setting(args: list[str], key: str) -> str | None:
    """What the arguments, or else their configurations, say of a setting; of a list, what its first has."""
    owner, _, name = key.rpartition(".")
    given = value_of(args, f"--{key}") or value_of(args, f"--{owner}.init_args.{name}")
    configs = [Path(config) for config in values_of(args, "-c", "--config")]
    for config in reversed(configs if given is None else []):
        value = yaml.safe_load(config.read_text())
        for part in key.split("."):
            value = value[0] if isinstance(value, list) and value else value
            value = {**value, **value.get("init_args", {})}.get(part) if isinstance(value, dict) else None
        if value is not None:
            return str(value)
    return given


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: The arguments, in place of those of the process.
    """
    ignore(IGNORED_WARNINGS)
    arguments = sys.argv[1:] if args is None else args
    # what documents the options of data modules takes a second to find
    given = [str(argument) for argument in arguments] if isinstance(arguments, Sequence) else []
    help_asked = any(argument == "-h" or "help" in argument for argument in given)
    set_parsing_settings(docstring_parse_attribute_docstrings=help_asked)
    try:
        if given and given[0] in FUNCTIONS:
            run(given[0], given[1:])
        else:
            command_line(args)
    except (ValueError, OSError, FloatingPointError) as error:
        # what the user gave is answered in a sentence; anything else is the program's fault and shows its traceback
        cause = users_error(error)
        if cause is None:
            raise
        sys.exit(f"error: {cause}")


def ignore(messages: Iterable[str]) -> None:
    """Keep warnings of these messages from the screen."""
    for message in messages:
        warnings.filterwarnings("ignore", message)


def users_error(error: BaseException | None) -> BaseException | None:
    """The error that a user can mend, if one is at the bottom: jsonargparse wraps those of what it instantiates."""
    while error is not None and not isinstance(error, InputError | OSError | FloatingPointError):
        error = error.__cause__
    return error
