"""Streaming text equals decoding everything at once, wherever the tokens are cut and whatever ends the text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from dspark_serve.text import Detokenizer, Tokenizer, TokenizerError, read_chat_template
from dspark_serve.types import InvalidRequest

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{{ '<go>' if add_generation_prompt }}"
WORDS = ["▁the", "▁a", "▁", "th", "e", "a", "b", "▁▁", ".", "▁b", "é", "世"]
SAMPLES = "the a😀b 世界, e\u0301 👩‍👩‍👧 naïve ▁ \ufffd 🇫🇷"


def byte_level_tokenizer() -> Tokenizer:
    """GPT-2's kind: 256 byte tokens, a few merges inside and across characters, one special and one added token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e"), ("ð", "Ł"), ("ðŁ", "ĺ"), ("Ģ", "b")]
    vocab = {token: n for n, token in enumerate([*alphabet, *("".join(merge) for merge in merges)])}
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    backend.add_tokens([AddedToken("  two  spaces", normalized=False)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>"), CHAT)


def byte_fallback_tokenizer() -> Tokenizer:
    """Llama-2's kind: words with a leading mark, and bytes for characters the vocabulary lacks."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    backend = Backend(
        models.BPE(
            vocab={token: n for n, token in enumerate(tokens)},
            merges=[("▁", "a"), ("▁", "b"), ("▁", "▁")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"))


BYTE_LEVEL = byte_level_tokenizer()
BYTE_FALLBACK = byte_fallback_tokenizer()


def stream(detokenizer: Detokenizer, ids: list[int], cuts: list[int]) -> list[str]:
    """Deltas of feeding `ids` in pieces of the given lengths, the end included."""
    deltas, at = [], 0
    for cut in [*cuts, len(ids)]:
        deltas.append(detokenizer.feed(ids[at : at + cut]))
        at += cut
    return [*deltas, detokenizer.flush()]


def truncate(text: str, stops: list[str], include: bool) -> str:
    """The definition, slowly: read character by character until some stop string is complete."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[:end] if include else text[: end - max(map(len, complete))]
    return text


cuts = st.lists(st.integers(0, 7), max_size=30)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(-1, BYTE_LEVEL.vocab_size + 3), max_size=60), cuts=cuts, skip=st.booleans())
@example(ids=BYTE_LEVEL.encode(SAMPLES), cuts=[1] * 200, skip=True)
def test_byte_level_stream_is_the_decoding(ids: list[int], cuts: list[int], skip: bool) -> None:
    known = [i for i in ids if i >= 0]
    deltas = stream(Detokenizer(BYTE_LEVEL, skip_special_tokens=skip), ids, cuts)
    assert "".join(deltas) == BYTE_LEVEL.decode(known, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="the ab.é世界😀👩\u200d\n▁", max_size=40), cuts=cuts)
@example(text=SAMPLES, cuts=[1] * 200)
def test_byte_fallback_stream_is_the_decoding(text: str, cuts: list[int]) -> None:
    ids = BYTE_FALLBACK.encode(text, add_special_tokens=False)
    deltas = stream(Detokenizer(BYTE_FALLBACK), ids, cuts)
    assert "".join(deltas) == BYTE_FALLBACK.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in delta for delta in deltas)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, BYTE_FALLBACK.vocab_size - 1), max_size=40), cuts=cuts)
def test_byte_fallback_cuts_do_not_matter(ids: list[int], cuts: list[int]) -> None:
    once = "".join(stream(Detokenizer(BYTE_FALLBACK), ids, []))
    assert "".join(stream(Detokenizer(BYTE_FALLBACK), ids, cuts)) == once
    letters = [i for i in ids if BYTE_FALLBACK.token_text(i) != "\ufffd"]
    whole = "".join(stream(Detokenizer(BYTE_FALLBACK), letters, cuts))
    assert whole == BYTE_FALLBACK.decode(letters)


