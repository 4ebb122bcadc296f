"""From raw logits to the processed target distribution, and draws from it with addressed noise.

Every result is a function of its own row of logits and parameters: batch neighbours and padding never change a bit.
Must not know: rows of drafts, acceptance, requests. A row whose logits hold NaN or nothing finite yields some valid
token id (the first NaN where there is one), never an error and never an endless loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_kernels import native, noise
from dspark_serve import unpruned
from dspark_serve.tensors import LogprobTable, Penalties, SamplingBatch
from dspark_serve.types import GREEDY_TEMPERATURE

_BLOCK = 64  # columns per block maximum: one cheap pass over the logits, after which most blocks are never read again
_GROUP_BITS = 4  # log2 of a block's groups of noise.LANES tokens
_OPENING = 32  # tokens whose scores set the mark that all others must reach
_CANDIDATES = 64  # tokens examined before a filter looks at more of the row; results do not depend on it


@dataclass(frozen=True)
class Support:
    """A distribution per sample on finitely many tokens: softmax of log_weights over ids. Columns are in any order.

    A padding column has log weight -inf and any valid id. `dense` says that ids are 0..vocab-1 in order.
    """

    ids: Tensor  # [samples, width] int64, distinct where the log weight is finite
    log_weights: Tensor  # [samples, width] float32, unnormalised
    dense: bool = False


def apply_adjustments(logits: Tensor, sampling: SamplingBatch) -> Tensor:
    """Repetition, presence and frequency penalties, then logit bias and masks; [samples, vocab] float32.

    Returns `logits` itself when nothing is asked for, else a changed copy: the input is never written to.
    """
    if sampling.penalties is None and sampling.bias_value is None:
        return logits
    logits = logits.clone()
    if sampling.penalties is not None:
        _penalise(logits, sampling.penalties)
    if sampling.bias_value is not None:
        assert sampling.bias_sample is not None
        assert sampling.bias_token is not None
        logits.index_put_((sampling.bias_sample, sampling.bias_token), sampling.bias_value, accumulate=True)
    return logits


def _penalise(logits: Tensor, penalties: Penalties) -> None:
    where = (penalties.sample, penalties.token)
    value = logits[where]  # [entries]
    # Repetition moves a logit away from the favoured side, whatever its sign (Keskar et al. 2019, CTRL).
    value = torch.where(value > 0, value / penalties.repetition, value * penalties.repetition)
    value -= penalties.presence * (penalties.generated > 0)
    value -= penalties.frequency * penalties.generated
    logits[where] = value


def target_support(logits: Tensor, sampling: SamplingBatch) -> Support:
    """The processed target distribution of each sample: adjustments, temperature, top-k, top-p, min-p; fp32 in and out.

    logits: [samples, vocab]. Top-k keeps the k largest and all equal to the k-th; top-p the fewest most likely tokens
    whose renormalised mass reaches top_p; min-p those at least min_p times as likely as the best. Greedy samples keep
    the lowest id among the largest logits.
    """
    logits = apply_adjustments(logits, sampling)
    best = argmax(logits)  # [samples]
    if sampling.all_greedy:
        return Support(best.unsqueeze(1), torch.zeros_like(best, dtype=torch.float32).unsqueeze(1))
    greedy = sampling.temperature <= GREEDY_TEMPERATURE  # [samples]
    scaled = logits / _divisor(sampling.temperature).unsqueeze(1)  # [samples, vocab]
    best_value = scaled.gather(1, best.unsqueeze(1))  # [samples, 1]
    if not sampling.any_filter:
        threshold = torch.where(greedy, torch.inf, -torch.inf)  # the best token is put back below
    elif not _prunes(scaled):
        threshold = _all_thresholds(scaled, sampling).masked_fill_(greedy, torch.inf)
    else:
        values, ids = _top(scaled, min(_CANDIDATES, scaled.shape[1]))
        threshold = _thresholds(scaled, values, ids, sampling)
        threshold.masked_fill_(greedy, torch.inf)
        if values.shape[1] == scaled.shape[1] or bool((threshold > values[:, -1]).all()):
            kept = values >= threshold.unsqueeze(1)
            width = max(1, int(kept.sum(-1).max()))
            values, ids = values[:, :width].masked_fill(~kept[:, :width], -torch.inf), ids[:, :width]
            ids = torch.cat([torch.where(greedy, best, ids[:, 0]).unsqueeze(1), ids[:, 1:]], dim=1)
            return Support(ids, torch.cat([best_value, values[:, 1:]], dim=1))
    scaled.masked_fill_(scaled < threshold.unsqueeze(1), -torch.inf).scatter_(1, best.unsqueeze(1), best_value)
    return Support(torch.arange(scaled.shape[1], device=scaled.device).expand_as(scaled), scaled, dense=True)


def draw_target(logits: Tensor, sampling: SamplingBatch, stream: int = noise.GUMBEL) -> Tensor:
    """Tokens drawn from the processed target distribution at each sample's (seed, position) -> [samples] int64.

    Equal to draw(target_support(...)) bit for bit, without building the distribution where nothing filters it.
    """
    if sampling.any_filter and not sampling.all_greedy:
        return draw(target_support(logits, sampling), sampling.seed, sampling.position, stream)
    logits = apply_adjustments(logits, sampling)
    if sampling.all_greedy:
        return argmax(logits)
    return draw_logits(logits, sampling.temperature, sampling.seed, sampling.position, stream)


def draw(support: Support, seed: Tensor, position: Tensor, stream: int = noise.GUMBEL) -> Tensor:
    """One token per sample: argmax of log weight + noise(seed, position, token), the lowest id on ties; [samples]."""
    ids, log_weights = support.ids, support.log_weights
    if ids.shape[1] == 1:
        return ids[:, 0]
    ones = torch.ones_like(log_weights[:, 0])
    if support.dense:
        return draw_logits(log_weights, ones, seed, position, stream)
    if (kernels := _kernels(log_weights)) is not None:
        return kernels.draw(log_weights, ones, seed, position, stream, GREEDY_TEMPERATURE, ids)
    scores = log_weights + noise.gumbel(seed.unsqueeze(1), position.unsqueeze(1), ids, stream)
    best = scores.amax(-1, keepdim=True)
    # Where nothing equals the best (NaN), all columns tie, which keeps the id valid.
    lost = (scores != best) & (scores == best).any(-1, keepdim=True)
    return ids.masked_fill(lost, torch.iinfo(torch.int64).max).amin(-1)


def draw_logits(
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    stream: int = noise.GUMBEL,
    ids: Tensor | None = None,
) -> Tensor:
    """argmax over the vocabulary of logits / temperature + noise -> [samples] int64; greedy samples take the argmax.

    logits: [samples, vocab] float32, of the tokens `ids` [vocab], ascending, where they are not simply 0..vocab-1;
    the rest [samples]. The lowest id wins ties. C++ and torch give the same bits, and so does any device.
    """
    if (kernels := _kernels(logits)) is not None:
        return kernels.draw(logits, temperature, seed, position, stream, GREEDY_TEMPERATURE, ids)
    if ids is None and not _prunes(logits):
        return unpruned.draw(logits, temperature, seed, position, stream)
    if ids is None:
        return _draw_pruned(logits, temperature, seed, position, stream)
    scaled = logits / _divisor(temperature).unsqueeze(1)
    greedy = (temperature <= GREEDY_TEMPERATURE).unsqueeze(1)
    others = torch.arange(logits.shape[1], device=logits.device) != argmax(logits).unsqueeze(1)
    return draw(
        Support(ids.expand_as(scaled), scaled.masked_fill_(greedy & others, -torch.inf)), seed, position, stream
    )


def _draw_pruned(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, stream: int) -> Tensor:
    """draw_logits in torch. Noise is drawn only where it can matter: it never exceeds GUMBEL_MAX, so with the best
    token's score in hand, any token that needs more than that to win is out; nor are logarithms taken of noise too
    small to win. The result is the argmax over the whole vocabulary all the same.
    """
    temperature, greedy = _divisor(temperature), temperature <= GREEDY_TEMPERATURE
    blocks, maxima = _block_maxima(logits)
    best = _argmax_of_blocks(blocks, maxima)  # [samples]
    score = _opening_score(blocks, maxima, temperature, seed, position, stream)
    # In exact arithmetic a token can win or tie only if its logit / temperature >= score - its noise. The slack
    # exceeds by far the half-ulp errors of the division and the two sums.
    score -= 1e-5 * (score.abs() + noise.GUMBEL_MAX)
    floor = ((score - noise.GUMBEL_MAX) * temperature).masked_fill(greedy, torch.inf)  # [samples], as raw logits
    block = (maxima >= floor.unsqueeze(1)).flatten().nonzero().squeeze(1)  # [kept blocks], over all samples
    row = block // maxima.shape[1]  # [kept blocks]
    maximum = maxima.flatten()[block] / temperature[row]
    needed = noise.grid_floor(score[row] - maximum)  # [kept blocks] noise without which no token of the block wins
    groups = blocks.flatten(0, 1).index_select(0, block).view(-1, noise.LANES)  # [groups of kept blocks, lanes]
    floors = floor[row].repeat_interleave(1 << _GROUP_BITS)
    group = (groups.amax(-1) >= floors).nonzero().squeeze(1)  # [kept groups]
    kept = group >> _GROUP_BITS  # [kept groups], index into the kept blocks
    first = ((block - row * maxima.shape[1]) * _BLOCK)[kept] + (group * noise.LANES & (_BLOCK - 1))  # id of lane 0
    row = row[kept]  # [kept groups]
    index = noise.grid_runs(seed[row], position[row], first, noise.LANES, stream)  # [kept groups, lanes]
    able = (index.amax(-1) >= needed[kept]).nonzero().squeeze(1)  # [able groups], mostly very few
    row, first = row[able], first[able]
    values = groups[group[able]] / temperature[row].unsqueeze(1)  # [able groups, lanes]
    return _best_token(values.add_(noise.grid_gumbel(index[able])), row, first, best)


def _opening_score(
    blocks: Tensor, maxima: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, stream: int
) -> Tensor:
    """The highest score among a few of each row's most likely tokens: a bound below the winner's. -> [samples]."""
    block = maxima.topk(min(_OPENING, maxima.shape[1]), dim=-1).indices  # [samples, opening]
    values, inner = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, _BLOCK)).max(-1)
    gumbel = noise.gumbel(seed.unsqueeze(1), position.unsqueeze(1), block * _BLOCK + inner, stream)
    return (values / temperature.unsqueeze(1)).add_(gumbel).amax(-1)


def _best_token(scores: Tensor, row: Tensor, first: Tensor, fallback: Tensor) -> Tensor:
    """Per row the token of the highest score, the lowest id on ties; `fallback` [samples] for rows without scores.

    scores: [groups, LANES] of the tokens from first[i] on; row, first: [groups], rows ascending.
    """
    best = torch.full_like(fallback, -torch.inf, dtype=torch.float32)
    best.scatter_reduce_(0, row, scores.amax(-1), "amax")
    winner, lane = (scores == best[row].unsqueeze(1)).nonzero(as_tuple=True)  # usually one per row
    token = torch.full_like(fallback, torch.iinfo(torch.int64).max)
    token.scatter_reduce_(0, row[winner], first[winner] + lane, "amin")
    return torch.where(token == torch.iinfo(torch.int64).max, fallback, token)


def filter_thresholds(logits: Tensor, sampling: SamplingBatch) -> Tensor:
    """Top-k, top-p and min-p as one number per sample: tokens with logit / temperature below it are out.

    logits: [samples, vocab] float32, after adjustments -> [samples] float32, -inf for greedy samples.
    """
    scaled = logits / _divisor(sampling.temperature).unsqueeze(1)
    if _prunes(scaled):
        found = _thresholds(scaled, *_top(scaled, min(_CANDIDATES, scaled.shape[1])), sampling)
    else:
        found = _all_thresholds(scaled, sampling)
    return found.masked_fill_(sampling.temperature <= GREEDY_TEMPERATURE, -torch.inf)


def target_probs(support: Support) -> Tensor:
    """Normalised probabilities of the support's columns: [samples, width] float32, 0 at padding."""
    return support.log_weights.softmax(-1)


