"""No row is decided that its reader did not mean: not by a held key, and not where the list changed by itself."""

import time

import pytest
from review.made import decided
from selenium.webdriver.common.keys import Keys

from gradshield.review import store

pytestmark = pytest.mark.browser


def hold(page, key, text, times):
    """The key pressed and held, so that the browser repeats it."""
    for n in range(times):
        pressed = {"type": "keyDown", "key": key, "text": text, "autoRepeat": n > 0}
        page.driver.execute_cdp_cmd(
            "Input.dispatchKeyEvent", pressed | ({"windowsVirtualKeyCode": 13} if key == "Enter" else {})
        )
        time.sleep(0.03)
    page.driver.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": "keyUp", "key": key})
    page.until(lambda: page.script("return acting === 0 && running === null"))


def test_a_held_key_decides_one_row_and_only_moving_repeats(page, serve, run):
    page.open(serve(run))
    order = page.rows()
    hold(page, "a", "a", 10)
    assert decided(run) == {order[0]: "kept"}
    hold(page, "j", "j", 5)
    assert page.current() == order[6]
    page.keys("o")
    page.until(lambda: page.opened() == order[6])
    page.script("document.querySelector('#row button[value=quarantined]').focus()")
    hold(page, "Enter", "\r", 10)
    assert decided(run) == {order[0]: "kept", order[6]: "quarantined"}
    hold(page, "u", "u", 10)
    assert decided(run) == {order[0]: "kept"}
    page.keys("/")
    hold(page, "z", "z", 5)
    assert page.script("return document.activeElement.value") == "zzzzz"  # a field takes them all


def test_where_the_current_row_leaves_the_list_by_itself_no_key_acts_until_another_is_chosen(page, serve, run):
    page.open(serve(run), "/?decided=undecided&sort=row")
    page.keys("j", "j")
    page.until(lambda: page.current() == 3)
    store.decide(run, 3, "kept", "", "bob")
    page.until(lambda: 3 not in page.rows())
    assert page.current() == 0 and "Row 3 left this list" in page.status()
    page.keys("q", Keys.ENTER)
    page.until(lambda: "No row is chosen" in page.status())
    assert decided(run) == {3: "kept"} and not page.opened()
    page.keys("j")
    page.until(lambda: page.current() == 4)
    store.decide(run, 4, "kept", "", "bob")
    page.until(lambda: page.current() == 0)
    page.keys("k")
    page.until(lambda: page.current() == 2)
    page.keys("q")  # one's own decision goes on to the next row, as before
    page.until(lambda: decided(run).get(2) == "quarantined" and page.current() == 5)
    assert "Row 2: quarantined" in page.status()


def test_an_error_is_gone_when_what_was_typed_is_right(page, serve, run):
    page.open(serve(run))
    page.fill("#exact", "high" + Keys.ENTER)
    page.until(lambda: "The threshold is a number" in page.status())
    page.fill("#exact", "30" + Keys.ENTER)
    page.until(lambda: page.counts()["quarantined"] == 30)
    assert page.status() == ""
    page.fill("#exact", "high" + Keys.ENTER)
    page.until(lambda: "The threshold is a number" in page.status())
    page.fill("#exact", "30" + Keys.ENTER)  # as it was before
    page.until(lambda: page.status() == "")
