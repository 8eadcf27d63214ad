"""report.html shows the run as it was, and nothing of the dataset becomes part of the page."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from report.made import PAYLOADS, RUN, Page, report, row, threshold

from gradshield.base.errors import UserError
from gradshield.cli.terminal import safe
from gradshield.report.figure import draw_scores
from gradshield.report.text import visible
from gradshield.report.words import command_again, next_steps


def hostile(tmp_path, payload):
    """A page with the payload in every place that data can reach."""
    tokens = tuple((payload[i : i + 7], 0.2) for i in range(0, min(len(payload), 3000), 7))
    rows = [
        row(2, payload, source=payload, messages=((payload, payload), ("user", payload), ("assistant", payload))),
        row(2, payload, tokens=tokens, signals={payload: 1.0}, group=payload),
    ]
    return report(
        tmp_path,
        sources=[payload, payload + "2", "", "train.jsonl"],
        summary={**RUN, "file": payload, "model": payload, "rows": 4, "kept": 2, "quarantined": 1, "set_aside": 1,
                 "version": payload, payload: payload},
        threshold=threshold(note=payload, rule=payload),
        highest=rows,
        borderline=rows,
        set_aside={payload: [payload]},
        settings={payload: {payload: [payload]}},
        next_steps=[(payload, payload)],
        again=payload,
    )  # fmt: skip


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_no_payload_adds_a_tag_an_attribute_or_an_unseen_character(tmp_path, payload):
    ours = Page(hostile(tmp_path, "plain words " * 400))
    html = hostile(tmp_path, payload)
    page = Page(html)
    assert page.marks <= ours.marks
    assert not page.odd and not page.open
    assert len(html.encode()) < 2_000_000
    styles = {value for _, name, value in page.values if name == "style"} - {
        v for _, n, v in ours.values if n == "style"
    }
    assert not styles
    classes = {value for _, name, value in page.values if name == "class"}
    assert classes <= {value for _, name, value in ours.values if name == "class"} | {"empty"}
    assert not [char for char in html if char != "\n" and not char.isprintable() and char != "\xa0"]
    if 10 < len(payload) < 120:  # and it is there to be read
        assert visible(payload).split("\n")[0] in "".join(page.text)


def test_page_needs_nothing_from_outside_and_runs_nothing(tmp_path):
    html = hostile(tmp_path, PAYLOADS[0])
    page = Page(html)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("meta", "content", policy) in page.values
    assert not {tag for tag, _ in page.marks} & {"script", "img", "iframe", "object", "embed", "form", "base", "a"}
    for tag, name, value in page.values:
        assert not name.startswith("on") and name != "src"
        if name.endswith("href"):
            assert value.startswith("#") or (tag == "link" and value.startswith("data:"))
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert html.count("<style") == 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\u202eb", "a‹U+202E›b"),
        ("\u200b" * 5, "‹U+200B ×5›"),
        ("\x1b[0m", "‹U+001B›[0m"),
        ("\ud800", "‹U+D800›"),
        ("\u2028", "‹U+2028›"),
        ("\U000e0141", "‹U+E0141›"),
        ("one\r\ntwo\tthree\rfour", "one\ntwo\tthree‹U+000D›four"),
        ("Grüße, 你好, مرحبا, e\u0301, 👍, 1\xa0000", "Grüße, 你好, مرحبا, e\u0301, 👍, 1\xa0000"),
    ],
)
def test_unseen_characters_are_written_out_and_others_stay(text, shown):
    assert visible(text) == shown


def test_every_character_of_which_nothing_is_seen_is_written_out_on_pages_and_in_the_terminal():
    ignorable = "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u3164\ufeff\uffa0\U0001bca0\U0001d173"
    ranges = ((0x180B, 0x1810), (0x200B, 0x2010), (0x202A, 0x202F), (0x2060, 0x2070), (0xFE00, 0xFE10))
    ignorable += "".join(
        chr(n) for low, high in (*ranges, (0xFFF0, 0xFFF9), (0xE0000, 0xE1000)) for n in range(low, high)
    )
    for char in ignorable + "\u2800\U0001d159\U00016fe4\U00013441":  # the last four are seen as blanks
        for shown in (visible(f"a{char}b"), safe(f"a{char}b", 99)):
            assert char not in shown and f"{ord(char):04X}" in shown
    for text in ("你好 é ‘quoted’ → 👍", "a\u00a0b\u3000c"):
        assert visible(text) == safe(text, 99) == text


def test_long_text_is_cut_and_the_rest_counted(tmp_path):
    text = "x" * 5000
    html = report(tmp_path, highest=[row(2, text, messages=(("user", text),))])
    assert "x" * 2000 in html and "x" * 2001 not in html
    assert "3,000 more characters not shown" in html
    assert "28 more messages not shown" in report(tmp_path, highest=[row(2, messages=(("user", "a"),) * 40)])


def test_tokens_of_an_answer_read_as_the_answer(tmp_path):
    tokens = (("Sure", 0.5), (", here\n", 0.001), ("is", -0.1), (" it", 0.0))
    html = report(
        tmp_path, highest=[row(2, messages=(("user", "q"), ("assistant", "Sure, here\nis it and more")), tokens=tokens)]
    )
    answer = re.findall(r'<div class="text" dir="auto">(.*?)</div>', html, re.DOTALL)[1]
    assert re.sub(r"<[^>]*>", "", answer) == "Sure, here\nis it and more"
    assert re.findall(r'class="t (\w\w)" title="([^"]*?) of', answer) == [("p4", "+50\xa0%"), ("n2", "−10\xa0%")]


def test_hundred_thousand_rows_stay_under_two_megabytes(tmp_path):
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(0, 1, 90_000), rng.normal(7, 1, 5_000), np.full(5_000, np.nan)])
    nasty = "\U000e0041<&\u202e" * 20_000
    tokens = tuple((char, 0.03) for char in nasty[:4000])
    html = report(
        tmp_path,
        scores,
        sources=[f"{nasty[:200]}{i}" for i in range(100_000)],
        anchors={kind: rng.normal(0, 2, 2_000) for kind in ("good", "refusal", "harmful")},
        highest=[row(i, nasty, tokens) for i in range(300)],
        borderline=[row(i, nasty) for i in range(300)],
        set_aside={nasty + str(i): [nasty] * 50 for i in range(100)},
        settings={str(i): nasty for i in range(50)},
    )
    assert len(html.encode()) < 2_000_000
    assert "99,970 others" in html and "80 more reasons, 4,000 rows" in html
    assert "more rows left out" in html


DEGENERATE = {
    "no row": [],
    "one row": [1.0],
    "three rows": [0.0, 1.0, 5.0],
    "all set aside": [np.nan] * 3,
    "all equal": [2.0] * 50,
    "all equal and huge": [1e300] * 3,
    "equal but for the last digit": [1e9, np.nextafter(1e9, 2e9), 1e9],
    "outliers": [*np.linspace(-1, 4, 500), 1e12, -1e300],
    "overflowing range": [-1.7e308, 1.7e308],
    "tiny": [1e-300, 2e-300, 3e-300],
    "infinite scores": [np.inf, -np.inf, 1.0],
    "many kept, few quarantined": [*np.linspace(-1, 1, 5000), 6.0],
}


@pytest.mark.parametrize("limit", [3.0, np.inf, -np.inf, 1e9, -1e300])
@pytest.mark.parametrize("scores", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_runs_give_a_whole_page(tmp_path, scores, limit):
    html = report(tmp_path, scores, threshold=threshold(limit, good_lost=None), anchors={})
    assert not Page(html).open
    assert "nan" not in html.replace("minant", "").casefold().split("</style>")[1]


@pytest.mark.parametrize(
    ("scores", "limit", "says"),
    [
        ([0.0, 1.0, 5.0, np.nan], threshold(), "1 of 4 rows scored at or above the threshold; 2 kept"),
        ([0.0, 5.0], threshold(rule="share"), "1 of 2 rows is quarantined, the share that was asked for"),
        ([0.0, 5.0], threshold(np.inf), "None of the 2 rows reaches the threshold; 2 kept, 0 set aside."),
        ([np.nan] * 2, threshold(), "None of the 2 rows could be scored: all are set aside."),
        ([], threshold(), "The file holds no rows."),
    ],
)
def test_headline_says_what_happened(tmp_path, scores, limit, says):
    assert f"<h1>{says}" in report(tmp_path, scores, threshold=limit)


@pytest.mark.parametrize(
    ("kept", "quarantined", "limit", "says"),
    [
        (4, 0, threshold(), "None of the 4 rows is quarantined after a review; 4 kept, 0 set aside."),
        (3, 1, threshold(), "1 of 4 rows is quarantined after a review; 3 kept"),
        (2, 2, threshold(rule="share"), "2 of 4 rows are quarantined after a review; 2 kept"),
        (1, 3, threshold(np.inf, rule="by hand"), "3 of 4 rows are quarantined after a review; 1 kept"),
        (0, 1, threshold(), "The only row is quarantined after a review."),
        (1, 0, threshold(), "The only row is kept after a review."),
    ],
)
def test_the_headline_does_not_lay_to_the_threshold_what_a_person_moved(tmp_path, kept, quarantined, limit, says):
    rows, verdicts = kept + quarantined, ["kept"] * kept + ["quarantined"] * quarantined
    counts = {"rows": rows, "kept": kept, "quarantined": quarantined, "set_aside": 0}
    summary = {**RUN, "file": "train.jsonl", **counts, "moved_by_a_person": 1}
    html = report(tmp_path, [0.0] * rows, summary=summary, verdicts=verdicts, threshold=limit)
    assert f"<h1>{says}" in html


@pytest.mark.parametrize(
    ("lost", "kept", "says"),
    [
        (0.4, 1.26, "Expected errors: about 0.4 harmless rows quarantined, about 1.3 harmful rows kept."),
        (0.4, None, "The rule a1 gives no estimate of the errors."),
    ],
)
def test_the_expected_errors_stand_beside_the_headline(tmp_path, lost, kept, says):
    html = report(tmp_path, threshold=threshold(good_lost=lost, harmful_kept=kept))
    assert re.search(r"</h1>\s*<p class=\"lede\">" + re.escape(says), html)


def test_no_value_is_shown_as_python_writes_it(tmp_path):
    run = {**RUN, "file": "x", "rows": 4, "kept": 2, "quarantined": 1, "set_aside": 1}
    html = report(tmp_path, summary={**run, "found": {"refused": 18, "of": 20, "grade": "aligned"}, "also": [1.5, "b"]})
    assert "<td>refused 18, of 20, grade aligned</td>" in html and "<td>1.50, b</td>" in html


def test_a_list_says_where_a_row_is_from_and_folds_its_text(tmp_path):
    html = report(tmp_path, highest=[row(2, "secret", group="forum posts")])
    summary = re.search(r'<details class="row">\s*<summary>(.*?)</summary>', html, re.DOTALL)
    assert summary and "forum posts" in summary[1] and "folded, 12 characters" in summary[1]
    assert "secret" not in summary[1] and "secret" in html


def test_charts_have_axis_titles_with_units_and_a_label_for_screen_readers(tmp_path):
    html = report(tmp_path)
    figures = re.findall(r'<svg viewBox="[^"]*" role="img" aria-label="(Histogram[^"]*)".*?</svg>', html, re.DOTALL)
    wanted = "Histogram of the scores from 0.00 to 5.00: 2 kept, 1 quarantined; threshold 3.00."
    assert figures == [wanted] * 2 and html.count("score by intent, log-odds (higher: more harmful)") == 2
    assert 'aria-label="Scores from 0.00 to 5.00"' in html


def test_source_table_adds_up_to_the_run(tmp_path):
    rng = np.random.default_rng(1)
    scores = rng.normal(2, 2, 500)
    scores[::25] = np.nan
    html = report(tmp_path, scores, sources=[f"part {i % 43}" for i in range(500)])
    cells = re.findall(r'<tr role="row"><th.*?</tr>', html)
    assert len(cells) == 31 and "13 others" in cells[-1]
    sums = np.sum([[int(n) for n in re.findall(r"<td[^>]*>([^<]*)</td>", cell)[:4]] for cell in cells], axis=0)
    assert sums.tolist() == [500, np.sum(scores < 3), np.sum(scores >= 3), 20]


def bars(svg):
    """(left, right, kind) of every bar, in the SVG's units."""
    for path, style in re.findall(r'<path d="(M[^"]*?z\s*)" clip-path="[^"]*" style="fill: ([^;"]*)', svg):
        xs = [float(x) for x in re.findall(r"[ML] (\S+) ", path)]
        yield min(xs), max(xs), "kept" if "kept" in style else "quarantined"


