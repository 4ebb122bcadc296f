"""Conversations on disk: what was appended comes back, whatever happened to the process that wrote it."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_serve.training import records
from dspark_serve.training.records import Conversation, Manifest, RecordReader, RecordWriter, as_half

MANIFEST = Manifest("abc", (1, 3), 4)


def conversation(index, answer=5):
    return Conversation(
        index=index,
        kind="maths",
        temperature=1.0,
        prompt=(1, 2, 3),
        answer=tuple(range(answer)),
        seed=9,
        finished=False,
        log_totals=(0.5,) * answer,
    )


def states(index, count):
    return as_half(np.full((count, MANIFEST.width), index, dtype=np.float32))


def write(directory, indices, max_bytes=1 << 30):
    writer = RecordWriter(directory, MANIFEST, max_bytes)
    for index in indices:
        given = conversation(index)
        writer.append(given, states(index, given.num_states))
    writer.close()


def test_what_was_written_comes_back_and_grows(tmp_path):
    write(tmp_path, [0, 1])
    reader = RecordReader(tmp_path)
    assert [c.index for c in reader.conversations] == [0, 1]
    assert reader.conversations[1].answer == (0, 1, 2, 3, 4)
    assert reader.states(reader.conversations[1]).shape == (7, 8)
    write(tmp_path, [2])  # another process, in a shard of its own
    assert reader.refresh() == 1
    assert [int(reader.states(c)[0, 0]) for c in reader.conversations] == [0, 1, 2]
    assert reader.refresh() == 0


def test_a_line_cut_short_is_dropped(tmp_path):
    write(tmp_path, [0])
    with (tmp_path / records.CONVERSATIONS).open("a") as file:
        file.write('{"index": 1, "ki')
    assert len(RecordReader(tmp_path).conversations) == 1
    write(tmp_path, [2])
    assert [c.index for c in RecordReader(tmp_path).conversations] == [0, 2]


def test_the_ring_forgets_the_oldest(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "SHARD_BYTES", 100)
    write(tmp_path, range(8), max_bytes=400)
    reader = RecordReader(tmp_path)
    kept = [c.index for c in reader.conversations]
    assert kept == list(range(8))[-len(kept) :]
    assert 0 < len(kept) < 8
    assert all(int(reader.states(c)[0, 0]) == c.index for c in reader.conversations)


def test_other_states_are_refused(tmp_path):
    write(tmp_path, [0])
    with pytest.raises(ValueError, match="another target"):
        RecordWriter(tmp_path, Manifest("abd", (1, 3), 4), 1)


def test_outsized_values_stay_finite():
    assert np.isfinite(as_half(np.array([[1e9, -1e9, 2.0]], dtype=np.float32))).all()
