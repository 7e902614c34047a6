"""The scikit-learn classifier."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import trainer
from scipy.sparse import csr_array
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


class AnyWidth(nn.Module):
    """A network of tables of up to 60 columns."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(60, 32), nn.Tanh(), nn.Linear(32, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(nn.functional.pad(x, (0, 60 - x.shape[1])))  # type: ignore[no-any-return]


HASH = "joblib's hash of a copied torch module differs from that of the original"
WIDTH = "its tables have other than the 3 columns that the checkpoint takes"
OTHER_WIDTH = (
    "check_classifier_data_not_an_array",
    "check_classifiers_classes",
    "check_classifiers_train",
    "check_dtype_object",
    "check_estimators_dtypes",
    "check_estimators_fit_returns_self",
    "check_fit2d_1feature",
    "check_fit_check_is_fitted",
    "check_fit_idempotent",
    "check_n_features_in",
    "check_n_features_in_after_fitting",
    "check_positive_only_tag_during_fit",
    "check_readonly_memmap_input",
)


@pytest.mark.parametrize(("width", "others"), [(60, ()), (3, OTHER_WIDTH)])
def test_sklearns_own_checks(width: int, others: tuple[str, ...], tmp_path: Path) -> None:
    """All pass where the network takes any number of columns; where it takes three, those on tables of three do."""
    torch.manual_seed(0)
    network = AnyWidth() if width == 60 else nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 3))
    x, y = torch.randn(12, width), torch.arange(3).repeat(4)
    fit = trainer(max_steps=1, limit_val_batches=0)
    fit.fit(MAML(network, inner_lr=0.1), DataLoader([(x[None], y[None], x[None], y[None])], batch_size=None))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    expected = {"check_estimators_overwrite_params": HASH} | dict.fromkeys(others, WIDTH)
    classifier = FewShotClassifier(str(tmp_path / "a.ckpt"), steps=100, network=network)
    results = estimator_checks.check_estimator(classifier, expected_failed_checks=expected, on_skip=None)
    assert {result["check_name"] for result in results if result["status"] == "xfail"} == expected.keys()
    assert sum(result["status"] == "passed" for result in results) >= 37


def test_fit_leaves_the_given_network_as_it_is(tmp_path: Path) -> None:
    network = nn.Linear(3, 2)
    fit = trainer(max_steps=1, limit_val_batches=0)
    x, y = torch.randn(8, 3), torch.arange(2).repeat(4)
    fit.fit(MAML(network, inner_lr=0.1), DataLoader([(x[None], y[None], x[None], y[None])], batch_size=None))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    other = nn.Linear(3, 2)
    before = copy.deepcopy(other.state_dict())
    FewShotClassifier(str(tmp_path / "a.ckpt"), network=other).fit(x.numpy(), y.numpy())
    assert all(torch.equal(other.state_dict()[name], value) for name, value in before.items())


def test_samples_are_validated_as_by_scikit_learn(checkpoint: str, drawings: tuple[Array, Array]) -> None:
    x, y = drawings
    classifier = FewShotClassifier(checkpoint, steps=1).fit(x, y)
    expected = classifier.predict_proba(x)
    assert classifier.n_features_in_ == 28 * 28
    flat = x.reshape(27, -1)
    for same in (flat, x.astype(np.int64), flat.astype(np.int32), torch.from_numpy(x), x.tolist()):
        assert np.array_equal(classifier.predict_proba(same), expected)
        assert np.array_equal(FewShotClassifier(checkpoint, steps=1).fit(same, y).predict_proba(x), expected)
    scaled = (flat / 255).astype(object)
    assert np.allclose(classifier.predict_proba(scaled), expected, atol=1e-5)
    frame = pd.DataFrame(flat, columns=[f"pixel{i}" for i in range(784)])
    named = FewShotClassifier(checkpoint, steps=1).fit(frame, y)
    assert list(named.feature_names_in_[:2]) == ["pixel0", "pixel1"]
    assert np.array_equal(named.predict_proba(frame), expected)
    with pytest.raises(ValueError, match="feature names should match"):
        named.predict(frame[frame.columns[::-1]])
    for refused, message in (
        (csr_array(flat), "Sparse data was passed"),
        (flat[:0], r"0 sample\(s\)"),
        (x[:0], r"0 sample\(s\)"),
        (flat[:, :700], "X has 700 features, but FewShotClassifier is expecting 784 features"),
        (flat.astype(complex) + 1j, "Complex data not supported"),
        (np.where(flat > 250, np.nan, flat), "Input X contains NaN"),
        (flat.astype(str).astype(object)[:, :1].repeat(784, 1) + "x", "could not convert string to float"),
        (flat.astype(int) + 300, "x must hold pixels"),
    ):
        for call in (classifier.predict, lambda X: FewShotClassifier(checkpoint).fit(X, y[: X.shape[0]])):
            if "expecting" not in message or call == classifier.predict:
                with pytest.raises((ValueError, TypeError), match=message):
                    call(refused)
    with pytest.raises(ValueError, match="requires y to be passed"):
        FewShotClassifier(checkpoint).fit(x, None)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        FewShotClassifier(checkpoint).fit(x, y[:9])


def test_what_is_refused(checkpoint: str, drawings: tuple[Array, Array]) -> None:
    x, y = drawings
    assert is_classifier(FewShotClassifier(checkpoint))
    with pytest.raises(NotFittedError):
        FewShotClassifier(checkpoint).predict(x)
    with pytest.raises(ValueError, match="Unknown label type: continuous"):
        FewShotClassifier(checkpoint).fit(x, np.linspace(0, 1, 27))
    with pytest.raises(ValueError, match=r"\by .*\b2 .*\['gimel'\]"):
        FewShotClassifier(checkpoint).fit(x[:9], y[:9])
    with pytest.raises(ValueError, match=r"\bx .*\[S, 1, 28, 28\].*\[27, 1, 28, 20\]"):
        FewShotClassifier(checkpoint).fit(x[..., :20], y)
    with pytest.raises(ValueError, match=r"path .*nothing\.ckpt"):
        FewShotClassifier("nothing.ckpt").fit(x, y)
