"""The parts of MAML++, alone and together, against literal loops over tasks and finite differences, in float64."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RUN, TINY, fails, trainer
from references import EXACT, INNER_LR, TASKS_FROM_A_LIST, Params, error, fit, trained
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from meta_lightning import (
    FOMAML,
    IMAML,
    LSLR,
    MAML,
    MLP,
    Adam,
    Glyphs,
    MetaLearner,
    ProtoNet,
    Prototypes,
    Reptile,
    Sinusoid,
    TaskBatch,
    load_learner,
)
from meta_lightning.algorithms.maml import step_weights
from meta_lightning.checks import InputError
from meta_lightning.cli import main
from meta_lightning.data.tasks import as_task_batch
from meta_lightning.runs.ensemble import best_members

pytestmark = TASKS_FROM_A_LIST
STEPS, D, WAYS = 3, 8, 4
RATES = ".rule.rates."


class Network(nn.Module):
    """A smooth body, batch norm included, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, D), nn.BatchNorm1d(D, track_running_stats=False), nn.Tanh())
        self.head = nn.Linear(D, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


def tasks(count: int = 3, shots: int = 2, queries: int = 3) -> TaskBatch:
    def part(samples: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(WAYS).repeat_interleave(samples).repeat(count, 1)
        return torch.randn(count, WAYS * samples, 6), y

    return TaskBatch(*part(shots), *part(queries))


def prepared(algorithm: type[MAML] = MAML, **options: Any) -> tuple[Network, MAML]:
    """A learner whose rates, if it has any, are no two the same."""
    network = Network()
    learner = algorithm(network, inner_lr=INNER_LR, inner_steps=STEPS, **options)
    with torch.no_grad():
        for rates in learner.inner_rule.parameters():
            rates.copy_(torch.rand_like(rates) * 0.3)
    return network, learner


def rates_of(learner: MAML) -> Params:
    """The rates of each parameter tensor."""
    return {n.removeprefix("rates.").replace("/", "."): p for n, p in learner.inner_rule.named_parameters()}


def prototypes(network: Network, theta: Params, scale: Tensor, x: Tensor, y: Tensor) -> Params:
    """A head from the class means of the features."""
    body = {n.removeprefix("body."): p for n, p in theta.items() if n.startswith("body.")}
    features: Tensor = functional_call(network.body, body, (x,))
    centres = torch.stack([features[y == k].mean(0) for k in range(WAYS)])
    return {"head.weight": 2 * scale * centres, "head.bias": -scale * (centres**2).sum(1)}


def query_losses(
    network: Network, theta: Params, rates: Params, batch: TaskBatch, follow: bool = True, scale: Tensor | None = None
) -> Tensor:
    """The query losses of a loop over tasks after each step; without ``follow`` the inner gradients are constants."""
    losses = []
    for x, y, query_x, query_y in zip(*batch, strict=True):
        params = theta if scale is None else theta | prototypes(network, theta, scale, x, y)
        for k in range(STEPS):
            # a point of its own, so that the head is not differentiated by the body
            held = {n: (p if follow else p.detach()) + torch.zeros_like(p).requires_grad_() for n, p in params.items()}
            loss = F.cross_entropy(functional_call(network, held, (x,)), y)
            grads = torch.autograd.grad(loss, list(held.values()), create_graph=follow)
            rate = {n: rates[n][min(k, len(rates[n]) - 1)] if n in rates else INNER_LR for n in params}
            params = {n: p - rate[n] * g for (n, p), g in zip(params.items(), grads, strict=True)}
            losses.append(F.cross_entropy(functional_call(network, params, (query_x,)), query_y))
    return torch.stack(losses).view(-1, STEPS)


def gradient(loss: Tensor, theta: Params, rates: Params, scale: Params | None = None) -> Params:
    """The gradient by θ, the rates and a scale, named as a learner names it."""
    named = theta | {RATES + n.replace(".", "/"): p for n, p in rates.items()} | (scale or {})
    grads = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
    return dict(zip(named, grads, strict=True))


# --------------------------------------------------------------------------------------------------------------- LSLR


@pytest.mark.parametrize("steps", [1, STEPS - 1, STEPS, STEPS + 2])
@pytest.mark.parametrize("options", [{}, {"recompute_inner_steps": True}, {"tasks_per_pass": 1}], ids=str)
@pytest.mark.parametrize("algorithm", [MAML, FOMAML])
def test_learnt_rates_agree_with_a_loop(algorithm: type[MAML], options: dict[str, Any], steps: int) -> None:
    network, learner = prepared(algorithm, inner_rule=LSLR(steps), **options)
    batch, theta, rates = tasks(), trained(network), rates_of(learner)
    meta_gradient, losses, _ = learner.meta_gradient(batch)
    of_tasks = query_losses(network, theta, rates, batch, follow=algorithm is MAML)[:, -1]
    expected = gradient(of_tasks.mean(), theta, rates)
    assert losses.tolist() == pytest.approx(of_tasks.tolist(), abs=EXACT)
    assert error(meta_gradient, expected) <= EXACT
    unused = [g[STEPS:] for name, g in meta_gradient.items() if name.startswith(RATES)]
    assert not torch.cat(unused).any()


def test_rates_start_at_inner_lr_one_per_tensor_and_step() -> None:
    learner = MAML(Network(), inner_lr=INNER_LR, inner_rule=LSLR(7), inner_freeze=["body.1.*"])
    rates = rates_of(learner)
    assert {*rates} == {name for name in trained(Network()) if not name.startswith("body.1.")}
    assert {tuple(rate.shape) for rate in rates.values()} == {(7,)}
    assert {float(rate.unique()) for rate in rates.values()} == {INNER_LR}


def test_learnt_rates_compile() -> None:
    network, learner = prepared(inner_rule=LSLR(STEPS - 1), compile_passes="record")
    batch = tasks()
    meta_gradient, *_ = learner.meta_gradient(batch)
    loss = query_losses(network, trained(network), rates_of(learner), batch)[:, -1].mean()
    assert len(learner.passes.compiled.passes) == 1
    assert error(meta_gradient, gradient(loss, trained(network), rates_of(learner))) <= EXACT


def test_a_head_of_any_number_of_rows_shares_its_rates() -> None:
    _, learner = prepared(inner_rule=LSLR(), head_start=Prototypes())
    x, y = torch.randn(14, 6), torch.arange(7).repeat(2)
    assert learner.eval().adapt(x, y, steps=8)(x).shape == (14, 7)


@pytest.mark.usefixtures("glyphs")
def test_learnt_rates_from_the_command_line() -> None:
    torch.set_default_dtype(torch.float)
    main(["fit", "--config", TINY, "--model.inner_rule", "LSLR", "--model.inner_rule.steps", "2"])
    rule = load_learner("lightning_logs/version_0/checkpoints/last.ckpt").inner_rule
    assert isinstance(rule, LSLR)
    assert {rate.numel() for rate in rule.parameters()} == {2}
    assert (rule.get_parameter("rates.head/weight") != 0.01).all()  # they were learnt


@pytest.mark.parametrize("algorithm", [Reptile, IMAML])
def test_algorithms_without_a_gradient_by_the_rates_refuse_them(algorithm: Any) -> None:
    with pytest.raises(InputError, match=r"inner_rule .*got \['rates\."):
        algorithm(Network(), inner_rule=LSLR())


def test_steps_have_a_range() -> None:
    with pytest.raises(InputError, match=r"steps .* 0"):
        LSLR(steps=0)


# ------------------------------------------------------------------------------ loss of all steps, order of derivatives


def authors_weights(epoch: int, epochs: int, steps: int = STEPS) -> list[float]:
    """``get_per_step_loss_importance_vector`` of AntreasAntoniou/HowToTrainYourMAMLPytorch."""
    decay = 1.0 / steps / epochs
    least = 0.03 / steps
    last = min(1.0 / steps + epoch * (steps - 1) * decay, 1.0 - (steps - 1) * least)
    return [max(1.0 / steps - epoch * decay, least)] * (steps - 1) + [last]


def at_iteration(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MetaLearner, "global_step", number)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_weights_are_those_of_the_authors(steps: int) -> None:
    for epoch in range(10):
        weights = step_weights(steps, epoch / 10)
        assert weights == pytest.approx(authors_weights(epoch, 10, steps), abs=1e-15)
        assert sum(weights) == pytest.approx(1)
    assert step_weights(5, 0) == pytest.approx([0.2] * 5)
    assert step_weights(5, 0.999) == pytest.approx([0.006] * 4 + [0.976])


@pytest.mark.parametrize("iteration", [0, 4, 9, 10, 11])
@pytest.mark.parametrize("options", [{}, {"recompute_inner_steps": True}, {"tasks_per_pass": 2}], ids=str)
@pytest.mark.parametrize("algorithm", [MAML, FOMAML])
def test_the_loss_of_all_steps_agrees_with_a_loop(
    algorithm: type[MAML], options: dict[str, Any], iteration: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, learner = prepared(algorithm, multi_step_loss=10, **options)
    at_iteration(iteration, monkeypatch)
    batch, theta = tasks(), trained(network)
    meta_gradient, losses, _ = learner.meta_gradient(batch)
    of_steps = query_losses(network, theta, {}, batch, follow=algorithm is MAML)  # T K
    weights = torch.tensor(authors_weights(iteration, 10) if iteration < 10 else [0.0, 0.0, 1.0])
    expected = gradient((of_steps @ weights).mean(), theta, {})
    assert losses.tolist() == pytest.approx(of_steps[:, -1].tolist(), abs=EXACT)
    assert error(meta_gradient, expected) <= EXACT


@pytest.mark.parametrize("recompute", [False, True])
def test_derivatives_are_of_the_first_order_at_first(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    network, learner = prepared(first_order_steps=3, recompute_inner_steps=recompute)
    batch, theta = tasks(), trained(network)
    for iteration in (0, 2, 3, 4):
        at_iteration(iteration, monkeypatch)
        loss = query_losses(network, theta, {}, batch, follow=iteration >= 3)[:, -1].mean()
        assert error(learner.meta_gradient(batch)[0], gradient(loss, theta, {})) <= EXACT


def test_one_query_forward_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    _, learner = prepared(multi_step_loss=2)
    predicted = []
    predict = learner.task_network.predict
    monkeypatch.setattr(learner.task_network, "predict", lambda *args: predicted.append(args) or predict(*args))
    for iteration, forwards in ((1, 2 * STEPS), (2, STEPS + 1)):
        at_iteration(iteration, monkeypatch)
        predicted.clear()
        learner.meta_gradient(tasks())
        assert len(predicted) == forwards


def test_algorithms_without_inner_steps_have_one_loss() -> None:
    batch, gradients = tasks(), []
    for options in ({}, {"multi_step_loss": 5, "first_order_steps": 3}):
        torch.manual_seed(1)
        gradients.append(ProtoNet(Network(), **options).meta_gradient(batch)[0])
    assert error(gradients[1], gradients[0]) <= EXACT


@pytest.mark.parametrize("iteration", [0, 7, 20])
@pytest.mark.parametrize("algorithm", [MAML, FOMAML])
def test_the_parts_compose(algorithm: type[MAML], iteration: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"inner_rule": LSLR(2), "head_start": Prototypes(0.7), "multi_step_loss": 10, "first_order_steps": 5}
    network, learner = prepared(algorithm, **parts)
    at_iteration(iteration, monkeypatch)
    batch, rates, scale = tasks(), rates_of(learner), learner.head_start.get_parameter("learnt_scale")
    theta = {name: p for name, p in trained(network).items() if name.startswith("body.")}
    follow = algorithm is MAML and iteration >= 5
    weights = torch.tensor(authors_weights(iteration, 10) if iteration < 10 else [0.0, 0.0, 1.0])
    loss = (query_losses(network, theta, rates, batch, follow, scale) @ weights).mean()
    expected = gradient(loss, theta, rates, {".head.learnt_scale": scale})
    assert error(learner.meta_gradient(batch)[0], expected) <= EXACT


def test_the_composition_agrees_with_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    network, learner = prepared(inner_rule=LSLR(), head_start=Prototypes(0.7), multi_step_loss=10)
    at_iteration(4, monkeypatch)
    batch, weights = tasks(), torch.tensor(authors_weights(4, 10))
    scale = learner.head_start.get_parameter("learnt_scale")
    parts = [{n: p for n, p in trained(network).items() if n.startswith("body.")}, rates_of(learner), {"scale": scale}]
    prefixes = ["", RATES, ".head.learnt_"]
    meta_gradient, *_ = learner.meta_gradient(batch)
    for _ in range(3):
        along = [{n: torch.randn_like(p) for n, p in params.items()} for params in parts]
        values = []
        for h in (1e-5, -1e-5):
            theta, rates, scales = (
                {n: (p + h * towards[n]).detach() for n, p in params.items()}
                for params, towards in zip(parts, along, strict=True)
            )
            losses = query_losses(network, theta, rates, batch, follow=False, scale=scales["scale"])
            values.append(float((losses @ weights).mean()))
        slope = 0.0
        for prefix, towards in zip(prefixes, along, strict=True):
            for name, direction in towards.items():
                own = prefix + (name if prefix != RATES else name.replace(".", "/"))
                slope += float((meta_gradient[own] * direction).sum())
        assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


# multi_step_loss and first_order_steps end in the middle of training
ANNEALED = {"inner_rule": LSLR(2), "multi_step_loss": 5, "first_order_steps": 3}


@pytest.mark.parametrize("algorithm", [MAML, FOMAML])
def test_compiled_training_is_the_same(algorithm: type[MAML]) -> None:
    batches = [tasks() for _ in range(8)]
    thetas, graphs = [], 0
    for compile_passes in (False, "record"):
        torch.manual_seed(1)
        _, learner = prepared(algorithm, compile_passes=compile_passes, **ANNEALED)
        thetas.append(fit(learner, batches))
        graphs = len(learner.passes.compiled.passes)
    assert graphs == {MAML: 3, FOMAML: 2}[algorithm]  # one per phase, whatever the weights
    assert error(thetas[1], thetas[0]) <= EXACT


@pytest.mark.parametrize("stop", [2, 4])
def test_a_resume_goes_on_with_the_annealing(stop: int, tmp_path: Path, sinusoid: Sinusoid) -> None:
    torch.set_default_dtype(torch.float)

    def run(steps: int, path: Path | None = None) -> tuple[MetaLearner, Any]:
        torch.manual_seed(1)
        learner = MAML(MLP(hidden=[8]), inner_lr=INNER_LR, inner_steps=STEPS, **ANNEALED)
        resumed = trainer(max_steps=steps, num_sanity_val_steps=0, limit_val_batches=0)
        resumed.fit(learner, sinusoid, ckpt_path=path)
        return learner, resumed

    whole, _ = run(7)
    _, stopped = run(stop)
    stopped.save_checkpoint(tmp_path / "a.ckpt")
    torch.testing.assert_close(run(7, tmp_path / "a.ckpt")[0].state_dict(), whole.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("algorithm", "options", "said"),
    [
        (MAML, {"multi_step_loss": -1}, "multi_step_loss .* -1"),
        (FOMAML, {"first_order_steps": -2}, "first_order_steps .* -2"),
        (IMAML, {"multi_step_loss": 5}, "multi_step_loss .* IMAML.* 5"),
    ],
)
def test_options_have_a_range(algorithm: Any, options: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        algorithm(Network(), **options)


# ----------------------------------------------------------------------------------------------------------- ensembles


def record_of_a_test(*options: str) -> dict[str, Any]:
    """The record of a test."""
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    main(["test", *quiet, "--data.test_tasks", "20", *options])
    newest = max(Path("lightning_logs").glob("version_*/test.json"), key=lambda path: int(path.parent.name[8:]))
    record: dict[str, Any] = json.loads(newest.read_text())
    return record


@pytest.mark.parametrize("algorithm", ["MAML", "Reptile"])
def test_an_ensemble_averages_the_best_checkpoints(algorithm: str, glyphs: Glyphs) -> None:
    torch.set_default_dtype(torch.float)
    options = ["--model", algorithm, "--model.inner_lr", "0.1", "--checkpoint.save_top_k", "3"]
    main(["fit", "--config", TINY, *options, "--trainer.max_steps", "10"])  # 5 validations
    moved = RUN.rename("moved")
    best = moved / "checkpoints/best.ckpt"
    last = torch.load(moved / "checkpoints/last.ckpt", weights_only=True)
    (state,) = (s for s in last["callbacks"].values() if "best_k_models" in s)
    scores = {Path(name).name: float(score) for name, score in state["best_k_models"].items()}
    names = sorted(scores, key=lambda name: -scores[name])
    assert len(names) == 3

    record = record_of_a_test("--ckpt_path", str(best), "--ensemble", "3")
    assert record["ensemble"] == names
    data = Glyphs(queries=2, meta_batch_size=2, test_tasks=20)
    data.setup("test")
    learners = [load_learner(best.with_name(name)) for name in names]
    accuracies, losses = [], []
    for batch in data.test_dataloader():
        of_members = [learner.predict_tasks(as_task_batch(batch))[1].softmax(2) for learner in learners]
        mean = torch.stack(of_members).mean(0)
        accuracies += (mean.argmax(2) == batch[3]).float().mean(1).tolist()
        losses += [F.nll_loss(of_task.log(), y).item() for of_task, y in zip(mean, batch[3], strict=True)]
    assert record["figures"]["test/accuracy"] == pytest.approx(sum(accuracies) / 20, abs=1e-6)
    assert record["figures"]["test/loss"] == pytest.approx(sum(losses) / 20, abs=1e-5)

    alone = record_of_a_test("--ckpt_path", str(best.with_name(names[0])))
    assert "ensemble" not in alone
    of_one = record_of_a_test("--ckpt_path", str(best), "--ensemble", "1")
    assert of_one["ensemble"] == names[:1]
    assert of_one["figures"] == alone["figures"] != record["figures"]
    said = fails("test", "--ckpt_path", str(best), "--ensemble", "4")
    assert re.search(r"ensemble .* 4: .* has 3", said)
    said = fails("fit", "--ckpt_path", str(best), "--ensemble", "2")
    assert re.search("ensemble .* in fit", said)


def test_an_ensemble_needs_a_checkpoint_and_a_number() -> None:
    assert re.search("ensemble .*--ckpt_path.* none", fails("test", "--config", TINY, "--ensemble", "2"))
    assert re.search("ensemble .* -1", fails("test", "--config", TINY, "--ensemble", "-1"))


def test_an_ensemble_averages_real_predictions_and_leaves_the_learner_as_it_was(sinusoid: Sinusoid) -> None:
    torch.set_default_dtype(torch.float)
    learners = [Reptile(MLP(hidden=[8]), inner_rule=Adam()).eval() for _ in range(3)]
    batch = as_task_batch(next(iter(sinusoid.test_dataloader())))
    of_members = [member.predict_tasks(batch) for member in learners]
    expected = [torch.stack(of_moment).mean(0) for of_moment in zip(*of_members, strict=True)]
    learner = Reptile(MLP(hidden=[8]), inner_rule=Adam()).eval()
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    learner.members = {str(i): other.state_dict() for i, other in enumerate(learners)}
    for got, mean in zip(learner.predict_tasks(batch), expected, strict=True):
        torch.testing.assert_close(got, mean)
    torch.testing.assert_close(learner.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_newest_checkpoint_knows_the_best(sign: int, tmp_path: Path) -> None:
    for step, name, kept in [(1, "a", {"a": 5}), (2, "b", {"b": 9, "c": 8, "a": 7, "gone": 6}), (3, "c", {"c": 8})]:
        scores = {f"/elsewhere/{key}.ckpt": torch.tensor(float(sign * score)) for key, score in kept.items()}
        state = {"best_k_models": scores, "best_model_score": torch.tensor(float(sign * max(kept.values())))}
        checkpoint = {"global_step": step % 3, "callbacks": {"Other": {}, "Best": state}, "state_dict": {"is": name}}
        torch.save(checkpoint, tmp_path / f"{name}.ckpt")
    accepted: list[Any] = []
    members = best_members(tmp_path / "a.ckpt", 3, accepted.append)
    assert members == {"b.ckpt": {"is": "b"}, "c.ckpt": {"is": "c"}, "a.ckpt": {"is": "a"}}
    assert len(accepted) == 3
    with pytest.raises(InputError, match=r"ensemble .* 4: .* has 3"):
        best_members(tmp_path / "a.ckpt", 4, accepted.append)


def test_a_learner_has_its_own_weights_after_an_error_of_a_member() -> None:
    learner = MAML(nn.Linear(4, 2), inner_steps=1).eval()
    own = {name: value.clone() for name, value in learner.state_dict().items()}
    other = {name: value + 1 for name, value in own.items()}
    learner.members = {"a": other, "b": other}
    x, y = torch.randn(1, 4, 3), torch.arange(2).repeat(1, 2)  # too few features
    with pytest.raises(RuntimeError) as kept:
        learner.predict_tasks(TaskBatch(x, y, x, y))
    assert kept.tb is not None  # whose frames are alive
    assert all(torch.equal(value, own[name]) for name, value in learner.state_dict().items())
