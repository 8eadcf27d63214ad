"""What scoring costs beside a forward pass, one epoch of LoRA and the peers (issue: the benchmark first).

`make bench`, or `python -m benchmarks run` in the repository's root; see docs/performance.md. Not part of the package.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")  # the peers' bars; ours are lines
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
