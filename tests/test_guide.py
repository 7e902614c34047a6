"""What README and guide refer to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links to them, and what a page of the reference documents."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    documented = re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings} | {*documented}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for text, target in LINK.findall(page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name}: {target}"
        if text.startswith("`") and linked.suffix == ".py" and not text.strip("`").endswith(".py"):
            for name in text.strip("`").split("."):
                assert re.search(rf"^ *(class|def) {name}\b", linked.read_text(), re.MULTILINE), f"{page.name}: {text}"


def stripped(text: str) -> str:
    """The lines without their indentation."""
    return "\n".join(line.strip() for line in text.strip().splitlines())


def test_the_lines_that_the_guide_quotes_are_the_projects() -> None:
    page = ROOT / "docs" / "guide.md"
    before, *quotes = page.read_text().split("```python\n")
    assert len(quotes) == 4
    for quote in quotes:
        lines, _, after = quote.partition("```")
        _, path = [link for link in LINK.findall(before) if link[1].endswith(".py")][-1]
        assert stripped(lines) in stripped((page.parent / path).read_text()), path
        before = after
