"""Finished evaluations as a report reads them: their results, where they come from, and what their decoders were
trained on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssdd.engine.errors import UserError
from ssdd.engine.files import read_json, sha256_file
from ssdd.engine.pretrained import TIMM_PREFIX
from ssdd.fidelity.features import LITE0, TIMM_ALIASES
from ssdd.images.pixels import ROUNDING
from ssdd.losses.image_losses import pretrained_networks

TASKS = {"eval": "Reconstruction", "evaluate": "Generation"}
NOT_RECORDED = "not recorded"


@dataclass
class FinishedEvaluation:
    """A folder with the task_result.json of `ssdd/main.py task=eval` or `dit/main.py task=evaluate`."""

    name: str
    folder: Path
    result: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    """The run's config.yaml; of task=eval only."""

    @property
    def generates(self) -> bool:
        return self.result["task"] == "evaluate"

    @property
    def title(self) -> str:
        return TASKS[self.result["task"]]

    @property
    def networks(self) -> list[str]:
        return list(self.result["features"])

    @property
    def decoders(self) -> list[str]:
        """Rows that decode latents; the others are trivial baselines."""
        return [row["name"] for row in self.result["rows"] if row.get("steps") is not None]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of one checkpoint next to each other, by their steps."""
        families = [family(row["name"]) for row in self.result["rows"]]
        return sorted(self.result["rows"], key=lambda row: (families.index(family(row["name"])), row.get("steps") or 0))

    def checkpoint(self, decoder: str) -> str | None:
        """Reference of its checkpoint, where the result records it."""
        return self.result.get("decoders", {}).get(decoder, {}).get("reference")

    def loss_networks(self) -> dict[str, set[str] | None]:
        """Decoder -> pretrained networks that its training losses used, None where its config.yaml is not found."""
        return {name: trained_on(self.checkpoint(name), self.folder) for name in self.decoders}

    def optimised(self, network: str) -> list[str]:
        """The decoders that had `network` in a training loss; its figures are biased in their favour."""
        return [name for name, used in self.loss_networks().items() if used and canonical(network) in used]


def open_evaluation(folder: Path) -> FinishedEvaluation:
    """Read a folder. UserError when it holds no result of an evaluation."""
    path = folder / "task_result.json"
    if not path.is_file():
        raise UserError(
            f"{path} is missing: reports are made of finished evaluations (ssdd task=eval, dit task=evaluate)"
        )
    result = read_json(path)
    if not isinstance(result, dict) or result.get("task") not in TASKS:
        raise UserError(f"{path} is not the result of an evaluation: its task is not {' or '.join(TASKS)}")
    return FinishedEvaluation(folder.name, folder, result, read_config(folder / "config.yaml"))


def read_config(path: Path) -> dict[str, Any]:
    """A run's config.yaml as plain values; {} where there is none."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}


def trained_on(reference: str | None, beside: Path) -> set[str] | None:
    """Pretrained networks in the losses of a run and of the runs that it started from; None when one is not found.

    The run is looked for among the runs beside or above the folder `beside`, and where `reference` is a path there.
    """
    if reference is None:
        return None
    path, name = Path(reference), reference.partition("@")[0]
    places = [folder / name for folder in beside.parents] + [folder / "jobs" / name for folder in beside.parents]
    places += [path, *path.parents] if len(path.parts) > 1 else []
    config = next((found for place in places if (found := read_config(place / "config.yaml")).get("losses")), None)
    if config is None:
        return None
    weights, options = config["losses"], config["aux_losses"]
    used = [*pretrained_networks(weights, options), *[options["repa"]["model"]] * bool(weights["repa"])]
    networks = {canonical(network) for network in used}
    for earlier in {config["ssdd"]["checkpoint"], config["ssdd"]["encoder_checkpoint"]} - {None, reference}:
        before = trained_on(earlier, beside)
        if before is None:
            return None
        networks |= before
    return networks


def canonical(network: str) -> str:
    """One name for a network that is a loss under timm's name and an evaluation network under ours."""
    name = network.removeprefix(TIMM_PREFIX)
    return {LITE0: "efficientnet_lite0"}.get(name, TIMM_ALIASES.get(name, name))


def short(network: str) -> str:
    """A network's name for a heading: a classifier without its file."""
    return network.split(":")[0]


