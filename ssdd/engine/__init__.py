"""What every run stands on: config, run directories, checkpoints, processes, devices, files, logs."""
