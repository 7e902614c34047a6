"""Meta-gradients and meta-updates in float64, against references that share no code with the package.

- Central finite differences of ``mean_i L_query,i(θ'_i(θ))``, on networks smooth enough for them.
- Literal loops over the tasks: ``create_graph=True`` for MAML, ``copy.deepcopy`` and torch.optim for the others.
- learn2learn's MAML, of second and of first order.
- The closed form of a quadratic loss.
"""

import copy
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from references import (
    EXACT,
    INNER_LR,
    QUERY,
    SUPPORT,
    TASKS_FROM_A_LIST,
    WAYS,
    Loss,
    Params,
    Recurrent,
    T,
    adapted_copy,
    classification,
    difference,
    error,
    fit,
    flat,
    fomaml_loop,
    learn2learn_gradient,
    maml_loop,
    mlp,
    outer_loop,
    reptile_loop,
    sequences,
    slope,
    smooth_conv4,
    tokens,
    trained,
    values_of,
)
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD, Adam, Optimizer

from meta_lightning import FOMAML, MAML, Conv4, MetaLearner, Reptile, TaskBatch

pytestmark = TASKS_FROM_A_LIST

STEPS = pytest.mark.parametrize("steps", [1, 3, 5])


# ---------------------------------------------------------------------------------------- MAML, FOMAML: meta-gradients


@STEPS
def test_maml_agrees_with_finite_differences(steps: int) -> None:
    network, batch = smooth_conv4(), classification(1, 16, 16)
    meta_gradient, *_ = MAML(network, inner_lr=INNER_LR, inner_steps=steps).meta_gradient(batch)
    assert meta_gradient.keys() == trained(network).keys()  # batch norm's scale and shift are among θ

    directions = [{name: torch.randn_like(p) for name, p in trained(network).items()} for _ in range(4)]
    # single coordinates: a kernel's, batch norm's scale and shift, the head's weight and bias
    for name in ("0.0.weight", "0.1.weight", "2.1.bias", "5.weight", "5.bias"):
        directions.append({name: torch.zeros_like(p) for name, p in trained(network).items()})
        directions[-1][name].view(-1)[meta_gradient[name].abs().argmax()] = 1.0
    for direction in directions:
        along = flat(meta_gradient) @ flat(direction)
        assert slope(network, batch, steps, direction) == pytest.approx(along.item(), rel=1e-6, abs=0)


@STEPS
@pytest.mark.parametrize("downsample", ["stride", "max_pool"])
def test_maml_agrees_with_a_loop_and_learn2learn(steps: int, downsample: str) -> None:
    network, batch = Conv4(WAYS, image_size=16, filters=8, downsample=downsample), classification(1, 16, 16)
    meta_gradient, *_ = MAML(network, inner_lr=INNER_LR, inner_steps=steps).meta_gradient(batch)
    assert error(meta_gradient, maml_loop(network, batch, steps)) <= EXACT
    assert error(meta_gradient, learn2learn_gradient(network, batch, steps, first_order=False)) <= EXACT


@STEPS
@pytest.mark.parametrize("downsample", ["stride", "max_pool"])
def test_fomaml_agrees_with_a_loop_and_learn2learn(steps: int, downsample: str) -> None:
    network, batch = Conv4(WAYS, image_size=16, filters=8, downsample=downsample), classification(1, 16, 16)
    meta_gradient, *_ = FOMAML(network, inner_lr=INNER_LR, inner_steps=steps).meta_gradient(batch)
    assert error(meta_gradient, fomaml_loop(network, batch, steps)) <= EXACT
    assert error(meta_gradient, learn2learn_gradient(network, batch, steps, first_order=True)) <= EXACT


@pytest.mark.parametrize(("learner_class", "reference"), [(MAML, maml_loop), (FOMAML, fomaml_loop)])
def test_losses_and_predictions_beside_the_meta_gradient(
    learner_class: type[MAML], reference: Callable[..., Params]
) -> None:
    network, batch = mlp(), classification(6)
    _, losses, predictions = learner_class(network, inner_lr=INNER_LR, inner_steps=3).meta_gradient(batch)
    for task, (support_x, support_y, query_x, query_y) in enumerate(zip(*batch, strict=True)):
        expected = adapted_copy(network, support_x, support_y, 3, F.cross_entropy)(query_x)
        torch.testing.assert_close(predictions[task], expected)
        torch.testing.assert_close(losses[task], F.cross_entropy(expected, query_y))


