"""The page allocator as a state machine: whatever requests do, every page is in exactly one place."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from dspark_serve.cache.pages import PagePool, extend_page_keys

PAGE = 4


class PoolMachine(RuleBasedStateMachine):
    """Requests over a two-token alphabet, so prefixes collide often; a model of page contents checks every hit."""

    tables = Bundle("tables")

    def __init__(self):
        super().__init__()
        self.pool = PagePool(9, PAGE)
        self.live = {}
        self.content = {}  # page -> the prefix its K/V was computed for
        self.count = 0

    @rule(target=tables, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=22))
    def admit(self, tokens):
        self.count += 1
        table, keys = [], []
        extend_page_keys(keys, tokens, PAGE)
        pages = self.pool.match(keys[: (len(tokens) - 1) // PAGE])
        for index, page in enumerate(pages):
            assert self.content[page] == tuple(tokens[: (index + 1) * PAGE]), "a hit must hold this very prefix"
        idle = self.pool.num_idle(pages)
        available = self.pool.num_available
        self.pool.hold(table, pages)
        assert self.pool.num_available == available - idle
        if not self.pool.grow(table, len(tokens)):
            assert self.pool.pages_for(len(tokens)) - len(pages) > self.pool.num_available
            self.pool.release(table)
            return self.count
        for index in range(len(pages), len(table)):
            self.content[table[index]] = tuple(tokens[: (index + 1) * PAGE])
        full = slice(len(pages), len(tokens) // PAGE)
        self.pool.publish(table[full], keys[full])
        self.live[self.count] = table
        return self.count

    @rule(which=tables, extra=st.integers(0, 9), keep=st.integers(0, 9))
    def draft_and_reject(self, which, extra, keep):
        table = self.live.get(which)
        if table is None:
            return
        committed = len(table) * PAGE
        before = list(table)
        if self.pool.grow(table, committed + extra):
            for page in table[len(before) :]:
                self.content[page] = None
            self.pool.truncate(table, committed + min(keep, extra))
            self.pool.truncate(table, committed)
        assert table == before

    @rule(which=consumes(tables))
    def finish(self, which):
        table = self.live.pop(which, None)
        if table is not None:
            self.pool.release(table)

    @invariant()
    def every_page_is_somewhere(self):
        self.pool.check_integrity(self.live.values())


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


def keys_of(tokens):
    keys = []
    extend_page_keys(keys, tokens, PAGE)
    return keys


def test_keys_depend_on_the_whole_prefix_and_grow_incrementally():
    a, b = keys_of([1, 2, 3, 4, 5, 6, 7, 8]), keys_of([9, 2, 3, 4, 5, 6, 7, 8])
    assert a[0] != b[0]
    assert a[1] != b[1]
    grown = keys_of([1, 2, 3, 4, 5])
    extend_page_keys(grown, [1, 2, 3, 4, 5, 6, 7, 8], PAGE)
    assert grown == a


def test_shared_pages_survive_one_owner_and_come_back_from_idle():
    pool = PagePool(6, PAGE)
    tokens = list(range(8))
    first, second = [], []
    assert pool.grow(first, 8)
    pool.publish(first, keys_of(tokens))
    pool.hold(second, pool.match(keys_of(tokens)))
    assert second == first
    pool.release(first)
    pool.check_integrity([second])
    pool.release(second)
    assert pool.num_available == 5
    assert len(pool.match(keys_of(tokens))) == 2, "idle pages can still be found"


def test_eviction_takes_the_least_recently_released_and_the_tail_first():
    pool = PagePool(5, PAGE)
    old, new = [], []
    assert pool.grow(old, 8)
    pool.publish(old, keys_of(list(range(8))))
    assert pool.grow(new, 8)
    pool.publish(new, keys_of(list(range(50, 58))))
    pool.release(old)
    pool.release(new)
    table = []
    assert pool.grow(table, 4)
    assert len(pool.match(keys_of(list(range(8))))) == 1, "the tail of the older prefix went first"
    assert len(pool.match(keys_of(list(range(50, 58))))) == 2
    pool.check_integrity([table])


def test_growing_is_all_or_nothing():
    pool = PagePool(4, PAGE)
    table = []
    assert not pool.grow(table, 13)
    assert table == []
    assert pool.grow(table, 12)
    assert not pool.grow(table, 13)
    pool.check_integrity([table])


def test_integrity_check_sees_a_leak_and_a_double_owner():
    pool = PagePool(4, PAGE)
    table = []
    pool.grow(table, 8)
    with pytest.raises(AssertionError, match="differ"):
        pool.check_integrity([])
    with pytest.raises(AssertionError, match="differ"):
        pool.check_integrity([table, table])
    pool._free.pop()
    with pytest.raises(AssertionError, match="lost"):
        pool.check_integrity([table])


def test_no_caching_means_no_hits():
    pool = PagePool(4, PAGE, prefix_caching=False)
    table = []
    pool.grow(table, 4)
    pool.publish(table, keys_of([1, 2, 3, 4]))
    pool.release(table)
    assert pool.match(keys_of([1, 2, 3, 4])) == []
    pool.check_integrity([])
