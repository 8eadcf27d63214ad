"""Everybody can use it: contrast, focus, names of controls, any width, light and dark, without motion."""

import numpy as np
import pytest
from report.trials_page import page as trials_page
from review.made import chat, make_run, write_jsonl
from selenium.webdriver.common.keys import Keys

from gradshield.review import store
from gradshield.review.apply import apply_decisions

pytestmark = pytest.mark.browser

# Text whose contrast with what lies behind it is below AA: 4.5, or 3 for large text.
CONTRAST = """
const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length === 3 ? [...n, 1] : n; };
const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3]));
const behind = (element) => {
  const layers = [];
  for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
  return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
};
const bad = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement, style = getComputedStyle(element);
  if (!walker.currentNode.data.trim() || !element.checkVisibility({ opacityProperty: true })) continue;
  if (element.closest("svg, noscript, script, style, option")) continue;
  const back = behind(element), ink = over(parse(style.color), back);
  const [light, dark] = [luminance(ink), luminance(back)].sort((a, b) => b - a);
  const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
  const ratio = (light + 0.05) / (dark + 0.05);
  if (ratio < (large ? 3 : 4.5)) bad.push([walker.currentNode.data.trim().slice(0, 40), ratio.toFixed(2)]);
}
return bad;
"""
NAMELESS = """
const parts = "a, button, input:not([type=hidden]), select, summary, dialog, section, aside, nav";
return [...document.querySelectorAll(parts)]
  .filter(e => e.checkVisibility())
  .filter(e => !(e.innerText?.trim() || e.labels?.[0]?.innerText.trim() || e.ariaLabel
    || document.getElementById(e.getAttribute("aria-labelledby") ?? "")?.innerText))
  .map(e => e.outerHTML.slice(0, 120));
"""
FOCUS = """
const e = document.activeElement, s = getComputedStyle(e), thumb = e.id === "drag";
const seen = thumb || (s.outlineStyle !== "none" && parseFloat(s.outlineWidth) >= 2);
return [e.matches("a, button, summary") ? e.innerText.trim().split(/\\s/)[0] : e.name || e.id, seen];
"""


@pytest.fixture
def runs(tmp_path):
    rows = [chat(f"request {n} " * 9, f"answer {n} " * 9, source="odd" if n % 2 else "even") for n in range(60)]
    file = write_jsonl(tmp_path / "train.jsonl", [*rows, "{"])
    out = make_run(tmp_path / "run", file, list(np.linspace(-3, 3, 60)))
    store.decide(out, 40, "kept", "a note", "ann")
    store.decide(out, 12, "quarantined", "a note", "ann")
    return out, make_run(tmp_path / "other", file, list(np.linspace(-3, 3, 60) ** 2))


VIEWS = ("/", "/?row=40&t=1", "/?row=12&text=1&alike=1", "/?row=61", "/compare", "/?q=nowhere")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_aa_and_every_control_has_a_name(page, serve, runs, scheme):
    server = serve(*runs)
    page.open(server)
    page.media(prefers_color_scheme=scheme)
    for view in VIEWS:
        page.driver.get(server.root + view)
        page.script("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert page.script(CONTRAST) == [], view
        assert page.script(NAMELESS) == [], view
    page.keys("?")
    assert page.script(CONTRAST) == [] and page.script(NAMELESS) == []


@pytest.fixture
def reports(runs, tmp_path):
    """Of a filter run with decisions, and of a search."""
    out, _ = runs
    apply_decisions(out)
    trials_page(tmp_path)
    return [(folder / "report.html").absolute().as_uri() for folder in (out, tmp_path)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1100, 3840])
def test_the_reports_fit_any_screen_and_are_read_in_light_and_dark(page, reports, scheme, width):
    page.media(prefers_color_scheme=scheme)
    page.size(width, 900)
    for address in reports:
        page.driver.get(address)
        page.script("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert page.script("return document.documentElement.scrollWidth") <= width, address
        assert page.script(CONTRAST) == [] and page.script(NAMELESS) == [], address


@pytest.mark.parametrize("width", [360, 768, 1280, 3840])
def test_no_view_is_wider_than_the_screen(page, serve, runs, width):
    server = serve(*runs)
    page.open(server, width=width, height=900)
    for view in VIEWS:
        page.driver.get(server.root + view)
        page.until(lambda: page.script("return document.readyState") == "complete")  # its styles are there
        assert page.script("return document.documentElement.scrollWidth") <= width, view
        small = "return [...document.querySelectorAll('button, .button, select, input:not([type=hidden])')]"
        small += ".filter(e => e.checkVisibility()).filter(e => e.getBoundingClientRect().height < 16).length"
        assert page.script(small) == 0
    size = float(page.script("return parseFloat(getComputedStyle(document.body).fontSize)"))
    assert size >= (18 if width > 3000 else 14)


def test_tab_reaches_everything_and_is_seen_to(page, serve, runs):
    page.open(serve(*runs), "/?row=40&sort=row")
    page.script("document.body.focus()")
    seen = set()
    for _ in range(110):
        page.keys(Keys.TAB)
        name, visible = page.script(FOCUS)
        assert visible, name
        seen.add(name)
        if name == "Find":
            break
    wanted = {"Skip", "Review", "Compare", "CSV", "JSON", "Keys", "drag", "t", "q", "source", "verdict", "sort", "text"}
    assert wanted | {"1", "50", "Next", "note", "Keep", "Quarantine", "Clear", "Close", "Explain", "Find"} <= seen


def test_verdicts_are_told_by_words_and_pattern_not_by_colour_alone(page, serve, runs):
    page.open(serve(*runs))
    for row in page.rows()[:10]:
        words = page.text(f"#list tr[data-row='{row}'] td.verdict")
        assert words.startswith(("kept", "quarantined"))
    pattern = "return getComputedStyle(document.querySelector('.swatch.quarantined')).backgroundImage"
    assert "gradient" in page.script(pattern)
    assert "hatch" in page.script("return getComputedStyle(document.querySelector('.bars .quarantined')).fill")


def test_nothing_moves_for_who_asked_for_stillness(page, serve, runs):
    page.open(serve(*runs))
    page.media(prefers_reduced_motion="reduce")
    moving = (
        "return [...document.querySelectorAll('*')]"
        ".filter(e => parseFloat(getComputedStyle(e).transitionDuration) > 0).length"
    )
    assert page.script(moving) == 0
    page.media()
    assert page.script(moving) > 0
