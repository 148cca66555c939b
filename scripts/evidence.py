"""SSDD compared with its baselines: `python scripts/evidence.py minutes=55`, see ssdd_pipeline.evidence."""

import sys

import repository_root  # noqa: F401

from ssdd_pipeline.evidence import main

if __name__ == "__main__":
    sys.exit(main())
