"""Programs that join the packages: the pipeline, its report, and the comparison with the baselines."""
