"""Fixtures of a small tokenizer for the tests of `ssdd/model`."""

from tests.small_tokenizer import config, tokenizer

__all__ = ["config", "tokenizer"]
