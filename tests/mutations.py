"""Breaks the source on purpose, one edit at a time, and prints the edits that no test notices: python tests/mutations.py

Each edit is made in a temporary copy of the tree, where the tests named with it must fail. Exit code 1: an edit survived,
its text is gone from the source, or its tests fail without it. Arguments choose edits by a part of their file's path.
"""

# ruff: noqa: E501

import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECONDS = 600  # an edit that makes the tests hang is noticed
THRESHOLD = ["tests/test_threshold.py", "--noconftest"]
SEARCH = ["tests/tune/test_search.py", "--noconftest"]
SIGN = ["tests/scoring/test_safety_score.py"]
REFUSAL = ["tests/models/test_refusal.py"]
ASR = ["tests/evaluation/test_evaluate.py", "-k", "asr_is_the_share"]
INTENT = [
    "tests/scoring/test_intent.py",
    "-k",
    "surer or worst or wherever or earlier_turn or since_the_one or running_means",
]
READ = ["tests/scoring/test_intent.py", "-k", "unit_vectors or computed_once"]
KERNEL = ["tests/scoring/test_kernel.py"]
FITTED = ["tests/scoring/test_intent.py", "-k", "raw_states"]
LAYERS = ["tests/scoring/test_intent.py", "-k", "middle"]
MASK = ["tests/data/test_encode.py", "-k", "cut_is_on_the_right or loss_on_and_weight or special_tokens_once"]
WRITE = ["tests/data/test_write.py", "-k", "partition or too_few or set_aside_rows"]
VERDICTS = ["tests/screen/test_filter.py", "-k", "rows_in_are and fihs:probes"]
CHECK = ["tests/scoring/test_check.py"]
INPUTS = ["tests/scoring/test_inputs.py"]
DEFAULT = ["tests/screen/test_default.py"]

