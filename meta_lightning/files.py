"""Atomic file writes that never overwrite a file unless asked to."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from meta_lightning.checks import require


def require_writable(path: Path, overwrite: bool, argument: str) -> None:
    """Refuse an output file that exists or cannot be written, before any work is done."""
    require(overwrite or not path.exists(), f"{argument} must name a new file unless overwrite is set, got {path}")
    require(not path.is_dir(), f"{argument} must name a file, got {path}, which is a folder")
    writable = path.parent.is_dir() and os.access(path.parent, os.W_OK)
    require(writable, f"{argument} must name a file in a writable folder, got {path}")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which replaces ``path`` unless an exception is raised."""
    part = path.with_name(f"{path.stem}.part{path.suffix}")  # torch.export requires the suffix
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, contents: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part:
        part.write_text(json.dumps(contents, allow_nan=False), encoding="utf-8")
