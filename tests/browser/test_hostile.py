"""Text from the dataset in every view of a real browser: nothing of it runs, and nothing asks anything of anybody."""

import json

import pytest
from report.made import PAYLOADS
from review.made import chat, make_run, write_jsonl

from gradshield.review import store
from gradshield.review.apply import apply_decisions

pytestmark = pytest.mark.browser

# What would be noticed if it ran: a mark on the window, an alert, a request, another title, a moved or hidden page.
MARKS = [
    "<script>window.ran = 1</script>",
    "<img src=/static/ran.png onerror='window.ran = 1'>",
    "<svg><script>window.ran = 1</script><animate onbegin='window.ran = 1' attributeName=x dur=1s>",
    "<iframe srcdoc='<script>parent.ran = 1</script>'></iframe>",
    "</textarea></title></style></script><script>window.ran = 1</script>",
    "<style>@import url(//outside.invalid/x.css); body { background: url(//outside.invalid/x.png) }</style>",
    "<link rel=stylesheet href=https://outside.invalid/y.css><img src=https://outside.invalid/y.png>",
    "<meta http-equiv=refresh content='0;url=https://outside.invalid/'><base href=https://outside.invalid/>",
    "<form action=https://outside.invalid/><button autofocus onfocus='window.ran = 1'>",
    "<a href='javascript:window.ran = 1' id=list>list</a><div id=row></div><p id=status>",
    "' onmouseover='window.ran = 1' x='",
    '" autofocus onfocus="window.ran = 1" x="',
    "\u202e\u2066\u200b\u200d\ufeff reversed",
    "\x1b[2J\x1b[31m",
    "=HYPERLINK(\"https://outside.invalid\")",
    "{{ 7 * 7 }}{% raw %}${7 * 7}",
    "Z\u0351\u0327\u0300\u0301" * 400,
    "a" * 20_000,
    "<b>" * 350_000,  # a megabyte
    "</td></tr></table></section>" * 200,
]  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    texts = [*MARKS, *(p for p in PAYLOADS if p and len(p) < 10_000)]
    records = [chat(text, text, source=text[:90]) for text in texts] + [chat(text[:3000], "") for text in texts]
    records.append("{<script>window.ran = 1</script>")
    file = write_jsonl(tmp_path / "train.jsonl", records)
    usable = [t for t in texts if "\0" not in t and "\ud800" not in t]
    scores = [float(n % 2) for n in range(len(usable))]
    out = make_run(tmp_path / "run<img src=x onerror=window.ran=1>", file, scores, model=MARKS[0])
    for row, text in enumerate(texts, 1):
        store.decide(out, row, "kept" if row % 2 else "quarantined", text, text[:200])
    return out, make_run(tmp_path / "other<script>window.ran=1</script>", file, scores[::-1]), len(texts)


def test_no_payload_runs_asks_or_breaks_the_page_in_any_view(page, serve, runs):
    out, other, texts = runs
    server = serve(out, other, who=MARKS[0])
    page.open(server)
    views = [f"{path}?text=1&sort=row{more}" for path in ("/", "/compare") for more in ("", "&page=2", "&q=%3Cimg")]
    views += [f"/?row={row}&text=1" for row in range(1, texts + 1)]
    views += [f"/?row={row}&text=1&alike=1" for row in (1, 2, texts + 1, 2 * texts + 1)]
    views += ["/compare?row=3&text=1&full=1", f"/?row={MARKS.index('<b>' * 350_000) + 1}&text=1&full=1"]
    width = page.script("return innerWidth")
    for view in views:
        page.driver.get(server.root + view)
        page.until(lambda: page.count("html.script #list"))
        state = page.script(
            "return [window.ran ?? null, document.title, document.scripts.length, document.styleSheets.length,"
            " document.querySelectorAll('iframe, img, object, embed, base, #list #list, #row #row, [onerror]').length,"
            " document.documentElement.scrollWidth, document.querySelectorAll('#list, #row, #status').length]"
        )
        assert state[0] is None and state[2:5] == [1, 1, 0] and state[6] == 3, (view, state)
        assert state[1].startswith(("Review: ", "Compare: ")) and state[5] <= width, (view, state)
    assert page.trouble() == []
    asked = page.asked()
    assert asked and all(url.startswith(server.root + "/") for url in asked), asked
    assert not any("ran.png" in url or "x?" in url for url in asked)


def test_no_payload_runs_in_the_report_before_or_after_apply(page, runs):
    out, _, _ = runs
    for written in (lambda: None, lambda: apply_decisions(out)):
        written()
        page.driver.get((out / "report.html").absolute().as_uri())
        page.script("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        state = page.script(
            "return [window.ran ?? null, document.scripts.length, document.styleSheets.length,"
            " document.querySelectorAll('iframe, img, object, embed, base, form, button, [onerror], [onfocus]').length,"
            " document.documentElement.scrollWidth <= innerWidth]"
        )
        assert state == [None, 0, 1, 0, True]
    assert page.trouble() == [] and not any(url.startswith("http") for url in page.asked())
    assert (out / "report.html").stat().st_size < 2_000_000


def test_nothing_runs_when_it_is_put_in_place_by_the_script(page, serve, runs):
    out, other, _ = runs
    server = serve(out, other, who=MARKS[1])
    page.open(server)
    page.click("input[name=text]")
    page.choose("sort", "as in the file")
    page.until(lambda: page.rows()[:2] == [1, 2])
    page.click("#list a[data-open='1']")
    for row in range(1, 14):
        page.until(lambda r=row: page.opened() == r)
        page.keys("n", *MARKS[row - 1][:60])
        page.keys("\ue00c")  # Esc
        page.keys("q")
    page.until(lambda: page.opened() == 14)
    page.keys("/", "<script>window.ran = 1</script>")
    page.until(lambda: "q=%3Cscript" in page.driver.current_url)
    assert page.script("return window.ran ?? null") is None and page.trouble() == []
    assert all(url.startswith(server.root + "/") for url in page.asked())
    exported = page.driver.execute_async_script("fetch('/decisions.json').then(r => r.json()).then(arguments[0])")
    assert MARKS[0][:60] in {entry["note"] for entry in exported["log"]}
    assert json.dumps(exported).isascii()
