"""Speed of the training step beside what a user would otherwise run."""
