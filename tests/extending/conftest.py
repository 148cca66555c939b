"""Generators' caches and configs, for what is added to `dit`."""

from tests.dit.conftest import caches, settings

__all__ = ["caches", "settings"]
