"""Milliseconds a meta-iteration, gradient only: ours against learn2learn, a plain torch.func loop and JAX vmap + jit.

    python benchmarks/speed.py [--device cuda] [--repeats 5] [--only omniglot] [--tasks N] [--without JAX]

The same network, initial values and tasks for all, float32 (on a GPU with torch's default of TF32 in convolutions);
before timing, everyone's gradient is compared with learn2learn's. Each figure is the median of
repeats that are taken in turn. "Recorded" is compile_passes record (on a GPU a CUDA graph), "compiled" compile_passes
true, after compiling, whose seconds stand beside it. JAX is left out where it is not installed. The last
table has the peak memory of one step, each in a process of its own.
"""

import argparse
import gc
import importlib.util
import subprocess
import sys
import time

import torch
from workloads import (
    ALGORITHMS,
    Waves,
    Workload,
    as_tensors,
    interleaved,
    jax_vmap,
    learn2learn,
    ours,
    peak_memory,
    relative_error,
    torch_func,
)

from meta_lightning.runs.machine import keep_freed_memory

WORKLOADS: dict[str, Waves | Workload] = {
    "omniglot": Workload("Omniglot 1-shot, 32 tasks, 64 filters, stride 2", 32, 1, 28, 64),
    "small": Workload("84×84 1-shot, 4 tasks, 32 filters, max-pool", 4, 1, 84, 32),
    "large": Workload("84×84 5-shot, 16 tasks, 32 filters, max-pool", 16, 5, 84, 32),
    "resnet": Workload("ResNet-18, 84×84 1-shot, 2 tasks", 2, 1, 84, 0, queries=3, steps=2),
    "sinusoid": Waves("Sinusoid MLP 40-40, 25 tasks", 1),
    "sinusoid-5": Waves("Sinusoid MLP 40-40, 25 tasks", 5),
    "single": Workload("Omniglot 1-shot, a single task, 64 filters, stride 2", 1, 1, 28, 64),
}
PEERS = ("learn2learn", "torch.func", "JAX", "ours", "recomputed", "recorded", "compiled")
VARIANTS = {"graph": {}, "recomputed": {"recompute_inner_steps": True}, "compiled": {"compile_passes": True}}


def compare(workload: Waves | Workload, device: str, repeats: int, without: list[str]) -> None:
    print(f"\n{workload.name}, {workload.steps} steps\n")
    print(f"| | {' | '.join(PEERS)} | compiled in, s | ours, × learn2learn | recorded, × | compiled, × | worst error |")
    print("|---" * (len(PEERS) + 6) + "|")
    for algorithm in ALGORITHMS:
        gc.collect()  # the graphs of the last algorithm hold GPU memory
        steps = {
            "learn2learn": learn2learn(algorithm, workload, device),
            "ours": ours(algorithm, workload, device),
            "recorded": ours(algorithm, workload, device, compile_passes="record"),
        }
        if "compiled" not in without:
            steps["compiled"] = ours(algorithm, workload, device, compile_passes=True)
        if algorithm == "MAML":
            steps["recomputed"] = ours(algorithm, workload, device, recompute_inner_steps=True)
        if "torch.func" not in without:
            steps["torch.func"] = torch_func(algorithm, workload, device)
        if "JAX" not in without and importlib.util.find_spec("jax"):
            steps["JAX"] = jax_vmap(algorithm, workload)
        start = time.perf_counter()
        steps.get("compiled", dict)()
        seconds = time.perf_counter() - start
        for _ in range(4):  # a record is compared with the pass as it is, most often among its first replays
            steps["recorded"]()
        results = {name: as_tensors(step()) for name, step in steps.items()}
        error = max(relative_error(result, results["learn2learn"]) for result in results.values())
        times = interleaved(steps, repeats, device)
        cells = [f"{times[name]:{'.1f' if times[name] < 100 else '.0f'}}" if name in times else "" for name in PEERS]
        cells += [f"{seconds:.0f}" if "compiled" in times else ""]
        cells += [
            f"{times['learn2learn'] / times[name]:.2f}" if name in times else ""
            for name in ("ours", "recorded", "compiled")
        ]
        print(f"| {algorithm} | {' | '.join(cells)} | {error:.0e} |", flush=True)


def memory(name: str, device: str, tasks: int) -> None:
    print("\npeak memory of one step, MB: 5-way 5-shot, 5 steps\n")
    base = None
    for algorithm, variant in [("MAML", "graph"), ("MAML", "recomputed"), ("FOMAML", "graph"), ("Reptile", "graph")]:
        command = [sys.executable, __file__, "--device", device, "--tasks", str(tasks), "--peak"]
        line = subprocess.run([*command, f"{algorithm}/{variant}/{name}"], check=True, capture_output=True, text=True)
        megabytes = float(line.stdout.split()[-1])
        base = base or megabytes
        print(f"{algorithm:8} {variant:10} {megabytes:8.0f}  {megabytes / base:.2f} × MAML", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=WORKLOADS, nargs="*", default=["omniglot", "small", "large"])
    parser.add_argument("--tasks", type=int, default=0, help="tasks a meta-batch, in place of the workload's")
    slow = ("torch.func", "JAX", "compiled")
    parser.add_argument("--without", choices=slow, nargs="*", default=[], help="peers to leave out")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        keep_freed_memory()  # as fit does; the peers have it too

    def chosen(name: str) -> Waves | Workload:
        workload = WORKLOADS[name]
        return workload._replace(tasks=arguments.tasks) if arguments.tasks else workload

    if arguments.peak:
        algorithm, variant, name = arguments.peak.split("/")
        workload = chosen(name)._replace(shots=5)
        # the first meta-iteration of one small task loads the libraries
        ours(algorithm, workload._replace(tasks=1, queries=1, shots=1), arguments.device, **VARIANTS[variant])()
        print(peak_memory(ours(algorithm, workload, arguments.device, **VARIANTS[variant]), arguments.device))
    else:
        where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
        print(f"torch {torch.__version__}, {where}; ms, medians of {arguments.repeats}")
        for name in arguments.only:
            compare(chosen(name), arguments.device, arguments.repeats, arguments.without)
        images = [name for name in arguments.only if isinstance(WORKLOADS[name], Workload)]
        if images:
            memory(images[0], arguments.device, arguments.tasks)
