"""Search inner_lr, outer_lr and inner_steps with Optuna, which prunes what falls behind.

    pip install 'meta-lightning[sweep]'
    python benchmarks/sweep.py --config maml.yaml --trials 20
    tensorboard --logdir runs/sweep/hparams    # the HParams tab

Every trial trains for the same few meta-iterations and is judged by validations on the way. What the program does not
know goes to fit. The study is kept in runs/sweep/study.db: the same command goes on where it stopped.
"""

import argparse
import logging
import warnings
from pathlib import Path

import optuna
import yaml
from optuna_integration import PyTorchLightningPruningCallback
from torch.utils.tensorboard import SummaryWriter

from meta_lightning.cli import IGNORED_WARNINGS, command_line, find_config, ignore

OUTER_LR = {"MAML": (1e-4, 1e-2), "FOMAML": (1e-4, 1e-2), "Reptile": (0.03, 1.0)}  # Reptile's is ε


class Sweep:
    """The search's settings; a trial is a training."""

    def __init__(self, arguments: argparse.Namespace, more: list[str]) -> None:
        self.config = find_config(arguments.config)
        described = yaml.safe_load(Path(self.config).read_text())
        self.algorithm: str = arguments.model or described["model"]["class_path"].rpartition(".")[2]
        self.monitor = described.get("checkpoint", {}).get("monitor", "val/accuracy")
        self.inner_lr, self.inner_steps = arguments.inner_lr, arguments.inner_steps
        self.outer_lr = arguments.outer_lr or OUTER_LR[self.algorithm]
        self.out, self.more = arguments.out, more
        self.fixed = [f"--trainer.max_steps={arguments.steps}", "--checkpoint.save_top_k=0"]
        self.fixed += [f"--data.epoch_length={max(1, arguments.steps // arguments.validations)}"]

    def direction(self) -> str:
        return "maximize" if self.monitor.endswith("accuracy") else "minimize"

    def options(self, params: dict[str, float]) -> list[str]:
        return [f"--model.{name}={value}" for name, value in params.items()]

    def __call__(self, trial: optuna.Trial) -> float:
        """Train, and return the last validation."""
        params = {
            "inner_lr": trial.suggest_float("inner_lr", *self.inner_lr, log=True),
            "outer_lr": trial.suggest_float("outer_lr", *self.outer_lr, log=True),
            "inner_steps": trial.suggest_int("inner_steps", *self.inner_steps),
        }
        places = [f"--trainer.default_root_dir={self.out / f'trial{trial.number}'}"]
        # the algorithm first: the options that follow may be its own
        settings = [f"--config={self.config}", f"--model={self.algorithm}", *self.more, *self.options(params)]
        arguments = ["fit", *settings, *self.fixed, *places]
        trainer = command_line(arguments, [PyTorchLightningPruningCallback(trial, self.monitor)]).trainer
        return float(trainer.callback_metrics[self.monitor])

    def log(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        """Enter a trial into the HParams tab, a pruned one with its last validation."""
        if trial.intermediate_values:
            value = trial.intermediate_values[max(trial.intermediate_values)]
            with SummaryWriter(str(self.out / "hparams")) as board:
                params = trial.params | {"state": trial.state.name}
                board.add_hparams(params, {self.monitor: value}, run_name=f"trial{trial.number}")


def main(args: list[str] | None = None) -> optuna.Study:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--model", choices=OUTER_LR, help="an algorithm in the place of the configuration's")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--steps", type=int, default=500, help="meta-iterations of a trial")
    parser.add_argument("--validations", type=int, default=5, help="of a trial, at each of which it may be pruned")
    parser.add_argument("--inner_lr", type=float, nargs=2, default=(0.003, 1.0), metavar=("LEAST", "MOST"))
    parser.add_argument("--outer_lr", type=float, nargs=2, metavar=("LEAST", "MOST"))
    parser.add_argument("--inner_steps", type=int, nargs=2, default=(1, 5), metavar=("LEAST", "MOST"))
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    arguments, more = parser.parse_known_args(args)
    arguments.out.mkdir(parents=True, exist_ok=True)
    sweep = Sweep(arguments, more)
    study = optuna.create_study(
        storage=f"sqlite:///{arguments.out / 'study.db'}",
        study_name=f"{Path(sweep.config).stem}-{sweep.algorithm}",
        load_if_exists=True,
        direction=sweep.direction(),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1),
    )
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))  # one that goes on must not draw the same again
    remaining = arguments.trials - sum(trial.state.is_finished() for trial in study.trials)
    # a training that diverges is a bad setting, not the end of the search
    study.optimize(sweep, max(0, remaining), catch=(FloatingPointError,), callbacks=[sweep.log])
    states = [trial.state.name.lower() for trial in study.trials]
    print(", ".join(f"{states.count(state)} {state}" for state in sorted({*states})))
    if "complete" in states:
        best = " ".join([f"--model={sweep.algorithm}", *sweep.options(study.best_params)])
        print(f"best {sweep.monitor} {study.best_value:.4f}: fit --config {arguments.config} {best}")
    return study


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    ignore(IGNORED_WARNINGS)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    main()
