"""The live page in headless Chromium, against a real server on a small real engine: the playground, the live panel.

Screenshots go to the directory named by SCREENSHOTS, where it is set.
"""

import json
import math
import re
import threading

import httpx
import pytest
from browser import GATE, PATIENCE_MS, PROMPT, Visit, golden, served
from watched import eventually

from dspark_serve.engine import build
from dspark_serve.speculation.cost import Point, Profile

# ---- the playground


def aborted(client):
    """How many requests a server has ended because their client went away."""
    metrics = client.get("/metrics").text
    return float(re.search(r'^dspark:request_success_total{finished_reason="abort".*} (.*)$', metrics, re.MULTILINE)[1])


def test_an_answer_streams_and_escape_stops_it(visit, url):
    client = httpx.Client(base_url=url, timeout=PATIENCE_MS / 1e3)
    before, generated = aborted(client), client.get("/stats").json()["generated_tokens"]
    GATE.hold()
    visit.ask(PROMPT, "With drafts", **{"Max tokens": 400})
    pane = visit.panes()
    pane.wait_for()
    assert pane.locator(".t").count() == 0
    GATE.allow(3)
    pane.locator(".t").nth(2).wait_for()
    assert pane.get_attribute("aria-busy") == "true"
    visit.page.keyboard.press("Escape")
    pane.get_by_text("stopped").wait_for()
    visit.finish()
    eventually(lambda: aborted(client), lambda number: number == before + 1)  # and only then do steps go on
    GATE.release()
    stats = eventually(lambda: client.get("/stats").json(), lambda stats: not stats["running"])
    assert stats["kv_used"] == 0
    assert stats["generated_tokens"] - generated < 400
    client.close()


# The browser may have let go of a streamed body by the time it is asked for it; a copy is read as it comes.
_COPY_ANSWERS = """() => {
    const real = window.fetch;
    window.answers = [];
    window.fetch = async (path, options) => {
        const response = await real(path, options);
        if (path.startsWith("v1/")) window.answers.push(response.clone().text());
        return response;
    };
}"""


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_colours_are_the_servers_own_report(visit, temperature):
    visit.page.evaluate(_COPY_ANSWERS)
    visit.ask(PROMPT, "With drafts", Temperature=temperature, Seed=5)
    visit.finish()
    [body] = visit.page.evaluate("Promise.all(window.answers)")
    lines = [line[6:] for line in body.split("\n") if line.startswith("data: {")]
    chunks = [json.loads(line) for line in lines]
    report = chunks[-1]["metrics"]["speculative_decoding"]
    tokens = visit.tokens(visit.panes())
    sources = [source for _, source, _, _ in tokens]
    assert len(tokens) == 60
    assert sources.count("draft") == report["num_accepted_draft_tokens"] > 0
    assert sources.count("bonus") == report["num_spec_steps"] > 0
    assert sources.count("plain") == 60 - sources.count("draft") - sources.count("bonus") > 0
    by_drafter = {name: share["num_accepted_draft_tokens"] for name, share in report["by_drafter"].items()}
    assert {name: sum(token[3] == name for token in tokens) for name in by_drafter} == by_drafter
    assert set(by_drafter) == {"dspark", "ngram"}
    per_step, run = [], 0
    for _, source, position, _ in tokens:
        if source == "draft":
            assert position == str(run)
        per_step += [run] if source == "bonus" else []
        run = run + 1 if source == "draft" else 0
    assert per_step == report["per_step_accepted"]
    streamed = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    assert "".join(text for text, _, _, _ in tokens) == streamed
    foot = visit.panes().locator(".foot").inner_text()
    assert f"{sources.count('draft')} drafted" in foot
    assert f"{sources.count('bonus')} bonus" in foot


