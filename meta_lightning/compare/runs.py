"""Runs of ``fit`` and ``test`` in separate processes; finished ones are kept and interrupted ones resumed."""

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
    """A training and the tests of its last checkpoint; without training, tests of a random initialisation."""

    name: str
    fit: list[str] | None
    tests: dict[str, list[str]]  # by name


def complete(run: Run, out: Path, overwrite: bool = False) -> dict[str, Any]:
    """The result of a run, after its unfinished commands have been run."""
    result, folder = out / "results" / f"{run.name}.json", out / "runs" / run.name
    commands = commands_of(run, folder)
    settings = {"commands": commands, "configs": checksums(commands)}
    started = folder / "commands.json"
    for path in (result, started):
        before = read(path)
        if before is not None and any(before[key] != value for key, value in settings.items()):
            found = f"{path} of other settings, {differing(before['commands'], commands)}"
            require(overwrite, f"out must be a new folder unless overwrite is set, got {found}")
            shutil.rmtree(folder, ignore_errors=True)
            path.unlink(missing_ok=True)
    if (finished := read(result)) is not None:
        return finished
    write_json(started, settings)
    records = {name: record_of(command, folder / name / "version_0") for name, command in commands.items()}
    done = {"name": run.name, **settings, "fit": records.pop("fit", None), "tests": records}
    write_json(result, done)
    return done


def commands_of(run: Run, folder: Path) -> dict[str, list[str]]:
    """The command lines of a run, without ``python -m meta_lightning``, by name of their log folder."""
    commands = {} if run.fit is None else {"fit": ["fit", *run.fit]}
    trained = [] if run.fit is None else [f"--ckpt_path={folder / LAST}"]
    commands |= {name: ["test", *trained, *options] for name, options in run.tests.items()}
    for name, command in commands.items():
        places = {"save_dir": folder, "name": name, "version": 0}
        command += ["--trainer.logger", LOGGER, *(f"--trainer.logger.{key}={value}" for key, value in places.items())]
        command += [f"--checkpoint.dirpath={folder / LAST.parent}"] if name == "fit" else []
    return commands


def record_of(command: Sequence[str], folder: Path) -> dict[str, Any]:
    """The record of a command from its log folder; if there is none, the command is run, or its training resumed."""
    path, last = folder / f"{command[0]}.json", folder.parents[1] / LAST
    record = read(path)
    if record is None:
        resumed = [f"--ckpt_path={last}"] if command[0] == "fit" and last.exists() else []
        status = launch([*command, *resumed])
        record = read(path)
        if status != 0 or record is None:
            raise ChildProcessError(f"{command[0]} ended with exit status {status}")
    return record


def launch(args: Sequence[str]) -> int:
    """Run a command line in a process that shares this terminal, and return its exit status."""
    sys.stderr.write(f"\n$ python -m meta_lightning {shlex.join(args)}\n")
    sys.stderr.flush()
    with subprocess.Popen([sys.executable, "-m", "meta_lightning", *args]) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()  # the process received Ctrl-C too, and saves its last checkpoint
            raise


def read(path: Path) -> dict[str, Any] | None:
    """The contents of a JSON file; None if it does not exist."""
    if not path.exists():
        return None
    try:
        contents: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} must hold JSON: {error}") from None
    return contents


def checksums(commands: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Checksums of the configuration files of commands: an edited file makes another run."""
    named = {a.removeprefix("--config=") for command in commands.values() for a in command if a.startswith("--config=")}
    paths = [path for path in map(Path, sorted(named)) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths}


def differing(before: Mapping[str, Sequence[str]], now: Mapping[str, Sequence[str]]) -> str:
    """The arguments that differ between the commands of two runs, as a sentence."""
    old, new = ({argument for command in commands.values() for argument in command} for commands in (before, now))
    if old == new:
        return "from a configuration edited since"
    return f"{shlex.join(sorted(old - new)) or 'nothing'} instead of {shlex.join(sorted(new - old)) or 'nothing'}"
