"""Explanations on a thread of their own: the model is loaded once, on the first request; results are kept on the disk.

The thread is a daemon, so that a server that is stopped stops at once, whatever is being computed.
"""

import sys
import threading
from pathlib import Path
from queue import SimpleQueue

from gradshield.base.errors import UserError
from gradshield.data.run_folder import SavedRun
from gradshield.report.text import visible
from gradshield.review.texts import row_of, save_explanation, saved_explanation
from gradshield.screen.explanation import Explanation


class Worker:
    """Explains the rows of one run one at a time, in the order of the requests."""

    def __init__(self, out: Path, saved: SavedRun) -> None:
        self.out, self.saved = out, saved
        # what an explanation follows from, besides the row
        self.key = f"{saved.model.fingerprint} {saved.versions['gradshield']}"
        self.waiting: set[int] = set()
        self.failed: dict[int, str] = {}
        self.loaded = False
        self.queue: SimpleQueue[int] = SimpleQueue()
        self.thread: threading.Thread | None = None
        self.lock = threading.Lock()

    def result(self, row: int) -> Explanation | None:
        """The explanation of the row if it was computed before."""
        return saved_explanation(self.out, row, self.key)

    def ask(self, row: int) -> None:
        """Queues the row for explanation, unless it is queued already."""
        with self.lock:
            if self.thread is None:
                self.thread = threading.Thread(target=self._work, daemon=True)
                self.thread.start()
            if row not in self.waiting:
                self.waiting.add(row)
                self.failed.pop(row, None)
                self.queue.put(row)

    def state(self, row: int) -> tuple[str, str]:
        """("waiting", what is being done), ("failed", why), ("done", "") or ("none", "")."""
        if row in self.waiting:
            return "waiting", "computing" if self.loaded else "loading the model"
        if row in self.failed:
            return "failed", self.failed[row]
        return ("done" if self.result(row) else "none"), ""

    def _work(self) -> None:
        explainer = None
        while True:
            row = self.queue.get()
            try:
                from gradshield.screen.explain import explain_row, open_explainer  # torch is slow to import

                explainer = explainer or open_explainer(self.saved)
                self.loaded = True
                found = row_of(self.out, row)
                if found is None:
                    raise UserError(f"there is no row {row}")
                save_explanation(self.out, row, self.key, explain_row(explainer, found))
            except UserError as error:
                self.failed[row] = str(error)
            except Exception as error:  # the page says so, and the server lives on
                self.failed[row] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                print(f"gradshield: row {row} could not be explained: {visible(self.failed[row])}", file=sys.stderr)
            self.waiting.discard(row)
