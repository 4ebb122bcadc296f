"""Filters and draws that look at whole vocabularies, in steps whose sizes follow from shapes alone.

For devices that the host must not wait for: sampling.py looks only where a token can still matter, which is faster on a
CPU, but asks how many those are. The results are the same. Must not know: greedy ties, penalties, supports.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dspark_kernels import noise
from dspark_serve.types import GREEDY_TEMPERATURE

MASS_SCALE = 2.0**40  # probabilities as integers, whose sums are exact in any order, on any device
_DIGIT_BITS = 11  # of a 32-bit key looked at per pass: three passes, and tables that fit any cache
_ELEMENTS = 1 << 23  # looked at together: some 50 bytes each are held meanwhile


def thresholds(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The filters as one threshold per sample: tokens with scaled logit >= it are kept. -> [samples] float32.

    scaled: [samples, vocab] float32, logits / temperature; top_k [samples] int64, 0 off; top_p and min_p [samples]
    float32, 1 and 0 off. Top-k, then top-p on what it kept, and min-p. A radix search over the bits of logits: three
    passes over the vocabulary for top-k, three for top-p, each a masked histogram of some six simple operations, and
    five passes for order, softmax and sums. Integers are all that is added across tokens, so neither the order of the
    additions nor the batch changes a bit.
    """
    given = scaled, top_k, top_p, min_p
    return torch.cat([_thresholds(*(x[rows] for x in given)) for rows in _passes(scaled)])


def draw(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, stream: int) -> Tensor:
    """argmax over the vocabulary of logits / temperature + noise -> [samples] int64; greedy samples take the argmax.

    logits: [samples, vocab] float32; temperature [samples] float32; seed, position [samples] int64. The lowest id wins
    ties. Noise is made for every token, which is some hundred simple operations on each.
    """
    given = logits, temperature, seed, position
    return torch.cat([_draw(stream, *(x[rows] for x in given)) for rows in _passes(logits)])


def _passes(matrix: Tensor) -> Iterator[slice]:
    """Rows to look at together; one slice, an empty one, where there are none."""
    step = max(1, _ELEMENTS // max(1 << _DIGIT_BITS, matrix.shape[1]))  # as many as the tables have columns, or more
    return (slice(first, first + step) for first in range(0, max(1, len(matrix)), step))


def _thresholds(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    key = _ordered(scaled)  # [samples, vocab]
    use_k, use_p = top_k > 0, top_p < 1  # [samples]
    kth = _reaching(key, torch.ones_like(key), torch.where(use_k, top_k, 1).clamp(max=scaled.shape[1]))
    k_value = torch.where(use_k, _number(kth), -torch.inf)
    # NaN has no integer: rows with one have no mass.
    mass = (scaled.softmax(-1) * MASS_SCALE).nan_to_num_(0.0).long()  # [samples, vocab]
    kept = mass.masked_fill(scaled < k_value.unsqueeze(1), 0).sum(-1)
    total = torch.where(use_k, kept.double(), MASS_SCALE)  # [samples]
    pth = _reaching(key, mass, (total * top_p).ceil().long())  # what top-k left out comes after all that it kept
    p_value = torch.where(use_p, _number(pth), -torch.inf)
    # The portable log: a library's may differ between the vector body and the scalar tail of an array.
    cutoff = scaled.amax(-1) + noise.log(min_p.clamp(min=torch.finfo(torch.float32).tiny))
    return torch.maximum(torch.where(min_p > 0, cutoff, -torch.inf), torch.maximum(k_value, p_value))


def _reaching(key: Tensor, weight: Tensor, goal: Tensor) -> Tensor:
    """Per row the largest key there such that it and all larger ones weigh `goal` or more; the smallest if none does.

    key [samples, vocab] int64 in [0, 2^32); weight [samples, vocab] int64, none negative; goal [samples] int64.
    -> [samples] int64.
    """
    buckets = 1 << _DIGIT_BITS
    prefix = torch.zeros_like(goal)  # the digits found so far
    above = torch.zeros_like(goal)  # weight of all keys with a larger prefix
    for shift in range(2 * _DIGIT_BITS, -1, -_DIGIT_BITS):
        inside = key >> (shift + _DIGIT_BITS) == prefix.unsqueeze(1)
        digit = (buckets - 1) - (key >> shift & (buckets - 1))  # the largest first
        each = key.new_zeros(len(key), buckets).scatter_add_(1, digit, weight.where(inside, 0))
        until = each.cumsum(-1).add_(above.unsqueeze(1))  # [samples, buckets]: weight down to the end of this digit
        at = (until < goal.unsqueeze(1)).sum(-1, keepdim=True).clamp_(max=buckets - 1)  # the first that reaches it
        prefix = prefix << _DIGIT_BITS | (buckets - 1) - at.squeeze(1)
        above = (until - each).gather(1, at).squeeze(1)
    found = torch.where(weight.sum(-1) < goal, key.amin(-1), prefix)
    return torch.where(goal > 0, found, key.amax(-1))  # nothing at all reaches nothing: no digit says who is there


def _ordered(x: Tensor) -> Tensor:
    """Keys that compare as the float32 numbers do, NaN above all: int64 in [0, 2^32)."""
    bits = torch.where(x.isnan(), torch.nan, x + 0.0).view(torch.int32)  # one NaN, and one zero
    return _flipped(bits).long() + (1 << 31)


def _number(key: Tensor) -> Tensor:
    """The float32 number of a key."""
    return _flipped((key - (1 << 31)).int()).view(torch.float32)


def _flipped(bits: Tensor) -> Tensor:
    """float32's bits to int32 of the same order, and back: the magnitudes of negative numbers run the other way."""
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


def _draw(stream: int, logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    greedy = temperature <= GREEDY_TEMPERATURE  # [samples]
    scores = noise.gumbel_dense(seed, position, logits.shape[1], stream)
    scores += logits / temperature.masked_fill(greedy, 1.0).unsqueeze(1)
    return torch.where(greedy, logits.argmax(-1), scores.argmax(-1))
