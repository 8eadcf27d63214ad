"""Training a model on rows."""
