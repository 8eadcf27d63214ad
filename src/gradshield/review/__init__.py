"""The review page: a run's scores, its rows' texts and a person's decisions; and `apply`, which writes what follows."""
