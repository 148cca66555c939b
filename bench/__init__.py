"""Speed and memory of this machine; `python scripts/bench.py` runs it. Not in the wheel."""
