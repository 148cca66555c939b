"""Inception Score (Salimans et al. 2016) from class logits: exp of the mean KL from an image's classes to the set's.

The set is cut into splits, each has its score, and the mean is reported. Which images make a split moves the figure by
a few hundredths: ADM's evaluator takes 5000 after 5000 in order (the default here), torch-fidelity 10 splits after a
shuffle (`shuffled_splits`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ssdd.engine.devices import float64_device
from ssdd.engine.processes import Processes
from ssdd.fidelity.moments import SeenIndices

SPLIT_SIZE = 5000  # ADM


def shuffled_splits(count: int, splits: int = 10, seed: int = 2020) -> Tensor:
    """The split of each of `count` images as torch-fidelity 0.4 shuffles and cuts them: int64 [count]."""
    order = torch.from_numpy(np.random.RandomState(seed).permutation(count))
    bounds = torch.tensor([i * count // splits for i in range(1, splits)], dtype=torch.int64)
    split_of_place = torch.bucketize(torch.arange(count), bounds, right=True)
    return torch.empty(count, dtype=torch.int64).scatter_(0, order, split_of_place)


class InceptionScore:
    """Collects class logits over batches and processes, each image index once, as float64 sums per split.

    splits: int64 [n], the split of each image index; None: index // 5000.
    """

    def __init__(self, classes: int, splits: Tensor | None = None) -> None:
        self.classes = classes
        self._splits = splits
        self._seen = SeenIndices()
        self._reduced = False
        self._counts = torch.zeros(0, dtype=torch.float64)  # images
        self._sums = torch.zeros(0, classes, dtype=torch.float64)  # sum of p
        self._negentropy = torch.zeros(0, dtype=torch.float64)  # sum of p log p over images and classes

    def update(self, logits: Tensor, indices: Tensor) -> None:
        """Add logits [n, classes] of the images `indices` (int64 [n]); an index added before is ignored."""
        if logits.shape != (len(indices), self.classes):
            raise ValueError(f"expected logits [{len(indices)}, {self.classes}], got {tuple(logits.shape)}")
        if self._reduced:
            raise RuntimeError("update after reduce: the other processes would miss these images")
        fresh = self._seen.add(indices)
        if not len(fresh):
            return
        indices = indices.detach().cpu().long()[fresh]
        splits = indices // SPLIT_SIZE if self._splits is None else self._splits[indices]
        device = float64_device(logits.device)
        log_p = logits.detach()[fresh.to(logits.device)].to(device, torch.float64).log_softmax(dim=1)
        self._grow(int(splits.max()) + 1, device)
        splits, p = splits.to(device), log_p.exp()
        self._counts.index_add_(0, splits, torch.ones_like(log_p[:, 0]))
        self._sums.index_add_(0, splits, p)
        self._negentropy.index_add_(0, splits, (p * log_p).sum(dim=1))

    def reduce(self, processes: Processes) -> None:
        """Merge the images of all processes into every process."""
        if self._reduced or processes.world == 1:
            return
        self._seen.reduce(processes)
        if self._seen.has_doubles():
            raise ValueError("two processes have the same image: it would count twice in the Inception Score")
        self._grow(max(processes.gather_objects(len(self._counts))), self._counts.device)
        self._counts = processes.sum(self._counts)
        self._sums = processes.sum(self._sums)
        self._negentropy = processes.sum(self._negentropy)
        self._reduced = True

    def compute(self) -> tuple[float, float]:
        """Mean and deviation over the splits that have images. ValueError when there are none."""
        filled = self._counts > 0
        if not filled.any():
            raise ValueError("an Inception Score needs at least 1 image")
        counts, p = self._counts[filled], self._sums[filled]
        marginal = p / counts[:, None]
        divergence = self._negentropy[filled] / counts - torch.xlogy(marginal, marginal).sum(dim=1)
        scores = divergence.exp()
        return scores.mean().item(), scores.std(correction=0).item()

    def _grow(self, splits: int, device: torch.device) -> None:
        missing = max(0, splits - len(self._counts))
        self._counts = torch.cat([self._counts.to(device), torch.zeros(missing, dtype=torch.float64, device=device)])
        more = torch.zeros(missing, self.classes, dtype=torch.float64, device=device)
        self._sums = torch.cat([self._sums.to(device), more])
        self._negentropy = torch.cat([self._negentropy.to(device), more[:, 0]])
