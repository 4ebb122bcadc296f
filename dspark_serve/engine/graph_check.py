"""Recordings that say what the model says, or none at all: each is compared with the model at start-up.

Must not know: requests, who records. Nobody else may use the K/V store meanwhile; its pages end up zeroed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dspark_serve.engine.graphs import StepGraphs
from dspark_serve.engine.padding import Limits
from dspark_serve.engine.recorders import Recorder
from dspark_serve.engine.runner import Runner
from dspark_serve.models.base import StagedModel
from dspark_serve.models.invariance import Chunk, probe_batch
from dspark_serve.tensors import StepBatch

_CONTEXT = 21  # tokens before those of a step, where there is room
# How far apart values may lie, of their standard deviation: products of another number of rows may add up in another
# order. Keys, rows or positions that are not the step's own are seen as a difference of about one.
_FAR = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.25}
logger = logging.getLogger(__name__)


def with_graphs(runner: Runner, limits: Limits, recorder: Recorder) -> tuple[Runner, tuple[str, ...]]:
    """The runner, recorded where its model can be and the recordings hold; else as it is, and what to warn of."""
    model = runner.model
    if not isinstance(model, StagedModel) or not model.recordable(runner.store):
        logger.info("no CUDA graphs: attention of %s runs in plain torch", model.info.architecture)
        return runner, ()
    try:
        recorded = Runner(
            model, runner.store, runner.taps, StepGraphs(model, runner.store, runner.taps, limits, recorder)
        )
        fault = graph_fault(recorded, limits)
    except RuntimeError as error:  # no memory left, or something that no graph can hold
        fault = f"CUDA graphs could not be recorded ({' '.join(str(error).split())[:200]})"
    if fault is None:
        return recorded, ()
    sentence = f"{fault}; serving without them, slower"
    logger.warning(sentence)
    return runner, (sentence,)


@torch.inference_mode()
def graph_fault(runner: Runner, limits: Limits) -> str | None:
    """None if every recording of the runner, full and as empty as it gets, says what the model says; else what not."""
    graphs, store = runner.graphs, runner.store
    assert graphs is not None
    layers = len(runner.model.info.kv_layers)
    tensors = [*store.keys[:layers], *store.values[:layers]]
    generator = torch.Generator(runner.model.device).manual_seed(0)
    for size, batch in _steps(runner, limits):
        pages = slice(0, int(batch.page_table.max()) + 1)
        for tensor in tensors:  # contexts that nobody wrote, so that what is read makes a difference
            tensor[pages].normal_(generator=generator)
        want, got = _outputs(runner, batch, tensors, recorded=False), _outputs(runner, batch, tensors, recorded=True)
        for tensor in tensors:
            tensor[pages].zero_()
        fault = _difference(want, got, _FAR[runner.model.info.dtype])
        if fault is not None:
            return f"CUDA graphs of steps of up to {size} tokens {fault}"
    return None


def _steps(runner: Runner, limits: Limits) -> Iterator[tuple[int, StepBatch]]:
    """Two steps for each size: full, of many rows, and with as few tokens as are padded to it, of few."""
    assert runner.graphs is not None
    store, smaller = runner.store, 0
    vocab, device = runner.model.info.vocab_size, runner.model.device
    for size in runner.graphs.sizes:
        for tokens, rows in ((size, limits.max_num_seqs), (smaller + 1, 3)):
            rows = min(tokens, rows, limits.max_num_seqs)
            for context in (_CONTEXT, 0):
                chunks = _chunks(tokens, rows, context, store.page_size, vocab)
                fits = all(chunk.start + len(chunk.tokens) <= limits.max_model_len for chunk in chunks)
                if fits and sum(len(chunk.pages) for chunk in chunks) < store.num_pages:
                    yield size, probe_batch(chunks, store.page_size, device)
                    break
        smaller = size


def _chunks(tokens: int, rows: int, context: int, page_size: int, vocab: int) -> list[Chunk]:
    """Rows of about equal length that start at different places, each on pages of its own, from page 1 on."""
    found, page = [], 1
    for row in range(rows):
        count, start = (tokens + row) // rows, (7 * row + context) % (context + 1)
        pages = -(-(start + count) // page_size)
        ids = tuple((31 * row + 17 * place + tokens) % vocab for place in range(count))
        found.append(Chunk(ids, start, tuple(range(page, page + pages))))
        page += pages
    return found


def _outputs(runner: Runner, batch: StepBatch, tensors: Sequence[Tensor], recorded: bool) -> list[Tensor]:
    """Logits and taps, in float32, of a step whose own keys and values are not there before."""
    for tensor in tensors:
        tensor.flatten(0, 1)[batch.slots] = 0.0
    if recorded:
        assert runner.graphs is not None
        out = runner.graphs.run(batch)
        assert out is not None, "steps are made to fit"
    else:
        out = runner.model.forward(batch, runner.store, runner.taps)
    return [out.logits, *([] if out.taps is None else [out.taps.float()])]


def _difference(want: Sequence[Tensor], got: Sequence[Tensor], far: float) -> str | None:
    """None where all is near, else how far apart what is."""
    for name, expected, found in zip(("logits", "taps"), want, got, strict=False):
        spread, distance = float(expected.std()), float((found - expected).abs().max())
        if not distance <= far * spread:  # NaN is far from everything
            others = int((want[0].argmax(-1) != got[0].argmax(-1)).sum())
            return (
                f"differ from the same steps without: {name} by {distance:.2g} where they spread by {spread:.2g}, "
                f"{others} of {len(want[0])} tokens"
            )
    return None
