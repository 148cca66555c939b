"""What every task of every package stands on: config, run directories, checkpoints, image data, metrics, logs."""
