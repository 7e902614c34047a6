"""What the benchmarks of speed and memory run: tasks, networks, and each peer's meta-gradient or Reptile update."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional as F
from torchvision.models import resnet18

from meta_lightning import FOMAML, MAML, MLP, Conv4, MetaLearner, Reptile, TaskBatch
from meta_lightning.runs.machine import MEGABYTE, PeakMemory

ALGORITHMS: dict[str, type[MetaLearner]] = {"MAML": MAML, "FOMAML": FOMAML, "Reptile": Reptile}
INNER_LR = 0.01
Params = dict[str, Tensor]
Step = Callable[[], Params]  # one meta-iteration's meta-gradient, or Reptile's mean θ'


class Waves(NamedTuple):
    """Sinusoids: 10 support and 10 query samples per task."""

    name: str
    steps: int
    tasks: int = 25
    size: int = 1
    loss: Callable[..., Any] = F.mse_loss

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return MLP()

    def batch(self, device: str = "cpu") -> TaskBatch:
        x = torch.linspace(-5, 5, 20, device=device).expand(self.tasks, 20).unsqueeze(-1)
        y = torch.sin(x + torch.arange(self.tasks, device=device).view(-1, 1, 1))
        return TaskBatch(x[:, ::2], y[:, ::2], x[:, 1::2], y[:, 1::2])


class Workload(NamedTuple):
    """Images of noise in Conv4 or, of 0 filters, torchvision's ResNet-18."""

    name: str
    tasks: int
    shots: int
    size: int
    filters: int
    queries: int = 15
    ways: int = 5
    steps: int = 5
    loss: Callable[..., Any] = F.cross_entropy

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        if self.filters == 0:
            return resnet18(num_classes=self.ways)
        if self.size == 28:
            return Conv4(self.ways, 1, 28, self.filters, "stride")
        return Conv4(self.ways, 3, self.size, self.filters, "max_pool")

    def batch(self, device: str = "cpu") -> TaskBatch:
        rng = torch.Generator().manual_seed(1)
        channels = 1 if self.size == 28 else 3

        def part(each: int) -> tuple[Tensor, Tensor]:
            x = torch.rand(self.tasks, self.ways * each, channels, self.size, self.size, generator=rng)
            return x.to(device), torch.arange(self.ways, device=device).repeat_interleave(each).repeat(self.tasks, 1)

        return TaskBatch(*part(self.shots), *part(self.queries))


def ours(algorithm: str, workload: Waves | Workload, device: str = "cpu", **options: Any) -> Step:
    """The algorithm's own training step, less the outer step."""
    options = {"inner_lr": INNER_LR, "inner_steps": workload.steps} | options
    learner = ALGORITHMS[algorithm](workload.network().to(device), **options)
    batch = workload.batch(device)
    if isinstance(learner, MAML):
        return lambda: learner.meta_gradient(batch)[0]
    assert isinstance(learner, Reptile)

    def update() -> Params:
        support = learner.support(batch.support_x, batch.support_y, learner.inner_steps)
        return learner.in_passes(learner.adapt_pass, support)[0]

    return update


def learn2learn(algorithm: str, workload: Waves | Workload, device: str = "cpu") -> Step:
    """learn2learn's MAML, task by task as in its examples; Reptile by its first-order clones."""
    from learn2learn import algorithms

    batch = workload.batch(device)
    network = workload.network().to(device)
    peer = algorithms.MAML(network, lr=INNER_LR, first_order=algorithm != "MAML")
    names = [name for name, _ in network.named_parameters()]

    def meta_gradient() -> Params:
        network.zero_grad()
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            learner = learn2learn_adapted(peer, workload.steps, support_x, support_y, workload.loss)
            (workload.loss(learner(query_x), query_y) / workload.tasks).backward()
        return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}

    def reptile() -> Params:
        mean: Params = {}
        for x, y in zip(batch.support_x, batch.support_y, strict=True):
            learner = learn2learn_adapted(peer, workload.steps, x, y, workload.loss)
            for name, p in zip(names, learner.module.parameters(), strict=True):
                mean[name] = mean.get(name, 0) + p.detach() / workload.tasks
        return mean

    return reptile if algorithm == "Reptile" else meta_gradient


def learn2learn_adapted(peer: Any, steps: int, x: Tensor, y: Tensor, loss: Callable[..., Any] = F.cross_entropy) -> Any:
    """A clone of learn2learn's MAML after inner steps on a task."""
    learner = peer.clone()
    for _ in range(steps):
        learner.adapt(loss(learner(x), y))
    return learner


