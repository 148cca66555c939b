"""Images: sources, stored images, crops, batches, pixels."""
