"""Fixtures of a small tokenizer for the tests of what takes one entry to add."""

from tests.small_tokenizer import tokenizer

__all__ = ["tokenizer"]
