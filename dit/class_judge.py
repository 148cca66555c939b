"""Whether a generated image shows the class that was asked for, as far as a classifier of real images can say."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ssdd.engine.errors import UserError


class ClassJudge:
    """A support vector classifier of pixels (RBF kernel), fitted to real training images."""

    def __init__(self, images: Tensor, labels: Tensor):
        from sklearn.svm import SVC

        if len(labels.unique()) < 2:
            raise UserError("evaluation.class_accuracy needs a data set of two classes or more; set it to false")
        self.model = SVC(C=10, gamma="scale").fit(self._pixels(images), labels.numpy())

    def correct(self, images: Tensor, labels: Tensor) -> list[bool]:
        """Whether each image (uint8 [n, 3, H, W]) is seen as its label."""
        return (self.model.predict(self._pixels(images)) == labels.cpu().numpy()).tolist()

    @staticmethod
    def _pixels(images: Tensor) -> np.ndarray:
        return images.float().mean(dim=1).flatten(1).cpu().numpy() / 255