@STEPS
def test_closed_form_of_a_quadratic(steps: int) -> None:
    # Linear regression without noise: the predictions X w against the targets X c have the mean squared error
    #   L(w) = ½ (w − c)ᵀ A (w − c) with A = 2 XᵀX / S, so that ∇L(w) = A (w − c).
    # A step w ← w − α A (w − c) is w − c ← (I − αA)(w − c), and K of them
    #   θ'_K − c = P (θ − c) with P = (I − αA)^K, hence ∂θ'_K/∂θ = P.
    # MAML's gradient is then Pᵀ A_q (θ'_K − c_q), FOMAML's A_q (θ'_K − c_q), Reptile's step ε mean(θ'_K − θ).
    D, epsilon = 4, 0.3
    support_x, query_x = torch.randn(T, SUPPORT, D), torch.randn(T, QUERY, D)
    c, c_q = torch.randn(T, D, 1), torch.randn(T, D, 1)
    batch = TaskBatch(support_x, support_x @ c, query_x, query_x @ c_q)

    network = nn.Linear(D, 1, bias=False)
    theta = network.weight.detach().clone().T  # D 1
    A, A_q = 2 * support_x.mT @ support_x / SUPPORT, 2 * query_x.mT @ query_x / QUERY  # T D D
    P = torch.linalg.matrix_power(torch.eye(D) - INNER_LR * A, steps)  # T D D
    adapted = c + P @ (theta - c)  # T D 1
    first_order = A_q @ (adapted - c_q)

    maml, *_ = MAML(network, inner_lr=INNER_LR, inner_steps=steps).meta_gradient(batch)
    fomaml, *_ = FOMAML(network, inner_lr=INNER_LR, inner_steps=steps).meta_gradient(batch)
    assert error(maml, {"weight": (P.mT @ first_order).mean(0).T}) <= EXACT
    assert error(fomaml, {"weight": first_order.mean(0).T}) <= EXACT

    # a minibatch of the whole support set is the support set, shuffled: joint training's warning is not for it
    reptile = Reptile(
        network,
        inner_lr=INNER_LR,
        inner_steps=steps,
        outer_lr=epsilon,
        inner_batch_size=SUPPORT if steps == 1 else None,
    )
    moved = difference(fit(reptile, [batch]), {"weight": theta.T})
    assert error(moved, {"weight": epsilon * (adapted - theta).mean(0).T}) <= EXACT


def test_differentiating_through_vmapped_gradients_is_wrong_for_adapted_batch_norm() -> None:
    """Why only the forward goes through vmap: the batching rule of batch norm's backward has no second derivative."""
    network, batch = smooth_conv4(), classification(1, 16, 16)

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(network, params, (x,)), y)

    theta = trained(network)
    stacked = {name: p.expand(T, *p.shape) for name, p in theta.items()}
    grads = vmap(grad(loss))(stacked, batch.support_x, batch.support_y)
    adapted = {name: p - INNER_LR * grads[name] for name, p in stacked.items()}
    query_losses = vmap(loss)(adapted, batch.query_x, batch.query_y)
    simplified = torch.autograd.grad(query_losses.mean(), theta.values())
    assert error(dict(zip(theta, simplified, strict=True)), maml_loop(network, batch, steps=1)) > 1e-4


# ------------------------------------------------------------------------------------------------ any network, any loss


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positive, self.negative = nn.Linear(3, WAYS), nn.Linear(3, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean(1)
        return self.positive(x) if x.sum() > 0 else self.negative(x).tanh()


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.zeros(len(x), WAYS)
        logits[:] = self.linear(x.mean(1)).tanh()
        return logits


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(3, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, dropout=0.0, activation="gelu", batch_first=True)
        self.embed, self.encoder = nn.Linear(3, 4), nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


class Tokens(nn.Module):
    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 4, padding_idx), nn.LayerNorm(4)
        self.head = nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x)).tanh().mean(1))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, WAYS), nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def normalised(norm: nn.Module) -> nn.Module:
    pooled = nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), norm, nn.Softplus(), pooled, nn.Flatten(), nn.Linear(16, WAYS))


def half_frozen() -> nn.Module:
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, WAYS))
    network[0].requires_grad_(False)
    return network


images = partial(classification, 1, 6, 6)


