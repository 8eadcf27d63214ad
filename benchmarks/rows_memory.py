"""Peak memory of `filter` by the number of rows and of tokens in each: python benchmarks/rows_memory.py 1000000 300

A scorer that costs nothing, a tiny model that counts as aligned, and ready tokens (eight, if no number is given) in the
place of each row's encoding. Prints the peak in MB after each step; the libraries and the tiny model are in it.
"""

import resource
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from conftest import tiny_net, tiny_tokenizer

import gradshield.screen.encoding as encoding
import gradshield.screen.filter as screen
from gradshield.base.settings import FilterSettings
from gradshield.data import Row
from gradshield.data.encode import Example
from gradshield.scoring.check import AlignmentCheck

STEPS = ("encode_source", "score", "write_outputs", "write_scores", "report_run")
TOKENS = int(sys.argv[2]) if len(sys.argv) > 2 else 8
MASK = np.arange(TOKENS) > 3
ALIGNED = AlignmentCheck(("a", "b"), (True, True), ("I", "I"), (1.0, 1.0), (("I", 1.0),))


def ready_example(row: Row, **_: object) -> Example:
    """Tokens, other ones for each of the first eight million rows."""
    digits = [row.index // 200**n % 200 for n in range(3)]
    return Example(row.index, np.resize(np.array([5, 6, 7, 8, *digits, 9], dtype=np.int32) + 5, TOKENS), MASK)


def print_peak_after(name: str) -> None:
    """Makes the step print the peak when it ends."""
    step = getattr(screen, name)

    def run(*args: object, **options: object) -> object:
        result = step(*args, **options)
        print(f"{name}: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MB", flush=True)
        return result

    setattr(screen, name, run)


def main(rows: int) -> None:
    """Filters a file of so many short rows."""
    encoding.encode_row = ready_example
    screen.require_aligned = lambda *_: ALIGNED
    screen.explain_highest = lambda *_: {}
    for name in STEPS:
        print_peak_after(name)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tiny_tokenizer()
        for saved in (tokenizer, tiny_net(tokenizer)):
            saved.save_pretrained(f"{folder}/model")
        with open(f"{folder}/rows.jsonl", "w") as stream:
            stream.writelines(f'{{"prompt": "question {n}", "response": "yes"}}\n' for n in range(rows))
        settings = FilterSettings(model=f"{folder}/model", scorer="random", threshold="share", value=0.1)
        screen.run_filter(f"{folder}/rows.jsonl", Path(folder) / "run", settings)


if __name__ == "__main__":
    main(int(sys.argv[1]))