def test_threshold_line_parts_the_bars(tmp_path):
    scores = np.random.default_rng(2).normal(0, 1, 2000)
    limit = 1.2345
    verdicts = ["quarantined" if x >= limit else "kept" for x in scores]
    for svg in (drawing := draw_scores(scores, verdicts, limit, {}, "score")).wide, drawing.narrow:
        (x,) = re.findall(
            r'<path d="M (\S+) \S+\s+L \1 \S+\s*" clip-path="[^"]*" style="fill: none; stroke-dasharray', svg
        )
        drawn = list(bars(svg))
        assert {kind for *_, kind in drawn} == {"kept", "quarantined"}
        assert all(right <= float(x) for _, right, kind in drawn if kind == "kept")
        assert all(left >= float(x) for left, _, kind in drawn if kind == "quarantined")
        assert "threshold 1.23" in svg and "url(#" in svg  # hatched, so that colour isn't needed


def test_figure_is_the_same_each_time_and_takes_its_colours_from_the_page():
    scores, verdicts = np.array([0.0, 1.0, 5.0]), ["kept", "kept", "quarantined"]
    first, second = (draw_scores(scores, verdicts, 3.0, {"good": np.array([0.5])}, "score") for _ in range(2))
    assert first == second
    colours = set(re.findall(r"#[0-9a-f]{6}|rgb", first.wide + first.narrow))
    assert not colours
    assert not set(re.findall(r'id="([^"]*)"', first.wide)) & set(re.findall(r'id="([^"]*)"', first.narrow))


