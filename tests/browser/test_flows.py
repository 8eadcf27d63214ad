"""Everything a person does on the review page, done in a browser."""

import json
import re
import signal

import pytest
from review.made import decided
from selenium.webdriver import ActionChains
from selenium.webdriver.common.keys import Keys

from gradshield.review import store

pytestmark = pytest.mark.browser


def test_the_threshold_is_dragged_and_counts_effect_and_table_follow(page, serve, run):
    page.open(serve(run))
    assert page.counts() == {"kept": 60, "quarantined": 60, "set aside": 1, "decided": 0}
    low, high = (float(page.script(f"return document.querySelector('#drag').{end}")) for end in ("min", "max"))
    width = page.script("return document.querySelector('.bars').getBoundingClientRect().width")
    drag = ActionChains(page.driver).click_and_hold(page.driver.find_element("id", "drag")).pause(0.1)
    page.driver.find_element("id", "drag")
    for _ in range(4):
        drag = drag.move_by_offset(round(-width / 24), 0).pause(0.05)
    drag.release().perform()
    page.until(lambda: page.counts()["kept"] < 50)
    value = float(page.script("return document.querySelector('#drag').value"))
    assert low < value < -5 and abs(value - (low + high) / 2 + (high - low) / 6) < 3
    quarantined = sum(score >= value for score in range(-60, 60))
    page.until(lambda: page.counts()["quarantined"] == quarantined)
    assert f"{quarantined - 60} rows move to quarantine" in page.text("#effect")
    assert page.rows()[0] == round(value) + 61  # nearest first
    clip = page.script("return document.querySelector('#below-part').getAttribute('width')")
    assert abs(float(clip.rstrip("%")) - 100 * (value - low) / (high - low)) < 0.1
    assert decided(run) == {}
    page.click("[data-set]")
    page.until(lambda: 0 in store.decisions_in_force(run))
    assert store.decisions_in_force(run)[0].value == value
    page.until(lambda: "Set by ann" in page.text("#effect"))
    page.keys("u")
    page.until(lambda: store.decisions_in_force(run) == {} and page.counts()["quarantined"] == 60)


def test_a_long_drag_ends_where_the_handle_is(page, serve, run):
    page.open(serve(run))
    page.driver.execute_async_script("""
        const done = arguments[0], drag = document.querySelector("#drag");
        (async () => {
          for (let step = 0; step < 600; step++) {
            drag.value = -50 + step / 10;
            drag.dispatchEvent(new Event("input", { bubbles: true }));
            if (step % 3 === 0) await new Promise(requestAnimationFrame);
          }
          done();
        })();
    """)
    page.until(lambda: page.counts()["quarantined"] == 50)
    page.until(lambda: re.search(r"[?&]t=9\.9", page.driver.current_url))
    assert page.trouble() == []


def test_the_threshold_moves_by_keys_and_by_number(page, serve, run):
    page.open(serve(run))
    page.keys("t")
    assert page.script("return document.activeElement.id") == "drag"
    before = float(page.script("return document.querySelector('#drag').value"))
    page.keys(*[Keys.ARROW_LEFT] * 10)
    page.until(lambda: page.counts()["quarantined"] > 60)
    after = float(page.script("return document.querySelector('#drag').value"))
    ActionChains(page.driver).key_down(Keys.SHIFT).send_keys(Keys.ARROW_RIGHT).key_up(Keys.SHIFT).perform()
    finer = float(page.script("return document.querySelector('#drag').value"))
    assert 0 < finer - after < (before - after) / 50
    page.keys(Keys.END)
    page.until(lambda: page.counts()["quarantined"] == 0)
    words = page.script("return document.querySelector('#drag').getAttribute('aria-valuetext')")
    assert "0 rows quarantined" in words
    page.until(lambda: page.text("#effect .moved").startswith("Trying"))
    page.fill("#exact", "-30.5" + Keys.ENTER)
    page.until(lambda: page.counts()["quarantined"] == 90)
    page.click("[data-go='t=']")
    page.until(lambda: page.counts()["quarantined"] == 60)
    assert "No row is moved" in page.text("#effect")


