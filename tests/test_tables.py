"""Tasks from tables, and ``adapt`` from one table to predictions for another."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import fails, trainer
from safetensors.torch import load_file

from meta_lightning import MAML, MLP, Predictor, Prototypes, TableForm, TableTasks, load_learner
from meta_lightning.checks import InputError, MissingPackageError
from meta_lightning.cli import main

pd = pytest.importorskip("pandas", reason="pandas is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")

QUICK = {"meta_batch_size": 4, "epoch_length": 5, "val_tasks": 4, "test_tasks": 6}
MACHINES = 20


def machine(number: int, rows: int | None = None) -> Any:
    """A table with numbers and categories, some missing, in which power is a line with slope and offset of its own."""
    rng = np.random.default_rng(number)
    rows = rows or 12 + number
    speed, mode = rng.uniform(100, 200, rows), rng.choice(["idle", "run", "stop"], rows)
    load = rng.choice(["low", "mid", "high"], rows)
    power = (1 + number % 5) * speed + 50 * (mode == "run") + 1000 + 10 * number
    table = pd.DataFrame({"speed": speed, "mode": mode, "load": load, "power": power})
    table.loc[0, ["speed", "mode"]] = None
    return table


@pytest.fixture
def machines() -> Path:
    """A folder with a CSV file per machine, of unequal numbers of rows."""
    folder = Path("machines")
    folder.mkdir()
    for number in range(MACHINES):
        machine(number).to_csv(folder / f"m{number:02}.csv", index=False)
    return folder


def tasks(path: Any = "machines", target: str = "power", **options: Any) -> TableTasks:
    defaults: dict[str, Any] = {"shots": 4, "queries": 5} | QUICK
    return TableTasks(path, target=target, **defaults | options)


def rewrite(name: str, change: Any) -> None:
    path = Path("machines") / f"{name}.csv"
    change(pd.read_csv(path)).to_csv(path, index=False)


def encoded(data: TableTasks, split: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    sets: list[tuple[torch.Tensor, torch.Tensor]] = data.task_set(split).sets  # type: ignore[attr-defined]
    return sets


# -------------------------------------------------------------------------------------------------- preprocessing


@pytest.mark.usefixtures("machines", "double")
@pytest.mark.parametrize("missing", ["median", "mean", "most_frequent"])
def test_the_preprocessing_is_scikit_learns_fitted_to_the_training_tasks(missing: Any) -> None:
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler

    order = ["low", "mid", "high"]
    data = tasks(ordinal={"load": order}, missing=missing)
    files = sorted(Path("machines").glob("*.csv"))
    training = pd.concat([pd.read_csv(files[number]) for number in data.members["train"]])
    categories = SimpleImputer(strategy="most_frequent", missing_values=np.nan)
    theirs = ColumnTransformer(
        [
            ("numbers", make_pipeline(SimpleImputer(strategy=missing), StandardScaler()), ["speed"]),
            ("ordered", OrdinalEncoder(categories=[order]), ["load"]),
            ("categories", make_pipeline(categories, OneHotEncoder(sparse_output=False)), ["mode"]),
        ]
    ).fit(training)
    scaler = StandardScaler().fit(training[["power"]])
    for split in ("train", "val", "test"):
        for number, (x, y) in zip(data.members[split], encoded(data, split), strict=True):  # type: ignore[index]
            table = pd.read_csv(files[number])
            np.testing.assert_allclose(x.numpy(), theirs.transform(table), atol=1e-12)
            np.testing.assert_allclose(y.numpy(), scaler.transform(table[["power"]]), atol=1e-12)
            assert len(x) == 12 + number
    everything = pd.concat(map(pd.read_csv, files))
    assert data.form is not None
    assert abs(data.form.means["power"] - everything["power"].mean()) > 1  # not of all tasks


@pytest.mark.usefixtures("machines")
def test_the_tasks_draw_rows_of_one_table() -> None:
    data = tasks(test_tasks=8)
    batch = data.task_set("test").batch(range(8))
    assert [list(part.shape) for part in batch] == [[8, 4, 7], [8, 4, 1], [8, 5, 7], [8, 5, 1]]
    sources = []
    for number in range(8):
        rows = torch.cat([torch.cat([x[number], y[number]], 1) for x, y in (batch[:2], batch[2:])])
        found = [
            split
            for split, (x, y) in enumerate(encoded(data, "test"))
            if all((torch.cat([x, y], 1) == row).all(1).any() for row in rows)
        ]
        assert len(found) == 1
        assert len(rows.unique(dim=0)) == 9  # without replacement
        sources += found
    assert sorted(sources) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.usefixtures("machines")
def test_the_order_of_columns_and_of_other_columns_is_nothing() -> None:
    before = tasks()
    rewrite("m03", lambda t: t[["power", "load", "speed", "mode"]])
    other = before.members["test"][0]
    rewrite(f"m{other:02}", lambda t: t.assign(note="new")[["note", *t.columns]])
    after = tasks()
    assert before.form == after.form
    for split in ("train", "test"):
        for ours, theirs in zip(encoded(before, split), encoded(after, split), strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])


@pytest.mark.usefixtures("machines")
def test_one_file_with_a_column_of_tasks_is_as_a_folder() -> None:
    whole = pd.concat([machine(number).assign(machine=f"m{number:02}") for number in range(MACHINES)])
    whole.to_csv("all.csv", index=False)
    folder, file = tasks(), tasks("all.csv", task="machine")
    assert folder.names == file.names
    assert folder.form == file.form
    for ours, theirs in zip(folder.task_set("test").batch([0, 1]), file.task_set("test").batch([0, 1]), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("machines")
def test_parquet_is_as_csv() -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    csv = tasks()
    for path in Path("machines").iterdir():
        pd.read_csv(path).to_parquet(path.with_suffix(".parquet"))
        path.unlink()
    assert tasks().form == csv.form


@pytest.mark.usefixtures("machines")
def test_splits_by_folders_and_by_names() -> None:
    by_names = tasks(splits={"train": [f"m{n:02}" for n in range(10)], "val": ["m10"], "test": ["m11", "m12"]})
    assert by_names.members == {"train": [*range(10)], "val": [10], "test": [11, 12]}
    for split, names in {"train": range(10), "val": [10], "test": [11, 12]}.items():
        folder = Path("split") / split
        folder.mkdir(parents=True)
        for number in names:
            Path(f"machines/m{number:02}.csv").rename(folder / f"m{number:02}.csv")
    by_folders = tasks("split")
    assert by_folders.form == by_names.form
    assert [by_folders.names[n] for n in by_folders.members["test"]] == ["m11", "m12"]


@pytest.mark.usefixtures("machines")
def test_options_of_the_reader() -> None:
    plain = tasks()
    for path in Path("machines").iterdir():
        pd.read_csv(path).to_csv(path, index=False, sep=";", decimal=",")
    read = {"sep": ";", "decimal": ","}
    data = tasks(read=read)
    assert data.form is not None
    assert plain.form is not None
    assert asdict(data.form) == asdict(plain.form) | {"read": read}
    with pytest.raises(InputError, match=r"path .*m00\.csv, which pandas cannot read: .*seperator"):
        tasks(read={"seperator": ";"})


@pytest.mark.usefixtures("machines")
def test_unknown_categories_may_be_zeros() -> None:
    name = f"m{tasks().members['test'][0]:02}"
    rewrite(name, lambda t: t.assign(mode="repair"))
    with pytest.raises(InputError, match=rf"mode .*'idle', 'run', 'stop', got 'repair' in {name}"):
        tasks().setup()
    data = tasks(unknown="zeros")
    repaired, others = (encoded(data, "test")[number][0][1:, 1:4] for number in (0, 1))  # the first mode is missing
    assert (repaired == 0).all()
    assert (others.sum(1) == 1).all()


@pytest.mark.usefixtures("machines")
def test_features_leave_columns_out() -> None:
    with pytest.warns(UserWarning, match=r"categories and ordinal must name features, got 'load', which are ignored"):
        data = tasks(features=["speed", "mode"], ordinal={"load": ["low", "mid", "high"]})
    assert data.form is not None
    assert [*data.form.fills] == ["speed", "mode"]
    assert data.form.ordinal == {}
    assert encoded(data, "test")[0][0].shape[1] == 4


def test_numbers_that_are_categories() -> None:
    table = pd.DataFrame({"site": [1, 2, None, 10], "y": [0.5, 1.5, 2.5, 3.5]})
    form = TableForm.fit({"a": table}, "y", categories=["site"])
    assert form.onehot == {"site": ["1", "10", "2"]}
    x = form.inputs(pd.DataFrame({"site": [10, 1]}))  # integers here, floats beside the missing one above
    assert x.tolist() == [[0, 1, 0], [1, 0, 0]]


# -------------------------------------------------------------------------------------------------- kind of target


@pytest.mark.parametrize(
    ("values", "kind", "classes"),
    [
        ([0.5, 1.0], "auto", None),
        ([1, 2], "auto", ["1", "2"]),
        ([1, 2], "regression", None),
        ([1.0, 2.0, None], "auto", ["1", "2"]),
        ([0.5, 1.5], "classification", ["0.5", "1.5"]),
        (["yes", "no"], "auto", ["no", "yes"]),
        ([True, False], "auto", ["False", "True"]),
    ],
)
def test_the_kind_of_problem(values: list[Any], kind: Any, classes: list[str] | None) -> None:
    table = pd.DataFrame({"x": np.arange(len(values)) * 1.0, "y": values})
    form = TableForm.fit({"a": table}, "y", kind)
    assert form.classes == classes
    x, y = form.encode(table)
    assert len(x) == len(y) == table["y"].notna().sum()
    if classes is None:
        assert isinstance(y, torch.Tensor)
        answers = form.decode(y)
        assert answers["predicted_y"].tolist() == pytest.approx(values)
        assert form.errors(answers, table) == pytest.approx([0, 0])


@pytest.mark.usefixtures("machines")
def test_a_classification_task_has_as_many_rows_of_each_class() -> None:
    splits: Any = {"train": range(8, 16), "test": [16, 17]}
    data = tasks(target="mode", shots=2, queries=1, train_shots=(1, 2), splits=splits)
    assert data.form is not None
    assert data.form.classes == ["idle", "run", "stop"]
    batch = data.task_set("test").batch([0, 1])
    assert batch.support_y.tolist() == [[0, 1, 2] * 2] * 2
    assert batch.query_y.tolist() == [[0, 1, 2]] * 2
    assert data.task_set("test").class_names(0) == ["idle", "run", "stop"]
    shots = {data.task_set("train").batch(range(4 * i, 4 * i + 4)).support_y.shape[1] for i in range(8)}
    assert shots == {3, 6}
    tables = {number: pd.read_csv(f"machines/m{number}.csv").dropna(subset="mode") for number in (16, 17)}
    scale = data.form.scales["power"], data.form.means["power"]
    for x, y in ((batch.support_x, batch.support_y), (batch.query_x, batch.query_y)):
        for samples, labels in zip(x, y, strict=True):
            for sample, label in zip(samples, labels, strict=True):
                power = sample[1].item() * scale[0] + scale[1]
                (mode,) = {
                    t.loc[(t["power"] - power).abs().idxmin(), "mode"]
                    for t in tables.values()
                    if (t["power"] - power).abs().min() < 1e-2
                }
                assert mode == data.form.classes[label]


# ------------------------------------------------------------------------------------------------------- bad input


def broken(table: Any, column: str, value: Any) -> Any:
    table = table.astype({column: object})
    table.loc[1, column] = value
    return table


@pytest.mark.usefixtures("machines")
@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda t: t.drop(columns="power"), {}, r"target must be .*'power' in m03; it has 'speed', 'mode', 'load'"),
        (lambda t: t.rename(columns={"power": "Power"}), {}, r"target .*'power' in m03; the nearest .* is 'Power'"),
        (lambda t: t.drop(columns="speed"), {}, r"features must be .*'speed' in m03; it has"),
        (lambda t: t.assign(extra=1), {}, r"features must be .*'extra' in m0[0-2]; it has"),
        (lambda t: broken(t, "power", "high"), {}, r"target must hold finite numbers, got 'high' in m03"),
        (lambda t: t, {"target": "mode", "kind": "regression"}, r"target must hold .*numbers, got '(idle|run|stop)'"),
        (lambda t: broken(t, "speed", "fast"), {}, r"speed must hold finite numbers, got 'fast' in m03"),
        (lambda t: broken(t, "speed", np.inf), {}, r"speed must hold finite numbers, got inf in m03"),
        (lambda t: t.assign(power=None), {}, r"target must have a value in some row, got none of 'power' in m03"),
        (lambda t: t.head(8), {}, r"shots \+ queries must be at most 8, the rows of m03 of the train .*got 4 \+ 5"),
        (lambda t: t, {"target": "mode"}, r"shots \+ queries must be at most \d, the rows of class \w+ in m"),
        (
            lambda t: t[t["mode"] != "run"],
            {"target": "mode", "shots": 1, "queries": 1},
            r"target must hold every class, got none of 'run' in m03",
        ),
        (lambda t: t, {"task": "machine"}, r"task must be None for a folder.*'machine'"),
        (lambda t: t, {"kind": "ranking"}, r"kind must be one of .*'ranking'"),
        (lambda t: t, {"missing": "zero"}, r"missing must be one of .*'zero'"),
        (lambda t: t, {"unknown": "ignore"}, r"unknown must be one of .*'ignore'"),
        (lambda t: t, {"features": ["sped"]}, r"features .*'sped' in m\d\d; the nearest .* is 'speed'"),
        (lambda t: t, {"features": ["power"]}, r"features must name columns beside target, got \['power'\]"),
        (lambda t: t, {"categories": ["made"]}, r"categories .*'made' in m\d\d; the nearest .* is 'mode'"),
        (lambda t: t, {"ordinal": {"load": ["low", "mid"]}}, r"load .*'low', 'mid', got 'high' in m\d\d"),
        (lambda t: t, {"splits": {"train": ["m1"]}}, r"splits must hold tasks of machines, got \['m1'\]"),
        (lambda t: t, {"split_fractions": (0, 0, 1)}, r"train split must have a task to fit.*got 0"),
    ],
)
def test_bad_tables(change: Any, options: dict[str, Any], message: str) -> None:
    defaults = {"splits": {"train": range(16), "val": [16, 17], "test": [18, 19]}}
    given = defaults | options if "split_fractions" not in options else options
    rewrite("m03", change)

    def used() -> None:
        data = tasks(**given)
        data.setup()
        data.task_set("test")

    with pytest.raises(InputError, match=message):
        used()


@pytest.mark.usefixtures("machines")
def test_bad_paths() -> None:
    machine(0).to_csv("one.csv", index=False)
    for path, options, message in (
        ("one.csv", {}, r"task must name a column of path.* one\.csv, got None"),
        ("one.csv", {"task": "machine"}, r"task must be .*'machine' in one\.csv; it has 'speed'"),
        ("one.csv", {"task": "mode"}, r"task must name the task of every row, got none in 1 rows of one\.csv"),
        ("nowhere", {}, r"path .*nowhere, which is neither"),
    ):
        with pytest.raises(InputError, match=message):
            tasks(path, **options)
    Path("empty").mkdir()
    with pytest.raises(InputError, match=r"path must hold tables, \.csv or \.parquet, got none in empty"):
        tasks("empty")
    Path("machines/m00.csv").write_text("")
    with pytest.raises(InputError, match=r"path .*m00\.csv, which pandas cannot read: .*columns"):
        tasks()
    Path("machines/m00.csv").write_text("speed,mode,load,power\n")
    with pytest.raises(InputError, match=r"path .*m00\.csv, which has no rows"):
        tasks()
    Path("machines/test").mkdir()
    with pytest.raises(
        InputError, match=r"path must hold tables or .* got m00\.csv, m01\.csv, m02\.csv, … beside test"
    ):
        tasks()
    for split in ("train", "test"):
        (Path("twice") / split).mkdir(parents=True)
        machine(0).to_csv(f"twice/{split}/m00.csv", index=False)
    with pytest.raises(InputError, match=r"path must hold each task once, got m00 more than once in twice"):
        tasks("twice")


def test_whole_numbers_may_be_meant_as_numbers() -> None:
    tables = {name: pd.DataFrame({"x": [0.5, 1.0], "count": [first, 7]}) for name, first in (("a", 3), ("b", 5))}
    form = TableForm.fit(tables, "count")
    with pytest.raises(InputError, match=r"target must hold every class .*kind regression.*, got none of '5' in a"):
        form.encode(tables["a"], "a")
    with pytest.raises(InputError, match=r"target must hold classes .*kind regression.*, got '6' in c"):
        form.encode(tables["a"].assign(count=6), "c")
    assert TableForm.fit(tables, "count", "regression").classes is None


def test_a_column_without_values_is_nothing() -> None:
    table = pd.DataFrame({"x": [0.5, 1.0], "empty": [None, None], "y": [0.5, 1.5]})
    form = TableForm.fit({"a": table, "b": table.assign(empty=np.nan)}, "y")
    assert json.loads(json.dumps(asdict(form), allow_nan=False)) == asdict(form)
    assert form.inputs(table)[:, 1].tolist() == [0, 0]


def test_dates_are_refused() -> None:
    table = pd.DataFrame({"day": pd.date_range("2020", periods=3), "y": [0.5, 1.5, 2.5]})
    with pytest.raises(InputError, match=r"day must hold numbers or names, got datetime64\[\w+\] in a; features"):
        TableForm.fit({"a": table}, "y")


PLAIN = pd.DataFrame({"x": [0.5, 1.0, 2.0], "y": [0.5, 1.5, 2.5]})


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (
            PLAIN.join(PLAIN[["x"]], rsuffix="2").set_axis(["x", "y", "x"], axis=1),
            {},
            r"features must be once .*'x' in a",
        ),
        (PLAIN.set_axis(["y", "y"], axis=1), {}, r"target must be once .*'y' in a"),
        (PLAIN.rename(columns={"x": 0}), {}, r"features must name columns by text, got 0 in a; table\.rename"),
        (PLAIN.assign(x=[1j, 0, 1]), {}, r"x must hold numbers or names, got complex128 in a"),
        (PLAIN.assign(y=[1j, 0, 1]), {}, r"target must hold numbers or names, got complex128 in a"),
        (PLAIN.assign(y=pd.Series([1j, 0.5, 1], dtype=object)), {"kind": "regression"}, r"target .*complex128 in a"),
        (PLAIN, {"features": "x"}, r"features must be a sequence, got the text 'x'"),
        (PLAIN, {"categories": "x"}, r"categories must be a sequence, got the text 'x'"),
        (PLAIN, {"ordinal": {"x": "abc"}}, r"ordinal x must be a sequence, got the text 'abc'"),
    ],
)
def test_tables_of_ones_own_that_are_refused(table: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TableForm.fit({"a": table}, "y", **options)


def test_an_empty_table_is_refused() -> None:
    table = PLAIN.assign(site=["a", "b", "a"])
    form = TableForm.fit({"a": table}, "y")
    with pytest.raises(InputError, match=r"a table must have at least 1 row, got none in new"):
        form.inputs(table.iloc[:0], "new")


def test_a_feature_that_is_named_twice_is_one() -> None:
    assert TableForm.fit({"a": PLAIN}, "y", features=["x", "x"]) == TableForm.fit({"a": PLAIN}, "y")


@pytest.mark.usefixtures("machines")
@pytest.mark.parametrize("missing", ["pandas", "sklearn"])
def test_a_missing_package_is_a_line_that_names_the_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> object | None:
        return None if name == missing else object()

    monkeypatch.setattr("meta_lightning.checks.find_spec", find_spec)
    with pytest.raises(MissingPackageError, match=rf"needs {missing}: pip install 'meta-lightning\[tables"):
        tasks()


# ----------------------------------------------------------------------------------------- fit, test, adapt, Python


FIT = "fit --model MAML --model.network meta_lightning.MLP --model.network.in_features 7 --data TableTasks "
FIT += "--data.path machines --data.target power --data.shots 4 --data.queries 5 "
FIT += "--checkpoint.monitor val/mse --checkpoint.mode min "
FIT += "--data.meta_batch_size 4 --data.epoch_length 5 --data.val_tasks 4 --data.test_tasks 4 --trainer.max_steps 5 "
FIT += "--trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.enable_model_summary false"
CLASSES = ["--data.target=mode", "--data.shots=1", "--data.queries=2", "--model.network.out_features=3"]
CLASSES += ["--model.network.in_features=5", "--checkpoint.monitor=val/accuracy", "--checkpoint.mode=max"]
FROZEN = ["--model.inner_freeze", "[features.1.*]", "--model.outer_freeze", "[features.1.*]"]
DELTA = ["--save", "adapted.safetensors", "--delta"]
ADAPT = ["adapt", "--support", "support.csv", "--query", "query.csv"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Checkpoints of a regression and of a classification, trained by the command line."""
    folder = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("machines").mkdir()
        for number in range(MACHINES):
            machine(number, 40).to_csv(f"machines/m{number:02}.csv", index=False)
        paths = []
        for name, options in (
            ("regression", []),
            ("classes", CLASSES),
        ):
            main([*FIT.split(), *options, "--checkpoint.dirpath", name])
            paths.append(str(folder / name / "last.ckpt"))
    return paths[0], paths[1]


