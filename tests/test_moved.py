"""Import paths of version 0.1."""

import importlib
import sys
from pathlib import Path

import pytest

import meta_lightning
from meta_lightning.moved import MOVED

# what README, notebooks and benchmarks of version 0.1 imported
USED = {
    "checkpoints": ["Checkpoints"],
    "comparison.command": ["NAMES"],
    "comparison.report": ["cells_of", "markdown"],
    "comparison.runs": ["Run", "complete"],
    "comparison.summary": ["summarise"],
    "data.show": ["draw_task"],
    "inner_loop": ["Params"],
    "loading": ["MetaBatches"],
    "losses": ["Loss", "default_loss", "score"],
    "machine": ["MEGABYTE", "PeakMemory", "commit", "keep_freed_memory", "machine", "processor", "versions"],
    "metrics": ["TaskMean"],
    "resnet": ["ResNet12"],
    "restoring": ["load_learner"],
    "run_record": ["finite"],
    "tasks": ["FewShotTasks", "TaskBatch", "TaskSet", "as_task_batch", "import_learn2learn", "scale_pixels"],
}


@pytest.mark.parametrize("former", MOVED)
def test_a_former_path_warns_and_has_the_names_of_the_present_one(former: str) -> None:
    sys.modules.pop(f"meta_lightning.{former}", None)
    with pytest.warns(DeprecationWarning, match=f"meta_lightning.{former} is now meta_lightning.{MOVED[former][0]}"):
        module = importlib.import_module(f"meta_lightning.{former}")
    for now in MOVED[former]:
        present = vars(importlib.import_module(f"meta_lightning.{now}"))
        assert {name for name in present if not name.startswith("__")} <= vars(module).keys()
    assert all(hasattr(module, name) for name in USED.get(former, []))


def test_what_was_used_is_what_is_mapped() -> None:
    assert USED.keys() <= MOVED.keys()


@pytest.mark.filterwarnings("ignore:meta_lightning.tasks is now:DeprecationWarning")
def test_a_class_is_the_same_by_both_paths() -> None:
    from meta_lightning.tasks import TaskBatch  # type: ignore[import-not-found]

    assert TaskBatch is meta_lightning.TaskBatch


def test_what_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"meta_lightning\.inner_lop"):
        importlib.import_module("meta_lightning.inner_lop")


def test_the_upgrading_guide_lists_them_all() -> None:
    page = (Path(__file__).parents[1] / "docs" / "upgrading.md").read_text()
    for former, now in MOVED.items():
        listed = ", ".join(f"`meta_lightning.{name}`" for name in now)
        assert f"| `meta_lightning.{former}` | {listed} |\n" in page
