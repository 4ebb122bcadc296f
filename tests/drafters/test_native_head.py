"""A head through the kernels' single calls against the same head step by step: drafts, confidences, context."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dspark_kernels import native, packed
from dspark_kernels.decoder import DecoderStack
from dspark_serve.cache.store import KVStore
from dspark_serve.drafters.head_config import HeadConfig
from dspark_serve.drafters.head_weights import lm_head_rows
from dspark_serve.drafters.heads import plan_from_tensors, plan_head
from dspark_serve.drafters.rows import DraftRows
from dspark_serve.models.layers import NativeLinear
from dspark_serve.models.loader import load_model, read_config, resolve
from tests.drafters.golden import GOLDENS, golden_runs, golden_target
from tests.toy import make_engine, make_request, run

pytestmark = pytest.mark.skipif(native.load() is None, reason="needs the C++ kernels, built by a compiler at install")


def drafter_of(head, sampler=True, single_calls=True, draft_vocab=None):
    plan = plan_head(GOLDENS / head, golden_target(), "coupled", None)
    target = golden_target()
    store = KVStore((*target.info.kv_layers, *plan.kv_layers), 40, 8)
    drafter = plan.make(store, len(target.info.kv_layers))
    drafter._head = replace(drafter._head, draft_vocab=draft_vocab)
    if draft_vocab is not None:
        drafter._drawer = replace(drafter._drawer, draft_vocab=draft_vocab)
    if not single_calls:
        drafter._head.__dict__["native"] = None
    elif not sampler:
        drafter._head.__dict__["native"] = replace(drafter._head.native, sampler=None)
    return drafter, store


def rows_of(temperatures):
    """Rows in the middle of texts of different lengths."""
    engine = make_engine(golden_target(), page_size=8, pages=40)
    for index, temperature in enumerate(temperatures):
        tokens = [(7 * i + 31 * index) % 500 for i in range(9 + 5 * index)]
        request = make_request(f"r{index}", tokens, temperature=temperature, seed=index * 77, max_tokens=50)
        engine.add(request)
    engine.step()
    return [row._replace(max_drafts=7) for row in engine.scheduler.plan().rows]


def fill(store, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*store.keys, *store.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))


TEMPERATURES = {"greedy": [0.0] * 3, "drawn": [1.0, 0.6, 1.7], "mixed": [0.0, 1.0, 0.0, 2.0]}


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("temperatures", TEMPERATURES.values(), ids=TEMPERATURES)
def test_one_call_drafts_what_the_loop_drafts(temperatures, few):
    ids = torch.arange(512) if few else None  # as many columns as there are tokens, by way of their ids
    proposals = []
    for sampler in (True, False):
        drafter, store = drafter_of("dspark_vanilla", sampler, draft_vocab=ids)
        assert (drafter._head.native.sampler is not None) == sampler
        fill(store)
        proposals.append(drafter.propose(rows_of(temperatures)))
    ours, loop = proposals
    assert torch.equal(ours.tokens, loop.tokens)
    assert len(set(ours.tokens.flatten().tolist())) > 5
    torch.testing.assert_close(ours.largest, loop.largest, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.confidence, loop.confidence, atol=1e-6, rtol=1e-5)


def with_lm_head_of_its_own(drafter):
    ids, kernels = torch.arange(512), native.load()
    linear = NativeLinear(kernels, packed.PackedWeight(kernels, lm_head_rows(golden_target(), ids), None, False), None)
    drafter._head = replace(drafter._head, lm_head=linear, draft_vocab=ids)
    drafter._drawer = replace(drafter._drawer, draft_vocab=ids)


@pytest.mark.parametrize("own", [False, True])  # is the LM head the draft head's, and part of the call?
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("width", [3, 7])
def test_one_call_writes_context_decodes_and_draws_what_parts_do(own, rows, width):
    chosen = [row._replace(max_drafts=width - (index == 2)) for index, row in enumerate(rows_of([0.0, 1.0, 0.6, 2.0]))]
    chosen, found = chosen[:rows], []
    for whole in (True, False):
        drafter, store = drafter_of("dspark_vanilla")
        if own:
            with_lm_head_of_its_own(drafter)
        assert drafter._whole
        assert drafter._head.native.lm_head == own
        drafter._whole = whole
        fill(store)
        pages = np.array([page for row in chosen for page in row.request.pages])
        drafter._owed[pages] = True
        found.append((drafter.propose(chosen), [t.clone() for t in (*store.keys, *store.values)]))
        assert drafter._owed.sum() == len(pages) * 8 - sum(row.start for row in chosen)
    (ours, here), (parts, there) = found
    assert torch.equal(ours.tokens, parts.tokens)
    assert ours.n_draft == parts.n_draft == tuple(row.max_drafts for row in chosen)
    torch.testing.assert_close(ours.largest, parts.largest, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.confidence, parts.confidence, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    empty = drafter_of("dspark_vanilla")[1]
    fill(empty)
    assert not torch.equal(empty.keys[-2], store.keys[-2])


def made_from(tensors, kernels="auto"):
    """The vanilla head's drafter with these tensors, and its plan."""
    target = load_model(resolve(str(GOLDENS / "target")), "float32", "cpu", kernels=kernels)
    config = HeadConfig.parse(read_config(GOLDENS / "dspark_vanilla"))
    plan = plan_from_tensors(config, tensors, target, "coupled")
    store = KVStore((*target.info.kv_layers, *plan.kv_layers), 40, 8)
    fill(store)
    return plan.make(store, len(target.info.kv_layers)), plan


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrices_of_16_bits_are_held_in_8_where_the_kernels_read_them(dtype):
    stored = {
        k: v.to(dtype) if v.is_floating_point() else v
        for k, v in load_file(GOLDENS / "dspark_vanilla" / "model.safetensors").items()
    }
    exact = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in stored.items()}
    rows, drafts, bytes_, blocks = rows_of(TEMPERATURES["drawn"]), [], [], []
    for tensors, kernels in ((stored, "auto"), (exact, "auto"), (stored, "torch")):
        drafter, plan = made_from(tensors, kernels)
        bytes_.append(plan.num_bytes)
        batch = DraftRows.build(rows, 8, drafter.width, "cpu")
        blocks.append(drafter._head.block(batch, drafter._store, drafter._first_layer))
        drafts.append(drafter.propose(rows).tokens)
        head = drafter._head.native
        assert (head is None) == (kernels == "torch")
        if head is not None:
            matrices = [m for layer in head.stack._weights for m in (layer.qkv, layer.out, layer.gate_up, layer.down)]
            matrices.append(head.context.fc)
            assert {m.storage for m in matrices} == ({packed.HALF_CODES8} if tensors is stored else {packed.FLOAT32})
            assert head.sampler.bias.inputs == 16  # no whole group, so it stays as it is stored
            assert head.sampler.bias.storage == packed._STORAGE[tensors["markov_head.markov_w2.weight"].dtype]
    held, plain, torch_ = blocks
    assert bytes_[0] < 0.65 * bytes_[1]  # with embeddings and norms, which stay; 16 bits would take 0.73
    torch.testing.assert_close(torch_, plain, atol=1e-4, rtol=1e-4)  # float32 heads and other kernels are left alone
    off = (held - plain).norm() / plain.norm()
    assert 1e-4 < off < 0.03
    assert (drafts[0] == drafts[1]).float().mean() > 0.8