@pytest.mark.parametrize("fresh", ["a threshold is set", "one is tried"])
def test_enter_in_the_field_tries_a_number_and_stores_nothing(page, serve, run, fresh):
    if fresh == "a threshold is set":
        store.move_threshold(run, 20.0, "ann")
    server = serve(run)
    page.open(server)
    if fresh == "one is tried":
        page.driver.get(f"{server.root}/?t=10")
    before = store.decisions_in_force(run)
    page.fill("#exact", "30" + Keys.ENTER)
    page.until(lambda: page.counts()["quarantined"] == 30 and "Trying 30" in page.text("#effect"))
    assert store.decisions_in_force(run) == before


def test_enter_opens_the_first_row_and_a_note_that_was_typed_stays(page, serve, run):
    page.open(serve(run))
    page.keys(Keys.ENTER)
    page.until(lambda: page.opened() == page.current())
    row = page.opened()
    page.keys("n")
    page.keys("a fine row", Keys.ENTER)
    store.decide(run, page.rows()[5], "kept", "", "bob")  # in another tab, so that this one is drawn again
    page.until(lambda: page.script("return Number(document.querySelector('#list').dataset.version)") > 0)
    page.keys("a")
    page.until(lambda: row in decided(run))
    assert store.decisions_in_force(run)[row].note == "a fine row"


def test_rows_are_searched_filtered_and_ordered(page, serve, run):
    page.open(serve(run))
    page.keys("/", "request 11")
    page.until(lambda: sorted(page.rows()) == [12, *range(111, 121)])
    page.choose("source", "odd")
    page.until(lambda: all(n % 2 == 0 for n in page.rows()))
    page.choose("sort", "highest score")
    page.until(lambda: page.rows() == [120, 118, 116, 114, 112, 12])
    page.choose("verdict", "kept")
    page.until(lambda: page.rows() == [12])
    page.until(lambda: "verdict=1" in page.driver.current_url)
    page.driver.refresh()  # the view is the address
    assert page.rows() == [12]
    page.choose("verdict", "quarantined")
    page.keys(Keys.ESCAPE)
    page.driver.find_element("id", "search").clear()
    page.choose("source", "any")
    page.choose("verdict", "set aside")
    page.until(lambda: page.rows() == [121])
    page.choose("verdict", "any")
    page.choose("reason", page.text("select[name=reason] option:last-child"))
    page.until(lambda: page.rows() == [121])
    page.click("#list a[data-open]")
    page.until(lambda: page.opened() == 121)
    assert "neither kept nor quarantined" in page.text("#row") and not page.count("#row .decide")


def test_a_review_by_keys_alone(page, serve, run):
    page.open(serve(run))
    order = page.rows()
    assert page.current() == order[0]
    page.keys("j", "j", "k")
    page.until(lambda: page.current() == order[1])
    page.keys("a")
    page.until(lambda: decided(run) == {order[1]: "kept"} and page.current() == order[2])
    page.keys("q", "q", "a")  # faster than the server answers
    page.until(lambda: len(decided(run)) == 4)
    assert [decided(run)[row] for row in order[2:5]] == ["quarantined", "quarantined", "kept"]
    page.keys("u", "u")
    page.until(lambda: set(decided(run)) == {order[1], order[2]} and page.current() == order[3])
    page.keys("o")
    page.until(lambda: page.opened() == order[3])
    page.keys("n")
    page.keys("read j and q, a fine row", Keys.ENTER)
    page.keys("a")
    page.until(lambda: page.opened() == order[4])
    assert store.decisions_in_force(run)[order[3]].note == "read j and q, a fine row"
    page.keys("k", "c")
    page.until(lambda: order[3] not in decided(run))
    page.keys(Keys.ESCAPE)
    page.until(lambda: not page.opened())
    page.keys("]")
    page.until(lambda: page.rows()[0] not in order)
    page.keys("k")
    page.until(lambda: page.rows() == order and page.current() == order[-1])
    page.keys("j")
    page.until(lambda: page.rows() != order and page.current() == page.rows()[0])


