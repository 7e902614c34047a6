"""A learner's checkpoint as a scikit-learn classifier."""

from typing import Any

import numpy as np
from torch import nn

from meta_lightning.adaptation.predictor import Predictor
from meta_lightning.data.tasks import Array
from meta_lightning.inner.samples import Output
from meta_lightning.train import load_learner

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted
except ImportError as error:
    raise ImportError("FewShotClassifier needs scikit-learn: pip install 'meta-lightning[sklearn]'") from error


class FewShotClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Adapts a checkpoint to a few examples: ``FewShotClassifier("best.ckpt").fit(X, y).predict(X)``.

    Samples are those of ``MetaLearner.adapt``. Images, ``M C H W`` as in the training data set, may also come flattened
    to ``M C·H·W``, as other steps of a Pipeline require.

    Args:
        checkpoint: Path of the checkpoint, or ``hub:NAME`` for one that comes with the package.
        steps: Inner steps. Default: the checkpoint's ``test_inner_steps``.
        network: A network with the architecture of the trained one; required if that was built in Python.
        output: The function ``output`` of the learner, if it was passed in Python.

    Attributes:
        classes_: The classes, sorted.
        predictor_: The adapted ``Predictor``.

    Raises:
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
        learner = load_learner(self.checkpoint, self.network, output=self.output)
        size, channels = learner.form.image_size, learner.form.channels
        self.shape_ = None if size is None or channels is None else (channels, size, size)
        check_classification_targets(y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        self.predictor_: Predictor = learner.adapt(self.unflattened(X), numbers, self.steps)
        return self

    def predict_proba(self, X: Array) -> Array:
        """Probability of each of ``classes_``.  # M ... -> M N"""
        check_is_fitted(self)
        probabilities: Array = self.predictor_.predict_proba(self.unflattened(X)).numpy()
        return probabilities

    def predict(self, X: Array) -> Array:
        """The most probable class of each sample.  # M ... -> M"""
        numbers = self.predict_proba(X).argmax(1)  # checks that there are classes
        classes: Array = self.classes_[numbers]
        return classes

    def unflattened(self, X: Array) -> Array:
        """Samples with flattened images reshaped.  # M ..."""
        X = np.asarray(X)
        flat = X.ndim == 2 and self.shape_ is not None and X.shape[1] == np.prod(self.shape_)
        return X.reshape(len(X), *self.shape_) if flat and self.shape_ else X

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags
