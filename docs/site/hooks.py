"""Builds the site from the repository as it is: README, docs, notebooks, and the files to which they link.

MkDocs takes one folder of pages. Here a page has the path that it has in the repository, so that links which work in
the repository work on the site; notebooks and other files become pages with ``.md`` after their name.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()[^)\s:#]+")  # of a file, not of a URL or an anchor
AS_IT_IS = {".md", ".png"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".cff": "yaml"}


def paths() -> Iterator[Path]:
    """README, changes, docs and notebooks, then what they link to."""
    ahead = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
    ahead += sorted((ROOT / "notebooks").glob("*.ipynb"))
    seen = set()
    while ahead:
        path = ahead.pop()
        if path in seen:
            continue
        seen.add(path)
        yield path
        if path.suffix == ".md":
            linked = [(path.parent / link).resolve() for link in LINK.findall(path.read_text())]
            ahead += [other for other in linked if other.is_file()]


def linked(text: str, folder: Path) -> str:
    """A page whose links lead to the pages that files have become."""

    def page(link: re.Match[str]) -> str:
        path = folder / link[0]
        return f"{link[0]}.md" if path.is_file() and path.suffix not in AS_IT_IS else link[0]

    return LINK.sub(page, text)


def on_config(config: Any) -> None:
    """Put the pages of a folder in the place of a ``*``."""
    named = set(re.findall(r"'([^']+\.md)'", str(config.nav)))
    uris = {f"{path}.md" if path.suffix == ".ipynb" else str(path) for path in (p.relative_to(ROOT) for p in paths())}

    def expanded(items: list[Any]) -> Iterator[Any]:
        for item in items:
            if isinstance(item, dict):
                yield {title: [*expanded(to)] if isinstance(to, list) else to for title, to in item.items()}
            elif "*" in item:
                yield from sorted(uri for uri in uris - named if Path(uri).match(item))
            else:
                yield item

    config.nav = [*expanded(config.nav)]


def on_files(files: Files, config: Any) -> None:
    """Take the files of the repository in place of those of one folder."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)

    def add(uri: str, content: str | bytes) -> None:
        file = File.generated(config, uri, content=content)
        file.dest_uri = file.dest_uri.removeprefix("docs/")
        files.append(file)

    for path in paths():
        uri = path.relative_to(ROOT).as_posix()
        if path.suffix == ".ipynb":
            resources = {"unique_key": path.stem, "output_files_dir": path.stem}
            text, resources = MarkdownExporter().from_filename(str(path), resources)
            add(f"{uri}.md", linked(text, path.parent))
            for name, output in resources["outputs"].items():
                add(f"notebooks/{name}", output)
        elif path.suffix == ".md":
            add(uri, linked(path.read_text(), path.parent))
        elif path.suffix in AS_IT_IS:
            add(uri, path.read_bytes())
        else:
            add(f"{uri}.md", f"# {uri}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text()}````\n")
