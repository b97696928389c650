"""The page at `/` as a reader sees it: in Chromium without a screen."""

import shutil

import pytest
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from jaxinfer.engine import Counters
from jaxinfer.engine import Metrics as EngineMetrics
from jaxinfer.serve.metrics import Metrics

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1200,900",
)  # fmt: skip
# How long the answer was whenever it changed.
WATCH = """
window.lengths = [];
new MutationObserver(() => {
  const box = [...document.querySelectorAll(".assistant")].at(-1);
  if (box) lengths.push(box.textContent.length);
}).observe(document.getElementById("turns"), {childList: true, subtree: true, characterData: true});
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Debian's Chromium and its driver; nothing is downloaded."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver, Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def page(browser, server):
    browser.get(server.url)
    yield browser
    assert [entry for entry in browser.get_log("browser") if "favicon" not in entry["message"]] == []


def wait(page, condition, seconds=30):
    """Until the condition holds; a failure says what the page shows."""
    try:
        return WebDriverWait(page, seconds, 0.05).until(condition)
    except TimeoutException:
        log = page.get_log("browser")
        pytest.fail(f"after {seconds} s the page shows {page.find_element(By.TAG_NAME, 'body').text!r}, its log {log}")


def send(page, text, **fields):
    for name, value in fields.items():
        page.execute_script("document.getElementById(arguments[0]).value = arguments[1]", name, str(value))
    page.find_element(By.ID, "text").send_keys(text)
    page.find_element(By.ID, "send").click()


def shown(page, role):
    return [turn.text for turn in page.find_elements(By.CSS_SELECTOR, f".turn.{role}")]


def ready(page):
    return page.find_element(By.ID, "send").is_enabled()


def test_a_chat_streams_and_charts_draw(page):
    page.execute_script(WATCH)
    send(page, "Add two numbers", max_tokens=40, temperature=0)
    assert shown(page, "user") == ["Add two numbers"]
    wait(page, ready)
    lengths = page.execute_script("return lengths")
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 5  # it came piece by piece
    first = shown(page, "assistant")[0]
    assert first.strip()
    send(page, "And three?")  # the second turn holds the first
    wait(page, lambda page: ready(page) and len(shown(page, "assistant")) == 2)
    assert shown(page, "error") == []
    assert page.find_element(By.ID, "model").text == "demo"

    def lines(page):
        """The heights of every figure's line, 0 at the top."""
        given = [line.get_attribute("points").split() for line in page.find_elements(By.TAG_NAME, "polyline")]
        return [[float(point.partition(",")[2]) for point in points] for points in given]

    wait(page, lambda page: all(len(heights) > 1 for heights in lines(page)))
    assert len(lines(page)) == 6
    assert min(lines(page)[0]) < 0.1  # tokens were counted: the highest point is near the top
    assert "none" not in [value.text for value in page.find_elements(By.TAG_NAME, "output")]


def test_what_the_server_refuses_is_shown(page):
    send(page, "Go on", max_tokens=5000)
    wait(page, ready)
    assert shown(page, "error")[0].startswith("max_tokens = 5000 must be in 1..")
    (failed,) = [entry["message"] for entry in page.get_log("browser") if "favicon" not in entry["message"]]
    assert "status of 400" in failed


def test_stop_ends_an_answer(page, server):
    send(page, "Go on", max_tokens=900, temperature=0)  # of random answers, one in 600 is empty
    wait(page, lambda page: any(shown(page, "assistant")))
    page.find_element(By.ID, "stop").click()
    wait(page, ready)
    server.wait_for(running_requests=0, cache_pages_used=0)
    assert shown(page, "error") == []


def test_charts_show_sums_over_the_replicas(page):
    metrics = Metrics()
    for replica in (0, 1):
        metrics.hold(EngineMetrics(Counters(), 2, 3 + replica, 10, 5, 0, 0, 0, 0), replica)
    metrics.first_token.observe(0.5)
    text = metrics.page().decode()
    assert 'jaxinfer_running_requests{replica="1"} 4.0' in text
    sums = page.execute_script("return parse(arguments[0])", text)
    assert sums["jaxinfer_running_requests"] == 7
    assert sums["jaxinfer_cache_pages"] == 20
    assert sums["jaxinfer_time_to_first_token_seconds_sum"] == 0.5
    assert sums["jaxinfer_tokens_total"] == 0
