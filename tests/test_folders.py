"""Folders belong to one run at a time, and ``--ckpt_path last`` to one experiment."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from conftest import RUN, TINY, fails, trainer
from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from meta_lightning import MAML, MLP, Sinusoid
from meta_lightning.checks import InputError
from meta_lightning.cli import main
from meta_lightning.runs.checkpoint_callback import Checkpoints
from meta_lightning.runs.experiment import differences
from meta_lightning.runs.folders import lock, release
from meta_lightning.runs.resume import claim_log_folders

FIT = ["fit", "--config", TINY, "--data", "Sinusoid", "--model.network", "meta_lightning.MLP"]
FIT += ["--checkpoint.monitor", "val/mse", "--checkpoint.mode", "min"]
HOLD = "import sys, pathlib; from meta_lightning.runs.folders import lock; held = lock(pathlib.Path(sys.argv[1])); "
HOLD += "print('held', flush=True); sys.stdin.read()"


class Held:
    """A folder of checkpoints that another process has locked."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-W", "ignore", "-c", HOLD, str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"

    def __enter__(self) -> None:
        pass

    def __exit__(self, *args: object) -> None:
        self.process.kill()  # as a run that dies
        self.process.communicate()


# --------------------------------------------------------------------------------------------------------- log folders


def test_runs_that_start_at_once_get_a_folder_each() -> None:
    barrier = Barrier(8)

    def start(number: int) -> list[str | int]:
        loggers: list[Any] = [TensorBoardLogger("."), CSVLogger(".")]
        versions = [logger.version for logger in loggers]  # as a profiler asks
        for logger in loggers:
            logger._version = None
        barrier.wait()
        claim_log_folders(loggers)
        assert {logger.version for logger in loggers} == {loggers[0].version}
        return [loggers[0].version, *versions]

    with ThreadPoolExecutor(8) as threads:
        claimed = [version for version, *_ in threads.map(start, range(8))]
    assert sorted(claimed) == [*range(8)]
    assert len([*Path("lightning_logs").iterdir()]) == 8


def test_a_version_of_the_user_and_other_ranks_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    named = TensorBoardLogger(".", version="mine")
    claim_log_folders([named])
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    claim_log_folders([TensorBoardLogger(".")])
    assert not Path("lightning_logs").exists()


@pytest.mark.slow
def test_two_fits_at_once_leave_two_records() -> None:
    runs = [subprocess.Popen([sys.executable, "-W", "ignore", "-m", "meta_lightning", *FIT]) for _ in range(2)]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    for version in (0, 1):
        folder = Path(f"lightning_logs/version_{version}")
        assert json.loads((folder / "fit.json").read_text())["steps"] == 4
        assert (folder / "checkpoints/last.ckpt").exists()


@pytest.mark.parametrize("args", [["--print_data"], ["--trainer.precision", "16-true"], ["--data.val_tasks", "0"]])
def test_what_does_not_run_leaves_no_folder(args: list[str]) -> None:
    with pytest.raises(SystemExit):
        main([*FIT, *args])
    assert not Path("lightning_logs").exists() or not [*Path("lightning_logs").iterdir()]


# ------------------------------------------------------------------------------------------------ folder of checkpoints


def test_one_folder_of_checkpoints_is_of_one_run_at_a_time() -> None:
    with Held(Path("kept")):
        said = fails(*FIT, "--checkpoint.dirpath", "kept")
    assert "checkpoint.dirpath must be a folder of one run at a time, got" in said
    assert "kept, in use" in said
    assert not [*Path("kept").glob("*.ckpt")]
    main([*FIT, "--checkpoint.dirpath", "kept"])  # the lock of a process that died counts no more
    assert {path.name for path in Path("kept").iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}


def test_a_lock_is_released_when_a_run_fails() -> None:
    fails(*FIT, "--checkpoint.dirpath", "kept", "--checkpoint.monitor", "val/unknown")
    main([*FIT, "--checkpoint.dirpath", "kept"])


def test_what_a_killed_run_left_of_its_first_save_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {name: Path(f"lightning_logs/version_{n}/checkpoints/last.part") for n, name in enumerate("abc")}
    for part in parts.values():
        part.parent.mkdir(parents=True)
        part.write_bytes(b"half")
    (parts["b"].parent / "best.ckpt").write_bytes(b"whole")
    (parts["a"].parents[1] / "events").write_bytes(b"a log")
    with Held(parts["c"].parent):
        parts["c"].write_bytes(b"half")  # being written
        claim_log_folders([TensorBoardLogger(".")])
        assert [part.exists() for part in parts.values()] == [False, False, True]
    assert parts["a"].parents[1].exists()
    assert (parts["b"].parent / "best.ckpt").exists()
    claim_log_folders([TensorBoardLogger(".")])
    assert not parts["c"].parents[1].exists()  # nothing else was in it