@pytest.mark.parametrize(("seed", "together"), [("7", False), ("", True)])
def test_side_by_side_is_identical_with_the_same_seed(visit, seed, together):
    bodies = []
    visit.page.on("request", lambda request: bodies.append(request.post_data) if request.post_data else None)
    visit.page.get_by_label("At the same time").set_checked(together)
    visit.ask(PROMPT, "Side by side", Temperature=0.8, Seed=seed)
    visit.page.locator(".verdict[data-outcome]").wait_for()
    visit.finish()
    assert visit.page.locator(".verdict").inner_text().startswith("Identical.")
    on, off = (visit.tokens(pane) for pane in visit.panes().all())
    assert "".join(text for text, *_ in on) == "".join(text for text, *_ in off) != ""
    assert {source for _, source, *_ in on} == {"plain", "draft", "bonus"}
    assert {source for _, source, *_ in off} == {"plain"}
    first, second = (json.loads(body) for body in bodies)
    assert [first.pop("speculation")["enabled"], second.pop("speculation")["enabled"]] == [True, False]
    assert first == second
    assert first["seed"] == (7 if seed else first["seed"])
    for pane in visit.panes().all():
        assert "tokens/s" in pane.locator(".speed").inner_text()
    visit.shot(f"side-by-side-{'random' if together else 'seed'}")


def test_answers_that_differ_are_shown_to(visit):
    words = {True: ["one ", "two ", "three"], False: ["one ", "too ", "three"]}
    visit.page.route("**/v1/chat/completions", lambda route: route.fulfill(**answer(route.request.post_data_json)))

    def answer(body):
        return streamed(words[body["speculation"]["enabled"]])

    visit.ask("hello")
    visit.page.locator(".verdict[data-outcome=differs]").wait_for()
    assert "from character 6 on" in visit.page.locator(".verdict").inner_text()
    for pane, differing in zip(visit.panes().all(), (["two ", "three"], ["too ", "three"]), strict=True):
        assert pane.locator(".differs").all_inner_texts() == differing


def streamed(words):
    """An answer of the API whose tokens are these words."""
    marks = [{"index": i, "text": word, "source": "plain"} for i, word in enumerate(words)]
    chunk = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "tokens": marks}]}
    return {"content_type": "text/event-stream", "body": f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"}


def test_a_conversation_goes_on_and_begins_anew(visit):
    bodies = []
    visit.page.on("request", lambda request: bodies.append(request.post_data_json) if request.post_data else None)
    for prompt, keys in ("first\nline", "Enter"), ("second", "Control+Enter"):
        visit.ask(prompt, "With drafts", keys, **{"Max tokens": 8})
        visit.finish()
    assert [message["role"] for message in bodies[1]["messages"]] == ["user", "assistant", "user"]
    said = "".join(text for text, *_ in visit.tokens(visit.page.locator(".turn").first))
    assert bodies[1]["messages"][1]["content"] == said
    visit.page.get_by_role("button", name="New chat").click()
    assert visit.page.locator(".turn").count() == 0
    visit.page.get_by_label("Message").press_sequentially("a")
    visit.page.get_by_label("Message").press("Shift+Enter")
    visit.page.get_by_label("Message").press_sequentially("b")
    assert visit.page.get_by_label("Message").input_value() == "a\nb"
    assert len(bodies) == 2


def test_what_the_server_refuses_is_said(browser, url):
    visit = Visit(browser, url)
    visit.ask("hello", **{"Max tokens": 100000})
    visit.page.get_by_role("alert").filter(has_text="do not fit").first.wait_for()
    visit.finish()
    assert "Not compared" in visit.page.locator(".verdict").inner_text()
    visit.close("400 (Bad Request)")


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("", "ended in the middle"),
        ('data: {"error": {"message": "the engine failed"}}\n\ndata: [DONE]\n\n', "engine failed"),
    ],
)
def test_an_answer_that_breaks_off_is_said_to(visit, end, message):
    whole = streamed(["one ", "two"])
    broken = {**whole, "body": whole["body"].replace("data: [DONE]\n\n", end)}
    visit.page.route("**/v1/chat/completions", lambda route: route.fulfill(**broken))
    visit.ask("hello", "With drafts")
    visit.panes().get_by_role("alert").filter(has_text=message).wait_for()
    assert [text for text, *_ in visit.tokens(visit.panes())] == ["one ", "two"]
    visit.finish()


