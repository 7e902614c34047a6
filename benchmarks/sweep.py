"""Search settings with Optuna, which prunes what falls behind.

    pip install 'meta-lightning[sweep]'
    python benchmarks/sweep.py --config maml.yaml --trials 20
    python benchmarks/sweep.py --config reptile.yaml --equal_work --tune model.inner_steps=3..9 data.train_shots=5,10
    tensorboard --logdir runs/sweep/hparams    # the HParams tab

Every trial trains for the same few meta-iterations, or for the same number of multiplications, and is judged by
validations on the way. What the program does not know goes to fit. The study is kept in runs/sweep/study.db: the same
command goes on where it stopped, and several processes may share it, each with a --worker number of its own.
"""

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import optuna
import torch
import yaml
from lightning import Callback
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState
from optuna_integration import PyTorchLightningPruningCallback
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry
from torch.utils.tensorboard import SummaryWriter

from meta_lightning.checks import require
from meta_lightning.cli import command_line
from meta_lightning.parser import find_config
from meta_lightning.quiet import silence

aten = torch.ops.aten
OUTER_LR = {"Reptile": "0.03..1.0"}  # its ε
TUNED = ("model.inner_lr=0.003..1.0", "model.inner_steps=1..5", "model.outer_lr={outer_lr}")
QUIET = ("--checkpoint.save_top_k=0", "--trainer.limit_val_batches=0", "--trainer.logger=false")


class Multiplications(TorchDispatchMode):
    """Counts the multiplications of convolutions and matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is aten.convolution_backward:
            # of each gradient as many as of the forward; torch counts groups, our tasks, several times
            out, x, weight, *_, mask = args
            self.count += sum(mask[:2]) * conv_flop_count(x.shape, weight.shape, out.shape) // 2
        elif (flops := flop_registry.get(func.overloadpacket)) is not None:
            self.count += flops(*args, **(kwargs or {}), out_val=result) // 2
        return result


class OfTheSecondStep(Callback):
    """Counts the multiplications of a meta-iteration: the second, since the first examines the network."""

    def on_train_batch_start(self, *_: Any) -> None:
        self.mode = Multiplications()
        self.mode.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        self.mode.__exit__(None, None, None)


def multiplications(arguments: list[str], out: Path) -> int:
    """Multiplications per meta-iteration of a training."""
    counter = OfTheSecondStep()
    short = ["--trainer.max_steps=2", "--model.compile_passes=false", f"--trainer.default_root_dir={out / 'counted'}"]
    command_line(["fit", *arguments, *short, *QUIET], [counter])
    return counter.mode.count


class Sweep:
    """The search's settings; a trial is a training."""

    def __init__(self, arguments: argparse.Namespace, more: list[str]) -> None:
        self.config = find_config(arguments.config)
        described = yaml.safe_load(Path(self.config).read_text())
        self.algorithm: str = arguments.model or described["model"]["class_path"].rpartition(".")[2]
        self.monitor = described.get("checkpoint", {}).get("monitor", "val/accuracy")
        outer_lr = OUTER_LR.get(self.algorithm, "0.0001..0.01")
        given = [text.replace("{outer_lr}", outer_lr).partition("=") for text in arguments.tune]
        wrong = [name for name, _, values in given if not values]
        require(not wrong, f"--tune must be NAME=LEAST..MOST or NAME=CHOICE,CHOICE, got {', '.join(wrong)}")
        self.tuned = {name: values for name, _, values in given}
        self.steps, self.validations = arguments.steps, arguments.validations
        self.out = arguments.out
        # the algorithm first: the options that follow may be its own
        self.settings = [f"--config={self.config}", f"--model={self.algorithm}", *more]
        self.work = self.steps * multiplications([f"--config={self.config}"], self.out) if arguments.equal_work else 0

    def direction(self) -> str:
        return "maximize" if self.monitor.endswith("accuracy") else "minimize"

    def suggested(self, trial: optuna.Trial) -> dict[str, Any]:
        """Draw the options."""
        params: dict[str, Any] = {}
        for name, values in self.tuned.items():
            least, _, most = values.partition("..")
            if not most:
                params[name] = trial.suggest_categorical(name, values.split(","))
            elif least.isdecimal() and most.isdecimal():
                params[name] = trial.suggest_int(name, int(least), int(most))
            else:
                params[name] = trial.suggest_float(name, float(least), float(most), log=float(least) > 0)
        return params

    def options(self, params: dict[str, Any]) -> list[str]:
        return [f"--{name}={value}" for name, value in params.items()]

    def __call__(self, trial: optuna.Trial) -> float:
        """Train, and return the last validation."""
        settings = [*self.settings, *self.options(self.suggested(trial))]
        steps = max(1, self.work // multiplications(settings, self.out)) if self.work else self.steps
        trial.set_user_attr("steps", steps)
        fixed = [f"--trainer.max_steps={steps}", f"--data.epoch_length={max(1, steps // self.validations)}"]
        fixed += ["--checkpoint.save_top_k=0", f"--trainer.default_root_dir={self.out / f'trial{trial.number}'}"]
        trainer = command_line(
            ["fit", *settings, *fixed], [PyTorchLightningPruningCallback(trial, self.monitor)]
        ).trainer
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
    parser.add_argument("--model", help="an algorithm in the place of the configuration's")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--steps", type=int, default=500, help="meta-iterations of a trial")
    parser.add_argument(
        "--equal_work", action="store_true", help="as many multiplications as STEPS of the configuration"
    )
    parser.add_argument("--validations", type=int, default=5, help="of a trial, at each of which it may be pruned")
    parser.add_argument(
        "--tune", nargs="+", default=TUNED, help="options of fit, as NAME=LEAST..MOST or NAME=CHOICE,CHOICE"
    )
    parser.add_argument("--worker", type=int, default=0, help="number among processes that share the study")
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
    # one that goes on must not draw the same again
    seed = len(study.trials) + 1000 * arguments.worker
    study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    finished = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    if sum(trial.state in finished for trial in study.trials) < arguments.trials:
        enough = MaxTrialsCallback(arguments.trials, finished)
        # a training that diverges is a bad setting, not the end of the search
        study.optimize(sweep, catch=(FloatingPointError,), callbacks=[sweep.log, enough])
    states = [trial.state.name.lower() for trial in study.trials]
    print(", ".join(f"{states.count(state)} {state}" for state in sorted({*states})))
    if "complete" in states:
        best = " ".join([f"--model={sweep.algorithm}", *sweep.options(study.best_params)])
        print(f"best {sweep.monitor} {study.best_value:.4f}: fit --config {arguments.config} {best}")
    return study


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    silence()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    main()
