"""The figures that tests/recorded.py recorded."""

import json
import math
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import CASES, CHECKPOINTS, DATA, adapted, fingerprint, resumed, twenty_steps

from meta_lightning import load_learner

RECORD = json.loads((DATA / "recorded.json").read_text())
SAME_MACHINE = fingerprint() == RECORD["fingerprint"]
DTYPES = {"float32": torch.float32, "float64": torch.float64}
FORMER = pytest.mark.filterwarnings("ignore:.* is now --model.inner_rule:FutureWarning")


def assert_as_recorded(
    found: Mapping[str, Any], recorded: Mapping[str, Any], tolerance: float, noise: Collection[str] = ()
) -> None:
    """The same bits on the machine that recorded them; close on another, whose kernels round differently.

    ``noise`` are parameters whose gradient is rounding and nothing else.
    """
    if SAME_MACHINE:
        assert found == recorded
    assert found["squares"].keys() == recorded["squares"].keys()
    for name, square in recorded["squares"].items():
        if name in noise:
            continue
        assert math.isclose(found["squares"][name], square, rel_tol=tolerance, abs_tol=tolerance), name
    for loss, expected in zip(found.get("losses", ()), recorded.get("losses", ()), strict=True):
        assert math.isclose(loss, expected, rel_tol=tolerance)


@FORMER
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_twenty_steps(case: str, dtype: str) -> None:
    found = twenty_steps(CASES[case], DTYPES[dtype])
    # the bias before batch norm: Adam makes full steps of its rounding, in float64 its ε is far above that
    noise = {"0.bias"} if (case, dtype) == ("reptile-adam", "float32") else ()
    assert_as_recorded(found, RECORD["steps"][f"{case}-{dtype}"], 1e-2 if dtype == "float32" else 1e-8, noise)


@FORMER
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_of_version_0_1_adapts_and_is_exported(name: str, tmp_path: Path) -> None:
    assert_as_recorded(adapted(DATA / f"{name}.ckpt"), RECORD["adapted"][name], 1e-4)
    images = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    images[1] = 255
    predictor = load_learner(DATA / f"{name}.ckpt").adapt(images, ["dark", "light"])
    predictor.save(tmp_path / "adapted.pt2")
    program = torch.export.load(tmp_path / "adapted.pt2").module()
    torch.testing.assert_close(program(images.float() / 255), predictor(images))


@FORMER
@pytest.mark.usefixtures("glyphs")
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_of_version_0_1_goes_on(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Checkpoint directory|The number of training batches")
        found = resumed(DATA / f"{name}.ckpt", tmp_path)
    assert_as_recorded(found, RECORD["resumed"][name], 1e-3)
