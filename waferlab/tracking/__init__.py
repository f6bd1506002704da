"""The tree of runs in MLflow or Weights & Biases, and the page that shows it."""
