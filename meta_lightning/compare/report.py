"""The report of a comparison: table, figure and page."""

import base64
import csv
import html
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from meta_lightning.compare.figure import draw
from meta_lightning.compare.summary import CELLS, Result, Row
from meta_lightning.files import written_whole

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#1f2933}"
    "table{border-collapse:collapse}td{padding:.3em .8em;border-bottom:1px solid #ccc;text-align:left}"
    "tr:first-child{font-weight:bold}img{max-width:100%}pre{background:#f4f5f7;padding:1em;overflow-x:auto}"
)


def write_report(rows: Sequence[Row], results: Sequence[Result], failures: Sequence[str], out: Path) -> None:
    """Write ``comparison.md``, ``.csv``, ``.png`` and ``.html`` atomically."""
    if not rows:
        return
    with written_whole(out / "comparison.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, Row._fields)
        table.writeheader()
        table.writerows(row._asdict() for row in rows)
    with written_whole(out / "comparison.md") as part:
        part.write_text(markdown(cells_of(rows)), encoding="utf-8")
    with written_whole(out / "comparison.png") as part:
        draw(rows, results, part)
    with written_whole(out / "comparison.html") as part:
        part.write_text(page(rows, results, failures, (out / "comparison.png").read_bytes()), encoding="utf-8")


def cells_of(rows: Sequence[Row]) -> list[list[str]]:
    """The cells of the table, header first, without empty columns."""
    metric = rows[0].metric
    digits, unit = (1, ", %") if metric == "accuracy" else (3, "")

    def shown(value: float | None, digits: int = 0, relative: float | None = None) -> str:
        text = "" if value is None else f"{value:,.{digits}f}"
        return text if relative is None else f"{text} ({relative:.2f}×)"

    def cells(row: Row) -> dict[str, str]:
        gained = row.after_relative if row.after_relative and math.isfinite(row.after_relative) else None
        paired = "" if row.after_relative_ci95 is None else f" ± {row.after_relative_ci95:.{digits}f}"
        difference = "" if gained is None else f" ({gained:+.{digits}f}{paired})".replace("-", "−")
        seeds = f"{row.seeds} of {row.seeds_asked}" if row.seeds < row.seeds_asked else f"{row.seeds}"
        return {
            "": row.algorithm,
            f"{metric} before{unit}": f"{row.before:.{digits}f} ± {row.before_ci95:.{digits}f}",
            f"after{unit}": f"{row.after:.{digits}f} ± {row.after_ci95:.{digits}f}{difference}",
            "training, s": shown(row.seconds, 1, row.seconds_relative),
            "tasks per second": shown(row.tasks_per_second, 0, row.tasks_per_second_relative),
            "peak memory, MB": shown(row.peak_memory, 0, row.peak_memory_relative),
            "std over seeds": shown(row.after_std, digits),
            "seeds": seeds if row.seeds_asked > 1 else "",
            "steps skipped": shown(row.skipped),
            "grid near best": "" if row.near_best is None else f"{row.near_best * CELLS:.0f} of {CELLS}",
        }

    table = [cells(row) for row in rows]
    return without_empty_columns([[*table[0]], *([*line.values()] for line in table)])


def without_empty_columns(cells: Sequence[Sequence[str]]) -> list[list[str]]:
    """A table, header first, without columns whose other cells are empty."""
    kept = [column for column in zip(*cells, strict=True) if any(column[1:])]
    return [[*row] for row in zip(*kept, strict=True)]


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, header first."""
    header, *body = ("| " + "| ".join(f"{cell} " if cell else "" for cell in row) + "|" for row in cells)
    return "\n".join([header, "|" + "---|" * len(cells[0]), *body]) + "\n"


def page(rows: Sequence[Row], results: Sequence[Result], failures: Sequence[str], figure: bytes) -> str:
    """The report as a self-contained HTML page."""
    table = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in cells_of(rows))
    record = next(iter(results[0]["tests"].values()))
    where = ", ".join([f"{k} {v}" for part in ("versions", "machine") for k, v in record[part].items()])
    commands = [shlex.join(["python", "-m", "meta_lightning", *c]) for r in results for c in r["commands"].values()]
    failed = f"<h2>Failed</h2><ul>{''.join(f'<li>{html.escape(f)}</li>' for f in failures)}</ul>" if failures else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Comparison</title><style>{STYLE}</style>'
        f"<h1>{html.escape(', '.join(row.algorithm for row in rows))}</h1>"
        f"<table>{table}</table>"
        f"<p>± is the 95 % confidence interval over {record['figures'].get('test/tasks', 0):.0f} test tasks, averaged "
        "over seeds. In parentheses: the ratio to the first algorithm, for scores the difference from it, whose "
        "confidence interval is that of the differences on single tasks, the mean over seeds. Training excludes "
        "validation. Peak memory excludes what was in use before the first step. Each run has its own process.</p>"
        f'<img alt="Curves and bars" src="data:image/png;base64,{base64.b64encode(figure).decode()}">{failed}'
        f"<h2>Commands</h2><pre>{html.escape(chr(10).join(commands))}</pre>"
        f"<p>Commit {html.escape(str(record['commit']))}, {html.escape(where)}.</p></html>\n"
    )
