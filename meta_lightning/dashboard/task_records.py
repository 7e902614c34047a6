"""What the dashboard's figures are drawn from: what happened to the tasks of one validation or test."""

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from matplotlib.figure import Figure
from torch import Tensor

from meta_lightning import inner_loop
from meta_lightning.algorithms import MetaLearner
from meta_lightning.algorithms.learner import Support
from meta_lightning.dashboard.figures import PicturedTask, draw_curves, draw_groups, draw_tasks
from meta_lightning.data.glyph_drawings import alphabet_of
from meta_lightning.losses import score
from meta_lightning.metrics import TaskMean
from meta_lightning.tasks import TaskBatch


class TaskRecord:
    """Adaptation curves, a few tasks and the accuracy by class, gathered batch by batch, of this process alone.

    Args:
        name: What the tasks are, for the titles.
        curve_tasks: Tasks behind the adaptation curves.
        pictured_tasks: Tasks in the picture of tasks.
    """

    def __init__(self, name: str, curve_tasks: int, pictured_tasks: int) -> None:
        self.name = name
        self.curve_tasks = curve_tasks
        self.pictured_tasks = pictured_tasks
        self.curves: dict[str, list[TaskMean]] = {}
        self.pictured: list[PicturedTask] = []
        self.groups: dict[str, TaskMean] = {}
        self.seen = 0
        self.ways = 0

    def add_adaptation(self, learner: MetaLearner, batch: TaskBatch, class_names: Sequence[list[str]]) -> None:
        """Adapt to the tasks of a batch, as many as are still wanted, and note each step's predictions."""
        batch = TaskBatch(*(part[: self.curve_tasks - self.seen] for part in batch))
        tasks = len(batch.query_y)
        if not tasks:
            return
        self.seen += tasks
        with isolate_rng():
            predictions = predictions_by_step(learner, batch)
        for step, of_step in enumerate(predictions.unbind(1)):
            values = {"loss": learner.task_losses(of_step, batch.query_y)} | score(of_step, batch.query_y)
            for name, of_tasks in values.items():
                self.curves.setdefault(name, [])
                if step == len(self.curves[name]):
                    self.curves[name].append(TaskMean(sync_on_compute=False))
                self.curves[name][step].update(of_tasks.cpu())
        for task in range(min(self.pictured_tasks - len(self.pictured), tasks)):
            parts = TaskBatch(*(part[task].cpu() for part in batch))
            first, last = (predictions[task, step].cpu() for step in (0, -1))
            self.pictured.append(PicturedTask(parts, first, last, class_names[task], learner.form.ink))

    def add_answers(self, predictions: Tensor, query_y: Tensor, class_names: Sequence[list[str]]) -> None:
        """Note how many queries of each class, or of each alphabet, were right.  # T R N, T R"""
        if query_y.is_floating_point() or query_y.ndim != 2 or predictions.ndim != 3:
            return
        right = (predictions.argmax(2) == query_y).cpu().double()
        for of_task, targets, names in zip(right, query_y.cpu(), class_names, strict=True):
            groups = [group_of(name) for name in names]
            self.ways = len(groups)
            for group in sorted({*groups}):
                members = torch.tensor([n for n, other in enumerate(groups) if other == group])
                queries = torch.isin(targets, members)
                self.groups.setdefault(group, TaskMean(sync_on_compute=False)).update(
                    of_task[queries].mean(0, keepdim=True)
                )

    def figures(self) -> dict[str, Figure]:
        """The figures by name; those that these tasks cannot give are left out."""
        figures = {}
        if self.curves:
            # the order in which the values are read, whatever the score
            curves = {name: [mean.compute() for mean in self.curves[name]] for name in sorted(self.curves)}
            title = f"{self.name}, {self.seen} tasks, 95 % confidence"
            figures["adaptation"] = draw_curves(curves, title)
        if self.pictured and (drawn := draw_tasks(self.pictured)):
            figures["answers"] = drawn  # "tasks" is a scalar, whose tag they would hide
        if self.groups:
            groups = {name: mean.compute() for name, mean in self.groups.items()}
            figures["classes"] = draw_groups(groups, f"{self.name}, after adaptation", 1 / self.ways)
        return figures


def predictions_by_step(learner: MetaLearner, batch: TaskBatch) -> Tensor:
    """Predictions of every task's queries after 0, 1, …, K inner steps, K being ``test_inner_steps``.

    It costs K inner steps, as an evaluation does, and K + 1 passes of the queries, where that has 2.

    Args:
        learner: A learner in evaluation mode.
        batch: Tasks, with pixels scaled to [0, 1].

    Returns:
        The predictions.  # T K+1 R ...
    """

    def predict(support: Support, support_x: Tensor, query_x: Tensor) -> tuple[tuple[()], Tensor]:
        optimizer, state = learner.inner_optimizer()
        params = inner_loop.stack(learner.meta_parameters(), len(query_x))
        with torch.no_grad():
            predictions = [learner.forward_queries(params, support_x, query_x, learner.transductive)]
        for samples in support:
            losses = learner.support_losses([samples])
            start = inner_loop.leaves(params)
            params, _, state = inner_loop.adapt(losses, start, 1, optimizer, state, learner.adapted(start))
            with torch.no_grad():
                predictions.append(learner.forward_queries(params, support_x, query_x, learner.transductive))
        return (), torch.stack(predictions, dim=1)

    _, predictions = learner.in_evaluation_passes(predict, batch)
    return predictions.detach()  # type: ignore[no-any-return]


def group_of(class_name: str) -> str:
    """A class's alphabet, or the folder that it lies in, where its name begins with that; else the class itself."""
    folder, found, _ = class_name.rpartition("/")
    return folder if found else alphabet_of(class_name).title() or class_name
