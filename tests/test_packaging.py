"""What is installed, and what an import costs."""

import configparser
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_import_does_not_import_learn2learn() -> None:
    loaded = python("import sys, meta_lightning.cli; print(*sys.modules)").stdout.split()
    assert "lightning" in loaded
    assert not {"learn2learn", "gym"} & set(loaded)


def test_gyms_notice_does_not_reach_the_screen() -> None:
    code = "import meta_lightning as m, sys; m.Glyphs().setup(); assert 'gym' in sys.modules"
    result = python(code)
    assert "Gym" not in result.stdout + result.stderr


def test_setup_cfg_lists_every_package_and_all_configs() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packages = {path.parent.relative_to(ROOT) for path in (ROOT / "meta_lightning").rglob("__init__.py")}
    names = {".".join(package.parts) for package in packages} | {"meta_lightning.configs"}
    assert set(setup["options"]["packages"].split()) == names
    patterns = setup["options.package_data"]["meta_lightning.configs"].split(", ")
    covered = {path for pattern in patterns for path in (ROOT / "configs").glob(pattern)}
    assert covered == {path for path in (ROOT / "configs").rglob("*") if path.is_file()}
