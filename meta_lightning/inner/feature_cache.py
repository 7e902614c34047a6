"""Features of frozen modules by the contents of samples, in memory or in a memory-mapped file."""

import math
import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from meta_lightning.checks import plain
from meta_lightning.inner.exact import without_fast_path
from meta_lightning.inner.state import RTOL, equal, greatest

DIGEST = 16  # bytes
# new samples after which features are no longer kept if less than this share of them came again: not none, since the
# first task is examined before it trains, and validation repeats its tasks
PATIENCE, AGAIN = 10_000, 0.001
MOST_BYTES = 2**30  # of features in memory
# samples per forward: always as many, since rounding depends on it, and a resumed run computes others at once
CHUNK, CHUNK_ON_GPU = 8, 64
OF_TORCH = vars(nn.Module()).keys()  # attributes of every module


class FeatureCache:
    """Features of samples by a digest of their contents, after transforms.

    They are forgotten when tensors or plain attributes of the modules change. With a folder there are two files for
    each of these and form of samples, which grow: ``.keys``, a token of the files and the digest of each row, and
    ``.values``, the rows.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()
        self.source: Any = None  # the modules and the form of samples
        self.state: list[Tensor] = []  # copies of the modules' tensors
        self.keeps = True
        self.new = self.again = 0  # samples, since they were last compared
        self.forget()

    def forget(self, path: Path | None = None) -> None:
        """Forget all features, and use the files at this path, without their suffixes; without one, memory."""
        self.path, self.token = path, b""  # which begins the keys
        self.rows: dict[bytes, int] = {}
        self.values = torch.empty(0)  # the rows that are mapped or in memory, where there is room for more
        self.unverified = False  # whether rows are from a file that this process has not compared

    def __reduce__(self) -> tuple[type["FeatureCache"], tuple[Path | None]]:
        """Copy without features."""
        return FeatureCache, (self.folder,)

    def features(self, frozen: nn.Module, x: Tensor, keeps: bool = True) -> Tensor:
        """Outputs of frozen modules, which are computed for new samples only, if any are kept.  # T S ... -> T S ..."""
        samples = x.flatten(0, 1)
        if x.requires_grad or not keeps or not self.pays():
            return as_tasks(in_chunks(frozen, samples), x)
        self.select(frozen, samples)
        keys = [blake2b(sample, digest_size=DIGEST).digest() for sample in bytes_of(samples)]
        if self.unverified and (known := {key: number for number, key in enumerate(keys) if key in self.rows}):
            numbers = [*known.values()][:CHUNK]
            self.verify([*known][:CHUNK], in_chunks(frozen, samples[numbers]).cpu())
        new = {key: number for number, key in enumerate(keys) if key not in self.rows}
        if new and not self.keep([*new], in_chunks(frozen, samples[[*new.values()]]).cpu()):
            self.forget()
            return self.features(frozen, x, keeps)
        self.new, self.again = self.new + len(new), self.again + len({*keys}) - len(new)
        return as_tasks(self.values[[self.rows[key] for key in keys]].to(x.device), x)

    def pays(self) -> bool:
        """Whether samples come again; features in memory are forgotten where they are too many."""
        if self.keeps and self.new > PATIENCE:
            if self.again < AGAIN * self.new:
                seen = f"{self.again} of {self.again + self.new} samples came again: transforms are probably random"
                rank_zero_warn(f"Features of frozen modules are no longer kept, since {seen}")
                self.keeps = False
                self.forget()
            self.new = self.again = 0
        if self.path is None and self.rows and len(self.rows) * self.values[0].nbytes > MOST_BYTES:
            self.forget()
        return self.keeps

    def select(self, frozen: nn.Module, samples: Tensor) -> None:
        """Select the features of these weights, attributes and form of samples; forget those of others."""
        device, state = samples.device.type, [*frozen.parameters(), *frozen.buffers()]
        casts = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        form = repr(frozen), attributes_of(frozen), device, casts, samples.dtype, samples.shape[1:]
        source = form, [(value.device, value.dtype) for value in state]
        if source == self.source and all(map(equal, state, self.state)):
            return
        self.source, self.state = source, [value.detach().clone() for value in state]
        self.forget()
        if self.folder is None:
            return
        weights = blake2b(repr(form).encode(), digest_size=DIGEST)
        for value in state:
            weights.update(bytes_of(value.reshape(1, -1))[0])
        self.forget(path := self.folder / weights.hexdigest())
        if not path.with_suffix(".keys").exists() and [*self.folder.glob("*.keys")]:
            rank_zero_warn(f"cache_dir {self.folder} has features of other weights or samples: these are computed")
        self.read_keys(path)
        self.unverified = bool(self.rows)

    def verify(self, keys: Sequence[bytes], made: Tensor) -> None:
        """Forget and remove the files if the modules make other features since their code has changed."""
        path, self.unverified = self.path, False
        assert path is not None
        try:
            self.map(path, made)
            kept = self.values[[self.rows[key] for key in keys]]
            if greatest(kept - made) <= RTOL * greatest(made):
                return
        except (OSError, ValueError):  # no values, or too few
            pass
        rank_zero_warn(f"cache_dir {self.folder} has features that the modules no longer make: these are computed")
        self.forget(path)
        for suffix in (".keys", ".values"):
            path.with_suffix(suffix).unlink(missing_ok=True)

    def keep(self, keys: Sequence[bytes], made: Tensor) -> bool:
        """Keep new features; False, with a warning, where the files cannot be written."""
        if self.path is not None:
            try:
                self.write(self.path, keys, made)
            except (OSError, ValueError, NotImplementedError) as error:  # the last of a file system without locks
                expected = f"cache_dir must be writable, got {self.folder} ({error})"
                rank_zero_warn(f"{expected}: features are kept in memory only")
                return False
            return True
        start, end = len(self.rows), len(self.rows) + len(keys)
        if len(self.values) < end:
            old = self.values[:start] if start else made[:0]
            self.values = torch.cat([old, made.new_empty(2 * end - start, *made.shape[1:])])
        self.values[start:end] = made
        self.rows |= zip(keys, range(start, end), strict=True)
        return True

    def write(self, path: Path, keys: Sequence[bytes], made: Tensor) -> None:
        """Append to the files what no other process has appended meanwhile, the keys last, and map the rows."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            self.read_keys(path)
            new = [number for number, key in enumerate(keys) if key not in self.rows]
            with path.with_suffix(".values").open("ab") as file:
                if file.tell() < (size := len(self.rows) * made[0].nbytes):
                    raise OSError(f"{path.name}.values is too short")
                file.truncate(size)  # of a process that was killed
                file.write(bytes_of(made[new]).tobytes())
            with path.with_suffix(".keys").open("ab") as file:
                if not self.token:
                    self.token = os.urandom(DIGEST)
                    file.truncate(0)
                    file.write(self.token)
                file.truncate(DIGEST * (1 + len(self.rows)))
                file.write(b"".join(keys[number] for number in new))
            self.read_keys(path)
            self.map(path, made)

    def read_keys(self, path: Path) -> None:
        """Read the keys behind the known ones; OSError if another process has begun new files."""
        keys = path.with_suffix(".keys")
        if not self.token and not keys.exists():
            return
        with keys.open("rb") as file:
            token = file.read(DIGEST)
            if self.token not in (b"", token):
                raise OSError(f"another process has replaced {keys.name}")
            self.token = token if len(token) == DIGEST else b""
            file.seek(DIGEST * (1 + len(self.rows)))
            held = file.read()
        for start in range(0, len(held) // DIGEST * DIGEST, DIGEST):
            self.rows[held[start : start + DIGEST]] = len(self.rows)

    def map(self, path: Path, like: Tensor) -> None:
        """Map the rows of the file, whose form is that of others; OSError or ValueError if it lacks some."""
        # copy-on-write, so that torch does not warn of a read-only array
        held = np.memmap(path.with_suffix(".values"), np.uint8, "c", shape=len(self.rows) * like[0].nbytes)
        self.values = torch.from_numpy(held).view(like.dtype).view(-1, *like.shape[1:])


def as_tasks(features: Tensor, x: Tensor) -> Tensor:
    """Features of all samples by task.  # T*S ... -> T S ..."""
    return features.view(*x.shape[:2], *features.shape[1:])


def attributes_of(frozen: nn.Module) -> str:
    """The plain attributes of modules, such as the mean and the scale of a normalisation."""
    own = ({name: plain(v) for name, v in vars(part).items() if name not in OF_TORCH} for part in frozen.modules())
    return repr([*own])


@torch.no_grad()
def bytes_of(samples: Tensor) -> np.ndarray[Any, Any]:
    """The bytes of each sample.  # S ... -> S bytes"""
    rows = samples.reshape(len(samples), math.prod(samples.shape[1:]))  # of no samples too
    array: np.ndarray[Any, Any] = rows.cpu().contiguous().view(torch.uint8).numpy()
    return array


def in_chunks(frozen: nn.Module, samples: Tensor) -> Tensor:
    """Outputs of frozen modules, in chunks of a fixed size, the last one padded.  # S ... -> S ..."""
    size = CHUNK_ON_GPU if samples.device.type == "cuda" else CHUNK
    with torch.set_grad_enabled(samples.requires_grad), without_fast_path():
        rows = torch.arange(-(-len(samples) // size) * size, device=samples.device).clamp(max=len(samples) - 1)
        return torch.cat([frozen(samples[part]) for part in rows.split(size)])[: len(samples)]