def adapt(checkpoint: str, *args: str) -> Any:
    main([*ADAPT, "--ckpt_path", checkpoint, *args])
    return pd.read_csv("predictions.csv")


def write(**tables: Any) -> None:
    for name, table in tables.items():
        table.to_csv(f"{name}.csv", index=False)


def test_adapt_answers_in_the_tables_own_terms(fitted: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    support, query = machine(31, 8), machine(32, 15)[["load", "power", "speed", "mode"]].assign(note="x")
    query.loc[4, "power"] = None
    write(support=support, query=query)
    answers = adapt(fitted[0], "--steps", "3", "--save", "adapted.safetensors")
    assert list(answers.columns) == [*query.columns, "predicted_power"]
    pd.testing.assert_frame_equal(answers[query.columns], pd.read_csv("query.csv"))

    # the same from Python, of which the numbers are checked by hand
    learner = load_learner(fitted[0])
    form = TableForm(**learner.form.table)
    predictor = learner.adapt(*form.encode(support), steps=3)
    inputs = form.inputs(query)
    expected = predictor(inputs)[:, 0].double() * form.scales["power"] + form.means["power"]
    assert answers["predicted_power"].tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert form.decode(predictor(inputs))["predicted_power"].tolist() == pytest.approx(expected.tolist())
    training = [
        pd.read_csv(Path(fitted[0]).parents[1] / f"machines/m{number:02}.csv")
        for number in tasks(Path(fitted[0]).parents[1] / "machines").members["train"]
    ]
    assert form.means["power"] == pytest.approx(pd.concat(training)["power"].mean())
    saved = Predictor.load("adapted.safetensors")
    assert saved.form.table == learner.form.table
    assert torch.allclose(saved(inputs), predictor(inputs))

    errors = (answers["predicted_power"] - query["power"]).abs().dropna()
    said = capsys.readouterr().out
    assert re.search(r"Adapted to 8 rows of support\.csv in \d+\.\d\d s\.", said)
    assert "Predicted power for 15 rows of query.csv: predictions.csv." in said
    half = 1.96 * errors.std() / len(errors) ** 0.5
    assert f"Mean absolute error {errors.mean():.4g} ± {half:.2g} (95 % confidence interval" in said
    assert f"root mean squared error {(errors**2).mean() ** 0.5:.4g}, on 14 rows of query.csv that have" in said


def test_predict_writes_real_targets_in_the_units_of_the_tables(fitted: tuple[str, str]) -> None:
    tables = str(Path(fitted[0]).parents[1] / "machines")
    main(["predict", "--ckpt_path", fitted[0], "--data.path", tables])
    rows = pd.read_csv(next(Path("lightning_logs").glob("*/predictions.csv")))
    true = {value for number in range(MACHINES) for value in machine(number, 40)["power"].round(3)}
    assert {*rows["target_0"].round(3)} <= true
    learner, data = load_learner(fitted[0]), tasks(tables)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    scaled = learner.predict_tasks(batch)[-1].flatten().double()
    power = {part: learner.form.table[part]["power"] for part in ("means", "scales")}
    expected = scaled * power["scales"] + power["means"]
    assert rows["output_0"].tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_adapt_to_classes(fitted: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    query = machine(32, 15)
    write(support=machine(31, 12), query=query)
    answers = adapt(fitted[1])
    assert list(answers.columns) == [*query.columns, "predicted_mode", "probability"]
    learner = load_learner(fitted[1])
    form = TableForm(**learner.form.table)
    predictor = learner.adapt(*form.encode(machine(31, 12)))
    assert predictor.class_names == ["idle", "run", "stop"]
    assert answers["predicted_mode"].tolist() == predictor.predict(form.inputs(query))
    probabilities = predictor.predict_proba(form.inputs(query)).max(1).values
    assert answers["probability"].tolist() == pytest.approx(probabilities.tolist(), abs=1e-6)
    known = query["mode"].notna()
    right = (answers["predicted_mode"] == query["mode"])[known].sum()
    said = capsys.readouterr().out
    assert f"Accuracy {100 * right / 14:.1f} %: {right} of the 14 rows of query.csv that have a target" in said
    write(query=query.drop(columns="mode"))
    again = adapt(fitted[1], "--overwrite")
    assert again["predicted_mode"].tolist() == answers["predicted_mode"].tolist()
    assert "Accuracy" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("support", "query", "message"),
    [
        (lambda t: t.drop(columns="power"), None, r"target must be .*'power' in support\.csv; it has 'speed'"),
        (None, lambda t: t.drop(columns="load"), r"features must be .*'load' in query\.csv; it has 'speed'"),
        (None, lambda t: t.assign(mode="repair"), r"mode .*'idle', 'run', 'stop', got 'repair' in query\.csv"),
        (lambda t: t.assign(load=7), None, r"load must hold categories .*'low', 'mid', got '7' in support\.csv"),
        (lambda t: t.assign(speed="fast"), None, r"speed must hold finite numbers, got 'fast'.* in support\.csv"),
        (lambda t: t.assign(power="much"), None, r"target must hold finite numbers, got 'much'.* in support\.csv"),
        (lambda t: t.assign(power=None), None, r"target must have a value in some row, got none of 'power' in support"),
        (lambda t: t.head(0), None, r"support must name a table.* support\.csv, which has no rows"),
        (None, lambda t: t.assign(predicted_power=1), r"query must have no column 'predicted_power'.*query\.csv"),
    ],
)
def test_bad_tables_at_adapt(fitted: tuple[str, str], support: Any, query: Any, message: str) -> None:
    write(support=(support or (lambda t: t))(machine(31, 8)), query=(query or (lambda t: t))(machine(32, 15)))
    before = sorted(Path().iterdir())
    assert re.search(message, fails(*ADAPT, "--ckpt_path", fitted[0]))
    assert sorted(Path().iterdir()) == before


def test_a_delta_of_a_table_at_adapt(fitted: tuple[str, str]) -> None:
    write(support=machine(31, 8), query=machine(32, 15))
    before = sorted(Path().iterdir())
    assert re.search(r"delta must be False .*, got True", fails(*ADAPT, "--ckpt_path", fitted[0], *DELTA))
    assert sorted(Path().iterdir()) == before
    path = Path(fitted[0])
    main([*FIT.split(), "--data.path", str(path.parents[1] / "machines"), *FROZEN, "--checkpoint.dirpath", "frozen"])
    answers = adapt("frozen/last.ckpt", *DELTA)["predicted_power"]
    predictor = Predictor.load("adapted.safetensors", load_learner("frozen/last.ckpt").network)
    form = TableForm(**predictor.form.table)
    again = form.decode(predictor(form.inputs(machine(32, 15))))["predicted_power"]
    assert again.tolist() == pytest.approx(answers.tolist())
    assert all(".features.1." not in name for name in load_file("adapted.safetensors"))


def test_bad_classes_and_paths_at_adapt(fitted: tuple[str, str]) -> None:
    support, query = machine(31, 12), machine(32, 15)
    for table, message in (
        (support[support["mode"] != "run"], r"target must hold every class, got none of 'run' in support\.csv"),
        (support.assign(mode="repair"), r"target must hold classes .*'stop', got 'repair' in support\.csv"),
    ):
        write(support=table, query=query)
        assert re.search(message, fails(*ADAPT, "--ckpt_path", fitted[1]))
    Path("pictures").mkdir()
    for args, message in (
        (["--support", "nowhere.csv"], r"support must name a table.*nowhere\.csv, which is no such file"),
        (["--query", "pictures"], r"query must name a table.*pictures, which is no such file"),
        (
            ["--query", "folder", "--support", "folder"],
            r"support must name a table, .*got folder, which is no such file",
        ),
        (["--query", "support.csv"], r"query must be another table than support, got support\.csv"),
        (["--out", "query.csv"], r"out must name a new file.*query\.csv"),
        (["--out", "query.csv", "--overwrite"], r"out must be another file than support and query, got query\.csv"),
    ):
        assert re.search(message, fails(*ADAPT, "--ckpt_path", fitted[1], *args))
    said = fails("export", "--support", "pictures", "--ckpt_path", fitted[1])
    assert re.search(r"ckpt_path .*images, got .*classes/last\.ckpt, which was trained on tables; in Python ", said)


def test_a_computed_head_takes_some_of_the_classes(fitted: tuple[str, str]) -> None:
    folder = Path(fitted[0]).parents[1]
    data = tasks(folder / "machines", target="mode", shots=1, queries=1)
    learner = MAML(MLP(5, [8], 3), head_start=Prototypes(), inner_lr=0.01, inner_steps=1, outer_lr=0.01)
    trainer(max_steps=1, limit_val_batches=0).fit(learner, data)
    support = machine(31, 12)
    form = TableForm(**learner.form.table)
    predictor = learner.adapt(*form.encode(support[support["mode"] != "run"], every_class=False))
    inputs = form.inputs(machine(32, 15))
    assert predictor.class_names == ["idle", "stop"]
    answers = form.decode(predictor(inputs), predictor.class_names)
    assert answers["predicted_mode"].tolist() == predictor.predict(inputs)


def test_the_checkpoint_keeps_plain_data_that_tests_use(
    fitted: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = torch.load(fitted[0], weights_only=True)
    table = checkpoint["form"]["table"]
    assert json.loads(json.dumps(table)) == table
    assert checkpoint["TableTasks"] == {"form": table}

    # new machines alone, to which nothing is fitted: their numbers are those of training
    Path("new").mkdir()
    for number in range(40, 44):
        machine(number, 20).to_csv(f"new/n{number}.csv", index=False)
    taken = []

    def test_step(self: MAML, batch: Any, *args: Any) -> None:
        taken.append(batch)

    monkeypatch.setattr(MAML, "test_step", test_step)
    monkeypatch.setattr(MAML, "on_test_epoch_end", lambda self: None)
    main(["test", "--ckpt_path", fitted[0], "--data.path", "new", "--data.split_fractions", "[0,0,1]"])
    form = TableForm(**table)
    rows = torch.cat([form.inputs(machine(number, 20)) for number in range(40, 44)])
    seen = torch.cat([x for batch in taken for part in (batch.support_x, batch.query_x) for x in part])
    assert len(seen) == 4 * 9
    assert torch.cdist(seen, rows).min(1).values.max() < 1e-3


def test_the_last_checkpoint_is_of_the_same_tables(machines: Path) -> None:
    fit, same = FIT.split(), str(machines.resolve())
    main(fit)
    main(["test", *fit[1:], "--ckpt_path", "last", "--data.path", same])
    machines.rename("others")
    said = fails("test", *fit[1:], "--ckpt_path", "last", "--data.path", "others")
    assert "of another experiment, with data.path" in said
    assert "others instead of" in said


@pytest.mark.usefixtures("machines")
def test_the_preprocessing_of_a_checkpoint_holds_with_other_training_tasks() -> None:
    data, other = tasks(), tasks(split_seed=1)
    assert data.form != other.form
    other.setup()
    other.load_state_dict(data.state_dict())
    assert data.form == other.form
    with pytest.raises(InputError, match=r"target must be the checkpoint's, 'power', got 'mode'"):
        tasks(target="mode", shots=1, queries=1).load_state_dict(data.state_dict())
    (number,) = other.members["test"][:1]
    assert data.form is not None
    assert torch.equal(encoded(other, "test")[0][0], data.form.inputs(machine(number)))


def test_the_network_has_too_few_outputs_for_the_classes(machines: Path) -> None:
    data = tasks(target="mode", shots=1, queries=1, splits={"train": range(8, 18), "val": [18]})
    learner = MAML(MLP(5, [8], 2), inner_lr=0.01, inner_steps=1, outer_lr=0.01)
    with pytest.raises(InputError, match=r"network must give an output for each class: expected at least 3, got 2"):
        trainer(max_steps=1, limit_val_batches=0).fit(learner, data)
