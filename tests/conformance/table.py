"""The table of docs/networks.md: `python tests/conformance/table.py` writes it from what the tests are about."""

import warnings
from pathlib import Path

import torch
from layers import KEEPS_STATISTICS, LAYERS, ONCE_DIFFERENTIABLE, REASONS, Around, tasks

from meta_lightning import FOMAML

PAGE = Path(__file__).parents[2] / "docs" / "networks.md"
BEGIN, END = "<!-- layers -->", "<!-- end of layers -->"
HOW = {
    "stacked": "exact, the tasks of a pass at once",
    "a loop": "exact, tasks in a loop: `vmap` does not take it",
    "in turn": "exact, one task after another, since it updates running statistics",
    "first order": "FOMAML and Reptile exact; MAML refuses it, torch has no second derivative",
}


def kind(name: str) -> str:
    """How a class is computed."""
    if name in ONCE_DIFFERENTIABLE or name in KEEPS_STATISTICS:
        return "first order" if name in ONCE_DIFFERENTIABLE else "in turn"
    torch.manual_seed(0)
    learner = FOMAML(Around(LAYERS[name], "plain"), inner_steps=1)
    learner.meta_gradient(tasks(LAYERS[name]))
    return "a loop" if learner.task_network.loops_over_tasks else "stacked"


def table() -> str:
    """Rows of classes by how they are computed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = {name: kind(name) for name in sorted(LAYERS)}
    rows = [f"| {text} | {', '.join(name for name in kinds if kinds[name] == how)} |" for how, text in HOW.items()]
    left_out = "; ".join(f"{name} ({reason})" for name, reason in REASONS.items())
    return "\n".join(["| how | classes of `torch.nn` |", "|---|---|", *rows, f"| not tested | {left_out} |"])


def parts(page: str) -> tuple[str, str, str]:
    """The page before, in and after the table."""
    before, _, rest = page.partition(BEGIN)
    inside, _, after = rest.partition(END)
    return before, inside.strip(), after


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    before, _, after = parts(PAGE.read_text())
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")
