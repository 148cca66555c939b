"""The stages of the pipeline: for each the command it runs, what it reads, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit.config import DiTConfig
from latent_cache.config import BuildConfig
from ssdd.config import SSDDConfig
from ssdd.engine.errors import UserError
from ssdd.engine.schema import schema_aliases
from ssdd.images.sources import DatasetConfig

CLASSIFIER, TOKENIZER, STUDENT, RECONSTRUCTION = "classifier", "tokenizer", "student", "reconstruction"
CACHE, DIT, SAMPLES, GENERATION = "cache", "dit", "samples", "generation"
PROGRAMS = {
    "ssdd.main": ("ssdd", SSDDConfig),
    "latent_cache": ("latent_cache", BuildConfig),
    "dit.main": ("dit", DiTConfig),
}
"""Module -> (program, schema of its keys)."""
SPEED_KEYS = ("dataset.workers=",)
"""What changes no byte of any output."""


@dataclass
class PipelineConfig:
    """From images to gFID with the several-step and the one-step decoder."""

    name: str
    """Everything is written to runs/<name>."""
    ckpt_dir: str = "runs"
    """Folder of all pipelines."""
    seed: int = 0
    """Seed of every stage."""
    processes: int = 1
    """Processes of every stage that can use several; more than one is started with torchrun."""
    threads: int | None = None
    """CPU threads per process; null leaves it to torch."""
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    """Images of every stage. crop and batch_size are the tokenizer's: caches and gFID references have the ADM crop."""
    teacher_steps: int = 8
    """Steps N of the teacher, in distillation and in the table."""
    samples: int = 500
    """Number of generated images."""
    features: list[str] = field(default_factory=lambda: ["auto"])
    """Networks of the distances, besides the classifier that the first stage trains."""
    classifier: dict[str, Any] = field(default_factory=dict)
    """Keys of `ssdd/main.py` for the classifier's training."""
    tokenizer: dict[str, Any] = field(default_factory=dict)
    """Keys of `ssdd/main.py` for the tokenizer's training."""
    student: dict[str, Any] = field(default_factory=dict)
    """Keys of `ssdd/main.py` for the distillation, over those of the tokenizer."""
    reconstruction: dict[str, Any] = field(default_factory=dict)
    """Keys of `ssdd/main.py` for the evaluation of reconstructions."""
    cache: dict[str, Any] = field(default_factory=dict)
    """Keys of `python -m latent_cache build`."""
    dit: dict[str, Any] = field(default_factory=dict)
    """Keys of `dit/main.py` for training and sampling."""
    generation: dict[str, Any] = field(default_factory=dict)
    """Keys of `dit/main.py` for the evaluation of samples."""


