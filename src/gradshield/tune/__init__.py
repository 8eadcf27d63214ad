"""The search for a threshold that leaves a safe and useful model (alg. 1)."""
