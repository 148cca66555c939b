"""Distances between sets of images: `python scripts/fidelity.py SAMPLES REFERENCE`, see ssdd.fidelity.command."""

import sys

import repository_root  # noqa: F401

from ssdd.fidelity.command import main

if __name__ == "__main__":
    sys.exit(main())
