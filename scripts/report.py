"""Report page: `python scripts/report.py runs/jobs/NAME out=report.html`, see ssdd_pipeline.report.page."""

import sys

import repository_root  # noqa: F401

from ssdd_pipeline.report.page import main

if __name__ == "__main__":
    sys.exit(main())
