"""What the wheel contains, and what its modules need to be imported."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("ssdd", "dit", "latent_cache", "ssdd_pipeline")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what the wheel is built from, with one more YAML file in a subfolder of configs/."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    (copy / "README.md").write_text("# SSDD\n")
    for name in (*PACKAGES, "configs"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    (copy / "configs" / "presets" / "folder").mkdir(parents=True)
    (copy / "configs" / "presets" / "folder" / "placeholder.yaml").write_text("seed: 1\n")
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=source, check=True, capture_output=True)
    (path,) = folder.glob("ssdd-*.whl")
    return path


def test_the_wheel_holds_every_module_and_every_config_and_nothing_else(source, wheel):
    modules = {path.relative_to(source).as_posix() for name in PACKAGES for path in (source / name).rglob("*.py")}
    yamls = {path.relative_to(source / "configs").as_posix() for path in (source / "configs").rglob("*.yaml")}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    page = {f"ssdd_pipeline/report/page.{suffix}" for suffix in ("css", "html")}
    assert "ssdd/engine/schema.py" in names and "ssdd_pipeline/run.py" in names
    assert names == modules | page | {f"ssdd/_configs/{name}" for name in yamls}


def test_the_wheel_holds_the_licence_and_the_commands(wheel):
    archive = zipfile.ZipFile(wheel)
    texts = {name.rpartition("/")[2]: archive.read(name).decode() for name in archive.namelist() if "dist-info" in name}
    assert "Apache License" in texts["LICENSE"]
    for command in (
        "ssdd = ssdd.main:main",
        "dit = dit.main:main",
        "latent-cache = latent_cache.__main__:main",
        "ssdd-pipeline = ssdd_pipeline.run:main",
        "ssdd-fidelity = ssdd.fidelity.command:main",
        "ssdd-prefetch = ssdd.engine.prefetch:main",
        "ssdd-report = ssdd_pipeline.report.page:main",
    ):
        assert command in texts["entry_points.txt"]


def test_outside_the_checkout_the_packaged_configs_are_found(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from ssdd.engine import presets as config\n"
        "print(config.configs_dir(), *config.available('presets'))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "site")]
    done = subprocess.run(command, cwd=tmp_path / "elsewhere", check=True, capture_output=True, text=True)
    folder, *presets = done.stdout.split()
    assert Path(folder) == tmp_path / "site" / "ssdd" / "_configs"
    assert "folder/placeholder" in presets


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("errors files random checkpoint ema run log", "omegaconf yaml"),
        (
            "errors files random checkpoint ema run log cli presets schema schema_help",
            "tqdm tensorboard accelerate torchvision",
        ),
    ],
)
def test_engine_modules_import_without_what_only_tasks_need(modules, absent):
    """``absent`` packages count as not installed."""
    program = (
        "import importlib, sys\n"
        f"for name in {absent.split()}: sys.modules[name] = None\n"
        f"for name in {modules.split()}: importlib.import_module('ssdd.engine.' + name)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
