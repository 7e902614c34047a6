"""``python -m meta_lightning adapt``: adapt to a few pictures per class or rows of a table, and predict others."""

import csv
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from tqdm import tqdm

from meta_lightning.adaptation.export import require_target
from meta_lightning.adaptation.predictor import AT_ONCE, Predictor
from meta_lightning.adaptation.program import ANY, require_program_target
from meta_lightning.adaptation.sentences import accuracy
from meta_lightning.adaptation.tables import adapt_to_table
from meta_lightning.checks import require, require_choice
from meta_lightning.data.image_folder import files_below, try_to_prepare, visible
from meta_lightning.data.pictures import left_out
from meta_lightning.data.tasks import Array
from meta_lightning.drawing import Answer, draw_contact_sheet
from meta_lightning.files import require_writable, written_whole
from meta_lightning.runs.checkpoint_file import restore

SHOWN = 60  # queries on the contact sheet


def adapt(
    support: Path,
    query: Path,
    ckpt_path: Path = Path("hub:characters"),
    out: Path = Path("predictions.csv"),
    steps: int | None = None,
    save: Path | None = None,
    delta: bool = False,
    overwrite: bool = False,
) -> str:
    """Adapt a checkpoint to a few pictures per class or rows of a table, and predict others.

    Of pictures, writes a table of the answers and, next to it, a contact sheet (PNG) with the support pictures and up
    to 60 answers. If queries lie in folders named after classes, reports the accuracy on those that are not support
    pictures. Of tables, writes the columns of the query and beside them the answers, in the terms of the target; where
    the query has targets, reports the accuracy or the error.

    Args:
        support: Folder of the pictures to adapt to, with one subfolder per class, named after it; or a table, CSV or
            Parquet, with the column of the target.
        query: Folder of the pictures to classify, at any depth; or a table, in which the target may be missing.
        ckpt_path: Checkpoint of a learner that was trained on images or tables: a path, or hub:NAME, see the subcommand
            hub.
        out: Path of the table of answers, a CSV file.
        steps: Number of inner steps. Default: the checkpoint's test_inner_steps.
        save: Where to save the adapted predictor, a .safetensors, .pt2 (torch.export) or .onnx file.
        delta: Leave out of the saved predictor, a .safetensors file, what was frozen: Predictor.load takes it from a
            network with the same weights, such as that of the checkpoint.
        overwrite: Replace existing files.

    Returns:
        A summary, one sentence per line.

    Raises:
        InputError: If an argument cannot be used; nothing is written then.
    """
    require_choice((".csv",), **{"the suffix of out": out.suffix})
    require_writable(out, overwrite, "out")
    require(save is not None or not delta, "delta needs save, the path of a .safetensors file, got None")
    if save is not None:
        require_target(save, overwrite, "save", delta)
    learner = restore(ckpt_path, "ckpt_path")
    if learner.form.table is not None:
        return adapt_to_table(learner, support, query, out, steps, save, delta, overwrite)
    sheet = out.with_suffix(".png")
    require_writable(sheet, overwrite, "the contact sheet next to out")
    require_images(learner, ckpt_path)
    classes, queries = list_support(support), list_queries(query, support)
    pictures = prepared(learner, classes)
    x, y = example_of(pictures)
    start = time.perf_counter()
    predictor = learner.adapt(x, y, steps)
    predictor.require_base(delta)
    adapted = time.perf_counter()
    with written_whole(out) as table, written_whole(sheet) as drawing:
        number, right, shown = write_answers(predictor, queries, query, table, {image.tobytes() for image in x.numpy()})
        answered = time.perf_counter()
        draw_contact_sheet(pictures, shown, learner.form.ink, drawing)
    summary = [
        f"Adapted to {len(classes)} classes from {len(x)} pictures in {adapted - start:.2f} s.",
        f"Classified {number} pictures in {answered - adapted:.1f} s: {out}, drawn in {sheet}.",
    ]
    if save is not None:
        predictor.save(save, overwrite, delta)
        summary.append(f"Saved the predictor to {save}.")
    if right:
        summary.append(accuracy(right, "queries in folders named after classes", "pictures"))
    return "\n".join(summary)


def export(
    support: Path,
    ckpt_path: Path = Path("hub:characters"),
    out: Path = Path("adaptation.pt2"),
    steps: int | None = None,
    overwrite: bool = False,
) -> str:
    """Export the adaptation of a checkpoint as a program that runs without this package.

    The program (torch.export) takes support pictures, their class numbers and queries, and returns logits; see
    docs/how_to/deployment.md.

    Args:
        support: Folder of pictures to try it with, with one subfolder per class. The program is for as many classes.
        ckpt_path: Checkpoint of a learner that was trained on images: a path, or hub:NAME, see the subcommand hub.
        out: Path of the program, a .pt2 file.
        steps: Number of inner steps. Default: the checkpoint's test_inner_steps.
        overwrite: Replace an existing file.

    Returns:
        A summary in a sentence.

    Raises:
        InputError: If an argument cannot be used; nothing is written then.
    """
    require_program_target(out, overwrite, "out")
    learner = restore(ckpt_path, "ckpt_path")
    require_images(learner, ckpt_path)
    pictures = prepared(learner, list_support(support))
    start = time.perf_counter()
    made = learner.export_adaptation(out, *example_of(pictures), steps, overwrite)
    taken, size = time.perf_counter() - start, out.stat().st_size / 1e6
    support_of, queries = (
        f"{made[n]} number of" if made[n] == ANY else made[n] for n in ("support_samples", "query_samples")
    )
    counts = f"{support_of} support pictures and {queries} queries"
    return f"Exported the adaptation to {made['classes']} classes, of {counts}, in {taken:.0f} s: {out}, {size:.1f} MB."


