"""The tokenizer's networks, its latent, flow matching and tiling, and the files of its weights."""
