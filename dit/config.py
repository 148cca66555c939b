"""The keys of `dit/main.py`: model, training, sampling and evaluation of a generator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from dit.foreign_checkpoints import FAMILIES
from dit.options import NAMES, VARIANTS, BlockVariants
from dit.samplers import DIFFUSIONS, SAMPLERS
from latent_cache.config import adm_images
from ssdd.engine.ema import EmaConfig
from ssdd.engine.precision import PRECISIONS
from ssdd.engine.schema import with_keys
from ssdd.engine.schema_help import field_docs
from ssdd.engine.training_keys import TrainingKeys
from ssdd.images.sources import DatasetConfig
from ssdd.losses.repa import DINOV2_BASE


@with_keys({name: (bool, False, field_docs(BlockVariants).get(name, "")) for name in VARIANTS})
@dataclass
class ModelConfig:
    """The network; latent shape and classes come from the cache."""

    name: str = field(default="DiT-S/2", metadata={"choices": NAMES})
    """Size and patch, such as DiT-XL/2."""
    learn_sigma: bool = False
    """Predict 2 C channels, as the published DiT files do; the flow loss uses the first C."""
    class_dropout: float = 0.1
    """Share of training labels replaced by the null class; 0 builds a model without a null class, which cannot be
    guided."""
    time_scale: float = 1000.0
    """What t in [0, 1] is multiplied by before the network sees it; only with 1 can SiT's code run it (export_dit)."""
    checkpoint: str | None = None
    """train: weights to start from, ours or those of SiT, REPA or LightningDiT: run, folder or file. The other keys
    of `model` must describe that network."""
    family: str | None = field(default=None, metadata={"choices": FAMILIES})
    """Whose code trained that file, if the file does not record it."""
    reset_labels: bool = False
    """Start with a new label table, for a cache whose classes differ from the checkpoint's."""


@dataclass
class DiTLossesConfig:
    """Weights of the loss terms besides the velocity loss, whose weight is 1; 0 disables a term."""

    direction: float = 0.0
    """1 - cosine between predicted and true velocity, over the channels of each position (LightningDiT: 1)."""
    repa: float = 0.0
    """REPA: tokens against those of a frozen vision transformer (REPA: 0.5); needs its weights in the search path, and
    the images of the cache, described by `dataset`."""


@dataclass
class DiTRepaConfig:
    """REPA."""

    model: str = DINOV2_BASE
    """timm vision transformer whose patch tokens are the reference."""
    i_extract: int = 8
    """Transformer block, counted from 1, whose output is compared (REPA: 8 of XL's 28)."""
    n_layers: int = 3
    """Linear layers between the generator's tokens and the reference."""
    hidden: int = 2048
    """Width of those layers."""


@dataclass
class DiTAuxiliaryConfig:
    """Networks of the losses."""

    repa: DiTRepaConfig = field(default_factory=DiTRepaConfig)
    """REPA, where losses.repa is not 0."""


@dataclass
class DiTTrainingConfig(TrainingKeys):
    """Flow-matching training on a latent cache, with AdamW."""

    steps: int = 400_000
    """Optimiser steps."""
    batch_size: int = 256
    """Latents per step, over all processes and accumulated parts."""
    t_sampling: str = field(default="logit_normal", metadata={"choices": ("logit_normal", "uniform")})
    """Distribution of training times; t_mean and t_std are those of logit_normal."""
    t_shift: float = 1.0
    """Time shift s of the drawn times, t -> s t / (1 + (s - 1) t); above 1 leans to the noise (RAE: (C h w / 4096)^.5,
    with the same sampling.shift)."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """Averaged weights, which sampling uses; sampling.ema selects a further one."""
    tokenizer: str | None = None
    """Checkpoint reference of the tokenizer that decodes pictures of samples, drawn as `sampling` describes
    (without its guide); null disables them."""
    sample_every: int | None = None
    """Steps between those pictures; null: with every checkpoint; 0 disables them."""
    fidelity_every: int = 0
    """Steps between distances of samples to the images of the cache, described by `dataset`; 0 disables them.
    Samples are drawn as `sampling` describes and decoded with training.tokenizer; features are Inception's, or
    EfficientNet-Lite0's if those weights are missing."""
    fidelity_samples: int = 1_000
    """Samples per distance; too few for a gFID, enough to compare checkpoints."""


