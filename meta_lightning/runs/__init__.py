"""What a run leaves behind: checkpoints, records and predictions."""
