"""Generators' caches and configs, and a small tokenizer, for what is added."""

from tests.dit.conftest import caches, settings
from tests.small_tokenizer import tokenizer

__all__ = ["caches", "settings", "tokenizer"]
