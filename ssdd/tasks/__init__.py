"""The tasks of `ssdd/main.py`; each module has `run(cfg)`."""
