"""A closed-form first layer: fixed attention patterns, and value maps fitted by ridge regression.

Query and key norms make a rank-one projection a switch: only the sign of the input's part along one direction
survives. So keys can mark "context" or "anchor", and rotary phases choose the distance. The fitted layer then gives the
anchor slot an estimate of what the target's layer before the last would say there; what follows is the target's own.
Must not know: losses, the training loop, files.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_serve.training.anchors import Passage
from dspark_serve.training.head import FrozenTarget, Layer, TrainableHead

# Rotary pairs by the angle they turn per token, in radians:
_NEAR = (0.16, 4.0)  # tell a distance of 1 from others, for the anchor slot
_RECENT = (0.009, 0.5)  # slower: their sum falls with distance; nearest context, for the mask slots
_TURNING = (0.009, 4.0)  # both of them
_STILL = (0.0, 8e-4)  # hardly turn within a block
_SHARPNESS = 2.4  # query and key norm weights
_RIDGE = 3e-3  # of the mean variance
_NOISE = 0.02


@torch.no_grad()
def plant_first_layer(
    head: TrainableHead, target: FrozenTarget, passages: Sequence[Passage], anchor_heads: int
) -> None:
    """Set layer 0: all but `anchor_heads` heads read the newest context, those read the anchor. fc and norms are set.

    Needs as many key/value heads as heads, and the target's layer before the last as newest tap.
    """
    layer, config = head.layers[0], head.config
    assert isinstance(layer, Layer)
    if config.kv_heads != config.heads:
        raise ValueError("a planted layer needs as many key/value heads as heads")
    context = torch.cat([head.hidden_norm(head.fc(p.states)) for p in passages])  # [tokens, hidden]
    before, at = _pairs(passages)
    embedded = target.embedding[torch.cat([p.tokens[:-1] for p in passages])]
    anchors = layer.input_layernorm(embedded)  # [tokens, hidden]
    mask = layer.input_layernorm(target.embedding[config.mask_token_id or 0].unsqueeze(0))  # [1, hidden]
    newest = torch.cat([p.states[:, -config.hidden_size :] for p in passages])[at]  # what layer 0 should say
    is_context = _direction([(context, 1.0), (anchors, -1.0), (mask, -1.0)])
    is_anchor = _direction([(context, -1.0), (anchors, 1.0), (mask, -1.0)])
    any_slot = _direction([(anchors, 1.0), (mask, -1.0)])  # the sign tells anchor from mask
    local = config.heads - anchor_heads
    queries, keys = [], []
    for index in range(config.heads):
        if index < local:
            near, recent, plain = _pattern(head, _NEAR, 1), _pattern(head, _RECENT, 0), _pattern(head, _TURNING, 0)
            # One direction, two patterns: along it the anchor is +1 and the mask -1.
            queries.append(torch.outer(near - recent, any_slot) + torch.outer(near + recent, _one(anchors, mask)))
            keys.append(torch.outer(plain, is_context))
        else:
            still = _pattern(head, _STILL, 0)
            queries.append(torch.outer(still, _one(anchors, mask)))
            keys.append(torch.outer(still, is_anchor))
    attention = layer.self_attn
    attention.q_proj.weight.copy_(_shaken(torch.cat(queries)))
    attention.k_proj.weight.copy_(_shaken(torch.cat(keys)))
    attention.q_norm.weight.fill_(_SHARPNESS)
    attention.k_norm.weight.fill_(_SHARPNESS)
    width = local * config.head_dim
    first, second = _joint_fit(context[before], anchors[at], newest, width, config.heads * config.head_dim - width)
    attention.v_proj.weight.copy_(torch.cat([first[0].T, second[0].T]))
    attention.o_proj.weight.copy_(torch.cat([first[1], second[1]], dim=1))
    layer.mlp.down_proj.weight.mul_(0.1)


def _pairs(passages: Sequence[Passage]) -> tuple[Tensor, Tensor]:
    """Indices into concatenated states of (position s - 1, position s), for s in the answers."""
    before, first = [], 0
    for passage in passages:
        positions = torch.arange(passage.num_prompt, passage.states.shape[0], device=passage.states.device)
        before.append(first + positions - 1)
        first += passage.states.shape[0]
    joined = torch.cat(before)
    return joined, joined + 1


def _one(anchors: Tensor, mask: Tensor) -> Tensor:
    """A direction along which every slot's input is near 1."""
    return _direction([(anchors, 1.0), (mask, 1.0)])


def _direction(classes: Sequence[tuple[Tensor, float]]) -> Tensor:
    """The direction [hidden] along which each class of vectors lies near its value; classes weigh the same."""
    some = classes[0][0]
    left, right = some.new_zeros(some.shape[1], some.shape[1]), some.new_zeros(some.shape[1])
    for vectors, value in classes:
        left += vectors.T @ vectors / len(vectors)
        right += vectors.mean(0) * value
    left.diagonal().add_(1e-3 * left.diagonal().mean())
    solution: Tensor = torch.linalg.solve(left, right)
    return solution


def _pattern(head: TrainableHead, angles: tuple[float, float], distance: int) -> Tensor:
    """A vector [head_dim] in the rotary pairs of these angles whose product with distance 0's peaks at this distance.

    A query turns forwards with its position: turning it back by `distance` moves the peak there.
    """
    half = head.config.head_dim // 2
    turn = torch.atan2(head.sin[1, :half], head.cos[1, :half]).abs()  # [half], falling
    chosen = ((turn >= angles[0]) & (turn <= angles[1])).float()
    if not chosen.any():  # narrow heads may lack them: the slowest pair has to do
        chosen[-1] = 1.0
    pattern = torch.cat([chosen, torch.zeros_like(chosen)])
    cos, sin = head.cos[distance], head.sin[distance]
    low, high = pattern[:half], pattern[half:]
    return torch.cat([low * cos[:half] + high * sin[:half], high * cos[:half] - low * sin[:half]])


def _shaken(weight: Tensor) -> Tensor:
    """A little noise, the same on every device: exact copies of a pattern would all learn the same."""
    return weight + _NOISE * weight.square().mean().sqrt() * torch.randn(weight.shape).to(weight.device)


def _joint_fit(
    context: Tensor, anchors: Tensor, wanted: Tensor, context_rank: int, anchor_rank: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """wanted ~ context @ a1 @ b1.T + anchors @ a2 @ b2.T, each pair [hidden, rank]; ridge, then the best ranks.

    Tokens count by the inverse square of their size, since a final norm will level them.
    """
    hidden = context.shape[1]
    inputs = torch.cat([context, anchors], dim=1)
    scale = wanted.square().mean(-1, keepdim=True).rsqrt()
    weighted = inputs * scale
    left = weighted.T @ weighted
    left.diagonal().add_(_RIDGE * left.diagonal().mean())
    full = torch.linalg.solve(left, weighted.T @ (wanted * scale))  # [2 * hidden, hidden]
    fits = []
    for part, rows, rank in ((context, full[:hidden], context_rank), (anchors, full[hidden:], anchor_rank)):
        said = (part * scale) @ rows
        _, directions = torch.linalg.eigh(said.T @ said)
        kept = directions[:, -min(rank, hidden) :]
        size = (rows @ kept).norm() ** 0.5 / kept.norm() ** 0.5
        pad = (0, rank - kept.shape[1])
        fits.append((F.pad(rows @ kept / size, pad), F.pad(kept * size, pad)))
    return fits[0], fits[1]
