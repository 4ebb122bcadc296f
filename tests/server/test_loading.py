"""How the service loads a model: nothing of it imports Transformers in two threads at once, and no collection of
garbage looks through it again."""

import gc
import threading

from tiny_model import write_tiny_model

from dspark_serve.config import load_config
from dspark_serve.engine import build
from dspark_serve.server import service
from dspark_serve.text import Tokenizer


def test_tokenizer_and_engine_load_one_after_the_other(tmp_path, monkeypatch):
    """A module that replaces itself when imported is found empty by a second thread: Transformers is one."""
    steps = []

    def step(name, result):
        steps.append((name, threading.current_thread()))
        return result

    monkeypatch.setattr(Tokenizer, "load", lambda *_: step("tokenizer", "the tokenizer"))
    monkeypatch.setattr(build, "build_engine", lambda *_: step("engine", "the engine"))
    gc.unfreeze()
    model = str(write_tiny_model(tmp_path))
    assert service.load(load_config({"model": model})) == ("the engine", "the tokenizer")
    assert steps == [("tokenizer", threading.current_thread()), ("engine", threading.current_thread())]
    assert gc.get_freeze_count() > 0
    gc.unfreeze()
