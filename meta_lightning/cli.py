"""The command line: ``python -m meta_lightning fit --config maml.yaml``."""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import import_module
from inspect import signature
from pathlib import Path
from traceback import walk_tb
from typing import Any, get_args, get_origin

import lightning as L
from docstring_parser import parse
from jsonargparse import set_parsing_settings
from lightning import Callback
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from meta_lightning.adaptation.command import adapt, export
from meta_lightning.algorithms import MetaLearner
from meta_lightning.checks import InputError, optional, require, require_at_least
from meta_lightning.compare.command import compare
from meta_lightning.dashboard import Dashboard
from meta_lightning.data import TaskDataModule
from meta_lightning.hub import PREFIX, hub, located
from meta_lightning.networks.backbone import without_weights
from meta_lightning.parser import PACKAGE, Parser, find_config
from meta_lightning.quiet import WHEN_RESUMED, ignore, silence
from meta_lightning.runs.checkpoint_callback import Checkpoints
from meta_lightning.runs.checkpoint_file import LAST, PREVIOUS, read_checkpoint
from meta_lightning.runs.ensemble import best_members
from meta_lightning.runs.experiment import differences, newest_checkpoint, with_hyperparameters
from meta_lightning.runs.folders import lock, release
from meta_lightning.runs.machine import keep_freed_memory
from meta_lightning.runs.prediction_table import PredictionTable
from meta_lightning.runs.record import RunRecord
from meta_lightning.runs.resume import claim_log_folders, continue_logs
from meta_lightning.show import show_data
from meta_lightning.usage import PROGRAM, answer

# loggers and the packages that they need, which are extras of the same names
LOGGERS = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow"}

# Subcommands that are no methods of the Trainer: typed functions, which return the text to print
FUNCTIONS: dict[str, Callable[..., str]] = {"adapt": adapt, "compare": compare, "export": export, "hub": hub}


