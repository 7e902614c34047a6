"""Functions of many items, such as files, in as many processes as there are cores."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

S = TypeVar("S")
T = TypeVar("T")

ALONE = 0.5  # seconds of work before other processes are started, which takes 0.1 to 0.2 seconds
MOST = 8  # processes: a container may have fewer cores than it shows


def mapped(function: Callable[[S], T], items: Sequence[S], chunk: int = 32) -> Iterator[T]:
    """Apply a function to each item, in order; results that wait take as little memory for any number of items.

    The processes do ``chunk`` items at a time. What the function returns is pickled, the function itself is not.
    """
    start, done, workers = time.monotonic(), 0, worker_processes()
    while done < len(items) and not (workers and time.monotonic() - start > ALONE):
        yield function(items[done])
        done += 1
    if done == len(items):
        return
    # a DataLoader ends its processes when this one is killed, and keeps the results in order and few
    loader = DataLoader(
        Chunks(function, items[done:], chunk),
        batch_size=None,
        num_workers=workers,
        collate_fn=unchanged,  # the default would make tensors of arrays, in shared memory, which may be small
        multiprocessing_context="fork",
        generator=torch.Generator(),  # leaves the global generator alone
    )
    for results, error in loader:
        yield from results
        if error is not None:
            raise error  # as it was: a worker's would be reworded


def worker_processes() -> int:
    """One per core that this process may use; 0 if it has only one, or must not fork.

    Forked processes do not import the user's script again, which may start its work without asking for ``__main__``.
    They do not touch what a fork may break: threads, CUDA. On other systems than Linux the libraries break it.
    """
    if sys.platform != "linux" or multiprocessing.current_process().daemon:  # daemons have no children
        return 0
    cores = len(os.sched_getaffinity(0))
    return min(cores, MOST) if cores > 1 else 0


class Chunks(Dataset[Any]):
    """The results of a function for ``size`` items at a time, and the error that ended them."""

    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any], size: int) -> None:
        self.function, self.items, self.size = function, items, size

    def __len__(self) -> int:
        return -(-len(self.items) // self.size)

    def __getitem__(self, number: int) -> tuple[list[Any], Exception | None]:
        results: list[Any] = []
        for item in self.items[number * self.size : (number + 1) * self.size]:
            try:
                results.append(self.function(item))
            except Exception as error:
                return results, error
        return results, None


def unchanged(results: Any) -> Any:
    """The results as they are."""
    return results
