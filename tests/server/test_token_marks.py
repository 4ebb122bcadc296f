"""`speculation.mark_tokens`: how each token came to be, beside the text it belongs to; on a scripted engine."""

import json

import pytest
from fakes import FakeEngine

HI = [{"role": "user", "content": "hi"}]
MARK = {"mark_tokens": True}


async def ask(client, path, **body):
    prompt = {"messages": HI} if path == "chat/completions" else {"prompt": "hi"}
    return await client.post(f"/v1/{path}", json={**prompt, "temperature": 0, "max_tokens": 40, **body})


def streamed(response):
    """Choices of the chunks of a stream in order, and its last chunk."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: {")]
    chunks = [json.loads(line) for line in lines]
    return [choice for chunk in chunks for choice in chunk["choices"]], chunks[-1]


def text_of(choice):
    return choice["text"] if "text" in choice else choice.get("delta", choice.get("message")).get("content", "")


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
@pytest.mark.parametrize("stop", [None, "orld! Th!", "scri"])
async def test_stream_and_whole_answer_agree_with_the_report(serve, path, stop):
    async with serve(FakeEngine(burst=3)) as client:
        options = {"stop": stop, "speculation": MARK}
        choices, last = streamed(await ask(client, path, stream=True, **options))
        shares: dict[int, str] = {}
        marks = []
        for choice in choices:
            if "tokens" in choice:
                assert "".join(mark["text"] for mark in choice["tokens"]) == text_of(choice)
                for mark in choice["tokens"]:
                    shares[mark["index"]] = shares.get(mark["index"], "") + mark["text"]
                    marks += [mark] if "source" in mark else []
        answer = (await ask(client, path, **options)).json()
        [whole] = answer["choices"]
        assert [{**mark, "text": shares[mark["index"]]} for mark in marks] == whole["tokens"]
        assert "".join(mark["text"] for mark in whole["tokens"]) == text_of(whole)
        assert len(marks) == answer["usage"]["completion_tokens"]
        report = last["metrics"]["speculative_decoding"]
        counts = [[mark["source"] for mark in marks].count(source) for source in ("draft", "bonus", "plain")]
        if stop is None:
            assert counts[:2] == [report["num_accepted_draft_tokens"], report["num_spec_steps"]]
        assert counts[0] == sum(mark.get("position", -1) >= 0 for mark in marks) > 0
        assert counts[2] == 1  # the first token, which follows the prompt


async def test_without_speculation_all_tokens_are_plain(serve):
    async with serve(FakeEngine(burst=3)) as client:
        answer = (await ask(client, "chat/completions", speculation={"enabled": False, **MARK})).json()
        assert {mark["source"] for mark in answer["choices"][0]["tokens"]} == {"plain"}


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
@pytest.mark.parametrize("control", [None, {"enabled": True}, {"mark_tokens": False}])
async def test_who_does_not_ask_sees_nothing_of_it(serve, path, control):
    async with serve(FakeEngine(burst=3)) as client:
        choices, _ = streamed(await ask(client, path, stream=True, speculation=control))
        whole = (await ask(client, path, speculation=control)).json()["choices"]
        assert not any("tokens" in choice for choice in (*choices, *whole))


async def test_it_must_be_a_boolean(serve):
    async with serve() as client:
        response = await ask(client, "completions", speculation={"mark_tokens": "yes"})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "speculation.mark_tokens"
