"""Fixtures of a small tokenizer for the tests of `ssdd/fidelity`."""

from tests.small_tokenizer import config, tokenizer

__all__ = ["config", "tokenizer"]