def require_images(learner: Any, ckpt_path: Path) -> None:
    """Refuse a learner of other samples."""
    of_images = learner.form.image_size is not None
    other = f"got {ckpt_path}, which was trained on {'tables' if learner.form.table else 'other samples'}"
    hint = "load_learner(path).adapt and .export_adaptation take any"
    require(of_images, f"ckpt_path must be of a learner that was trained on images, {other}; in Python {hint}")


def prepared(learner: Any, classes: Mapping[str, Sequence[Path]]) -> dict[str, list[Array]]:
    """The pictures of each class as a learner takes them."""
    return {name: [learner.form.prepare(path) for path in paths] for name, paths in classes.items()}


def example_of(pictures: Mapping[str, Sequence[Array]]) -> tuple[torch.Tensor, list[str]]:
    """Pictures, stacked, and the class of each.  # -> S C H W, S"""
    x = torch.from_numpy(np.stack([image for images in pictures.values() for image in images]))
    return x, [name for name, images in pictures.items() for _ in images]


def list_support(folder: Path) -> dict[str, list[Path]]:
    """The files of each class."""
    require(folder.is_dir(), f"support must be a folder with one subfolder per class, got {folder}, which is not one")
    classes = {entry.name: [*files_below(entry)] for entry in visible(folder) if entry.is_dir()}
    expected = "support must hold at least 2 classes, one subfolder each"
    named = f": {', '.join(classes)}" if classes else ""
    require(len(classes) >= 2, f"{expected}, got {len(classes)} in {folder}{named}")
    empty = [name for name, paths in classes.items() if not paths]
    require(not empty, f"support must hold at least 1 picture per class, got none of {', '.join(empty)}")
    return classes


def list_queries(folder: Path, support: Path) -> list[Path]:
    """The files to classify."""
    require(folder.is_dir(), f"query must be a folder of pictures, got {folder}, which is not a folder")
    require(folder.resolve() != support.resolve(), f"query must be another folder than support, got {folder} for both")
    inside = folder.resolve().parent == support.resolve()
    require(not inside, f"query must not be in support, whose folders are classes, got {folder} in {support}")
    paths = [*files_below(folder)]
    require(bool(paths), f"query must hold at least 1 picture, got none in {folder}")
    return paths


def write_answers(
    predictor: Predictor, paths: Sequence[Path], folder: Path, table: Path, support: Collection[bytes]
) -> tuple[int, list[bool], list[Answer]]:
    """Classify pictures into a CSV file; return their number, which known ones are right, and some answers to draw."""
    names = predictor.class_names or []
    chosen = {paths[i] for i in np.linspace(0, len(paths) - 1, min(SHOWN, len(paths))).round().astype(int)}
    unread: list[str] = []
    known: list[str] = []  # queries that are support pictures
    right: list[bool] = []
    shown: list[Answer] = []
    with table.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "class", "probability", "runner_up", "runner_up_probability"))
        for path, image, probabilities in classified(predictor, paths, unread):
            answers = [(names[i], float(probabilities[i])) for i in np.argsort(-probabilities, kind="stable")[:2]]
            rows.writerow([path, *(value for name, p in answers for value in (name, f"{p:.6f}"))])
            (name, probability), _ = answers
            folders = path.relative_to(folder).parts[:-1]
            truth = folders[0] if folders and folders[0] in names else None
            if image.tobytes() in support:
                known.append(path.name)
            elif truth is not None:
                right.append(truth == name)
            if path in chosen:
                shown.append(Answer(image, name, probability, truth))
    if known:
        among = f"{len(known)} of the {len(paths)} queries are among the support pictures: {', '.join(known[:3])}"
        rank_zero_warn(f"{among}{' …' if len(known) > 3 else ''}. They do not count in the accuracy")
    if unread:
        message = left_out(unread, len(paths), f"query {folder}")
        require(len(unread) < len(paths), f"query must hold at least 1 picture, but {message}")
        rank_zero_warn(message)
    return len(paths) - len(unread), right, shown


def classified(predictor: Predictor, paths: Sequence[Path], unread: list[str]) -> Iterator[tuple[Path, Array, Array]]:
    """Each picture, prepared as in training, and its class probabilities.  # C H W, N"""
    form = predictor.form
    size, channels = form.image_size or 0, form.channels or 0
    Image.init()  # in one thread: pillow may reject a file while another thread registers its formats
    with ThreadPoolExecutor() as threads, tqdm(total=len(paths), unit=" pictures", disable=None) as bar:
        for start in range(0, len(paths), AT_ONCE):
            batch = paths[start : start + AT_ONCE]
            prepared = [*threads.map(lambda path: try_to_prepare(path, size, channels), batch)]
            unread += [reason for reason in prepared if isinstance(reason, str)]
            pairs = [(p, form.ink_on_ground(i)) for p, i in zip(batch, prepared, strict=True) if not isinstance(i, str)]
            if pairs:
                answers = predictor.predict_proba(np.stack([image for _, image in pairs])).numpy()
                yield from ((*pair, answer) for pair, answer in zip(pairs, answers, strict=True))
            bar.update(len(batch))
