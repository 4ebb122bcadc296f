"""Whatever clients send: the right status, the standard error body, and an engine that lives on, whole and empty."""

import asyncio

import pytest
from fakes import FakeEngine, until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


def check_error(response, status, param=None, code=None):
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in response.text
    if param is not None:
        assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    return error


async def lives_on(client):
    answer = await client.post(TEXT, json={"prompt": "hi", "max_tokens": 3, "temperature": 0})
    assert answer.json()["choices"][0]["text"] == "Hel"


BAD_CHAT = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "alien", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    ({"messages": HI, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"messages": HI, "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": HI, "reasoning_effort": "high"}, "reasoning_effort"),
    ({"messages": HI, "top_logprobs": 3}, "top_logprobs"),
    ({"messages": HI, "logprobs": 3}, "logprobs"),
    ({"messages": HI, "logprobs": True, "top_logprobs": 21}, "logprobs"),
    ({"messages": HI, "continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"messages": HI, "chat_template_kwargs": {"tokenize": True}}, "messages"),
    ({"messages": HI, "chat_template": "{{ 1 }}"}, "chat_template"),
]
BAD_TEXT = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"prompt": "x" * 511}, "max_tokens"),
    ({"prompt": "x" * 600}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 10**12}, "max_tokens"),
    ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "max_tokens": "5"}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 5.5}, "max_tokens"),
    ({"prompt": "x", "max_tokens": True}, "max_tokens"),
    ({"prompt": "x", "temperature": float("nan")}, "temperature"),
    ({"prompt": "x", "temperature": float("inf")}, "temperature"),
    ({"prompt": "x", "temperature": 1e9}, "temperature"),
    ({"prompt": "x", "temperature": -0.1}, "temperature"),
    ({"prompt": "x", "temperature": "hot"}, "temperature"),
    ({"prompt": "x", "top_p": 0}, "top_p"),
    ({"prompt": "x", "top_k": 10**30}, "top_k"),
    ({"prompt": "x", "min_p": 2}, "min_p"),
    ({"prompt": "x", "presence_penalty": 3}, "presence_penalty"),
    ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty"),
    ({"prompt": "x", "seed": 1 << 70}, "seed"),
    ({"prompt": "x", "n": 1000}, "n"),
    ({"prompt": "x", "n": 0}, "n"),
    ({"prompt": "x", "n": 100}, "n"),
    ({"prompt": "x", "logprobs": -1}, "logprobs"),
    ({"prompt": "x", "logprobs": 99}, "logprobs"),
    ({"prompt": "x", "stop": 5}, "stop"),
    ({"prompt": "x", "stop": [""]}, "stop"),
    ({"prompt": "x", "stop": ["s"] * 100}, "stop"),
    ({"prompt": "x", "stop_token_ids": [10**9]}, None),
    ({"prompt": "x", "stop_token_ids": [1] * 5000}, "stop_token_ids"),
    ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"1": 1000}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"999999": 1}}, "logit_bias"),
    ({"prompt": "x", "min_tokens": 20, "max_tokens": 10}, "min_tokens"),
    ({"prompt": "x", "best_of": 4}, "best_of"),
    ({"prompt": "x", "suffix": "y"}, "suffix"),
    ({"prompt": "x", "guided_json": {"type": "object"}}, "guided_json"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": "x", "stream": "yes"}, "stream"),
    ({"prompt": "x", "speculation": {"max_draft_tokens": -1}}, "speculation.max_draft_tokens"),
    ({"prompt": "x", "speculation": {"enable": True}}, "speculation.enable"),
    ({"prompt": "x", "speculation": True}, "speculation"),
    ({"prompt": "x", "priority": "high"}, "priority"),
]


async def test_bad_fields_of_chat(serve):
    async with serve() as client:
        for body, param in BAD_CHAT:
            check_error(await post(client, CHAT, body), 400, param)
        await lives_on(client)


@pytest.mark.parametrize("stream", [False, True])
async def test_bad_fields_of_completions(serve, stream):
    async with serve() as client:
        for body, param in BAD_TEXT:
            if stream and param == "stream_options":
                continue  # bad only without stream
            check_error(await post(client, TEXT, {"stream": stream, **body}), 400, param)
        await lives_on(client)


