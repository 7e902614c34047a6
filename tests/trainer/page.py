"""The tables of docs/lightning.md: `python tests/trainer/page.py` writes them from the cases."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # conftest, as pytest finds it

import cases_callbacks as _callbacks
import cases_flags as _flags
import cases_outputs as _outputs
import cases_tuner as _tuner
from registry import CASES, PUBLIC

PAGE = Path(__file__).parents[2] / "docs" / "lightning.md"
MODULES = (_callbacks, _flags, _outputs, _tuner)  # they fill CASES
KINDS = {
    "callbacks": "Callbacks",
    "tuner": "Tuner",
    "flags": "Flags of the Trainer",
    "loggers": "Loggers",
    "profilers": "Profilers",
}
BEGIN, END = "<!-- cases -->", "<!-- end of cases -->"


def rows(kind: str) -> list[str]:
    """A row per case, in the order of Lightning's names."""
    cases = sorted((case for case in CASES if case.kind == kind), key=lambda case: PUBLIC[kind].index(case.name))
    names = [f"`{case.name}`" + (f", {case.with_}" if case.with_ else "") for case in cases]
    return [f"| {name} | {case.result} | {case.what} |" for name, case in zip(names, cases, strict=True)]


def tables() -> str:
    """A table per kind."""
    head = ["| name | result | here |", "|---|---|---|"]
    return "\n\n".join("\n".join([f"## {title}", "", *head, *rows(kind)]) for kind, title in KINDS.items())


def parts(page: str) -> tuple[str, str, str]:
    """The page before, in and after the tables."""
    before, _, rest = page.partition(BEGIN)
    inside, _, after = rest.partition(END)
    return before, inside.strip(), after


if __name__ == "__main__":
    before, _, after = parts(PAGE.read_text())
    PAGE.write_text(f"{before}{BEGIN}\n{tables()}\n{END}{after}")
