"""Pretrained weights to download: `python scripts/prefetch_weights.py names=[vgg16]`, see ssdd.engine.prefetch."""

import sys

import repository_root  # noqa: F401

from ssdd.engine.prefetch import main

if __name__ == "__main__":
    sys.exit(main())