EDITS = [  # (file below src/gradshield, old text, new text, tests)
    ("scoring/fihs/probe.py", 'for word in ("I", "Sure"):', 'for word in ("Sure", "I"):', SIGN),
    ("scoring/fihs/probe.py", "return safe, unsafe", "return unsafe, safe", SIGN),
    ("scoring/fihs/probe.py", "list(safe)].logsumexp(-1) -", "list(safe)].logsumexp(-1) +", SIGN),
    ("scoring/fihs/probe.py", "(refusing > 0.05)", "(refusing > 0.5)", SIGN),
    ("scoring/fihs/probe.py", "(complying > 0.01)", "(complying > 0.1)", SIGN),
    ("scoring/fihs/probe.py", "out / len(requests)", "-out / len(requests)", SIGN),
    ("scoring/fihs/probe.py", "out / len(requests)", "out", SIGN),
    ("scoring/fihs/scorer.py", '"score": columns[variant]', '"score": -columns[variant]', SIGN),
    ("scoring/fihs/contraction.py", "return Contraction(table(dot) * share,", "return Contraction(table(dot),", SIGN),
    ("models/batching.py", "positions.append(where - 1)", "positions.append(where)", SIGN),
    ("scoring/intent/language.py", "known >= MIN_KNOWN_WORDS", "known >= 0", ["tests/scoring/test_language.py"]),
    ("scoring/check.py", "ALIGNED, WEAK = 0.7, 0.4", "ALIGNED, WEAK = 0.8, 0.4", CHECK),
    ("scoring/check.py", "ALIGNED, WEAK = 0.7, 0.4", "ALIGNED, WEAK = 0.7, 0.3", CHECK),
    ("scoring/inputs.py", "calls[number] > taken[batch[0]][number]", "calls[number] > 0", INPUTS),
    ("scoring/inputs.py", "x[counted.to(x.device)].float()", "x.flatten(0, 1).float()", INPUTS),
    ("threshold.py", "ANCHORS_COUNT = 50 ", "ANCHORS_COUNT = 500 ", THRESHOLD),
    ("threshold.py", "np.quantile(good, 0.95)", "np.quantile(good, 0.90)", THRESHOLD),
    ("threshold.py", "np.quantile(harmful, 0.05)", "np.quantile(harmful, 0.40)", THRESHOLD),
    ("threshold.py", "(upper + lower) / 2", "lower", THRESHOLD),
    ("threshold.py", "clear, lost, missed)", "clear, 0.0, missed)", THRESHOLD),
    ("threshold.py", "clear, lost, missed)", "clear, lost, 0.0)", THRESHOLD),
    ("threshold.py", "if rise(0) <= 0", "if rise(0) <= 1e9", THRESHOLD),
    ("threshold.py", "root_scalar(rise, bracket=(0, 1)).root", "0.5", THRESHOLD),
    ("threshold.py", "steeper * slope * (scores - crossing - moved)", "slope * (scores - crossing - moved)", THRESHOLD),
    ("threshold.py", "moved = (means - known).mean()", "moved = 0.0", THRESHOLD),
    ("threshold.py", "clear = above > 0 and near", "clear = True or near", THRESHOLD),
    ("threshold.py", "clear = above > 0 and near <= max(1, 0.02", "clear = above > 0 and near <= max(1, 0.03", THRESHOLD),
    ("threshold.py", "margin = 0.25 *", "margin = 0.5 *", THRESHOLD),
    ("threshold.py", "if gain > alpha and", "if gain > 10 and", THRESHOLD),
    ("threshold.py", "sum() - one", "sum() + one", THRESHOLD),
    ("threshold.py", "value = min(finite[labels == 0]", "value = max(finite[labels == 0]", THRESHOLD),
    ("threshold.py", "value = mean + 2 * spread", "value = mean + 3 * spread", THRESHOLD),
    ("threshold.py", "tol=1e-6", "tol=1e-3", THRESHOLD),
    ("threshold.py", ', fit(init_params="random_from_data", n_init=10)]', "]", THRESHOLD),
    ("threshold.py", "smaller < OUTLIERS * len(finite)", "smaller > len(finite)", THRESHOLD),
    ("threshold.py", "len(finite) < FEW_ROWS", "len(finite) <= FEW_ROWS", THRESHOLD),
    ("threshold.py", "above > len(finite) / 2", "above > len(finite)", THRESHOLD),
    ("threshold.py", "finite[len(finite) - count]", "finite[len(finite) - count - 1]", THRESHOLD),
    ("tune/search.py", "above > 0 and sure and not", "above > 0 and sure or not", SEARCH),
    ("tune/search.py", "<= step * np.isfinite", "< step * np.isfinite", SEARCH),
    ("tune/search.py", "sure = guess.clear or above >", "sure = above >", SEARCH),
    ("tune/search.py", "lost + 3 * sqrt", "lost + 6 * sqrt", SEARCH),
    ("tune/search.py", "np.searchsorted(ordered, t))", 'np.searchsorted(ordered, t, "right"))', SEARCH),
    ("tune/search.py", "if literal else below_t", "if literal else value <= t", SEARCH),
    ("tune/search.py", "(below, up, number + 1) if trial.safe else", "(below, up, number + 1) if not trial.safe else", SEARCH),
    ("tune/search.py", "if trial.safe and trial.useful:", "if trial.safe:", SEARCH),
    ("tune/search.py", "floor(lo * (1 - step) + up * step)", "lo", SEARCH),
    ("tune/search.py", "ceil(up * (1 - step) + lo * step)", "up", SEARCH),
    ("tune/search.py", "if number == max_searches:", "if number > max_searches:", SEARCH),
    ("tune/search.py", "key=lambda t: (t.asr, -t.kept)", "key=lambda t: (-t.asr, -t.kept)", SEARCH),
    ("models/refusal.py", '"not willing to", "not going to",', '"not willing to",', REFUSAL),
    ("models/refusal.py", '"i can\'t", ', "", REFUSAL),
    ("models/refusal.py", 'answer.lower().replace("’", "\'")', "answer.lower()", REFUSAL),
    ("models/refusal.py", "answer.lower()", "answer", REFUSAL),
    ("evaluation/safety.py", "complied = len(refused) - sum(refused)", "complied = sum(refused)", ASR),
    ("evaluation/safety.py", "complied / len(refused) if", "complied / (len(refused) + 1) if", ASR),
    ("evaluation/safety.py", "z2 / (4 * total * total)", "0", ASR),
    ("evaluation/evaluate.py", "over_refusal=sum(refused) / len(scary)", "over_refusal=1 - sum(refused) / len(scary)", ASR),
    ("scoring/intent/reading.py", "LATER_WINDOW_PENALTY = 1.0", "LATER_WINDOW_PENALTY = 0.0", INTENT),
    ("scoring/intent/fit.py", "mean[-1] - middle @ weight", "mean[-1]", FITTED),
    ("scoring/intent/fit.py", "mean[:-1] / scale[:, None]", "mean[:-1]", FITTED),
    ("scoring/intent/reading.py", "DEPTH = 0.5", "DEPTH = 0.4", LAYERS),
    ("scoring/intent/reading.py", "each.append((min(topic, answer)", "each.append((max(topic, answer)", INTENT),
    ("scoring/intent/reading.py", "return max(each)", "return min(each)", INTENT),
    ("scoring/intent/reading.py", "if answer > 0:", "if answer > -99:", INTENT),
    ("scoring/intent/reading.py", "before = max(before, asked, said)", "before = max(before, asked)", INTENT),
    ("scoring/intent/reading.py", "before = max(before, asked, said)", "before = max(before, said)", INTENT),
    ("scoring/intent/reading.py", "running_mean(tokens[response.context, 0], CONTEXT_WINDOW).max()", "running_mean(tokens[response.context, 0], CONTEXT_WINDOW)[-1]", INTENT),
    ("scoring/intent/reading.py", "(asked + float(kernel)) / 2", "asked", INTENT),
    ("scoring/intent/reading.py", "(asked + float(kernel)) / 2", "float(kernel)", INTENT),
    ("scoring/intent/reading.py", "n * len(rest[0]) + at - shared", "n * len(rest[0]) + at", READ),
    ("scoring/intent/kernel.py", "torch.exp(-GAMMA", "torch.exp(GAMMA", KERNEL),
    ("scoring/intent/kernel.py", "[*range(0, last, STRIDE), last]", "[*range(0, last, STRIDE)]", KERNEL),
    ("scoring/intent/kernel.py", "+ kernel.bias", "", READ),
    ("scoring/intent/fit.py", "@ fits[n, :-1] + fits[n, -1]).max()", "@ fits[0, :-1] + fits[0, -1]).max()", KERNEL),
    ("scoring/intent/fit.py", "kind == \"good\" and (row.text.language or good % 2)", "kind == \"good\"", KERNEL),
    ("scoring/intent/fit.py", "middle=middle + scale * kernel.middle", "middle=middle", FITTED),
    ("scoring/intent/reading.py", "response.stop, 1], ANSWER_WINDOW)", "response.stop, 0], ANSWER_WINDOW)", INTENT),
    ("scoring/intent/reading.py", "(total[width:] - total[:-width]) / width", "(total[width:] - total[:-width])", INTENT),
    ("data/encode.py", "mask[:1] = False", "pass", MASK),
    ("data/encode.py", "mask[:max_length])", "mask[-max_length:])", MASK),
    ("threshold.py", "return scores < value", "return scores <= value", VERDICTS),
    ("screen/filter.py", 'np.concatenate([good, np.delete(own["score"], list(own.reasons))])', "good", DEFAULT),
    ("screen/filter.py", 'reference.anchors["good"], reference.anchors["refusal"]]', 'reference.anchors["good"]]', DEFAULT),
]  # fmt: skip


