"""Text at the edge: tokenizer, chat template, incremental detokenisation, stop strings.

Used by the server and the offline API; the engine below speaks token ids only. Must not know: torch, models, requests.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from dspark_serve.types import InvalidRequest

REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are not UTF-8, or not yet
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_MAX_CHAR_TOKENS = 4  # a UTF-8 character has at most four bytes, so at most four byte tokens
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "*.tiktoken",
)


class TokenizerError(RuntimeError):
    """The tokenizer or chat template of a model cannot be loaded; the message is one sentence for the user."""


class Tokenizer:
    """A model's tokenizer. Reading methods are safe to call from several threads at once."""

    def __init__(self, inner: Any, chat_template: str | None = None) -> None:
        """`inner` is a Transformers tokenizer; `chat_template`, when given, replaces its own."""
        self._inner = inner
        self._backend = getattr(inner, "backend_tokenizer", None)  # the Rust one: no shared state, frees the GIL
        if self._backend is not None:
            self._backend.no_truncation()  # some tokenizer.json files carry these; a prompt is never cut silently
            self._backend.no_padding()
        own = inner.chat_template
        self.chat_template: str | None = chat_template or (own.get("default") if isinstance(own, dict) else own)
        self.special_ids = frozenset(_special_ids(inner, self._backend))
        self._byte_level = self._backend is not None and _is_byte_level(self._backend)
        self._pieces: dict[int, bytes] = {}

    @classmethod
    def load(
        cls, directory: str | Path, chat_template: str | None = None, trust_remote_code: bool = False
    ) -> Tokenizer | None:
        """The tokenizer in a model directory; None when it has none (the model is then served by token ids).

        `chat_template` is a file or the template itself. Raises TokenizerError.
        """
        directory = Path(directory)
        if not any(True for pattern in _TOKENIZER_FILES for _ in directory.glob(pattern)):
            return None
        template = read_chat_template(chat_template) if chat_template else None
        try:
            loader = _tokenizer_class(directory)
            inner = loader.from_pretrained(directory, trust_remote_code=trust_remote_code, local_files_only=True)
        except Exception as error:  # Transformers raises whatever it tripped over
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TokenizerError(f"The tokenizer in {directory} cannot be loaded: {reason}") from error
        return cls(inner, template)

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows, added ones included; the model may have more."""
        return len(self._inner)

    @property
    def bos_token_id(self) -> int | None:
        return _as_int(self._inner.bos_token_id)

    @property
    def eos_token_id(self) -> int | None:
        return _as_int(self._inner.eos_token_id)

    def encode(self, text: str, add_special_tokens: bool = True, param: str = "prompt") -> list[int]:
        """Token ids of `text`. Special tokens (a BOS, where the model wants one) belong to plain prompts; a rendered
        chat already has them. Raises InvalidRequest naming `param` for text that is not Unicode (lone surrogates)."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"{param} holds a lone surrogate, which is not text", param, "invalid_value"
            ) from error
        if self._backend is not None:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        return [int(i) for i in self._inner.encode(text, add_special_tokens=add_special_tokens)]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`, without any tidying of spaces; ids outside the vocabulary are nothing."""
        if self._backend is not None:
            return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))
        return str(
            self._inner.decode(
                list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; part of a character, for some. Empty outside the vocabulary."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._token_bytes(token_id)
        return piece

    def token_text(self, token_id: int) -> str:
        """One token as text, for logprobs and /tokenize; bytes that are no character alone show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        template: str | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation, by the chat template (sandboxed Jinja); encode it without special tokens.

        Raises InvalidRequest naming "messages" when a role is unknown, a part is not text, or the template refuses.
        """
        template = template or self.chat_template
        if template is None:
            raise _bad_messages("cannot be rendered: this model has no chat template; use /v1/completions")
        if not messages:
            raise _bad_messages("must not be empty")
        plain = [_plain_message(message, template) for message in messages]
        try:
            text = self._inner.apply_chat_template(
                plain,
                tools=list(tools) if tools else None,
                chat_template=template,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                tokenize=False,
                **(template_kwargs or {}),
            )
        except Exception as error:  # templates are programs: whatever they raise, these messages made them do it
            reason = " ".join(str(error).split()) or type(error).__name__
            raise _bad_messages(f"cannot be rendered by the model's chat template: {reason}") from error
        return str(text)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], template: str | None = None, **options: Any
    ) -> list[int]:
        """Token ids of render_chat(messages, template, **options)."""
        return self.encode(self.render_chat(messages, template, **options), add_special_tokens=False, param="messages")

    def decoder(self, skip_special_tokens: bool, context: Sequence[int] = ()) -> TokenDecoder:
        """A fresh incremental decoder. `context`: the prompt's last tokens, so that a leading space is kept."""
        if self._byte_level:
            return _ByteDecoder(self, skip_special_tokens)
        return _WindowDecoder(self, skip_special_tokens, context)

    def _token_bytes(self, token_id: int) -> bytes:
        token = self._inner.convert_ids_to_tokens(token_id) if 0 <= token_id < self.vocab_size else None
        if not isinstance(token, str):
            return token if isinstance(token, bytes) else b""
        if self._byte_level:
            return _from_byte_alphabet(token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):  # SentencePiece's byte tokens
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode("utf-8")


class TokenDecoder(Protocol):
    """Tokens in, text out. All text given, `flush` included, is the decoding of all tokens taken."""

    def step(self, token_id: int) -> str:
        """Text that became certain with this token; never part of a character."""
        ...

    def flush(self) -> str:
        """What is left at the end: characters that stayed incomplete, as U+FFFD."""
        ...


class _ByteDecoder:
    """For byte-level vocabularies (GPT-2's alphabet): a token is a byte string, and text is their UTF-8 decoding."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def step(self, token_id: int) -> str:
        return "" if token_id in self._skipped else self._utf8.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDecoder:
    """For any other vocabulary: decode a short window twice, with and without the new tokens, and give the difference.

    The window begins at the tokens given last, because how a token reads (a leading space, a joined piece, a byte of a
    character) can depend on the one before it.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._window = [i for i in context if i not in tokenizer.special_ids]
        self._given = len(self._window)  # tokens of the window whose text is out

    def step(self, token_id: int) -> str:
        if token_id in self._skipped or not self._tokenizer.token_bytes(token_id):
            return ""
        self._window.append(token_id)
        text = self._difference()
        pending = len(self._window) - self._given
        if text.endswith(REPLACEMENT) and pending < _MAX_CHAR_TOKENS:
            return ""
        if text:  # else (a leading space that is dropped) the token still counts as context
            self._window = self._window[self._given :]
        self._given = len(self._window)
        return text

    def flush(self) -> str:
        text = self._difference()
        self._given = len(self._window)
        return text

    def _difference(self) -> str:
        before = self._tokenizer.decode(self._window[: self._given], skip_special_tokens=False)
        after = self._tokenizer.decode(self._window, skip_special_tokens=False)
        if after.startswith(before):
            return after[len(before) :]
        # A broken byte run changed how given text reads; that text is out, so the new tokens are read alone.
        return self._tokenizer.decode(self._window[self._given :], skip_special_tokens=False)


class Detokenizer:
    """One request's text, token by token, up to its first stop string.

    The first stop string to be completed ends the text (of several completed by the same character, the longest), so
    the result does not depend on how tokens arrive: one at a time, or a burst of accepted drafts.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        skip_special_tokens: bool = True,
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
        context: Sequence[int] = (),
    ) -> None:
        """Stop strings are looked for from the `min_tokens`-th token on. `context`: see Tokenizer.decoder."""
        self._decoder = tokenizer.decoder(skip_special_tokens, context)
        self._stops = tuple(stop)
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._held = ""  # text that may be the beginning of a stop string
        self.stop_string: str | None = None  # the stop string that ended the text
        self.num_tokens = 0  # tokens taken, up to and including the one that completed the stop string

    @property
    def stopped(self) -> bool:
        return self.stop_string is not None

    @property
    def num_held(self) -> int:
        """Characters held back because they may begin a stop string."""
        return len(self._held)

    def feed(self, token_ids: Iterable[int]) -> str:
        """Text that these tokens add for certain. After a stop string has ended the text, tokens are ignored."""
        parts: list[str] = []
        for token_id in token_ids:
            if self.stopped:
                break
            self.num_tokens += 1
            parts.append(self._advance(self._decoder.step(token_id)))
        return "".join(parts)

    def flush(self) -> str:
        """The end of the text: everything held back. Call once, when no token will follow."""
        if self.stopped:
            return ""
        text = self._advance(self._decoder.flush())
        held, self._held = self._held, ""
        return text + held

    def _advance(self, new: str) -> str:
        if not new or not self._stops or self.num_tokens < self._min_tokens:
            return new
        text = self._held + new
        # `_held` alone completes no stop, so a first occurrence ends in `new`: the smallest end came first.
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, start, self.stop_string = min(found)
            self._held = ""
            return text[: end if self._include_stop else start]
        keep = _overlap(text, self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def read_chat_template(value: str) -> str:
    """`--chat-template`: the text of the file it names, or itself when it is a template. Raises TokenizerError."""
    if any(mark in value for mark in ("{{", "{%", "{#", "\n")):
        return value
    try:
        return Path(value).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise TokenizerError(
            f"The chat template {value} is neither Jinja text nor a readable file: {reason}."
        ) from error


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` with which some stop string begins."""
    longest = min(len(text), max(map(len, stops)) - 1)
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)


def _plain_message(message: Mapping[str, Any], template: str) -> dict[str, Any]:
    """A message as templates expect it: a known role, and text for content."""
    role = message.get("role")
    if role not in ROLES:
        raise _bad_messages(f"has the unknown role {role!r}; known are {', '.join(ROLES)}")
    if role == "developer" and "developer" not in template:  # OpenAI's newer word for it
        role = "system"
    content = message.get("content")
    if isinstance(content, list | tuple):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise _bad_messages("has a content part that is not text; this server reads text only")
        content = "\n".join(part["text"] for part in content)
    elif content is not None and not isinstance(content, str):
        raise _bad_messages("has content that is neither text nor a list of text parts")
    return {**message, "role": role, "content": content or ""}


def _bad_messages(message: str) -> InvalidRequest:
    return InvalidRequest(f"messages {message}", param="messages", code="invalid_value")


def _tokenizer_class(directory: Path) -> Any:
    """AutoTokenizer, or at once the class it would choose: its search imports model code, seconds of every start."""
    settings_file = directory / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
    plain = settings.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    if plain and "auto_map" not in settings and (directory / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _special_ids(inner: Any, backend: Any) -> Iterable[int]:
    if backend is None:
        return [int(i) for i in inner.all_special_ids]
    return [i for i, token in backend.get_added_tokens_decoder().items() if token.special]


def _is_byte_level(backend: Any) -> bool:
    """Whether decoding is exactly 'concatenate the tokens' bytes' (a ByteLevel decoder and nothing else)."""
    if backend.decoder is None:
        return False
    state = json.loads(backend.decoder.__getstate__())
    steps = state.get("decoders", [state])
    return [step["type"] for step in steps] == ["ByteLevel"]


@cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: printable Latin-1 bytes are themselves, the rest follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(rest)}


def _from_byte_alphabet(token: str) -> bytes:
    alphabet = _byte_alphabet()
    values = [alphabet.get(char) for char in token]
    if None in values:  # an added token, written as plain text
        return token.encode("utf-8")
    return bytes(value for value in values if value is not None)


def _as_int(value: Any) -> int | None:
    return None if value is None else int(value)
