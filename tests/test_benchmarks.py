"""The programs in benchmarks that others' figures come from."""

import importlib
import itertools
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import TINY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from meta_lightning import MLP, Sinusoid
from meta_lightning.cli import main
from meta_lightning.compare import runs

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a program by its name."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_the_pages_have_what_the_results_say(benchmark: Any) -> None:
    tables = benchmark("tables")
    made = tables.tables()
    for path in tables.PAGES:
        page = path.read_text()
        assert tables.MARKED.search(page), path
        assert tables.filled(page, made) == page, f"{path.name}: run python benchmarks/tables.py"


def result(name: str, figures: dict[str, dict[str, float]], minutes: float = 2.0) -> dict[str, Any]:
    fit = {"steps": 60000, "train_seconds": 60 * minutes, "machine": {"device": "cpu", "threads": 2}}
    options = [
        "--config=x.yaml",
        "--model.outer_lr_decay",
        "cosine",
        "--data.queries=1",
        "--data.root=data",
        "--model.network.filters=8",
        "--model.init_from=benchmarks/runs/first-seed0/checkpoints/last.ckpt",
    ]
    command = ["fit", *options, "--model=FOMAML", "--data.seed=0"]
    tests = {kind: {"figures": values} for kind, values in figures.items()}
    return {"name": name, "commands": {"fit": command}, "fit": fit, "tests": tests}


def write(folder: Path, results: Sequence[dict[str, Any]]) -> None:
    folder.mkdir()
    for contents in results:
        (folder / f"{contents['name']}.json").write_text(json.dumps(contents))


def test_tables_of_results(benchmark: Any, tmp_path: Path) -> None:
    tables = benchmark("tables")

    def accuracies(first: float) -> dict[str, dict[str, float]]:
        kinds = ("transductive-1", "transductive-15", "alone-1", "alone-15")
        values = [{"test/accuracy": first - i / 100, "test/accuracy_ci95": 0.005} for i in range(4)]
        return dict(zip(kinds, values, strict=True))

    regression = result("sinusoid-maml_5shot-seed0", {"steps-1": {"test/mse": 0.7, "test/mse_ci95": 0.02}})
    regression["tests"]["steps-1"] |= {"of_tasks": {"test/mse": [0.1, 0.2, None]}}  # one diverged
    write(
        tmp_path / "results",
        [
            result("omniglot-maml_5way_1shot-seed0", accuracies(0.98)),
            result("omniglot-maml_5way_1shot-seed1", accuracies(0.99), minutes=4),
            result("omniglot-maml_5way_1shot-FOMAML-seed0", accuracies(0.97)),
            result("mine", accuracies(0.5)) | {"fit": None},
            regression,
        ],
    )
    of_start = {"trained": 0.5, "random": 0.25}
    point = {
        "inner_lr": 0.1,
        "inner_steps": 2,
        "cosines": {"a, b": of_start},
        "ci95": {"a, b": {"trained": 0.12, "random": 0.12}},
    }
    unknown = {
        "inner_lr": 0.1,
        "inner_steps": 5,
        "cosines": {"a, b": of_start},
        "ci95": {"a, b": {"trained": 0.5, "random": None}},
    }
    measured = {"shown": [0.1], "points": [point, unknown]}
    (tmp_path / "results" / "cosine.json").write_text(json.dumps(measured))
    made = tables.tables(tmp_path / "results")
    rows = made["published"].splitlines()
    assert rows[2] == (
        "| `omniglot-maml_5way_1shot` | 98.7 ± 0.4 | 98.50 ± 0.50 | 97.50 ± 0.50 | 96.50 ± 0.50 | 95.50 ± 0.50 "
        "| 60,000 | `outer_lr_decay cosine`, `queries 1`, `network.filters 8`, "
        "`init_from first-seed0` | 3.0 | cpu, 2 threads | 2 | 0.71 |"
    )
    assert rows[3].startswith("| `omniglot-maml_5way_1shot-FOMAML` | 98.3 ± 0.5 | 97.00 ± 0.50 |")
    assert rows[4].startswith("| `mine` | | 50.00 ± 0.50 |")
    assert len(rows) == 5
    assert "| `sinusoid-maml_5shot` | 0.67, 0.38, 0.35 | 0.700 ± 0.020, 0.200 | 60,000 |" in made["sinusoid"]
    assert made["cosine"].splitlines()[2:] == [
        "| trained | 0.1 | 2 | 0.50 ± 0.12 |",
        "| trained | 0.1 | 5 | noise |",
        "| random | 0.1 | 2 | 0.25 ± 0.12 |",
        "| random | 0.1 | 5 | noise |",
    ]
    assert made["comparison"].startswith("*Still to be measured:* `python -m meta_lightning compare")
    page = "a\n<!-- results:sinusoid -->\nold\n<!-- end -->\nb"
    assert tables.filled(page, made) == f"a\n<!-- results:sinusoid -->\n{made['sinusoid']}<!-- end -->\nb"


