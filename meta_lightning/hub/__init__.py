"""Checkpoints that come with the package, each with a model card: ``hub:NAME`` works wherever a path does."""

from pathlib import Path

from meta_lightning.checks import InputError, require_choice

FOLDER = Path(__file__).parent
PREFIX = "hub:"


def names() -> list[str]:
    """Names of the checkpoints, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.ckpt"))


def card(name: str) -> str:
    """The model card of a checkpoint, in Markdown: data, licence, settings, accuracy, use and limits.

    Raises:
        InputError: If there is no checkpoint of this name.
    """
    require_choice(names(), name=name)
    return (FOLDER / f"{name}.md").read_text(encoding="utf-8")


def located(path: str | Path, argument: str = "path") -> Path:
    """The file that a path or ``hub:NAME`` stands for, such as for the ``ckpt_path`` of a Trainer.

    Raises:
        InputError: If there is no checkpoint of this name; whether a path exists is not checked.
    """
    given = str(path)
    if not given.startswith(PREFIX):
        return Path(path).expanduser()
    if given.removeprefix(PREFIX) not in names():
        known = ", ".join(PREFIX + name for name in names()) or "of which there are none"
        raise InputError(f"{argument} must be a path or a checkpoint of the package, {known}; got {given}")
    return FOLDER / f"{given.removeprefix(PREFIX)}.ckpt"


def hub(name: str | None = None) -> str:
    """List the checkpoints that come with the package, or show the model card of one.

    Args:
        name: Name of the checkpoint whose card to show. Default: a line about each.
    """
    if name is not None:
        return card(name.removeprefix(PREFIX)).rstrip()
    lines = [f"{PREFIX}{each:<12} {card(each).partition(chr(10))[0].lstrip('# ')}" for each in names()]
    return "\n".join(lines) or "There are none."
