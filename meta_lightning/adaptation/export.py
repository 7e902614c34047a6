"""The file formats of a predictor."""

from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.export import Dim, export

from meta_lightning.checks import InputError, require, require_choice
from meta_lightning.files import require_writable

OPSET = 18  # of ONNX: the least that torch's exporter writes without conversion, so the most widely read


def write_safetensors(predictor: nn.Module, path: Path, metadata: dict[str, str], example: Tensor) -> None:
    """Parameters and metadata."""
    save_model(predictor, str(path), metadata)


def write_program(predictor: nn.Module, path: Path, metadata: dict[str, str], example: Tensor) -> None:
    """A program for ``torch.export.load``, the metadata in its extra files."""
    program = export(predictor, (example,), dynamic_shapes=({0: Dim.DYNAMIC},))
    torch.export.save(program, path, extra_files=metadata)


def write_onnx(predictor: nn.Module, path: Path, metadata: dict[str, str], example: Tensor) -> None:
    """A program for any ONNX runtime, from ``x`` to ``logits``, the metadata in its properties."""
    program = torch.onnx.export(
        predictor,
        (example,),
        input_names=["x"],
        output_names=["logits"],
        opset_version=OPSET,
        dynamo=True,
        dynamic_shapes=({0: Dim.DYNAMIC},),
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(metadata)
    program.save(path)


WRITERS = {".safetensors": write_safetensors, ".pt2": write_program, ".onnx": write_onnx}


def require_target(path: Path, overwrite: bool, argument: str) -> None:
    """Refuse a file that a predictor cannot be saved to."""
    require_choice(WRITERS, **{f"the suffix of {argument}": path.suffix})
    require(
        path.suffix != ".onnx" or find_spec("onnxscript") is not None,
        f"{argument} {path} needs onnx and onnxscript: pip install 'meta-lightning[export]'",
    )
    require_writable(path, overwrite, argument)


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file of a predictor holds beside the parameters."""
    require(path.is_file(), f"path must name a saved predictor, got {path}, which is no file")
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except SafetensorError as error:
        raise InputError(
            f"path must name a saved predictor, got {path}, which is no safetensors file: {error}"
        ) from None
    require("sample_shape" in metadata, f"path must name a saved predictor, got {path}, which holds something else")
    return metadata


def read_parameters(predictor: nn.Module, path: Path) -> None:
    """Fill a predictor with the parameters of a safetensors file."""
    try:
        load_model(predictor, path)
    except RuntimeError as error:
        raise InputError(f"network must be like the one that was adapted, got another: {error}") from None
