"""The parser of the command line: configurations by name, short help, and errors in a sentence."""

import re
import sys
from collections.abc import Iterable
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning.pytorch.cli import LightningArgumentParser

from meta_lightning import public
from meta_lightning.checks import InputError, nearest
from meta_lightning.usage import SUBCOMMANDS

PACKAGE = Path(__file__).parent
OPTION = re.compile(r"--[\w.]+")
SUBCLASSES = re.compile(r",(\s+)known\s+subclasses:([^)]*)")
MOST_SUBCLASSES = 20  # in help: torch has hundreds of modules

# parts of jsonargparse's messages
KEY, CLASS = re.compile(r'[Pp]arser key "(.+)":'), re.compile(r"Problem with given class_path '(.+)'")
NO_OPTION = re.compile(r"Option '(.+)' is not accepted")
NO_CLASS = re.compile(r"Expected a dot import path string: (.+)")
NO_ARGUMENT = re.compile(r"unrecognized arguments: (--[\w.+-]+)")
NO_COMMAND = re.compile(r"invalid choice: '(\S+)' \(choose from")
REQUIRED = re.compile(r"arguments are required: (\w+\.data|\w+\.model)")
# those that tell a user nothing
FRAME = re.compile(
    r"Does not validate against|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|Expected a path but|$"
)


class ConfigFile(ActionConfigFile):
    """``--config``, a path or the name of one of the project's configurations."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Find the file before it is read."""
        super().__call__(parser, cfg, find_config(str(values)), option_string)  # type: ignore[no-untyped-call]


class Parser(LightningArgumentParser):
    """Lightning's parser with ``ConfigFile`` as its ``--config``; an error is a sentence and the way to the help."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Add an argument."""
        if kwargs.get("action") is ActionConfigFile:
            kwargs["action"] = ConfigFile
        return super().add_argument(*args, **kwargs)

    def format_help(self, *args: Any) -> str:
        """The help, with this package's own classes alone where a base class has more than MOST_SUBCLASSES."""
        return SUBCLASSES.sub(own_subclasses, super().format_help(*args))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and where the options are described, and exit with status 2."""
        if not self.exit_on_error:  # of a class inside the arguments
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        sys.stderr.write(f"error: {reason(message, OPTION.findall(parser.format_usage()))}\n")
        sys.stderr.write(f"For all options: {parser.prog.replace(' [options]', '')} --help\n")
        self.exit(2)


def own_subclasses(known: re.Match[str]) -> str:
    """A list of known subclasses, which help breaks into lines anywhere, as it shows it."""
    names = "".join(known[2].split()).split(",")
    own = [name for name in names if re.fullmatch(r"meta_lightning\.\w+", name)]
    indent = " " * 24
    return known[0] if len(names) <= MOST_SUBCLASSES else "".join(f",\n{indent}{name}" for name in own)


def reason(message: str, arguments: Iterable[str]) -> str:
    """A sentence that says what an error of jsonargparse is about, with the nearest name."""
    if found := NO_ARGUMENT.search(message):
        return f"there is no option {found[1]}{hint(found[1], arguments)}"
    if found := NO_COMMAND.search(message):
        return f"there is no subcommand {found[1]}{hint(found[1], SUBCOMMANDS)}"
    if REQUIRED.search(message):
        return "--model and --data are required; --config maml.yaml gives both, and in a test --ckpt_path"
    keys, owner, causes = [], "", []
    for line in (line.strip(" -") for line in message.splitlines()):
        if found := KEY.match(line):
            keys.append(found[1])
        elif found := CLASS.match(line):
            owner = found[1]
        elif not FRAME.match(line):
            causes.append(line)
    cause, prefix = " ".join(causes), f"--{'.'.join(keys)}"
    if owner and (found := NO_OPTION.search(cause)):
        parameters = signature(resolve_name(owner)).parameters.values()
        options = [f"{prefix}.{p.name}" for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        name = f"{prefix}.{found[1]}"
        return f"{owner.rpartition('.')[2]} has no option {name}{hint(name, options)}"
    if found := NO_CLASS.search(cause):
        return f"{prefix} must name a class, got {found[1]}{hint(found[1], public.__all__)}"
    return f"{prefix}: {cause}" if keys and cause else cause or message


def hint(name: str, names: Iterable[str]) -> str:
    """A question about the name that may have been meant, if one is near."""
    near = nearest(name, names)
    return "" if near is None else f"; did you mean {near}?"


def configs_dir() -> Path:
    """The project's configurations: inside an installed package, beside it in a checkout."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def find_config(path: str) -> str:
    """The path itself if it is a file, else the project's configuration of this name."""
    if Path(path).is_file():
        return path
    own = configs_dir()
    if (own / path).is_file():
        return str(own / path)
    names = ", ".join(sorted(p.relative_to(own).as_posix() for p in own.rglob("*.yaml")))
    raise InputError(f"--config must be a file or one of the project's configurations, {names}; got {path}")
