"""Training of the discriminator in addition to the decoder: its own gradients, optimizer and checkpoint files."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ssdd.config import SSDDConfig
from ssdd.engine.optim import GradientStep, build_optimizer, parameter_groups
from ssdd.engine.precision import Precision
from ssdd.engine.processes import Processes, gradients_kept
from ssdd.engine.state import OptimizerState, Part, Weights
from ssdd.losses.adversary import Discriminator
from ssdd.losses.objective import Predicted


class AdversaryTraining:
    """The adversary's half of every step; without a discriminator its methods do nothing."""

    def __init__(self, cfg: SSDDConfig, discriminator: Discriminator | None, precision: Precision):
        self.discriminator, self.precision = discriminator, precision
        self.share = 1 / cfg.training.grad_accumulate
        self.weight, self.active = cfg.losses.gan_train, False
        self.terms: list[str] = [] if discriminator is None else ["gan_train"]
        self.parts: Mapping[str, Part] = {}
        if discriminator is None:
            return
        training, parameters = cfg.training, dict(discriminator.to(precision.device).named_parameters())
        groups = parameter_groups(parameters, discriminator, training.weight_decay)
        optimizer = build_optimizer(training.optimizer, groups, training.lr, training.betas)
        unscaled = Precision.float32(precision.device).loss_scaler()  # fp16 is refused: nothing to scale
        self.update = GradientStep(optimizer, parameters.values(), training.grad_clip, unscaled)
        self.parts = {"model_gan": Weights(discriminator), "optimizer_gan": OptimizerState(optimizer, "optimizer_gan")}

    def distribute(self, processes: Processes) -> None:
        """Average its gradients over the processes; from here on it is only trained in its own half of a step."""
        if self.discriminator is not None:
            self.model = processes.data_parallel(self.discriminator)
            self.discriminator.requires_grad_(False).eval()

    def begin(self, active: bool) -> None:
        """A step begins; not active: the adversary has not started yet."""
        self.active = active
        if active:
            self.discriminator.update_norms()

    def backward(self, x: Tensor, predicted: Predicted, more: bool) -> dict[str, Tensor]:
        """Add the gradients of {"gan_train": loss} on real images x and what was made of them; more: parts follow."""
        if not self.active:
            return {}
        self.discriminator.requires_grad_(True)
        with gradients_kept(self.model, more):
            with self.precision.autocast():
                loss = self.model(x, *predicted)
            self.update.backward(self.weight * loss * self.share)
        self.discriminator.requires_grad_(False)
        return {"gan_train": loss.detach()}

    def apply(self, lr: float) -> Tensor | None:
        """Take the step; returns its gradient norm."""
        return self.update.apply(lr) if self.active else None
