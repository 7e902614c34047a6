"""Base class of the algorithms: adaptation, training, evaluation and checkpoints."""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, Self, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric

from meta_lightning.adaptation.adapt import adapt_to
from meta_lightning.adaptation.partitions import combined, partitions, samples_of, shares
from meta_lightning.adaptation.predictor import Predictor
from meta_lightning.adaptation.program import save_adaptation
from meta_lightning.adaptation.surgery import in_evaluation, rebuildable
from meta_lightning.checks import (
    UNSUPPORTED,
    NamedOptions,
    from_command_line,
    plain,
    require,
    require_at_least,
    require_matches,
    require_not_compiled,
    require_own_options,
    require_positive,
    require_supported,
)
from meta_lightning.data.form import SampleForm, form_of
from meta_lightning.data.module import ClassificationTasks, TaskDataModule
from meta_lightning.data.tasks import Array, TaskBatch, as_task_batch, nest_of, scale_pixels
from meta_lightning.inner.copies import Original, copied, tensors_in
from meta_lightning.inner.heads import ComputedRows, HeadStart, LearntRows, ways_of
from meta_lightning.inner.loop import Adapted, InnerStep, Support, trajectory
from meta_lightning.inner.params import (
    HEAD,
    RULE,
    Params,
    leaves,
    of_network,
    stack,
    tree_leaves,
    tree_map,
    unstack,
    with_prefix,
    without_prefix,
)
from meta_lightning.inner.passes import Compile, Passes
from meta_lightning.inner.rules import FORMER_KEYS, SGD, InnerRule, require_prepared
from meta_lightning.inner.samples import (
    Output,
    Padded,
    Samples,
    call,
    class_numbers,
    first_task,
    is_real,
    length,
    one_task,
    padded_with,
)
from meta_lightning.inner.state import identity, release, setting, unchanged
from meta_lightning.inner.task_loss import TaskLoss
from meta_lightning.inner.task_network import Loss, TaskNetwork, default_loss, ignored_class
from meta_lightning.inner.traits import refuses_classes
from meta_lightning.networks.batch_statistics import (
    forget_statistics,
    freeze_statistics,
    frozen_modules,
    with_batch_statistics,
)
from meta_lightning.outer.update import (
    Decay,
    OuterOptimizer,
    OuterUpdate,
    Scheduler,
    advance,
    is_finite,
    mean_over_ranks,
)
from meta_lightning.random_states import kept_random_states
from meta_lightning.runs.checkpoint_file import load_network, network_description, renamed, verify_checkpoint
from meta_lightning.runs.ensemble import State, each_of, mean_prediction
from meta_lightning.scores import Evaluation, Scores

TO_ADAPT = "with requires_grad that inner_freeze or outer_freeze leaves"


class Answers(NamedTuple):
    """What tasks answer to their queries."""

    predictions: Samples  # T R ...
    losses: Tensor  # T, of a TaskLoss; of other losses, which follow from predictions, T 0


