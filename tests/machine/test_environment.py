"""Home, locale, umask, time zone, proxies, temporary folder, working directory, the repository's own path."""

from __future__ import annotations

import ast
import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ssdd.engine import checkpoint, user_cache
from ssdd.engine.errors import UserError
from ssdd.engine.files import read_json, write_atomic
from ssdd.engine.png import save_png
from ssdd.images.sources import DatasetConfig, open_source

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("ssdd", "dit", "latent_cache", "ssdd_pipeline", "scripts", "configs")
TEXT_METHODS = ("read_text", "write_text")
TINY = [
    "dataset.source=imagefolder",
    "dataset.im_size=16",
    "dataset.batch_size=4",
    "dataset.workers=0",
    "ssdd.encoder=f8c2",
    "ssdd.encoder_width=8",
    "ssdd.decoder=XXS",
    "training.compile=false",
    "losses.lpips=0",
    "losses.repa=0",
    "training.eval_freq=0",
    "training.steps=1",
    "training.sample_every=0",
    "evaluation.features=[]",
]


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]


def locale_dependent(call: ast.Call) -> bool:
    """Whether a call reads or writes text in the locale's encoding."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in given:
        return False
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("open", "fdopen") and (isinstance(call.func, ast.Name) or name == "fdopen"):
        mode = call.args[1] if len(call.args) > 1 else given.get("mode")
        return not (isinstance(mode, ast.Constant) and "b" in mode.value) and not isinstance(mode, ast.IfExp)
    if name in ("run", "Popen", "check_output"):
        return "text" in given or "universal_newlines" in given
    return name in TEXT_METHODS and "'/proc/" not in ast.unparse(call.func)  # which is ASCII


def test_no_program_reads_or_writes_text_in_the_encoding_of_the_locale():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and locale_dependent(node)
    ]
    assert found == []


@pytest.fixture(scope="module")
def odd_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name has a space and a letter beyond ASCII: a second copy of the code, and images."""
    place = tmp_path_factory.mktemp("machine") / "zweite Kopie ä"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, place / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", place)
    for split in ("train", "val"):
        for number in range(4):
            file = place / f"Bilder ü/{split}/Käse/{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (60 * number, 90, 10)).save(file)
    (place / "home").touch()  # no folder, so that nothing can be made below it
    return place


def closed_port() -> int:
    with socket.socket() as endpoint:
        endpoint.bind(("127.0.0.1", 0))
        return endpoint.getsockname()[1]


def unusual(place: Path) -> dict[str, str]:
    """The environment of a machine that differs from the developers' in everything at once."""
    proxy = f"http://127.0.0.1:{closed_port()}"
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return kept | {
        "HOME": str(place / "home"),
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
        "TZ": "Asia/Kathmandu",
        "http_proxy": proxy,
        "https_proxy": proxy,
        "all_proxy": proxy,
    }


def run_oddly(place: Path, *command: str) -> subprocess.CompletedProcess:
    shell = 'umask 027; exec "$@"'
    return subprocess.run(
        ["sh", "-c", shell, "sh", *command], cwd="/", env=unusual(place), capture_output=True, timeout=240
    )


def test_a_copy_elsewhere_trains_with_its_own_code_whatever_the_environment(odd_place):
    """Started from another folder, by torchrun, whose processes meet on localhost."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    arguments = [*TINY, f"dataset.root={odd_place}/Bilder ü", f"ckpt_dir={odd_place}/Läufe", "run_name=läuft"]
    done = run_oddly(odd_place, *launcher, str(odd_place / "ssdd/main.py"), "task=train", *arguments)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert done.stderr.isascii() and b"l\\xe4uft" in done.stderr
    run = odd_place / "Läufe/jobs/läuft"
    assert f"{odd_place}/Bilder ü" in (run / "config.yaml").read_text(encoding="utf-8")
    files = [path for path in (odd_place / "Läufe").rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}
    assert list(odd_place.glob("ssdd/__pycache__/main*")) or list(odd_place.glob("ssdd/__pycache__/config*"))


def test_the_pipeline_starts_by_its_path_from_another_folder(odd_place):
    done = run_oddly(odd_place, sys.executable, str(odd_place / "scripts/pipeline.py"), "ünknown=1")
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"error: ") and b"\\xfcnknown" in done.stderr


def test_names_of_files_that_are_not_utf_8_are_read(tmp_path):
    folder = os.fsencode(tmp_path) + b"/train/K\xe4se"
    try:
        os.makedirs(folder)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    shutil.copy(tmp_path / "image.png", os.fsdecode(folder + b"/\xfc.png"))
    source = open_source(DatasetConfig(source="imagefolder", root=str(tmp_path), im_size=16), "train")
    assert len(source.fingerprint()) == 64 and source.image(0).size == (16, 16)


@pytest.fixture
def without_entry(monkeypatch) -> None:
    """As `docker run --user 12345` has it: no $HOME, and no such user."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)

    def unknown(path: str) -> str:
        return path

    monkeypatch.setattr(os.path, "expanduser", unknown)


def test_without_a_home_caches_lie_in_a_private_folder_below_tmpdir(without_entry, monkeypatch, tmp_path):
    monkeypatch.setattr(user_cache.tempfile, "tempdir", str(tmp_path))
    assert user_cache.cache_folder() == tmp_path / f"ssdd-{os.getuid()}"
    assert stat.S_IMODE(user_cache.cache_folder().stat().st_mode) == 0o700


def test_a_home_that_can_not_be_made_is_as_none(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr(user_cache.tempfile, "tempdir", str(tmp_path))
    assert user_cache.cache_folder() == tmp_path / f"ssdd-{os.getuid()}"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert user_cache.cache_folder() == tmp_path / "home/.cache/ssdd"


def test_a_folder_that_somebody_else_put_in_place_of_the_cache_is_refused(without_entry, monkeypatch, tmp_path):
    monkeypatch.setattr(user_cache.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"ssdd-{os.getuid()}").symlink_to("theirs")
    with pytest.raises(UserError, match="belongs to another user: set HOME"):
        user_cache.cache_folder()


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_what_is_written_has_the_rights_that_the_umask_leaves(tmp_path, mask, mode):
    import numpy as np
    import torch

    before = os.umask(mask)
    try:
        write_atomic(tmp_path / "a.txt", "ä")
        save_png(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
        checkpoint.save(tmp_path / "a", {"model": {"w": torch.zeros(2)}}, {"step": 1})
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 4 and {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}


def test_files_are_written_beside_their_target_never_in_the_temporary_folder(tmp_path, monkeypatch):
    """A rename from $TMPDIR fails where that is another file system."""
    import torch

    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    monkeypatch.setattr(user_cache.tempfile, "tempdir", None)
    renamed: list[tuple[str, str]] = []
    rename, replace = os.rename, os.replace
    monkeypatch.setattr(os, "rename", lambda a, b: (renamed.append((str(a), str(b))), rename(a, b))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (renamed.append((str(a), str(b))), replace(a, b))[1])
    write_atomic(tmp_path / "text", "ä")
    checkpoint.save(tmp_path / "point", {"model": {"w": torch.zeros(2)}}, {"step": 1})
    assert read_json(tmp_path / "point/state.json") == {"step": 1}
    assert len(renamed) >= 3 and all(os.path.dirname(a) == os.path.dirname(b) for a, b in renamed)
