"""When recording and compiling a pass pay: seconds they take with a cold cache, and what a replay saves.

    python benchmarks/compiling.py [--only sinusoid-1 glyphs] [--threads 1]

Each network in a process and a cache of its own, and compiled again in a second process with that cache ("warm");
medians of repeats taken in turn. The seconds of compiling come on top of those of recording. The last two columns are
the replays from which a form of the pass has won back its seconds; ``inner/passes.py`` has what follows from it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from workloads import INNER_LR, Waves, Workload, interleaved

from meta_lightning import FOMAML, MAML
from meta_lightning.inner import compiling
from meta_lightning.runs.machine import keep_freed_memory

WARM = "…"  # the place of the seconds that a second process takes
GLYPHS = Workload("maml.yaml", 3, 1, 28, 32, queries=10, steps=3)
ROWS: dict[str, tuple[type[MAML], Waves | Workload]] = {
    **{f"sinusoid-{steps}": (MAML, Waves("sinusoid", steps)) for steps in (1, 5)},
    "glyphs": (MAML, GLYPHS),
    "glyphs-FOMAML": (FOMAML, GLYPHS),
    **{f"omniglot-{steps}": (MAML, Workload("Omniglot", 8, 1, 28, 64, steps=steps)) for steps in (1, 5, 20)},
    "single": (MAML, Workload("single", 1, 1, 28, 64)),
    "photographs": (MAML, Workload("84×84", 2, 1, 84, 32)),
}


FORMS: dict[str, Any] = {"as it is": False, "recorded": "record", "compiled": True}


def first_passes(name: str) -> tuple[dict[str, Callable[[], Any]], dict[str, float], int]:
    """Each form of a pass, the seconds of its first run, and the kernels of the record."""
    algorithm, workload = ROWS[name]
    batch, passes, seconds, graphs = workload.batch(), {}, {}, []
    traced, compiling.traced = compiling.traced, lambda *args: graphs.append(traced(*args)) or graphs[-1]
    for form, option in FORMS.items():
        learner = algorithm(workload.network(), inner_lr=INNER_LR, inner_steps=workload.steps, compile_passes=option)
        passes[form] = partial(learner.meta_gradient, batch)
        start = time.perf_counter()
        passes[form]()
        seconds[form] = time.perf_counter() - start
    return passes, seconds, sum(node.op == "call_function" for node in graphs[0][0].graph.nodes)


def measure(name: str) -> str:
    """A row of the table, with a place for the seconds of compiling from the cache."""
    passes, seconds, kernels = first_passes(name)
    ms = interleaved(passes, 51, "cpu")
    first = list(seconds.values())
    recording, fusing = first[1] - first[0], first[2] - first[1]
    pays = [
        f"{1000 * spent / saved:,.0f}" if saved > 0 else "never"
        for spent, saved in (
            (recording, ms["as it is"] - ms["recorded"]),
            (fusing, ms["recorded"] - ms["compiled"]),
        )
    ]
    times = [f"{value:.2f}" for value in ms.values()]
    return f"| {' | '.join([name, f'{kernels:,}', *times, f'{recording:.1f}', f'{fusing:.1f}', WARM, *pays])} |"


def compiling_again(name: str) -> str:
    """The seconds of compiling from the cache."""
    _, seconds, _ = first_passes(name)
    return f"{seconds['compiled'] - seconds['recorded']:.1f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--again", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as fit does
    for name, of in ((arguments.row, measure), (arguments.again, compiling_again)):
        if name:
            print(of(name))
            sys.exit()
    forms = "as it is, ms | recorded, ms | compiled, ms | recording, s | compiling, s | … warm, s"
    print(f"| pass | kernels | {forms} | recording pays from | compiling pays from |")
    print("|---" * 10 + "|")
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, __file__, "--threads", str(arguments.threads)]
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": str(arguments.threads)}
            run = partial(subprocess.run, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            row, warm = (run([*command, which, name]).stdout.splitlines()[-1] for which in ("--row", "--again"))
            print(row.replace(WARM, warm), flush=True)