class MetaLearner(NamedOptions, L.LightningModule, ABC):
    """Base class of the algorithms, which learn an initialisation θ that adapts to a task in a few gradient steps.

    Subclasses implement ``training_step``.

    Args:
        network: Module from samples ``S …`` to predictions ``S …``. Its parameters with ``requires_grad`` are θ. Its
            batch norm uses batch statistics; in frozen modules, none of whose parameters are trained, its own. Samples
            may be nests of dicts and tuples of tensors; a dict whose keys all are parameters of ``forward`` is passed
            as keywords.
        loss: Function or module from predictions and targets of one task to a scalar, or a ``TaskLoss``. Default:
            cross-entropy for integer targets, mean squared error for floating-point targets.
        output: Function from what the network returns to predictions. Default: the attribute ``logits`` if there is
            one, as of the model outputs of Hugging Face, else what it returns.
        test_inner_steps: Inner steps in validation, test and prediction. Default: ``inner_steps``.
        inner_rule: Rule of the inner steps: ``SGD`` (default), ``MetaSGD``, ``LSLR``, ``Adam`` or a custom
            ``InnerRule``.
        head_start: Rows with which the last linear layer starts a task: ``LearntRows``, ``ZeroRows``, ``OneVector``,
            ``Prototypes`` or a custom ``ComputedRows``. With all but the first, tasks may have any number of classes.
            Default: the first; of ProtoNet and Baseline ``Prototypes``.
        inner_freeze: Name patterns of parameters that the inner loop does not update: ``features.*`` adapts the head
            only (ANIL, Raghu et al., 2020, https://arxiv.org/abs/1909.09157), ``head.*`` the body only (BOIL, Oh et
            al., 2021, https://arxiv.org/abs/2008.08882).
        outer_freeze: Name patterns of parameters that the outer loop does not update.
        optimizer: Outer optimizer, called with the parameters and ``outer_lr``; Reptile has none.
        outer_lr_decay: Decay of ``outer_lr`` to zero over the training: none, linear, or half a cosine.
        scheduler: Scheduler of ``outer_lr`` in place of ``outer_lr_decay``: any step-count scheduler of
            ``torch.optim.lr_scheduler``. It steps once per meta-iteration.
        tasks_per_pass: Tasks of a meta-batch that are computed at once; affects time, memory and dropout masks only.
            Default: on a CPU as many as fit into its caches, elsewhere all; halved on OOM.
        compile_passes: ``"record"`` records the kernels of a training pass once and replays them: on a GPU as a CUDA
            graph, many times faster for small networks; on a CPU without the cost of Python, autograd and ``vmap``. The
            numbers stay the same. ``True`` also compiles them with ``torch.compile``: affects time, rounding and
            dropout masks only, takes seconds to minutes, and needs a C++ compiler or, on a GPU, Triton. ``"auto"``
            records passes after the first 20 of their shapes. Those of evaluation are recorded too, on a CPU.
            Where passes are recorded or compiled, the network and loss must be functions of their inputs, parameters
            and buffers. A record is compared with the pass as it is at its replays 1, 2, 4, 8, …; where they differ it
            is no longer used, with a warning. Other effects of their Python code happen only where it runs as it is.
        transductive: Whether evaluation predicts all queries of a task in one batch, which share batch-norm statistics
            (Finn et al., 2017), or each query with the support set only (Nichol et al., 2018, section 6.1).
        init_from: Checkpoint, of any algorithm, to load the network's weights from.
        max_skipped: Maximum number of consecutive meta-iterations skipped because their update is not finite; beyond
            it, training stops with an error, if they go on until the next log interval.
        metrics: Metrics of torchmetrics by name, such as ``{"f1": MulticlassF1Score(5)}``. They are computed per task
            from the query predictions and targets, and logged as means over tasks, beside the accuracy (class numbers)
            or mse (real targets).

    Raises:
        InputError: If an argument is outside its range.
    """

    second_order: ClassVar[bool] = False  # whether training differentiates through the inner gradients
    depends_on_start: ClassVar[bool] = False  # whether the inner losses depend on θ'_0
    greatest_outer_lr: ClassVar[float] = math.inf
    train_labels: ClassVar[str] = "task"  # what class numbers of training count, see ClassificationTasks
    default_head_start: ClassVar[type[HeadStart]] = LearntRows
    unsupported: ClassVar[Mapping[type[L.Callback], str]] = UNSUPPORTED  # callbacks, and why

    def __init__(
        self,
        network: nn.Module,
        loss: Loss | None = None,
        *,
        output: Output | None = None,
        inner_lr: float,
        inner_steps: int,
        outer_lr: float,
        test_inner_steps: int | None = None,
        inner_rule: InnerRule | None = None,
        head_start: HeadStart | None = None,
        inner_freeze: Sequence[str] = (),
        outer_freeze: Sequence[str] = (),
        optimizer: OuterOptimizer | None = None,
        outer_lr_decay: Decay = "constant",
        scheduler: Scheduler | None = None,
        tasks_per_pass: int | None = None,
        compile_passes: Compile = "auto",
        transductive: bool = True,
        init_from: str | None = None,
        max_skipped: int = 10,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        super().__init__()
        # in Python these are objects, which cannot be loaded with weights_only; configurations describe them in plain
        # values. init_from is not needed, as the checkpoint has the weights
        described = {"inner_rule": inner_rule, "head_start": head_start}
        objects = ["network", "loss", "output", "optimizer", "scheduler", "metrics", *described]
        objects = [] if from_command_line() else objects
        self.save_hyperparameters(ignore=["init_from", *objects])
        # NumPy's scalars, of np.logspace for example, do not load with weights_only
        self.hparams.update({name: v.item() for name, v in self.hparams.items() if isinstance(v, np.generic)})
        if (described_network := network_description(self.hparams)) is not None:
            self.hparams["network"] = rebuildable(described_network)
        inner_lr, outer_lr = plain(inner_lr), plain(outer_lr)
        rule, head = InnerRule.of(inner_rule, SGD), HeadStart.of(head_start, self.default_head_start)
        if objects:
            parts = {part.argument: part.description() for part in (rule, head) if described[part.argument] is not None}
            self.save_hyperparameters(parts)
        test_inner_steps = inner_steps if test_inner_steps is None else test_inner_steps
        require_positive(inner_lr=inner_lr, outer_lr=outer_lr)
        most = self.greatest_outer_lr
        require(outer_lr <= most, f"outer_lr of {type(self).__name__} must be in (0, {most:g}], got {outer_lr}")
        require_at_least(1, inner_steps=inner_steps, test_inner_steps=test_inner_steps)
        for argument, part in (("loss", loss), ("output", output)):
            own = part.named_parameters() if isinstance(part, nn.Module) else ()
            learnt = [name for name, p in own if p.requires_grad]
            expected = f"{argument} must have no trainable parameters, which belong into the network"
            require(not learnt, f"{expected}, got {learnt}")
        require_not_compiled(network=network, loss=loss)
        self.automatic_optimization = False
        self.inner_lr, self.inner_steps, self.test_inner_steps = inner_lr, inner_steps, test_inner_steps
        self.outer_lr, self.optimizer = outer_lr, optimizer
        self.transductive = transductive
        self.loss, self.output = loss or default_loss, output
        # also those without gradient, which a callback may unfreeze
        names = {name: p.requires_grad for name, p in network.named_parameters()}
        trained = {name for name, requires_grad in names.items() if requires_grad}
        self.inner_frozen = require_matches(names, inner_freeze=inner_freeze)
        self.outer_frozen = require_matches(names, outer_freeze=outer_freeze)
        for argument, frozen in (("inner_freeze", self.inner_frozen), ("outer_freeze", self.outer_frozen)):
            require(not trained or bool(trained - frozen), f"{argument} must leave a parameter, got patterns of all")
        of_loops = [p for name, p in network.named_parameters() if name in trained - self.fixed]
        self.network, self.original = with_batch_statistics(network, of_loops), Original(network)
        # also of those that a callback unfreezes: running statistics raise under vmap in training mode
        self.untrained = frozen_modules(self.network, of_loops)
        self.task_network = TaskNetwork(self)
        self.inner_rule, self.head_start = rule, head
        self.head_start.find(self.network)
        if init_from is not None:
            load_network(self.network, head, init_from)
        # tasks have any number of rows: the inner rule keeps one, for all
        rows = self.head_start.replaced(self.network.named_parameters())
        adapted = self.adapted(self.network_parameters() | {name: p[:1].detach() for name, p in rows.items()})
        self.prepared = frozenset(adapted)
        self.inner_rule.prepare(adapted, inner_lr)
        if isinstance(head, ComputedRows):
            require(
                bool(self.learned(self.meta_parameters())),
                "network and head_start must have a parameter to learn, got none",
            )
            adapted_head = {*head.names} & self.prepared or not head.equal
            came = f"with head_start {type(head).__name__}, whose rows are equal until they are adapted"
            require(bool(adapted_head), f"inner_freeze must leave the head, {head.path}, {came}")
        self.passes = Passes(tasks_per_pass, compile_passes)
        self.outer_update = OuterUpdate(outer_lr_decay, scheduler, max_skipped)
        self.evaluation, self.scores = Evaluation(), Scores(dict((metrics or {}).items()))  # also of a MetricCollection
        self.gradients_checked = False
        self.fitting, self.ranks = False, 1  # set by the trainer
        self.form = SampleForm()
        self.members: Mapping[str, State] = {}  # of an ensemble, by name: what predictions are averaged over
        self.description = network_description(self.hparams)

    def network_parameters(self) -> Params:
        """The network's parameters that the inner or the outer loop updates."""
        params = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        fixed = self.fixed | self.head_start.replaced(params.items()).keys()
        return {name: p for name, p in params.items() if name not in fixed}

    def meta_parameters(self) -> Params:
        """θ: ``network_parameters`` and those of inner rule and head start, with the prefixes RULE and HEAD."""
        parts = ((self.inner_rule, RULE), (self.head_start, HEAD))
        own = [with_prefix(dict(part.named_parameters()), prefix) for part, prefix in parts]
        return self.network_parameters() | own[0] | own[1]

    def adapted(self, params: Params) -> Params:
        """The subset that the inner loop updates."""
        return {name: p for name, p in of_network(params).items() if name not in self.inner_frozen}

    def learned(self, params: Params) -> Params:
        """The subset that the outer loop updates."""
        return {name: p for name, p in params.items() if name not in self.outer_frozen}

    @property
    def fixed(self) -> set[str]:
        """Names of the network's parameters that neither loop updates."""
        return self.inner_frozen & self.outer_frozen

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all modules but the frozen ones, which stay in evaluation mode."""
        super().train(mode)
        for module in self.untrained:
            module.eval()
        return self

    @property
    def keeps_features(self) -> bool:
        """Whether features of frozen modules are kept: not those of samples that are adapted to or predicted."""
        with suppress(RuntimeError):  # of a learner without a Trainer
            return self.training or self.trainer.evaluating
        return False

    @property
    def keywords(self) -> bool | None:
        """Whether the entries of samples are keywords of the network's forward; None before it is known."""
        return self.form.keywords

    def support(self, x: Samples, y: Samples, steps: int, first: int | None = None) -> Support:
        """Support sets, and what inner steps take of them; for ``first`` see ``inner_batches``.  # T S ..., T S ..."""
        classes = self.head_start.classes(y, ignored_class(self.loss))
        x = self.task_network.ahead(x)
        return Support(x, y, self.inner_batches(x, y, steps, first), classes)

    def inner_batches(
        self, x: Samples, y: Samples, steps: int, first: int | None = None
    ) -> list[tuple[Samples, Samples]]:
        """Support samples and targets of each inner step: all of them.  # T S ..., T S ...

        In evaluation ``first`` is the number of the first of these tasks among those of this process.
        """
        return [(x, y)] * steps

    def start(self, theta: Params, support: Support, task_network: TaskNetwork | None = None) -> Params:
        """θ'_0 of every task, with its graph to ``theta``: θ with the rows of the head."""
        network, head = task_network or self.task_network, self.head_start
        if not isinstance(head, ComputedRows):
            return theta
        network.require_last(head.path, support.x)
        return head.start(theta, lambda: network.features(theta, support.x, head.path), support.y, support.classes)

    def start_alone(self, support: Support) -> Params:
        """θ'_0 of every task, without a graph."""
        with torch.no_grad():
            return leaves(self.start(stack(self.meta_parameters(), length(support.x)), support))

    def inner_losses(self, params: Params, start: Params, x: Samples, y: Samples) -> Tensor:
        """What the inner steps descend; ``start`` is θ'_0 where it depends on that.  # T S ..., T S ... -> T"""
        return self.task_network.losses_of(params, start, x, y)

    def inner_trajectory(self, start: Params, support: Support, **options: bool) -> Iterator[Adapted]:
        """θ' of every task after 0, …, K inner steps from θ'_0; for the options see ``trajectory``."""
        moved = [*self.adapted(start)]
        require(bool(moved) or not support.batches, f"network must have a parameter {TO_ADAPT}, got none")
        require_prepared(self.inner_rule, self.prepared, moved)
        depends = self.depends_on_start or isinstance(self.loss, TaskLoss)
        step = InnerStep(self.inner_losses, self.inner_rule, self.inner_lr, moved, start if depends else {})
        return trajectory(step, start, support.batches, **options)

    def inner_loop(self, start: Params, support: Support, **options: bool) -> Adapted:
        """θ'_K of every task, task-stacked, with its graph to θ'_0; for the options see ``trajectory``."""
        (adapted,) = deque(self.inner_trajectory(start, support, **options), maxlen=1)  # keeps θ'_K only
        return adapted

    def in_passes(self, function: Callable[..., tuple[Any, ...]], *stacked: Any) -> tuple[Any, ...]:
        """``Passes.run`` of a method of this learner."""
        theta = self.meta_parameters()

        def read() -> tuple[Any, ...]:
            """What a graph takes from the learner: callbacks may change it, and moving to a device replaces it."""
            numbers = [v for n, v in vars(self).items() if isinstance(v, int | float) and not n.startswith("_")]
            frozen = frozenset(self.inner_frozen), frozenset(self.outer_frozen)
            parts = *setting(self.inner_rule, None), *setting(self.head_start, None)
            calls = identity(self.output), self.keywords
            return function.__name__, *numbers, *frozen, *parts, *calls, *setting(self.network, self.loss), *theta

        support: Support = stacked[0]
        traits = self.task_network.examine(support.x, support.y)
        in_turn = traits.in_turn
        # where padding is taken away, its number is read: no graph can be recorded
        reads_sizes = isinstance(support.x, Padded) and (traits.mixes or self.loss is not default_loss)
        # evaluation is never worth compiling, and has not been recorded on a GPU
        option, on_cpu = self.passes.option, tree_leaves(stacked)[0].device.type == "cpu"
        recorded = option is not False and not reads_sizes and (self.training or (on_cpu and option is not True))
        repeats = getattr(self, "recompute_inner_steps", False) and self.second_order
        require(not (in_turn and repeats), f"recompute_inner_steps must be off, since {in_turn}, got on")
        with self.task_network.around():
            results = self.passes.run(
                function,
                *stacked,
                parameters=sum(p.numel() for p in theta.values()),
                most=1 if in_turn else None,
                # anomaly mode reads values
                key=read if recorded and not torch.is_anomaly_enabled() else None,
                buffers=self.network.buffers,
            )
        if in_turn:
            release(self.network)
        return results

    def inner_update(self, support_x: Samples, support_y: Samples) -> Params:
        """Adapt to one task and return θ'.

        In training mode θ' keeps its graph to θ: the gradient of a loss is MAML's, first-order for other algorithms.
        In evaluation mode it takes ``test_inner_steps`` steps and is detached.

        Args:
            support_x: Support samples; uint8 pixels are scaled to [0, 1]. If training used
                ``ImageTransforms(mean, std)``, normalise them in the same way first.  # S ...
            support_y: Support targets.  # S ...
        """
        steps = self.inner_steps if self.training else self.test_inner_steps
        theta = stack(self.meta_parameters(), tasks=1)
        second_order = self.second_order and self.training
        with torch.enable_grad():
            params = self.adapted_alone(
                scale_pixels(support_x), support_y, steps, partial(self.start, theta), second_order=second_order
            )
        return params if self.training else {name: p.detach() for name, p in params.items()}

    def adapted_alone(
        self, x: Samples, y: Samples, steps: int, start: Callable[[Support], Params], **options: bool
    ) -> Params:
        """θ' of one task.  # S ..., S ..."""
        support = self.support(one_task(x), one_task(y), steps)
        self.task_network.examine(support.x, support.y)
        with self.task_network.around():
            adapted = self.inner_loop(start(support), support, **options)
        return unstack(of_network(adapted.params), 0)

    def forward(self, x: Samples) -> Samples:
        """Predictions at θ, without adaptation, of samples that are normalised as in training.  # S ... -> S ..."""
        x = scale_pixels(x)
        form = self.form_for(x) if self.keywords is None and not isinstance(x, Tensor) else self.form
        x = self.task_network.inputs(x)
        return call(self.network, form.cast(x), bool(form.keywords), self.output)

    def forward_with_weights(self, query_x: Samples, adapted_params: Params) -> Samples:
        """Predictions of one task with the parameters of ``inner_update``.  # R ... -> R ..."""
        params = {name: p[None] for name, p in adapted_params.items()}
        return first_task(self.task_network.predict(params, one_task(scale_pixels(query_x))))

    def form_for(self, x: Samples) -> SampleForm:
        """The form of the samples, completed by how the network takes them.  # S ..."""
        traits = self.task_network.examine(one_task(x))
        return replace(self.form, keywords=traits.keywords, floats=self.form.floats or traits.floats)

    def adapt(
        self,
        x: Samples | Array,
        y: Samples | Array | Sequence[str],
        steps: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Predictor:
        """Adapt to the support set of one task, by the inner loop in evaluation mode.

        For more classes than a head of learnt rows has, adaptations to groups of classes are combined (see
        ``adaptation.partitions``).

        Args:
            x: Support samples as in the data set: uint8 pixels, or other inputs of the network, in nests as in
                training. They are normalised as in training.  # S ...
            y: Class of each sample, as numbers or names; for regression floating-point targets.  # S, S D
            steps: Inner steps. Default: ``test_inner_steps``.
            class_names: Names of the classes in the sorted order of y's values. Default: these values.

        Returns:
            A predictor for queries of the task.

        Raises:
            InputError: If samples and targets do not fit each other or the network.
            FloatingPointError: If the inner steps diverge.
        """
        steps = self.test_inner_steps if steps is None else steps
        require_at_least(1, steps=steps)

        def inner_loop(x: Samples, y: Samples) -> Params:
            params = self.adapted_alone(x, y, steps, self.start_alone)
            if not is_finite(params):
                raise FloatingPointError(f"the adaptation diverged in {steps} steps of inner_lr {self.inner_lr}")
            return params

        any_ways = self.head_start.computed
        with in_evaluation(self), unchanged(self.network):
            forms, described = (self.form, self.form_for, self.task_network.inputs), (self.output, self.description)
            return adapt_to(self.network, inner_loop, x, y, class_names, any_ways, *forms, *described)

    def export_adaptation(
        self,
        path: str | Path,
        x: Samples | Array,
        y: Samples | Array | Sequence[str],
        steps: int | None = None,
        overwrite: bool = False,
    ) -> dict[str, Any]:
        """Save ``adapt`` as a program of ``torch.export`` that runs without this package.

        The program takes support samples, targets and queries, and returns the predictions of ``adapt(support_x,
        support_y)(query_x)``: logits, for regression values. Samples are as in ``x``, but pixels floating point in
        [0, 1]; classes are int64 numbers 0 … N−1, of which the support set must hold each. The number of classes, the
        inner steps, the dtype and the shape of a sample are fixed. The number of samples is free, unless the network
        takes one number only, torch can export one number only, or inner steps take minibatches (then that of the
        support set is fixed). Each program is compared with ``adapt`` at three sizes before it is saved.

        Args:
            path: The file, with the suffix .pt2.
            x: Support samples of an example task, as for ``adapt``.  # S ...
            y: Its classes or regression targets, as for ``adapt``.  # S, S D
            steps: Inner steps. Default: ``test_inner_steps``.
            overwrite: Whether to replace an existing file.

        Returns:
            The description that the file holds as JSON in its extra file ``description``: among others ``classes``,
            ``outputs``, ``support_samples`` and ``query_samples``, a number or ``"any"``.

        Raises:
            InputError: If ``adapt`` refuses the example, or the adaptation cannot be exported.
        """
        steps = self.test_inner_steps if steps is None else steps
        return save_adaptation(copied(self).cpu().eval(), Path(path), x, y, steps, overwrite)

    def adapted_predictions(
        self,
        form: SampleForm,
        ways: int,
        steps: Sequence[Tensor | None],
        support_x: Samples,
        support_y: Samples,
        query_x: Samples,
    ) -> Samples:
        """What ``adapt`` and its predictor compute, as a function of tensors alone.  # S ..., S ..., R ... -> R ...

        ``steps`` are the numbers of the samples that each inner step takes, None for all.
        """
        network, traits = self.task_network, self.task_network.traits
        assert traits is not None
        dtype = next(self.network.parameters()).dtype
        inputs, queries = (form.network_input(x, dtype) for x in (support_x, query_x))
        x, y = one_task(inputs), one_task(support_y)
        batches = [
            (x, y) if rows is None else tree_map(lambda t, rows=rows: t.index_select(1, rows), (x, y)) for rows in steps
        ]
        support = Support(x, y, batches, self.head_start.classes(y, ignored_class(self.loss), ways))
        with network.being_traced(), network.around(), torch.enable_grad():
            params = unstack(of_network(self.inner_loop(self.start_alone(support), support).params), 0)
            tensors = [t for module in self.network.modules() for t in tensors_in(vars(module), set())]
            held = copied(self.network, shared=tensors)  # whose tensors are those of the trace
            freeze_statistics(held, lambda held: traits.forward(held, params, network.inputs(inputs)))
            predictions = traits.forward(held, params, queries)
        return predictions[:, :ways] if ways else predictions

    @abstractmethod
    def training_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """One meta-iteration; returns the mean loss of the meta-batch."""

    def configure_callbacks(self) -> list[L.Callback]:
        """No callbacks; raise InputError for options of the Trainer before Lightning refuses them with other advice."""
        require_own_options(self.trainer, self)
        return []

    def setup(self, stage: str) -> None:
        """Note the stage; raise InputError for precisions and strategies that the inner loop does not support."""
        self.fitting, self.ranks = stage == "fit", self.trainer.world_size
        require_not_compiled(learner=self.training_step)
        require_own_options(self.trainer, self)  # again: subclasses may define configure_callbacks
        require_supported(str(self.trainer.precision), self.trainer.strategy)
        learnt = bool(self.learned(self.meta_parameters()))
        require(learnt or stage != "fit", f"network must have a parameter {TO_ADAPT}, got none")

    def on_fit_start(self) -> None:
        """Check the schedule before training, and take the form of the samples from the data module."""
        self.outer_update.require_end(self.trainer)
        self.outer_update.take_options(self.trainer.optimizers)
        data = self.data_module()
        if isinstance(data, TaskDataModule):
            self.form = replace(data.sample_form(), keywords=self.form.keywords, floats=self.form.floats)
        labels = data.train_labels if isinstance(data, ClassificationTasks) else self.train_labels
        expected = f"data.train_labels must be {self.train_labels!r} to train {type(self).__name__}"
        require(labels == self.train_labels, f"{expected}, got {labels!r}")

    def data_module(self) -> L.LightningDataModule | None:
        """The trainer's data module, if it has one."""
        return getattr(self.trainer, "datamodule", None)

    def on_train_start(self) -> None:
        """Start or resume the outer loop."""
        self.outer_update.begin(self.outer_optimizer().optimizer, self.trainer)

    def on_train_batch_start(self, batch: TaskBatch, batch_idx: int) -> None:
        """Complete the form of the samples, and warn once about parameters without gradient."""
        if batch_idx and self.gradients_checked:
            return
        with self.trainer.precision_plugin.forward_context():
            tasks = as_task_batch(batch)
            traits = self.task_network.examine(tasks.support_x, tasks.support_y)
            unused = [] if self.gradients_checked else self.without_gradient(tasks)
        pixels = any(tensor.dtype == torch.uint8 for tensor in tree_leaves(nest_of(batch[0], "support_x")))
        self.form = replace(self.form, keywords=traits.keywords, floats=traits.floats)
        self.form = replace(self.form, pixels=True) if pixels else self.form
        if not self.gradients_checked:
            data = self.data_module()
            if isinstance(data, ClassificationTasks) and self.loss is default_loss and not self.head_start.computed:
                ways, outputs = data.most_ways("train"), traits.outputs
                enough = self.train_labels != "task" or ways <= outputs
                require(enough, f"network must give an output for each class: expected at least {ways}, got {outputs}")
            if unused:
                rank_zero_warn(f"The loss does not depend on these parameters: {', '.join(unused)}")
            self.gradients_checked = True

    def without_gradient(self, batch: TaskBatch) -> list[str]:
        """Names of parameters that the support loss of the first task does not depend on."""
        theta = leaves(stack(self.meta_parameters(), 1))
        (x, y), loss = tree_map(lambda t: t[:1], batch[:2]), self.loss
        # copies, which leave the state of network and loss and the random numbers to training
        copies = SimpleNamespace(
            network=copied(self.network),
            loss=copied(loss) if isinstance(loss, nn.Module) else loss,
            **{name: getattr(self, name) for name in ("head_start", "output", "fixed", "keeps_features", "keywords")},
        )
        probe = TaskNetwork(copies)
        probe.traits = self.task_network.examine(x, y)
        with kept_random_states(self.device):
            support = self.support(x, y, 0)
            start = self.start(theta, support, probe)
            losses = probe.losses_of(start, start, support.x, y)
        of_parameters = of_network(theta)
        if not of_parameters:
            return []
        grads = torch.autograd.grad(losses.sum(), list(of_parameters.values()), allow_unused=True)
        return [name for name, g in zip(of_parameters, grads, strict=True) if g is None]

    def on_train_epoch_end(self) -> None:
        """Step Lightning's schedulers of epochs, if a subclass or a callback has any."""
        advance(self.trainer.lr_scheduler_configs, "epoch", self.trainer.current_epoch + 1)

    def on_fit_end(self) -> None:
        """Give the buffers of the trained network, which shares only its parameters, to the one that was passed."""
        self.original.take_buffers(self.network)

    def outer_optimizer(self) -> LightningOptimizer:
        """The outer optimizer; for Reptile Lightning's stand-in."""
        return cast(LightningOptimizer, self.optimizers())

    @contextmanager
    def outer_iteration(self, update: Any) -> Iterator[LightningOptimizer]:
        """``OuterUpdate.step`` for an ``update`` that is the same on all ranks."""
        require(self.fabric is None, "training_step must run under a Trainer, got Fabric; use fit, or train_maml")
        optimizer = self.outer_optimizer()

        def moved() -> list[Tensor]:
            return [*self.learned(self.meta_parameters()).values(), *self.buffers()]

        with self.outer_update.step(update, moved, optimizer.optimizer):
            yield optimizer
        advance(self.trainer.lr_scheduler_configs, "step", self.trainer.fit_loop.batch_idx + 1)

    def log_training(self, losses: Tensor, scores: Callable[[], Mapping[str, Tensor]] = dict) -> Tensor:
        """At the log interval, log the mean loss and scores, and stop training that skips too many updates.  # T, T"""
        loss, trainer, outer = losses.detach().mean(), self.trainer, self.outer_update
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set outside of __init__
        due = interval > 0 and self.global_step % interval == 0
        if due or trainer.is_last_batch or self.global_step == trainer.max_steps:
            if outer.skipped:
                rank_zero_warn("Skipping meta-iterations whose update is not finite; train/skipped counts them")
            if outer.skipped_in_a_row > outer.max_skipped:
                checkpoint = trainer.checkpoint_callback
                kept = getattr(checkpoint, "last_model_path", "") or getattr(checkpoint, "best_model_path", "")
                raise FloatingPointError(
                    f"the loss became {loss.item()}, or its gradient not finite, at step {self.global_step - 1}: "
                    f"inner_lr {self.inner_lr} or outer_lr {self.outer_lr} is probably too large, or the data are not "
                    f"finite. {outer.skipped_in_a_row.item()} consecutive meta-iterations were skipped, θ is unchanged "
                    f"since; last checkpoint: {kept or 'none yet'}"
                )
            values = {"train/loss": loss} | {f"train/{name}": value.mean() for name, value in scores().items()}
            values = mean_over_ranks(values, trainer.strategy)
            # one transfer here, instead of one per step by the progress bar
            self.log_dict({name: value.cpu() for name, value in values.items()}, prog_bar=True, batch_size=len(losses))
            self.log("train/skipped", outer.skipped.cpu().float())
            self.log("train/outer_lr", torch.tensor(outer.lr))  # on the CPU: no device sync
        return loss

    def answers(self, batch: TaskBatch, each_step: bool = False, first: int = 0) -> list[Answers]:
        """Answers before and after adaptation, or before it and after each inner step.

        Those of an ensemble are the means over its ``members``. ``first`` is the number of the first of these tasks
        among those of this process.
        """
        # Lightning evaluates in inference mode, whose tensors autograd rejects even in enable_grad: hence the clones
        with torch.inference_mode(False), torch.enable_grad():
            batch = tree_map(Tensor.clone, batch)
            with closing(each_of(self, self.members)) as members:
                of_members = [self.answers_alone(batch, each_step, first) for _ in members]
        real, answers = is_real(batch.query_y), []
        for of_moment in zip(*of_members, strict=True):
            predictions, losses = zip(*of_moment, strict=True)
            answers.append(Answers(mean_prediction(predictions, real), mean_prediction(losses, real=True)))
        return answers

    def predict_tasks(self, batch: TaskBatch, each_step: bool = False) -> list[Samples]:
        """The predictions of ``answers``.  # T R ..."""
        return [answers.predictions for answers in self.answers(batch, each_step)]

    def answers_alone(self, batch: TaskBatch, each_step: bool = False, first: int = 0) -> list[Answers]:
        """``answers`` of this learner alone."""
        outputs = self.task_network.examine(batch.support_x, batch.support_y).outputs
        if outputs > 1 and not self.head_start.computed and not isinstance(self.loss, TaskLoss):
            y = class_numbers(batch.support_y, ignored := ignored_class(self.loss))
            ways = ways_of(y, ignored)
            if ways > outputs and refuses_classes(self.loss, y.flatten(), outputs):
                return self.answers_of_groups(batch, ways, partitions(ways, outputs), each_step, first)

        support_x, query_x = self.task_network.ahead_of_both(batch.support_x, batch.query_x)
        support = self.support(support_x, batch.support_y, self.test_inner_steps, first)
        function = self.pass_answers_of_steps if each_step else self.pass_answers
        _, *answers = self.in_passes(function, support, support_x, query_x, batch.query_y)
        return answers

    def pass_answers(self, support: Support, *queries: Samples) -> tuple[Any, ...]:
        """Answers of the tasks of one pass before and after adaptation; the mean that ``Passes`` expects is empty."""
        start = self.start_alone(support)
        before = self.answers_at(start, start, *queries)
        if not support.batches:
            return (), before, before
        return (), before, self.answers_at(self.inner_loop(start, support).params, start, *queries)

    def pass_answers_of_steps(self, support: Support, *queries: Samples) -> tuple[Any, ...]:
        """As ``pass_answers``, before adaptation and after each inner step."""
        start = self.start_alone(support)
        return (), *(self.answers_at(s.params, start, *queries) for s in self.inner_trajectory(start, support))

    def answers_at(
        self, params: Params, start: Params, support_x: Samples, query_x: Samples, query_y: Samples
    ) -> Answers:
        """Answers of tasks with these parameters."""
        with torch.no_grad():
            predictions = self.task_network.predict_queries(params, support_x, query_x, self.transductive)
        if not isinstance(self.loss, TaskLoss):
            return Answers(predictions, torch.zeros(length(query_x), 0))
        return Answers(predictions, self.task_network.losses_of(params, start, query_x, query_y).detach())

    def answers_of_groups(
        self, batch: TaskBatch, ways: int, groups: Sequence[Tensor], each_step: bool, first: int
    ) -> list[Answers]:
        """``answers_alone`` of tasks with more classes than outputs, from adaptations to groups of their classes."""
        classes = f"the network has {len(groups[0])} outputs for {ways} classes"
        self.task_network.say("Adaptations to groups of the classes are combined, since ", classes)
        unequal = isinstance(batch.support_y, Padded)
        require(
            not unequal, f"head_start must compute rows for tasks of unequal size, since {classes}, got learnt ones"
        )
        of_groups = []
        for group in groups:
            rows, y = zip(*(samples_of(group, task) for task in batch.support_y), strict=True)
            equally = f"support_y must hold each class equally often, since {classes}, got others"
            require(len({*map(len, y)}) == 1, equally)
            tasks = torch.arange(len(y), device=y[0].device)[:, None]
            own = tasks, torch.stack(rows)
            x = tree_map(lambda t, own=own: t[own], batch.support_x)
            parts = batch._replace(support_x=x, support_y=torch.stack(y))
            of_groups.append(self.answers_alone(parts, each_step, first))
        mean = shares(groups, ways).to(of_groups[0][0].predictions)
        return [
            of_moment[0]._replace(predictions=combined([of_group.predictions for of_group in of_moment], mean))
            for of_moment in zip(*of_groups, strict=True)
        ]

    def query_scores(self, answers: Answers, targets: Samples) -> dict[str, Tensor]:
        """Loss and scores of each task by name.  # T R ... -> T"""
        sees_task, predictions = isinstance(self.loss, TaskLoss), answers.predictions
        losses = answers.losses if sees_task else self.task_network.losses(predictions, targets)
        return {"loss": losses} | self.scores(self.loss, predictions, targets)

    def training_scores(self, predictions: Samples, targets: Samples) -> dict[str, Tensor]:
        """Scores of each task by name; a TaskLoss has no predictions in training.  # T R ..., T R ... -> T"""
        return {} if isinstance(self.loss, TaskLoss) else self.scores(self.loss, predictions, targets)

    def on_validation_epoch_start(self) -> None:
        """Reset the statistics; raise InputError for several loaders."""
        trainer = self.trainer
        name = "test" if trainer.testing else "predict" if trainer.predicting else "val"
        loaders = getattr(trainer, f"{name}_dataloaders")
        several = len(loaders) if isinstance(loaders, list | tuple | Mapping) else 1
        require(several == 1, f"evaluation takes one loader, whose batches are of tasks, got {several}")
        self.evaluation = Evaluation()

    def validation_step(self, batch: TaskBatch, batch_idx: int, dataloader_idx: int = 0) -> Samples:
        """Adapt to each task, record query loss and scores before and after, and return the predictions after."""
        batch = as_task_batch(batch)
        before_and_after = self.answers(batch, first=self.evaluation.begin(batch))
        for moment, answers in zip(("_before", ""), before_and_after, strict=True):
            values = self.query_scores(answers, batch.query_y)
            self.evaluation.update({name + moment: tasks for name, tasks in values.items()})
        predictions: Samples = answers.predictions
        return predictions

    def on_validation_epoch_end(self) -> None:
        """Log the statistics."""
        self.evaluation.log(self, "test" if self.trainer.testing else "val")

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: TaskBatch, batch_idx: int, dataloader_idx: int = 0) -> Samples:
        """Class probabilities (for regression: predictions) of the queries, ``Padded`` as these.  # T R N, T R D"""
        batch = as_task_batch(batch)
        *_, (predictions, _) = self.answers(batch, first=self.evaluation.begin(batch))
        classes = isinstance(predictions, Tensor) and not is_real(batch.query_y)
        return padded_with(predictions.softmax(2) if classes else predictions, batch.query_y)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the algorithm's name, the form of the samples, the tasks that fit and the counters."""
        checkpoint["form"] = asdict(self.form)
        checkpoint["algorithm"] = type(self).__name__
        checkpoint["tasks_that_fit"] = self.passes.tasks_that_fit
        checkpoint["output"] = self.output is not None
        checkpoint["skipped"] = torch.stack(self.outer_update.counters())

    def accept(self, checkpoint: dict[str, Any]) -> None:
        """Take the state of former versions; raise InputError for another algorithm or network."""
        checkpoint["state_dict"] = renamed(checkpoint["state_dict"], FORMER_KEYS)
        forget_statistics(self.network, without_prefix(checkpoint["state_dict"], "network."))
        verify_checkpoint(checkpoint, type(self).__name__, self.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore a checkpoint, or raise InputError, and take the form of the samples from it."""
        self.accept(checkpoint)
        form = checkpoint.get("form")  # not in those of version 0.1
        self.form = SampleForm(**form) if form else form_of(checkpoint.get("datamodule_hyper_parameters", {}))
        self.description = network_description(checkpoint.get("hyper_parameters", {}))
        lost = checkpoint.get("output", False) and self.output is None
        require(not lost, "output must be given, as in training: a function is not in the checkpoint, got None")
        if self.fitting:  # other machines may have more memory
            self.passes.tasks_that_fit = checkpoint.get("tasks_that_fit")
        for counter, count in zip(self.outer_update.counters(), checkpoint.get("skipped", ()), strict=False):
            counter.copy_(count)
