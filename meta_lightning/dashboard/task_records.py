"""Results of the tasks of one validation or test, from which the dashboard draws its figures."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from matplotlib.figure import Figure
from torch import Tensor

from meta_lightning.algorithms.meta_learner import MetaLearner
from meta_lightning.dashboard.curves import PicturedTask, draw_curves, draw_groups, draw_tasks
from meta_lightning.data.tasks import TaskBatch
from meta_lightning.inner.params import tree_map
from meta_lightning.inner.samples import Samples, length, padded_with, valid
from meta_lightning.scores import TaskMean


class TaskRecord:
    """Adaptation curves, a few tasks and the accuracy per class, collected batch by batch in this process."""

    def __init__(self, name: str, curve_tasks: int, pictured_tasks: int) -> None:
        self.name = name
        self.curve_tasks = curve_tasks
        self.pictured_tasks = pictured_tasks
        self.curves: dict[str, list[TaskMean]] = defaultdict(list)
        self.pictured: list[PicturedTask] = []
        self.groups: dict[str, TaskMean] = defaultdict(lambda: TaskMean(sync_on_compute=False))
        self.seen = 0
        self.ways = 0

    def add_adaptation(self, learner: MetaLearner, batch: TaskBatch, class_names: Sequence[list[str]]) -> None:
        """Adapt to tasks of a batch, up to ``curve_tasks`` in all, and record the predictions after each step."""
        batch = tree_map(lambda t: t[: self.curve_tasks - self.seen], batch)
        tasks = length(batch.query_y)
        if not tasks:
            return
        self.seen += tasks
        with isolate_rng():
            by_step = learner.answers(batch, each_step=True, first=learner.evaluation.first)
        for step, of_step in enumerate(by_step):
            for name, of_tasks in learner.query_scores(of_step, batch.query_y).items():
                if step == len(self.curves[name]):
                    self.curves[name].append(TaskMean(sync_on_compute=False))
                self.curves[name][step].update(of_tasks.cpu())
        for task in range(min(self.pictured_tasks - len(self.pictured), tasks)):
            own = tree_map(lambda t, task=task: t[task].detach().cpu(), batch)
            parts = TaskBatch(*map(valid, own))
            answers = tree_map(lambda t, task=task: t[task].detach().cpu(), [by_step[0], by_step[-1]])
            first, last = (valid(padded_with(answer.predictions, own.query_y)) for answer in answers)
            self.pictured.append(PicturedTask(parts, first, last, class_names[task], learner.form.ink))

    def add_answers(self, predictions: Samples, query_y: Samples, class_groups: Sequence[list[str]]) -> None:
        """Record the accuracy on the queries of each group of classes.  # T R N, T R"""
        tensors = isinstance(query_y, Tensor) and isinstance(predictions, Tensor)
        if not tensors or query_y.is_floating_point() or query_y.ndim != 2 or predictions.ndim != 3:
            return
        right = (predictions.argmax(2) == query_y).cpu().double()
        for of_task, targets, groups in zip(right, query_y.cpu(), class_groups, strict=True):
            self.ways = len(groups)
            for group in sorted({*groups}):
                members = torch.tensor([n for n, other in enumerate(groups) if other == group])
                self.groups[group].update(of_task[torch.isin(targets, members)].mean(0, keepdim=True))

    def figures(self) -> dict[str, Figure]:
        """The figures by name; those that do not apply to these tasks are left out."""
        figures = {}
        if self.curves:
            curves = {name: [mean.compute() for mean in self.curves[name]] for name in sorted(self.curves)}
            figures["adaptation"] = draw_curves(curves, f"{self.name}, {self.seen} tasks, 95 % confidence")
        if self.pictured and (drawn := draw_tasks(self.pictured)):
            figures["answers"] = drawn  # not "tasks", which is the tag of a scalar
        if self.groups:
            groups = {name: mean.compute() for name, mean in self.groups.items()}
            figures["classes"] = draw_groups(groups, f"{self.name}, after adaptation", 1 / self.ways)
        return figures


def predictions_by_step(learner: MetaLearner, batch: TaskBatch) -> Tensor:
    """Query predictions of each task after 0, 1, …, ``test_inner_steps`` inner steps.  # T K+1 R ..."""
    return torch.stack(learner.predict_tasks(batch, each_step=True), dim=1).detach()
