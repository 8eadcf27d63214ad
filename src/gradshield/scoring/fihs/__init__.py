"""FIHS: the inner product of a row's gradient with that of S (eq. 4, eq. 5)."""
