"""The keys of `training` that the training of any network here has, under one name each."""

from __future__ import annotations

from dataclasses import dataclass, field

from ssdd.engine.ema import EmaConfig
from ssdd.engine.precision import PRECISIONS


@dataclass
class TrainingKeys:
    """Optimisation."""

    grad_accumulate: int = 1
    """Parts that a step's batch is split into, to save memory."""
    lr: float = 1e-4
    """Learning rate after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Moment decays of the optimizer."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices and convolutions; biases, norms, embeddings and tables are not decayed."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly."""
    lr_schedule: str = field(default="constant", metadata={"choices": ("constant", "cosine")})
    """Learning rate after the warm-up; cosine falls to zero at the last step."""
    grad_clip: float = 1.0
    """Largest norm of all gradients of a step together, with those of loss heads; 0 disables clipping."""
    t_mean: float = 0.0
    """Mean of logit(t) of the training times; above 0 leans to the noise."""
    t_std: float = 1.0
    """Deviation of logit(t) of the training times."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """Averaged weights."""
    compile: bool = False
    """torch.compile the network."""
    grad_checkpoint: bool = False
    """Recompute the activations of the blocks in the backward pass: less memory, about a third more work."""
    fsdp: bool = False
    """Shard parameters, averages and optimizer state over the processes (FSDP) instead of keeping all in each (DDP);
    needs training.compile=false."""
    mixed_precision: str = field(default="auto", metadata={"choices": PRECISIONS})
    """Autocast; auto takes the value of SSDD_PRECISION, else bf16 where the device supports it natively, else no.
    Weights stay float32."""
    save_every: int = 5_000
    """Steps between checkpoints; `last` is also written at the end."""
    keep: int = 0
    """How many of the newest checkpoints of every save_every steps to keep as run@step-000123, besides `last`."""
    log_freq: int = 100
    """Steps between lines of metrics.jsonl; training waits for the device only at these steps."""
    wandb: str | None = None
    """Weights & Biases project that metrics and pictures are also sent to (pip install wandb); null disables it."""