@dataclass
class Stage:
    """One command: `python -m <module> <arguments>`."""

    name: str
    module: str
    arguments: list[str]
    outputs: list[Path]
    """Files that exist when the stage is done; the last one is written last."""
    folders: list[Path]
    """Everything the stage writes lies below these."""
    inputs: list[str] = field(default_factory=list)
    """Stages whose outputs it reads."""
    reads_images: bool = True
    parallel: bool = True
    """Whether it can run in several processes."""

    def decisive_arguments(self) -> list[str]:
        """The arguments that its outcome depends on."""
        return [argument for argument in self.arguments if not argument.startswith(SPEED_KEYS)]


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def last_names(schema: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Where one key is set under several of its names, only the last of them, as later settings win."""
    aliases = schema_aliases(schema)
    found: dict[str, Any] = {}
    for name, value in settings.items():
        key, item = aliases.get(name, (name, None))
        if item is not None and key in found:  # an item of a list that is set as a whole
            found[key] = [value if i == item else other for i, other in enumerate(found[key])]
            continue
        same = [other for other in found if other != name and aliases.get(other, (other, None))[0] == key]
        for other in same if item is None else []:
            del found[other]
        found[name] = value
    return found


def argument(key: str, value: Any) -> str:
    """key=value as the command lines of this project read it."""
    if value is None:
        return f"{key}=null"
    if isinstance(value, bool):
        return f"{key}={str(value).lower()}"
    if isinstance(value, list | tuple):
        return f"{key}=[{','.join(str(item) for item in value)}]"
    return f"{key}={value}"


def curve_steps(teacher_steps: int) -> list[int]:
    """Further step counts of the teacher for the distance-versus-steps curve."""
    return [k for k in (2, 4, 8) if k != teacher_steps]


def build_stages(cfg: PipelineConfig) -> list[Stage]:
    """The chain in the order of running. UserError if it would have nothing to compare."""
    if cfg.teacher_steps < 2:
        raise UserError(f"teacher_steps={cfg.teacher_steps}: distilling into one step needs a teacher of 2 or more")
    root = Path(cfg.ckpt_dir) / cfg.name
    jobs = root / "jobs"
    training_images = {f"dataset.{key}": value for key, value in vars(cfg.dataset).items()}
    evaluation_images = training_images | {"dataset.batch_size": None}
    adm_images = evaluation_images | {"dataset.crop": None}  # the crop of caches and gFID references is their default
    side = {"seed": cfg.seed, "ckpt_dir": str(root)}
    n = cfg.teacher_steps
    classifier = jobs / CLASSIFIER / "classifier.safetensors"
    networks = [*cfg.features, f"classifier:{classifier}"]
    decoders = [f"teacher-{n}:{TOKENIZER}:{n}", f"teacher-1:{TOKENIZER}:1", f"student-1:{STUDENT}:1"]
    curve = [f"teacher-{k}:{TOKENIZER}:{k}" for k in curve_steps(n)]
    tokenizer, student, generator = flatten(cfg.tokenizer), flatten(cfg.student), flatten(cfg.dit)
    sampling = {key: value for key, value in generator.items() if key.startswith("sampling.")}
    training = {key: value for key, value in generator.items() if key not in sampling}
    sampler = {"ssdd.fm_sampler.steps": n}

    def weights(run: str) -> list[Path]:
        return [jobs / run / "checkpoints" / "last" / "model_ema.safetensors", jobs / run / "task_result.json"]

    def stage(name: str, module: str, settings: dict[str, Any], outputs: list[Path], *inputs: str, **kwargs) -> Stage:
        verb, settings = ["build"] if module == "latent_cache" else [], last_names(PROGRAMS[module][1], settings)
        arguments = verb + [argument(key, value) for key, value in settings.items() if value is not None]
        return Stage(name, module, arguments, outputs, [jobs / name], list(inputs), **kwargs)

    stages = [
        stage(
            CLASSIFIER, "ssdd.main", {"task": "classifier", "run_name": CLASSIFIER} | side | evaluation_images
            | flatten(cfg.classifier),
            [classifier, jobs / CLASSIFIER / "task_result.json"], parallel=False,
        ),
        stage(
            TOKENIZER, "ssdd.main",
            {"task": "train", "run_name": TOKENIZER, "ssdd.encoder_train": True} | side | training_images | sampler
            | tokenizer,
            weights(TOKENIZER),
        ),
        stage(
            STUDENT, "ssdd.main",
            {"task": "train", "run_name": STUDENT} | side | training_images | sampler | tokenizer | student
            | {"ssdd.encoder_train": False, "ssdd.checkpoint": TOKENIZER, "ssdd.encoder_checkpoint": None,
               "distill_teacher": True},
            weights(STUDENT), TOKENIZER,
        ),
        stage(
            RECONSTRUCTION, "ssdd.main",
            {"task": "eval", "run_name": RECONSTRUCTION, "evaluation.baselines": True} | side | evaluation_images
            | {"evaluation.decoders": decoders + curve, "evaluation.features": networks} | flatten(cfg.reconstruction),
            [jobs / RECONSTRUCTION / "task_result.json"], CLASSIFIER, TOKENIZER, STUDENT,
        ),
        stage(
            CACHE, "latent_cache",
            {"tokenizer": TOKENIZER, "out": str(jobs / CACHE), "ckpt_dir": str(root)} | adm_images | flatten(cfg.cache),
            [jobs / CACHE / "manifest.json"], TOKENIZER,
        ),
        stage(
            DIT, "dit.main",
            {"task": "train", "run_name": DIT, "cache": str(jobs / CACHE)} | side | training,
            weights(DIT), CACHE, reads_images=False,
        ),
        stage(
            SAMPLES, "dit.main",
            {"task": "sample", "run_name": DIT, "out": str(jobs / SAMPLES), "sampling.n": cfg.samples,
             "sampling.seed": cfg.seed} | side | sampling,
            [jobs / SAMPLES / "latents.safetensors", jobs / SAMPLES / "sample_set.json"], DIT, reads_images=False,
        ),
        stage(
            GENERATION, "dit.main",
            {"task": "evaluate", "run_name": DIT, "samples": str(jobs / SAMPLES), "out": str(jobs / GENERATION)}
            | side | adm_images | {"sampling.seed": cfg.seed, "evaluation.decoders": decoders,
                               "evaluation.features": networks, "evaluation.classifier": str(classifier)}
            | flatten(cfg.generation),
            [jobs / GENERATION / "task_result.json"], CLASSIFIER, TOKENIZER, STUDENT, SAMPLES,
        ),
    ]  # fmt: skip
    return stages
