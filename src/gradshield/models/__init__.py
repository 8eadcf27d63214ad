"""A language model: loaded, looked into, and made to answer."""