def passes(tree: Path, tests: list[str]) -> bool | None:
    """Whether the tests pass in the tree; None where they could not be run."""
    child = multiprocessing.get_context("fork").Process(target=_run, args=(tree, tests))
    child.start()
    child.join(SECONDS)
    if child.is_alive():
        child.kill()
        child.join()
        return False
    return {0: True, 1: False}.get(child.exitcode or 0)


def _run(tree: Path, tests: list[str]) -> None:
    """In a fork, which has the large libraries already and none of ours."""
    import pytest

    sys.dont_write_bytecode = True  # bytecode of another edit made in the same second would be taken for this one's
    os.chdir(tree)
    sys.path.insert(0, str(tree / "src"))
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not browser", *tests])
    os._exit(int(code))


def main(chosen: list[str]) -> int:
    """Makes the chosen edits, tells of each, and returns the exit code."""
    import peft  # noqa: F401
    import scipy.stats  # noqa: F401
    import sklearn.mixture  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    edits = [e for e in EDITS if not chosen or any(part in e[0] for part in chosen)]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "docs"))
        whole: list[list[str]] = []
        for *_, tests in edits:
            if tests not in whole:
                whole.append(tests)
        wrong = [f"fails without an edit: {' '.join(tests)}" for tests in whole if not passes(tree, tests)]
        for name, old, new, tests in edits if not wrong else []:
            file = tree / "src" / "gradshield" / name
            text = file.read_text(encoding="utf-8")
            if text.count(old) != 1:
                wrong.append(f"{name}: {old!r} is there {text.count(old)} times, not once")
                continue
            file.write_text(text.replace(old, new), encoding="utf-8")
            verdict = {True: "SURVIVED", False: "noticed", None: "tests did not run"}[passes(tree, tests)]
            file.write_text(text, encoding="utf-8")
            print(f"{verdict}: {name}: {old!r} -> {new!r}", flush=True)
            if verdict != "noticed":
                wrong.append(f"{verdict}: {name}: {old!r} -> {new!r}")
    print(f"{len(edits)} edits, {len(wrong)} problems", *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
