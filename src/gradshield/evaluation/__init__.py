"""Safety (attack success on held-out harmful requests, over-refusal) of a model."""
