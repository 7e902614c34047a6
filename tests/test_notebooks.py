"""The notebooks run from beginning to end, and hold what they give."""

import os
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# 100 and 65 s; the others together less than four minutes on one thread
LONG = ("02_your_own_images", "03_maml_fomaml_reptile")
NEEDS = {"07_tables": ("gapminder", "pandas", "sklearn"), "08_pretrained": ("sklearn",), "09_lora": ("peft",)}


def kinds(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """What each cell gives: text, pictures, complaints."""
    found = []
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        names = [out.get("name") or ("picture" if "image/png" in out.data else "text") for out in outputs]
        # a slow command's output comes in several pieces
        found.append([n for i, n in enumerate(names) if not (n == "stdout" and names[:i][-1:] == ["stdout"])])
    return found


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem in LONG)) for p in NOTEBOOKS]
)
def test_a_notebook_runs_and_gives_what_it_holds(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, glyphs: object
) -> None:
    missing = [package for package in NEEDS.get(path.stem, ()) if find_spec(package) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    # the kernel and what it starts stand in another folder
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    # torchmetrics imports transformers where it is installed, whose tqdm misses the widgets of a browser
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")
    held = nbformat.read(path, as_version=4)
    ran = nbformat.from_dict(held.copy())
    ran = NotebookClient(ran, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert kinds(ran) == kinds(held)
    assert sum(kind == "picture" for cell in kinds(held) for kind in cell) >= 1
    assert not any(kind == "stderr" for cell in kinds(held) for kind in cell)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_was_run_in_order(path: Path) -> None:
    assert path.stat().st_size < 500_000
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
