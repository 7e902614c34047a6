"""``adapt`` for tables: from the rows of one to predictions for those of another."""

import time
from pathlib import Path
from typing import Any

from meta_lightning.adaptation.sentences import accuracy, mean_error
from meta_lightning.checks import require
from meta_lightning.data.table_form import TableForm
from meta_lightning.files import written_whole


def adapt_to_table(
    learner: Any,
    support: Path,
    query: Path,
    out: Path,
    steps: int | None,
    save: Path | None,
    delta: bool,
    overwrite: bool,
) -> str:
    """Implement ``command.adapt`` for a learner of tables, with its arguments, result and errors."""
    form = TableForm(**learner.form.table)
    table, queries = form.table(support, "support"), form.table(query, "query")
    require(support.resolve() != query.resolve(), f"query must be another table than support, got {query} for both")
    apart = out.resolve() not in (support.resolve(), query.resolve())
    require(apart, f"out must be another file than support and query, got {out}")
    x, y = form.encode(table, str(support), every_class=not learner.head_start.computed)
    inputs = form.inputs(queries, str(query))
    for column in form.answers:
        free = f"query must have no column {column!r}, which is to hold the answers, got one in {query}"
        require(column not in queries.columns, free)
    start = time.perf_counter()
    predictor = learner.adapt(x, y, steps)
    predictor.require_base(delta)
    took = time.perf_counter() - start
    answers = form.decode(predictor(inputs), predictor.class_names)
    summary = [
        f"Adapted to {len(x)} rows of {support} in {took:.2f} s.",
        f"Predicted {form.target} for {len(queries)} rows of {query}: {out}.",
    ]
    if form.target in queries.columns and len(errors := form.errors(answers, queries, str(query))):
        sentence = mean_error if form.classes is None else accuracy
        summary.append(sentence(errors, f"rows of {query} that have a target", "rows"))
    with written_whole(out) as part:
        queries.reset_index(drop=True).join(answers).to_csv(part, index=False)
    if save is not None:
        predictor.save(save, overwrite, delta)
        summary.append(f"Saved the predictor to {save}.")
    return "\n".join(summary)
