"""Train a configuration and test it in every way that published tables do: one JSON a run in benchmarks/results.

    python benchmarks/evaluate.py --config omniglot/maml_5way_1shot.yaml --model FOMAML --seeds 0 1 2 --data.root data
    python benchmarks/evaluate.py --config sinusoid/maml_5shot.yaml --regression
    python benchmarks/evaluate.py --ckpt_path runs/best.ckpt --name my_run

What it does not know goes to fit and test. The last parameters are tested, as the papers' code does: with the query
batch's statistics (transductive) and each query alone with the support set, 1 and 15 queries a class; a regression
after 1, 5 and 10 inner steps. --tests takes some of these: alone, 15 queries of each of 20 classes take a CPU an hour.
The same command goes on where it stopped; what trainings leave is in benchmarks/runs.
benchmarks/tables.py makes tables of the results.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

from meta_lightning.compare.runs import Run, complete
from meta_lightning.parser import find_config

KINDS = {"transductive": "true", "alone": "false"}
CLASSIFICATION = {
    f"{kind}-{queries}": [f"--model.transductive={KINDS[kind]}", f"--data.queries={queries}"]
    for kind, queries in product(KINDS, (1, 15))
}
REGRESSION = {f"steps-{steps}": [f"--model.test_inner_steps={steps}"] for steps in (1, 5, 10)}


def runs(arguments: argparse.Namespace, more: list[str]) -> list[Run]:
    """The runs that are asked for; seeds are those of the initialisation and the training tasks."""
    kinds = REGRESSION if arguments.regression else CLASSIFICATION
    kinds = {kind: options for kind, options in kinds.items() if kind in (arguments.tests or kinds)}
    if arguments.ckpt_path:
        name = arguments.name or Path(arguments.ckpt_path).stem
        tests = {kind: [f"--ckpt_path={arguments.ckpt_path}", *more, *options] for kind, options in kinds.items()}
        return [Run(name, None, tests)]
    model = [f"--model={arguments.model}"] if arguments.model else []
    shared = [f"--config={find_config(arguments.config)}", *model, *more]
    name = arguments.name or arguments.config.removesuffix(".yaml").replace("/", "-")
    name += f"-{arguments.model}" if arguments.model else ""
    tests = {kind: [*shared, "--data.seed=0", *options] for kind, options in kinds.items()}
    return [
        Run(f"{name}-seed{seed}", [*shared, f"--seed_everything={seed}", f"--data.seed={seed}"], tests)
        for seed in arguments.seeds
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help="train this first")
    source.add_argument("--ckpt_path", help="test this")
    parser.add_argument("--model", help="an algorithm in the place of the configuration's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--regression", action="store_true")
    parser.add_argument("--tests", nargs="+", choices=[*CLASSIFICATION, *REGRESSION], help="these only")
    parser.add_argument("--name", help="of the JSON file")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--overwrite", action="store_true", help="begin anew where there are runs of other settings")
    arguments, more = parser.parse_known_args()
    for run in runs(arguments, more):
        try:
            result = complete(run, arguments.out, arguments.overwrite)
        except KeyboardInterrupt:
            sys.exit("interrupted: the same command goes on")
        for kind, test in result["tests"].items():
            metric = "mse" if arguments.regression else "accuracy"
            print(f"{run.name}, {kind}: {test['figures'][f'test/{metric}']:.4f}")