@dataclass
class SamplingConfig:
    """Drawing latents from a trained generator."""

    checkpoint: str | None = None
    """Checkpoint reference: run, run@last, run@best, folder or weights file (default: run_name). EMA weights. Files of
    DiT, SiT, REPA and LightningDiT (.pt, .safetensors) are read too."""
    family: str | None = field(default=None, metadata={"choices": FAMILIES})
    """Whose code trained such a file, if the file does not record it."""
    ema: float | None = None
    """Which of several averages of a run to use, by its decay in training.ema.decays; null: the first."""
    n: int = 50_000
    """Number of samples."""
    seed: int = 0
    """Sample i depends on the seed and i only."""
    balanced: bool = True
    """Sample i is of class i modulo the number of classes; false draws classes at random."""
    sampler: str = field(default="euler", metadata={"choices": SAMPLERS})
    """Solver: euler and heun (second order) of the ODE, adaptive (Dormand-Prince 5(4)), or sde (Euler-Maruyama)."""
    steps: int = 50
    """Steps of the grid (not adaptive): as many evaluations of the network for euler and sde, 2 steps - 1 for heun."""
    shift: float = 1.0
    """Time shift s of the grid, t -> s t / (1 + (s - 1) t); above 1 is finer near the noise. Not for adaptive."""
    rtol: float = 1e-3
    """adaptive: error allowed per step relative to the state, for each sample by itself."""
    atol: float = 1e-5
    """adaptive: absolute error allowed per step."""
    sde_diffusion: str = field(default="sigma", metadata={"choices": DIFFUSIONS})
    """sde: diffusion coefficient w(t); sigma is 2 t (the form of SiT's default), sine is 2 sin^2(pi t)."""
    sde_scale: float = 1.0
    """sde: factor of w(t); 0 gives the ODE."""
    sde_last_step: float = 0.04
    """sde: time at which the last step begins, which is deterministic and leads to t = 0."""
    cfg_scale: float = 1.5
    """Scale of classifier-free guidance; 1 disables it. With guidance each evaluation has two rows per sample."""
    cfg_channels: int | None = None
    """Classifier-free guidance of the first channels only (3 reproduces DiT's and SiT's tables); null guides all."""
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    """Steps that begin at low < t <= high are guided, by either method; what guidance needs is not computed outside."""
    guide: str | None = None
    """Checkpoint reference of a weaker model of the same latents, for autoguidance (smaller, or trained for less)."""
    guide_scale: float = 1.0
    """Scale of autoguidance. Its correction is added to that of classifier-free guidance; set cfg_scale=1 to use it
    alone."""
    batch_size: int = 256
    """Samples drawn together and stored as one chunk; an interrupted run repeats only the unfinished chunk."""
    mixed_precision: str = field(default="auto", metadata={"choices": PRECISIONS})
    """Autocast of the network; auto is no unless SSDD_PRECISION is set. The solver's state stays float32."""
    compile: bool = False
    """torch.compile the network for its two fixed shapes, with and without guidance."""


