"""The keys of `ssdd/main.py`, named and defaulted as in the published training code (v2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ssdd.engine.ema import EmaConfig
from ssdd.engine.precision import PRECISIONS
from ssdd.engine.schema import with_keys
from ssdd.engine.training_keys import TrainingKeys
from ssdd.fidelity.pixel_metrics import PIXEL_METRICS
from ssdd.fidelity.set_metrics import SET_METRICS
from ssdd.images.sources import DatasetConfig
from ssdd.losses.distillation import LATENTS
from ssdd.losses.image_losses import IMAGE_LOSSES
from ssdd.losses.perceptual import PERCEPTUAL_METRICS
from ssdd.losses.repa import DINOV2_BASE
from ssdd.model.decoder_families import decoder_names


def decisive_metrics() -> list[str]:
    """What the best checkpoint may be selected by: metrics of which more, or less, is better."""
    of_pixels = [name for name, metric in PIXEL_METRICS.items() if metric.better in ("↑", "↓")]
    return ["FID", *of_pixels, *PERCEPTUAL_METRICS]


def measured_metrics() -> list[str]:
    """What evaluation.metrics may name."""
    of_sets = [name for name, metric in SET_METRICS.items() if metric.label]
    return ["auto", *decisive_metrics(), *of_sets]


@dataclass
class SamplerConfig:
    """Euler sampling of the decoder."""

    steps: int = 12
    """Steps of evaluation; in distillation, those of the teacher (the student always takes one)."""
    t_pow_shift: float = 2.0
    """Exponent of the time grid linspace(1, 0)^p."""


@dataclass
class TokenizerConfig:
    """The tokenizer."""

    encoder: str = "f8c4"
    """f<stride>c<channels>, with stride 4 to 64; or sdvae, or the folder of a diffusers autoencoder, both frozen."""
    encoder_width: int = 128
    """Channels of the encoder's first level; 128 is the published one."""
    decoder: str = field(default="M", metadata={"choices": decoder_names})
    """Decoder size; F-XS to F-B are fast convolutional ones; kl is the deterministic decoder of a KL-VAE, trained on
    losses.l1 and the image losses."""
    checkpoint: str | None = None
    """Weights to start from, or to evaluate: run, run@best, folder or weights file."""
    encoder_checkpoint: str | None = None
    """Weights of which only the encoder is read."""
    encoder_train: bool = False
    """Train the encoder together with the decoder; otherwise it is frozen."""
    posterior_std: float = 1.0
    """Deviation of the posterior that an encoder trained from scratch starts with; small values learn faster."""
    fm_sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """Sampling."""


@with_keys({name: (float, loss.weight, loss.doc) for name, loss in IMAGE_LOSSES.items()})
@dataclass
class LossesConfig:
    """Weights of the loss terms; 0 disables a term."""

    diffusion: float = 1.0
    """Flow matching: mean squared error of the velocity. Distillation: of the image."""
    repa: float = 0.25
    """REPA: tokens against those of a frozen vision transformer; needs its weights in the search path. Not for kl."""
    kl: float = 1e-6
    """KL of the posterior to N(0, I), summed over the latent; only while the encoder is trained."""
    l1: float = 1.0
    """Mean absolute error, of ssdd.decoder=kl only."""
    gan_disc: float = 0.0
    """Adversarial term of the decoder (+blocks=gan)."""
    gan_train: float = 1.0
    """The discriminator's own loss."""


@with_keys({name: (int, 0, f"{loss.title}.") for name, loss in IMAGE_LOSSES.items()})
@dataclass
class LossStartConfig:
    """Step from which a loss term is computed."""

    repa: int = 0
    """REPA."""


@dataclass
class RepaConfig:
    """REPA."""

    model: str = DINOV2_BASE
    """timm vision transformer whose patch tokens are the reference."""
    i_extract: int = 4
    """Transformer block whose output is compared, at most half of the blocks."""
    n_layers: int = 2
    """Linear layers between the decoder's tokens and the reference."""


@with_keys({name: (loss.options, ..., f"{loss.title}.") for name, loss in IMAGE_LOSSES.items() if loss.options})
@dataclass
class AuxiliaryConfig:
    """Networks of the losses."""

    repa: RepaConfig = field(default_factory=RepaConfig)
    """REPA."""


@dataclass
class DiscriminatorConfig:
    """Discriminator."""

    norm_fn: str = field(default="ada", metadata={"choices": ("ada", "group")})
    """Group norm conditioned on the time (ada), or plain."""
    n_layers: int = 4
    """Convolutions of stride 2."""
    trajectory: bool = True
    """Show it the noisy image together with the predicted one."""


@dataclass
class GanConfig:
    """Adversarial training, where losses.gan_disc is not 0."""

    start_iter: int = 50_000
    """Step at which discriminator and adversarial term start."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """The discriminator."""


@dataclass
class DistillConfig:
    """Distillation."""

    z: str = field(default="mean", metadata={"choices": LATENTS})
    """Latent to decode: the posterior's mean, a sample, or noisy: the mean plus up to tau_max deviations of noise."""
    targets: str = field(default="online", metadata={"choices": ("online", "cache")})
    """The teacher's images: computed at every step, or stored once in ckpt_dir/cache (fixed crops, z=mean)."""
    noises: int = 1
    """Stored teacher images per image, each from its own noise; epochs use them in turn."""
    tau_max: float = 0.3
    """Largest noise of distill.z=noisy, in deviations of the latents over the first 256 training images."""


