"""The documentation site is built without a warning, and no link in it is broken."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from meta_lightning import MetaLearner

ROOT = Path(__file__).parents[1]
PARTS = ("mkdocs", "material", "mkdocstrings_handlers", "nbconvert")
MISSING = [name for name in PARTS if importlib.util.find_spec(name) is None]

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)}: pip install 'meta-lightning[docs]'")


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """A strict build of the docs of a copy of the project."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(root / "docs/site/mkdocs.yml")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run([*command, "-d", str(site)], capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly."""
    site = tmp_path_factory.mktemp("site")
    built = build(ROOT, site)
    assert built.returncode == 0, built.stderr
    return site


class Page(HTMLParser):
    """The anchors of a page, and what it refers to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.targets: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            if name in ("href", "src") and value:
                self.targets.append(value)


def broken(site: Path) -> Iterator[str]:
    """The links within a site that lead nowhere."""
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    for path, page in pages.items():
        for target in page.targets:
            if target.startswith(("http:", "https:", "data:", "mailto:")):
                continue
            place, anchor = urldefrag(unquote(target))
            linked = (path.parent / place).resolve() if place else path
            linked = linked / "index.html" if linked.is_dir() else linked
            known = pages[linked].anchors | {""} if linked in pages else {anchor}
            if not linked.exists() or anchor not in known:
                yield f"{path.relative_to(site)}: {target}"


def test_no_link_is_broken(site: Path) -> None:
    assert len([*site.rglob("*.html")]) > 40
    assert [*broken(site)] == []
    (site / "index.html").write_text(
        '<a href="nowhere/">1</a> <a href="guide/#nothing">2</a> <a href="guide/#heads">3</a>'
    )
    assert [*broken(site)] == ["index.html: nowhere/", "index.html: guide/#nothing"]


def test_every_page_of_the_docs_is_in_the_navigation(site: Path) -> None:
    home = Page(site / "faq/index.html").targets
    for page in sorted((ROOT / "docs").rglob("*.md")):
        assert f"../{page.relative_to(ROOT / 'docs').with_suffix('').as_posix()}/" in [*home, "../faq/"], page
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"../notebooks/{notebook.name}/" in home


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for name in ("getting_started", "reference/algorithms", "notebooks/01_quickstart.ipynb"):
        text = (site / name / "index.html").read_text()
        for tag in ("<script src=", '<link rel="stylesheet" href='):
            assert f'{tag}"http' not in text
            assert f"{tag}http" not in text


def test_the_reference_shows_docstrings_and_outputs_of_notebooks_are_pictures(site: Path) -> None:
    reference = (site / "reference/algorithms/index.html").read_text()
    assert (MetaLearner.adapt.__doc__ or "").splitlines()[0] in reference
    assert 'id="meta_lightning.algorithms.maml.MAML"' in reference
    assert [*(site / "notebooks/01_quickstart").glob("*.png")]


@pytest.mark.slow  # builds the site once more
def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    root = tmp_path / "project"
    folders = ("docs", "notebooks", "meta_lightning", "benchmarks/results", "tests")
    skip = shutil.ignore_patterns("__pycache__", "*.ckpt")
    for folder in folders:
        shutil.copytree(ROOT / folder, root / folder, ignore=skip)
    for path in (*ROOT.glob("*.md"), ROOT / "CITATION.cff", *(ROOT / "benchmarks").glob("*.py")):
        shutil.copy(path, root / path.relative_to(ROOT))
    (root / "docs/faq.md").write_text("# Questions\n\n[one](guide.md#nothing), [two](nowhere.md)\n")
    built = build(root, tmp_path / "site")
    assert built.returncode != 0
    assert "nowhere.md" in built.stderr
    assert "#nothing" in built.stderr
