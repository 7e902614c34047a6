"""Output of runs: checkpoints, records and predictions."""
