"""A page in a real browser, and what its reader sees and does there."""

import csv
import json
import shutil
import time

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)


def opened(profile):
    """A headless browser with a profile of its own; skips where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not CHROMIUM or not DRIVER:
        pytest.skip("chromium or chromedriver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={profile}")
    options.add_argument("--window-size=1360,1000")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(DRIVER))


class Reader:
    """A page (a file or an address) in the browser, and what its reader sees and does."""

    def __init__(self, driver, path):
        self.driver, self.url = driver, path if isinstance(path, str) else path.as_uri()
        driver.get("about:blank")
        driver.get_log("browser"), driver.get_log("performance")
        driver.get(self.url)
        self.until(lambda: self.run("return document.body.dataset.state") is not None)

    def go(self, hash_):
        """Follow a link to another state of the page."""
        self.run("location.hash = arguments[0]", hash_)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def until(self, test, seconds=30):
        end = time.monotonic() + seconds
        while not test():
            if time.monotonic() >= end:
                here = self.run("return [location.hash, document.body.dataset.state]")
                raise AssertionError(f"the page did not come to this state; it is at {here}")
            time.sleep(0.02)

    @property
    def state(self):
        return json.loads(self.run("return document.body.dataset.state"))

    def settles(self, **expected):
        self.until(lambda: expected.items() <= self.state.items())

    def press(self, *keys):
        webdriver = pytest.importorskip("selenium.webdriver")
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def click_cell(self, i, j):
        """Click the middle of a cell of the map with a real mouse."""
        webdriver = pytest.importorskip("selenium.webdriver")
        canvas = self.driver.find_element("id", "map")
        x, y, width, height = self.run(
            "const [i, j] = arguments, canvas = document.getElementById('map');"
            "canvas.scrollIntoView({block: 'center'});"
            "const {box, cell} = JSON.parse(canvas.dataset.shown);"
            "return [box.x + (j + 0.5) * cell, box.y + (i + 0.5) * cell,"
            " canvas.offsetWidth, canvas.offsetHeight]",
            i,
            j,
        )
        actions = webdriver.ActionChains(self.driver)
        actions.move_to_element_with_offset(canvas, x - width / 2, y - height / 2)
        actions.click().perform()

    def text(self, name):
        return self.run("return document.getElementById(arguments[0]).textContent", name)

    def check(self):
        """(kind of the check line, its difference)."""
        kind, difference = self.run(
            "const line = document.getElementById('check');"
            "return [line.className, line.dataset.difference ?? null]"
        )
        return kind.split()[1], None if difference is None else float(difference)

    def assert_quiet(self):
        assert self.driver.get_log("browser") == []
        asked = set()
        for entry in self.driver.get_log("performance"):
            event = json.loads(entry["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                asked.add(event["params"]["request"]["url"].split("#")[0])
        # What the browser's own start page asks for is none of ours.
        asked = {url for url in asked if not url.startswith(("chrome:", "data:", "about:"))}
        assert asked == {self.url}

    def save_into(self, folder):
        """Let the page's buttons save into a folder."""
        self.folder = folder
        allow = {"behavior": "allow", "downloadPath": str(folder)}
        self.driver.execute_cdp_cmd("Browser.setDownloadBehavior", allow)

    def saved(self, panel, kind):
        """What the button of a panel saves: rows of a CSV, text of an SVG, bytes of a PNG."""
        before = set(self.folder.iterdir())
        self.run(
            "document.querySelectorAll('.save[data-panel=' + arguments[0] + '] button')"
            "[['svg', 'png', 'csv'].indexOf(arguments[1])].click()",
            panel,
            kind,
        )
        self.until(lambda: {p for p in self.folder.iterdir() if p.suffix == f".{kind}"} - before)
        (path,) = set(self.folder.iterdir()) - before
        assert path.name.startswith(f"regard-{panel}")
        data = path.read_bytes()
        path.unlink()
        if kind == "csv":
            return list(csv.reader(data.decode().splitlines()))
        return data.decode() if kind == "svg" else data
