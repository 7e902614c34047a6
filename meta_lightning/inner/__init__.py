"""The inner loop: how all tasks of a meta-batch adapt at once, and how one differentiates through it."""
