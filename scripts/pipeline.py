"""From images to gFID: `python scripts/pipeline.py configs/pipelines/digits.yaml`, see ssdd_pipeline.run."""

import sys

import repository_root  # noqa: F401

from ssdd_pipeline.run import main

if __name__ == "__main__":
    sys.exit(main())