@dataclass
class TrainingConfig(TrainingKeys):
    """Optimisation."""

    epochs: int = 300
    """Passes over the training images."""
    steps: int | None = None
    """Optimiser steps; wins over epochs."""
    optimizer: str = field(default="schedulefree", metadata={"choices": ("schedulefree", "adamw")})
    """schedulefree (RAdam with averaged weights, which needs no lr_schedule) or adamw."""
    lr: float = 8e-4
    weight_decay: float = 1e-2
    grad_clip: float = 0.1
    ema: EmaConfig = field(default_factory=lambda: EmaConfig(decays=[0.999], start_iter=50_000))
    """Averaged weights, which evaluation and export use."""
    compile: bool = True
    """torch.compile the networks that train, and the teacher; evaluation runs as it is."""
    mixed_precision: str = field(default="auto", metadata={"choices": PRECISIONS})
    """Autocast; auto takes the value of SSDD_PRECISION, else bf16 where the device supports it natively, else no;
    for task=eval auto is no unless SSDD_PRECISION is set."""
    eval_freq: int = 4
    """Epochs between evaluations; 0 disables evaluation."""
    save_on_best: str = field(default="FID", metadata={"choices": decisive_metrics})
    """Metric that selects the `best` checkpoint; PSNR is used if it was not measured, or if FID has fewer than ten
    images per feature dimension (20480)."""
    save_every: int = 5_000
    """Steps between checkpoints; `last` is also written with every evaluation and at the end."""
    sample_every: int | None = None
    """Steps between pictures of originals above reconstructions; null: with every evaluation; 0 disables them."""
    log_freq: int = 200


@dataclass
class EvaluationConfig:
    """Evaluation of reconstructions."""

    steps: list[int] = field(default_factory=list)
    """Step counts to evaluate; empty takes ssdd.fm_sampler.steps."""
    decoders: list[str] = field(default_factory=list)
    """Rows to evaluate side by side, each `name:checkpoint reference:steps`; empty takes ssdd.checkpoint."""
    metrics: list[str] = field(default_factory=lambda: ["auto"], metadata={"choices": measured_metrics})
    """Metrics besides those of pixels, and of sets on the networks of `features`, which are always measured; auto: all
    whose weights are found. The weights of a metric that is named must be found. FID selects the network inception."""
    features: list[str] = field(default_factory=lambda: ["auto"])
    """Networks of the distances: inception, efficientnet_lite0, dinov2, clip, timm/MODEL, classifier:FILE; auto takes
    those of the first two whose weights are found."""
    baselines: bool = False
    """Add baseline rows: PCA with as many numbers as the latent, and a slight blur."""
    limit: int | None = None
    """Use only this many held-out images, regardless of dataset.limit."""
    batch_size: int = 64
    """Images decoded together."""
    resamples: int = 200
    """Bootstrap resamples of the KID intervals."""
    noise_draws: int = 0
    """Draws of noise for noise_r2: how well a row reproduces the effect of the noise on the first row's images; 0
    disables it."""


@dataclass
class SSDDConfig:
    """Train, distil, evaluate an image tokenizer with a diffusion decoder."""

    ALIASES: ClassVar[dict[str, str]] = {
        "ssdd.compile": "training.compile",
        "ssdd.ema.decay": "training.ema.decays[0]",
        "ssdd.ema.start_iter": "training.ema.start_iter",
        "ssdd.fm_trainer.t_sampler_args.t_mean": "training.t_mean",
        "ssdd.fm_trainer.t_sampler_args.t_std": "training.t_std",
    }
    """Names of the published code -> keys as both programs call them; both stay valid."""

    task: str = field(default="train", metadata={"choices": ("train", "eval", "z_stats", "classifier")})
    """What to do; classifier trains the small network whose features compare image sets (classifier:FILE)."""
    run_name: str | None = None
    """Name of the run: its folder is ckpt_dir/jobs/run_name. Training resumes that run. Default: date and time."""
    ckpt_dir: str = "runs"
    """Folder of all runs, where checkpoint references are looked up."""
    seed: int = 0
    """Seed of initial weights, data order, all training draws and the decoder noise of evaluation."""
    objective: str = field(default="flow", metadata={"choices": ("flow", "direct")})
    """flow: flow matching over all times; direct: only at t = 1, one step from noise to real images (a baseline)."""
    dry_run: bool = False
    """train: print parameters, GFLOP, memory and hours on this machine, measured on a few steps, and exit."""
    distill_teacher: bool = False
    """Distil ssdd.checkpoint, sampled with ssdd.fm_sampler.steps, into a one-step decoder."""
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    """Images."""
    ssdd: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer."""
    losses: LossesConfig = field(default_factory=LossesConfig)
    """Loss weights."""
    losses_start: LossStartConfig = field(default_factory=LossStartConfig)
    """When losses start."""
    aux_losses: AuxiliaryConfig = field(default_factory=AuxiliaryConfig)
    """Networks of the losses."""
    gan: GanConfig = field(default_factory=GanConfig)
    """Adversarial training."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Distillation."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Training."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Evaluation."""
    show_samples: int = 8
    """Images in the picture grids."""
    deterministic: bool = True
    """Refuse operations whose result depends on timing; false is faster on GPUs."""
