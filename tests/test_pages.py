"""The pages of inside.py and evaluation/preference.py in a real browser: Debian's chromium, through playwright.
.ci/run installs it; elsewhere: apt-get install chromium."""
import shutil
import threading

import pytest
from conftest import tiny
from PIL import Image

import inside
from common.serve import server
from evaluation import preference
from sample import Pipeline

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not BROWSER, reason="no chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser):
    """opened(html, answer) → the page in the browser. What it writes to the console fails the test."""
    said, running = [], []

    def open_page(html, answer):
        running.append(server(html, answer, 0))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        page = browser.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"http://127.0.0.1:{running[-1].server_port}/")
        return page

    yield open_page
    for one in running:
        one.shutdown()
        one.server_close()
    assert not [text for text in said if "status of 400" not in text]


def pixels(page, name):
    return page.evaluate(f"document.getElementById('{name}').toDataURL()")


def draw(page):
    page.click("#draw")
    page.wait_for_function("document.getElementById('said').textContent.startsWith('drawn in')")


def test_inside(opened, tmp_path):
    (tmp_path / "image").mkdir()
    (tmp_path / "video").mkdir()
    models = {"picture": Pipeline.load(tiny(tmp_path / "image")), "clip": Pipeline.load(tiny(tmp_path / "video", temporal=True))}
    page = opened(inside.PAGE, inside.answerer(models))
    page.wait_for_selector("#kind option", state="attached")
    page.fill("#steps", "3")
    page.fill("#prompt", "  ")
    page.click("#draw")
    page.wait_for_function("document.getElementById('said').textContent === 'type a prompt'")
    page.fill("#prompt", "a red zebra")
    draw(page)
    assert "no training caption had: zebra" in page.inner_text("#said")
    assert page.locator("#words button").all_inner_texts() == ["a", "red", "zebra", "(end)"]
    assert page.locator("#noisy figure").count() == page.locator("#clean figure").count() == 3
    plain = pixels(page, "look")
    page.hover("#words button:nth-child(2)")
    of_red = pixels(page, "look")
    page.locator("#noisy figure").nth(1).click()
    page.hover("#words button:nth-child(2)")
    assert plain != of_red and "t = " in page.inner_text("#step-name") and pixels(page, "look") != plain
    page.mouse.move(0, 0)
    assert pixels(page, "look") == plain and not page.is_visible("#twin-part") and not page.is_visible("#lambda_m")
    page.hover("#look", position=dict(x=300, y=20))
    assert pixels(page, "look") != plain
    page.select_option("#kind", "clip")
    assert page.is_visible("#lambda_m")
    draw(page)
    assert page.is_visible("#twin-part") and page.is_visible("#time-part") and page.inner_text("#frame-name") == "all, playing"
    page.locator("#frame").fill("2")
    assert page.inner_text("#frame-name") == "2"


def test_preference(opened, tmp_path):
    for name, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (8, 8), colour).save(tmp_path / name / f"<b>prompt {i}_{i:06d}.png")
    test = preference.Test(tmp_path / "a", tmp_path / "b", tmp_path / "out.json", 0)
    page = opened(preference.PAGE, test.answer)
    number = lambda i: page.wait_for_function(f"document.getElementById('number').textContent === '{i} of 4'")
    number(1)
    assert page.inner_text("#prompt") == "<b>prompt 0" and "looks better" in page.inner_text("#asked")
    page.keyboard.press("ArrowLeft")
    number(2)
    page.keyboard.press("Backspace")
    number(1)
    page.click("#right")
    number(2)
    page.keyboard.press("ArrowDown")
    number(3)
    assert "what the text says" in page.inner_text("#asked")
    page.keyboard.press("ArrowRight")
    number(4)
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#result", state="visible")
    assert "50.0 %" in page.inner_text("#shares") and len(test.answers) == 4
    page.reload()
    page.wait_for_selector("#result", state="visible")
