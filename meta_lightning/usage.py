"""The help of the command line as a whole, which needs neither torch nor Lightning and so is there at once."""

import argparse
from collections.abc import Sequence

import meta_lightning

PROGRAM = "python -m meta_lightning"
SUBCOMMANDS = {
    "fit": "Meta-train: --config maml.yaml, another of the project's configurations, or your own.",
    "validate": "Evaluate a checkpoint, --ckpt_path, on the validation tasks.",
    "test": "Evaluate a checkpoint on the test tasks.",
    "predict": "Write a table of a checkpoint's predictions for the test tasks.",
    "adapt": "Adapt a checkpoint to a few pictures per class or rows of a table, and answer for others.",
    "export": "Export the adaptation of a checkpoint as a program that runs without this package.",
    "compare": "Train and test several algorithms on the same tasks; write a table, a figure and a report page.",
    "hub": "List the checkpoints that come with the package, or show what one was trained for.",
}


def answer(arguments: Sequence[str]) -> None:
    """Print the help or the version, and exit, if that is all that is asked for."""
    if arguments and arguments[0] not in ("-h", "--help", "--version"):
        return
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage="%(prog)s SUBCOMMAND [options]",
        description="Gradient-based meta-learning on PyTorch Lightning: MAML, FOMAML and Reptile.",
        epilog="Each subcommand has a --help; fit --model.help MAML describes the options of an algorithm, "
        "fit --data.help Glyphs those of a data set.",
    )
    parser.add_argument("--version", action="version", version=f"meta_lightning {meta_lightning.__version__}")
    subcommands = parser.add_subparsers(title="subcommands", metavar="SUBCOMMAND")
    for name, does in SUBCOMMANDS.items():
        subcommands.add_parser(name, help=does)
    parser.parse_args([*arguments[:1]] or ["--help"])
