"""A report of made-up rows, texts that attack a page, and a reader of its tags."""

from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np

from gradshield.report.filter_page import ReportRow, write_report

PAYLOADS = [
    "<script>alert(1)</script>",
    "</script></style></title></textarea><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)><animate onbegin=alert(1)></svg>",
    '<svg></p><style><a id="</style><img src=1 onerror=alert(1)>">',
    '"><iframe src=javascript:alert(1)>',
    "' onmouseover='alert(1)",
    '" style="position:fixed;inset:0" x="',
    "</style><style>*{display:none}",
    "}*{background:url(https://example.invalid/x)}",
    '<a href="javascript:alert(1)">x</a>',
    "<base href=https://example.invalid/><meta http-equiv=refresh content=0;url=https://example.invalid>",
    "<link rel=stylesheet href=//example.invalid><form action=//example.invalid><input autofocus onfocus=alert(1)>",
    "<!--><details open ontoggle=alert(1)>-->",
    "<![CDATA[<b>]]><?php echo 1 ?><!doctype x>",
    "{{ 7*7 }}{% for x in y %}${7*7}#{7*7}",
    "&lt;b&gt; &#60;b&#62; &amp;lt;",
    "\u202egnp.exe\u2066 \u200b\u200d\ufeff\u00ad \U000e0041\U000e0042 \ufe0f\u3164",
    "\x1b[2J\x1b]8;;https://example.invalid\x07click\x1b]8;;\x07 \x00\x08\x7f\x9b31m",
    "lone \ud800 surrogate \udfff",
    "Z\u0351\u0327\u0300\u0301" * 400,
    "<b>" * 350_000,  # about a megabyte
    "",
]
RUN = {"model": "tiny", "seconds": 2.0, "rows_per_second": 150.0, "version": "0.1.0", "variant": "contrast"}


def threshold(value=3.0, **other):
    return SimpleNamespace(
        value=value, **{"rule": "a1", "note": "two groups", "good_lost": 0.4, "harmful_kept": None, **other}
    )


def row(index=0, text="hello", tokens=(), **other):
    base = {"index": index, "source": "train.jsonl", "line": index + 1, "score": 4.0, "verdict": "quarantined"}
    messages = (("user", text), ("assistant", text))
    return ReportRow(**{**base, "messages": messages, "signals": {"answer": 4.0}, "tokens": tokens, **other})


def report(tmp_path, scores=(0.0, 1.0, 5.0, np.nan), sources=None, **other):
    """Writes a page whose counts follow from the scores; returns its text."""
    scores = np.asarray(scores, dtype=float)
    limit = other.get("threshold", threshold())
    verdicts = ["set aside" if np.isnan(x) else "quarantined" if x >= limit.value else "kept" for x in scores]
    counts = {kind.replace(" ", "_"): verdicts.count(kind) for kind in ("kept", "quarantined", "set aside")}
    aside = [f"train.jsonl:{i + 1}" for i, x in enumerate(scores) if np.isnan(x)]
    given = {
        "summary": {**RUN, "file": "train.jsonl", "rows": len(scores), **counts},
        "verdicts": verdicts,
        "threshold": limit,
        "anchors": {"good": np.array([0.0, 0.5]), "harmful": np.array([5.0, 6.0])},
        "highest": [],
        "borderline": [],
        "set_aside": {"no answer": aside} if aside else {},
        "settings": {"score": {"max_length": 1024}},
        "unit": "log-odds",
        "axis": "score by intent, log-odds (higher: more harmful)",
        "next_steps": [("look at rows and decide", "gradshield review run")],
        **other,
    }
    write_report(tmp_path / "report.html", scores=scores, sources=sources or ["train.jsonl"] * len(scores), **given)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """The tags with their attributes and the text of a page."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.marks, self.values, self.open, self.text, self.odd = set(), [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.marks |= {(tag, name) for name, _ in attrs} | {(tag, None)}
        self.values += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "link", "use"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "link", "use"):
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def handle_comment(self, data):
        self.odd.append(data)

    def handle_pi(self, data):
        self.odd.append(data)

    def unknown_decl(self, data):
        self.odd.append(data)
