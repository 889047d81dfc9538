"""The chat page, in headless Chromium: somebody types and reads."""

import os
import re
import shutil
import time

import pytest
from conftest import SIMULATED
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (BROWSER and DRIVER):
        why = "skipped for want of chromium: Debian's packages chromium and chromium-driver bring it"
        required = "chromium" in os.environ.get("FLASHINFER_RS_REQUIRE", "").replace(",", " ").split()
        (pytest.fail if required else pytest.skip)(why)
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    profile = tmp_path_factory.mktemp("profile")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The page as somebody sees it: fields and buttons by their labels."""

    def __init__(self, driver, server):
        self.driver = driver
        driver.get(server.url + "/")

    def until(self, what, seconds=20):
        return WebDriverWait(self.driver, seconds, 0.02).until(lambda _: what())

    def button(self, name):
        (found,) = [one for one in self.driver.find_elements(By.TAG_NAME, "button") if one.accessible_name == name]
        return found

    @property
    def message(self):
        (found,) = [one for one in self.driver.find_elements(By.TAG_NAME, "textarea") if one.accessible_name == "Message"]
        return found

    @property
    def said(self):
        """Who said what, of all messages."""
        shown = "return [...document.querySelectorAll('[role=log] article')]"
        return self.driver.execute_script(f"{shown}.map(one => [...one.children].map(part => part.textContent))")

    @property
    def speed(self):
        return self.driver.find_element(By.CSS_SELECTOR, "[role=status]").text

    def idle(self):
        return not self.button("Stop").is_enabled()


@pytest.fixture
def endless(serve):
    """A server whose answers take a while."""
    return serve(*SIMULATED, "--cache-tokens", "4096").ready()


def test_somebody_types_and_reads(browser, smollm2):
    page = Page(browser, smollm2)
    page.until(lambda: browser.find_element(By.TAG_NAME, "h1").text == "smollm2")
    page.message.send_keys("What is the capital of France?", Keys.ENTER)
    page.until(lambda: len(page.said) == 2 and page.idle(), 120)
    (who, question), (_, answer) = page.said
    assert (who, question) == ("You", "What is the capital of France?") and "Paris" in answer
    assert re.fullmatch(r"\d+ tokens, [\d.]+ tokens/s", page.speed)


def test_answers_come_in_pieces_and_are_stopped(browser, endless):
    page = Page(browser, endless)
    page.message.send_keys("Go on.")
    page.button("Send").click()
    lengths = []

    def grows():
        lengths.append(len(page.said[-1][1]) if len(page.said) == 2 else 0)
        return len(set(lengths)) > 4

    page.until(grows)
    assert lengths == sorted(lengths) and re.fullmatch(r"[\d.]+ tokens/s", page.speed)
    assert endless.load() == 1
    page.button("Stop").click()
    page.until(page.idle)
    endless.wait_until_idle(5)
    stopped = page.said
    time.sleep(0.3)
    assert page.said == stopped
    # What was said is remembered, and a new chat forgets it.
    before = endless.metric("vllm:prompt_tokens_total")
    page.message.send_keys("And now?", Keys.ENTER)
    page.until(lambda: len(page.said) == 4 and page.said[-1][1])
    page.button("New chat").click()
    page.until(lambda: page.said == [] and page.idle())
    endless.wait_until_idle(5)
    assert endless.metric("vllm:prompt_tokens_total") - before > len(stopped[1][1]) / 20


def test_errors_are_shown(browser, serve):
    page = Page(browser, serve(*SIMULATED, "--api-key", "secret").ready())
    page.message.send_keys("Hello", Keys.ENTER)
    page.until(lambda: page.said and page.said[-1][0] == "Error")
    assert "key" in page.said[-1][1].lower() and page.idle()


def test_the_page_needs_nothing_else(browser, simulated):
    """No other host, and nothing that its own policy forbids."""
    browser.get_log("browser")
    Page(browser, simulated)
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
    assert all(url.startswith(simulated.url) for url in asked)
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
