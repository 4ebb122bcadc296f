"""Fixtures shared by all tests: the embedded default model, fetched once, and real prompts in its tokens."""

import os

import pytest

import dspark_serve  # noqa: F401 - before torch, whose threads and products it sets up

# Parallel workers share the cores: one thread each, servers they start included. Two pools of spinning threads on the
# same cores wait for each other at every operation and take ten times as long.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

PROMPTS = [
    "Write a haiku about the sea.",
    "What is 17 times 23? Think step by step.",
    "def fibonacci(n):",
    "Repeat after me: one two three four one two three four one two three",
    "Explain in one sentence why the sky is blue.",
    "Translate to French: the cat sleeps on the warm windowsill.",
    "List three fruits.",
    "Hi",
]


@pytest.fixture(scope="session")
def smollm2_dir():
    from dspark_serve.models.loader import resolve

    return resolve("smollm2-135m-instruct").path


@pytest.fixture(scope="session")
def smollm2():
    from dspark_serve.models.loader import load_model, resolve

    return load_model(resolve("smollm2-135m-instruct"), "float32", "cpu")


@pytest.fixture(scope="session")
def real_prompts(smollm2_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    return [tokenizer.encode(prompt) for prompt in PROMPTS]
