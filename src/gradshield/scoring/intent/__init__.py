"""The default score: readouts of hidden states."""
