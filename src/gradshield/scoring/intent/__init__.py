"""The default score: two linear readouts of hidden states."""
