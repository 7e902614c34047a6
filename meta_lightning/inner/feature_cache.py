"""Features of frozen modules by the contents of samples, in memory or in a memory-mapped file."""

import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from meta_lightning.checks import plain
from meta_lightning.files import write_json
from meta_lightning.inner.exact import without_fast_path
from meta_lightning.inner.state import apart

DIGEST = 16  # bytes
UNMAPPED = 1024  # new features that are in memory beside the file
# new samples after which features are no longer kept if less than this share of them came again: not none, since the
# first task is examined before it trains, and validation repeats its tasks
PATIENCE, AGAIN = 10_000, 0.001
MOST_BYTES = 2**30  # of features in memory
# samples per forward: always as many, since rounding depends on it, and a resumed run computes others at once
CHUNK, CHUNK_ON_GPU = 8, 64
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element
OF_TORCH = vars(nn.Module()).keys()  # attributes of every module


class FeatureCache:
    """Features of samples by a digest of their contents, after transforms.

    They are forgotten when tensors or plain attributes of the modules change. With a folder there is a file for each of
    these and form of samples.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()
        self.source: Any = None  # the modules and the form of samples
        self.known: dict[bytes, Tensor] = {}
        self.path: Path | None = None  # of the file
        self.unmapped, self.keeps = 0, True
        self.unverified = False  # whether features are from a file that this process has not compared
        self.new = self.again = 0  # samples, since they were last compared

    def __reduce__(self) -> tuple[type["FeatureCache"], tuple[Path | None]]:
        """Copy without features."""
        return FeatureCache, (self.folder,)

    def features(self, frozen: nn.Module, x: Tensor) -> Tensor:
        """Outputs of frozen modules, which are computed for new samples only.  # T S ... -> T S ..."""
        samples = x.flatten(0, 1)
        if x.requires_grad or not self.keeps:
            return as_tasks(in_chunks(frozen, samples), x)
        self.select(frozen, samples)
        keys = [blake2b(sample, digest_size=DIGEST).digest() for sample in bytes_of(samples)]
        rows = {key: self.known[key] for key in keys if key in self.known}
        if rows and self.unverified:
            rows = self.verified(frozen, dict(zip(keys, samples, strict=True)), rows)
        new = {key: row for row, key in enumerate(keys) if key not in rows}
        self.again += len(rows)
        if new:
            computed = dict(zip(new, in_chunks(frozen, samples[[*new.values()]]).cpu().unbind(), strict=True))
            self.keep(computed)
            rows |= computed
        return as_tasks(torch.stack([rows[key] for key in keys]).to(x.device), x)

    def select(self, frozen: nn.Module, samples: Tensor) -> None:
        """Select the features of these weights, attributes and form of samples; forget those of others."""
        device, state = samples.device.type, [*frozen.parameters(), *frozen.buffers()]
        casts = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        sums = torch.stack([sum_of_bits(value) for value in state]).tolist()
        form = repr(frozen), attributes_of(frozen), device, casts, samples.dtype, samples.shape[1:]
        if (form, sums) == self.source:
            return
        self.source, self.known, self.path = (form, sums), {}, None
        if self.folder is None:
            return
        weights = blake2b(repr(form).encode(), digest_size=DIGEST)
        for value in state:
            weights.update(bytes_of(value.reshape(1, -1))[0])
        self.path = self.folder / f"{weights.hexdigest()}.features"
        if [path for path in self.folder.glob("*.features") if path != self.path] and not self.path.exists():
            rank_zero_warn(f"cache_dir {self.folder} has features of other weights or samples: these are computed")
        self.known = self.read()
        self.unverified = bool(self.known)

    def verified(
        self, frozen: nn.Module, samples: Mapping[bytes, Tensor], rows: dict[bytes, Tensor]
    ) -> dict[bytes, Tensor]:
        """Features from the file; none, without the file, if the modules make others since their code has changed."""
        self.unverified = False
        keys = [*rows][:CHUNK]
        kept = torch.stack([rows[key] for key in keys])
        made = in_chunks(frozen, torch.stack([samples[key] for key in keys])).cpu()
        if kept.shape == made.shape and not apart(kept, made):
            return rows
        rank_zero_warn(f"cache_dir {self.folder} has features that the modules no longer make: these are computed")
        assert self.path is not None
        try:
            for file in (self.path, self.path.with_suffix(".json")):
                file.unlink(missing_ok=True)
        except OSError:
            self.path = None
        self.known = {}
        return {}

    def keep(self, rows: dict[bytes, Tensor]) -> None:
        """Keep new features."""
        if self.new > PATIENCE:
            if self.again < AGAIN * self.new:
                seen = f"{self.again} of {self.again + self.new} samples came again: transforms are probably random"
                rank_zero_warn(f"Features of frozen modules are no longer kept, since {seen}")
                self.keeps, self.known = False, {}
                return
            self.new = self.again = 0
        self.new += len(rows)
        if self.path is not None and self.write(rows):
            self.unmapped += len(rows)
            if self.unmapped > UNMAPPED:
                self.unmapped, self.known = 0, self.read()
                return
        elif self.known:
            one = next(iter(self.known.values()))
            if (len(self.known) + len(rows)) * one.numel() * one.element_size() > MOST_BYTES:
                self.known = {}
        self.known |= rows

    def write(self, rows: dict[bytes, Tensor]) -> bool:
        """Append features to the file; False, with a warning, where it cannot be written."""
        assert self.path is not None
        form = self.path.with_suffix(".json")
        one = next(iter(rows.values()))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_suffix(".lock")):
                if not form.exists():  # before the file, since other processes read both without the lock
                    write_json(form, {"shape": list(one.shape), "dtype": str(one.dtype)})
                with self.path.open("ab") as file:
                    size = DIGEST + one.numel() * one.element_size()
                    file.truncate(file.tell() // size * size)  # of a process that was killed
                    file.write(b"".join(key + bytes_of(row[None])[0].tobytes() for key, row in rows.items()))
        except (OSError, NotImplementedError) as error:  # the latter of a file system without locks
            rank_zero_warn(f"cache_dir must be writable, got {self.folder} ({error}): features are kept in memory only")
            self.path = None
        return self.path is not None

    def read(self) -> dict[bytes, Tensor]:
        """The features in the file, mapped."""
        assert self.path is not None
        described = self.path.with_suffix(".json")
        if not self.path.exists():
            return {}
        try:
            form = json.loads(described.read_text())
            shape, dtype = form["shape"], getattr(torch, form["dtype"].removeprefix("torch."))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            came = f"got {described.name}, which cannot be read ({error})"
            rank_zero_warn(f"cache_dir {self.folder} must describe its features, {came}: they are computed again")
            self.path.unlink()
            described.unlink(missing_ok=True)
            return {}
        size = torch.zeros(shape, dtype=dtype).nbytes
        record = np.dtype([("key", np.uint8, DIGEST), ("value", np.uint8, size)])
        count = self.path.stat().st_size // record.itemsize
        if not count:
            return {}
        # copy-on-write, so that torch does not warn of a read-only array
        records = np.memmap(self.path, record, "c", shape=(count,))
        values = torch.from_numpy(records["value"]).view(dtype).unflatten(1, shape)
        return {key.tobytes(): value for key, value in zip(records["key"], values.unbind(), strict=True)}


def as_tasks(features: Tensor, x: Tensor) -> Tensor:
    """Features of all samples by task.  # T*S ... -> T S ..."""
    return features.view(*x.shape[:2], *features.shape[1:])


def attributes_of(frozen: nn.Module) -> str:
    """The plain attributes of modules, such as the mean and the scale of a normalisation."""
    own = ({name: plain(v) for name, v in vars(part).items() if name not in OF_TORCH} for part in frozen.modules())
    return repr([*own])


@torch.no_grad()
def sum_of_bits(values: Tensor) -> Tensor:
    """A sum that a change of any one value changes; modulo 2 to the number of bits, which is fast."""
    integers = BITS[values.element_size()]
    return values.view(integers).sum(dtype=integers).long()


@torch.no_grad()
def bytes_of(samples: Tensor) -> np.ndarray[Any, Any]:
    """The bytes of each sample.  # S ... -> S bytes"""
    array: np.ndarray[Any, Any] = samples.reshape(len(samples), -1).cpu().contiguous().view(torch.uint8).numpy()
    return array


def in_chunks(frozen: nn.Module, samples: Tensor) -> Tensor:
    """Outputs of frozen modules, in chunks of a fixed size, the last one padded.  # S ... -> S ..."""
    size = CHUNK_ON_GPU if samples.device.type == "cuda" else CHUNK
    with torch.set_grad_enabled(samples.requires_grad), without_fast_path():
        rows = torch.arange(-(-len(samples) // size) * size, device=samples.device).clamp(max=len(samples) - 1)
        return torch.cat([frozen(samples[part]) for part in rows.split(size)])[: len(samples)]
