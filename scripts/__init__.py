"""Programs that join the packages: the pipeline and its report. The wheel ships this folder as `ssdd_pipeline`."""
