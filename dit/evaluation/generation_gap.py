"""The generation gap: what a decoder loses on latents that a generator drew, compared with those of real images.

Held-out images are encoded, and every decoder reconstructs them, as they are and with noise on the latents. gFID minus
rFID is the gap; how fast distances grow with the noise shows how robust a decoder is to a generator's errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit.config import DiTConfig
from dit.evaluation.latent_sets import HeldOutLatents, decoded
from dit.evaluation.measured_sets import ImageSetFolder, Measuring
from ssdd.fidelity.moments import Statistics
from ssdd.fidelity.set_metrics import compare
from ssdd.fidelity.stored_sets import SplitImages
from ssdd.model.compared_decoders import Row
from ssdd.model.latent import LatentNorm

ORIGINALS, REFERENCE = "held-out images", "reference"
KERNEL = ("kid", "kid_low", "kid_high")


class Gap:
    """`measure` in all processes, then `compare` in the main one."""

    def __init__(
        self,
        cfg: DiTConfig,
        out: Path,
        rows: Sequence[Row],
        norms: Mapping[str, LatentNorm],
        held_out: SplitImages,
        measuring: Measuring,
    ):
        self.cfg, self.rows, self.measuring = cfg, rows, measuring
        self.levels = sorted({0.0, *cfg.evaluation.latent_noise})
        first, seed = rows[0], cfg.sampling.seed  # all decoders have the same encoder
        folder = out / "measured" / "held-out"
        self.latents = HeldOutLatents(folder / "latents", held_out.dataset, first, norms[first.name], measuring)
        self.sets: dict[tuple[str, float], ImageSetFolder] = {}
        for row in rows:
            for level in self.levels:
                recipe = decoded(row, norms[row.name], self.latents, seed, measuring.precision, noise=level)
                place = folder / f"noise-{level:g}" / row.name
                self.sets[row.name, level] = ImageSetFolder(place, recipe, measuring)

    def measure(self) -> None:
        """Encode and reconstruct what is missing."""
        if not all(image_set.finished for image_set in self.sets.values()):
            self.latents.encode()
        for image_set in self.sets.values():
            image_set.measure()

    def compare(
        self, reference: Mapping[str, Statistics], originals: Mapping[str, Statistics], generated: Sequence[dict]
    ) -> dict[str, Any]:
        """{"gap": {network: {decoder: ...}}, "latent_noise": {network: {decoder: one line per level}}}.

        reference, originals: statistics per network of the gFID reference and of the held-out images; generated: the
        rows of the result. rfid is to the originals; as the bias of so few images differs from that of gfid, the gap is
        also given with the reconstructions held against the same reference, and in KID, which has no bias.
        """
        for image_set in self.sets.values():
            image_set.finish()
        self.latents.chunks.remove()
        gaps: dict[str, Any] = {}
        noise: dict[str, Any] = {}
        for network in self.measuring.networks:
            gaps[network.name], noise[network.name] = {}, {}
            real = {REFERENCE: reference[network.name], ORIGINALS: originals[network.name]}
            for row in self.rows:
                lines = self._lines(network, row, real)
                scores = next(line["distances"][network.name] for line in generated if line["name"] == row.name)
                gaps[network.name][row.name] = _gap(scores, lines[0])
                noise[network.name][row.name] = lines
        return {"gap": gaps} | ({"latent_noise": noise} if len(self.levels) > 1 else {})

    def _lines(self, network: Any, row: Row, real: dict[str, Statistics]) -> list[dict[str, float]]:
        """For every level: the distance to the originals, and distance and KID to the reference."""
        names = {f"{level:g}": level for level in self.levels}
        sets = {name: self.sets[row.name, level].statistics(network) for name, level in names.items()} | real
        resamples, seed = self.cfg.evaluation.resamples, self.cfg.sampling.seed
        to_originals = compare(sets, list(names), ORIGINALS, None, resamples, seed)[0]
        to_reference = compare(sets, list(names), REFERENCE, REFERENCE, resamples, seed, slow=False)[0]
        return [
            {
                "noise": level,
                "frechet_to_originals": to_originals[name]["frechet"],
                "frechet": to_reference[name]["frechet"],
                **{key: to_reference[name][key] for key in KERNEL if key in to_reference[name]},
            }
            for name, level in names.items()
        ]


def _gap(generated: dict[str, float], reconstructed: dict[str, float]) -> dict[str, float]:
    rfid = reconstructed["frechet_to_originals"]
    found = {
        "gfid": generated["frechet"],
        "rfid": rfid,
        "gap": generated["frechet"] - rfid,
        "rfid_to_reference": reconstructed["frechet"],
        "gap_to_reference": generated["frechet"] - reconstructed["frechet"],
    }
    if "kid" in generated and "kid" in reconstructed:
        found |= {"kid_gap": generated["kid"] - reconstructed["kid"]}
    return found
