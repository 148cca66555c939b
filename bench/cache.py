"""How fast latents are read: `python scripts/bench.py cache`, in one process, from a warm page cache."""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from latent_cache import LatentDataset, decode_sample
from latent_cache.manifest import FORMAT, STATISTICS, VERSION, layout_of, shard_ranges, write_manifest
from latent_cache.shard import shard_name, write_shard
from ssdd.engine.errors import UserError
from ssdd.engine.files import sha256_file, write_json
from ssdd.engine.tables import aligned, fixed
from ssdd.model.latent import LatentNorm

SAMPLES, SHAPE, BATCH = 100_000, (4, 32, 32), 256
FILES = 20_000  # of them, those that are also written to single files
ROUNDS = 7  # of all readers in turn, so that other load affects them equally
SHUFFLE = 5_000  # samples in webdataset's buffer
STEPS, STEP_BATCH = 3, 16  # of DiT-S/2
ROOM = 3e9  # bytes on disk

Batches = Iterator[object]


def cache() -> int:
    """A table of rates, the share of a training step that waits for data, and both as one line of JSON."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if (free := shutil.disk_usage(root).free) < ROOM:
            raise UserError(f"{root} has {free / 1e9:.1f} GB free, this needs {ROOM / 1e9:.0f}: set TMPDIR")
        write_caches(root)
        rates = measure_readers(root)
        wait = measure_wait(root / "10")
    print(
        f"{SAMPLES} latents of {SHAPE}, batch {BATCH}, global shuffle; samples/s over {ROUNDS} rounds, "
        f"{torch.get_num_threads()} threads"
    )
    stock = rates["webdataset"]["best"]
    rows = [
        [name, fixed(rate["best"], 0), fixed(rate["median"], 0), fixed(rate["best"] / stock, 1)]
        for name, rate in rates.items()
    ]
    print(aligned(["reader", "best", "median", "best / webdataset"], rows, named=True))
    print(f"DiT-S/2, batch {STEP_BATCH}: {wait['step']:.2f} s per step, {wait['share']:.4%} of it waiting for data")
    print(json.dumps({"samples_per_s": rates, "training_step": wait}))
    return 0


def write_caches(root: Path) -> None:
    """The same random latents as caches of 10 and of 100 shards, and some as .npy files and safetensors."""
    from safetensors.numpy import save_file

    random = np.random.default_rng(0)
    rows = random.standard_normal((SAMPLES, 1, *SHAPE), dtype=np.float32).astype(np.float16)
    labels = random.integers(0, 1000, SAMPLES)
    for shards in (10, 100):
        write_cache(root / str(shards), rows, labels, SAMPLES // shards)
    (root / "files").mkdir()
    for index in range(FILES):
        np.save(root / f"files/{index:09d}.npy", rows[index, 0])
    save_file({"latents": rows[:FILES, 0], "labels": labels[:FILES]}, root / "latents.safetensors")


def write_cache(folder: Path, rows: np.ndarray, labels: np.ndarray, samples_per_shard: int) -> None:
    """A cache of rows [n, 1, C, h, w] that no tokenizer made."""
    settings = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": {"encoder": None, "fingerprint": ""},
        "content": "mean",
        "dtype": "float16",
        "shape": list(rows.shape[2:]),
        "views": ["npy"],
        "samples_per_shard": samples_per_shard,
        "classes": [str(label) for label in range(1000)],
        "splits": {"train": {"count": len(rows), "skipped": []}},
    }
    (folder / "train").mkdir(parents=True)
    LatentNorm.identity(rows.shape[2]).save(folder / STATISTICS)
    sidecars = []
    for number, samples in enumerate(shard_ranges(settings, "train")):
        part, tar = slice(samples.start, samples.stop), folder / "train" / f"{shard_name(number)}.tar"
        sidecars.append(write_shard(tar, layout_of(settings), samples.start, rows[part], labels[part]))
        write_json(tar.with_suffix(".json"), sidecars[-1])
    write_manifest(folder, settings, {"train": sidecars}, sha256_file(folder / STATISTICS))


def measure_readers(root: Path) -> dict[str, dict[str, float]]:
    """Samples/s of every reader, best and median of the rounds."""
    readers: dict[str, tuple[Batches, int]] = {  # batches, and how many of them a round takes
        "ours, 10 shards": (LatentDataset(root / "10").batches(BATCH), SAMPLES // BATCH),
        "ours, 100 shards": (LatentDataset(root / "100").batches(BATCH), SAMPLES // BATCH),
        "ours, in memory": (LatentDataset(root / "10", preload="ram").batches(BATCH), SAMPLES // BATCH),
        "webdataset": (webdataset_batches(root / "10"), 20),
        "np.load, one file per item": (item_batches(lambda index: np.load(root / f"files/{index:09d}.npy")), 20),
        "safetensors, by item": (item_batches(safetensors_item(root / "latents.safetensors")), 20),
    }
    for batches, _ in readers.values():
        next(batches)  # maps the files, fills webdataset's buffer
    for folder in ("10", "100"):
        for tar in (root / folder / "train").glob("*.tar"):
            tar.read_bytes()
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(ROUNDS):
        for name, (batches, count) in readers.items():
            began = time.perf_counter()
            for _ in itertools.islice(batches, count):
                pass
            seconds[name].append((time.perf_counter() - began) / count)
    return {
        name: {"best": BATCH / min(times), "median": BATCH / statistics.median(times)}
        for name, times in seconds.items()
    }


def webdataset_batches(folder: Path) -> Batches:
    """Stock webdataset with the allow-listed decoder: shards, then samples, shuffled."""
    import webdataset

    shards = [str(tar) for tar in sorted((folder / "train").glob("*.tar"))]
    samples = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0).map(decode_sample).repeat()
    return iter(samples.shuffle(SHUFFLE, initial=SHUFFLE).batched(BATCH, collation_fn=collated))


def collated(samples: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    latents = torch.from_numpy(np.stack([sample["npy"] for sample in samples])).float()
    return latents, torch.tensor([sample["cls"] for sample in samples])


def item_batches(item: Callable[[int], np.ndarray]) -> Batches:
    """Endless batches of items that are read one by one, in random order."""
    random = np.random.default_rng(0)
    while True:
        indices = random.integers(0, FILES, BATCH).tolist()
        yield torch.from_numpy(np.stack([item(index) for index in indices])).float()


def safetensors_item(path: Path) -> Callable[[int], np.ndarray]:
    """The file opened for every item, as LightningDiT's data set does."""
    from safetensors import safe_open

    def item(index: int) -> np.ndarray:
        with safe_open(path, framework="numpy") as file:
            return file.get_slice("latents")[index]

    return item


def measure_wait(folder: Path) -> dict[str, float]:
    """Seconds of a training step of DiT-S/2 on this machine's CPU, and the share of them that waits for its batch."""
    from dit.model import DiT

    torch.manual_seed(0)
    model = DiT.from_name("DiT-S/2", input_size=SHAPE[1:], in_channels=SHAPE[0], num_classes=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batches = LatentDataset(folder).batches(STEP_BATCH)
    waits, steps = [], []
    for _ in range(STEPS + 1):  # the first is warm-up
        began = time.perf_counter()
        latents, labels, _ = next(batches)
        waits.append(time.perf_counter() - began)
        model(latents, torch.full((STEP_BATCH,), 500.0), labels).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(time.perf_counter() - began)
    return {"step": statistics.median(steps[1:]), "share": sum(waits[1:]) / sum(steps[1:])}
