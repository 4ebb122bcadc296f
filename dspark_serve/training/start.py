"""Where a head's weights start: the target's last layers, and closed-form fits where a layer has no counterpart.

Minutes of gradient steps are saved by seconds of linear algebra. Must not know: losses, the training loop, files.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dspark_serve.training.anchors import Passage, build_blocks, context_states
from dspark_serve.training.head import FrozenTarget, Layer, MarkovTables, TrainableHead
from dspark_serve.training.plant import plant_first_layer
from dspark_serve.training.target import TargetWeights

# The target has no query and key norms; this weight keeps its attention about as sharp as it was.
_QK_NORM = 1.7
_OLD_TAPS = 0.1  # share of the taps before the newest one in the fused context
_RIDGE = 1e-2  # of the mean variance


@torch.no_grad()
def warm_start(
    head: TrainableHead,
    weights: TargetWeights,
    target: FrozenTarget,
    passages: Sequence[Passage],
    anchor_heads: int = 0,
) -> None:
    """Set all of the head's weights from the target and from some of its passages; `anchor_heads`: see plant.py."""
    first = weights.config.num_layers - head.config.num_layers
    for index, layer in enumerate(head.layers):
        assert isinstance(layer, Layer)
        _copy_layer(layer, weights, first + index)
    _fuse_taps(head, torch.cat([p.states for p in passages]))
    head.hidden_norm.weight.copy_(weights.layers[f"{weights.config.num_layers - 1}.input_layernorm.weight"])
    head.norm.weight.copy_(weights.final_norm)
    if anchor_heads:
        plant_first_layer(head, target, passages, anchor_heads)
    if isinstance(head.markov, MarkovTables):
        _fit_markov(head, head.markov, target, passages)
    if head.confidence is not None:
        head.confidence.weight.zero_()
        head.confidence.bias.zero_()


def _copy_layer(layer: Layer, weights: TargetWeights, index: int) -> None:
    for name, parameter in layer.named_parameters():
        if name.startswith(("self_attn.q_norm", "self_attn.k_norm")):
            parameter.fill_(_QK_NORM)
            continue
        given = weights.layers[f"{index}.{name}"]
        if name.startswith(("self_attn.k_proj", "self_attn.v_proj")) and given.shape != parameter.shape:
            # The draft may have more key/value heads than the target: its groups begin as copies of each other.
            heads = given.view(weights.config.kv_heads, -1, given.shape[1])
            given = heads.repeat_interleave(layer.self_attn.kv_heads // weights.config.kv_heads, 0).flatten(0, 1)
        parameter.copy_(given)


def _fuse_taps(head: TrainableHead, states: Tensor) -> None:
    """The fused context begins as the newest tap with a little of the others, all brought to equal size.

    Sizes are medians over tokens: the first token of a text carries values hundreds of times larger than any other.
    """
    hidden, count = head.config.hidden_size, len(head.config.taps)
    sizes = states.view(-1, count, hidden).square().mean(-1).sqrt().median(0).values  # [taps]
    shares = torch.full_like(sizes, _OLD_TAPS)
    shares[-1] = 1.0
    scaled = torch.eye(hidden, device=states.device).repeat(1, count) * (shares / sizes).repeat_interleave(hidden)
    head.fc.weight.copy_(scaled)


def _fit_markov(head: TrainableHead, markov: MarkovTables, target: FrozenTarget, passages: Sequence[Passage]) -> None:
    """What the token before a slot adds to what the layers say there, over all slots: a bigram model of the error."""
    inputs, errors = [], []
    for passage in passages:
        anchors = np.arange(passage.num_prompt, len(passage.tokens) - head.config.block_size, 3)
        if not len(anchors):
            continue
        blocks = build_blocks([passage], [anchors], head.config.block_size)
        said = head.backbone(context_states([passage], blocks), blocks, target)
        errors.append(passage.last_hidden[blocks.sources.view(-1)] - said)
        inputs.append(target.embedding[blocks.previous_tokens().view(-1)])
    in_map, out_map = reduced_rank_fit(torch.cat(inputs), torch.cat(errors), head.config.markov_rank)
    markov.in_map.copy_(in_map)
    markov.out_map.copy_(out_map)


def reduced_rank_fit(inputs: Tensor, outputs: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Ridge regression of outputs [n, out] on inputs [n, in] through `rank` numbers: inputs @ a @ b.T.

    Returns a [in, rank] and b [out, rank]; b has orthonormal columns times a common scale (Izenman 1975).
    """
    covariance = inputs.T @ inputs / len(inputs)
    covariance.diagonal().add_(_RIDGE * covariance.diagonal().mean())
    full = torch.linalg.solve(covariance, inputs.T @ outputs / len(inputs))  # [in, out]
    predicted = inputs @ full
    _, directions = torch.linalg.eigh(predicted.T @ predicted)  # ascending
    kept = directions[:, -rank:]  # [out, rank]
    scale = (full @ kept).norm() ** 0.5 / kept.norm() ** 0.5  # both factors of equal size train at equal speed
    return full @ kept / scale, kept * scale