@pytest.mark.usefixtures("glyphs")
def test_evaluation_trains_and_tests_in_every_way(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = benchmark("evaluate")
    monkeypatch.setattr(runs, "launch", lambda args: main([*args]) or 0)
    arguments = {"ckpt_path": None, "config": str(TINY), "name": "tiny", "model": "FOMAML", "seeds": [3], "tests": None}
    namespace = evaluate.argparse.Namespace(**arguments, regression=False)
    (run,) = evaluate.runs(namespace, ["--trainer.max_steps=2"])
    (part,) = evaluate.runs(evaluate.argparse.Namespace(**arguments | {"tests": ["alone-1"]}, regression=False), [])
    assert (part.name, part.tests) == (run.name, {"alone-1": [a for a in run.tests["alone-1"] if "max_steps" not in a]})
    runs.complete(run, Path("out"))
    done = json.loads(Path("out/results/tiny-FOMAML-seed3.json").read_text())
    assert (done["fit"]["algorithm"], done["fit"]["seed"], done["fit"]["steps"]) == ("FOMAML", 3, 2)
    settings = {kind: test["config"] for kind, test in done["tests"].items()}
    assert {
        kind: (
            c["model"]["init_args"]["transductive"],
            c["data"]["init_args"]["queries"],
            c["data"]["init_args"]["seed"],
        )
        for kind, c in settings.items()
    } == {
        "transductive-1": (True, 1, 0),
        "transductive-15": (True, 15, 0),
        "alone-1": (False, 1, 0),
        "alone-15": (False, 15, 0),
    }
    figures = {kind: test["figures"]["test/loss"] for kind, test in done["tests"].items()}
    assert len({*figures.values()}) == 4


@pytest.mark.usefixtures("glyphs")
def test_a_sweep_goes_on_and_shows_in_hparams(benchmark: Any) -> None:
    sweep = benchmark("sweep")
    arguments = [
        "--config",
        str(TINY),
        "--steps",
        "2",
        "--validations",
        "2",
        "--out",
        "sweep",
        "--equal_work",
        "--tune",
        "model.inner_lr=0.003..1.0",
        "model.inner_steps=1..2",
        "data.train_queries=1,2",
    ]
    first = sweep.main([*arguments, "--trials", "1"])
    study = sweep.main([*arguments, "--trials", "2"])
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]
    assert study.trials[0].params == first.trials[0].params != study.trials[1].params
    for trial in study.trials:
        events = EventAccumulator(f"sweep/hparams/trial{trial.number}").Reload()
        assert events.Scalars("val/accuracy")[0].value == pytest.approx(trial.value)
        assert [*trial.intermediate_values.values()][-1] == trial.value
        record = json.loads(Path(f"sweep/trial{trial.number}/lightning_logs/version_0/fit.json").read_text())
        settings = {part: record["config"][part]["init_args"] for part in ("model", "data")}
        for name, value in trial.params.items():
            part, _, option = name.partition(".")
            assert str(settings[part][option]) == str(value)
        assert record["steps"] == trial.user_attrs["steps"]
    with sqlite3.connect("sweep/study.db") as study_file:
        assert study_file.execute("select count(*) from trials").fetchone() == (2,)


def test_the_updates_that_are_compared(benchmark: Any, mlp: MLP, sinusoid: Sinusoid) -> None:
    cosine = benchmark("cosine")
    batch = sinusoid.task_set("train").batch(range(4))
    maml, fomaml, reptile = cosine.updates(mlp, batch, inner_lr=1e-3, inner_steps=1)
    losses = [(mlp(x) - y).square().mean() for x, y in zip(*batch[:2], strict=True)]
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(torch.stack(losses).mean(), [*mlp.parameters()])])
    torch.testing.assert_close(reptile.float(), 1e-3 * gradient, rtol=1e-3, atol=1e-6)  # joint training
    assert 0.99 < torch.cosine_similarity(maml, fomaml, dim=0) < 1  # Finn et al., 2017, section 5.2

    # updates of two tasks share noise that is far longer than what they have in common
    generator = torch.Generator().manual_seed(0)
    expected = torch.eye(3, 500, dtype=torch.float64) + torch.ones(3, 500) / 500**0.5  # cosines of about 1/2
    noise = torch.randn(400, 1, 500, generator=generator, dtype=torch.float64)
    found, ci95 = cosine.cosines(expected + noise)
    first, second, _ = expected
    true = torch.cosine_similarity(first, second, dim=0)
    assert ((found - true).abs() < 1.5 * ci95).all()
    assert (ci95 < 0.2).all()
    each = (expected + noise / 10)[:6]

    def literal(each: torch.Tensor) -> torch.Tensor:
        def inner(i: int, j: int) -> torch.Tensor:
            pairs = itertools.permutations(range(len(each)), 2)
            return torch.stack([each[a, i] @ each[b, j] for a, b in pairs]).sum()

        return torch.stack([inner(i, j) / (inner(i, i) * inner(j, j)).sqrt() for i, j in ((1, 0), (2, 1), (2, 0))])

    found, ci95 = cosine.cosines(each)
    torch.testing.assert_close(found, literal(each))
    without = torch.stack([literal(each[[j for j in range(len(each)) if j != i]]) for i in range(len(each))])
    deviation = ((len(each) - 1) / len(each) * (without - without.mean(0)).square().sum(0)).sqrt()
    torch.testing.assert_close(ci95, 1.96 * deviation)  # Efron and Tibshirani (1993), 11.5