def test_an_interrupted_save_leaves_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(file: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main([*FIT, "--checkpoint.dirpath", "kept"])
    assert not Path("kept").exists() or not [*Path("kept").iterdir()]


def test_a_folder_that_is_locked_twice_is_refused() -> None:
    with Held(Path("kept")), pytest.raises(InputError, match=r"checkpoint\.dirpath .*kept, in use"):
        lock(Path("kept"))
    release(lock(Path("kept")))
    release(None)
    assert not [*Path("kept").iterdir()]


# ------------------------------------------------------------------------------------------------- the last checkpoint


def test_last_is_not_of_another_experiment(recwarn: pytest.WarningsRecorder) -> None:
    main(FIT)
    other = [*FIT, "--model", "FOMAML", "--trainer.max_steps", "6", "--ckpt_path", "last"]
    main(other)
    said = [str(warning.message) for warning in recwarn if "--ckpt_path last" in str(warning.message)]
    assert len(said) == 1
    assert (
        "version_0/checkpoints/last.ckpt of another experiment, with model.class_path FOMAML instead of MAML" in said[0]
    )
    (new,) = Path("lightning_logs/version_1").rglob("last.ckpt")
    assert torch.load(new, weights_only=True)["global_step"] == 6
    for step in (8, 9):  # each goes on with its own, though the other's is newer
        for name, version in (("MAML", 0), ("FOMAML", 1)):
            main([*other, "--model", name, "--trainer.max_steps", str(step)])
            (last,) = Path(f"lightning_logs/version_{version}").rglob("last.ckpt")
            assert torch.load(last, weights_only=True)["global_step"] == step
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("args", "option"),
    [
        (["--model", "Reptile"], "model.class_path Reptile instead of MAML"),
        (["--model.network.hidden", "[9]"], "model.network.hidden [9] instead of"),
        (["--model.inner_rule", "MetaSGD"], "model.inner_rule.class_path MetaSGD instead of SGD"),
        (["--model.head_start", "ZeroRows"], "model.head_start.class_path ZeroRows instead of LearntRows"),
        (["--data", "Glyphs", "--model.network", "meta_lightning.Conv4"], "data.class_path Glyphs instead of Sinusoid"),
    ],
)
def test_a_folder_of_another_experiment_is_refused(args: list[str], option: str) -> None:
    main([*FIT, "--checkpoint.dirpath", "kept"])
    said = fails(*FIT, *args, "--checkpoint.dirpath", "kept", "--ckpt_path", "last")
    assert "--ckpt_path last must find a checkpoint of this experiment in kept" in said
    assert option in said
    assert "choose another checkpoint.dirpath" in said


def test_a_test_of_the_last_checkpoint_needs_one() -> None:
    args = [*FIT[1:], "--ckpt_path", "last"]
    assert "got none" in fails("test", *args)
    main(FIT)
    main(["test", *args])
    assert "of another experiment" in fails("test", *args, "--model", "FOMAML")


def test_what_differs_from_the_last_checkpoint_is_said(caplog: pytest.LogCaptureFixture) -> None:
    main([*FIT, "--model.inner_lr", "0.02"])
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        main([*FIT, "--model.inner_lr", "0.03", "--trainer.max_steps", "5", "--ckpt_path", "last"])
    said = [record.message for record in caplog.records if record.message.startswith("Using ")]
    assert said == [
        f"Using {RUN / 'checkpoints/last.ckpt'}, the last checkpoint, with model.inner_lr 0.03 instead of 0.02"
    ]


# ------------------------------------------------------------------------------------------------- the best checkpoint


@pytest.mark.parametrize(("epoch_length", "said"), [(10, True), (2, False)])
def test_a_fit_without_validation_says_that_it_leaves_no_best_checkpoint(
    epoch_length: int, said: bool, recwarn: pytest.WarningsRecorder
) -> None:
    main([*FIT, "--data.epoch_length", str(epoch_length), "--trainer.num_sanity_val_steps", "0"])
    expected = "There is no best checkpoint: training ended after 4 meta-iterations, before the first validation"
    messages = [str(warning.message) for warning in recwarn]
    assert any(message.startswith(expected) and "last.ckpt has the last" in message for message in messages) == said
    assert (RUN / "checkpoints/best.ckpt").exists() != said