async def post(client, path, body):
    """JSON as Python writes it: NaN and lone surrogates included."""
    import json

    return await client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})


async def test_too_long_is_told_with_the_numbers(serve):
    async with serve() as client:
        error = check_error(await post(client, TEXT, {"prompt": "x" * 600}), 400, code="context_length_exceeded")
        assert "600" in error["message"]
        assert "512" in error["message"]


async def test_unknown_model(serve):
    async with serve() as client:
        for path, body in [(CHAT, {"messages": HI}), (TEXT, {"prompt": "x"}), ("/tokenize", {"prompt": "x"})]:
            check_error(await post(client, path, {**body, "model": "gpt-\ud800"}), 404, "model", "model_not_found")
        await lives_on(client)


async def test_bodies_that_are_no_json(serve):
    async with serve() as client:
        json_type = {"Content-Type": "application/json"}
        for path in [CHAT, TEXT, "/tokenize", "/detokenize"]:
            check_error(await client.post(path, content=b"{", headers=json_type), 400, code="invalid_json")
            check_error(await client.post(path, content=b"", headers=json_type), 400)
            check_error(await client.post(path, content=b"[1]", headers=json_type), 400)
            check_error(await client.post(path, content=b"null", headers=json_type), 400)
            error = check_error(await client.post(path, content=b'{"prompt": "\xff\xfe"}', headers=json_type), 400)
            assert "UTF-8" in error["message"]
            check_error(await client.post(path, content=b"[" * 100_000, headers=json_type), 400)
            check_error(await client.post(path, content=b'{"seed": 1' + b"0" * 9000 + b"}", headers=json_type), 400)
            check_error(
                await client.post(path, content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"}), 400
            )
        await lives_on(client)


async def test_large_bodies(serve):
    async def chunked():
        for _ in range(160):
            yield b" " * (1 << 16)

    async with serve() as client:
        check_error(await client.post(TEXT, content=b" " * 10_000_000), 413)
        check_error(await client.post(TEXT, content=chunked(), headers={"Content-Type": "application/json"}), 413)
        lying = {"Content-Length": "99999999999999999999", "Content-Type": "application/json"}
        check_error(await client.post(TEXT, content=b"{}", headers=lying), 413)
        await lives_on(client)
    async with serve(max_body_mib=0.001) as client:
        check_error(await post(client, TEXT, {"prompt": "x" * 2000}), 413)


async def test_routes_and_methods(serve):
    async with serve() as client:
        check_error(await client.get("/nothing"), 404)
        check_error(await client.get(CHAT), 405)
        check_error(await client.delete("/health"), 405)
        check_error(await client.post("/v1/embeddings", json={}), 404)


async def test_full_queue(serve):
    engine = FakeEngine(max_queue=2, max_num_seqs=1)
    async with serve(engine) as client:

        def ask():
            return asyncio.create_task(client.post(TEXT, json={"prompt": "x", "max_tokens": 20}))

        engine.gate.clear()
        asked = [ask()]
        await until(lambda: engine.has_work)  # in its first step: all others are taken together, after it
        asked += [ask() for _ in range(11)]
        await until(lambda: client.service.engine.num_requests == 12)
        engine.gate.set()
        answers = [await task for task in asked]
        full = [answer for answer in answers if answer.status_code != 200]
        assert len(full) == 9
        for answer in full:
            check_error(answer, 503, code="engine_busy")
            assert int(answer.headers["retry-after"]) >= 1
        await lives_on(client)


async def test_unforeseen_failure_says_only_its_id(serve, monkeypatch):
    async with serve() as client:

        async def broken(*_):
            raise ZeroDivisionError("a secret detail")

        monkeypatch.setattr(client.service, "encode", broken)
        response = await client.post(TEXT, json={"prompt": "x"}, headers={"X-Request-Id": "id-7"})
        error = check_error(response, 500, code="internal_error")
        assert "id-7" in error["message"]
        assert "secret" not in response.text


async def test_unknown_fields_are_allowed_and_warned_of_once(serve, capsys):
    async with serve() as client:
        for _ in range(3):
            response = await post(client, TEXT, {"prompt": "x", "frobnicate": 1, "user": "me", "max_tokens": 1})
            assert response.status_code == 200
    assert capsys.readouterr().out.count("frobnicate") <= 1
