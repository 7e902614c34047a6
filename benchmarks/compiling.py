"""When recording and compiling a pass pay: seconds they take with a cold cache, and what a replay saves.

    python benchmarks/compiling.py [--only sinusoid-1 glyphs] [--threads 1]

Each network in a process and a cache of its own; medians of repeats taken in turn. The seconds of compiling come on top
of those of recording. The last two columns are the replays from which a form of the pass has won back its seconds;
``inner/passes.py`` has the thresholds.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from typing import Any

import torch
from torch import nn
from workloads import INNER_LR, Workload, interleaved

from meta_lightning import FOMAML, MAML, MLP, TaskBatch
from meta_lightning.inner.compiling import without_autograd
from meta_lightning.runs.machine import keep_freed_memory


class Waves:
    """Sinusoids: 25 tasks of 10 samples."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return MLP()

    def batch(self) -> TaskBatch:
        x = torch.linspace(-5, 5, 20).expand(25, 20).unsqueeze(-1)
        y = torch.sin(x + torch.arange(25).view(-1, 1, 1))
        return TaskBatch(x[:, ::2], y[:, ::2], x[:, 1::2], y[:, 1::2])


GLYPHS = Workload("maml.yaml", 3, 1, 28, 32, queries=10, steps=3)
ROWS: dict[str, tuple[type[MAML], Waves | Workload]] = {
    "sinusoid-1": (MAML, Waves(steps=1)),
    "sinusoid-5": (MAML, Waves(steps=5)),
    "glyphs": (MAML, GLYPHS),
    "glyphs-FOMAML": (FOMAML, GLYPHS),
    "omniglot": (MAML, Workload("Omniglot", 8, 1, 28, 64)),
    "photographs": (MAML, Workload("84×84", 2, 1, 84, 32)),
}


def measure(name: str) -> str:
    """A row of the table."""
    algorithm, workload = ROWS[name]
    batch, learners, seconds = workload.batch(), {}, {}
    options: dict[str, Any] = {"as it is": False, "recorded": "record", "compiled": True}
    for how, option in options.items():
        learners[how] = algorithm(
            workload.network(), inner_lr=INNER_LR, inner_steps=workload.steps, compile_passes=option
        )
        start = time.perf_counter()
        learners[how].meta_gradient(batch)
        seconds[how] = time.perf_counter() - start
    (record,) = learners["recorded"].passes.compiled.passes.values()
    assert record.func is without_autograd
    kernels = sum(node.op == "call_function" for node in record.args[0].graph.nodes)
    ms = interleaved({how: partial(learner.meta_gradient, batch) for how, learner in learners.items()}, 51, "cpu")
    recording, compiling = seconds["recorded"] - seconds["as it is"], seconds["compiled"] - seconds["recorded"]
    pays = [
        f"{1000 * spent / saved:,.0f}" if saved > 0 else "never"
        for spent, saved in (
            (recording, ms["as it is"] - ms["recorded"]),
            (compiling, ms["recorded"] - ms["compiled"]),
        )
    ]
    times = [f"{value:.2f}" for value in ms.values()]
    return f"| {' | '.join([name, f'{kernels:,}', *times, f'{recording:.1f}', f'{compiling:.1f}', *pays])} |"


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
