"""Optional packages: without one, a sentence names the extra that installs it."""

import configparser
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

from meta_lightning.checks import InputError, MissingPackageError, optional

BLOCKED = "import sys; sys.modules['{}'] = None; "
SAVE = "from pathlib import Path; from meta_lightning.adaptation.export import require_target; "
SAVE += "require_target(Path('a.onnx'), False, 'save')"
FIT = f"from meta_lightning.cli import main; main(['fit', '--config', {TINY!r}, "
AUGMENT = "'--data.transforms.support', 'meta_lightning.data.augmentation.FlipCropJitter'])"


@pytest.mark.parametrize(
    ("package", "extra", "code", "user"),
    [
        ("sklearn", "sklearn", "import meta_lightning.estimator", "FewShotClassifier"),
        ("onnx", "export", SAVE, "save a.onnx"),
        ("onnxscript", "export", SAVE, "save a.onnx"),
        ("kornia", "augment", FIT + AUGMENT, "FlipCropJitter"),
        ("wandb", "wandb", FIT + "'--trainer.logger', 'WandbLogger'])", "trainer.logger WandbLogger"),
        ("mlflow", "mlflow", FIT + "'--trainer.logger', 'MLFlowLogger'])", "trainer.logger MLFlowLogger"),
    ],
)
def test_a_missing_package_is_a_sentence_with_its_extra(package: str, extra: str, code: str, user: str) -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED.format(package) + code], capture_output=True, text=True)
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.endswith(f"{user} needs {package}: pip install 'meta-lightning[{extra}]'")
    if "main" in code:
        assert said.startswith("error: ")
        assert "Traceback" not in done.stderr
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    assert extra in setup["options.extras_require"]


def test_only_what_is_missing_is_caught() -> None:
    with (
        pytest.raises(MissingPackageError, match=r"^x needs no_such_package: .*\[extra\]") as caught,
        optional("x", "extra"),
    ):
        import no_such_package.part  # type: ignore[import-not-found]  # noqa: F401
    assert isinstance(caught.value, InputError)
    with pytest.raises(ImportError, match="no_such_name") as other, optional("x", "extra"):
        from json import no_such_name  # type: ignore[attr-defined]  # noqa: F401
    assert not isinstance(other.value, InputError)
