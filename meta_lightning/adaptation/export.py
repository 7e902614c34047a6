"""File formats of a predictor."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.export import Dim, export

from meta_lightning.checks import InputError, optional, require, require_choice
from meta_lightning.files import require_writable
from meta_lightning.inner.params import tree_map
from meta_lightning.inner.samples import Samples


def batches(example: Samples) -> tuple[Any, ...]:
    """Dynamic shapes of the input: any number of samples."""
    return (tree_map(lambda _: {0: Dim.DYNAMIC}, example),)


def write_safetensors(predictor: nn.Module, path: Path, metadata: dict[str, str], example: Samples) -> None:
    """Write parameters and metadata."""
    save_model(predictor, str(path), metadata)


def write_program(predictor: nn.Module, path: Path, metadata: dict[str, str], example: Samples) -> None:
    """Write a program for ``torch.export.load``, with the metadata as extra files."""
    # strict, a former default, does not take the contexts in which forwards of peft stand
    program = export(predictor, (example,), dynamic_shapes=batches(example), strict=False)
    torch.export.save(program, path, extra_files=metadata)


def write_onnx(predictor: nn.Module, path: Path, metadata: dict[str, str], example: Samples) -> None:
    """Write an ONNX model from ``x`` to ``logits``, with the metadata as properties."""
    inputs = {"input_names": ["x"]} if isinstance(example, Tensor) else {}  # those of a nest are its keys
    shapes = {"dynamic_shapes": batches(example)}
    options: dict[str, Any] = inputs | shapes | {"output_names": ["logits"], "verbose": False}
    # opset 18 is the lowest that torch exports without conversion, so the most widely supported
    program = torch.onnx.export(predictor, (example,), opset_version=18, dynamo=True, **options)
    assert program is not None
    program.model.metadata_props.update(metadata)
    program.save(path)


WRITERS = {".safetensors": write_safetensors, ".pt2": write_program, ".onnx": write_onnx}


def require_target(path: Path, overwrite: bool, argument: str, delta: bool = False) -> None:
    """Refuse a path to which a predictor, or what adaptation changed of it, cannot be saved."""
    require_choice(WRITERS, **{f"the suffix of {argument}": path.suffix})
    safe = path.suffix == ".safetensors"
    require(safe or not delta, f"{argument} of a delta must be a .safetensors file, got {path}")
    if path.suffix == ".onnx":
        with optional(f"{argument} {path}", "export"):
            import onnx  # noqa: F401  # torch needs both
            import onnxscript  # noqa: F401
    require_writable(path, overwrite, argument)


def read_description(path: Path) -> tuple[dict[str, str], dict[str, list[int]]]:
    """Metadata, and shapes of the parameters, of a predictor that was saved as safetensors."""
    expected = f"path must name a saved predictor, got {path}"
    require(path.is_file(), f"{expected}, which is not a file")
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # no dict
    except SafetensorError as error:
        raise InputError(f"{expected}, which is no safetensors file: {error}") from None
    require("sample_shape" in metadata, f"{expected}, whose metadata do not describe one")
    return metadata, shapes
