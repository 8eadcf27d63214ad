"""Near-duplicates of a row: rows that share most of its runs of two and three words, by cosine of what is there.

One sparse matrix of all rows, made when it is first asked for; after that a row costs one product with it.
"""

import threading
from pathlib import Path
from typing import Any

import numpy as np

from gradshield.review.texts import all_texts

ALIKE = 0.5  # cosine from which a row counts as a near-duplicate
_WORD = "[\u3040-\u30ff\u3400-\u9fff]|[^\\W\u3040-\u30ff\u3400-\u9fff]+"  # Chinese and Japanese: a character each
_READ = 4000  # characters of a row that are compared


class Likeness:
    """The matrix of a run's rows, made once."""

    def __init__(self, out: Path) -> None:
        self.out, self.matrix, self.lock = out, None, threading.Lock()

    def nearest(self, row: int, count: int = 10) -> list[tuple[int, float]]:
        """(row number, cosine) of the rows most like row number `row`, nearest first, itself left out."""
        matrix = self._matrix()
        cosines = (matrix @ matrix[row - 1].T).toarray()[:, 0]  # [rows]
        cosines[row - 1] = -1.0
        order = np.argsort(-cosines, kind="stable")[:count]
        return [(int(n) + 1, float(cosines[n])) for n in order if cosines[n] >= ALIKE]

    def _matrix(self) -> Any:
        with self.lock:
            if self.matrix is None:
                from sklearn.feature_extraction.text import HashingVectorizer  # slow to import

                hashed = HashingVectorizer(
                    ngram_range=(2, 3),
                    n_features=2**20,
                    alternate_sign=False,
                    binary=True,
                    lowercase=False,  # it is already
                    token_pattern=_WORD,
                )
                self.matrix = hashed.transform(all_texts(self.out, _READ))
            return self.matrix