def argmax(logits: Tensor) -> Tensor:
    """Index of the largest entry per row, the lowest on ties, the first NaN if any: [samples, vocab] -> [samples].

    torch.argmax, except that the one full pass is a plain maximum, which the CPU does ten times faster.
    """
    if (kernels := _kernels(logits)) is not None:
        return kernels.argmax(logits)
    return _argmax_of_blocks(*_block_maxima(logits))


def _kernels(logits: Tensor) -> native.Kernels | None:
    return native.load() if logits.device.type == "cpu" and logits.dtype == torch.float32 else None


def _prunes(logits: Tensor) -> bool:
    """Whether sizes may follow values; elsewhere than on a CPU the host would have to wait for them."""
    return logits.device.type == "cpu"


def _block_maxima(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The rows in blocks [samples, blocks, _BLOCK], padded with -inf, and their maxima [samples, blocks]."""
    missing = -logits.shape[1] % _BLOCK
    if missing:
        logits = F.pad(logits, (0, missing), value=-torch.inf)
    blocks = logits.reshape(len(logits), -1, _BLOCK)
    return blocks, blocks.amax(-1)


def _argmax_of_blocks(blocks: Tensor, maxima: Tensor) -> Tensor:
    block = maxima.argmax(-1)  # [samples], the first of the best
    inner = blocks[torch.arange(len(block), device=block.device), block]  # [samples, _BLOCK]
    return block * _BLOCK + inner.argmax(-1)


def _top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """torch.topk over the vocabulary, descending -> ([samples, count], [samples, count] int64).

    The `count` largest entries lie in the `count` blocks with the largest maxima, so only those are searched.
    """
    blocks, maxima = _block_maxima(logits)
    if count * 2 >= maxima.shape[1]:
        values, ids = logits.topk(count, dim=-1)
        return values, ids
    block = maxima.topk(count, dim=-1, sorted=False).indices  # [samples, count]
    inner = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, _BLOCK)).flatten(1)  # [samples, count * _BLOCK]
    values, index = inner.topk(count, dim=-1)
    return values, block.gather(1, index // _BLOCK) * _BLOCK + index % _BLOCK


def _divisor(temperature: Tensor) -> Tensor:
    return temperature.masked_fill(temperature <= GREEDY_TEMPERATURE, 1.0)


def _thresholds(scaled: Tensor, values: Tensor, ids: Tensor, sampling: SamplingBatch) -> Tensor:
    """The filters as one threshold per sample: tokens with scaled logit >= it are kept. -> [samples] float32.

    scaled: [samples, vocab]; values, ids: its best tokens [samples, _CANDIDATES]. Rows whose filters these do not
    settle are looked at again, wider; what is settled early equals what the whole row would have said.
    """
    # The portable log: a library's may differ between the vector body and the scalar tail of an array.
    cutoff = values[:, 0] + noise.log(sampling.min_p.clamp(min=torch.finfo(torch.float32).tiny))
    threshold = torch.where(sampling.min_p > 0, cutoff, -torch.inf)
    todo = ((sampling.top_k > 0) | (sampling.top_p < 1)).nonzero().squeeze(1)  # rows not settled yet
    part, values, ids = (scaled, values, ids) if len(todo) == len(scaled) else (scaled[todo], values[todo], ids[todo])
    while len(todo):
        settled, found = _nucleus(part, values, ids, sampling.top_k[todo], sampling.top_p[todo])
        threshold[todo[settled]] = torch.maximum(threshold[todo[settled]], found[settled])
        todo, part = todo[~settled], part[~settled]
        if len(todo) and (kernels := _kernels(part)) is not None:  # without sorting: flat rows keep many tokens
            found = kernels.nucleus(part, part.softmax(-1), sampling.top_k[todo], sampling.top_p[todo])
            threshold[todo] = torch.maximum(threshold[todo], found)
            break
        values, ids = _top(part, min(values.shape[1] * 16, part.shape[1])) if len(todo) else (values, ids)
    return threshold


def _all_thresholds(scaled: Tensor, sampling: SamplingBatch) -> Tensor:
    return unpruned.thresholds(scaled, sampling.top_k, sampling.top_p, sampling.min_p)


def _nucleus(scaled: Tensor, values: Tensor, ids: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Top-k, then top-p on what it kept, seen through the best tokens `values`, `ids` [samples, width], descending.

    -> settled [samples] bool, threshold [samples]. A threshold is settled if it is above the worst token seen: then
    no token beyond could tie with it.
    """
    # softmax works row by row, so a probability depends on its row alone; as integers its sums depend on nothing else.
    # NaN has no integer; such rows have no mass and are settled at the full width, whatever they hold.
    mass = (scaled.softmax(-1).gather(1, ids) * unpruned.MASS_SCALE).nan_to_num_(0.0).long()  # [samples, width]
    width = values.shape[1]
    last, whole = values[:, -1], width == scaled.shape[1]
    use_k, use_p = top_k > 0, top_p < 1  # [samples]
    kth = values.gather(1, torch.where(use_k, top_k, 1).clamp(max=width).unsqueeze(1) - 1).squeeze(1)
    k_value = torch.where(use_k, kth, -torch.inf)
    kept = mass.masked_fill(values < k_value.unsqueeze(1), 0).sum(-1)
    total = torch.where(use_k, kept.double(), unpruned.MASS_SCALE)  # [samples]
    below = mass.cumsum(-1) < (total * top_p).unsqueeze(1)  # [samples, width]: top_p is not reached yet
    pth = values.gather(1, below.sum(-1, keepdim=True).clamp(max=width - 1)).squeeze(1)
    p_value = torch.where(use_p, pth, -torch.inf)
    settled = (~use_k | (k_value > last)) & (~use_p | (p_value > last)) | whole
    return settled, torch.maximum(k_value, p_value)


def logprob_table(raw_logits: Tensor, chosen: Tensor, n: int) -> LogprobTable:
    """Log-softmax of raw logits at the chosen tokens and at the n most likely. raw_logits: [positions, vocab] float32.

    chosen: [positions] int64. A token's rank is one more than the number of strictly larger logits.
    """
    logprobs = raw_logits.log_softmax(-1)
    value = logprobs.gather(1, chosen.unsqueeze(1))  # [positions, 1]
    top_ids = _top(raw_logits, min(n, raw_logits.shape[1]))[1] if n else chosen.unsqueeze(1)[:, :0]
    larger = raw_logits > raw_logits.gather(1, chosen.unsqueeze(1))
    return LogprobTable(chosen, value.squeeze(1), larger.sum(-1) + 1, top_ids, logprobs.gather(1, top_ids))
