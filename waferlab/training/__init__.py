"""What surrounds a training: callbacks, checkpoints, precision, progress, pre-training."""
