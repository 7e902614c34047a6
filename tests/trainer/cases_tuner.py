"""Lightning's Tuner: the checks of what it does here."""

from typing import Any

import pytest
from lightning.pytorch.tuner import Tuner
from registry import History, case, equal, learner_of, quiet, sines, state

from meta_lightning import MAML, MetaLearner, Reptile
from meta_lightning.checks import InputError

RANGE: dict[str, Any] = {"min_lr": 1e-4, "max_lr": 0.9, "num_training": 30, "early_stop_threshold": None}


@case(
    "tuner",
    "lr_find",
    "works",
    'with `attr_name="outer_lr"` tries the whole range, sets its suggestion, and leaves θ as it was',
    with_="MAML",
    algorithms=[MAML],
)
def lr_find(algorithm: type[MetaLearner]) -> None:
    learner, data, history = learner_of(algorithm), sines(epoch_length=100), History()
    before = state(learner)
    fit = quiet(history, max_epochs=-1, max_steps=5)
    found = Tuner(fit).lr_find(learner, datamodule=data, attr_name="outer_lr", **RANGE)
    assert found is not None
    assert {*learner.wrapped} == {*learner.meta_parameters()}  # known by then: DDP compares them at each step
    tried = found.results["lr"]
    assert [tried[0], tried[-1], len(tried)] == [pytest.approx(1e-4), pytest.approx(0.9), 30]
    assert len({*found.results["loss"]}) == 30
    assert tried[0] < learner.outer_lr == learner.hparams.outer_lr == found.suggestion()
    assert equal(state(learner), before)
    assert fit.global_step == 0
    fit.fit(learner, data)
    assert history.rates == [[learner.outer_lr]] * 5
    assert history.meets(*range(5))
    plain = learner_of(algorithm, outer_lr=learner.outer_lr)
    quiet(max_epochs=-1, max_steps=5).fit(plain, sines(epoch_length=100))
    assert equal(state(plain), state(learner))


@case("tuner", "lr_find", "refused", "ε is no learning rate", with_="Reptile", algorithms=[Reptile])
def lr_find_of_reptile(algorithm: type[MetaLearner]) -> None:
    learner = learner_of(algorithm)
    with pytest.raises(InputError, match=r"outer_lr .*\bgot _ExponentialLR"):
        Tuner(quiet(max_epochs=-1, max_steps=5)).lr_find(learner, datamodule=sines(), attr_name="outer_lr", **RANGE)
    assert learner.outer_lr == 0.1


@case(
    "tuner",
    "scale_batch_size",
    "works",
    'with `batch_arg_name="meta_batch_size"`; as meta-batches that do not fit into memory are taken in several passes, '
    "it goes on to `max_trials`",
)
def scale_batch_size(algorithm: type[MetaLearner]) -> None:
    options: dict[str, Any] = {"batch_arg_name": "meta_batch_size", "max_trials": 3, "steps_per_trial": 1}
    learner, data, history = learner_of(algorithm), sines(epoch_length=1000), History()
    before = state(learner)
    fit = quiet(history, max_epochs=-1, max_steps=3)
    assert Tuner(fit).scale_batch_size(learner, datamodule=data, **options) == data.meta_batch_size == 8
    assert equal(state(learner), before)
    fit.fit(learner, data)
    assert history.meets(0, 1, 2, tasks=8)
    tuner: Any = Tuner(quiet())
    assert tuner.scale_batch_size(learner_of(algorithm), datamodule=sines(test_tasks=64), method="test", **options) == 8
