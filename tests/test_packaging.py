"""What is installed, and what an import costs."""

import ast
import configparser
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import smoke

import meta_lightning

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "meta_lightning"


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def setup_cfg() -> configparser.ConfigParser:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup


def test_import_does_not_import_learn2learn() -> None:
    loaded = python("import sys, meta_lightning.cli; print(*sys.modules)").stdout.split()
    assert "lightning" in loaded
    assert not {"learn2learn", "gym"} & set(loaded)


def test_gyms_notice_does_not_reach_the_screen() -> None:
    pytest.importorskip("gym_notices")
    tasks = "TensorTasks(torch.rand(60, 2), torch.arange(60) // 2, queries=1).task_set('train')"
    code = f"import torch, meta_lightning, sys; meta_lightning.{tasks}; assert 'gym' in sys.modules"
    result = python(code)
    assert "Gym" not in result.stdout + result.stderr


def test_the_wheel_fits_and_adapts(tmp_path: Path) -> None:
    built = smoke.wheel(tmp_path, "--no-build-isolation", "--no-index")
    site, folder = tmp_path / "site", tmp_path / "run"
    folder.mkdir()
    smoke.run([sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, built], tmp_path)
    versions = smoke.check(site / "bin" / "meta-lightning", folder, PYTHONPATH=str(site))
    assert versions["meta-lightning"] == meta_lightning.__version__


def test_pyproject_leaves_to_setup_cfg_what_stands_there() -> None:
    project, setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"], setup_cfg()
    of_metadata = {"version", "description", "keywords", "classifiers"}
    assert of_metadata <= setup["metadata"].keys()
    others = {"readme", "urls", "dependencies", "optional-dependencies", "scripts"}
    assert {*project["dynamic"]} == of_metadata | others
    assert project.keys() == {"name", "license", "license-files", "requires-python", "dynamic"}
    assert setup["options.entry_points"]["console_scripts"].strip() == "meta-lightning = meta_lightning.__main__:main"


NAMES = {"docstring_parser": "docstring-parser", "PIL": "pillow", "sklearn": "scikit-learn"}  # of imports, of packages
OF_LEARN2LEARN = {"learn2learn", "gym_notices"}  # imported where it is installed


def required(requirements: str) -> set[str]:
    """The packages of requirements, one per line."""
    return {re.split(r"[\[<>=; ]", line)[0] for line in requirements.split("\n") if line}


def test_what_is_imported_is_required() -> None:
    setup, imported = setup_cfg(), set()
    of_all = required(setup["options"]["install_requires"])
    extras = setup["options.extras_require"]
    optional = set().union(*(required(extras[name]) for name in extras if name not in ("docs", "test", "dev")))
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            imported |= {module.partition(".")[0] for module in modules}
    others = imported - sys.stdlib_module_names - {"meta_lightning"} - OF_LEARN2LEARN
    assert of_all <= {NAMES.get(name, name) for name in others} <= of_all | optional
    assert {"torch", "numpy", "pillow"} <= of_all


def test_getting_started_lists_the_extras() -> None:
    page = (ROOT / "docs/getting_started.md").read_text()
    listed = {name for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert listed == setup_cfg()["options.extras_require"].keys() - {"screenshots", "test", "dev"}


def test_setup_cfg_lists_every_package_and_all_configs() -> None:
    setup = setup_cfg()
    packages = {path.parent.relative_to(ROOT) for path in (ROOT / "meta_lightning").rglob("__init__.py")}
    names = {".".join(package.parts) for package in packages} | {"meta_lightning.configs"}
    assert set(setup["options"]["packages"].split()) == names
    patterns = setup["options.package_data"]["meta_lightning.configs"].split(", ")
    covered = {path for pattern in patterns for path in (ROOT / "configs").glob(pattern)}
    assert covered == {path for path in (ROOT / "configs").rglob("*") if path.is_file()}
    patterns = setup["options.package_data"]["meta_lightning.hub"].split(", ")
    folder = PACKAGE / "hub"
    files = {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert {path for pattern in patterns for path in folder.glob(pattern)} == files
    assert patterns == ["*.ckpt", "*.md"]


def imports() -> dict[str, set[str]]:
    """The modules of the package, each with those of the package that it imports, anywhere in it."""
    found = {}
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    for name, path in modules.items():
        named = set()
        for node in ast.walk(ast.parse(path.read_text())):
            for alias in node.names if isinstance(node, ast.ImportFrom) else ():
                inner = f"{node.module}.{alias.name}"  # a module, or a name in one
                named.add(inner if inner in modules else str(node.module))
        found[name] = (named & modules.keys()) - {name}
    return found


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A way round in a graph, if there is one."""
    done: set[str] = set()

    def visit(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        for after in sorted(graph.get(node, ())):
            if found := visit(after, [*way, node]):
                return found
        done.add(node)
        return []

    return next(filter(None, (visit(node, []) for node in sorted(graph))), [])


def test_no_module_and_no_folder_imports_itself_by_a_detour() -> None:
    graph = imports()
    assert len(graph) > 60
    assert cycle(graph) == []

    def folder(name: str) -> str:
        return ".".join(name.split(".")[:2])

    folders: dict[str, set[str]] = {}
    for name, imported in graph.items():
        if name.count(".") == 2:  # the package itself and the modules of its top level import from all folders
            folders.setdefault(folder(name), set()).update(map(folder, imported))
    for name in folders:
        folders[name].discard(name)
    assert cycle(folders) == []
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]


def test_adaptation_imports_no_learner() -> None:
    graph = imports()
    reached, ahead = set(), [name for name in graph if name.startswith("meta_lightning.adaptation")]
    while ahead:
        name = ahead.pop()
        reached.add(name)
        ahead += graph[name] - reached
    assert not [name for name in reached if name.startswith("meta_lightning.algorithms")]


def test_the_base_knows_no_leaf() -> None:
    leaves = re.compile(r"\b(MAML|FOMAML|Reptile|MetaSGD|Glyphs|Omniglot)\b")
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE).as_posix()
        if not place.startswith(("inner/", "outer/", "dashboard/", "runs/", "algorithms/meta_learner")):
            continue
        code = ast.parse(path.read_text())
        names = {node.id for node in ast.walk(code) if isinstance(node, ast.Name)}
        names |= {alias.name for node in ast.walk(code) if isinstance(node, ast.ImportFrom) for alias in node.names}
        of_rules = {"MetaSGD"} if place == "inner/rules.py" else set()
        assert {name for name in names if leaves.fullmatch(name)} <= of_rules, place


def private_names() -> set[tuple[str, str]]:
    """Names with a leading underscore, or of modules with one, that the package takes from others: name and file."""
    found, own = set(), {"_replace", "_asdict", "_fields", "_make"}  # public methods of named tuples
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                of_private = any(part.startswith("_") for part in (node.module or "").split("."))
                names = [a.name for a in node.names if of_private or a.name.startswith("_")]
                found |= {(name, file) for name in names if node.module != "__future__"}
            elif isinstance(node, ast.Attribute | ast.FunctionDef):
                name = node.attr if isinstance(node, ast.Attribute) else node.name
                if name.startswith("_") and not name.startswith("__") and name not in own:
                    found.add((name, file))
    return found


def test_every_private_name_stands_in_the_table_of_the_docs() -> None:
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", (ROOT / "docs" / "private_names.md").read_text(), re.MULTILINE)
    table = {
        (name, file) for names, files in rows for name in re.findall(r"`(\w+)`", names) for file in files.split(", ")
    }
    assert private_names() == table
    assert len(table) <= 22
