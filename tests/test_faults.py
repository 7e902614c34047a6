"""What goes wrong outside of the program: one sentence, and nothing lost."""

import errno
import os
import random
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RUN, fails, trainer

from meta_lightning import MAML, MLP, Sinusoid
from meta_lightning.cli import main
from meta_lightning.runs.checkpoint_file import STATE

TINY = str(Path(__file__).parent / "tiny.yaml")
SINUSOID = ["--config", TINY, "--data", "Sinusoid", "--data.val_tasks", "3", "--model.network", "meta_lightning.MLP"]
SINUSOID += ["--checkpoint.monitor", "val/mse", "--checkpoint.mode", "min"]
LAST, PREVIOUS = RUN / "checkpoints/last.ckpt", RUN / "checkpoints/previous.ckpt"


def step_of(path: Path) -> int:
    """The step of a checkpoint, which must be whole."""
    step: int = torch.load(path, weights_only=True)["global_step"]
    return step


@pytest.mark.parametrize("write", [1, 2, 3, 4])
def test_a_full_disk(write: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, writes = os.fsync, []

    def full(file: int) -> None:
        writes.append(file)
        if len(writes) == write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    said = fails("fit", *SINUSOID)
    assert re.search(r"No space left on device\b.*checkpoint.*'.*\.ckpt", said)
    kept = {path.name: step_of(path) for path in (RUN / "checkpoints").iterdir()}
    # best and last after 2 steps, then after 4
    assert kept == [{}, {"best.ckpt": 2}, {"best.ckpt": 2, "last.ckpt": 2}, {"best.ckpt": 4, "last.ckpt": 2}][write - 1]


@pytest.mark.parametrize("kilobytes", [1, 30])
def test_a_disk_that_takes_no_more_of_a_file(kilobytes: int, tmp_path: Path) -> None:
    """The operating system refuses: the first limit is met by the logs, the second by the checkpoint."""
    main(["fit", *SINUSOID])
    before = {path: path.read_bytes() for path in (LAST, PREVIOUS)}
    # with the dashboard's pictures the logs would meet the second limit as well
    command = [sys.executable, "-m", "meta_lightning", "fit", *SINUSOID, "--ckpt_path", "last"]
    command += ["--dashboard.enabled", "false"]
    limit = (kilobytes * 1024,) * 2
    run = subprocess.run(
        [*command, "--trainer.max_steps", "60"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert run.returncode == 1
    # within a line too: at the first limit TensorBoard's own thread writes its traceback meanwhile
    assert re.search(r"\berror: .*File too large", run.stderr), run.stderr
    assert {path: path.read_bytes() for path in before} == before
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("folder", ["--trainer.default_root_dir", "--checkpoint.dirpath"])
def test_a_folder_that_cannot_be_made(folder: str) -> None:
    Path("file").touch()
    assert "Not a directory" in fails("fit", *SINUSOID, folder, "file/logs")


def test_a_truncated_checkpoint_is_refused_and_the_one_before_it_offered() -> None:
    main(["fit", *SINUSOID])
    whole = LAST.read_bytes()
    rng = random.Random(0)
    for size in [0, *(rng.randrange(len(whole)) for _ in range(10))]:
        LAST.write_bytes(whole[:size])
        for path in ("last", str(LAST)):
            said = fails("fit", *SINUSOID, "--ckpt_path", path)
            assert re.search(rf"ckpt_path .*{LAST}, .*; .* \S+\.ckpt$", said)
        offered = said.rpartition(" ")[2]
        assert step_of(Path(offered)) in (2, 4)
    main(["fit", *SINUSOID, "--ckpt_path", offered, "--trainer.max_steps", "6"])
    assert not Path("lightning_logs/version_1").exists()


def test_the_run_goes_on_from_the_checkpoint_before() -> None:
    main(["fit", *SINUSOID])
    LAST.unlink()
    main(["fit", *SINUSOID, "--ckpt_path", "last", "--trainer.max_steps", "6"])
    assert [step_of(LAST), step_of(PREVIOUS)] == [6, 4]


@pytest.mark.parametrize("key", ["state_dict", *STATE])
def test_a_checkpoint_that_lacks_something(key: str) -> None:
    main(["fit", *SINUSOID])
    checkpoint = torch.load(LAST, weights_only=True)
    del checkpoint[key]
    torch.save(checkpoint, LAST)
    written = LAST.read_bytes()
    held = "parameters" if key == "state_dict" else "training"
    version = checkpoint["pytorch-lightning_version"]
    said = fails("fit", *SINUSOID, "--ckpt_path", "last")
    if key != "state_dict":
        main(["test", "--ckpt_path", str(LAST), "--trainer.accelerator", "cpu", "--data.test_tasks", "2"])
    assert re.search(rf"ckpt_path .*\b{held}\b.*{LAST} .*\b{key}, .*Lightning {re.escape(version)}", said)
    assert LAST.read_bytes() == written


def test_a_parameter_is_missing() -> None:
    main(["fit", *SINUSOID])
    checkpoint = torch.load(LAST, weights_only=True)
    del checkpoint["state_dict"]["network.head.bias"]
    torch.save(checkpoint, LAST)
    config = (RUN / "config.yaml").read_bytes()
    said = fails("fit", *SINUSOID, "--ckpt_path", "last", "--model.inner_lr", "0.5")
    assert re.search(r"checkpoint .*network\.head\.bias: .*\(1,\), .*None", said)
    assert (RUN / "config.yaml").read_bytes() == config


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.network.in_features", "3"], r"network .*in_features 3\b.*\(1,\)"),
        (["--checkpoint.monitor", "val/accuracy"], r"checkpoint\.monitor .* val/accuracy"),
    ],
)
def test_what_is_refused_leaves_nothing(args: list[str], message: str) -> None:
    assert re.search(message, fails("fit", *SINUSOID, *args))
    assert not RUN.exists()


def test_the_best_score_so_far_goes_on_elsewhere() -> None:
    """A checkpoint that is not the last begins a folder of its own, but not a best of its own."""
    # "tasks" is the same at each validation, so that none is better than the first
    same: list[Any] = [*SINUSOID, "--checkpoint.monitor", "val/tasks", "--checkpoint.mode", "max"]
    main(["fit", *same])
    best = RUN / "checkpoints/best.ckpt"
    main(["fit", *same, "--ckpt_path", str(best), "--trainer.max_steps", "6"])
    elsewhere = Path("lightning_logs/version_1/checkpoints")
    assert {path.name: step_of(path) for path in elsewhere.iterdir()} == {"last.ckpt": 6, "previous.ckpt": 4}
    (state,) = (
        value
        for key, value in torch.load(elsewhere / "last.ckpt", weights_only=True)["callbacks"].items()
        if "Checkpoints" in key
    )
    assert Path(state["best_model_path"]) == best.absolute()
    assert step_of(best) == 2


# --------------------------------------------------------------------------------------------- errors of the program


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", str(Path(sys.prefix, "lib/template.txt"))),
        FileNotFoundError(errno.ENOENT, "No such file or directory", str(Path(torch.__file__).parent / "a.so")),
        OSError("what another package says"),
        TimeoutError(errno.ETIMEDOUT, "Connection timed out"),
    ],
)
def test_an_error_of_the_program_shows_where_it_comes_from(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr("meta_lightning.Sinusoid.task_set", fail)
    with pytest.raises(type(error), match=re.escape(str(error.args[-1]))):
        main(["fit", *SINUSOID])


def test_an_error_about_a_file_of_the_user_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(Path("data.csv").resolve()))

    monkeypatch.setattr("meta_lightning.Sinusoid.task_set", fail)
    assert "Permission denied" in fails("fit", *SINUSOID)
    assert "root must hold" in fails("fit", "--config", TINY, "--data", "ImageFolderTasks", "--data.root", "nowhere")


def test_memory_is_kept_by_the_command_line_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("meta_lightning.runs.machine.glibc", lambda *args: calls.append(args))
    sinusoid = Sinusoid(meta_batch_size=2, epoch_length=2, val_tasks=2)
    trainer(max_steps=1).fit(MAML(MLP(hidden=[8]), inner_steps=1), sinusoid)
    assert not calls
    main(["fit", *SINUSOID])
    assert ("mallopt", -4, 0) in calls