def test_single_keys_can_be_turned_off_and_do_nothing_in_fields(page, serve, run):
    page.open(serve(run))
    page.keys("/", "aquack?")
    assert page.script("return document.activeElement.value") == "aquack?"
    page.until(lambda: not page.rows())
    page.keys(Keys.ESCAPE)
    page.driver.get(page.driver.current_url.split("?")[0])
    page.keys("?")
    assert page.script("return document.querySelector('#help').open")
    page.keys("a")
    page.click("#keys-on")
    page.click("#help button")
    page.keys("a", "q", "j")
    page.click("#list a[data-open]")
    page.until(page.opened)
    page.keys("q")
    page.until(lambda: page.count("#row .decide"))
    assert store.version(run) == 0
    page.keys(Keys.ESCAPE)
    page.until(lambda: not page.opened())


def test_a_row_open_shows_its_conversation_folded_and_its_near_duplicates(page, serve, run):
    page.open(serve(run), "/?sort=high")
    assert page.text("#list tr[data-row='119'] .text") == "folded, 22 characters"
    page.click("#list tr[data-row='119'] td.verdict")
    page.until(lambda: page.opened() == 119)
    said = "return document.querySelector('#row .said').checkVisibility()"
    assert not page.script(said)
    page.keys("x")
    page.until(lambda: page.script(said))
    assert page.text("#row .message.user .said") == "request 118"
    assert "score" in page.text("#row .tracks") and "58" in page.text("#row .tracks")
    page.keys("d")
    page.until(lambda: page.count("#row .alike li"))
    assert page.script(said)  # what was opened stays open
    assert page.text("#row .alike a") == "row 120" and "folded" in page.text("#row .alike li")
    page.click("#row .alike a")
    page.until(lambda: page.opened() == 120)
    assert not page.script(said)
    page.click("input[name=text]")
    page.until(lambda: page.script(said) and "request 118" in page.text("#list tr[data-row='119'] .text"))
    page.driver.back()
    page.until(lambda: not page.opened())


def test_an_excerpt_is_unfolded_in_the_list_without_opening_its_row(page, serve, run):
    page.open(serve(run), "/?sort=high")
    assert "request" not in page.text("#list tr[data-row='119'] .text")
    page.click("#list tr[data-row='119'] summary")
    page.until(lambda: "request 118" in page.text("#list tr[data-row='119'] .text"))
    assert not page.opened()
    page.fill("#exact", "99" + Keys.ENTER)  # a threshold that keeps every row is tried
    page.until(lambda: page.counts()["quarantined"] == 0)
    assert page.text("#list tr[data-row='119'] .text") == "folded, 22 characters"


def test_all_rows_of_the_list_are_decided_by_one_button_and_u_takes_them_back(page, serve, run):
    page.open(serve(run), "/?verdict=2")
    page.click(".bulk summary")
    page.click(".bulk button[value=kept]")
    page.until(lambda: page.counts()["quarantined"] == 0)
    assert decided(run) == dict.fromkeys(range(61, 121), "kept") and "60 rows: kept" in page.status()
    page.keys("u")
    page.until(lambda: page.counts()["quarantined"] == 60)
    assert decided(run) == {} and "60 decisions are undone" in page.status()
    assert "60 left to decide" in page.text("#list .head")


def test_a_button_for_all_rows_does_nothing_where_one_was_decided_meanwhile(page, serve, run):
    page.open(serve(run))
    page.click(".bulk summary")
    page.script(
        "const real = fetch;"
        "window.fetch = (...a) => String(a[0]).includes('version') ? new Promise(() => {}) : real(...a)"
    )
    store.decide(run, 5, "quarantined", "", "bob")
    page.click(".bulk button[value=kept]")
    page.until(lambda: "nothing was decided" in page.status())
    assert decided(run) == {5: "quarantined"}


def test_decisions_are_taken_back_one_by_one_and_exported(page, serve, run):
    page.open(serve(run), "/?row=5")
    for button in ("kept", "quarantined"):
        page.click(f"#row button[value={button}]")
        page.until(lambda b=button: decided(run).get(5) == b)
        page.driver.get(page.driver.current_url)
        page.script("history.replaceState(null, '', '/?row=5'); location.reload()")
        page.until(lambda: page.opened() == 5)
    page.click("#row .history summary")
    page.script("document.querySelectorAll('#row .history form button')[1].click()")  # the earlier of the two
    page.until(lambda: page.count("#row .history .taken") == 1)
    assert decided(run) == {5: "quarantined"}
    for kind in ("csv", "json"):
        fetched = page.driver.execute_async_script(
            "const done = arguments[0];"
            f"fetch(document.querySelector('a[href$={kind}]').href).then(r => r.text()).then(done)"
        )
        assert "train.jsonl:5,quarantined" in fetched if kind == "csv" else len(json.loads(fetched)["log"]) == 3