@pytest.mark.parametrize("learner_class", [MAML, FOMAML])
@pytest.mark.parametrize(
    ("make_network", "make_batch", "loops"),
    [
        pytest.param(Recurrent, sequences, True, id="lstm"),
        pytest.param(Branching, sequences, True, id="control-flow"),
        pytest.param(InPlace, sequences, True, id="in-place"),
        pytest.param(Attention, sequences, False, id="attention"),
        pytest.param(Transformer, sequences, False, id="transformer"),
        pytest.param(Tokens, tokens, False, id="embedding-layer-norm"),
        pytest.param(lambda: normalised(nn.BatchNorm2d(4)), images, False, id="batch-norm"),
        pytest.param(lambda: normalised(nn.InstanceNorm2d(4, affine=True)), images, False, id="instance-norm"),
        pytest.param(lambda: normalised(nn.GroupNorm(2, 4)), images, False, id="group-norm"),
        pytest.param(half_frozen, partial(classification, 6), False, id="frozen"),
        pytest.param(Unused, partial(classification, 6), False, id="unused"),
    ],
)
def test_any_network(
    learner_class: type[MAML], make_network: Callable[[], nn.Module], make_batch: Callable[[], TaskBatch], loops: bool
) -> None:
    network, batch = make_network(), make_batch()
    learner = learner_class(network, inner_lr=INNER_LR, inner_steps=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learner.meta_gradient(batch)
        meta_gradient, *_ = learner.meta_gradient(batch)
    assert ["Tasks run in a loop" in str(w.message) for w in caught] == [True] * loops
    assert learner.task_network.loops_over_tasks == loops

    if learner_class is FOMAML:
        assert error(meta_gradient, fomaml_loop(network, batch, 3)) <= EXACT
        return
    with sdpa_kernel(SDPBackend.MATH):
        assert error(meta_gradient, maml_loop(network, batch, 3)) <= EXACT
    # functional_call is common to the loop and the package, so: something without it
    direction = {name: torch.randn_like(g) for name, g in meta_gradient.items()}
    along = flat(meta_gradient) @ flat(direction)
    assert slope(network, batch, 3, direction) == pytest.approx(along.item(), rel=1e-6, abs=0)


def test_a_module_in_two_places() -> None:
    layer = nn.Linear(6, 6)
    network = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(6, WAYS))
    batch = classification(6)
    fomaml, *_ = FOMAML(network, inner_lr=INNER_LR, inner_steps=3).meta_gradient(batch)
    assert error(fomaml, fomaml_loop(network, batch, 3)) <= EXACT
    maml, *_ = MAML(network, inner_lr=INNER_LR, inner_steps=3).meta_gradient(batch)
    direction = {name: torch.randn_like(g) for name, g in maml.items()}
    along = flat(maml) @ flat(direction)
    assert slope(network, batch, 3, direction) == pytest.approx(along.item(), rel=1e-6, abs=0)


def test_tied_weights_beside_a_module_in_two_places() -> None:
    first, second, activation = nn.Linear(6, 6), nn.Linear(6, 6), nn.Tanh()
    second.weight = first.weight
    network = nn.Sequential(first, activation, second, activation, nn.Linear(6, WAYS))
    batch = classification(6)
    fomaml, *_ = FOMAML(network, inner_lr=INNER_LR, inner_steps=3).meta_gradient(batch)
    assert error(fomaml, fomaml_loop(network, batch, 3)) <= EXACT


def test_padding_embedding_is_not_adapted() -> None:
    network, batch = Tokens(padding_idx=0), tokens()
    meta_gradient, *_ = MAML(network, inner_lr=INNER_LR, inner_steps=3).meta_gradient(batch)
    assert error(meta_gradient, maml_loop(network, batch, 3)) <= EXACT


@pytest.mark.parametrize(
    ("make_network", "make_batch"),
    [
        pytest.param(Attention, sequences, id="attention"),
        pytest.param(Transformer, sequences, id="transformer"),
        pytest.param(lambda: normalised(nn.BatchNorm2d(4)), images, id="batch-norm"),
    ],
)
def test_evaluation_mode_adapts_as_training_mode_does(
    make_network: Callable[[], nn.Module], make_batch: Callable[[], TaskBatch]
) -> None:
    network, (support_x, support_y, query_x, _) = make_network(), make_batch()
    learner = MAML(network, inner_lr=INNER_LR, inner_steps=3).eval()
    predictions = learner.forward_with_weights(query_x[0], learner.inner_update(support_x[0], support_y[0]))
    expected = adapted_copy(network.train(), support_x[0], support_y[0], 3, F.cross_entropy)(query_x[0])
    torch.testing.assert_close(predictions, expected)


