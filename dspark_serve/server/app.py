"""The HTTP application: routes and nothing else.

Must not know: sampling, text, the engine's thread; those are behind Service.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from dspark_serve.server import errors, page
from dspark_serve.server.errors import ErrorResponse
from dspark_serve.server.live import LiveStats
from dspark_serve.server.middleware import OPEN_PATHS, Gate
from dspark_serve.server.protocol import (
    ChatBody,
    ChatResponse,
    CompletionBody,
    CompletionResponse,
    DetokenizeBody,
    DetokenizeResponse,
    ModelCard,
    ModelList,
    TokenizeBody,
    TokenizeResponse,
)
from dspark_serve.server.render import ChatRenderer, Renderer, TextRenderer
from dspark_serve.server.service import Answer, Service
from dspark_serve.server.stream import TokenEvents, unless_disconnected
from dspark_serve.types import EngineDead, InvalidRequest

router = APIRouter(responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}})

# One event of a stream; its data is a chunk as JSON, or [DONE].
_EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}


def create_app(service: Service) -> FastAPI:
    """The application for one service, which it starts and stops."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(title="dspark-serve", version=version("dspark-serve"), lifespan=lifespan)
    app.state.service = service
    app.include_router(router)
    errors.install(app)
    server = service.config.server
    open_paths = OPEN_PATHS
    if server.ui:
        app.include_router(page.router)
        open_paths |= page.PATHS
    limit = int(server.max_body_mib * 2**20)
    app.add_middleware(Gate, api_key=server.api_key, max_body_bytes=limit, open_paths=open_paths)
    return app


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


# ---- generation


@router.post("/v1/chat/completions", response_model=ChatResponse, responses=STREAMS)
async def chat_completions(body: ChatBody, request: Request) -> Response:
    service = _service(request)

    async def prepare() -> tuple[Answer, Renderer]:
        service.check_model(body.model)
        body.sampling()  # before the prompt is tokenised: refusing is cheap, a long prompt is not
        tokenizer = service.need_tokenizer("chat needs one; send token ids to /v1/completions")
        prompt = await service.encode_chat(body)
        answer = await service.start(body, [prompt])
        return answer, ChatRenderer(body, answer.choices, answer.n, service.model_name, tokenizer, service.report)

    return await _generate(request, bool(body.stream), prepare)


@router.post("/v1/completions", response_model=CompletionResponse, responses=STREAMS)
async def completions(body: CompletionBody, request: Request) -> Response:
    service = _service(request)

    async def prepare() -> tuple[Answer, Renderer]:
        service.check_model(body.model)
        body.sampling()
        prompts, special = body.prompts(), body.add_special_tokens is not False
        token_ids = [await service.encode(prompt, special) for prompt in prompts]
        answer = await service.start(body, token_ids)
        echoes = [service.echo(prompt) if body.echo else "" for prompt in prompts for _ in range(answer.n)]
        name, tokenizer = service.model_name, service.tokenizer
        return answer, TextRenderer(body, answer.choices, answer.n, name, tokenizer, echoes, service.report)

    return await _generate(request, bool(body.stream), prepare)


async def _generate(
    request: Request, stream: bool, prepare: Callable[[], Coroutine[Any, Any, tuple[Answer, Renderer]]]
) -> Response:
    if stream:
        answer, renderer = await unless_disconnected(request, prepare())
        return TokenEvents(answer, renderer, request.scope["request_id"])

    async def whole() -> str:
        answer, renderer = await prepare()
        try:
            await answer.complete()
        finally:
            answer.close()
        return renderer.whole()

    return Response(await unless_disconnected(request, whole()), media_type="application/json")


# ---- text and tokens


@router.post("/tokenize", response_model=TokenizeResponse)
async def tokenize(body: TokenizeBody, request: Request) -> TokenizeResponse:
    service = _service(request)
    service.check_model(body.model)
    body.check_extra()
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("send either prompt or messages", "prompt", "invalid_value")
    limit = service.info.max_model_len
    tokenizer = service.need_tokenizer("there is no text to tokenize")
    if body.prompt is None:
        tokens = await service.encode_chat(body)
    else:
        tokens = await service.encode(body.prompt, body.add_special_tokens is not False)
    texts = [tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None
    return TokenizeResponse(count=len(tokens), max_model_len=limit, tokens=tokens, token_strs=texts)


@router.post("/detokenize", response_model=DetokenizeResponse)
async def detokenize(body: DetokenizeBody, request: Request) -> DetokenizeResponse:
    service = _service(request)
    service.check_model(body.model)
    body.check_extra()
    return DetokenizeResponse(prompt=await service.decode(body.tokens))


# ---- what is served, and how it fares


@router.get("/v1/models", response_model=ModelList)
async def models(request: Request) -> ModelList:
    return ModelList(data=[_card(_service(request))])


@router.get("/v1/models/{model_id:path}", response_model=ModelCard)
async def model(model_id: str, request: Request) -> ModelCard:
    service = _service(request)
    service.check_model(model_id)
    return _card(service)


def _card(service: Service) -> ModelCard:
    return ModelCard(
        id=service.model_name,
        object="model",
        created=service.created,
        owned_by="dspark-serve",
        root=service.config.model.model,
        max_model_len=service.info.max_model_len,
    )


@router.get("/health")
async def health(request: Request) -> dict[str, str]:
    """Alive: 200 from the first moment on, 503 once the engine has failed."""
    engine = _service(request).engine
    if engine.state == "dead":
        raise EngineDead("the engine has failed; the server must be restarted")
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> dict[str, str]:
    """200 when a request would be taken, 503 while loading, draining or dead."""
    _service(request).engine.check_open()
    return {"status": "ready"}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    return Response(_service(request).metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.get("/stats", response_model=LiveStats)
async def stats(request: Request, after: Annotated[int, Query(ge=0)] = 0) -> LiveStats:
    """What the live page draws; of the last steps those that came after the first `after`."""
    return await _service(request).live_stats(after)


@router.get("/version")
async def show_version() -> dict[str, str]:
    return {"version": version("dspark-serve")}


@router.get("/server_info")
async def server_info(request: Request) -> dict[str, Any]:
    """The engine's facts and the configuration, without the key."""
    service = _service(request)
    config = service.config.model_dump()
    config["server"]["api_key"] = None if config["server"]["api_key"] is None else "***"
    return {"version": version("dspark-serve"), "engine": asdict(service.info), "config": config}