def test_markup_is_text(visit):
    markup = '<img src="https://elsewhere.example/x" onerror="document.title=1"><script>document.title=2</script>'
    visit.page.route("**/v1/chat/completions", lambda route: route.fulfill(**streamed([markup, "</div>"])))
    visit.ask(markup, "With drafts")
    visit.finish()
    assert visit.page.locator(".question").inner_text() == markup
    assert visit.panes().locator(".text").inner_text() == f"{markup}</div>"
    assert visit.page.locator("main img, main script").count() == 0
    assert visit.page.title() == "golden · dspark-serve"


def test_the_policy_stops_what_slips_in(browser, url):
    visit = Visit(browser, url)
    outcome = visit.page.evaluate(
        """() => {
            try { document.body.innerHTML = "<b>markup</b>"; return "written"; } catch (error) { return error.name; }
        }"""
    )
    assert outcome == "TypeError"
    assert visit.page.evaluate("fetch('https://elsewhere.example/').catch(error => error.name)") == "TypeError"
    assert visit.page.locator("#composer").count() == 1
    visit.close("Content Security Policy", "TrustedHTML")


# ---- the live panel


@pytest.fixture
def predicting(monkeypatch):
    """A server whose budget decides by a profile that is not worth measuring here."""
    profile = Profile(tuple(Point(n, 1, 100, 4.0 + 0.02 * n) for n in (1, 4, 16, 64)), (Point(1, 1, 100, 0.5),))
    monkeypatch.setattr(build, "machine_profile", lambda *args, **options: profile)
    with served(golden(budget="auto", max_num_seqs=2)) as url:
        yield url


def test_charts_move_under_load(browser, predicting):
    visit = Visit(browser, predicting)
    page, client = visit.page, httpx.Client(base_url=predicting, timeout=PATIENCE_MS / 1e3)
    page.locator("#chart-queue output").get_by_text("0 running, 0 waiting").wait_for()
    assert page.locator("#chart-cost polyline.ink").count() == 1  # the curve is known before any step
    assert page.locator("#chart-budget rect, #chart-acceptance rect, #chart-cost circle").count() == 0
    stop = threading.Event()

    def load():
        while not stop.is_set():
            client.post("/v1/completions", json={"prompt": [PROMPT] * 6, "max_tokens": 60, "temperature": 0.5})

    thread = threading.Thread(target=load)
    thread.start()
    try:
        texts = {
            "speed": r"[1-9]",
            "queue": r"^2 running, [1-4] waiting$",
            "pool": r"^[1-9]",
            "cost": r"^off by \d+ %$",
        }
        for chart, text in texts.items():
            page.locator(f"#chart-{chart} output").filter(has_text=re.compile(text)).wait_for()
        page.locator("#chart-speed polyline[points*=' ']").wait_for()
        page.locator("#chart-acceptance rect").first.wait_for()
        page.locator("#chart-budget rect.faint").first.wait_for()
        page.locator("#chart-cost circle.accent").first.wait_for()
        page.locator("#chart-cost circle.ring").first.wait_for()
        page.locator("#chart-cost[title*='what is expected of 2 rows with']").wait_for()
        visit.shot("load")
    finally:
        stop.set()
        thread.join(60)
    page.locator("#chart-queue output").get_by_text("0 running, 0 waiting").wait_for()
    positions = client.get("/stats").json()["positions"]
    tried, accepted = (sum(position[name] for position in positions) for name in ("tried", "accepted"))
    shown = math.floor(100 * accepted / tried + 0.5)  # JavaScript's rounding, which takes halves up
    page.locator("#chart-acceptance output").get_by_text(f"{shown} %").wait_for()
    visit.close()


def test_without_a_cost_model_the_page_says_so(visit):
    visit.page.locator("#chart-cost output").get_by_text("budget full: no model").wait_for()
    facts = visit.page.locator("#facts")
    facts.filter(has_text="golden · cpu · portfolio, up to").wait_for()
