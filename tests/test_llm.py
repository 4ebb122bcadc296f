"""The offline API on a tiny checkpoint, through the real engine."""

import pytest
from tiny_model import write_tiny_model

from dspark_serve.config import ConfigError
from dspark_serve.llm import LLM, SamplingParams
from dspark_serve.types import InvalidRequest, SpeculationParams

GREEDY = SamplingParams(temperature=0, max_tokens=12)
PROMPTS = ["abcabcabc", "hello", "xyxyxyxy"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def llm(directory):
    with LLM(directory, kv_cache_gib=0.02, max_num_seqs=8, max_queue=4, threads=1) as llm:
        yield llm
        assert llm._engine.stats().pages_used == 0
        llm._engine.check_integrity()


def texts(outputs):
    return [[choice.token_ids for choice in output.outputs] for output in outputs]


def test_outputs(llm):
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [output.prompt for output in outputs] == PROMPTS
    for output in outputs:
        [choice] = output.outputs
        assert output.prompt_token_ids == list(output.prompt.encode())
        assert (len(choice.token_ids), choice.finish_reason) == (12, "length")
        assert choice.text == llm.tokenizer.decode(choice.token_ids)
        assert choice.logprobs is None
        stats = choice.metrics.speculative_decoding
        assert stats.num_accepted_tokens <= stats.num_kept_tokens
        assert stats.per_step_accepted == []
    alone = [llm.generate(prompt, GREEDY, use_tqdm=False)[0] for prompt in PROMPTS]
    assert texts(alone) == texts(outputs)


def test_speculation_changes_nothing(llm):
    hot = SamplingParams(temperature=0.8, max_tokens=40, seed=5)
    for params in (GREEDY, hot):
        plain = llm.generate(PROMPTS, params, use_tqdm=False, speculation=SpeculationParams(enabled=False))
        fast = llm.generate(PROMPTS, params, use_tqdm=False)
        assert texts(plain) == texts(fast)
        assert all(output.outputs[0].metrics.speculative_decoding.num_draft_tokens == 0 for output in plain)


def test_token_ids_and_one_prompt(llm):
    ids = list(b"hello")
    by_text = llm.generate("hello", GREEDY, use_tqdm=False)
    for prompt in ({"prompt_token_ids": ids}, [{"prompt_token_ids": ids}], ids):
        outputs = llm.generate(prompt, GREEDY, use_tqdm=False)
        assert texts(outputs) == texts(by_text)
        assert outputs[0].prompt is None


def test_n_choices_are_those_of_their_seeds(llm):
    params = SamplingParams(temperature=1, max_tokens=8, seed=3, n=3)
    [output] = llm.generate("hello", params, use_tqdm=False)
    assert [choice.index for choice in output.outputs] == [0, 1, 2]
    assert len({tuple(choice.token_ids) for choice in output.outputs}) == 3
    again = llm.generate("hello", SamplingParams(temperature=1, max_tokens=8, seed=4), use_tqdm=False)
    assert again[0].outputs[0].token_ids == output.outputs[1].token_ids
    unseeded = [llm.generate("hello", SamplingParams(max_tokens=8), use_tqdm=False) for _ in range(2)]
    assert texts(unseeded[0]) != texts(unseeded[1])


def test_params_per_prompt_and_more_prompts_than_the_queue_takes(llm):
    params = [SamplingParams(temperature=0, max_tokens=n) for n in range(1, 41)]
    outputs = llm.generate(["ab"] * 40, params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == list(range(1, 41))


def test_stop_string(llm):
    [whole] = llm.generate("hello", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True), use_tqdm=False)
    text = whole.outputs[0].text
    at = next(i for i in range(4, len(text) - 1) if text.find(text[i : i + 2]) == i)
    [output] = llm.generate("hello", SamplingParams(temperature=0, stop=text[at : at + 2]), use_tqdm=False)
    choice = output.outputs[0]
    assert (choice.text, choice.finish_reason, choice.stop_reason) == (text[:at], "stop", text[at : at + 2])


def test_logprobs(llm):
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=1)
    [output] = llm.generate("hello", params, use_tqdm=False)
    choice = output.outputs[0]
    assert [entry.token_id for entry in choice.logprobs] == choice.token_ids
    assert all(entry.rank == 1 and len(entry.top) == 2 for entry in choice.logprobs)
    assert [entry.token_id for entry in output.prompt_logprobs] == list(b"ello")


def test_vllm_spellings():
    params = SamplingParams(stop=["a", "b"], stop_token_ids=[1], logit_bias={"5": 1, 6: -1})
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("a", "b"), (1,), ((5, 1.0), (6, -1.0)))
    assert SamplingParams(stop="a").stop == ("a",)
    assert SamplingParams(stop=None).stop == ()


def test_chat(llm):
    conversation = [{"role": "user", "content": "hi"}]
    [output] = llm.chat(conversation, GREEDY, use_tqdm=False)
    assert output.prompt == "<|user|>hi\n<|assistant|>"
    assert texts(llm.generate(output.prompt, GREEDY, use_tqdm=False)) == texts([output])
    both = llm.chat([conversation, [{"role": "user", "content": "you"}]], GREEDY, use_tqdm=False)
    assert [each.prompt for each in both] == [output.prompt, "<|user|>you\n<|assistant|>"]


def test_progress_bar(llm, capsys):
    llm.generate(PROMPTS, GREEDY)
    assert "Processed prompts: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        (["ok", ""], GREEDY, "prompt 1: the prompt is empty"),
        (["x" * 600], GREEDY, "prompt 0: 600 prompt tokens"),
        ([{"prompt_token_ids": [10**6]}], GREEDY, "outside the vocabulary"),
        (["a", "b"], [GREEDY], "1 sampling_params for 2 prompts"),
    ],
)
def test_bad_prompts(llm, prompts, params, message):
    with pytest.raises(InvalidRequest, match=message):
        llm.generate(prompts, params, use_tqdm=False)
    assert llm._engine.stats().pages_used == 0
    assert not llm._engine.has_work


def test_bad_params():
    with pytest.raises(InvalidRequest, match="n must be"):
        SamplingParams(n=0)
    with pytest.raises(InvalidRequest, match="temperature"):
        SamplingParams(temperature=-1)


def test_options_are_checked(directory):
    with pytest.raises(ConfigError, match="did you mean 'max_model_len'"):
        LLM(directory, max_model_length=5)
    with pytest.raises(ConfigError, match="unknown key 'methode'"):
        LLM(directory, speculative_config={"methode": "none"})


def test_without_tokenizer_and_closing(tmp_path):
    directory = str(write_tiny_model(tmp_path / "bare", tokenizer=False))
    llm = LLM(directory, speculative_config={"method": "none"}, kv_cache_gib=0.02, threads=1)
    assert llm.info.drafter == "none"
    [output] = llm.generate({"prompt_token_ids": [1, 2, 3]}, GREEDY, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 12
    assert output.outputs[0].text == ""
    for action in (
        lambda: llm.generate("text", use_tqdm=False),
        lambda: llm.chat([{"role": "user", "content": "x"}], use_tqdm=False),
        lambda: llm.generate({"prompt_token_ids": [1]}, SamplingParams(stop="x"), use_tqdm=False),
    ):
        with pytest.raises(InvalidRequest, match="no tokenizer"):
            action()
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate({"prompt_token_ids": [1]}, GREEDY)
