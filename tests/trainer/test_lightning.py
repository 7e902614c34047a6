"""Every public callback, method of the tuner, logger, profiler and flag of Lightning works here or is refused."""

import cases_callbacks as _callbacks
import cases_flags as _flags
import cases_outputs as _outputs
import cases_tuner as _tuner
import pytest
from lightning.pytorch.tuner import batch_size_scaling
from registry import CASES, PUBLIC, Case

from meta_lightning import MetaLearner
from meta_lightning.data.sinusoid import SineWaves

MODULES = (_callbacks, _flags, _outputs, _tuner)  # they fill CASES


@pytest.mark.parametrize("kind", PUBLIC)
def test_every_name_has_a_case(kind: str) -> None:
    known = {case.name for case in CASES if case.kind == kind}
    missing = [name for name in PUBLIC[kind] if name not in known]
    assert not missing, f"add a case for {', '.join(missing)}"
    assert not known - {*PUBLIC[kind]}, "Lightning has these no more"


RUNS = [(case, algorithm) for case in CASES for algorithm in case.algorithms]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no more tasks ahead than are used here, and do not collect garbage between batch sizes: a second each."""
    monkeypatch.setattr(SineWaves, "prefetch", 64)
    monkeypatch.setattr(batch_size_scaling, "garbage_collection_cuda", lambda: None)


@pytest.mark.filterwarnings("ignore")  # of Lightning, on what is used here on purpose
@pytest.mark.parametrize(
    ("case", "algorithm"),
    RUNS,
    ids=[f"{case.kind}-{case.name}-{case.check.__name__}-{algorithm.__name__}" for case, algorithm in RUNS],
)
def test_case(case: Case, algorithm: type[MetaLearner]) -> None:
    case.check(algorithm)
