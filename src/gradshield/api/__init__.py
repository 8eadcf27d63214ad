"""The Python interface: each command as a function with plain arguments, and a run folder as an object."""