def test_batch_norm_of_the_user_keeps_its_statistics_and_is_trained() -> None:
    network, batch = normalised(nn.BatchNorm2d(4)), images()
    before, statistics = values_of(network), copy.deepcopy(dict(network.named_buffers()))
    after = fit(MAML(network, inner_lr=INNER_LR), [batch])
    assert (difference(after, before)["1.weight"] != 0).all()
    torch.testing.assert_close(values_of(network), after, rtol=0, atol=0)
    torch.testing.assert_close(dict(network.named_buffers()), statistics, rtol=0, atol=0)


@pytest.mark.parametrize("learner_class", [MAML, FOMAML, Reptile])
def test_frozen_parameters_are_neither_adapted_nor_trained(learner_class: type[MetaLearner]) -> None:
    network, batch = half_frozen(), classification(6)
    learner = learner_class(network)
    assert learner.inner_update(batch.support_x[0], batch.support_y[0]).keys() == {"2.weight", "2.bias"}
    before = values_of(network)
    moved = difference(fit(learner, [batch]), before)
    assert {name: bool((step != 0).all()) for name, step in moved.items()} == {
        "0.weight": False,
        "0.bias": False,
        "2.weight": True,
        "2.bias": True,
    }


@pytest.mark.parametrize("loops", [False, True])
def test_dropout_differs_between_tasks_in_training_only(loops: bool) -> None:
    learner = MAML(nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, WAYS)))
    learner.task_network.loops_over_tasks = loops
    theta = {name: p.expand(2, *p.shape) for name, p in learner.meta_parameters().items()}
    x = torch.randn(SUPPORT, 6).expand(2, SUPPORT, 6)  # the same task twice
    first, second = learner.task_network.predict(theta, x)
    assert not torch.allclose(first, second)
    first, second = learner.eval().task_network.predict(theta, x)
    torch.testing.assert_close(first, second)


def masked_error(predictions: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(predictions[targets > 0], targets[targets > 0])


@pytest.mark.parametrize(
    ("loss", "regression"),
    [
        pytest.param(F.l1_loss, True, id="l1"),
        pytest.param(nn.SmoothL1Loss(beta=0.5), True, id="module"),
        pytest.param(partial(F.cross_entropy, label_smoothing=0.1), False, id="label-smoothing"),
        pytest.param(masked_error, True, id="refused-by-vmap"),
    ],
)
@pytest.mark.parametrize(("learner_class", "reference"), [(MAML, maml_loop), (FOMAML, fomaml_loop)])
def test_any_loss(learner_class: type[MAML], reference: Callable[..., Params], loss: Loss, regression: bool) -> None:
    network, batch = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, WAYS)), classification(6)
    if regression:
        batch = batch._replace(support_y=torch.randn(T, SUPPORT, WAYS), query_y=torch.randn(T, QUERY, WAYS))
    meta_gradient, *_ = learner_class(network, loss, inner_lr=INNER_LR, inner_steps=3).meta_gradient(batch)
    assert error(meta_gradient, reference(network, batch, 3, loss)) <= EXACT


# --------------------------------------------------------------------------------------------------- one task by hand


@pytest.mark.parametrize(("learner_class", "reference"), [(MAML, maml_loop), (FOMAML, fomaml_loop)])
def test_backward_through_inner_update(learner_class: type[MAML], reference: Callable[..., Params]) -> None:
    network, batch = Conv4(WAYS, image_size=16, filters=4), classification(1, 16, 16)
    learner = learner_class(network, inner_lr=INNER_LR, inner_steps=3)
    adapted = learner.inner_update(batch.support_x[0], batch.support_y[0])
    F.cross_entropy(learner.forward_with_weights(batch.query_x[0], adapted), batch.query_y[0]).backward()
    one_task = TaskBatch(*(part[:1] for part in batch))
    assert error({name: p.grad for name, p in network.named_parameters()}, reference(network, one_task, 3)) <= EXACT