# -------------------------------------------------------------------------- runs that are there are left alone


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize(
    "args", [["--trainer.gradient_clip_val", "1"], ["--model.inner_lr", "-1"], ["--trainer.precision", "16-true"]]
)
@pytest.mark.parametrize("dirpath", [None, "kept"])
def test_a_refused_resume_leaves_the_run(args: list[str], dirpath: str | None) -> None:
    where = [] if dirpath is None else ["--checkpoint.dirpath", dirpath]
    main([*FIT, *where])
    (RUN / "fit.json").unlink()  # as of a run that was killed
    before = files(Path())
    fails(*FIT, *where, "--ckpt_path", "last", *args)
    after = files(Path())
    assert before.keys() <= after.keys()
    assert all(after[path] == contents for path, contents in before.items() if path.name != "config.yaml")


def test_a_run_that_is_refused_by_a_lock_does_not_touch_the_other() -> None:
    board = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "."]
    main([*FIT, *board])
    before = files(RUN)
    assert any(path.name == "metrics.csv" for path in before)
    with Held(RUN / "checkpoints"):
        assert "in use" in fails(*FIT, *board, "--ckpt_path", "last", "--model.outer_lr", "0.5")
    assert files(RUN) == before


def test_two_callbacks_may_keep_checkpoints_in_one_folder() -> None:
    second = ["--trainer.callbacks+=meta_lightning.runs.checkpoint_callback.Checkpoints"]
    second += ["--trainer.callbacks.monitor=val/loss", "--trainer.callbacks.mode=min"]
    main([*FIT, *second, "--trainer.callbacks.filename=best_loss", "--trainer.callbacks.save_last=false"])
    assert {path.name for path in (RUN / "checkpoints").iterdir()} == {
        *("best.ckpt", "best_loss.ckpt", "last.ckpt", "previous.ckpt")
    }


def test_a_name_that_is_taken_by_a_file_or_a_dangling_link_is_passed_over() -> None:
    logs = Path("lightning_logs")
    logs.mkdir()
    (logs / "version_0").symlink_to("nowhere")
    (logs / "version_1").touch()
    logger = TensorBoardLogger(".")
    claim_log_folders([logger])
    assert logger.version == 2


def test_the_last_checkpoint_is_last_though_a_copy_has_other_times() -> None:
    main(FIT)
    os.utime(RUN / "checkpoints/previous.ckpt", (2e9, 2e9))
    main([*FIT, "--trainer.max_steps", "5", "--ckpt_path", "last"])
    record = json.loads((RUN / "fit.json").read_text())
    assert record["steps"] == 5
    assert torch.load(RUN / "checkpoints/previous.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.parametrize("spelling", ["{}", "{}/", "./{}", "{}/../{}", "link"])
def test_a_root_may_be_spelt_otherwise(spelling: str, tmp_path: Path) -> None:
    config = Namespace(data=Namespace(class_path="a.B", init_args=Namespace(root=spelling.format("photos", "photos"))))
    Path("photos").mkdir()
    Path("link").symlink_to("photos")
    hparams = {"_class_path": "meta_lightning.B", "root": str(tmp_path / "photos")}
    assert not differences({"datamodule_hyper_parameters": hparams}, config)
    Path("others").mkdir()
    hparams["root"] = "others"
    assert differences({"datamodule_hyper_parameters": hparams}, config)


def test_equal_values_are_no_difference() -> None:
    config = Namespace(model=Namespace(class_path="a.B", init_args=Namespace(dropout=0, shape=[1, 2], new=True)))
    checkpoint = {"hyper_parameters": {"_class_path": "c.B", "dropout": 0.0, "shape": (1, 2)}}
    assert not differences(checkpoint, config)


def test_a_trial_run_begins_anew() -> None:
    main(FIT)
    before = files(Path())
    main([*FIT, "--ckpt_path", "last", "--trainer.fast_dev_run", "true"])
    assert files(Path()) == before


def test_a_callback_that_has_saved_another_training_is_refused() -> None:
    """Lightning's ranks the second one against the first, and saves no step twice."""
    callback = Checkpoints("kept", monitor="val/mse", mode="min")

    def fit(max_steps: int, path: str | None = None) -> None:
        options = {"callbacks": [callback], "enable_checkpointing": True, "num_sanity_val_steps": 0}
        data = Sinusoid(epoch_length=2, meta_batch_size=2, val_tasks=2)
        trainer(max_steps=max_steps, **options).fit(MAML(MLP(hidden=[8]), inner_steps=1), data, ckpt_path=path)

    fit(2)
    with pytest.raises(InputError, match=r"callbacks must hold new Checkpoints .*kept/last\.ckpt"):
        fit(2)
    fit(4, "kept/last.ckpt")
