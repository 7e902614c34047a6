"""Files that are written whole or not at all, and replace nothing unasked."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from meta_lightning.checks import require


def require_writable(path: Path, overwrite: bool, argument: str) -> None:
    """Refuse, before any work is done, a file that must not or cannot be written."""
    require(overwrite or not path.exists(), f"{argument} must name a new file, or overwrite be set: {path} exists")
    require(not path.is_dir(), f"{argument} must name a file, got {path}, which is a folder")
    folder = path.parent
    require(
        folder.is_dir() and os.access(folder, os.W_OK),
        f"{argument} must name a file in a folder that can be written to, got {path}",
    )


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to beside the given one, which takes its place at the end, if nothing was raised."""
    part = path.with_name(f"{path.stem}.part{path.suffix}")  # torch.export wants the suffix
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, contents: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part:
        part.write_text(json.dumps(contents, allow_nan=False), encoding="utf-8")
