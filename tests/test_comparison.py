"""The comparison of algorithms."""

import csv
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from meta_lightning.cli import main
from meta_lightning.compare import runs
from meta_lightning.compare.report import cells_of, markdown
from meta_lightning.compare.summary import near_best, summarise

COMPARE = ["compare", "--config", str(TINY), "--out", "out"]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines that were run, in this process and without figures to save time."""
    lines: list[list[str]] = []

    def launch(args: Sequence[str]) -> int:
        lines.append([*args])
        main([*args, "--dashboard.enabled", "false"])
        return 0

    monkeypatch.setattr(runs, "launch", launch)
    return lines


def table() -> list[dict[str, str]]:
    with Path("out/comparison.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def result(name: str) -> dict[str, Any]:
    contents: dict[str, Any] = json.loads(Path(f"out/results/{name}.json").read_text())
    return contents


@pytest.mark.usefixtures("glyphs")
def test_each_run_is_a_process_of_its_own_that_shows_its_progress(capfd: pytest.CaptureFixture[str]) -> None:
    main([*COMPARE, "--algorithms", "Reptile", "--options.all=--trainer.enable_progress_bar true"])
    said = capfd.readouterr()
    assert "Epoch 1" in said.out
    assert said.err.count("$ python -m meta_lightning") == 3
    assert "The report is out/comparison.html." in said.out


@pytest.mark.usefixtures("glyphs")
def test_the_table_has_what_the_runs_recorded(launched: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*COMPARE, "--algorithms", "MAML", "Reptile", "--max_steps", "2", "--seeds", "0", "1"]
    arguments += ["--options.Reptile=--model.outer_lr 0.5"]
    main(arguments)
    shown = capsys.readouterr().out
    assert len(launched) == 2 * (1 + 2 * 2)
    untrained, maml, reptile = table()
    assert (untrained["algorithm"], untrained["seconds"]) == ("untrained", "")
    of_maml = [result(f"MAML-seed{seed}") for seed in (0, 1)]
    accuracies = [100 * r["tests"]["test"]["figures"]["test/accuracy"] for r in of_maml]
    assert float(maml["after"]) == pytest.approx(sum(accuracies) / 2)
    assert float(maml["after_std"]) == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
    seconds = sum(r["fit"]["train_seconds"] for r in of_maml) / 2
    assert float(maml["seconds"]) == pytest.approx(seconds)
    assert float(reptile["seconds_relative"]) == pytest.approx(float(reptile["seconds"]) / seconds)
    assert float(reptile["after_relative"]) == pytest.approx(float(reptile["after"]) - float(maml["after"]))
    of_tasks = [
        np.mean([result(f"{name}-seed{seed}")["tests"]["test"]["of_tasks"]["test/accuracy"] for seed in (0, 1)], axis=0)
        for name in ("MAML", "Reptile")
    ]
    assert 100 * of_tasks[0].mean() == pytest.approx(float(maml["after"]))
    gained = 100 * (of_tasks[1] - of_tasks[0])
    assert float(reptile["after_relative_ci95"]) == pytest.approx(1.96 * gained.std(ddof=1) / len(gained) ** 0.5)
    assert maml["after_relative_ci95"] == ""

    settings = {r["name"]: r["fit"]["config"] for r in [*of_maml, result("Reptile-seed1")]}
    assert settings["Reptile-seed1"]["model"]["init_args"]["outer_lr"] == 0.5
    assert settings["MAML-seed1"]["data"]["init_args"]["seed"] == settings["MAML-seed1"]["seed_everything"] == 1
    assert {c["trainer"]["max_steps"] for c in settings.values()} == {2}
    tested = {
        result(n)["tests"]["test"]["config"]["data"]["init_args"]["seed"] for n in ("MAML-seed1", "untrained-seed1")
    }
    assert tested == {0}  # the same tasks for all

    assert Path("out/comparison.md").read_text() in shown
    page = Path("out/comparison.html").read_text()
    assert page.count("<tr>") == 4
    assert page.count("python -m meta_lightning fit") == 4
    with Image.open("out/comparison.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24) or []) > 100

    main(arguments)
    assert len(launched) == 10  # everything was finished


@pytest.mark.usefixtures("glyphs")
def test_a_failed_run_loses_no_other_and_is_resumed(
    launched: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = runs.launch
    died: list[str] = []

    def dies_once(args: Sequence[str]) -> int:
        if args[0] == "fit" and "--model=MAML" in args and not died:
            died.append("MAML")
            launch([*args, "--trainer.max_steps=2"])
            Path("out/runs/MAML-seed0/fit/version_0/fit.json").unlink()
            return -9
        return launch(args)

    monkeypatch.setattr(runs, "launch", dies_once)
    arguments = [*COMPARE, "--algorithms", "MAML", "FOMAML"]
    with pytest.raises(SystemExit, match=r"MAML-seed0: fit .* -9\b"):
        main(arguments)
    assert [row["algorithm"] for row in table()] == ["untrained", "FOMAML"]
    assert "MAML-seed0: fit ended" in Path("out/comparison.html").read_text()
    finished = result("FOMAML-seed0")

    launched.clear()
    main(arguments)
    assert [row["algorithm"] for row in table()] == ["untrained", "MAML", "FOMAML"]
    assert launched[0][-1].endswith("out/runs/MAML-seed0/checkpoints/last.ckpt")
    assert [line[0] for line in launched] == ["fit", "test"]
    assert result("MAML-seed0")["fit"]["steps"] == 4
    assert result("FOMAML-seed0") == finished
    capsys.readouterr()


@pytest.mark.usefixtures("glyphs")
def test_a_grid_tells_how_many_settings_come_near_the_best(launched: list[list[str]]) -> None:
    main([*COMPARE, "--algorithms", "Half=Reptile", "--grid", "2", "--options.Half=--model.outer_lr 0.5"])
    cells = [result(f"Half-seed0-grid{i}{j}")["fit"] for i, j in itertools.product(range(3), repeat=2)]
    settings = [cell["config"]["model"]["init_args"] for cell in cells]
    assert [s["inner_lr"] for s in settings[::3]] == pytest.approx([0.01 / 3, 0.01, 0.03], rel=1e-5)
    assert [s["outer_lr"] for s in settings[:3]] == pytest.approx([1 / 9, 1 / 3, 1.0], rel=1e-5)  # ε is at most 1
    best = max(cell["figures"]["val/accuracy"] for cell in cells)
    near = sum(cell["figures"]["val/accuracy"] >= best - 0.02 for cell in cells)
    (_, reptile) = table()
    assert float(reptile["near_best"]) == pytest.approx(near / 9)
    assert {cell["steps"] for cell in cells} == {2}


@pytest.mark.usefixtures("launched")
def test_runs_of_other_settings_are_neither_taken_nor_replaced_unasked(glyphs: Any) -> None:
    config = Path("mine.yaml")
    config.write_text(Path(TINY).read_text())
    compare = ["compare", "--config", str(config), "--out", "out", "--algorithms", "FOMAML"]
    main([*compare, "--max_steps", "1"])
    with pytest.raises(SystemExit, match=r"\bout .*overwrite.*max_steps=1\b.*max_steps=2\b"):
        main([*compare, "--max_steps", "2"])
    assert result("FOMAML-seed0")["fit"]["steps"] == 1
    main([*compare, "--max_steps", "2", "--overwrite"])
    assert result("FOMAML-seed0")["fit"]["steps"] == 2
    config.write_text(Path(TINY).read_text().replace("inner_steps: 2", "inner_steps: 3"))
    with pytest.raises(SystemExit, match=r"\bout .*overwrite.*configuration"):
        main([*compare, "--max_steps", "2"])


@pytest.mark.usefixtures("glyphs")
def test_a_cell_of_the_grid_that_diverges_is_not_near_the_best(
    launched: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = runs.launch
    monkeypatch.setattr(runs, "launch", lambda args: 1 if "-grid2" in " ".join(args) else launch(args))
    main([*COMPARE, "--algorithms", "FOMAML", "--grid", "1"])
    assert 0 < float(table()[-1]["near_best"]) <= 6 / 9 + 1e-9
    assert Path("out/comparison.html").read_text().count("fit ended with exit status 1") == 3


def test_where_everything_fails_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "launch", lambda args: 1)
    with pytest.raises(SystemExit, match=r"untrained-seed0: test .* 1\b.*MAML-seed0: fit .* 1\b"):
        main(COMPARE)


@pytest.mark.usefixtures("launched")
def test_an_interrupted_comparison_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(args: Sequence[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "launch", interrupted)
    with pytest.raises(SystemExit, match=r"interrupted.*same command"):
        main(COMPARE)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--algorithms", "MAMBL"], r"algorithms .*'MAML', 'FOMAML', 'Reptile'.*'MAMBL'"),
        (["--algorithms", "MAML", "MAML"], r"algorithms .*'MAML', 'MAML'"),
        (["--algorithms", "MAML", "Reptile=MAML"], r"algorithms .*'Reptile' for MAML"),
        (["--algorithms", "a/b=MAML"], r"algorithms .*'a/b' for MAML"),
        (["--seeds", "1", "1"], r"seeds .*\b1, 1\b"),
        (["--grid", "-1"], r"grid .* -1"),
        (["--options.Reptil=a"], r"options .*'all', 'MAML', 'FOMAML', 'Reptile'.*'Reptil'"),
        (["--config", "nothing.yaml"], r"--config .*nothing\.yaml"),
    ],
)
@pytest.mark.usefixtures("launched")
def test_what_cannot_be_is_refused_before_anything_is_run(args: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main([*COMPARE, *args])
    assert not Path("out").exists()


def records(metric: str, *values: float | None) -> list[dict[str, Any]]:
    return [{"figures": {f"val/{metric}": value, "val/loss": 1.0}} for value in values]


def test_near_the_best_is_two_points_or_two_per_cent() -> None:
    assert near_best([]) is None
    assert near_best(records("accuracy", 0.9, 0.881, 0.879, None)) == pytest.approx(2 / 9)
    assert near_best(records("mse", 1.0, 1.019, 1.021)) == pytest.approx(2 / 9)


def test_skipped_steps_of_all_seeds_are_added() -> None:
    def run(seed: int) -> dict[str, Any]:
        figures = {"test/accuracy": 0.5, "test/accuracy_ci95": None, "test/accuracy_before": 0.2}
        fit = {"figures": {"train/skipped": seed + 1.0}, "tasks_per_second": 3.0}
        return {"name": f"MAML-seed{seed}", "fit": fit, "tests": {"test": {"figures": figures}}}

    (row,) = summarise([run(0), run(1)], ["MAML"], 3)
    assert row.skipped == 3
    assert row.peak_memory is None
    heads, cells = cells_of([row])
    assert dict(zip(heads, cells, strict=True))["seeds"] == "2 of 3"


def test_differences_are_paired_over_tasks() -> None:
    def run(algorithm: str, seed: int, *accuracies: float) -> dict[str, Any]:
        figures = {"test/accuracy": fmean(accuracies), "test/accuracy_ci95": 0.2, "test/accuracy_before": 0.2}
        test = {"figures": figures, "of_tasks": {"test/accuracy": [*accuracies]}}
        return {"name": f"{algorithm}-seed{seed}", "fit": None, "tests": {"test": test}}

    # hard and easy tasks, on each of which the second is a point better, and on one two
    of_maml = [run("MAML", 0, 0.2, 0.6, 0.9), run("MAML", 1, 0.4, 0.6, 0.9)]
    of_fomaml = [run("FOMAML", 0, 0.31, 0.61, 0.92), run("FOMAML", 1, 0.31, 0.61, 0.92)]
    maml, fomaml = summarise([*of_maml, *of_fomaml], ["MAML", "FOMAML"], 2)
    assert maml.after_relative_ci95 is None
    assert fomaml.after_relative_ci95 == pytest.approx(1.96 * stdev([1, 1, 2]) / 3**0.5)
    assert cells_of([maml, fomaml])[2][2].endswith("(+1.3 ± 0.7)")
    # a record of a former version
    del of_fomaml[0]["tests"]["test"]["of_tasks"]
    assert summarise([*of_maml, *of_fomaml], ["MAML", "FOMAML"], 2)[1].after_relative_ci95 is None


def test_an_error_that_is_no_number_is_not_left_out() -> None:
    def run(algorithm: str, mse: float | None) -> dict[str, Any]:
        figures = {"test/mse": mse, "test/mse_ci95": 0.1, "test/mse_before": 2.0, "test/mse_before_ci95": 0.2}
        fit = {"figures": {}, "tasks_per_second": 3.0}
        return {"name": f"{algorithm}-seed0", "fit": fit, "tests": {"test": {"figures": figures}}}

    rows = summarise([run("MAML", 0.5), run("FOMAML", None)], ["MAML", "FOMAML"], 1)
    assert [row[:3] for row in cells_of(rows)[1:]] == [
        ["MAML", "2.000 ± 0.200", "0.500 ± 0.100"],
        ["FOMAML", "2.000 ± 0.200", "nan ± 0.100"],
    ]


@pytest.mark.usefixtures("glyphs")
def test_an_algorithm_may_come_again_with_options_of_its_own(launched: list[list[str]]) -> None:
    arguments = [
        "--algorithms",
        "Reptile",
        "Reptile-Adam=Reptile",
        "--options.Reptile-Adam=--model.inner_optimizer adam",
    ]
    main([*COMPARE, *arguments])
    assert [row["algorithm"] for row in table()] == ["untrained", "Reptile", "Reptile-Adam"]
    rules = [
        result(f"{name}-seed0")["fit"]["config"]["model"]["init_args"]["inner_optimizer"]
        for name in ("Reptile", "Reptile-Adam")
    ]
    assert rules == ["sgd", "adam"]
    assert len(launched) == 5


def test_empty_cells_of_a_table_stay_cells() -> None:
    assert markdown([["", "a"], ["x", ""]]) == "| | a |\n|---|---|\n| x | |\n"
