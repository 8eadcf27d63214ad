"""The bundled file under review with the embedded model, explained and compared; its pictures go to the docs."""

import contextlib
import io
import re
import shutil

import pytest
from PIL import Image
from selenium.webdriver.common.keys import Keys

from gradshield.base.assets import ASSETS
from gradshield.base.settings import FilterSettings
from gradshield.review import store
from gradshield.screen.filter import run_filter

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of rows whole and cut after 64 tokens; what is known of the model is cached as the user's is."""
    folder = tmp_path_factory.mktemp("pictures")
    shutil.copy(ASSETS / "demo.jsonl", folder)
    with contextlib.chdir(folder):  # no folder of this machine in the pictures
        run_filter("demo.jsonl", folder / "demo", FilterSettings())
        run_filter("demo.jsonl", folder / "cut", FilterSettings(max_length=64))
    return folder / "demo", folder / "cut"


def test_pictures_of_the_review_a_row_and_two_runs(page, serve, runs, docs, monkeypatch):
    monkeypatch.delenv("GRADSHIELD_CACHE", raising=False)
    run, _ = runs
    server = serve(*runs)
    page.open(server, width=1320, height=900)
    first = page.rows()[:3]
    store.decide(run, first[0], "quarantined", "", "ann")
    store.decide(run, first[2], "kept", "asked the author", "bob")
    page.until(lambda: page.counts()["decided"] == 2)
    page.keys("j", "j", "j", "t", *[Keys.ARROW_RIGHT] * 6)
    page.until(lambda: page.text("#effect .moved").startswith("Trying"))
    picture(page, docs / "review.png")

    page.size(1320, 1350)
    page.driver.get(server.root + "/?sort=high")
    page.choose("source", "poison")
    page.until(lambda: re.search("source=[1-9]", page.driver.current_url))
    page.keys(Keys.ESCAPE, "j", "o")
    page.until(page.opened)
    page.keys("x", "e")
    page.until(lambda: page.script("return document.querySelector('#row').dataset.state") == "done", 240)
    page.keys("d")
    page.until(lambda: page.count("#row .alike, #row h3 + .muted"))
    assert page.count("#row .t") > 2 and page.count("#row .track") > 15
    assert "same request, refused" in page.text("#row") and "harmful anchors, median" in page.text("#row")
    picture(page, docs / "review-row.png", ".work")

    page.size(1320, 900)
    page.driver.get(server.root + "/compare")
    page.until(lambda: page.count(".points rect"))
    picture(page, docs / "review-compare.png")


def test_pictures_of_the_report(page, runs, docs):
    run, _ = runs
    page.media()
    page.size(1100, 1080)
    page.driver.get((run / "report.html").absolute().as_uri())
    picture(page, docs / "report.png")
    page.click("#highest ~ details.row summary")
    assert page.count("details[open] .t") > 2 and "Heaviest tokens" in page.text("details[open]")
    assert page.count(".by-source .spark rect") > 20
    page.size(1100, 1000)
    picture(page, docs / "report-rows.png", "section[aria-labelledby=sources]")


def picture(page, file, top="body"):
    """The page from `top` on, in 256 colours, which halves it."""
    page.script("document.querySelector('#status')?.remove(); document.activeElement.blur()")
    page.script("document.querySelector(arguments[0]).scrollIntoView()", top)
    with Image.open(io.BytesIO(page.driver.get_screenshot_as_png())) as shot:
        shot.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
    assert 20_000 < file.stat().st_size < 300_000
