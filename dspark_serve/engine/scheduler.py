"""Requests in, plans out, results back in: which tokens of which request run in the next step, and on which pages.

Host side only. Must not know: torch, text, how drafts are made or judged.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Sequence

from dspark_serve.cache.pages import PagePool, extend_page_keys
from dspark_serve.reports import EngineStats, RowReport, StepReport, TokenDelta
from dspark_serve.types import EngineBusy, FinishReason, InvalidRequest, Plan, Request, Row, RowResult


def _order(request: Request) -> tuple[int, int]:
    return request.priority, request.arrival


class Scheduler:
    """First come, first served within a priority; running requests before waiting ones; prefill in chunks.

    When pages run out, the last request in that order gives up its pages and is computed again later: recomputation
    is bitwise the same, so no token changes.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_queue: int,
        vocab_size: int,
        draft_width: int = 0,
        max_prefill_chunk: int | None = None,
    ) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.max_queue = max_queue
        self.vocab_size = vocab_size
        self.draft_width = draft_width
        self.max_prefill_chunk = max_prefill_chunk or max_num_batched_tokens
        self.waiting: list[Request] = []  # sorted by _order
        self.running: list[Request] = []  # sorted by _order
        self._by_id: dict[str, Request] = {}
        self._arrivals = 0
        self._prefix_queries = self._prefix_hits = self._preemptions = 0

    # ---- requests in and out

    def add(self, request: Request) -> None:
        """Queue a request. InvalidRequest if it can never be served, EngineBusy if the queue is full."""
        if request.request_id in self._by_id:
            raise InvalidRequest(f"request id {request.request_id!r} is in use", "request_id", "duplicate_request_id")
        if len(self.waiting) >= self.max_queue:
            raise EngineBusy(f"the queue is full ({self.max_queue} requests wait); try again later")
        self._check_fits(request)
        request.token_ids = list(request.prompt_token_ids)
        request.arrival, self._arrivals = self._arrivals, self._arrivals + 1
        request.arrival_time_s = time.monotonic()
        self._by_id[request.request_id] = request
        bisect.insort(self.waiting, request, key=_order)

    def _check_fits(self, request: Request) -> None:
        prompt = request.prompt_token_ids
        if not prompt:
            raise InvalidRequest("the prompt is empty: send at least one token", "prompt", "invalid_value")
        if not all(0 <= token < self.vocab_size for token in prompt):
            bad = next(token for token in prompt if not 0 <= token < self.vocab_size)
            raise InvalidRequest(
                f"token id {bad} is outside the vocabulary of {self.vocab_size}", "prompt", "invalid_value"
            )
        params = request.params
        named = [*(token for token, _ in params.logit_bias), *params.stop_token_ids]
        if any(not 0 <= token < self.vocab_size for token in named):
            raise InvalidRequest(
                f"logit_bias and stop_token_ids must name tokens below {self.vocab_size}", "logit_bias", "invalid_value"
            )
        pool_tokens = self.pool.num_usable * self.pool.page_size
        limit = min(self.max_model_len, pool_tokens)
        # The last token's K/V is never needed, but one token of room is not worth a special case.
        request.max_new_tokens = limit - len(prompt) if params.max_tokens is None else params.max_tokens
        if request.max_new_tokens < 1 or len(prompt) + request.max_new_tokens > limit:
            wanted = "an answer" if params.max_tokens is None else f"max_tokens {params.max_tokens}"
            what = "this model's maximum length" if limit == self.max_model_len else "the server's K/V pool"
            raise InvalidRequest(
                f"{len(prompt)} prompt tokens and {wanted} do not fit {what} of {limit} tokens; "
                "shorten the prompt or lower max_tokens",
                "prompt" if params.max_tokens is None else "max_tokens",
                "context_length_exceeded",
            )

    def cancel(self, request_id: str) -> bool:
        """Forget a request and give its pages back; False if it is not here (finished, or never was)."""
        request = self._by_id.get(request_id)
        if request is None:
            return False
        self._finish(request, "abort")
        return True

    def _finish(self, request: Request, reason: FinishReason) -> None:
        del self._by_id[request.request_id]
        (self.running if request.status == "running" else self.waiting).remove(request)
        request.status, request.finish_reason = "finished", reason
        self.pool.release(request.pages)

    @property
    def has_work(self) -> bool:
        return bool(self._by_id)

    # ---- the plan

    def plan(self, quiet: Callable[[Sequence[Row]], bool] | None = None) -> Plan:
        """Rows of the next step in arrival order, pages allocated for every token and draft they may hold.

        quiet: whether nothing would be drafted for these rows anyway; then they hold no drafts."""
        rows, preempted = self._plan_running()
        budget = self.max_num_batched_tokens - sum(row.length for row in rows)
        new = [] if preempted else self._admit(budget)
        rows = sorted([*rows, *new], key=lambda row: _order(row.request))
        admitted = [row.request.request_id for row in new if not row.request.num_preemptions]
        bare = tuple(rows)
        without = not self.draft_width or (quiet is not None and quiet(bare))
        planned = bare if without else self._reserve_drafts(rows)
        return Plan(planned, preempted, tuple(admitted), bare)

    def _plan_running(self) -> tuple[list[Row], int]:
        rows: list[Row] = []
        preempted = 0
        budget = self.max_num_batched_tokens
        decoding = sum(
            len(r.token_ids) - r.num_computed == 1 for r in self.running
        )  # a long prefill must not stall them
        for request in list(self.running):
            if request.status != "running":
                break  # preempted for an earlier one: so is everything after it
            unseen = len(request.token_ids) - request.num_computed
            length = 1 if unseen == 1 else min(unseen, budget - decoding, self.max_prefill_chunk)
            decoding -= unseen == 1
            if length <= 0:
                continue
            while not self.pool.grow(request.pages, request.num_computed + length):
                preempted += 1
                if self._preempt_last() is request:
                    break
            if request.status != "running":
                break
            rows.append(self._row(request, length))
            budget -= length
        return rows, preempted

    def _preempt_last(self) -> Request:
        victim = self.running.pop()
        self.pool.release(victim.pages)
        victim.status, victim.num_computed = "waiting", 0
        victim.num_preemptions += 1
        self._preemptions += 1
        bisect.insort(self.waiting, victim, key=_order)
        return victim

    def _admit(self, budget: int) -> list[Row]:
        rows: list[Row] = []
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            num_known = len(request.token_ids)
            cached: list[int] = []
            if request.params.prompt_logprobs is None:  # scoring the prompt needs its logits, so nothing is skipped
                extend_page_keys(request.page_keys, request.token_ids, self.pool.page_size)
                cached = self.pool.match(request.page_keys[: (num_known - 1) // self.pool.page_size])
            room = self.pool.num_available - self.pool.num_idle(cached)
            if self.pool.pages_for(num_known) - len(cached) > room:
                break  # first come, first served: nothing overtakes the request that waits for room
            self.waiting.pop(0)
            self.pool.hold(request.pages, cached)
            request.num_computed = len(cached) * self.pool.page_size
            if not request.num_preemptions:
                request.num_cached = request.num_computed
                self._prefix_queries += num_known
                self._prefix_hits += request.num_computed
            length = min(num_known - request.num_computed, budget, self.max_prefill_chunk)
            if not self.pool.grow(request.pages, request.num_computed + length):
                raise AssertionError("pages were counted and must be there")
            request.status = "running"
            bisect.insort(self.running, request, key=_order)
            rows.append(self._row(request, length))
            budget -= length
        return rows

    def _row(self, request: Request, length: int) -> Row:
        samples = request.num_computed + length == len(request.token_ids)
        return Row(request, request.num_computed, length, samples)

    def _reserve_drafts(self, rows: list[Row]) -> tuple[Row, ...]:
        """Let pure decode rows carry drafts in the tokens and pages that are left; never at another row's cost."""
        budget = self.max_num_batched_tokens - sum([row.length for row in rows])
        planned: list[Row] = []
        for row in rows:
            request, start, length, samples, _, _ = row
            if samples and length == 1:
                drafts = min(self._wanted_drafts(request, request.num_generated), budget)
                if drafts > 0 and start + 1 + drafts > len(request.pages) * self.pool.page_size:
                    slots = (len(request.pages) + self.pool.num_available) * self.pool.page_size
                    drafts = min(drafts, slots - start - 1)
                    self.pool.grow(request.pages, start + 1 + drafts)
                if drafts > 0:
                    budget -= drafts
                    row = Row(request, start, 1, True, drafts)
            planned.append(row)
        return tuple(planned)

    def _wanted_drafts(self, request: Request, num_generated: int) -> int:
        """As many as there may be after so many tokens, with room for all; negative when nothing is left to do."""
        control = request.speculation
        if not control.enabled:
            return 0
        limit = min(self.draft_width, request.max_new_tokens - num_generated - 1)
        return limit if control.max_draft_tokens is None else min(limit, control.max_draft_tokens)

    def next_drafts(self, request: Request) -> int:
        """Most drafts that the request may carry after the step it is in, of which one token comes at least."""
        return max(0, self._wanted_drafts(request, request.num_generated + 1))

    # ---- the results

    def commit(self, plan: Plan, results: Sequence[RowResult]) -> StepReport:
        """Append what verification decided, end what is finished, share full pages; one delta per row with news."""
        deltas: list[TokenDelta] = []
        reports: list[RowReport] = []
        for row, result in zip(plan.rows, results, strict=True):
            request = row.request
            report = None
            if row.samples:
                report = RowReport(result.n_draft, result.n_kept, len(result.tokens) - 1, result.drafter)
                request.stats.record(report.n_draft, report.n_kept, report.n_accepted, report.drafter)
                reports.append(report)
            delta = self._commit_row(row, result, report)
            if delta is not None:
                deltas.append(delta)
        lengths = sum(row.length for row in plan.rows)
        decode = sum(row.length == 1 and row.samples for row in plan.rows)
        return StepReport(
            deltas=tuple(deltas),
            rows=tuple(reports),
            num_tokens=lengths + sum(report.n_kept for report in reports),
            num_prefill_tokens=lengths - decode,
            num_preempted=plan.num_preempted,
            admitted=plan.admitted,
        )

    def _commit_row(self, row: Row, result: RowResult, report: RowReport | None) -> TokenDelta | None:
        request = row.request
        tokens, reason, stop_token = self._until_stop(request, result.tokens)
        request.token_ids.extend(tokens)
        # K/V is right for the known tokens and the accepted drafts; the bonus token is the next anchor.
        request.num_computed = row.start + row.length + max(0, len(tokens) - 1)
        self.pool.truncate(request.pages, request.num_computed)
        extend_page_keys(request.page_keys, request.token_ids, self.pool.page_size)
        full = slice(row.start // self.pool.page_size, request.num_computed // self.pool.page_size)
        self.pool.publish(request.pages[full], request.page_keys[full])
        if result.prompt_logprobs is not None:
            request.num_scored += len(result.prompt_logprobs)
        if reason is not None:
            self._finish(request, reason)
        if not tokens and result.prompt_logprobs is None:
            return None
        return TokenDelta(
            request.request_id,
            tokens,
            finish_reason=reason,
            stop_token_id=stop_token,
            logprobs=None if result.logprobs is None else result.logprobs[: len(tokens)],
            prompt_logprobs=result.prompt_logprobs,
            num_cached=request.num_cached,
            stats=request.stats if reason is not None else None,
            row=report,
        )

    @staticmethod
    def _until_stop(
        request: Request, tokens: tuple[int, ...]
    ) -> tuple[tuple[int, ...], FinishReason | None, int | None]:
        """The tokens up to and including the first that ends the request, why it ends, and the stop token."""
        params = request.params
        for index, token in enumerate(tokens):
            generated = request.num_generated + index + 1
            is_eos = not params.ignore_eos and token in request.eos_token_ids
            if generated > params.min_tokens and (is_eos or token in params.stop_token_ids):
                return tokens[: index + 1], "stop", token
            if generated >= request.max_new_tokens:
                return tokens[: index + 1], "length", None
        return tokens, None, None

    # ---- looking in

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            pages_total=self.pool.num_usable,
            pages_used=self.pool.num_usable - self.pool.num_available,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
            num_preemptions=self._preemptions,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless queues, requests and pages agree."""
        everyone = [*self.waiting, *self.running]
        if sorted(r.request_id for r in everyone) != sorted(self._by_id):
            raise AssertionError("the queues and the index of requests disagree")
        for request in everyone:
            if not 0 <= request.num_computed <= len(request.token_ids):
                raise AssertionError(
                    f"{request.request_id}: {request.num_computed} of {len(request.token_ids)} computed"
                )
            if request.status == "waiting" and (request.pages or request.num_computed):
                raise AssertionError(f"{request.request_id} waits but holds pages")
            if len(request.pages) < self.pool.pages_for(request.num_computed):
                raise AssertionError(f"{request.request_id} lacks pages for {request.num_computed} computed tokens")
        self.pool.check_integrity(request.pages for request in everyone)
