"""A run as one static HTML file: what `filter` decided, and the trials of `tune`."""
