"""learn2learn supplies the tasks where it is installed; where it is not, the tasks are the same."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from without_learn2learn import drawn, task_sets

import meta_lightning
from meta_lightning import CIFARFS, FC100, MiniImagenet, Omniglot
from meta_lightning.checks import InputError
from meta_lightning.cli import main
from meta_lightning.data.tasks import SPLITS, FewShotTasks, import_learn2learn

DOCUMENTED = pytest.mark.skipif(sys.version_info >= (3, 13), reason="requirements.txt leaves learn2learn out")


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "learn2learn", None)


def test_resumed_tested_and_drawn_without_it_as_with_it(tmp_path: Path) -> None:
    def weights(path: str) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = torch.load(tmp_path / path, weights_only=True)["state_dict"]
        return state

    def of_tasks(folder: str) -> dict[str, list[float]]:
        (path,) = (tmp_path / folder).rglob("test.json")
        figures: dict[str, list[float]] = json.loads(path.read_text())["of_tasks"]
        return figures

    for steps in (2, 4):
        at = f"--trainer.max_steps={steps} --trainer.default_root_dir=with{steps} --checkpoint.dirpath=kept{steps}"
        main(["fit", "--config", TINY, *at.split()])
    script = Path(__file__).with_name("without_learn2learn.py")
    command = [sys.executable, str(script), "kept2/last.ckpt", "kept4/last.ckpt"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == drawn()
    theirs, ours = weights("kept/last.ckpt"), weights("kept4/last.ckpt")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    main(["test", "--ckpt_path", "kept/last.ckpt", "--trainer.default_root_dir=here"])
    assert of_tasks("here") == of_tasks("tested")
    assert len(of_tasks("here")["test/accuracy"]) == 5
    # nor is there metadata of an installed package, as in a checkout on the path
    for path in (tmp_path / "resumed").rglob("fit.json"), (tmp_path / "tested").rglob("test.json"):
        (record,) = (json.loads(p.read_text()) for p in path)
        assert record["versions"]["meta-lightning"] == meta_lightning.__version__
        assert "learn2learn" not in record["versions"]


@DOCUMENTED
@pytest.mark.usefixtures("glyphs")
def test_every_task_goes_through_its_taskset(monkeypatch: pytest.MonkeyPatch) -> None:
    data, described, batched = import_learn2learn().data, [], []

    class Noted(data.Taskset):  # type: ignore[misc]
        def sample_task_description(self) -> list[Any]:
            described.append(self.dataset)
            descriptions: list[Any] = super().sample_task_description()
            return descriptions[::-1]

    batch = FewShotTasks.batch

    def noted(self: FewShotTasks, tasks: Sequence[int]) -> Any:
        batched.extend(tasks)
        return batch(self, tasks)

    monkeypatch.setattr(data, "Taskset", Noted)
    drawn()
    assert len(described) == 4 * 40
    for tasks in task_sets():
        assert tasks.rows(tasks.rng(1)) == tasks.draw(tasks.rng(1), tasks.most_ways)[::-1]  # what it says is taken
    described.clear()
    monkeypatch.setattr(FewShotTasks, "batch", noted)
    main(["fit", "--config", TINY, "--data.num_workers", "0"])
    assert len(described) == len(batched) >= 4 * 2 + 3
    assert all(isinstance(dataset, data.MetaDataset) for dataset in described)


@DOCUMENTED
def test_the_documented_set_up_has_it() -> None:
    assert importlib.util.find_spec("learn2learn") is not None


@pytest.mark.usefixtures("hidden")
def test_data_sets_that_it_reads_say_how_to_get_it(tmp_path: Path) -> None:
    for path in MiniImagenet.files:
        (tmp_path / path).touch()
    how = r"learn2learn must be installed .*pip install learn2learn==0\.2\.0 --config-settings"
    with pytest.raises(InputError, match=how):
        MiniImagenet(str(tmp_path), cache_dir=str(tmp_path)).prepare_data()
    for kind in (FC100, Omniglot):
        with pytest.raises(OSError, match=rf"{kind.title} could not be downloaded .*{how}"):
            kind(str(tmp_path), download=True, cache_dir=str(tmp_path)).prepare_data()


@pytest.mark.usefixtures("hidden")
def test_cifar_fs_is_read_without_it(tmp_path: Path) -> None:
    folder, drawings = tmp_path / "cifarfs" / "cifar100", {}
    (folder / "splits" / "bertinetto").mkdir(parents=True)
    for label, split in enumerate(SPLITS):
        (folder / "splits" / "bertinetto" / f"{split}.txt").write_text(f"{split}-b\n{split}-a\n")
        for name in (f"{split}-a", f"{split}-b"):
            (folder / "data" / name).mkdir(parents=True)
            for i in range(2 + label):
                drawings[name, i] = np.random.default_rng(len(drawings)).integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(drawings[name, i]).save(folder / "data" / name / f"{i}.png")
    read = CIFARFS(str(tmp_path)).build()
    assert read.classes.tolist() == [f"{split}-{letter}" for split in SPLITS for letter in "ab"]
    assert read.labels.tolist() == [0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5]
    assert np.array_equal(read.images.transpose(0, 2, 3, 1), np.stack([*drawings.values()]))
