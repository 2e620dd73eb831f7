"""The page: one file that asks nobody but its server, used in a real Chromium."""

import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from ds4py.server import about, app
from tests.server.scripted import Running, Script, ScriptedEngine

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def test_it_names_no_other_place(served: Any) -> None:
    with served.http() as http:
        response = http.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    text = response.text
    assert text == about.PAGE.read_text(encoding="utf-8")
    assert re.findall(r"(?:src|href)=|https?://|@import|url\(", text) == []
    paths = set(re.findall(r'call\("([^"]+)"', text))
    with served.http() as http:
        assert all(http.get(path).status_code in (200, 405) for path in paths) and paths


@pytest.mark.long
def test_a_chat_in_chromium(served: Any, tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the extra `browser` is missing")
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        requests, errors = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        page.goto(served.url)
        expect, send = sync_api.expect, page.locator("#send")
        expect.set_options(timeout=60_000)
        expect(page.locator("#model")).to_have_text("tiny")
        page.fill("#text", "What is 17 + 25?")
        page.press("#text", "Enter")
        answer = page.locator(".assistant").first
        expect(answer.locator("> .text")).to_have_text("17 + 25 = 42.")
        expect(send).to_have_text("Send")
        thought = answer.locator("details .text")
        expect(thought).to_be_hidden()
        answer.locator("summary").click()
        expect(thought).to_contain_text("Ones")
        page.uncheck("#think")
        page.fill("#text", "Tell me a short story about a fox.")
        page.press("#text", "Enter")
        expect(page.locator(".assistant").nth(1).locator("> .text")).not_to_be_empty()
        expect(send).to_have_text("Send")
        expect(page.locator("#done")).not_to_have_text("0")
        expect(page.locator("#context")).not_to_have_text("0 / 16384")
        expect(page.locator("#hit")).to_contain_text("%")
        page.screenshot(path=os.environ.get("DS4_SCREENSHOT", str(tmp_path / "page.png")))
        page.set_viewport_size({"width": 390, "height": 760})
        for shown in ("#write", "#text", "#send"):
            expect(page.locator(shown)).to_be_in_viewport()
        page.click("#fresh")
        expect(page.locator(".assistant")).to_have_count(0)
        browser.close()
    assert errors == []
    assert {url.startswith(served.url) for url in requests} == {True}


@pytest.mark.long
def test_stop_keys_and_text_that_is_no_markup() -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the extra `browser` is missing")
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    markup = "<img src=x onerror=alert(1)><b>bold</b> "
    opened = threading.Event()
    script = Script([markup], ends=False, before_token=lambda n: n < 60 or opened.wait(60))
    rules = app.Rules(api_key="secret")
    with Running(ScriptedEngine(script, context=10**6), rules) as server:
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page()
            asked = []
            page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept("secret")))
            page.goto(server.url)
            expect = sync_api.expect
            expect(page.locator("#model")).to_have_text("scripted")
            page.uncheck("#think")
            page.fill("#text", "go")
            page.press("#text", "Enter")
            expect(page.locator(".assistant > .text")).to_contain_text(markup.strip())
            page.click("#send")
            opened.set()
            expect(page.locator(".note")).to_have_text("Stopped.")
            expect(page.locator(".assistant img, .assistant b")).to_have_count(0)
            browser.close()
        assert script.closed.acquire(timeout=30)
    assert set(asked) == {"prompt"}
