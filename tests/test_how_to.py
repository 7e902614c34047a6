"""The how-tos of docs/how_to, followed literally."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RUN
from scipy.io import wavfile

from meta_lightning.cli import main

FOLDER = Path(__file__).parents[1] / "docs" / "how_to"
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def follow(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save, run and call what a page says, in its order, in the current folder; the first code is saved, if any is."""
    text = (FOLDER / page).read_text()
    saved = next(iter(re.findall(r"[Ss]ave this as\s+`(\w+)\.py`", text)), None)
    monkeypatch.syspath_prepend(Path.cwd())
    if saved is not None:
        monkeypatch.delitem(sys.modules, saved, raising=False)
    first = saved is not None
    for language, block in BLOCK.findall(text):
        if language == "bash":
            for line in block.splitlines():
                command = shlex.split(line)
                assert command[:3] == ["python", "-m", "meta_lightning"]
                main(command[3:])
        elif first:
            Path(f"{saved}.py").write_text(block)
            first = False
        else:
            exec(compile(block, page, "exec"), {})


def test_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for word in range(40):
        folder = Path("clips", f"word{word}")
        folder.mkdir(parents=True)
        for clip in range(8):
            tone = np.sin(np.arange(3000 + 200 * clip) * 0.02 * (word + 1)) + 0.1 * rng.standard_normal(
                3000 + 200 * clip
            )
            wavfile.write(folder / f"{clip:04}.wav", 8000, (2**14 * tone).astype(np.int16))
    follow("data_set.md", monkeypatch)
    checkpoint = torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)
    data = checkpoint["datamodule_hyper_parameters"]
    assert (data["root"], data["length"], data["queries"]) == ("clips", 2000, 5)
    assert not any(isinstance(value, torch.Tensor | np.ndarray) for value in data.values())


def test_an_inner_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    follow("inner_rule.md", monkeypatch)
    first, second = (
        torch.load(f"lightning_logs/version_{run}/checkpoints/last.ckpt", weights_only=True) for run in (0, 1)
    )
    rule = first["hyper_parameters"]["inner_rule"]
    assert (rule["class_path"], rule["init_args"]) == ("rules.NormalisedSGD", {"eps": 1e-6})
    rates = [p for name, p in second["state_dict"].items() if name.startswith("inner_rule.rates.")]
    assert len(rates) == 6
    assert all(rate.item() != pytest.approx(0.01, abs=1e-6) for rate in rates)  # they were learnt


def test_samples_and_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    follow("samples.md", monkeypatch)


def test_an_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    follow("algorithm.md", monkeypatch)
    checkpoint = torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)
    assert (checkpoint["algorithm"], checkpoint["global_step"]) == ("EveryStepMAML", 100)


def test_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    follow("own_network.md", monkeypatch)
    checkpoint = torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["state_dict"]["network.first.weight"].shape == (20, 1)


def test_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")

    def country(number: int) -> Any:
        rng, rows = np.random.default_rng(number), 12 + number % 3
        years, start, slope = np.arange(1952, 1952 + 5 * rows, 5), rng.uniform(40, 60), rng.uniform(0.1, 0.5)
        continent = ("Africa", "Americas", "Asia", "Europe")[number % 4]
        gdp, expectancy = rng.uniform(3, 4, rows), start + slope * (years - 1952)
        return pandas.DataFrame({"year": years, "continent": continent, "log_gdp": gdp, "life_expectancy": expectancy})

    Path("countries").mkdir()
    for number in range(40):
        country(number).to_csv(f"countries/c{number}.csv", index=False)
    atlantis = country(40)
    atlantis[:3].to_csv("atlantis.csv", index=False)
    atlantis[3:].drop(columns="life_expectancy").to_csv("new.csv", index=False)
    follow("tables.md", monkeypatch)
    answers = pandas.read_csv("predictions.csv")
    assert list(answers) == ["year", "continent", "log_gdp", "predicted_life_expectancy"]
    assert answers["predicted_life_expectancy"].between(20, 130).all()  # years
    assert "Adapted to 3 rows of atlantis.csv" in capsys.readouterr().out
