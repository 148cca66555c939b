"""Worker processes with little shared memory or few open files: the same batches, or one line that says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssdd.engine.errors import UserError
from ssdd.images import workers
from ssdd.images.batches import eval_batches
from ssdd.images.dataset import ImageDataset
from ssdd.images.sources import DatasetConfig, open_source

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
READ = """
import sys
from ssdd.engine.errors import UserError
from ssdd.images.batches import eval_batches
from ssdd.images.dataset import ImageDataset
from ssdd.images.sources import DatasetConfig, open_source
cfg = DatasetConfig(source="imagefolder", root=sys.argv[1], im_size=64)
workers = int(sys.argv[2])
try:
    batches = eval_batches(ImageDataset(open_source(cfg, "train"), cfg, train=False), 8, workers=workers)
    total = 0
    for x, _, _ in batches:
        total += int(x.long().sum())
    print("total", total)
except UserError as problem:
    print("error:", problem)
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for number in range(32):
        file = folder / f"train/a/{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
    return folder


def read(images: Path, count: int, before: str = "", launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    shell = f'{before} exec "$0" -c "$1" "$2" "$3"'
    command = [*launcher, "bash", "-c", shell, sys.executable, READ, str(images), str(count)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, encoding="utf-8", timeout=50)


@pytest.fixture(scope="module")
def total(images: Path) -> str:
    """What READ prints where nothing is in its way."""
    files = (images / "train/a").iterdir()
    return f"total {sum(int(np.asarray(Image.open(file)).astype(np.int64).sum()) for file in files)}\n"


def test_batches_go_through_pipes_where_shared_memory_is_small(images, monkeypatch, caplog):
    cfg = DatasetConfig(source="imagefolder", root=str(images), im_size=64)
    dataset = ImageDataset(open_source(cfg, "train"), cfg, train=False)
    expected = list(eval_batches(dataset, 8))
    monkeypatch.setattr(workers, "free_shared_memory", lambda: 64e3)
    found = list(eval_batches(dataset, 8, workers=2))
    assert len(found) == 4
    for one, other in zip(expected, found, strict=True):
        assert all((a == b).all() for a, b in zip(one, other, strict=True))
    assert "--shm-size" in caplog.text and "dataset.workers=0" in caplog.text


def can_mount() -> bool:
    try:
        return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not can_mount(), reason="takes root, or another right to mount file systems (unshare -m)")
def test_little_shared_memory_is_enough(images, total):
    mounted = read(images, 2, "mount -t tmpfs -o size=64k tmpfs /dev/shm;", ("unshare", "-m"))
    assert mounted.stdout == total, mounted.stderr


@pytest.mark.skipif(not can_mount(), reason="takes root, or another right to mount file systems (unshare -m)")
def test_shared_memory_that_others_fill_later_ends_in_one_line(images, monkeypatch):
    """The look at its size comes before."""
    script = READ.replace("import sys", "import sys; from ssdd.images import workers\nworkers.free_shared_memory = int")
    script = script.replace("free_shared_memory = int", "free_shared_memory = lambda: 1e9")
    shell = 'mount -t tmpfs -o size=64k tmpfs /dev/shm; exec "$0" -c "$1" "$2" 2'
    command = ["unshare", "-m", "bash", "-c", shell, sys.executable, script, str(images)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, encoding="utf-8", timeout=50)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.startswith("error: worker processes can't read images (DataLoader worker")
    assert "dataset.workers=0" in done.stdout and "--shm-size" in done.stdout


@pytest.mark.parametrize(("limit", "count"), [(128, 8), (40, 8)])
def test_few_open_files_give_the_same_batches_or_one_line(images, total, limit, count):
    done = read(images, count, f"ulimit -n {limit};")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    if done.stdout != total:
        assert limit < 128 and done.stdout.startswith(f"error: {count} worker processes take {4 * count} open files")
        assert "ulimit -n" in done.stdout


def test_a_soft_limit_of_open_files_is_raised(images, total):
    done = read(images, 8, "ulimit -Sn 64;")
    assert done.stdout == total and "pipes" not in done.stderr, done.stderr


def test_a_worker_that_is_killed_ends_in_one_line(images):
    cfg = DatasetConfig(source="imagefolder", root=str(images), im_size=64)
    dataset = ImageDataset(open_source(cfg, "train"), cfg, train=False)
    dataset._sample = lambda epoch, index: os.kill(os.getpid(), 9)
    with pytest.raises(UserError, match=r"DataLoader worker \(pid.*dataset.workers=0"):
        list(eval_batches(dataset, 8, workers=1))


LEFT = """
import sys
from ssdd.images.batches import eval_batches
from ssdd.images.dataset import ImageDataset
from ssdd.images.sources import DatasetConfig, open_source
cfg = DatasetConfig(source="imagefolder", root=sys.argv[1], im_size=64)
batches = eval_batches(ImageDataset(open_source(cfg, "train"), cfg, train=False), 4, workers=2)
next(batches)
raise SystemExit(5)
"""


def test_a_program_ends_that_has_read_only_some_of_the_batches(images):
    """Its workers ignore SIGTERM, which Python would end them with."""
    done = subprocess.run([sys.executable, "-c", LEFT, str(images)], env=ENVIRONMENT, timeout=50)
    assert done.returncode == 5
