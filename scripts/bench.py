"""Speed and memory: `python scripts/bench.py tokenizer|dit|pipeline|builder|cache|scaling`, see bench.main."""

import sys

import repository_root  # noqa: F401

from bench.main import main

if __name__ == "__main__":
    sys.exit(main())