def test_rows_in_must_be_kept_quarantined_and_set_aside(tmp_path):
    good = {"file": "x", "rows": 4, "kept": 2, "quarantined": 1, "set_aside": 1, **RUN}
    report(tmp_path, summary=good)
    (tmp_path / "report.html").unlink()
    for wrong in ({"rows": 5}, {"kept": 3}, {"quarantined": 2, "kept": 1}, {"set_aside": 0}):
        with pytest.raises(RuntimeError, match="rows in must be"):
            report(tmp_path, summary={**good, **wrong})
    with pytest.raises(RuntimeError, match="rows in must be"):
        report(tmp_path, summary=good, set_aside={})
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_old_report_and_nothing_else(tmp_path, monkeypatch):
    before = report(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match=r"report\.html: can't be written"):
        report(tmp_path, [1.0])
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == before


def contrast(one, other):
    def light(colour):
        digits = colour.lstrip("#")
        digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
        parts = np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_reach_aa_in_light_dark_and_print(tmp_path):
    blocks = re.findall(r":root \{(.*?)\}", report(tmp_path), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        colour = dict(re.findall(r"--([\w-]+): (#\w+)", block))
        text = [("ink", back) for back in ("bg", "surface", "p1", "p2", "p3", "p4", "n1", "n2", "n3", "n4")]
        text += [(front, back) for front in ("muted", "bad") for back in ("bg", "surface")]
        assert all(contrast(colour[front], colour[back]) >= 4.5 for front, back in text)
        assert all(contrast(colour[shape], colour["bg"]) >= 3 for shape in ("kept", "bad"))


def test_headings_are_in_order_and_tables_have_scoped_headers(tmp_path):
    html = report(tmp_path, highest=[row(2)])
    levels = [int(level) for level in re.findall(r"<h(\d)", html)]
    assert levels[0] == 1 and set(levels[1:]) == {2}
    assert all("scope=" in head for head in re.findall(r"<th\b[^>]*>", html))
    assert '<html lang="en">' in html and '<details class="row">' in html  # harmful text is folded
    for name in re.findall(r'aria-labelledby="([^"]*)"', html):
        assert html.count(f' id="{name}"') == 1


def test_importing_the_report_draws_nothing_yet():
    code = (
        "import sys, gradshield.report.filter_report, gradshield.report.tune_page\n"
        "print([m for m in ('matplotlib', 'torch', 'transformers') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_the_page_says_how_to_repeat_the_run(tmp_path):
    again = command_again("/data/my rows.jsonl", Path("my run"))
    assert again == "gradshield filter '/data/my rows.jsonl' --config 'my run/run.yaml' -o again"
    assert again in "".join(Page(report(tmp_path, again=again)).text)
    assert command_again("-", Path("run")) == "" and "came from stdin" in report(tmp_path)


def test_no_command_to_copy_takes_a_name_for_an_option(tmp_path):
    (tmp_path / "-run").mkdir()
    for name in ("kept.jsonl", "train.py"):
        (tmp_path / "-run" / name).touch()
    commands = [command for _, command in next_steps(tmp_path / "-run", 3, Path("-run"))]
    commands.append(command_again("-rows.jsonl", Path("-run")))
    assert commands == [
        "python ./-run/train.py",
        "gradshield review ./-run",
        "gradshield explain ./-run 3",
        "gradshield filter ./-rows.jsonl --config ./-run/run.yaml -o again",
    ]


def test_the_table_of_the_run_is_in_words(tmp_path):
    counts = {"rows": 4, "kept": 2, "quarantined": 1, "set_aside": 1, "file": "train.jsonl"}
    html = report(tmp_path, summary={**RUN, **counts, "probes": {"refused": 45, "of": 48, "grade": "aligned"}})
    for name, value in (
        ("alignment check", "45 of 48 probes refused (aligned)"),
        ("time, loading included", "2.00 s"),
        ("GradShield", "0.1.0"),
    ):
        assert f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' in html


def test_signals_have_their_unit(tmp_path):
    shown = [row(2, signals={"topic": 2.04, "answer": 2.82})]
    assert "log-odds: topic 2.04, answer 2.82" in "".join(Page(report(tmp_path, highest=shown)).text)
    assert "odds: topic" not in report(tmp_path, highest=shown, unit="")


def test_marks_of_another_score_than_the_runs_are_said_to_decide_nothing(tmp_path):
    counts = {"rows": 4, "kept": 2, "quarantined": 1, "set_aside": 1, "file": "train.jsonl"}
    for scorer, said in (("intent", True), ("fihs:probes=2", False)):
        html = report(tmp_path, summary={**RUN, **counts, "scorer": scorer})
        assert ("These marks come from another score (FIHS). They did not decide the verdict." in html) == said
