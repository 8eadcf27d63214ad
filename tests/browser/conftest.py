"""A review in Debian's chromium: the command in a process of its own, and a page that it is opened in."""

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from review.made import chat, make_run, write_jsonl
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.keys import Keys

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --force-color-profile=srgb"
)


class Server:
    """`gradshield review` as a person starts it."""

    def __init__(self, *arguments: Any, who: str = "ann") -> None:
        command = [sys.executable, "-c", "from gradshield.cli.commands import main; main()", "review", "--who", who]
        self.process = subprocess.Popen([*command, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().split()[-1]
        self.root = self.address.split("/enter")[0]

    def stop(self, how: int = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        self.process.wait(10)


class Page:
    """What a person does in a browser, and what there is to be seen."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver
        self.script = driver.execute_script

    def open(self, server: Server, path: str = "/", width: int = 1440, height: int = 1000) -> None:
        self.media()
        self.size(width, height)
        self.driver.get(server.address)
        self.until(lambda: self.driver.current_url == server.root + "/" and self.count("html.script #list"))
        if path != "/":
            self.driver.get(server.root + path)
            self.until(lambda: self.count("html.script #list"))

    def size(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def media(self, **features: str) -> None:
        wanted = {"prefers-color-scheme": "light", **{k.replace("_", "-"): v for k, v in features.items()}}
        given = [{"name": name, "value": value} for name, value in wanted.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": given})

    def until(self, what: Callable[[], Any], seconds: float = 20) -> Any:
        """Waits for it to be true, and returns it."""
        end = time.monotonic() + seconds
        while True:
            found = what()
            if found or time.monotonic() > end:
                assert found, f"{what} did not come true in {seconds} s; status: {self.status()!r}"
                return found
            time.sleep(0.03)

    def keys(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def click(self, selector: str) -> None:
        self.until(
            lambda: self.script("return typeof running === 'undefined' || running === null")
        )  # nothing is under way
        for _ in range(20):
            try:
                return self.driver.find_element("css selector", selector).click()
            except StaleElementReferenceException:  # it was put in place anew at that moment
                continue

    def fill(self, selector: str, words: str) -> None:
        """Types in the place of what stands in a field."""
        self.click(selector)
        ActionChains(self.driver).key_down(Keys.CONTROL).send_keys("a").key_up(Keys.CONTROL).send_keys(words).perform()

    def choose(self, name: str, words: str) -> None:
        self.driver.find_element("xpath", f"//select[@name='{name}']/option[normalize-space()='{words}']").click()

    def text(self, selector: str) -> str:
        return self.script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def count(self, selector: str) -> int:
        return self.script("return document.querySelectorAll(arguments[0]).length", selector)

    def rows(self) -> list[int]:
        return self.script(
            "return [...document.querySelectorAll('#list tr[data-row]')].map(r => Number(r.dataset.row))"
        )

    def total(self) -> int:
        """Rows that the list is of, over all its pages."""
        words = self.text("#list p.muted").split()
        return int(words[-1].replace(",", "")) if words[0] != "none" else 0

    def current(self) -> int:
        return self.script("return Number(document.querySelector('#list tr.current')?.dataset.row ?? 0)")

    def opened(self) -> int:
        return self.script("return Number(document.querySelector('#row').dataset.row ?? 0)")

    def counts(self) -> dict[str, int]:
        found = self.script(
            "return [...document.querySelectorAll('[data-count]')].map(d => [d.dataset.count, d.innerText])"
        )
        return {name: int(number.replace(",", "")) for name, number in found}

    def status(self) -> str:
        return self.script("return document.querySelector('#status')?.textContent ?? ''")

    def trouble(self) -> list[str]:
        """What the browser's console complained of."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def asked(self) -> set[str]:
        """Every address that anything was asked of since the last look."""
        log = "\n".join(entry["message"] for entry in self.driver.get_log("performance"))
        return set(re.findall(r'"Network\.requestWillBeSent".*?"url":"([^"]+)"', log))


@pytest.fixture(scope="session")
def driver() -> Iterator[webdriver.Chrome]:
    options = Options()
    options.binary_location = shutil.which("chromium") or ""
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.set_capability("unhandledPromptBehavior", "ignore")  # an alert must be seen, not clicked away
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def page(driver) -> Iterator[Page]:
    """A page in a tab of its own, without cookies or stored settings."""
    first = driver.current_window_handle
    driver.switch_to.new_window("tab")
    driver.get_log("browser")
    driver.get_log("performance")
    yield Page(driver)
    for handle in driver.window_handles:
        driver.switch_to.window(handle)
        driver.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": "*", "storageTypes": "all"})
        if handle != first:
            driver.close()
    driver.switch_to.window(first)
    driver.delete_all_cookies()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Starts reviews, and stops those that still run at the end."""
    servers: list[Server] = []

    def start(*arguments: Any, **named: Any) -> Server:
        servers.append(Server(*arguments, **named))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture(scope="session")
def docs() -> Path:
    return Path(__file__).parents[2] / "docs"


@pytest.fixture
def run(tmp_path):
    """Rows 1 … 120 with scores -60 … 59, so rows 61 … 120 are quarantined; row 121 is set aside."""
    rows = [chat(f"request {n}", f"answer {n}", source="odd" if n % 2 else "even") for n in range(119)]
    rows.append(chat("request 118", "answer 118, nearly", source="odd"))
    file = write_jsonl(tmp_path / "train.jsonl", [*rows, "{"])
    return make_run(tmp_path / "run", file, list(np.arange(-60.0, 60.0)))


@pytest.fixture
def other(tmp_path, run):
    scores = list(np.arange(-60.0, 60.0) + np.where(np.arange(120) % 4, 0, 8))
    return make_run(tmp_path / "other", tmp_path / "train.jsonl", scores, threshold=4.0)
