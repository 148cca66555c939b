"""What the tokenizer is trained on: objectives, distillation, perceptual losses, REPA, the adversary."""