def test_two_tabs_deciding_at_once_lose_nothing(page, serve, run):
    server = serve(run)
    page.open(server)
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    page.driver.get(server.root)
    second = page.driver.current_window_handle
    order = page.rows()
    both = (
        "for (const [row, verdict] of arguments[0])"
        " fetch('/decide', {method: 'POST', body: new URLSearchParams({row, verdict})})"
    )
    for tab, verdict in ((first, "kept"), (second, "quarantined")):
        page.driver.switch_to.window(tab)
        page.script(both, [[row, verdict] for row in order[:20]])
    page.until(lambda: store.version(run) == 40)
    for row in order[:20]:
        assert {entry.verdict for entry, _ in store.history(run, row)} == {"kept", "quarantined"}
    for tab in (first, second):  # and each sees what the other did, without being asked
        page.driver.switch_to.window(tab)
        page.until(lambda: page.counts()["decided"] == 20)
        assert page.rows() == order
    page.keys("a")
    page.until(lambda: decided(run)[page.rows()[0]] == "kept")
    page.driver.switch_to.window(first)
    page.until(lambda: "by ann" in page.text(f"#list tr[data-row='{order[0]}']"))


def test_a_server_killed_between_two_decisions_loses_none_and_says_so(page, serve, run):
    server = serve(run)
    page.open(server)
    order = page.rows()
    page.keys("q")
    page.until(lambda: "quarantined" in page.status())
    server.stop(signal.SIGKILL)
    assert decided(run) == {order[0]: "quarantined"}
    page.keys("a")
    page.until(lambda: "does not answer" in page.status())
    page.open(serve(run))
    assert decided(run) == {order[0]: "quarantined"} and page.counts()["decided"] == 1
    page.keys("j", "a")
    page.until(lambda: decided(run) == {order[0]: "quarantined", order[1]: "kept"})


def test_the_page_works_without_a_script(page, serve, run):
    server = serve(run)
    page.open(server)
    page.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page.driver.get(server.root)
        page.driver.find_element("name", "q").send_keys("request 7")
        page.click(".filters noscript button, .filters button")
        page.until(lambda: "q=request" in page.driver.current_url)
        page.driver.find_element("link text", "8").click()
        page.until(lambda: "row=8" in page.driver.current_url)
        page.driver.find_element("css selector", "#row button[value=quarantined]").click()
        page.until(lambda: decided(run) == {8: "quarantined"})
        assert "row=8" in page.driver.current_url and "q=request" in page.driver.current_url
        page.fill("#exact", "12" + Keys.ENTER)
        page.until(lambda: "t=12" in page.driver.current_url)
        page.driver.find_element("css selector", "[data-set]").click()
        page.until(lambda: 0 in store.decisions_in_force(run))
        assert store.decisions_in_force(run)[0].value == 12.0
    finally:
        page.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_back_sets_the_filters_to_what_is_shown(page, serve, run):
    page.open(serve(run))
    page.keys("o")
    page.until(page.opened)
    page.choose("verdict", "quarantined")
    page.until(lambda: page.total() == 60 and "verdict=2" in page.driver.current_url)
    page.driver.back()
    page.until(lambda: page.total() == 121)
    chosen = "return document.querySelector('select[name=verdict]').selectedOptions[0].text"
    assert page.script(chosen) == "any"


def test_an_emptied_note_is_gone_and_an_untouched_one_stays(page, serve, run):
    page.open(serve(run))
    page.keys("o")
    page.until(page.opened)
    row = page.opened()
    store.decide(run, row, "kept", "read it", "ann")
    page.until(lambda: page.script("return document.querySelector('#note').value") == "read it")
    page.keys("q")
    page.until(lambda: decided(run) == {row: "quarantined"})
    assert store.decisions_in_force(run)[row].note == "read it"
    page.click(f"[data-open='{row}']")
    page.until(lambda: page.opened() == row)
    page.fill("#note", Keys.BACKSPACE)
    page.click(".decide button[value=kept]")
    page.until(lambda: decided(run) == {row: "kept"})
    assert store.decisions_in_force(run)[row].note == ""
