"""The tasks `train` and `sample` of `dit/main.py`, and what they are made of."""
