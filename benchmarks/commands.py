"""Whole commands by compile_passes: what they take with false, auto and record.

    python benchmarks/commands.py [--omniglot DATA] [--photographs CALTECH] [--only demo] [--repeats 1]

Each is a command of the README or the guides or a paper's configuration, cut to a minute or so where it takes longer.
The options are taken in turn; a figure is the smallest of the repeats, in seconds, of the command with its imports and
data and, in brackets, of its processors. The commands of a data set that is not given are left out.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

COMMANDS = {
    "demo": "--config maml.yaml",
    "300 steps": "--config maml.yaml --trainer.max_steps 300",
    "--model FOMAML": "--config maml.yaml --model FOMAML --trainer.max_steps 1500",
    "fomaml.yaml": "--config fomaml.yaml --trainer.max_steps 1500",
    "reptile.yaml": "--config reptile.yaml --trainer.max_steps 1500",
    "imaml.yaml": "--config imaml.yaml --trainer.max_steps 400",
    "sinusoid": "--config sinusoid/maml_10shot.yaml --trainer.max_steps 8000",
    "omniglot 5-way": "--config omniglot/maml_5way_1shot.yaml --data.root {omniglot} --trainer.max_steps 400",
    "omniglot 20-way": "--config omniglot/mamlpp_20way_1shot.yaml --data.root {omniglot} --trainer.max_steps 100",
    "photographs": "--config mini_imagenet/maml_5way_1shot.yaml --data.root {photographs} --trainer.max_steps 100",
}
OPTIONS = ("false", "auto", "record")


def run(command: str, option: str) -> tuple[float, float]:
    """Seconds of the command and of its processors."""
    quiet = "--trainer.enable_progress_bar false --trainer.accelerator cpu"
    with tempfile.TemporaryDirectory() as folder:
        arguments = f"{command} {quiet} --model.compile_passes {option} --trainer.default_root_dir {folder}"
        start, before = time.perf_counter(), os.times()
        line = [sys.executable, "-m", "meta_lightning", "fit", *arguments.split()]
        subprocess.run(line, check=True, capture_output=True)
        seconds, after = time.perf_counter() - start, os.times()
    processors = sum(after[2:4]) - sum(before[2:4])  # of the processes that have ended
    return seconds, processors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--omniglot", help="root of Omniglot")
    parser.add_argument("--photographs", help="root of images in the layout of mini-ImageNet")
    parser.add_argument("--only", choices=COMMANDS, nargs="*", default=[*COMMANDS])
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    print(f"| command | {' | '.join(OPTIONS)} |")
    print("|---" * (len(OPTIONS) + 1) + "|")
    for name in arguments.only:
        roots = {part: root for part, root in vars(arguments).items() if part in ("omniglot", "photographs")}
        if any(f"{{{part}}}" in COMMANDS[name] and root is None for part, root in roots.items()):
            continue
        command = COMMANDS[name].format(**roots)
        runs = [[run(command, option) for option in OPTIONS] for _ in range(arguments.repeats)]
        best = [min(of_option) for of_option in zip(*runs, strict=True)]
        cells = [f"{seconds:.1f} ({processors:.1f})" for seconds, processors in best]
        print(f"| `fit {COMMANDS[name]}` | {' | '.join(cells)} |", flush=True)
