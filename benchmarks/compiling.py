"""When recording and compiling a pass pay: seconds they take with a cold cache, and what a replay saves.

    python benchmarks/compiling.py [--only sinusoid-1 glyphs] [--threads 1]

Each network in a process and a cache of its own; medians of repeats taken in turn. The last two columns are the replays
from which a form of the pass has won back its seconds from the form before it: ``inner/passes.py`` has the thresholds.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from meta_lightning import FOMAML, MAML, MLP, Conv4, MetaLearner, TaskBatch
from meta_lightning.inner.compiling import without_autograd
from meta_lightning.runs.machine import keep_freed_memory


def waves() -> TaskBatch:
    """Sinusoids: 25 tasks of 10 samples."""
    x = torch.linspace(-5, 5, 20).expand(25, 20).unsqueeze(-1)
    y = torch.sin(x + torch.arange(25).view(-1, 1, 1))
    return TaskBatch(x[:, ::2], y[:, ::2], x[:, 1::2], y[:, 1::2])


def pictures(tasks: int, queries: int, size: int = 28, channels: int = 1) -> TaskBatch:
    """5-way 1-shot tasks of noise."""

    def part(each: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(5).repeat_interleave(each).repeat(tasks, 1)
        return torch.rand(tasks, 5 * each, channels, size, size), y

    return TaskBatch(*part(1), *part(queries))


def conv4(filters: int, size: int = 28, channels: int = 1) -> Conv4:
    return Conv4(5, channels, size, filters, "stride" if size == 28 else "max_pool")


# name -> algorithm, network, inner steps, one pass
ROWS: dict[str, tuple[type[MAML], Callable[[], torch.nn.Module], int, Callable[[], TaskBatch]]] = {
    "sinusoid-1": (MAML, MLP, 1, waves),
    "sinusoid-5": (MAML, MLP, 5, waves),
    "glyphs": (MAML, lambda: conv4(32), 3, lambda: pictures(3, 10)),
    "glyphs-FOMAML": (FOMAML, lambda: conv4(32), 3, lambda: pictures(3, 10)),
    "omniglot": (MAML, lambda: conv4(64), 5, lambda: pictures(8, 15)),
    "photographs": (MAML, lambda: conv4(32, 84, 3), 5, lambda: pictures(2, 15, 84, 3)),
}


def measure(name: str) -> str:
    """A row of the table."""
    algorithm, network, steps, make = ROWS[name]
    batch, learners, seconds = make(), {}, {}
    torch.manual_seed(0)
    initial = network()
    options: dict[str, Any] = {"as it is": False, "recorded": "record", "compiled": True}
    for how, option in options.items():
        learner: MetaLearner = algorithm(initial, inner_lr=0.01, inner_steps=steps, compile_passes=option)
        start = time.perf_counter()
        learner.meta_gradient(batch)
        first = time.perf_counter() - start
        start = time.perf_counter()
        learner.meta_gradient(batch)
        seconds[how] = first - (time.perf_counter() - start)
        learners[how] = learner
    (record,) = learners["recorded"].passes.compiled.passes.values()
    assert record.func is without_autograd
    kernels = sum(node.op == "call_function" for node in record.args[0].graph.nodes)
    times: dict[str, list[float]] = {how: [] for how in learners}
    replays = max(1, round(0.2 / seconds_of(learners["as it is"], batch)))
    for _ in range(9):
        for how, learner in learners.items():
            times[how].append(seconds_of(learner, batch, replays))
    ms = {how: 1000 * statistics.median(of) for how, of in times.items()}
    pays = []
    for before, after in (("as it is", "recorded"), ("recorded", "compiled")):
        saved = ms[before] - ms[after]
        pays.append(
            f"{1000 * (seconds[after] - seconds.get(before, 0.0) * (before == 'recorded')) / saved:,.0f}"
            if saved > 0
            else "never"
        )
    cells = [
        name,
        f"{kernels:,}",
        *(f"{ms[how]:.2f}" for how in ms),
        f"{seconds['recorded']:.1f}",
        f"{seconds['compiled']:.1f}",
    ]
    return f"| {' | '.join([*cells, *pays])} |"


def seconds_of(learner: MetaLearner, batch: TaskBatch, replays: int = 1) -> float:
    """Mean time of a pass."""
    start = time.perf_counter()
    for _ in range(replays):
        learner.meta_gradient(batch)
    return (time.perf_counter() - start) / replays


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as fit does
    if arguments.row:
        print(measure(arguments.row))
        sys.exit()
    forms = "as it is, ms | recorded, ms | compiled, ms | recording, s | compiling, s"
    print(f"| pass | kernels | {forms} | recording pays from | compiling pays from |")
    print("|---" * 9 + "|")
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, __file__, "--row", name, "--threads", str(arguments.threads)]
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": str(arguments.threads)}
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            print(done.stdout.splitlines()[-1], flush=True)
