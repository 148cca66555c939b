"""LightningDiT: safetensors files of at most 10 000 images, and the statistics that its loader normalises with.

    latents_rankRR_shardSSS.safetensors  latents, latents_flip: float32 (n, C, h, w), raw; labels: int64 (n,)
    latents_stats.pt                     {"mean", "std"}: float32 [1, C, 1, 1]

The latents are posterior samples. Its loader takes latents_flip half of the time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from latent_cache.peers.exchange import Block, PeerFormat, PeerLatents, Samples, checked_rows
from ssdd.engine.checkpoint import save_tensors
from ssdd.engine.errors import UserError
from ssdd.engine.file_kinds import check_regular
from ssdd.engine.pretrained import read_torch_file
from ssdd.model.latent import LatentNorm

STATS = "latents_stats.pt"


def names(samples: Samples) -> list[str]:
    return [f"latents_rank00_shard{samples.number:03d}.safetensors"]


def size(shape: tuple[int, int, int], count: int) -> int:
    """Bytes of `count` latents (C, h, w) with both views, but for headers."""
    return count * (2 * int(np.prod(shape)) * 4 + 8)


def write(paths: list[Path], block: Block, seed: int) -> None:
    labels, views = block.samples.labels, block.means.shape[1]
    tensors = {
        "latents": block.drawn(0, seed),
        "latents_flip": block.drawn(views - 1, seed),
        "labels": torch.from_numpy(labels),
    }
    metadata = {"total_size": str(len(labels)), "dtype": "torch.float32", "device": "cpu"}
    (path,) = paths
    save_tensors(path, tensors, metadata)


def finish(folder: Path, labels: np.ndarray, class_names: list[str], norm: LatentNorm) -> None:
    """The statistics, as a torch file, which its loader needs."""
    statistics = {"mean": norm.mean.float(), "std": norm.std.float()}
    torch.save({key: value.view(1, -1, 1, 1) for key, value in statistics.items()}, folder / STATS)


def open_folder(folder: Path) -> PeerLatents:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} is not a cache of LightningDiT: no file *.safetensors")
    check_regular(folder / STATS)
    statistics = read_statistics(folder / STATS) if (folder / STATS).is_file() else None
    labels, shapes, flips = [], {}, {}
    for path in files:
        with _opened(path) as tensors:
            keys = set(tensors.keys())
            if not {"latents", "labels"} <= keys:
                raise UserError(f"{path} holds {sorted(keys)}: expected latents, latents_flip and labels")
            found = tensors.get_tensor("labels")
            shapes[path], flips[path] = tuple(tensors.get_slice("latents").get_shape()), "latents_flip" in keys
            mirrored = tuple(tensors.get_slice("latents_flip").get_shape()) if flips[path] else shapes[path]
        if len(found) != shapes[path][0] or len(shapes[path]) != 4 or mirrored != shapes[path]:
            raise UserError(f"{path}: latents {shapes[path]}, flipped {mirrored} and {len(found)} labels do not agree")
        labels.append(found.numpy().astype(np.int64))
    shape, flip = shapes[files[0]][1:], flips[files[0]]
    if odd := [path for path in files if shapes[path][1:] != shape or flips[path] != flip]:
        raise UserError(f"{odd[0]} has latents of another shape, or other views, than {files[0]}")
    if statistics is not None and statistics[0].shape != (shape[0],):
        raise UserError(f"{folder / STATS} has {len(statistics[0])} channels, the latents {shape[0]}")
    ends = np.cumsum([len(part) for part in labels])

    def read(asked: range) -> np.ndarray:
        parts, at = [], asked.start
        while at < asked.stop:
            number = int(np.searchsorted(ends, at, side="right"))
            first = int(ends[number]) - len(labels[number])
            inside = slice(at - first, min(asked.stop, int(ends[number])) - first)
            with _opened(files[number]) as tensors:
                views = [tensors.get_slice(key)[inside] for key in ("latents", "latents_flip")[: 2 if flip else 1]]
            rows = torch.stack(views, 1).float().numpy()
            parts.append(checked_rows(files[number], rows, (inside.stop - inside.start, len(views), *shape)))
            at = first + inside.stop
        return np.concatenate(parts)

    read_names = [path.name for path in files] + ([STATS] if statistics is not None else [])
    return PeerLatents(folder, read_names, shape, "mean", flip, np.concatenate(labels), read)


def read_statistics(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(mean, std), float32 [C] each. UserError for anything but tensors in the file; nothing in it is ever run."""

    def take(found: Any) -> tuple[np.ndarray, np.ndarray]:
        if not isinstance(found, dict):
            raise TypeError(f"it holds a {type(found).__name__}")
        return found["mean"].float().flatten().numpy(), found["std"].float().flatten().numpy()

    remedy = "The import does not need it, since statistics are computed again: move it away if you trust the latents "
    return read_torch_file(path, "a file of two tensors, mean and std", take, remedy=f"{remedy}beside it")


def _opened(path: Path) -> safe_open:
    check_regular(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as problem:
        raise UserError(f"{path} can't be read as safetensors: {problem}; copy it from an intact one") from None


FORMAT = PeerFormat(
    project="LightningDiT",
    holds="raw samples of both views",
    block=10_000,
    names=names,
    size=size,
    write=write,
    finish=finish,
    open=open_folder,
    both_views=True,
)
