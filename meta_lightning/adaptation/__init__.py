"""From a learner and a few samples of each class to predictions about others."""
