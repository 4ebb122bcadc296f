"""Answers as OpenAI's JSON: whole, or chunk by chunk.

Chunks are built as plain dictionaries, because they are made once per token and choice; whole answers as OpenAI's own
types. Must not know: HTTP, the engine, how choices come about.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Literal, Protocol

from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionMessage
from openai.types.completion_usage import PromptTokensDetails

from dspark_serve.choice import Choice, Mark, Piece
from dspark_serve.server.protocol import (
    ChatBody,
    ChatChoice,
    ChatResponse,
    CompletionBody,
    CompletionResponse,
    GenerationBody,
    RequestMetrics,
    SpeculativeDecoding,
    TextChoice,
)
from dspark_serve.text import Tokenizer
from dspark_serve.types import TokenLogprobs

_LEAST = -9999.0  # what OpenAI writes for a logprob that JSON cannot carry


Report = Literal["none", "summary", "detailed"]  # how much of speculation an answer tells


class Renderer(Protocol):
    """How one kind of answer is written."""

    def chunks(self, index: int, piece: Piece) -> Iterator[str]:
        """The chunks, as JSON, for what a piece adds to choice `index`; often one, sometimes none."""
        ...

    def last_chunk(self) -> str | None:
        """The chunk after all choices have ended, if there is one."""
        ...

    def whole(self) -> str:
        """The answer in one piece, as JSON, once all choices have ended."""
        ...


class _Base:
    """What both kinds share: the envelope, usage, speculation report."""

    def __init__(
        self, kind: str, stem: str, body: GenerationBody, choices: Sequence[Choice], n: int, model: str, report: Report
    ) -> None:
        self.report = report
        self.body, self.choices, self.n, self.model = body, choices, n, model
        self.created = int(time.time())
        self.id = f"{stem}-{uuid.uuid4().hex}"
        self.open = len(choices)
        self.envelope: dict[str, Any] = {"id": self.id, "object": kind, "created": self.created, "model": model}
        options = body.stream_options
        self.usage_at_end = bool(options and options.include_usage)
        self.usage_always = bool(options and options.continuous_usage_stats)
        self.begun = [False] * len(choices)

    def usage(self) -> CompletionUsage:
        """Prompts count once, however many choices share them."""
        first_of_prompt = self.choices[:: self.n]
        prompt = sum(choice.request.num_prompt for choice in first_of_prompt)
        generated = sum(len(choice.token_ids) for choice in self.choices)
        return CompletionUsage(
            prompt_tokens=prompt,
            completion_tokens=generated,
            total_tokens=prompt + generated,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(c.num_cached for c in first_of_prompt)),
        )

    def metrics(self) -> dict[str, Any]:
        """The field `metrics`, or nothing where no report is wanted."""
        if self.report == "none":
            return {}
        stats = [choice.request.stats for choice in self.choices]
        report = SpeculativeDecoding.of(stats, detailed=self.report == "detailed")
        return {"metrics": RequestMetrics(speculative_decoding=report)}

    def dump(self, choices: list[dict[str, Any]], extra: dict[str, Any] | None = None, last: bool = False) -> str:
        """A chunk. `last`: nothing follows it, so that it carries the speculation report."""
        chunk: dict[str, Any] = {**self.envelope, "choices": choices, **(extra or {})}
        if self.usage_at_end or self.usage_always:
            shown = self.usage_always or not choices
            chunk["usage"] = self.usage().model_dump(exclude_unset=True) if shown else None
        if last:
            chunk |= {name: value.model_dump(exclude_unset=True) for name, value in self.metrics().items()}
        return json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))

    def last_chunk(self) -> str | None:
        return self.dump([], last=True) if self.usage_at_end else None

    def ends(self, piece: Piece) -> bool:
        """Count a choice's end; True if the chunk that shows it is the last of the stream."""
        self.open -= piece.finish_reason is not None
        return self.open == 0 and piece.finish_reason is not None and not self.usage_at_end

    def worth_sending(self, piece: Piece) -> bool:
        """False while text is held back because it may be half a character or the beginning of a stop string."""
        return bool(
            piece.text
            or piece.finish_reason
            or piece.logprobs
            or piece.marks
            or (piece.token_ids and self.body.return_token_ids)
        )

    def whole_marks(self, choice: Choice) -> dict[str, Any]:
        """The field `tokens` of a whole answer, or nothing where it is not wanted: one mark per token."""
        if not self.body.marks_tokens():
            return {}
        shares: dict[int, str] = {}
        for mark in choice.marks:
            shares[mark.index] = shares.get(mark.index, "") + mark.text
        return {"tokens": [{**_mark(m), "text": shares[m.index]} for m in choice.marks if m.source is not None]}


def _mark(mark: Mark) -> dict[str, Any]:
    entry: dict[str, Any] = {"index": mark.index, "text": mark.text}
    if mark.source is not None:
        entry["source"] = mark.source
    if mark.source == "draft":
        entry |= {"position": mark.position, "drafter": mark.drafter}
    return entry


