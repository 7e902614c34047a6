"""The three formats of a predictor, each read back and compared."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from meta_lightning import MAML, MLP, Conv4, Predictor, Sinusoid, load_learner

NAMES = ["ä", "b b", "c", "d", "e", "f"]  # one more than the network has outputs


@pytest.fixture
def predictor(checkpoint: str) -> Predictor:
    """Of more classes than in training, and of normalised pixels."""
    torch.manual_seed(0)
    return load_learner(checkpoint).adapt(torch.rand(6, 1, 28, 28), torch.arange(6), class_names=NAMES)


def read_safetensors(path: Path) -> Callable[[Tensor], Tensor]:
    return Predictor.load(path)


def read_program(path: Path) -> Callable[[Tensor], Tensor]:
    extra = {"class_names": ""}
    program = torch.export.load(path, extra_files=extra)
    assert json.loads(extra["class_names"]) == NAMES
    return program.module()


def read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    onnx.checker.check_model(path, full_check=True)
    assert [(opset.domain, opset.version) for opset in onnx.load(path).opset_import] == [("", 18)]
    session = onnxruntime.InferenceSession(path)
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == NAMES
    assert (session.get_inputs()[0].name, session.get_outputs()[0].name) == ("x", "logits")
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize(
    ("suffix", "read"), [("safetensors", read_safetensors), ("pt2", read_program), ("onnx", read_onnx)]
)
def test_each_format_agrees_with_the_predictor(
    suffix: str, read: Callable[[Path], Callable[[Tensor], Tensor]], predictor: Predictor, tmp_path: Path
) -> None:
    path = tmp_path / f"adapted.{suffix}"
    predictor.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    program = read(path)
    for batch in (1, 2, 7):
        x = torch.rand(batch, 1, 28, 28)
        assert program(x).shape == (batch, 6)
        assert (program(x) - predictor(x)).abs().max() < 1e-5


def test_a_loaded_predictor_is_the_same(predictor: Predictor, tmp_path: Path) -> None:
    predictor.save(tmp_path / "a.safetensors")
    loaded = Predictor.load(tmp_path / "a.safetensors")
    pixels = torch.randint(256, (9, 1, 28, 28), dtype=torch.uint8)
    assert torch.equal(loaded.predict_proba(pixels), predictor.predict_proba(pixels))
    assert loaded.predict(pixels.numpy()) == predictor.predict(pixels)
    assert (loaded.class_names, loaded.sample_shape, loaded.form) == (NAMES, [1, 28, 28], predictor.form)
    assert loaded.form.mean == [0.2]
    loaded.save(tmp_path / "b.safetensors")
    assert torch.equal(Predictor.load(tmp_path / "b.safetensors")(pixels), predictor(pixels))


def test_a_network_made_in_python_is_given_again(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    predictor = MAML(Conv4(filters=4)).adapt(torch.rand(5, 1, 28, 28), torch.arange(5))
    predictor.save(path)
    with pytest.raises(ValueError, match=r"network .*a\.safetensors"):
        Predictor.load(path)
    network = Conv4(filters=4)
    before = network.head.weight.clone()
    x = torch.rand(3, 1, 28, 28)
    assert torch.equal(Predictor.load(path, network)(x), predictor(x))
    assert torch.equal(network.head.weight, before)
    with pytest.raises(ValueError, match=r"(?s)network .*another: .*\[8, 1, 3, 3\]"):
        Predictor.load(path, Conv4(filters=8))


@pytest.mark.parametrize("suffix", ["safetensors", "pt2", "onnx"])
def test_a_regression(suffix: str, tmp_path: Path) -> None:
    support_x, support_y, query_x, _ = (p[0] for p in Sinusoid(shots=5).task_set("test").batch([0]))
    predictor = MAML(MLP(hidden=[8])).adapt(support_x, support_y)
    path = tmp_path / f"a.{suffix}"
    predictor.save(path)
    if suffix == "safetensors":
        values = Predictor.load(path, MLP(hidden=[8]))(query_x)
    elif suffix == "pt2":
        values = torch.export.load(path).module()(query_x)
    else:
        values = torch.from_numpy(onnxruntime.InferenceSession(path).run(None, {"x": query_x.numpy()})[0])
    assert np.abs(values.numpy() - predictor(query_x).numpy()).max() < 1e-5


def test_tied_parameters_are_saved_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.again, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
            self.again.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.again(self.first(x).relu()))
            return logits

    x = torch.randn(4, 3)
    predictor = MAML(Tied(), inner_lr=0.1).adapt(x, torch.tensor([0, 1, 0, 1]))
    predictor.save(tmp_path / "a.safetensors")
    assert torch.equal(Predictor.load(tmp_path / "a.safetensors", Tied())(x), predictor(x))


def test_what_cannot_be_saved_or_loaded(predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"path .*overwrite.*a\.safetensors"):
        predictor.save(path)
    assert path.read_text() == "mine"
    with pytest.raises(ValueError, match=r"path .*a\.safetensors.*no safetensors"):
        Predictor.load(path)
    with pytest.raises(ValueError, match=r"path .*\bnothing\b"):
        Predictor.load("nothing")
    predictor.save(path, overwrite=True)
    assert Predictor.load(path).class_names == NAMES
    with pytest.raises(ValueError, match=r"path .*'\.safetensors'.*'\.pkl'"):
        predictor.save(tmp_path / "a.pkl")
    with pytest.raises(ValueError, match=r"path .*nowhere/a\.pt2"):
        predictor.save(tmp_path / "nowhere" / "a.pt2")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"path .*a\.onnx needs onnxscript: .*'meta-lightning\[export\]'"):
        predictor.save(tmp_path / "a.onnx")


def test_nothing_is_left_half_written(predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(program: object, path: Path, extra_files: object) -> None:
        path.write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr("torch.export.save", fails)
    with pytest.raises(OSError, match="No space left on device"):
        predictor.save(tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())
