"""What adaptation leaves: a plain module that knows the classes of one task."""

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meta_lightning.adaptation.export import WRITERS, read_metadata, read_parameters, require_target
from meta_lightning.adaptation.surgery import build_network, last_linear, set_parameters
from meta_lightning.checks import require
from meta_lightning.data.form import SampleForm
from meta_lightning.data.tasks import Array
from meta_lightning.data.tensors import samples
from meta_lightning.files import written_whole
from meta_lightning.networks.batch_statistics import batch_norms, hold_statistics, with_batch_statistics

AT_ONCE = 256  # samples that go forward together, so that thousands take no more memory


class Predictor(nn.Module):
    """A network adapted to one task, detached from the learner that adapted it.

    Its answer to a sample does not depend on the other samples that it is asked about: batch norm normalises by the
    statistics of the support set. On glyphs, 5-way 1-shot, 15 queries a class, 600 test tasks, that gave 88.0 ± 0.6 %;
    the support set and one query a pass, the published alternative, 88.2 ± 0.6 %; and the statistics of all queries
    together, with which MAML's papers test, 90.7 ± 0.6 %.

    Args:
        network: The adapted network, which holds its statistics.
        class_names: Names of the classes, one an output; None for regression.
        sample_shape: Shape of one sample.
        form: What the samples of training looked like.
        description: The network in plain words, where a configuration gave it.

    Shapes:
        Input ``S …`` as the data set held its samples, uint8 pixels or floating-point; output ``S N``, logits of the
        classes, or for regression ``S …``.
    """

    def __init__(
        self,
        network: nn.Module,
        class_names: Sequence[str] | None,
        sample_shape: Sequence[int],
        form: SampleForm,
        description: dict[str, Any] | None,
    ) -> None:
        super().__init__()
        self.network = network
        self.class_names = None if class_names is None else list(class_names)
        self.sample_shape = list(sample_shape)
        self.form = form
        self.description = description
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits of samples, or regressed values.  # S ... -> S N"""
        outputs: Tensor = self.network(self.form.network_input(x, next(self.network.parameters()).dtype))
        return outputs if self.class_names is None else outputs[:, : len(self.class_names)]

    @torch.no_grad()
    def predict_proba(self, x: Tensor | Array) -> Tensor:
        """Probability of each class, any number of samples at a time.  # S ... -> S N

        Raises:
            InputError: If the samples have another shape than the support set's, or this is a regression.
        """
        require(self.class_names is not None, "the predictor must be one of classes, got a regression's: call it")
        x = samples(x, "x")
        require(
            list(x.shape[1:]) == self.sample_shape,
            f"x must hold samples of shape [S, {', '.join(map(str, self.sample_shape))}], as the support set, "
            f"got {list(x.shape)}",
        )
        device = next(self.parameters()).device
        return torch.cat([self(part.to(device)).softmax(1) for part in x.split(AT_ONCE)])

    def predict(self, x: Tensor | Array) -> list[str]:
        """The name of each sample's most probable class.  # S ..."""
        numbers = self.predict_proba(x).argmax(1).tolist()
        return [self.class_names[number] for number in numbers] if self.class_names else []

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Save it, whole or not at all, in the format that the suffix names.

        ``.safetensors`` holds the parameters, with everything else that ``load`` needs as metadata. ``.pt2`` is a
        program of ``torch.export``, and ``.onnx`` one of ONNX, opset 18: each takes a float32 batch of any size, pixels
        in [0, 1], and holds the class names.

        Args:
            path: The file.
            overwrite: Whether to replace a file that exists.

        Raises:
            InputError: If the suffix is another, the format needs packages that are not installed, or the file must not
                or cannot be written.
        """
        values = {
            "class_names": self.class_names,
            "sample_shape": self.sample_shape,
            "form": asdict(self.form),
            "network": self.description,
        }
        metadata = {name: json.dumps(value) for name, value in values.items()}
        path = Path(path)
        require_target(path, overwrite, "path")
        with written_whole(path) as part:
            WRITERS[path.suffix](copy.deepcopy(self).cpu(), part, metadata, torch.zeros(2, *self.sample_shape))

    @classmethod
    def load(cls, path: str | Path, network: nn.Module | None = None) -> "Predictor":
        """A predictor that was saved as safetensors.

        Args:
            path: The file.
            network: A network like the one that was adapted; needed where that was made in Python.

        Raises:
            InputError: If the file is not one of these, or the network is missing or another.
        """
        metadata = read_metadata(Path(path))
        class_names, sample_shape, form, description = (
            json.loads(metadata[name]) for name in ("class_names", "sample_shape", "form", "network")
        )
        require(
            network is not None or description is not None,
            f"network must be given: {path} does not describe the one that it was adapted from, which came from Python",
        )
        network = with_batch_statistics(build_network(description) if network is None else copy.deepcopy(network))
        for norm in batch_norms(network):
            hold_statistics(norm, torch.zeros(norm.num_features), torch.ones(norm.num_features))
        if class_names and (head := last_linear(network)) and head[1].out_features < len(class_names):
            name, layer = head
            wide = {n: p.new_empty(len(class_names), *p.shape[1:]) for n, p in layer.named_parameters(name)}
            set_parameters(network, wide)
        predictor = cls(network, class_names, sample_shape, SampleForm(**form), description)
        read_parameters(predictor, Path(path))
        return predictor
