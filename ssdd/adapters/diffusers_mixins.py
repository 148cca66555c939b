"""What the adapter needs of diffusers' ModelMixin and ConfigMixin where that is not installed; the same two files."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from ssdd.engine.checkpoint import save_tensors
from ssdd.engine.errors import UserError
from ssdd.engine.files import read_json, write_json
from ssdd.model.weight_files import load_weights, read_weights

WEIGHTS_FILE, CONFIG_FILE = "diffusion_pytorch_model.safetensors", "config.json"


class Config(dict):
    """Keys as items and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class ConfigMixin:
    """Keeps the constructor's arguments in `config`."""

    ignore_for_config: list[str] = []

    @property
    def config(self) -> Config:
        return self._config

    def register_to_config(self, **values: Any) -> None:
        kept = {key: value for key, value in values.items() if key not in self.ignore_for_config}
        self._config = Config(getattr(self, "_config", {}) | kept)


class ModelMixin(nn.Module):
    """Device, dtype, and files."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and diffusion_pytorch_model.safetensors."""
        save_tensors(Path(folder) / WEIGHTS_FILE, self.state_dict(), {"format": "pt"})
        write_json(Path(folder) / CONFIG_FILE, {"_class_name": type(self).__name__, **self.config})

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, subfolder: str | None = None, torch_dtype: torch.dtype | None = None
    ) -> Self:
        """Read what `save_pretrained` wrote. UserError if it is not there."""
        folder = Path(folder) / (subfolder or "")
        if not (folder / CONFIG_FILE).is_file():
            raise UserError(f"{folder} has no {CONFIG_FILE}; names on the Hugging Face hub need diffusers installed")
        config = {key: value for key, value in read_json(folder / CONFIG_FILE).items() if not key.startswith("_")}
        model = cls(**config)
        load_weights(model, read_weights(folder / WEIGHTS_FILE)[0], folder / WEIGHTS_FILE)
        return model.eval().to(torch_dtype)


def register_to_config(constructor: Callable[..., None]) -> Callable[..., None]:
    """Record the arguments of a constructor, defaults included, before it runs."""
    signature = inspect.signature(constructor)

    @functools.wraps(constructor)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        self.register_to_config(**{name: value for name, value in bound.arguments.items() if name != "self"})
        constructor(self, *args, **kwargs)

    return wrapped


def apply_forward_hook(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method as it is: diffusers' runs the hooks with which it moves models between devices."""
    return method
