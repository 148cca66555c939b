"""The task `evaluate` of `dit/main.py`: distances of generated sets to real images."""
