"""What a benchmark asks: the shipped sample, a user's file, and what is wrong with a file."""

import json
import subprocess
import sys

import pytest

from dspark_serve.bench.client import BenchError
from dspark_serve.bench.workload import Workload, from_file, shipped, shortened


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_the_sample_that_comes_along():
    found = shipped()
    assert [workload.name for workload in found] == ["gsm8k", "humaneval", "mbpp", "mt-bench"]
    assert all(len(workload.bodies) == 8 for workload in found)
    assert all(body["messages"][0]["role"] == "user" for workload in found for body in workload.bodies)


def test_a_file_keeps_what_its_requests_say(tmp_path):
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    recorded = {"model": "gpt", "stream": False, "temperature": 0.7, "max_completion_tokens": 9, "workload": "mail"}
    path = write(tmp_path / "mine.jsonl", {"messages": talk, **recorded}, "", {"messages": talk[1:]})
    mail, mine = from_file(path, seed=5)
    assert (mail.name, mine.name) == ("mail", "mine")
    assert mail.bodies == ({"messages": talk, "temperature": 0.7, "max_completion_tokens": 9},)
    full = mail.with_defaults({"max_tokens": 128, "temperature": 0.0}).take(0, 1)[0]
    assert full == {"messages": talk, "temperature": 0.7, "max_completion_tokens": 9, "seed": 5}
    assert shortened(full) == {"messages": talk, "temperature": 0.7, "seed": 5, "max_tokens": 1}
    assert mine.with_defaults({"max_tokens": 128}).take(0, 1)[0]["max_tokens"] == 128


def test_requests_go_round_and_seeds_go_on():
    taken = Workload("w", ({"prompt": "a"}, {"prompt": "b"}), seed=10).take(1, 3)
    assert taken == [{"seed": 11, "prompt": "b"}, {"seed": 12, "prompt": "a"}, {"seed": 13, "prompt": "b"}]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is not JSON"),
        ('{"prompt": "x"}', "line 2 must be an object with `messages`"),
        ('{"messages": []}', "line 2 must be an object"),
        ('{"messages": ["hello"]}', "line 2 must be an object"),
        ("[1]", "line 2 must be an object"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, said):
    path = write(tmp_path / "f.jsonl", {"messages": [{"role": "user", "content": "x"}]}, line)
    with pytest.raises(BenchError, match=said):
        from_file(path)


def test_files_that_say_nothing(tmp_path):
    with pytest.raises(BenchError, match="holds no conversation"):
        from_file(write(tmp_path / "empty.jsonl", ""))
    with pytest.raises(BenchError, match="cannot read"):
        from_file(tmp_path / "missing.jsonl")


def test_bench_needs_no_torch():
    """A client starts quickly, and on machines that serve nothing."""
    code = "import sys, dspark_serve.bench.command; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == "[]\n", result.stderr