@dataclass
class DiTEvaluationConfig:
    """gFID and related distances; every decoder decodes the same latents."""

    decoders: list[str] = field(default_factory=list)
    """Rows of the table, each `name:checkpoint reference:steps`, or `name:diffusers:PATH` for a KL-VAE."""
    features: list[str] = field(default_factory=lambda: ["auto"])
    """Networks of the distances: inception, efficientnet_lite0, dinov2, clip, timm/MODEL, classifier:FILE; auto takes
    those of the first two whose weights are found."""
    reference: str | None = None
    """What samples are compared with, in place of the training images: an image folder, an npz (ADM's reference files
    among them), or a statistics file of scripts/fidelity.py or torch-fidelity."""
    held_out: bool = True
    """Measure the val split as well: floors of all distances, copy rates, and the reconstructions of the gap."""
    kept_features: int = 10_000
    """Real images whose features are kept for KID, precision, recall and copy rate (ADM: 10000); moments use all
    images."""
    gap: bool = True
    """Also decode the latents of held-out images with every decoder: gFID minus rFID."""
    latent_noise: list[float] = field(default_factory=list)
    """Standard deviations of noise added to those latents, in units of the latents' own, such as
    [0,0.1,0.2,0.3,0.4,0.5]: measures how robust each decoder is to a generator's errors."""
    sweep_cfg: list[float] = field(default_factory=list)
    """Draw, decode and compare a small set for each of these values of sampling.cfg_scale ..."""
    sweep_steps: list[int] = field(default_factory=list)
    """... and each of these of sampling.steps."""
    sweep_n: int = 5000
    """Samples per set."""
    npz: bool = False
    """Write the images of every decoder as out/export/NAME.npz, in the form of ADM's evaluator."""
    png: bool = False
    """Write them as out/export/NAME/000000.png and so on."""
    allow_mismatch: bool = False
    """Compare even if the reference has another crop, and record it in the result."""
    cache: str | None = None
    """Folder for statistics of real images, measured once; null: ~/.cache/ssdd/fidelity."""
    classifier: str | None = None
    """File that `ssdd/main.py task=classifier` wrote on real images: counts how often it sees the requested class."""
    baseline_numbers: int | None = None
    """Add a baseline row: samples of one Gaussian per class in a PCA space of this many dimensions; null disables
    it."""
    batch_size: int = 64
    """Images decoded together and stored as one chunk; an interrupted evaluation repeats only the unfinished chunk."""
    mixed_precision: str = field(default="auto", metadata={"choices": PRECISIONS})
    """Autocast of the decoders; auto is no unless SSDD_PRECISION is set. Features are float32."""
    resamples: int = 200
    """Bootstrap resamples of the KID intervals."""


@dataclass
class DiTConfig:
    """Class-conditional generator on a latent cache: train, sample, evaluate."""

    ALIASES: ClassVar[dict[str, str]] = {
        "training.accumulate": "training.grad_accumulate",
        "training.beta2": "training.betas[1]",
        **{f"repa.{key}": f"aux_losses.repa.{key}" for key in ("model", "i_extract", "n_layers", "hidden")},
    }
    """Earlier names of keys -> keys as both programs call them; both stay valid."""

    task: str = field(default="train", metadata={"choices": ("train", "sample", "evaluate")})
    """What to do."""
    run_name: str = "dit"
    """Name of the run: its folder is ckpt_dir/jobs/run_name. Training resumes a run of the same name."""
    ckpt_dir: str = "runs"
    """Folder of all runs, where checkpoint references are looked up."""
    seed: int = 0
    """Seed of initial weights, data order and all training draws."""
    deterministic: bool = False
    """Use only kernels that give the same bits every time; all CPU kernels do."""
    cache: str | None = None
    """train: folder written by `python -m latent_cache build`, or an fsspec URL of one (s3://, gs://, https://)."""
    dry_run: bool = False
    """train: print parameters, GFLOP, memory and hours on this machine, measured on a few steps, and exit."""
    cache_dir: str | None = None
    """train: local folder for the shards of a cache at a URL."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    training: DiTTrainingConfig = field(default_factory=DiTTrainingConfig)
    """Training."""
    losses: DiTLossesConfig = field(default_factory=DiTLossesConfig)
    """Loss weights."""
    aux_losses: DiTAuxiliaryConfig = field(default_factory=DiTAuxiliaryConfig)
    """Networks of the losses."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling."""
    out: str | None = None
    """sample, evaluate: folder for the results (default: samples or evaluation inside the run's folder)."""
    samples: str | None = None
    """evaluate: folder of a sample set; null: that of the run, drawn as `sampling` describes if it does not exist."""
    dataset: DatasetConfig = field(default_factory=adm_images)
    """evaluate: real images to compare with, the train split as reference, the val split as floor and held-out set.
    train: the images of the cache, where losses.repa or training.fidelity_every need them."""
    evaluation: DiTEvaluationConfig = field(default_factory=DiTEvaluationConfig)
    """Evaluation."""
