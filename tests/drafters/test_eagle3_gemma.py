"""EAGLE-3 in the Gemma-4 layout: no recording exists, so a random head against its formulas written out entry by entry.

Values equal keys, partial rotation, four norms per layer, a layer scalar, scaled embeddings, capped logits.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from dspark_serve.drafters.heads import plan_head
from dspark_serve.drafters.rows import Drawer
from dspark_serve.models.loader import iterate_weights
from tests.drafters.golden import GOLDENS, Recorder, golden_target
from tests.models.helpers import run_one
from tests.toy import make_engine, make_request, run

HIDDEN, HEADS, DIM, INNER, TAPS, CHAIN = 64, 4, 32, 128, (0, 2, 4), 4
PROMPT = [2, *range(40, 57)]


@pytest.fixture(scope="module")
def head_dir(tmp_path_factory):
    """A head on disk in DeepSpec's format, every weight random."""
    config = json.loads((GOLDENS / "gemma4_dspark_random" / "config.json").read_text())
    config |= {"architectures": ["Gemma4Eagle3Model"], "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    config |= {"markov_rank": 0, "enable_confidence_head": False}
    config |= {"target_layer_ids": list(TAPS), "ttt_length": CHAIN, "final_logit_softcapping": 2.0}
    shapes = {"fc": (HIDDEN, len(TAPS) * HIDDEN), "norm": (HIDDEN,), "layers.0.hidden_norm": (HIDDEN,)}
    for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        shapes[f"layers.0.{name}_layernorm"] = (HIDDEN,)
    attention = {"q_proj": (HEADS * DIM, 2 * HIDDEN), "k_proj": (DIM, 2 * HIDDEN), "o_proj": (HIDDEN, HEADS * DIM)}
    attention |= {"q_norm": (DIM,), "k_norm": (DIM,)}
    mlp = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    shapes |= {f"layers.0.self_attn.{name}": shape for name, shape in attention.items()}
    shapes |= {f"layers.0.mlp.{name}": shape for name, shape in mlp.items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.weight": torch.randn(*shape, generator=generator) * (0.3 if len(shape) == 1 else shape[1] ** -0.5)
        + (len(shape) == 1)
        for name, shape in shapes.items()
    }
    tensors["layers.0.layer_scalar"] = torch.tensor([0.7])
    directory = tmp_path_factory.mktemp("eagle")
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory


class Slow:
    """One chain, recomputing every entry from the start for every draft."""

    def __init__(self, directory):
        self.t = load_file(directory / "model.safetensors")
        self.embedding = dict(iterate_weights(GOLDENS / "gemma4_target", progress=False))["model.embed_tokens.weight"]

    def norm(self, x, name):
        scaled = x / (x.square().mean() + 1e-6).sqrt()
        return scaled if name is None else scaled * self.t[f"{name}.weight"]

    def turn(self, x, position):
        """Of 16 pairs (j, j + 16), a quarter turns."""
        out = x.clone()
        for j in range(4):
            angle = position * 1e6 ** (-2 * j / DIM)
            out[j] = x[j] * math.cos(angle) - x[j + 16] * math.sin(angle)
            out[j + 16] = x[j + 16] * math.cos(angle) + x[j] * math.sin(angle)
        return out

    def entry(self, features, token):
        """(key, value, query) of an entry, not turned."""
        embedded = self.norm(self.embedding[token] * HIDDEN**0.5, "layers.0.input_layernorm")
        x = torch.cat([embedded, self.norm(features, "layers.0.hidden_norm")])
        k = self.t["layers.0.self_attn.k_proj.weight"] @ x
        q = (self.t["layers.0.self_attn.q_proj.weight"] @ x).view(HEADS, DIM)
        names = "layers.0.self_attn.k_norm", "layers.0.self_attn.q_norm"
        return self.norm(k, names[0]), self.norm(k, None), [self.norm(head, names[1]) for head in q]

    def output(self, entries):
        """The last entry's output: it sees itself and all before it."""
        made = [self.entry(*entry) for entry in entries]
        keys = torch.stack([self.turn(k, i) for i, (k, _, _) in enumerate(made)])
        values = torch.stack([v for _, v, _ in made])
        heads = [(keys @ self.turn(q, len(made) - 1)).softmax(0) @ values for q in made[-1][2]]  # no 1/sqrt(dim)
        added = self.t["layers.0.self_attn.o_proj.weight"] @ torch.cat(heads)
        hidden = entries[-1][0] + self.norm(added, "layers.0.post_attention_layernorm")
        x = self.norm(hidden, "layers.0.pre_feedforward_layernorm")
        gate, up = (self.t[f"layers.0.mlp.{name}_proj.weight"] @ x for name in ("gate", "up"))
        down = self.t["layers.0.mlp.down_proj.weight"] @ (F.gelu(gate, approximate="tanh") * up)
        return (hidden + self.norm(down, "layers.0.post_feedforward_layernorm")) * 0.7

    def chain(self, features, tokens):
        """Logits [chain, vocab] of greedy drafts after tokens; features: [len(tokens) - 1, hidden], fused."""
        entries, logits = list(zip(features, tokens[1:], strict=True)), []
        for _ in range(CHAIN):
            hidden = self.output(entries)
            raw = self.embedding @ self.norm(hidden, "norm")
            logits.append(2.0 * torch.tanh(raw / 2.0))
            entries.append((hidden, int(logits[-1].argmax())))
        return torch.stack(logits)


def test_chains_are_those_of_the_formulas(head_dir):
    target = golden_target("gemma4_target")
    engine = make_engine(target, plan_head(head_dir, target, "coupled"), page_size=8)
    request = make_request("r", PROMPT, temperature=0.0, max_tokens=10, ignore_eos=True)
    engine.add(request)
    engine.step()
    slow, rounds = Slow(head_dir), 0
    while len(request.token_ids) + CHAIN < len(PROMPT) + 10:
        tokens = list(request.token_ids)
        engine.drafter._drawer = recorder = Recorder(Drawer("coupled", 512))
        engine.step()
        taps = run_one(target, tokens[:-1], taps=TAPS).taps
        wanted = slow.chain(taps @ slow.t["fc.weight"].T, tokens)
        torch.testing.assert_close(torch.cat(recorder.logits), wanted, atol=1e-4, rtol=0)
        rounds += 1
    assert rounds > 2


def test_the_text_is_that_of_plain_decoding(head_dir):
    target = golden_target("gemma4_target")

    def ask():
        prompts = (PROMPT, PROMPT[:1], PROMPT[3:9])
        return [
            make_request(f"r{i}", p, seed=i, temperature=0.8 * (i % 2), max_tokens=12) for i, p in enumerate(prompts)
        ]

    plain = run(make_engine(target, page_size=4), ask())
    drafted = run(make_engine(target, plan_head(head_dir, target, "coupled"), page_size=4), ask())
    assert drafted.tokens == plain.tokens
    assert drafted.kept > 0
