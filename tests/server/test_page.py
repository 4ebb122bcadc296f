"""The live page as files, its figures as JSON: who may have them, under which policy, and what they say."""

import re
import threading
import tomllib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fakes import FakeEngine, make_app

from dspark_serve.server import page
from dspark_serve.types import BudgetReport, CostCurve

ROOT = Path(__file__).parents[2]
UI = ROOT / "dspark_serve" / "server" / "ui"


async def test_every_file_comes_under_the_policy(serve):
    async with serve() as client:
        for path in page.PATHS:
            response = await client.get(path)
            assert response.status_code == 200
            policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
            assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
            assert {policy[kind] for kind in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
            assert response.headers["x-content-type-options"] == "nosniff"
            assert (await client.head(path)).headers["content-length"] == str(len(response.content))
        assert (await client.get("/")).headers["content-type"] == "text/html; charset=utf-8"
        assert (await client.get("/ui/app.js")).headers["content-type"] == "text/javascript; charset=utf-8"


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.inline = [], []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href"):
                self.found.append(value)
            if name == "style" or name.startswith("on"):
                self.inline.append((tag, name))


def test_the_page_names_nothing_but_its_own_files():
    links = Links()
    links.feed((UI / "index.html").read_text(encoding="utf-8"))
    assert links.inline == []
    assert {f"/{link}" for link in links.found} <= page.PATHS
    for path in UI.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(
            r"https?:|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|@import|url\(", text
        )
        for module in re.findall(r'from "\./(.+)"', text):
            assert f"/ui/{module}" in page.PATHS


def test_the_page_is_in_the_wheel():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
        "package-data"
    ]
    packed = {path for pattern in patterns["dspark_serve"] for path in (ROOT / "dspark_serve").glob(pattern)}
    assert {path for path in UI.rglob("*") if path.is_file()} <= packed


@pytest.mark.parametrize("path", ["/", "/ui/page.css", "/ui/nothing.js", "/ui/../page.py", "/ui/%2e%2e/page.py", "/ui"])
async def test_no_ui(serve, path):
    async with serve(ui=False) as client:
        response = await client.get(path)
        assert (response.status_code, response.json()["error"]["message"]) == (404, "no such route")
    async with serve() as client:
        assert (await client.get(path)).status_code == (200 if path in page.PATHS else 404)
    async with serve(ui=False, api_key="sesame") as client:
        assert (await client.get(path)).status_code == 401


async def test_the_page_is_open_and_its_figures_are_not(serve):
    async with serve(api_key="sesame") as client:
        for path in page.PATHS:
            assert (await client.get(path)).status_code == 200
        for path in ("/stats", "/server_info", "/ui/../stats", "/ui/%2e%2e/stats"):
            assert (await client.get(path)).status_code == 401
        authorised = await client.get("/stats", headers={"Authorization": "Bearer sesame"})
        assert authorised.status_code == 200


async def test_the_other_routes_answer_as_without_a_page(serve):
    async with serve() as client:
        assert (await client.get("/v1/chat/completions")).status_code == 405
        assert (await client.post("/")).status_code == 405
        assert (await client.post("/v1/nothing")).status_code == 404
        assert not {path for path in (await client.get("/openapi.json")).json()["paths"]} & page.PATHS


# ---- figures


async def generate(client, **body):
    response = await client.post("/v1/completions", json={"prompt": "x" * 40, "temperature": 0, **body})
    assert response.status_code == 200


async def test_figures_are_what_was_done(serve):
    async with serve(FakeEngine(burst=3)) as client:
        assert (await client.get("/stats")).json()["steps"] == []
        await generate(client, max_tokens=11)
        stats = (await client.get("/stats")).json()
        assert (stats["state"], stats["running"], stats["waiting"], stats["kv_used"]) == ("ready", 0, 0, 0.0)
        assert (stats["generated_tokens"], stats["num_steps"]) == (11, len(stats["steps"]))
        steps = [(step["tokens"], step["kept"], step["accepted"]) for step in stats["steps"]]
        assert steps == [(40, 0, 0), (3, 2, 2), (3, 2, 2), (3, 2, 2), (1, 0, 0)]
        assert stats["positions"] == [{"tried": 3, "accepted": 3}] * 2
        assert all(step["predicted_ms"] is None for step in stats["steps"])
        assert stats["curve"] is None
        newer = (await client.get("/stats?after=4")).json()
        assert (newer["steps"], newer["num_steps"]) == (stats["steps"][4:], 5)
        assert (await client.get("/stats?after=99")).json()["steps"] == []
        assert (await client.get("/stats?after=-1")).status_code == 400


class Refusing(FakeEngine):
    """Accepts the first of three drafts, so that the third is never tried; says what it expected."""

    def step(self):
        report = super().step()
        rows = tuple(replace(row, n_accepted=min(row.n_accepted, 1)) for row in report.rows)
        times = {"propose": 3.0, "forward": 5.0, "verify": 1.0}
        return replace(report, rows=rows, phase_ms=times, budget=BudgetReport(4.5, 2.0, 4.0, 2.0))

    def cost_curve(self):
        return CostCurve(2, 80, (2, 4, 8), (5.0, 6.0, 8.5), 2.5, 1.1)


async def test_figures_of_a_budget_that_predicts(serve):
    async with serve(Refusing(burst=4)) as client:
        await generate(client, max_tokens=13)
        stats = (await client.get("/stats")).json()
        assert stats["positions"] == [{"tried": 3, "accepted": 3}, {"tried": 3, "accepted": 0}]
        assert {(step["ms"], step["predicted_ms"]) for step in stats["steps"]} == {(6.0, 4.5)}
        assert stats["curve"] == {
            "rows": 2, "context": 80, "tokens": [2, 4, 8], "step_ms": [5.0, 6.0, 8.5], "draft_ms": 2.5,
            "slowdown": 1.1,
        }  # fmt: skip


async def test_only_the_last_steps_are_kept(serve):
    async with serve(FakeEngine(max_model_len=2048)) as client:
        await generate(client, max_tokens=700)
        stats = (await client.get("/stats?after=100")).json()
        assert (stats["num_steps"], len(stats["steps"])) == (700, 512)


async def test_figures_are_answered_while_the_engine_loads():
    release, engine = threading.Event(), FakeEngine()
    app = make_app(engine)
    service = app.state.service
    service.engine._load = lambda: release.wait() and engine
    async with app.router.lifespan_context(app):
        assert (await service.live_stats(0)).state == "loading"
        release.set()
        await service.engine.wait_loaded()
        assert (await service.live_stats(0)).state == "ready"


async def test_figures_are_answered_after_the_engines_death(serve):
    engine = FakeEngine()
    engine.fail_at = 2
    async with serve(engine, check=False) as client:
        assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 500
        stats = (await client.get("/stats")).json()
        assert (stats["state"], stats["num_steps"]) == ("dead", 1)
