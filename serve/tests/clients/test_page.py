"""The chat page, in headless Chromium: somebody types and reads."""

import json
import os
import re
import shutil
import time

import pytest
import tiny_model
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
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


@pytest.fixture(scope="module")
def serve_endless(serve, tmp_path_factory):
    """Starts servers whose answers are as long as there is room."""
    path = tmp_path_factory.mktemp("model") / "endless.gguf"
    tiny_model.write(path, ends=False)
    return lambda *options: serve(path, "--device", "simulated", *options).ready()


@pytest.fixture(scope="module")
def endless(serve_endless):
    return serve_endless()


class Page:
    """The page as somebody sees it: fields and buttons by their labels."""

    def __init__(self, driver, server):
        self.driver = driver
        driver.get(server.url + "/")

    def until(self, what, seconds=20):
        try:
            return WebDriverWait(self.driver, seconds, 0.02).until(lambda _: what())
        except TimeoutException:
            pytest.fail(f"after {seconds} s the page shows {self.said}, {self.speed!r}")

    def button(self, name):
        (found,) = [one for one in self.driver.find_elements(By.TAG_NAME, "button") if one.accessible_name == name]
        return found

    @property
    def message(self):
        field = self.driver.find_element(By.TAG_NAME, "textarea")
        assert field.accessible_name == "Message"
        return field

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


def test_somebody_types_and_reads(browser, serve_endless):
    server = serve_endless("--cache-tokens", "256")
    page = Page(browser, server)
    page.until(lambda: browser.find_element(By.TAG_NAME, "h1").text == "endless")
    page.message.send_keys("What is the capital of France?", Keys.ENTER)
    page.until(lambda: len(page.said) == 2 and page.idle())
    (who, question), (_, answer) = page.said
    assert (who, question) == ("You", "What is the capital of France?") and answer
    tokens = re.fullmatch(r"(\d+) tokens, [\d.]+ tokens/s", page.speed)[1]
    assert int(tokens) == server.metric("vllm:generation_tokens_total")


def test_answers_come_in_pieces_and_are_stopped(browser, endless):
    page = Page(browser, endless)
    page.message.send_keys("Go on.")
    page.button("Send").click()
    seen = [""]

    def grows():
        if len(page.said) == 2 and page.said[1][1] != seen[-1]:
            seen.append(page.said[1][1])
        return len(seen) > 4

    page.until(grows)
    assert all(longer.startswith(text) for text, longer in zip(seen, seen[1:]))
    assert re.fullmatch(r"[\d.]+ tokens/s", page.speed) and endless.load() == 1
    page.button("Stop").click()
    page.until(page.idle)
    endless.wait_until_idle(5)
    stopped = page.said
    time.sleep(0.3)
    assert page.said == stopped


def test_what_was_said_is_sent_until_a_new_chat(browser, endless):
    page = Page(browser, endless)
    browser.execute_script(
        "window.asked = []; const send = window.fetch;"
        "window.fetch = (url, options) => { window.asked.push(options.body); return send(url, options); }"
    )
    for count in (2, 4):
        page.message.send_keys("Go on.", Keys.ENTER)
        page.until(lambda: len(page.said) == count and page.said[-1][1])
        page.button("Stop").click()
        page.until(page.idle)
    answer = page.said[1][1]
    page.button("New chat").click()
    page.until(lambda: page.said == [])
    page.message.send_keys("Go on.", Keys.ENTER)
    page.until(lambda: len(page.said) == 2 and page.said[-1][1])
    page.button("New chat").click()
    page.until(page.idle)
    endless.wait_until_idle(5)
    first, second, third = [json.loads(body)["messages"] for body in browser.execute_script("return window.asked")]
    assert first == third == [{"role": "user", "content": "Go on."}]
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert second[1]["content"] == answer


def test_errors_are_shown(browser, serve_simulated):
    page = Page(browser, serve_simulated("--api-key", "secret").ready())
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
