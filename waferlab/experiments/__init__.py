"""Many trainings, one answer: comparison and ablation."""
