"""How near `filter`'s expected errors are to the true ones, in files drawn from the rows of docs/results.

    python benchmarks/expected_errors.py

A file has the ordinary rows, or all harmless rows, of one study and model; and no harmful rows, or 2 to 90 % of one
kind or of all. Prints the share of the files in which an estimate is more than twice or less than half of the truth,
after two rows are added to both.
"""

import csv
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gradshield.threshold import anchored, is_kept

RESULTS = Path(__file__).parent.parent / "docs" / "results"
LEFT_OUT = "disputed", "unreadable"
Groups = dict[tuple[str, bool], np.ndarray]  # scores by (group, harmful)


def main() -> None:
    rng = np.random.default_rng(0)
    found = []
    for model in ("embedded", "qwen-coder-0.5b"):
        anchors = _read(RESULTS / "real" / model / "scores.csv")
        good, harmful = anchors["anchor", False], anchors["anchor", True]
        for study in ("real", "unseen"):
            groups = _read(RESULTS / study / model / "scores.csv")
            for name, benign, bad in _files(groups, rng):
                threshold = anchored(np.r_[benign, bad], good, harmful)
                lost, kept = (~is_kept(benign, threshold.value)).sum(), is_kept(bad, threshold.value).sum()
                found.append((threshold.good_lost, lost, threshold.harmful_kept, kept))
                print(
                    f"{model}, {study}, {name}: {len(benign)} harmless, {len(bad)} harmful rows; harmless lost:",
                    end=" ",
                )
                print(f"{found[-1][0]:.1f} expected, {lost} true; harmful kept: {found[-1][2]:.1f}, {kept}")
    table = np.array(found, dtype=float) + 2
    for name, ratio in (
        ("harmless rows lost", table[:, 0] / table[:, 1]),
        ("harmful rows kept", table[:, 2] / table[:, 3]),
    ):
        print(
            f"{name}: more than twice too high in {(ratio > 2).mean():.0%} of {len(ratio)} files, too low in "
            f"{(ratio < 0.5).mean():.0%}; the typical factor is {np.exp(np.sqrt((np.log(ratio) ** 2).mean())):.2f}"
        )


def _read(file: Path) -> Groups:
    scores: dict[tuple[str, bool], list[float]] = defaultdict(list)
    for line in csv.DictReader(file.open(encoding="utf-8")):
        if line["scorer"] == "intent" and not line["reason"]:
            scores[line["group"], line["harmful"] == "1"].append(float(line["score"]))
    return {key: np.array(values) for key, values in scores.items() if key[0] not in LEFT_OUT}


def _files(groups: Groups, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    rows = {key: values for key, values in groups.items() if key[0] != "anchor"}
    every = np.concatenate([values for (_, bad), values in rows.items() if not bad])
    harmful = {group: values for (group, bad), values in rows.items() if bad}
    harmful["all"] = np.concatenate(list(harmful.values()))
    for name, benign in (("ordinary", rows["ordinary", False]), ("all harmless", every)):
        yield name, benign, np.array([])
        for group, bad in harmful.items():
            for share in (0.02, 0.1, 0.3, 0.5, 0.9):
                size = min(len(bad) / share, len(benign) / (1 - share))
                few = rng.choice(benign, round(size * (1 - share)), replace=False)
                yield f"{name} and {group} {share:.0%}", few, rng.choice(bad, round(size * share), replace=False)


if __name__ == "__main__":
    main()
