"""A learner's checkpoint as a scikit-learn classifier."""

import copy
import math
from typing import Any

import numpy as np
from torch import nn

from meta_lightning.adaptation.predictor import Predictor
from meta_lightning.checks import optional, require
from meta_lightning.data.tasks import Array
from meta_lightning.inner.samples import Output
from meta_lightning.train import load_learner

with optional("FewShotClassifier", "sklearn"):
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data


class FewShotClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Adapts a checkpoint to a few examples: ``FewShotClassifier("best.ckpt").fit(X, y).predict(X)``.

    Samples are those of ``MetaLearner.adapt``. Images, ``M C H W`` as in the training data set, may also come flattened
    to ``M C·H·W``, as other steps of a Pipeline require, and as integers of any type. Input is validated as by
    scikit-learn's own classifiers.

    Args:
        checkpoint: Path of the checkpoint, or ``hub:NAME`` for one that comes with the package.
        steps: Inner steps. Default: the checkpoint's ``test_inner_steps``.
        network: A network with the architecture of the trained one; required if that was built in Python.
        output: The function ``output`` of the learner, if it was passed in Python.

    Attributes:
        classes_: The classes, sorted.
        n_features_in_: The numbers in one sample, C·H·W for images.
        feature_names_in_: The columns, if ``fit`` was given a DataFrame with strings as names.
        predictor_: The adapted ``Predictor``.

    Raises:
        ValueError: If X or y is not as scikit-learn expects it, or in ``predict`` not as in ``fit``.
        InputError: In ``fit``, as ``load_learner`` and ``MetaLearner.adapt``.
    """

    def __init__(
        self,
        checkpoint: str,
        steps: int | None = None,
        network: nn.Module | None = None,
        output: Output | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.steps = steps
        self.network = network
        self.output = output

    def fit(self, X: Array, y: Array) -> "FewShotClassifier":
        """Adapt to samples and their classes, numbers or names.  # S ..., S"""
        learner = load_learner(self.checkpoint, copy.deepcopy(self.network), output=self.output)
        size, channels = learner.form.image_size, learner.form.channels
        self.shape_ = None if size is None or channels is None else (channels, size, size)
        x, y = self.validated(X, y, reset=True)
        check_classification_targets(y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        require(len(self.classes_) > 1, f"y must hold at least 2 classes, got 1 class, {self.classes_.tolist()}")
        self.predictor_: Predictor = learner.adapt(x, numbers, self.steps)
        return self

    def predict_proba(self, X: Array) -> Array:
        """Probability of each of ``classes_``.  # M ... -> M N"""
        check_is_fitted(self)
        probabilities: Array = self.predictor_.predict_proba(self.validated(X, reset=False)).numpy()
        return probabilities

    def predict(self, X: Array) -> Array:
        """The most probable class of each sample.  # M ... -> M"""
        numbers = self.predict_proba(X).argmax(1)  # checks that there are classes
        classes: Array = self.classes_[numbers]
        return classes

    def validated(self, X: Any, y: Any = "no_validation", *, reset: bool) -> Any:
        """Samples, and targets if there are any, after scikit-learn's checks; flattened images reshaped.  # M ..."""
        X = X if hasattr(X, "ndim") else np.asarray(X)  # frames have names, sparse matrices are refused
        shape = tuple(X.shape)
        flat = X if X.ndim <= 2 else np.asarray(X).reshape(shape[0], math.prod(shape[1:]))
        checked = validate_data(self, flat, y, reset=reset)
        x, targets = checked if isinstance(checked, tuple) else (checked, None)
        if X.ndim > 2:
            x = x.reshape(shape)
        elif self.shape_ is not None and x.shape[1] == math.prod(self.shape_):
            x = x.reshape(len(x), *self.shape_)
        if self.shape_ is not None and x.dtype.kind in "iu" and x.min() >= 0 and x.max() <= 255:
            x = x.astype(np.uint8)  # pixels
        return x if targets is None else (x, targets)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags
