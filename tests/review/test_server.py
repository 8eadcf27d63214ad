"""The page answers only whom it was made for, says everything without a script, and obeys nothing that a row holds."""

import json
import re
import socket
import sys
import time
from html import unescape
from urllib.parse import quote

import numpy as np
import pytest
from report.made import PAYLOADS
from review.client import Page, serving
from review.made import chat, make_run, write_jsonl

from gradshield.base.errors import UserError
from gradshield.cli import commands as cli
from gradshield.review import store
from gradshield.review.server import serve


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """120 rows, scores -60 … 59 in the file's order, and one set aside."""
    folder = tmp_path_factory.mktemp("numbered")
    rows = [chat(f"request {n}", f"answer {n}", source="odd" if n % 2 else "even") for n in range(120)]
    file = write_jsonl(folder / "train.jsonl", [*rows, "{"])
    out = make_run(folder / "run", file, list(np.arange(-60.0, 60.0)))
    other = make_run(folder / "other", file, list(np.arange(-60.0, 60.0)[::-1]), threshold=50.0)
    return out, other


@pytest.fixture(scope="module")
def served(numbered):
    with serving(*numbered) as client:
        client.open()
        yield client


@pytest.fixture(autouse=True)
def forgotten(numbered):
    """Each test starts without decisions that stand."""
    while store.undo(numbered[0], None, "test"):
        pass


def shown(html):
    return [int(n) for n in re.findall(r'<tr role="row" data-row="(\d+)"', html)]


# --- who may ask --------------------------------------------------------------------------------------------------


def test_the_address_works_once_and_the_cookie_is_strict(numbered):
    with serving(numbered[0]) as client:
        assert client.ask("/").status == 403 and "gradshield review" in client.ask("/").text
        assert client.ask("/enter?token=wrong").status == 403
        cookie = client.open().headers["Set-Cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie and str(client.port) in cookie
        assert client.ask("/").status == 200
        assert client.ask(client.enter).status == 200  # the same browser may follow the address again
        client.cookie = ""
        assert client.ask(client.enter).status == 403 and client.ask("/decisions.json").status == 403
        client.cookie = cookie.split("=")[0] + "=guess"
        assert client.ask("/").status == 403


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1:1", "localhost", "", "127.0.0.1"])
def test_a_name_that_points_here_is_refused(served, host):
    assert served.ask("/", Host=host.format(port=served.port) or " ").status == 403
    assert served.ask("/", Host=f"localhost:{served.port}").status == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1:{port}", ""]
)
def test_no_other_page_can_decide(served, numbered, origin):
    for path in ("/decide", "/decide-all", "/undo", "/threshold", "/explain"):
        answer = served.post(path, {"row": 1, "verdict": "kept"}, Origin=origin.format(port=served.port))
        assert answer.status == 403
    assert store.decisions_in_force(numbered[0]) == {}


def test_every_answer_has_the_strict_policy_and_nothing_comes_from_outside(served):
    paths = ["/", "/compare", "/?row=3", "/nothing", "/static/review.js", "/static/review.css", "/static/../store.py"]
    for path in [*paths, "/decisions.csv", "/decisions.json", "/version", "/explanation/9", "/explanation/x"]:
        answer = served.ask(path)
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ") and "unsafe" not in policy
        assert answer.headers["Cache-Control"] == "no-store" and answer.headers["X-Frame-Options"] == "DENY"
        assert "://" not in answer.text.replace("http://www.w3.org/2000/svg", ""), path
    assert served.ask("/static/../store.py").status == 404
    assert served.post("/decide", {"note": "x" * 70_000}).status == 413


def test_nothing_inline_that_the_policy_would_have_to_allow(served, numbered):
    store.decide(numbered[0], 3, "kept", "note", "ann")
    for html in (served.page(), served.page(row=3, alike=1, t="1.5"), served.page("/compare", row=100)):
        page = Page(html)
        assert [(t, n) for t, n, _ in page.values if n.startswith("on") or n == "style"] == []
        assert ("style", None) not in page.marks and html.count("<script") == 1
        assert [value for tag, name, value in page.values if tag == "script" and name == "src"] == ["/static/review.js"]


# --- what it shows ------------------------------------------------------------------------------------------------


def test_pages_orders_filters_and_search(served):
    assert shown(served.page()) == [61, 60, 62, 59, 63, *shown(served.page())[5:]] and len(shown(served.page())) == 50
    assert shown(served.page(sort="high"))[:3] == [120, 119, 118] and shown(served.page(sort="low"))[0] == 1
    assert shown(served.page(sort="row", page=3)) == list(range(101, 122))
    assert shown(served.page(sort="row", page=99)) == list(range(101, 122))
    assert shown(served.page(q="REQUEST 11", sort="row")) == [12, *range(111, 121)]
    assert shown(served.page(source=1, verdict=2, sort="row", q="request 7")) == [71, 73, 75, 77, 79]
    assert shown(served.page(verdict=3)) == [121] == shown(served.page(reason=1))
    assert "No row matches" in served.page(q="nowhere")


@pytest.mark.parametrize(
    "given",
    [
        {"row": "0"},
        {"row": "122"},
        {"row": "9" * 30},
        {"row": "²"},
        {"page": "-1", "sort": "x", "decided": "y", "source": "99", "verdict": "99", "reason": "99"},
        {"t": "nan"},
        {"t": "inf"},
        {"t": "-inf"},
        {"t": "1e400"},
        {"t": "<b>"},
        {"q": "\0\ud83d" * 3},
        {"q": "%_'\"" * 1000},
        {"row": "121", "alike": "1", "full": "1"},
        {"text": "1", "row": "120"},
    ],
)
def test_whatever_is_asked_for_is_a_page(served, given):
    encoded = "&".join(f"{name}={quote(value.encode('utf-8', 'surrogatepass'))}" for name, value in given.items())
    for path in ("/", "/compare"):
        assert served.ask(f"{path}?{encoded}").status == 200


def test_the_threshold_is_tried_before_it_is_set(served, numbered):
    counts = dict(re.findall(r'data-count="([^"]+)">([\d,]+)<', served.page(t="-10")))
    assert counts == {"kept": "50", "quarantined": "70", "set aside": "1", "decided": "0"}
    assert "<b>10</b> rows move to quarantine" in served.page(t="-10")
    assert "No row is moved" in served.page() and "Set this threshold" not in served.page()
    assert served.post("/threshold", {"value": "-10.0", "back": "/?sort=low"}).headers["Location"] == "/?sort=low"
    assert "Set by ann" in served.page() and store.decisions_in_force(numbered[0])[0].value == -10.0
    assert served.post("/threshold", {"value": "0.0"}).status == 303  # the run's own
    assert store.decisions_in_force(numbered[0]) == {}
    for value in ("nan", "high"):
        assert served.post("/threshold", {"value": value}).status == 400


def test_forms_decide_and_take_back_without_a_script(served, numbered):
    out = numbered[0]
    answer = served.post("/decide", {"row": 5, "verdict": "quarantined", "note": " =1+1 ", "back": "/?row=5"})
    assert answer.status == 303 and answer.headers["Location"] == "/?row=5"
    assert store.decisions_in_force(out)[5].note == "=1+1" and store.decisions_in_force(out)[5].who == "ann"
    html = served.page(row=5)
    assert re.search(r'value="quarantined" aria-pressed="true"', html) and "by ann" in html
    entry = re.findall(r'name="id" value="(\d+)"', html)
    assert served.post("/undo", {"id": entry[0]}).status == 303 and store.decisions_in_force(out) == {}
    assert "taken back by" in served.page(row=5)
    for form, status in (
        ({"row": 121, "verdict": "kept"}, 409),
        ({"row": 122, "verdict": "kept"}, 404),
        ({"verdict": "kept"}, 404),
        ({"row": 1, "verdict": "burnt"}, 400),
        ({"row": 1}, 400),
    ):
        assert served.post("/decide", form).status == status
    assert served.post("/undo", {"id": "999999"}).status == 303 and store.decisions_in_force(out) == {}


def test_the_script_is_told_what_came_of_it(served):
    first = json.loads(served.post("/decide", {"row": 7, "verdict": "kept"}, Accept="application/json").text)
    assert first["instead_of"] is None
    second = json.loads(served.post("/decide", {"row": 7, "verdict": "quarantined"}, Accept="application/json").text)
    assert second["instead_of"] == "kept by ann" and second["id"] > first["id"]
    assert json.loads(served.ask("/version").text)["version"] == second["id"]
    assert json.loads(served.post("/undo", {}, Accept="application/json").text) == {"row": 7, "verdict": "quarantined"}


@pytest.mark.parametrize(
    "back",
    [
        "//evil.example",
        "https://evil.example/?x",
        "/\\evil.example",
        "/static/x",
        "\r\nX: y",
        "//[",
        "//\u2100/",
        "x://[a",
    ],
)
def test_a_form_goes_back_to_this_page_only(served, back):
    answer = served.post("/undo", {"id": "999999", "back": back})
    assert answer.status == 303
    assert re.fullmatch(r"/\?[\w%]*", answer.headers["Location"]) and "X" not in answer.headers


def test_exports_are_files(served, numbered):
    store.decide(numbered[0], 2, "kept", "=cmd()", "ann")
    table, log = served.ask("/decisions.csv"), served.ask("/decisions.json")
    assert "attachment" in table.headers["Content-Disposition"] and "attachment" in log.headers["Content-Disposition"]
    assert "train.jsonl:2,kept,,'=cmd(),ann," in table.text
    assert json.loads(log.text)["standing"][0]["row"] == 2


def unfolded(html):
    """The page without what is inside of a fold that is closed."""
    return re.sub(r"(<details(?![^>]* open)[^>]*>\s*<summary.*?</summary>).*?</details>", r"\1", html, flags=re.DOTALL)


def test_harmful_text_is_folded_until_it_is_opened(served, numbered):
    html = served.page(sort="high")
    assert "request 119" not in unfolded(html) and "folded, " in html
    assert re.search(r"folded, 22 characters</summary>\s*<bdi class=\"request\">request 119</bdi>", html)
    assert "request 119" in served.page(sort="high", text=1)
    row = served.page(sort="low", row=120)
    assert re.search(r'<details class="fold" data-key="text" data-unfolded="0"><summary>', row) and "request 119" in row
    store.decide(numbered[0], 1, "quarantined", "", "ann")
    assert "request 0<" not in unfolded(served.page(sort="low"))


@pytest.mark.parametrize("how", ["tried", "set"])
def test_a_threshold_that_is_tried_or_set_unfolds_no_row_that_the_run_quarantined(served, numbered, how):
    given = {"t": "70"} if how == "tried" else {}
    if how == "set":
        store.move_threshold(numbered[0], 70.0, "ann")
    html = served.page(sort="high", row=120, **given)
    assert re.findall(r'data-count="quarantined">(\d+)', html) == ["0"]
    assert "request 119" in html and "request 119" not in unfolded(html)
    store.decide(numbered[0], 120, "kept", "", "ann")  # somebody read it
    assert "request 119" in unfolded(served.page(sort="high", row=120, **given))


def test_a_threshold_that_is_tried_unfolds_no_row_that_the_one_in_force_quarantines(served, numbered):
    store.move_threshold(numbered[0], -70.0, "ann")  # all rows are quarantined; the run itself keeps row 2
    html = served.page(sort="low", row=2, t="70")
    assert "request 1<" in html and "request 1<" not in unfolded(html)


def test_all_rows_of_a_view_are_decided_at_once_and_taken_back_at_once(served, numbered):
    out = numbered[0]
    store.decide(out, 120, "kept", "read it", "bob")
    view = {"q": "request 11", "verdict": "2", "sort": "row"}
    html = served.page(**view)
    assert "Quarantine all 9" in html and ">9 left to decide<" in html
    given = dict(re.findall(r'name="(version|back)" value="([^"]*)"', html.split('class="bulk"')[1]))
    form = {name: unescape(value) for name, value in given.items()} | {"verdict": "quarantined"}
    made = served.done("/decide-all", form)
    assert made["rows"] == 9 and sorted(store.decisions_in_force(out)) == list(range(111, 121))
    assert ">0 left to decide<" in served.page(**view)
    stale = served.post("/decide-all", form)
    assert stale.status == 409 and "nothing was decided" in stale.text
    store.undo(out, None, "bob")  # one of them, by somebody else
    taken = served.done("/undo", {name: made[name] for name in ("id", "last", "at")})
    left = store.decisions_in_force(out)
    assert taken == {"rows": 8} and left.keys() == {120} and left[120].note == "read it"


@pytest.mark.parametrize("left_out", ["version", "back"])
def test_all_rows_are_decided_only_for_a_form_that_says_which_and_as_of_when(served, numbered, left_out):
    version = json.loads(served.ask("/version").text)["version"]
    whole = {"verdict": "kept", "version": version, "back": "/"}
    lacking = {name: value for name, value in whole.items() if name != left_out}
    wrong = [lacking, whole | {left_out: ""}]
    wrong += [whole | {"back": back} for back in ("//[", "/decide", "//evil.example/", "?q=x")]
    wrong += [whole | {"version": words} for words in ("x", "-1", "9" * 5000)]
    for form in wrong:
        assert served.post("/decide-all", form).status == 400, form
    assert store.decisions_in_force(numbered[0]) == {}
    with serving(numbered[0]) as alone:  # there is no comparison, so no list of one
        alone.open()
        assert alone.post("/decide-all", whole | {"back": "/compare"}).status == 400
    assert served.done("/decide-all", whole | {"back": "/compare?q=request+119"})["rows"] == 1


def test_a_row_that_is_set_aside_is_not_decided_with_the_others(served, numbered):
    version = json.loads(served.ask("/version").text)["version"]
    for form, status in (({"verdict": "burnt", "back": "/"}, 400), ({"verdict": "kept", "back": "/?verdict=3"}, 409)):
        assert served.post("/decide-all", {**form, "version": version}).status == status
    made = served.done("/decide-all", {"verdict": "kept", "back": "/", "version": version})
    assert made["rows"] == 120 and 121 not in store.decisions_in_force(numbered[0])


def test_a_note_comes_back_as_it_was_typed_and_goes_when_its_field_is_emptied(served, numbered):
    out = numbered[0]
    words = 'ok \u2764\ufe0f \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 "quoted" <b>'
    served.post("/decide", {"row": 3, "verdict": "kept", "note": words})
    (field,) = re.findall(r'name="note"[^>]* value="([^"]*)"', served.page(row=3))
    assert unescape(field) == words == store.decisions_in_force(out)[3].note
    served.post("/decide", {"row": 3, "verdict": "kept", "note": ""})
    assert store.decisions_in_force(out)[3].note == ""


def test_an_entry_of_another_log_is_not_taken_back(served, numbered):
    out = numbered[0]
    entry = store.decide(out, 3, "kept", "", "ann")
    assert served.done("/undo", {"id": entry.id, "row": 3, "at": "2020-01-01T00:00:00+00:00"})["row"] is None
    assert 3 in store.decisions_in_force(out)
    assert served.done("/undo", {"id": entry.id, "row": 3, "at": entry.at})["row"] == 3


# --- hostile rows -------------------------------------------------------------------------------------------------


def test_no_payload_adds_a_tag_an_attribute_or_an_unseen_character_in_any_view(tmp_path):
    def run(name, payloads):
        folder = tmp_path / name
        folder.mkdir()
        # half of them kept and half quarantined, and some that only the whole line can show
        records = [chat(p, "answer " + p, source=p[:90]) for p in payloads] + [chat(p, "") for p in payloads]
        file = write_jsonl(folder / "train.jsonl", [*records, "{<script>alert(1)</script>"])
        usable = [p for p in payloads if "\0" not in p and "\ud800" not in p]
        scores = [float(n % 2) for n in range(len(usable))]
        out = make_run(folder / "run", file, scores, model=payloads[0])
        for row, p in enumerate(payloads, 1):
            store.decide(out, row, "kept" if row % 3 else "quarantined", p, p[:300])
        return out, make_run(folder / "other", file, scores[::-1])

    plain = ["plain words"] * 4
    payloads = [p for p in PAYLOADS if p]
    seen = []
    for name, texts in (("plain", plain), ("hostile", payloads)):
        with serving(*run(name, texts), who=texts[0]) as client:
            client.open()
            views = [{"text": 1, "sort": "row"}, {"text": 1, "sort": "row", "q": texts[-2][:50]}]
            views += [{"row": row, "text": 1, "alike": 1} for row in (1, len(texts) + 1, 2 * len(texts) + 1)]
            views += [{"row": row, "text": 1} for row in range(2, len(texts) + 1)]
            pages = [client.page(path, **view) for path in ("/", "/compare") for view in views]
            seen.append((set().union(*(Page(html).marks for html in pages)), pages))
    (ours, _), (theirs, pages) = seen
    assert theirs <= ours | {("a", "data-go"), ("p", "class"), ("a", "rel")}
    for text in pages:
        page = Page(text)
        assert not page.odd and len(text) < 3_000_000
        assert text.count("<script") == 1 and not [n for _, n, _ in page.values if n.startswith("on")]
        rest = re.sub(r'(<input type="(?:text" name="note|search" name="q)"[^>]*) value="[^"]*"', r"\1", text)
        assert 'name="q"' in rest and rest.count('value="') < text.count('value="')  # what is typed goes back as it was
        assert not [char for char in rest if char != "\n" and not char.isprintable() and char not in "\xa0\t"]
        for tag, name, value in page.values:
            assert name not in ("href", "action", "src", "formaction") or re.match(r"[/#][^/\\]*", value), (tag, value)


# --- the commands -------------------------------------------------------------------------------------------------


def test_runs_of_different_files_are_not_compared(numbered, tmp_path, monkeypatch, capsys):
    file = write_jsonl(tmp_path / "train.jsonl", [chat("another", "file")])
    out = make_run(tmp_path / "run", file, [0.0])
    monkeypatch.setattr(sys, "argv", ["gradshield", "review", str(numbered[0]), str(out)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "another file" in error


def test_a_taken_port_and_a_folder_that_is_no_run_are_one_line(served, numbered, tmp_path):
    with pytest.raises(UserError, match=f"--port {served.port}"):
        serve(numbered[0], None, served.port, "ann", print)
    with pytest.raises(UserError, match=r"no run\.yaml"):
        serve(tmp_path, None, 0, "ann", print)


def test_a_missing_extra_is_named(numbered, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("gradshield.review")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setattr(sys, "argv", ["gradshield", "review", str(numbered[0])])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and "starlette uvicorn" in capsys.readouterr().err


def test_a_client_that_leaves_in_the_middle_of_a_post_leaves_no_traceback_and_decides_nothing(numbered, capfd):
    with serving(numbered[0]) as client:
        client.open()
        with socket.create_connection(("127.0.0.1", client.port)) as connection:
            head = (
                f"POST /decide HTTP/1.1\r\nHost: 127.0.0.1:{client.port}\r\nOrigin: http://127.0.0.1:{client.port}\r\n"
            )
            connection.sendall(
                f"{head}Cookie: {client.cookie}\r\nContent-Length: 999\r\n\r\nrow=1&verdict=kept".encode()
            )
            time.sleep(0.2)
        time.sleep(0.3)
        assert client.ask("/").status == 200
    assert not store.decisions_in_force(numbered[0]) and "Traceback" not in capfd.readouterr().err