@settings(max_examples=400, deadline=None)
@given(
    text=st.text(alphabet="abé😀 ", max_size=40),
    stops=st.lists(st.text(alphabet="abé😀 ", min_size=1, max_size=4), max_size=4),
    cuts=cuts,
    include=st.booleans(),
)
@example(text="xxabcd", stops=["abcd", "bc"], cuts=[], include=False)
@example(text="aab", stops=["b", "ab", "aab"], cuts=[1, 1, 1], include=False)
@example(text="aaab", stops=["aab"], cuts=[1, 1, 1, 1], include=True)
def test_stop_strings(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    ids = BYTE_LEVEL.encode(text)
    detokenizer = Detokenizer(BYTE_LEVEL, stops, include_stop_str_in_output=include)
    deltas = stream(detokenizer, ids, cuts)
    assert "".join(deltas) == truncate(text, stops, include)
    assert detokenizer.stopped == any(stop in text for stop in stops)
    if detokenizer.stopped:
        assert detokenizer.stop_string in stops
        # Exactly the tokens needed: one fewer does not hold the stop string yet.
        used = detokenizer.num_tokens
        assert any(stop in BYTE_LEVEL.decode(ids[:used]) for stop in stops)
        assert not any(stop in BYTE_LEVEL.decode(ids[: used - 1]) for stop in stops)


def test_stop_string_holds_back_only_its_beginning() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, ["END"])
    ids = BYTE_LEVEL.encode("a E, EN, ENDING")
    deltas = [detokenizer.feed([i]) for i in ids]
    assert deltas == ["a", " ", "", "E,", " ", "", "", "EN,", " ", "", "", "", "", "", ""]
    assert detokenizer.stop_string == "END"
    assert detokenizer.num_tokens == len("a E, EN, END")
    assert detokenizer.flush() == ""


def test_unfinished_stop_string_comes_out_at_the_end() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, ["END"])
    assert detokenizer.feed(BYTE_LEVEL.encode("the EN")) == "the "
    assert detokenizer.flush() == "EN"


def test_min_tokens_delays_stop_strings() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, ["b"], min_tokens=4)
    assert detokenizer.feed(BYTE_LEVEL.encode("abaabaab")) == "abaa"
    assert detokenizer.num_tokens == 5


def test_half_a_character_is_never_given() -> None:
    for tokenizer in (BYTE_LEVEL, BYTE_FALLBACK):
        ids = [i for i in tokenizer.encode("😀", add_special_tokens=False) if tokenizer.token_text(i) != " "]
        detokenizer = Detokenizer(tokenizer)
        assert [detokenizer.feed([i]) for i in ids[:-1]] == [""] * (len(ids) - 1)
        assert "\ufffd" in detokenizer.flush()
        assert "".join(stream(Detokenizer(tokenizer), ids, [1] * len(ids))) == "😀"


def test_garbage_bytes_do_not_pile_up() -> None:
    detokenizer = Detokenizer(BYTE_FALLBACK)
    broken = [3 + 0xFF] * 50
    assert len(detokenizer.feed(broken)) >= 40
    assert len(detokenizer._decoder._window) <= 8  # type: ignore[attr-defined]


def test_context_keeps_the_leading_space() -> None:
    ids = BYTE_FALLBACK.encode("the a", add_special_tokens=False)
    assert "".join(stream(Detokenizer(BYTE_FALLBACK), ids[-1:], [])) == "a"
    assert "".join(stream(Detokenizer(BYTE_FALLBACK, context=ids[:-1]), ids[-1:], [])) == " a"


def test_token_bytes_and_text() -> None:
    ids = BYTE_LEVEL.encode("é😀")
    assert b"".join(map(BYTE_LEVEL.token_bytes, ids)) == "é😀".encode()
    assert BYTE_LEVEL.token_text(ids[0]) == "\ufffd"
    assert BYTE_LEVEL.token_text(10**6) == BYTE_LEVEL.token_text(-1) == ""
    assert BYTE_FALLBACK.token_bytes(3 + 0xE4) == b"\xe4"
    assert BYTE_FALLBACK.token_text(259) == " the"


