"""Runs of ``fit`` and ``test``, each in a process of its own, that are done once and go on where they stopped."""

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from meta_lightning.checks import InputError, require
from meta_lightning.files import write_json

LOGGER = "lightning.pytorch.loggers.TensorBoardLogger"
LAST = Path("checkpoints", "last.ckpt")


class Run(NamedTuple):
    """A training and the tests of where it ended; without a training, tests of a random initialisation."""

    name: str
    fit: list[str] | None
    tests: dict[str, list[str]]  # by name


def complete(run: Run, out: Path, overwrite: bool = False) -> dict[str, Any]:
    """The result of a run, from what there is of it and what remains to be done."""
    result, folder = out / "results" / f"{run.name}.json", out / "runs" / run.name
    commands = commands_of(run, folder)
    settings = {"commands": commands, "configs": checksums(commands)}
    begun = folder / "commands.json"
    for path in (result, begun):
        before = read(path)
        if before is not None and any(before[key] != value for key, value in settings.items()):
            require(
                overwrite,
                f"out must be a new folder, or overwrite be set: {path} is of other settings, "
                f"{differing(before['commands'], commands)}",
            )
            shutil.rmtree(folder, ignore_errors=True)
            path.unlink(missing_ok=True)
    if (finished := read(result)) is not None:
        return finished
    write_json(begun, settings)
    records = {name: record_of(command, folder / name / "version_0") for name, command in commands.items()}
    done = {"name": run.name, **settings, "fit": records.pop("fit", None), "tests": records}
    write_json(result, done)
    return done


def commands_of(run: Run, folder: Path) -> dict[str, list[str]]:
    """The command lines of a run by the name of what they leave, after ``python -m meta_lightning``."""

    def logging(name: str) -> list[str]:
        places = {"save_dir": folder, "name": name, "version": 0}
        return ["--trainer.logger", LOGGER, *(f"--trainer.logger.{place}={value}" for place, value in places.items())]

    commands = {}
    if run.fit is not None:
        commands["fit"] = ["fit", *run.fit, *logging("fit"), f"--checkpoint.dirpath={folder / LAST.parent}"]
    trained = [] if run.fit is None else [f"--ckpt_path={folder / LAST}"]
    for name, options in run.tests.items():
        commands[name] = ["test", *trained, *options, *logging(name)]
    return commands


def record_of(command: Sequence[str], folder: Path) -> dict[str, Any]:
    """The record that a command has left in its log folder, or leaves now; a training is resumed."""
    path = folder / f"{command[0]}.json"
    if (record := read(path)) is not None:
        return record
    last = folder.parents[1] / LAST
    resumed = [f"--ckpt_path={last}"] if command[0] == "fit" and last.exists() else []
    status = launch([*command, *resumed])
    record = read(path)
    if status != 0 or record is None:
        raise ChildProcessError(f"{command[0]} ended with exit status {status}")
    return record


def launch(args: Sequence[str]) -> int:
    """Run a command line in a process of its own, which shows its progress, and return its exit status."""
    sys.stderr.write(f"\n$ python -m meta_lightning {shlex.join(args)}\n")
    sys.stderr.flush()
    with subprocess.Popen([sys.executable, "-m", "meta_lightning", *args]) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()  # it got the Ctrl-C as well, and is saving its last checkpoint
            raise


def read(path: Path) -> dict[str, Any] | None:
    """What a JSON file holds; None where there is none."""
    if not path.exists():
        return None
    try:
        contents: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} must hold JSON: {error}") from None
    return contents


def checksums(commands: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The configuration files that commands name, with checksums: a file that was edited makes another run."""
    named = {a.removeprefix("--config=") for command in commands.values() for a in command if a.startswith("--config=")}
    paths = [path for path in map(Path, sorted(named)) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths}


def differing(before: Mapping[str, Sequence[str]], now: Mapping[str, Sequence[str]]) -> str:
    """What only one of two runs' commands has, in words."""
    old, new = ({argument for command in commands.values() for argument in command} for commands in (before, now))
    if old == new:
        return "a configuration that was edited since"
    return f"with {shlex.join(sorted(old - new)) or 'less'} where now is {shlex.join(sorted(new - old)) or 'less'}"
