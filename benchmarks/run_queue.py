"""Run the long trainings behind the table of docs/benchmarks.md, one after another, in the background.

    OMP_NUM_THREADS=1 nice python benchmarks/run_queue.py --data.root data
    python benchmarks/run_queue.py --status

Stop it by SIGTERM or Ctrl-C at any time: the running cell saves its last checkpoint, and the same command goes on from
there. A killed queue loses at most the steps since the last checkpoint. What the trainings leave is in --out; a
finished cell's record is copied into --records. Arguments that the queue does not know go to evaluate.py.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from evaluate import CLASSIFICATION

from meta_lightning.compare.runs import LAST, read

HERE = Path(__file__).parent
COMPILED = ["--model.compile_passes=true"]

# record: configuration, meta-iterations and what differs from it; in the order of worth
CELLS: dict[str, tuple[str, int, list[str]]] = {
    "omniglot-maml_5way_1shot-FOMAML": ("omniglot/maml_5way_1shot.yaml", 60_000, ["--model=FOMAML", *COMPILED]),
    "omniglot-reptile_5way_1shot": ("omniglot/reptile_5way_1shot.yaml", 100_000, COMPILED),
    "omniglot-reptile_5way_5shot": ("omniglot/reptile_5way_5shot.yaml", 100_000, COMPILED),
    "omniglot-maml_5way_1shot": ("omniglot/maml_5way_1shot.yaml", 60_000, COMPILED),
    "omniglot-maml_20way_1shot": ("omniglot/maml_20way_1shot.yaml", 60_000, COMPILED),
    "omniglot-maml_20way_5shot": ("omniglot/maml_20way_5shot.yaml", 60_000, COMPILED),
}


def status(out: Path) -> str:
    """A line per cell: its accuracy, or how far it is."""
    lines = []
    for cell, (_, steps, _) in CELLS.items():
        record = read(out / "results" / f"{cell}-seed0.json")
        last = out / "runs" / f"{cell}-seed0" / LAST
        if record is not None:
            tests = {test: record["tests"][test]["figures"]["test/accuracy"] for test in record["tests"]}
            lines.append(f"{cell}: " + ", ".join(f"{test} {100 * value:.2f} %" for test, value in tests.items()))
        else:
            done: Any = torch.load(last, mmap=True, weights_only=False)["global_step"] if last.exists() else 0
            lines.append(f"{cell}: {done} of {steps} meta-iterations")
    return "\n".join(lines) + "\n"


def interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def run(cell: str, out: Path, records: Path, more: list[str]) -> None:
    """Complete a cell, or interrupt it with the queue."""
    config, steps, options = CELLS[cell]
    # tests of each query alone with 15 queries per class take an hour, and no paper has them
    tests = [test for test in CLASSIFICATION if test != "alone-15"]
    command = [sys.executable, str(HERE / "evaluate.py"), "--config", config, "--out", str(out)]
    command += ["--tests", *tests, f"--trainer.max_steps={steps}", *options, *more]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            if process.wait() != 0:
                raise ChildProcessError(f"{cell} ended with exit status {process.returncode}")
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGINT)  # the training too, which saves its last checkpoint
            raise
    name = f"{cell}-seed0.json"
    records.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(out / "results" / name, records / name)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--status", action="store_true", help="print what is done, and exit")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), help="these only")
    parser.add_argument("--out", type=Path, default=HERE / "runs" / "queue")
    parser.add_argument("--records", type=Path, default=HERE / "results")
    arguments, more = parser.parse_known_args()
    if not arguments.status:
        signal.signal(signal.SIGTERM, interrupt)
        try:
            for cell in arguments.cells:
                run(cell, arguments.out, arguments.records, more)
        except KeyboardInterrupt:
            sys.exit("interrupted: the same command goes on")
    sys.stdout.write(status(arguments.out))


if __name__ == "__main__":
    main()