@pytest.mark.parametrize("learner_class", [MAML, FOMAML, Reptile])
def test_inner_update_in_evaluation(learner_class: type[MetaLearner]) -> None:
    network, (support_x, support_y, query_x, _) = mlp(), classification(6)
    learner = learner_class(network, inner_lr=INNER_LR, inner_steps=3, test_inner_steps=7).eval()
    adapted = learner.inner_update(support_x[0], support_y[0])
    fast = adapted_copy(network, support_x[0], support_y[0], 7, F.cross_entropy)
    assert error(adapted, values_of(fast)) <= EXACT
    assert all(p.is_leaf for p in adapted.values())
    torch.testing.assert_close(learner.forward_with_weights(query_x[0], adapted), fast(query_x[0]))


# --------------------------------------------------------------------------------------- whole steps, in a real Trainer


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize(
    ("options", "inner"),
    [
        pytest.param({"inner_lr": INNER_LR}, partial(SGD, lr=INNER_LR), id="sgd"),
        pytest.param(
            {"inner_lr": 0.001, "inner_optimizer": "adam"}, partial(Adam, lr=0.001, betas=(0.0, 0.999)), id="adam"
        ),
        pytest.param(
            {"inner_lr": 0.001, "inner_optimizer": "adam", "inner_beta1": 0.9},
            partial(Adam, lr=0.001, betas=(0.9, 0.999)),
            id="adam-beta1",
        ),
    ],
)
def test_reptile_step(options: dict[str, float | str], inner: Callable[..., Optimizer], iterations: int) -> None:
    network = Conv4(WAYS, image_size=16, filters=4)
    # batch norm cancels the biases before it: their gradients are rounding noise, which Adam would magnify
    for module in network.features:
        if isinstance(module, nn.Conv2d):
            module.bias.requires_grad_(False)
    batches = [classification(1, 16, 16) for _ in range(iterations)]
    before = values_of(network)
    expected = difference(reptile_loop(network, batches, 3, 0.2, inner), before)
    learner = Reptile(network, **options, inner_steps=3, outer_lr=0.2)
    assert error(difference(fit(learner, batches), before), expected) <= EXACT


@pytest.mark.parametrize(("learner_class", "reference"), [(MAML, maml_loop), (FOMAML, fomaml_loop)])
@pytest.mark.parametrize(
    ("options", "make_optimizer", "clip_norm"),
    [
        pytest.param({}, partial(Adam, lr=0.001), 1.0, id="default"),
        pytest.param({"gradient_clip_val": None}, partial(Adam, lr=0.001), None, id="adam"),
        pytest.param(
            {"optimizer": SGD, "outer_lr": 0.5, "gradient_clip_val": None}, partial(SGD, lr=0.5), None, id="sgd"
        ),
        pytest.param(
            {"optimizer": partial(SGD, momentum=0.9), "outer_lr": 0.5, "gradient_clip_val": 0.1},
            partial(SGD, lr=0.5, momentum=0.9),
            0.1,
            id="momentum",
        ),
    ],
)
@pytest.mark.parametrize("iterations", [1, 3])
def test_outer_steps(
    learner_class: type[MAML],
    reference: Callable[..., Params],
    options: dict[str, object],
    make_optimizer: Callable[..., Optimizer],
    clip_norm: float | None,
    iterations: int,
) -> None:
    network, batches = mlp(), [classification(6) for _ in range(iterations)]
    before = values_of(network)
    expected = difference(outer_loop(network, batches, reference, make_optimizer, clip_norm), before)
    learner = learner_class(network, inner_lr=INNER_LR, inner_steps=2, **options)
    assert error(difference(fit(learner, batches), before), expected) <= EXACT


@pytest.mark.parametrize(("learner_class", "reference"), [(MAML, maml_loop), (FOMAML, fomaml_loop)])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping(learner_class: type[MAML], reference: Callable[..., Params], algorithm: str) -> None:
    network, batch, limit, outer_lr = mlp(), classification(6), 1e-3, 0.5
    before, g = flat(values_of(network)), flat(reference(network, batch, 2))
    clipped = limit * g / g.norm() if algorithm == "norm" else g.clamp(-limit, limit)
    learner = learner_class(
        network,
        inner_lr=INNER_LR,
        inner_steps=2,
        outer_lr=outer_lr,
        optimizer=SGD,
        gradient_clip_val=limit,
        gradient_clip_algorithm=algorithm,
    )
    step = flat(fit(learner, [batch])) - before
    # torch divides by the norm + 1e-6
    torch.testing.assert_close(step, -outer_lr * clipped, rtol=1e-5, atol=0)
