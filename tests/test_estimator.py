"""The scikit-learn classifier."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import trainer
from sklearn.base import clone, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils import estimator_checks
from torch import nn
from torch.utils.data import DataLoader

from meta_lightning import MAML, MLP, Glyphs, TensorTasks, load_learner
from meta_lightning.data.tasks import Array
from meta_lightning.estimator import FewShotClassifier


@pytest.fixture
def drawings(glyphs: Glyphs) -> tuple[Array, Array]:
    """Nine drawings of each of three characters.  # 27 1 28 28, uint8"""
    data = glyphs.load()
    members = data.members("test")[:3]
    rows = np.concatenate([np.flatnonzero(data.labels == member)[:9] for member in members])
    return data.images[rows], np.array(["gimel", "alef", "bet"]).repeat(9)


def test_fit_and_predict_are_those_of_the_predictor(checkpoint: str, drawings: tuple[Array, Array]) -> None:
    x, y = drawings
    classifier = FewShotClassifier(checkpoint, steps=3).fit(x, y)
    predictor = load_learner(checkpoint).adapt(x, list(y), steps=3)
    assert list(classifier.classes_) == predictor.class_names == ["alef", "bet", "gimel"]
    assert np.array_equal(classifier.predict_proba(x), predictor.predict_proba(x).numpy())
    assert list(classifier.predict(x)) == predictor.predict(x)
    assert classifier.score(x, y) == (classifier.predict(x) == y).mean()


def test_labels_come_back_in_their_own_type(checkpoint: str, drawings: tuple[Array, Array]) -> None:
    x, _ = drawings
    for y in (np.arange(27) % 3 * 10, np.arange(27) % 2 == 0, np.arange(27) % 2 * 1.0):
        classifier = FewShotClassifier(checkpoint).fit(x, y)
        assert classifier.predict(x).dtype == y.dtype
        assert set(classifier.predict(x)) <= set(y)


def test_cross_validation_clone_and_grid_search(checkpoint: str, drawings: tuple[Array, Array]) -> None:
    x, y = drawings
    classifier = FewShotClassifier(checkpoint, steps=2)
    assert clone(classifier).get_params() == {"checkpoint": checkpoint, "steps": 2, "network": None, "output": None}
    scores = cross_val_score(classifier, x, y, cv=3, error_score="raise")
    assert scores.shape == (3,)
    assert all(0 <= score <= 1 for score in scores)
    search = GridSearchCV(classifier, {"steps": [1, 3]}, cv=3, error_score="raise").fit(x, y)
    assert search.best_params_["steps"] in (1, 3)
    restored = pickle.loads(pickle.dumps(search.best_estimator_))
    assert np.array_equal(restored.predict_proba(x), search.predict_proba(x))


def test_flattened_images_in_a_pipeline(checkpoint: str, drawings: tuple[Array, Array]) -> None:
    x, y = drawings
    pipeline = make_pipeline(FunctionTransformer(lambda rows: rows / 255), FewShotClassifier(checkpoint))
    pipeline.fit(x.reshape(27, -1), y)
    expected = FewShotClassifier(checkpoint).fit(x, y).predict_proba(x)
    assert np.allclose(pipeline.predict_proba(x.reshape(27, -1)), expected, atol=1e-5)
    assert cross_val_score(pipeline, x.reshape(27, -1), y, cv=3, error_score="raise").shape == (3,)


def test_tables_and_a_network_made_in_python(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = np.arange(10).repeat(12)
    x = rng.normal(size=(10, 4))[y] * 3 + rng.normal(size=(120, 4))
    fit = trainer(max_steps=20, limit_val_batches=0)
    torch.manual_seed(0)
    data = TensorTasks(x, y, ways=2, shots=3, queries=5, split_fractions=(1.0, 0.0, 0.0))
    fit.fit(MAML(MLP(in_features=4, hidden=[16], out_features=2), inner_lr=0.1), data)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    network = MLP(in_features=4, hidden=[16], out_features=2)
    classifier = FewShotClassifier(str(tmp_path / "a.ckpt"), steps=50, network=network)
    pipeline = make_pipeline(StandardScaler(), classifier)
    assert cross_val_score(pipeline, x[:36], y[:36], cv=3, error_score="raise").mean() > 0.8


@pytest.mark.parametrize(
    "check",
    [
        estimator_checks.check_estimator_cloneable,
        estimator_checks.check_estimator_repr,
        estimator_checks.check_estimator_tags_renamed,
        estimator_checks.check_no_attributes_set_in_init,
        estimator_checks.check_mixin_order,
        estimator_checks.check_get_params_invariance,
        estimator_checks.check_set_params,
        estimator_checks.check_valid_tag_types,
    ],
)
def test_sklearns_own_checks(check: Any, checkpoint: str) -> None:
    """Those that do not fit tables of any width, which no checkpoint takes."""
    check("FewShotClassifier", FewShotClassifier(checkpoint))


@pytest.mark.parametrize(
    "check",
    [
        estimator_checks.check_dict_unchanged,
        estimator_checks.check_methods_sample_order_invariance,
        estimator_checks.check_methods_subset_invariance,
    ],
)
def test_sklearns_own_checks_on_tables_of_three_columns(check: Any, tmp_path: Path) -> None:
    """An answer depends neither on the order of the samples nor on which others come with it."""
    network = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(12, 3), torch.arange(3).repeat(4)
    fit = trainer(max_steps=1, limit_val_batches=0)
    fit.fit(MAML(network), DataLoader([(x[None], y[None], x[None], y[None])], batch_size=None))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    check("FewShotClassifier", FewShotClassifier(str(tmp_path / "a.ckpt"), network=network))


def test_what_is_refused(checkpoint: str, drawings: tuple[Array, Array]) -> None:
    x, y = drawings
    assert is_classifier(FewShotClassifier(checkpoint))
    with pytest.raises(NotFittedError):
        FewShotClassifier(checkpoint).predict(x)
    with pytest.raises(ValueError, match="Unknown label type: continuous"):
        FewShotClassifier(checkpoint).fit(x, np.linspace(0, 1, 27))
    with pytest.raises(ValueError, match=r"\by .*\b2 .*\[0\]"):
        FewShotClassifier(checkpoint).fit(x[:9], y[:9])
    with pytest.raises(ValueError, match=r"\bx .*\[S, 1, 28, 28\].*\[27, 1, 28, 20\]"):
        FewShotClassifier(checkpoint).fit(x[..., :20], y)
    with pytest.raises(ValueError, match=r"path .*nothing\.ckpt"):
        FewShotClassifier("nothing.ckpt").fit(x, y)
