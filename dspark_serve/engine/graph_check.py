"""Recordings that say what the model says, or none at all: each is compared with the model at start-up.

Must not know: requests, who records. Nobody else may use the K/V store meanwhile; its pages end up zeroed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dspark_serve.cache.store import KVStore
from dspark_serve.drafters.base import BlockPass
from dspark_serve.drafters.rows import DraftRows
from dspark_serve.engine.graphs import BlockGraphs, StepGraphs
from dspark_serve.engine.padding import Limits
from dspark_serve.engine.recorders import Recorder
from dspark_serve.engine.runner import Runner
from dspark_serve.models.base import StagedModel
from dspark_serve.models.invariance import Chunk, probe_batch
from dspark_serve.tensors import SamplingBatch, StepBatch

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
        graphs = StepGraphs(model, runner.store, runner.taps, limits, recorder)
        recorded = Runner(model, runner.store, runner.taps, graphs)
        fault = graph_fault(recorded, limits)
    except RuntimeError as error:
        fault = _refused(error)
    return (recorded, ()) if fault is None else (runner, _warnings(fault))


def with_block_graphs(
    block: BlockPass, store: KVStore, vocab_size: int, limits: Limits, recorder: Recorder
) -> tuple[BlockPass, tuple[str, ...]]:
    """The same for a drafter's pass, which the target's recordings do not depend on."""
    try:
        graphs = BlockGraphs(block, store, limits, recorder)
        fault = block_fault(graphs, block, store, vocab_size, limits)
    except RuntimeError as error:
        fault = _refused(error)
    return (graphs, ()) if fault is None else (block, _warnings(fault))


def _refused(error: RuntimeError) -> str:
    """No memory was left, or there is something that no graph can hold."""
    return f"CUDA graphs could not be recorded ({' '.join(str(error).split())[:200]})"


def _warnings(fault: str) -> tuple[str, ...]:
    sentence = f"{fault}; serving without them, slower"
    logger.warning(sentence)
    return (sentence,)


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


def _outputs(runner: Runner, batch: StepBatch, tensors: Sequence[Tensor], recorded: bool) -> dict[str, Tensor]:
    """Logits and taps of a step whose own keys and values are not there before."""
    for tensor in tensors:
        tensor.flatten(0, 1)[batch.slots] = 0.0
    if recorded:
        assert runner.graphs is not None
        out = runner.graphs.run(batch)
        assert out is not None, "steps are made to fit"
    else:
        out = runner.model.forward(batch, runner.store, runner.taps)
    return {"logits": out.logits} | ({} if out.taps is None else {"taps": out.taps})


@torch.inference_mode()
def block_fault(graphs: BlockGraphs, block: BlockPass, store: KVStore, vocab_size: int, limits: Limits) -> str | None:
    """The same for every recording of a drafter's pass."""
    tensors, far = [*store.keys, *store.values], _FAR[store.keys[0].dtype]
    generator = torch.Generator(store.keys[0].device).manual_seed(0)
    pages = min(store.num_pages - 1, DraftRows.width(min(2 * _CONTEXT, limits.max_model_len - 1), store.page_size))
    context = min(2 * _CONTEXT, limits.max_model_len - 1, pages * store.page_size)
    fault, smaller = None, 0
    for tensor in tensors:
        tensor[: pages + 1].normal_(generator=generator)
    for size in graphs.sizes:
        for count in (size, smaller + 1):
            rows = _draft_rows(count, context, pages, store, vocab_size)
            fault = _difference({"hidden states": block(rows)}, {"hidden states": graphs(rows)}, far)
            if fault is not None:
                break
        if fault is not None:
            fault = f"CUDA graphs of up to {size} drafting rows {fault}"
            break
        smaller = size
    for tensor in tensors:
        tensor[: pages + 1].zero_()
    return fault


def _draft_rows(count: int, context: int, pages: int, store: KVStore, vocab_size: int) -> DraftRows:
    """Rows of different contexts, all of them on the same pages, which a drafter's pass reads only."""
    row = torch.arange(count, device=store.keys[0].device)
    sampling = SamplingBatch.none(row.device)
    return DraftRows(
        anchors=(31 * row + count) % vocab_size,
        start=context - 5 * row % (context + 1),
        pages=torch.arange(1, pages + 1, device=row.device).expand(count, -1).contiguous(),
        page_size=store.page_size,
        counts=(0,) * count,
        longest=context,
        sampling=sampling,
    )


def _difference(want: Mapping[str, Tensor], got: Mapping[str, Tensor], far: float) -> str | None:
    """None where all is near, else how far apart what is."""
    for name, expected in want.items():
        expected, found = expected.float(), got[name].float()
        spread, distance = float(expected.std()), float((found - expected).abs().max())
        if distance <= far * spread:
            continue
        sentence = f"differ from the same steps without: {name} by {distance:.2g} where they spread by {spread:.2g}"
        if name != "logits":
            return sentence
        others = int((expected.argmax(-1) != found.argmax(-1)).sum())
        return f"{sentence}, {others} of {len(expected)} tokens are others"
    return None