class MetaLightningCLI(LightningCLI):
    """LightningCLI in which a checkpoint's hyperparameters are defaults that configuration and arguments override."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--checkpoint.…``, ``--dashboard.…``, ``--ensemble`` and ``--print_data``."""
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_lightning_class_args(Dashboard, "dashboard")
        parser.add_argument(
            "--ensemble",
            type=int,
            default=0,
            help="In test, validate and predict: average the class probabilities (for regression: the predictions) of "
            "this many best checkpoints of the run of --ckpt_path; 0 takes that checkpoint alone.",
        )
        parser.add_argument(
            "--print_data",
            action="store_true",
            help="Print what the configuration will use, draw a task of each split into data.png, and exit.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, with the checkpoint's hyperparameters before the user's arguments: later ones win."""
        given = sys.argv[1:] if args is None else args
        if not isinstance(given, Sequence):  # a dict, complete in itself
            super().parse_arguments(parser, given)
            return
        given = [str(argument) for argument in given]
        # hyperparameters come first, so this one option has to be known before the others are parsed
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        early.add_argument("--ckpt_path", default="")
        path = early.parse_known_args(given)[0].ckpt_path
        super().parse_arguments(parser, with_hyperparameters(given, path))
        config = self.config[self.config.subcommand]
        if config.trainer.fast_dev_run and self.config.subcommand == "fit":
            config.ckpt_path = None  # a trial begins anew
        last = config.ckpt_path == "last"
        found = newest_checkpoint(config, self.config.subcommand) if last else config.ckpt_path
        if found and str(found) != path:  # it was named ``last`` or by a configuration file
            super().parse_arguments(parser, with_hyperparameters([*given, f"--ckpt_path={found}"], str(found)))
        elif last:
            config.ckpt_path = None
        if found and last:
            changed = differences(read_checkpoint(found, "--ckpt_path"), self.config[self.config.subcommand])
            rank_zero_info(f"Using {found}, the last checkpoint{', with ' if changed else ''}{', '.join(changed)}")

    def after_instantiate_classes(self) -> None:
        """Show the data instead of running, if that was asked for."""
        if self.config_init[self.subcommand].print_data:
            self.datamodule.prepare_data()
            path = Path("data.png")
            sys.stdout.write(f"{show_data(self.datamodule, path)}\n  drawn in {path.resolve()}\n")
            sys.exit()

    def before_instantiate_classes(self) -> None:
        """Refuse a Trainer without checkpoints or a missing logger; ignore a gone ``init_from`` that is not needed."""
        config = self.config[self.subcommand]
        for name, refused in (("barebones", True), ("enable_checkpointing", False)):
            must = f"trainer.{name} must be {str(not refused).lower()} on the command line, whose runs keep checkpoints"
            require(config.trainer[name] is not refused, f"{must}, got {str(refused).lower()}")
        loggers = config.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            name = getattr(logger, "class_path", "").rpartition(".")[2]
            if package := LOGGERS.get(name):
                with optional(f"trainer.logger {name}", package):
                    import_module(package)
        weights = config.get("model.init_args.init_from") or ""
        there = weights.startswith(PREFIX) or Path(weights).expanduser().is_file()
        if located(config.ckpt_path or "", "--ckpt_path").is_file() and not there:
            config.model.init_args.init_from = None

    def before_test(self) -> None:
        """Claim the log folders."""
        claim_log_folders(self.trainer.loggers)

    before_validate = before_predict = before_test

    def before_fit(self) -> None:
        """Claim the log folders, and keep freed memory for the next step: here, since it concerns the whole process."""
        self.before_test()
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()

    def instantiate_classes(self) -> None:
        """Instantiate them, a backbone without its weights if those of a checkpoint follow."""
        restored = located(self.config[self.subcommand].get("ckpt_path") or "", "--ckpt_path").is_file()
        with without_weights() if restored else nullcontext():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Refuse a checkpoint that does not fit before anything is written, and append to the logs of its run."""
        trainer = super().instantiate_trainer(**kwargs)
        given = self.config[self.subcommand].ckpt_path or ""  # which the record of the run keeps
        path, ensemble = located(given, "--ckpt_path"), self.config[self.subcommand].ensemble
        require_at_least(0, ensemble=ensemble)
        usable = path.is_file() and self.subcommand != "fit"
        expected = "ensemble needs a --ckpt_path, in test, validate or predict"
        require(not ensemble or usable, f"{expected}, got {given or 'none'} in {self.subcommand}")
        if path.is_file():
            resume = self.subcommand == "fit"
            checkpoint = read_checkpoint(given, "--ckpt_path", resume)
            self.config_init[self.subcommand].ckpt_path = str(path)
            self.model.accept(checkpoint)
            if ensemble:
                self.model.members = best_members(path, ensemble, self.model.accept)
            if resume and path.stem.startswith((LAST, PREVIOUS)):
                ignore(WHEN_RESUMED)
                held = lock(path.parent)  # before the logs of a run that still runs are cut
                continue_logs(trainer.loggers, path, checkpoint)
                release(held)
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let the checkpoint's hyperparameters override the command line (its #21455)."""


def run(name: str, args: list[str]) -> None:
    """Run a function of FUNCTIONS with these arguments, and print what it returns."""
    function = FUNCTIONS[name]
    docs = parse(function.__doc__ or "")
    parser = Parser(prog=f"{PROGRAM} {name}", description=docs.short_description)
    parameters = signature(function).parameters
    if "config" not in parameters:
        parser.add_argument("--config", action="config", help="Path to a configuration file.")
    help_texts = {p.arg_name: p.description for p in docs.params}
    lists = {p.name: p for p in parameters.values() if get_origin(p.annotation) is tuple}
    flags = [name for name, p in parameters.items() if p.annotation is bool]
    parser.add_function_arguments(function, skip={*flags, *lists})
    for p in lists.values():  # as --seeds 0 1 2, for which jsonargparse wants [0,1,2]
        element = get_args(p.annotation)[0]
        parser.add_argument(f"--{p.name}", nargs="+", type=element, default=list(p.default), help=help_texts[p.name])
    for flag in flags:
        parser.add_argument(f"--{flag}", action="store_true", help=help_texts[flag])
    options = parser.instantiate(parser.parse_args(args)).as_dict()
    if "config" in parameters:
        options["config"] = find_config(options["config"])
    else:
        del options["config"]
    options |= {name: tuple(options[name]) for name in lists}
    sys.stdout.write(f"{function(**options)}\n")


def command_line(args: ArgsType = None, callbacks: Sequence[Callback] = ()) -> MetaLightningCLI:
    """Run a subcommand of the Trainer, with more callbacks than the configuration's; return what it was run with."""
    return MetaLightningCLI(
        MetaLearner,
        TaskDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=RunRecord,
        save_config_kwargs={"overwrite": True, "save_to_log_dir": False},  # of loggers of files alone
        trainer_defaults={"max_epochs": -1, "callbacks": [PredictionTable(), *callbacks]},
        parser_class=Parser,
        parser_kwargs={"prog": PROGRAM},
        args=args,
    )


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: The arguments, in place of those of the process.
    """
    silence()
    arguments = sys.argv[1:] if args is None else args
    given = [str(argument) for argument in arguments] if isinstance(arguments, Sequence) else []
    if isinstance(arguments, Sequence):
        answer(given)
    # finding the docstrings of the data modules' fields takes a second, so only for help
    help_asked = any(argument == "-h" or "help" in argument for argument in given)
    set_parsing_settings(docstring_parse_attribute_docstrings=help_asked)
    try:
        if given and given[0] in FUNCTIONS:
            run(given[0], given[1:])
        else:
            command_line(args)
    except (ValueError, OSError, FloatingPointError) as error:
        # a user's mistake is answered in a sentence; anything else shows its traceback
        cause = users_error(error)
        if cause is None:
            raise
        sys.exit(f"error: {cause}")


def users_error(error: BaseException | None) -> BaseException | None:
    """The user's error among the causes, if any: jsonargparse wraps errors of what it instantiates."""
    while error is not None and not (isinstance(error, InputError | FloatingPointError) or of_users_files(error)):
        error = error.__cause__
    return error


def of_users_files(error: BaseException) -> bool:
    """Whether an error of the system is raised by this package, or about a disk or a file that is not installed."""
    if not isinstance(error, OSError):
        return False
    if error.errno is None:
        *_, (frame, _) = walk_tb(error.__traceback__)
        return Path(frame.f_code.co_filename).is_relative_to(PACKAGE)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return True
    installed = {sys.prefix, sys.base_prefix, str(PACKAGE)}
    name = error.filename
    return isinstance(name, str | os.PathLike) and not any(Path(name).is_relative_to(folder) for folder in installed)
