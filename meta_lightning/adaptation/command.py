"""``python -m meta_lightning adapt``: from a few of one's own pictures a class to answers about others."""

import csv
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from tqdm import tqdm

from meta_lightning.adaptation.export import require_target
from meta_lightning.adaptation.predictor import AT_ONCE, Predictor
from meta_lightning.checks import require, require_choice
from meta_lightning.data.image_folder import files_below, try_to_prepare, visible
from meta_lightning.data.pictures import left_out
from meta_lightning.data.tasks import Array
from meta_lightning.drawing import Answer, draw_contact_sheet
from meta_lightning.files import require_writable, written_whole
from meta_lightning.runs.checkpoint_file import restore

HEADER = ("path", "class", "probability", "runner_up", "runner_up_probability")
SHOWN = 60  # queries on the contact sheet


class Tally(NamedTuple):
    """What came of the queries."""

    answered: int
    known: int  # those whose class is known
    right: int  # of these
    shown: list[Answer]  # those of the contact sheet


def adapt(
    ckpt_path: Path,
    support: Path,
    query: Path,
    out: Path = Path("predictions.csv"),
    steps: int | None = None,
    save: Path | None = None,
    overwrite: bool = False,
) -> str:
    """Adapt a checkpoint to a few pictures of each class, and classify others.

    Beside the table of the answers a contact sheet (PNG) shows the support pictures and up to 60 of the answers. Where
    queries lie in folders named after classes it is said how many answers are right.

    Args:
        ckpt_path: Checkpoint of a learner of images.
        support: Folder of the pictures to adapt to: a folder per class, named after it.
        query: Folder of the pictures to classify, at any depth.
        out: The table, a CSV file.
        steps: Inner steps. Default: the checkpoint's test_inner_steps.
        save: Where to keep the adapted predictor: a file .safetensors, .pt2 (torch.export) or .onnx.
        overwrite: Replace files that exist.

    Returns:
        What was done, in words.

    Raises:
        InputError: If something given cannot be used; nothing is written then.
    """
    sheet = out.with_suffix(".png")
    require_choice((".csv",), **{"the suffix of out": out.suffix})
    require_writable(out, overwrite, "out")
    require_writable(sheet, overwrite, "the contact sheet beside out")
    if save is not None:
        require_target(save, overwrite, "save")
    classes, queries = list_support(support), list_queries(query, support)
    learner = restore(ckpt_path)
    require(
        learner.form.image_size is not None,
        f"ckpt_path must be of a learner that was trained on images, got {ckpt_path}, which was not",
    )
    pictures = {name: [learner.form.prepare(path) for path in paths] for name, paths in classes.items()}
    x = torch.from_numpy(np.stack([image for images in pictures.values() for image in images]))
    start = time.perf_counter()
    predictor = learner.adapt(x, [name for name, images in pictures.items() for _ in images], steps)
    adapted = time.perf_counter()
    with written_whole(out) as table, written_whole(sheet) as drawing:
        tally = answer_queries(predictor, queries, query, table)
        answered = time.perf_counter()
        draw_contact_sheet(pictures, tally.shown, learner.form.ink, drawing)
    said = [
        f"Adapted to {len(classes)} classes from {len(x)} pictures in {adapted - start:.2f} s.",
        f"Classified {tally.answered} pictures in {answered - adapted:.1f} s: {out}, drawn in {sheet}.",
    ]
    if save is not None:
        predictor.save(save, overwrite)
        said.append(f"Saved the predictor to {save}.")
    if tally.known:
        said.append(accuracy(tally))
    return "\n".join(said)


def list_support(folder: Path) -> dict[str, list[Path]]:
    """The files of each class."""
    require(folder.is_dir(), f"support must be a folder that holds a folder per class, got {folder}, which is none")
    classes = {entry.name: [*files_below(entry)] for entry in visible(folder) if entry.is_dir()}
    require(
        len(classes) >= 2,
        f"support must hold at least 2 classes, a folder each, got {len(classes)} in {folder}: {', '.join(classes)}",
    )
    empty = [name for name, paths in classes.items() if not paths]
    require(not empty, f"support must hold at least 1 picture of each class, got none of {', '.join(empty)}")
    return classes


def list_queries(folder: Path, support: Path) -> list[Path]:
    """The files to classify."""
    require(folder.is_dir(), f"query must be a folder of pictures, got {folder}, which is none")
    require(
        folder.resolve() != support.resolve(),
        f"query must be another folder than support: what was adapted to says nothing of others, got {folder} for both",
    )
    paths = [*files_below(folder)]
    require(bool(paths), f"query must hold at least 1 picture, got none in {folder}")
    return paths


def answer_queries(predictor: Predictor, paths: Sequence[Path], folder: Path, table: Path) -> Tally:
    """Classify pictures, a batch in memory at a time, into a CSV file; files that do not read are left out."""
    names = predictor.class_names or []
    chosen = {paths[i] for i in np.linspace(0, len(paths) - 1, min(SHOWN, len(paths))).round().astype(int)}
    unread: list[str] = []
    shown: list[Answer] = []
    known = right = 0
    with table.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(HEADER)
        for path, image, probabilities in probabilities_of(predictor, paths, unread):
            first, second = np.argsort(-probabilities, kind="stable")[:2]
            rows.writerow(
                [path, names[first], f"{probabilities[first]:.6f}", names[second], f"{probabilities[second]:.6f}"]
            )
            folders = path.relative_to(folder).parts[:-1]
            truth = folders[0] if folders and folders[0] in names else None
            known += truth is not None
            right += truth == names[first]
            if path in chosen:
                shown.append(Answer(image, names[first], float(probabilities[first]), truth))
    if unread:
        said = left_out(unread, len(paths), f"query {folder}")
        require(len(unread) < len(paths), f"query must hold at least 1 picture, but {said}")
        rank_zero_warn(said)
    return Tally(len(paths) - len(unread), known, right, shown)


def probabilities_of(
    predictor: Predictor, paths: Sequence[Path], unread: list[str]
) -> Iterator[tuple[Path, Array, Array]]:
    """Each picture, prepared as in training, and the probabilities of its classes.  # C H W, N"""
    form = predictor.form
    size, channels = form.image_size or 0, form.channels or 0
    Image.init()  # in one thread: while another loads pillow's formats, a file of a late one may go unrecognised
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


def accuracy(tally: Tally) -> str:
    """How many answers are right, in a sentence."""
    from scipy.stats import binomtest

    low, high = binomtest(tally.right, tally.known).proportion_ci(method="wilson")
    return (
        f"Accuracy {100 * tally.right / tally.known:.1f} %: {tally.right} of the {tally.known} queries that lie in "
        f"folders named after classes (95 % confidence interval {100 * low:.1f} to {100 * high:.1f} %, Wilson's, of a "
        "proportion over such queries, with these support pictures)."
    )
