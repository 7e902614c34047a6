"""References that share no code with the package, and the networks and tasks that both are run on."""

import copy
from collections.abc import Callable
from functools import partial

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader

from meta_lightning import MLP, MetaLearner, TaskBatch

Params = dict[str, Tensor]
# in float64; Lightning on what is meant: tasks from a list, no validation, no optimizer in Reptile
TASKS_FROM_A_LIST = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`"),
]
Loss = Callable[[Tensor, Tensor], Tensor]
T, WAYS, SUPPORT, QUERY = 3, 5, 10, 15
EXACT = 1e-9
INNER_LR = 0.1
# ------------------------------------------------------------------------------------------------------ references


def descend(network: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, steps: int, loss: Loss) -> nn.Module:
    for _ in range(steps):
        optimizer.zero_grad()
        loss(network(x), y).backward()
        optimizer.step()
    return network


def adapted_copy(network: nn.Module, x: Tensor, y: Tensor, steps: int, loss: Loss) -> nn.Module:
    fast = copy.deepcopy(network)
    return descend(fast, SGD(fast.parameters(), INNER_LR), x, y, steps, loss)


def maml_loop(network: nn.Module, batch: TaskBatch, steps: int, loss: Loss = F.cross_entropy) -> Params:
    theta = trained(network)
    losses = []
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        params = theta
        for _ in range(steps):
            support_loss = loss(functional_call(network, params, (support_x,)), support_y)
            grads = torch.autograd.grad(support_loss, params.values(), create_graph=True, materialize_grads=True)
            params = {name: p - INNER_LR * g for (name, p), g in zip(params.items(), grads, strict=True)}
        losses.append(loss(functional_call(network, params, (query_x,)), query_y))
    grads = torch.autograd.grad(torch.stack(losses).mean(), theta.values(), materialize_grads=True)
    return dict(zip(theta, grads, strict=True))


def fomaml_loop(network: nn.Module, batch: TaskBatch, steps: int, loss: Loss = F.cross_entropy) -> Params:
    mean = {name: torch.zeros_like(p) for name, p in trained(network).items()}
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        fast = adapted_copy(network, support_x, support_y, steps, loss)
        fast.zero_grad()
        loss(fast(query_x), query_y).backward()
        for name, p in trained(fast).items():
            mean[name] += 0 if p.grad is None else p.grad / len(batch.support_x)
    return mean


def adapted_mean(network: nn.Module, batch: TaskBatch, steps: int, loss: Loss = F.cross_entropy) -> Params:
    """Reptile's mean θ' over the tasks."""
    tasks = zip(batch.support_x, batch.support_y, strict=True)
    copies = [trained(adapted_copy(network, x, y, steps, loss)) for x, y in tasks]
    return {name: torch.stack([fast[name].detach() for fast in copies]).mean(0) for name in copies[0]}


def learn2learn_gradient(network: nn.Module, batch: TaskBatch, steps: int, first_order: bool) -> Params:
    algorithms = pytest.importorskip("learn2learn.algorithms")  # takes seconds to import

    maml = algorithms.MAML(copy.deepcopy(network), lr=INNER_LR, first_order=first_order)
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        learner = maml.clone()
        for _ in range(steps):
            learner.adapt(F.cross_entropy(learner(support_x), support_y))
        (F.cross_entropy(learner(query_x), query_y) / len(batch.support_x)).backward()
    return {name: p.grad for name, p in maml.module.named_parameters()}


def slope(network: nn.Module, batch: TaskBatch, steps: int, direction: Params, loss: Loss = F.cross_entropy) -> float:
    """Central finite difference of MAML's objective along a direction; no second derivative is taken anywhere."""
    h = 3e-6  # shorter, rounding grows; longer, curvature
    objective = []
    for sign in (1, -1):
        moved = copy.deepcopy(network)
        with torch.no_grad():
            for name, p in trained(moved).items():
                p += sign * h * direction[name]
        losses = [
            loss(adapted_copy(moved, support_x, support_y, steps, loss)(query_x), query_y)
            for support_x, support_y, query_x, query_y in zip(*batch, strict=True)
        ]
        objective.append(torch.stack(losses).mean().item())
    return (objective[0] - objective[1]) / (2 * h)


def reptile_loop(
    network: nn.Module, batches: list[TaskBatch], steps: int, epsilon: float, inner: Callable[..., Optimizer]
) -> Params:
    """Reptile's θ after these meta-batches; Adam's moments start each task as the mean that the last batch left."""
    network = copy.deepcopy(network)
    state: dict[int, dict[str, Tensor]] = {}
    for batch in batches:
        copies, states = [], []
        for support_x, support_y, *_ in zip(*batch, strict=True):
            fast = copy.deepcopy(network)
            optimizer = inner(fast.parameters())
            optimizer.load_state_dict({**optimizer.state_dict(), "state": copy.deepcopy(state)})
            copies.append(trained(descend(fast, optimizer, support_x, support_y, steps, F.cross_entropy)))
            states.append(optimizer.state_dict()["state"])
        state = {
            i: {key: torch.stack([s[i][key] for s in states]).mean(0) for key in values}
            for i, values in states[0].items()
            if values.get("exp_avg") is not None
        }
        with torch.no_grad():
            for name, p in trained(network).items():
                p += epsilon * torch.stack([fast[name] - p for fast in copies]).mean(0)
    return values_of(network)


def outer_loop(
    network: nn.Module,
    batches: list[TaskBatch],
    meta_gradient: Callable[[nn.Module, TaskBatch, int], Params],
    make_optimizer: Callable[..., Optimizer],
    clip_norm: float | None = None,
) -> Params:
    """θ after torch's optimizer has stepped along the literal meta-gradient of each batch."""
    network = copy.deepcopy(network)
    optimizer = make_optimizer(network.parameters())
    for batch in batches:
        for name, g in meta_gradient(network, batch, 2).items():
            network.get_parameter(name).grad = g
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        optimizer.step()
    return values_of(network)


def trained(network: nn.Module) -> Params:
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def values_of(network: nn.Module) -> Params:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def difference(after: Params, before: Params) -> Params:
    return {name: after[name] - before[name] for name in before}


def flat(params: Params) -> Tensor:
    return torch.cat([p.flatten() for p in params.values()])


def error(got: Params, expected: Params) -> float:
    """max|got − expected| / max|expected|, over all parameters."""
    assert got.keys() == expected.keys()
    return ((flat(got) - flat(expected)).abs().max() / flat(expected).abs().max()).item()


# ------------------------------------------------------------------------------------------ networks, tasks, training


def classification(*sample: int, support: int = SUPPORT, query: int = QUERY) -> TaskBatch:
    return TaskBatch(
        torch.randn(T, support, *sample),
        torch.arange(WAYS).repeat(T, support // WAYS),
        torch.randn(T, query, *sample),
        torch.arange(WAYS).repeat(T, query // WAYS),
    )


def tokens() -> TaskBatch:
    batch = classification()
    return batch._replace(support_x=torch.randint(7, (T, SUPPORT, 4)), query_x=torch.randint(7, (T, QUERY, 4)))


def smooth_conv4() -> nn.Module:
    """Conv4 whose objective has finite differences: softplus for ReLU, average for max-pooling."""
    blocks = [
        nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1),
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.Softplus(),
            nn.AvgPool2d(2),
        )
        for channels in (1, 4, 4, 4)
    ]
    network = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4, WAYS))
    with torch.no_grad():
        for block in blocks:
            block[1].weight.uniform_(0.5, 1.5)
            block[1].bias.normal_()
    return network


def mlp() -> MLP:
    return MLP(in_features=6, hidden=(8,), out_features=WAYS)


def fit(learner: MetaLearner, batches: list[TaskBatch]) -> Params:
    """θ after one meta-iteration a batch in a real Trainer."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=len(batches),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(learner, DataLoader(batches, batch_size=None))
    assert trainer.global_step == len(batches)
    return values_of(learner.network)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


sequences = partial(classification, 4, 3)