def torch_func(algorithm: str, workload: Waves | Workload, device: str = "cpu") -> Step:
    """A plain torch.func loop: grad inside grad, over one task after another.

    Not vmapped: vmap over gradients is wrong at second order for batch norm whose scale and shift are adapted.
    """
    network = workload.network().to(device)
    theta = {name: p.detach() for name, p in network.named_parameters()}
    batch = workload.batch(device)

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return workload.loss(functional_call(network, params, (x,)), y)

    def adapt(params: Params, x: Tensor, y: Tensor) -> Params:
        for _ in range(workload.steps):
            grads = grad(loss)(params, x, y)
            if algorithm != "MAML":
                grads = {name: g.detach() for name, g in grads.items()}
            params = {name: p - INNER_LR * grads[name] for name, p in params.items()}
        return params

    def query_loss(params: Params, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        return loss(adapt(params, support_x, support_y), query_x, query_y)

    def of_task(task: tuple[Tensor, ...]) -> Params:
        if algorithm == "Reptile":
            return adapt(theta, *task[:2])
        return grad(query_loss)(theta, *task)

    def update() -> Params:
        results = [of_task(task) for task in zip(*batch, strict=True)]
        return {name: torch.stack([r[name] for r in results]).mean(0) for name in theta}

    return update


def jax_vmap(algorithm: str, workload: Waves | Workload) -> Step:
    """JAX, vmap over tasks of grad of the whole inner loop, jitted."""
    import jax
    import jax.numpy as jnp

    network = workload.network()
    strided = workload.size == 28
    theta = {name: jnp.asarray(p.detach().numpy()) for name, p in network.named_parameters()}
    batch = [jnp.asarray(part.numpy()) for part in workload.batch()]
    order = ("NCHW", "OIHW", "NCHW")

    def mlp(params: Any, x: Any) -> Any:
        for layer in ("features.1", "features.3"):
            x = jax.nn.relu(x @ params[f"{layer}.weight"].T + params[f"{layer}.bias"])
        return x @ params["head.weight"].T + params["head.bias"]

    def conv4(params: Any, x: Any) -> Any:
        for block in range(4):
            layer = block * (3 if strided else 4)
            weight, bias = params[f"features.{layer}.weight"], params[f"features.{layer}.bias"]
            stride = (2, 2) if strided else (1, 1)
            x = jax.lax.conv_general_dilated(x, weight, stride, ((1, 1), (1, 1)), dimension_numbers=order)
            x = x + bias[:, None, None]
            mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
            scale, shift = params[f"features.{layer + 1}.weight"], params[f"features.{layer + 1}.bias"]
            x = (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale[:, None, None] + shift[:, None, None]
            x = jax.nn.relu(x)
            if not strided:
                x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        x = x.mean((2, 3)) if strided else x.reshape(len(x), -1)
        return x @ params["head.weight"].T + params["head.bias"]

    def loss(params: Any, x: Any, y: Any) -> Any:
        if isinstance(workload, Waves):
            return ((mlp(params, x) - y) ** 2).mean()
        return -jnp.take_along_axis(jax.nn.log_softmax(conv4(params, x)), y[:, None], 1).mean()

    def adapt(params: Any, x: Any, y: Any) -> Any:
        for _ in range(workload.steps):
            grads = jax.grad(loss)(params, x, y)
            if algorithm != "MAML":
                grads = jax.lax.stop_gradient(grads)
            params = jax.tree_util.tree_map(lambda p, g: p - INNER_LR * g, params, grads)
        return params

    def of_task(params: Any, support_x: Any, support_y: Any, query_x: Any, query_y: Any) -> Any:
        if algorithm == "Reptile":
            return adapt(params, support_x, support_y)
        return jax.grad(lambda p: loss(adapt(p, support_x, support_y), query_x, query_y))(params)

    @jax.jit
    def update(params: Any, *batch: Any) -> Any:
        results = jax.vmap(of_task, in_axes=(None, 0, 0, 0, 0))(params, *batch)
        return jax.tree_util.tree_map(lambda r: r.mean(0), results)

    return lambda: jax.block_until_ready(update(theta, *batch))


def as_tensors(params: Any) -> Params:
    """A peer's result as torch tensors on the CPU."""
    return {name: p.detach().cpu() if isinstance(p, Tensor) else torch.tensor(p.tolist()) for name, p in params.items()}


def relative_error(ours: Params, theirs: Params) -> float:
    """‖ours − theirs‖ / ‖theirs‖ over all parameters."""
    difference = torch.stack([(ours[name] - p).square().sum() for name, p in theirs.items()]).sum()
    return float((difference / torch.stack([p.square().sum() for p in theirs.values()]).sum()).sqrt())


def interleaved(steps: dict[str, Step], repeats: int, device: str) -> dict[str, float]:
    """Median milliseconds of each, taken in turn, so that what else the machine does meets all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(repeats):
        for name, step in steps.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(step: Step, device: str) -> float:
    """MB that the step needs at its height: CUDA's allocated, or this fresh process's resident, less before."""
    if device == "cuda":
        step()
    memory = PeakMemory(torch.device(device))
    before = torch.cuda.memory_allocated() / MEGABYTE if device == "cuda" else 0.0
    memory.start()
    step()
    return memory.peak() - before
