"""From a file and a model to kept, quarantined and set aside rows, and why."""