class ChatRenderer(_Base):
    def __init__(
        self,
        body: ChatBody,
        choices: Sequence[Choice],
        n: int,
        model: str,
        tokenizer: Tokenizer,
        report: Report = "summary",
    ) -> None:
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        super().__init__(kind, "chatcmpl", body, choices, n, model, report)
        self.tokenizer = tokenizer

    def chunks(self, index: int, piece: Piece) -> Iterator[str]:
        if not self.begun[index]:
            self.begun[index] = True
            role = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            prompt = self.choices[index].request.prompt_token_ids
            yield self.dump([role], {"prompt_token_ids": prompt} if self.body.return_token_ids else None)
        if not self.worth_sending(piece):
            return
        choice: dict[str, Any] = {
            "index": index,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self._logprobs(piece.logprobs),
            "finish_reason": piece.finish_reason,
        }
        if piece.finish_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        if self.body.return_token_ids:
            choice["token_ids"] = piece.token_ids
        if self.body.marks_tokens():
            choice["tokens"] = [_mark(mark) for mark in piece.marks]
        yield self.dump([choice], last=self.ends(piece))

    def whole(self) -> str:
        choices = []
        for index, choice in enumerate(self.choices):
            fields = self.whole_marks(choice)
            if self.body.return_token_ids:
                fields["token_ids"] = choice.token_ids
            choices.append(
                ChatChoice(
                    index=index,
                    message=ChatCompletionMessage(role="assistant", content=choice.text, refusal=None),
                    logprobs=self._logprobs(choice.logprobs),
                    finish_reason=choice.finish_reason,
                    stop_reason=choice.stop_reason,
                    **fields,
                )
            )
        answer = ChatResponse(**self.envelope, choices=choices, usage=self.usage(), **self.metrics())
        if self.body.return_token_ids:
            answer.prompt_token_ids = list(self.choices[0].request.prompt_token_ids)
        return answer.model_dump_json(exclude_unset=True)

    def _logprobs(self, entries: Iterable[TokenLogprobs]) -> Any:
        content = [
            {
                **self._entry(entry.token_id, entry.logprob),
                "top_logprobs": [self._entry(token, logprob) for token, logprob in entry.top],
            }
            for entry in entries
        ]
        return {"content": content, "refusal": None} if content else None

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self.tokenizer.token_bytes(token_id)
        return {"token": raw.decode("utf-8", "replace"), "bytes": list(raw), "logprob": max(logprob, _LEAST)}


class TextRenderer(_Base):
    """`echoes[i]` is the text that goes before choice i: its prompt if echo was asked for, else nothing."""

    def __init__(
        self,
        body: CompletionBody,
        choices: Sequence[Choice],
        n: int,
        model: str,
        tokenizer: Tokenizer | None,
        echoes: Sequence[str],
        report: Report = "summary",
    ) -> None:
        super().__init__("text_completion", "cmpl", body, choices, n, model, report)
        self.tokenizer = tokenizer
        self.echoes = echoes
        self.echo = bool(body.echo)
        self.offsets = [0] * len(choices)  # characters of the choice's text that already have logprobs

    def chunks(self, index: int, piece: Piece) -> Iterator[str]:
        choice = self.choices[index]
        text, fields = piece.text, dict[str, Any]()
        entries: list[TokenLogprobs | None] = list(piece.logprobs)
        if not self.begun[index]:
            if not piece.token_ids and piece.finish_reason is None:
                return  # a part of the prompt was scored; nothing to show before the first token
            self.begun[index] = True
            text = self.echoes[index] + text
            entries = [*self._prompt_entries(choice), *entries]
            if self.body.return_token_ids:
                fields["prompt_token_ids"] = choice.request.prompt_token_ids
        elif not self.worth_sending(piece):
            return
        if piece.finish_reason is not None:
            fields["stop_reason"] = piece.stop_reason
        if self.body.return_token_ids:
            fields["token_ids"] = piece.token_ids
        if self.body.marks_tokens():
            fields["tokens"] = [_mark(mark) for mark in piece.marks]
        logprobs = self._logprobs(index, entries, choice)
        shown = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": piece.finish_reason, **fields}
        yield self.dump([shown], last=self.ends(piece))

    def whole(self) -> str:
        choices = []
        for index, choice in enumerate(self.choices):
            fields = self.whole_marks(choice)
            if self.body.return_token_ids:
                prompt = list(choice.request.prompt_token_ids)
                fields |= {"token_ids": choice.token_ids, "prompt_token_ids": prompt}
            entries = [*self._prompt_entries(choice), *choice.logprobs]
            choices.append(
                TextChoice(
                    index=index,
                    text=self.echoes[index] + choice.text,
                    logprobs=self._logprobs(index, entries, choice),
                    finish_reason=choice.finish_reason,
                    stop_reason=choice.stop_reason,
                    **fields,
                )
            )
        answer = CompletionResponse(**self.envelope, choices=choices, usage=self.usage(), **self.metrics())
        return answer.model_dump_json(exclude_unset=True)

    def _prompt_entries(self, choice: Choice) -> list[TokenLogprobs | None]:
        """Echo with logprobs scores the prompt; its first token follows nothing and has none."""
        return [None, *choice.prompt_logprobs] if self.echo and choice.request.params.logprobs is not None else []

    def _logprobs(
        self, index: int, entries: Sequence[TokenLogprobs | None], choice: Choice
    ) -> dict[str, list[Any]] | None:
        if not entries:
            return None
        ids = [choice.request.prompt_token_ids[0] if entry is None else entry.token_id for entry in entries]
        tokens = [self._token(token_id) for token_id in ids]
        offsets = list(accumulate((len(token) for token in tokens), initial=self.offsets[index]))
        self.offsets[index] = offsets.pop()
        return {
            "tokens": tokens,
            "token_logprobs": [None if entry is None else max(entry.logprob, _LEAST) for entry in entries],
            "top_logprobs": [None if entry is None else self._top(entry) for entry in entries],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        pairs = [*entry.top, (entry.token_id, entry.logprob)]  # the chosen token is always among them, as in vLLM
        return {self._token(token): max(logprob, _LEAST) for token, logprob in pairs}

    def _token(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.tokenizer is None else self.tokenizer.token_text(token_id)