def family(decoder: str) -> str:
    """teacher-8 and teacher-1 are one checkpoint at several step counts, and one curve."""
    return re.sub(r"-\d+$", "", decoder)


def provenance(evaluation: FinishedEvaluation) -> list[tuple[str, list[str]]]:
    """What moves the figures of an evaluation: (label, lines), all as recorded when it was measured."""
    result, config = evaluation.result, evaluation.config
    measured = result.get("measured", {})
    reference, samples = result.get("reference", {}), result.get("samples", {})
    what = "generated images" if evaluation.generates else "reconstructed held-out images"
    facts: dict[str, Any] = {
        "command": measured.get("command") or NOT_RECORDED,
        "commit": measured.get("commit") or NOT_RECORDED,
        "date": measured.get("date") or NOT_RECORDED,
        "machine": measured.get("machine") or NOT_RECORDED,
        "precision": result.get("precision", {}).get("why", NOT_RECORDED),
        "result file": f"{evaluation.folder / 'task_result.json'}, sha256 "
        f"{sha256_file(evaluation.folder / 'task_result.json')}",
        "images": f"{result['count']} {what}",
    }
    if "data" in result:
        source = config.get("dataset", {})
        images = f"{source['source']}, {source['im_size']} px, " if source else ""
        facts["data set"] = f"{images}fingerprint {result['data']}, crop {result['crop']}"
    if reference:
        facts["reference"] = described(reference)
    if result.get("held_out"):
        facts["held-out images"] = described(result["held_out"])
    if samples:
        scheme = "balanced" if samples.get("balanced", True) else "random"
        facts["labels"] = result.get("labels", scheme)
        model = samples.get("model", {})
        facts["generator"] = (
            f"{model.get('name', 'unknown')} ({samples.get('checkpoint')}), weights sha256 {samples.get('weights')}"
        )
        keys = ("sampler", "steps", "cfg_scale", "cfg_interval", "cfg_channels", "guide", "shift", "mixed_precision")
        options = {key: samples[key] for key in keys if samples.get(key) is not None}
        facts["sampling"] = ", ".join(f"{key} {value}" for key, value in options.items())
        checksum = samples.get("latents_sha256", NOT_RECORDED)
        facts["latents"] = f"{samples.get('n')} of shape {samples.get('latent_shape')}, sha256 {checksum}"
    facts["seed"] = samples.get("seed", config.get("seed", NOT_RECORDED))
    facts["decoders"] = [decoder_line(evaluation, name) for name in evaluation.decoders]
    details = result.get("networks", {})
    facts["feature networks"] = [
        f"{network}, sha256 {checksum}"
        + "".join(f", {k} {details[network][k]}" for k in ("dim", "resize") if network in details)
        for network, checksum in result["features"].items()
    ]
    facts["loss networks"] = [
        f"{name}: {'unknown (config.yaml not found)' if used is None else ', '.join(sorted(used)) or 'none'}"
        for name, used in evaluation.loss_networks().items()
    ]
    resamples = config.get("evaluation", {}).get("resamples")
    facts["intervals"] = f"95 % bootstrap over images{f', {resamples} resamples' if resamples else ''}, decoders paired"
    facts["rounding"] = result.get("rounding", ROUNDING)
    facts["peak memory"] = f"{result['peak_memory_bytes'] / 2**30:.2f} GiB" if "peak_memory_bytes" in result else ""
    facts["skipped images"] = result.get("skipped") or "none"
    facts["skipped (weights not found)"] = result.get("left_out") or "nothing"
    facts["notes"] = result.get("notes", [])
    return [
        (label, [str(line) for line in (value if isinstance(value, list) else [value])])
        for label, value in facts.items()
        if value not in ("", [])
    ]


def described(images: Mapping[str, Any]) -> str:
    """A reference or a held-out set in words."""
    return ", ".join(f"{key} {value}" for key, value in images.items() if value is not None)


def decoder_line(evaluation: FinishedEvaluation, name: str) -> str:
    """Checkpoint, steps and checksum of a decoder."""
    steps = next(row["steps"] for row in evaluation.result["rows"] if row["name"] == name)
    recorded = evaluation.result.get("decoders", {}).get(name, {})
    checksum = f", weights sha256 {recorded['weights']}" if recorded.get("weights") else ""
    return f"{name}: checkpoint {recorded.get('reference', NOT_RECORDED)}, {steps} step{'s' * (steps > 1)}{checksum}"
