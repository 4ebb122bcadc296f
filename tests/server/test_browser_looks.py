"""The live page in headless Chromium: keys of servers, the keyboard, themes, sizes of screens."""

import pytest
from browser import PROMPT, Visit, served
from fakes import FakeEngine, make_service


def test_the_key_is_asked_for_and_kept_in_the_tab(browser):
    with served(make_service(FakeEngine(burst=2), api_key="sesame")) as url:
        visit = Visit(browser, url)
        page = visit.page
        dialog = page.get_by_role("dialog", name="This server asks for a key")
        dialog.get_by_label("API key").fill("wrong")
        dialog.get_by_role("button", name="Use it").click()
        dialog.get_by_text("did not take that key").wait_for()
        visit.shot("key")
        page.clock.install()
        dialog.get_by_role("button", name="Cancel").click()
        page.locator("#state-text").filter(has_text="asks for a key").wait_for()
        asked = len(visit.requests)
        page.clock.run_for(10_000)
        assert not dialog.is_visible()
        assert len(visit.requests) == asked
        page.get_by_role("button", name="Key").click()
        dialog.get_by_label("API key").fill("sesame")
        dialog.get_by_label("API key").press("Enter")
        page.locator("#state-text").get_by_text("ready").wait_for()
        visit.ask("hi", "With drafts", **{"Max tokens": 12})
        visit.finish()
        assert visit.panes().locator(".text").inner_text() == "Hello, wörl"
        kept = page.evaluate("[Object.values(sessionStorage), Object.values(localStorage)]")
        assert kept == [["sesame"], []]
        page.reload()
        page.locator("#state-text").get_by_text("ready").wait_for()
        assert not dialog.is_visible()
        visit.close("401 (Unauthorized)")


@pytest.mark.parametrize("width", [320, 800, 1440])
def test_nothing_is_wider_than_the_screen(browser, url, width):
    visit = Visit(browser, url, viewport={"width": width, "height": 740}, has_touch=width < 800)
    page = visit.page
    page.locator("#chart-pool svg *").first.wait_for(state="attached")
    if width < 640:
        assert not page.get_by_label("Temperature").is_visible()
        page.get_by_text("Settings").click()
    visit.ask("W" * 300)
    page.locator(".verdict[data-outcome]").wait_for()
    beyond = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
    assert page.evaluate(f"{beyond}.map(e => e.outerHTML.slice(0, 80))") == []
    for name in ("scrollWidth", "clientWidth"):
        assert page.evaluate(f"document.documentElement.{name}") <= width
    if width < 640:
        sizes = page.locator("button:visible").evaluate_all("all => all.map(e => e.getBoundingClientRect().height)")
        assert min(sizes) >= 44
    visit.shot(f"width-{width}", full_page=True)
    visit.close()


def test_a_setting_that_is_wrong_is_shown_on_a_phone_too(browser, url):
    visit = Visit(browser, url, viewport={"width": 390, "height": 740})
    settings, temperature = visit.page.get_by_text("Settings"), visit.page.get_by_label("Temperature")
    settings.click()
    temperature.fill("")
    settings.click()
    assert not temperature.is_visible()
    visit.page.get_by_label("Message").fill("hello")
    visit.page.get_by_label("Message").press("Enter")
    temperature.wait_for()
    assert visit.page.evaluate("document.activeElement.id") == "temperature"
    assert visit.page.locator(".turn").count() == 0
    visit.close()


_CONTRAST = """selector => {
    const parts = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
    const light = (colour) => {
        const linear = (c) => (c <= 0.04 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        const [r, g, b] = parts(colour).map((c) => linear(c / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const element = document.querySelector(selector);
    let ground = element;
    while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
    const pair = [light(getComputedStyle(element).color), light(getComputedStyle(ground).backgroundColor)];
    return [(Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05), pair[1]];
}"""


def test_light_and_dark(browser, url):
    visit = Visit(browser, url, color_scheme="dark")
    page = visit.page
    visit.ask(PROMPT)
    page.locator(".verdict[data-outcome]").wait_for()
    seen = ("body", "#facts", "#state", ".text", ".foot", ".verdict", "figcaption", "output", "#send", "#new-chat")

    def grounds():
        found = {selector: page.evaluate(_CONTRAST, selector) for selector in seen}
        assert {selector for selector, (contrast, _) in found.items() if contrast < 4.5} == set()
        return found["body"][1]

    button = page.get_by_role("button", name="Theme")
    assert grounds() < 0.05
    visit.shot("dark")
    page.emulate_media(color_scheme="light")
    assert grounds() > 0.8
    visit.shot("light")
    button.click()
    button.click()
    assert button.inner_text() == "Theme: dark"
    assert grounds() < 0.05
    page.reload()
    assert button.inner_text() == "Theme: dark"
    page.locator("#facts").filter(has_text="golden").wait_for()
    seen = ("body", "#facts", "#state")
    assert grounds() < 0.05
    visit.close()


def test_all_of_it_is_reached_and_named_by_keyboard(visit):
    page = visit.page
    page.get_by_label("Message").focus()
    reached = []
    for _ in range(7):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.value"))
    assert reached == ["both", "temperature", "max-tokens", "seed", "together", "new-chat", "send"]
    snapshot = page.locator("#composer").aria_snapshot()
    for name in (
        'radio "Side by side" [checked]',
        'spinbutton "Temperature"',
        'spinbutton "Seed"',
        'textbox "Message"',
    ):
        assert name in snapshot
    for figure in page.locator("#live svg").all():
        figure.get_by_text("0").first.wait_for()
        assert len(figure.get_attribute("aria-label")) > 10
