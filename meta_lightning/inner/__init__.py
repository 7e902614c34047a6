"""The inner loop: adaptation of all tasks of a meta-batch at once, and its derivatives."""