def test_a_row_drafts_alone_what_it_drafts_in_company():
    drafter, store = drafter_of("dspark_vanilla")
    fill(store)
    rows = rows_of(TEMPERATURES["mixed"])
    together = drafter.propose(rows)
    for index, row in enumerate(rows):
        alone = drafter.propose([row])
        assert torch.equal(alone.tokens[0], together.tokens[index])
        assert torch.equal(alone.confidence[0], together.confidence[index])
        assert torch.equal(alone.largest[0], together.largest[index])


@pytest.mark.parametrize("head", ["dspark_vanilla", "dspark_rnn", "dflash"])
def test_block_and_context_are_those_of_the_layers(head):
    rows, blocks, contexts = rows_of(TEMPERATURES["greedy"]), [], []
    taps_width = len(drafter_of(head)[0].taps) * golden_target().info.hidden_size
    taps = torch.randn(9, taps_width, generator=torch.Generator().manual_seed(1))
    for single_calls in (True, False):
        drafter, store = drafter_of(head, single_calls=single_calls)
        assert (drafter._head.native is not None) == single_calls
        assert not single_calls or isinstance(drafter._head.native.stack, DecoderStack)
        fill(store)
        slots = torch.arange(40, 49).flip(0)
        kept = torch.full((60, taps_width), torch.nan).index_copy_(0, slots, taps)
        drafter._head.write_kept(kept, torch.arange(5, 14), slots, 14, store, drafter._first_layer)
        contexts.append(torch.cat([t.flatten() for t in (*store.keys, *store.values)]))
        batch = DraftRows.build(rows, 8, drafter.width, "cpu")
        blocks.append(drafter._head.block(batch, store, drafter._first_layer))
    torch.testing.assert_close(*contexts, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(*blocks, atol=2e-4, rtol=1e-4)


def test_a_step_with_the_sampler_serves_the_golden_text():
    golden = golden_runs("dspark_vanilla")[0]
    engine = make_engine(
        golden_target(), plan_head(GOLDENS / "dspark_vanilla", golden_target(), "coupled"), page_size=8
    )
    request = make_request("r", golden["input_ids"], temperature=0.0, max_tokens=golden["max_new_tokens"])
    got = run(engine, [request])
    assert got.tokens["r"][: len(golden["output_ids"])] == golden["output_ids"][: golden["max_new_tokens"]]
