"""The report in a real browser: Debian's Chromium, headless, driven by Playwright; axe looks for what some readers could not use."""

import shutil
from collections.abc import Iterator

import pytest
from recorded_run import evaluation, finished, publish, said

from fisherfold.run.params import ReportParams
from stages import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
MODULES = [f"model.layers.{block}.{kind}" for block in range(12) for kind in KINDS]
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    samples = [said(f"prompt {i}", "yes " * 30, "no " * 30) for i in range(12)]
    workspace = finished(tmp_path_factory.mktemp("run"), MODULES, evaluation(samples=samples))
    layers = {module: {"reconstruction_error": 0.1 + 0.01 * i} for i, module in enumerate(MODULES)}
    publish(workspace, "factorize", factorize__json={"layers": layers})
    report.run(workspace, ReportParams())
    return (workspace.out("report") / "index.html").as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on the path: `apt-get install chromium`")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=["light", "dark"])
def page(browser, address, request) -> Iterator[object]:
    """The report, opened offline; nothing may be fetched and no error may be raised."""
    context = browser.new_context(color_scheme=request.param, viewport={"width": 1100, "height": 800}, offline=True)
    page, told = context.new_page(), []
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("console", lambda message: told.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: told.append(request.url) if request.url.startswith("http") else None)
    page.goto(address)
    page.wait_for_selector(".chart.drawn .main-svg")
    yield page
    context.close()
    assert told == []


def test_every_picture_is_drawn_and_answers_the_pointer(page) -> None:
    charts = page.locator(".chart").count()
    assert charts > 6 and page.locator(".chart.drawn .main-svg:first-child").count() >= charts
    heat = page.locator(".chart", has=page.locator(".heatmaplayer image")).first
    heat.scroll_into_view_if_needed()
    box = heat.locator(".nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector(".hoverlayer .hovertext")
    assert "block" in page.locator(".hoverlayer .hovertext").first.text_content()


def test_axe_finds_nothing_serious(page) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = axe.run(page).response["violations"]
    assert [
        (each["id"], each["nodes"][0]["html"][:200]) for each in found if each["impact"] in ("serious", "critical")
    ] == []


def test_a_narrow_screen_cuts_no_picture(page) -> None:
    page.set_viewport_size({"width": 400, "height": 800})
    page.reload()
    page.wait_for_selector(".chart.drawn .main-svg")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    beyond = "[...document.querySelectorAll('.live')].filter(e => e.getBoundingClientRect().right > 400 || e.scrollWidth > e.clientWidth + 1).length"
    assert page.evaluate(beyond) == 0
    narrowest = "Math.min(...[...document.querySelectorAll('.texts tbody td')].map(e => e.clientWidth).filter(w => w))"
    assert page.evaluate(narrowest) > 300  # sentences stand below each other


def test_the_keyboard_reaches_contents_and_theme(page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "theme"
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.keyboard.press("Enter")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#what-it-costs"
    assert -1 <= page.locator("#what-it-costs").bounding_box()["y"] < 700


def test_without_scripts_the_pictures_are_there(browser, address) -> None:
    context = browser.new_context(java_script_enabled=False, viewport={"width": 400, "height": 800})
    page = context.new_page()
    page.goto(address)
    assert all(picture.bounding_box()["height"] > 50 for picture in page.locator(".chart > svg").all())
    assert page.locator("#theme").is_hidden()
    context.close()