def test_lone_surrogate_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        BYTE_LEVEL.encode("a\ud800")
    assert caught.value.param == "prompt"


def test_render_chat() -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert BYTE_LEVEL.render_chat(messages) == "<user>hi<go>"
    assert BYTE_LEVEL.render_chat(messages, "{{ messages[0].content }}!") == "hi!"
    parts = [{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert BYTE_LEVEL.render_chat(parts, add_generation_prompt=False) == "<system>a\nb"
    last = [*messages, {"role": "assistant", "content": "he"}]
    assert BYTE_LEVEL.render_chat(last, continue_final_message=True) == "<user>hi<assistant>he"


@pytest.mark.parametrize(
    ("messages", "template", "reason"),
    [
        ([], CHAT, "must not be empty"),
        ([{"role": "wizard", "content": "x"}], CHAT, "unknown role 'wizard'"),
        ([{"content": "x"}], CHAT, "unknown role None"),
        ([{"role": "user", "content": 5}], CHAT, "neither text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], CHAT, "not text"),
        ([{"role": "user", "content": "x"}], "{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ([{"role": "user", "content": "x"}], "{{ ''.__class__.__mro__ }}", "chat template"),
        ([{"role": "user", "content": "x"}], "{% if %}", "chat template"),
    ],
)
def test_bad_chats_name_messages(messages: list[dict[str, object]], template: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        BYTE_LEVEL.render_chat(messages, template)
    assert caught.value.param == "messages"


def test_model_without_chat_template() -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        BYTE_FALLBACK.render_chat([{"role": "user", "content": "x"}])


def test_chat_template_from_file_or_text(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(CHAT)
    assert read_chat_template(str(tmp_path / "chat.jinja")) == CHAT
    assert read_chat_template(CHAT) == CHAT
    with pytest.raises(TokenizerError, match="neither Jinja text nor a readable file"):
        read_chat_template(str(tmp_path / "absent.jinja"))


def test_load(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("not json")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(TokenizerError, match="cannot be loaded"):
        Tokenizer.load(tmp_path)
    BYTE_LEVEL._inner.save_pretrained(tmp_path)
    loaded = Tokenizer.load(tmp_path, chat_template=CHAT)
    assert loaded is not None
    assert loaded.encode(SAMPLES) == BYTE_LEVEL.encode(SAMPLES)
    assert loaded.eos_token_id == BYTE_LEVEL.eos_token_id
    assert loaded.chat_template == CHAT


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_dir: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(smollm2_dir)
    assert tokenizer is not None
    return tokenizer


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 49151), max_size=40), cuts=cuts, skip=st.booleans())
def test_smollm2_stream_is_the_decoding(
    smollm2_tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip: bool
) -> None:
    text = "".join(stream(Detokenizer(smollm2_tokenizer, skip_special_tokens=skip), ids, cuts))
    assert text == smollm2_tokenizer.decode(ids, skip_special_tokens=skip)
    assert text == smollm2_tokenizer._inner.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def test_smollm2_tokenizer_is_the_original(smollm2_tokenizer: Tokenizer) -> None:
    """Ids as published for the model: digits apart (a GGUF does not say so outright), chat marks whole, no BOS."""
    assert smollm2_tokenizer.vocab_size == 49152
    assert smollm2_tokenizer.eos_token_id == 2
    assert [smollm2_tokenizer.token_text(i) for i in smollm2_tokenizer.encode("in 1995!")] == [
        *("in", " ", "1", "9", "9", "5", "!")
    ]
    chat = smollm2_tokenizer.render_chat([{"role": "user", "content": "Hi"}])
    assert chat == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = smollm2_tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert ids.count(1) == 3
    assert ids.count(2) == 2
    assert smollm2_tokenizer.decode(ids, skip_special_tokens=False) == chat
