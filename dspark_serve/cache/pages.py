"""Pages of the K/V pool as integers: who holds which, which are shared by equal prefixes, which are free.

A page table is a plain list of page ids owned by a request. Must not know: tensors, requests, layers.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def extend_page_keys(keys: list[bytes], token_ids: Sequence[int], page_size: int) -> None:
    """Append to `keys` the prefix hash of every full page of token_ids that has none yet.

    Each key covers all tokens from position 0 to the end of its page, so equal keys mean equal prefixes.
    """
    for index in range(len(keys), len(token_ids) // page_size):
        digest = hashlib.blake2b(keys[-1] if keys else b"", digest_size=16)
        digest.update(array("q", token_ids[index * page_size : (index + 1) * page_size]).tobytes())
        keys.append(digest.digest())


class PagePool:
    """Allocator of `num_pages` pages of `page_size` tokens; page 0 is never given out (tables are padded with it).

    A page is free, idle (nobody holds it, but its prefix may be asked for again) or held by `refcount` tables.
    Idle pages are reused least recently released first, the tail of a prefix before its beginning.
    """

    def __init__(self, num_pages: int, page_size: int, prefix_caching: bool = True) -> None:
        if num_pages < 2 or page_size < 1:
            raise ValueError(f"a pool needs 2 pages or more of 1 token or more, not {num_pages} of {page_size}")
        self.page_size = page_size
        self.num_pages = num_pages
        self.prefix_caching = prefix_caching
        self._free = list(range(num_pages - 1, 0, -1))  # a stack, so that recently used memory is used again
        self._refcount = [0] * num_pages
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Pages that can be given out now, idle ones included."""
        return len(self._free) + len(self._idle)

    @property
    def num_usable(self) -> int:
        """Pages that exist for requests."""
        return self.num_pages - 1

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Pages of the longest cached prefix among `keys`, in order. They are not held until `hold`."""
        pages: list[int] = []
        if self.prefix_caching:
            for key in keys:
                page = self._page_of.get(key)
                if page is None:
                    break
                pages.append(page)
        return pages

    def num_idle(self, pages: Iterable[int]) -> int:
        """How many of `pages` nobody holds: holding them takes that many from num_available."""
        return sum(page in self._idle for page in pages)

    def hold(self, table: list[int], pages: Sequence[int]) -> None:
        """Append matched pages to a table, sharing them."""
        for page in pages:
            self._idle.pop(page, None)
            self._refcount[page] += 1
        table.extend(pages)

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Extend the table to cover num_tokens; all or nothing, False when too few pages are available."""
        needed = self.pages_for(num_tokens) - len(table)
        if needed > self.num_available:
            return False
        for _ in range(needed):
            page = self._free.pop() if self._free else self._evict()
            self._refcount[page] = 1
            table.append(page)
        return True

    def truncate(self, table: list[int], num_tokens: int) -> None:
        """Give back the pages beyond those that cover num_tokens."""
        keep = self.pages_for(num_tokens)
        for page in reversed(table[keep:]):
            self._drop(page)
        del table[keep:]

    def release(self, table: list[int]) -> None:
        self.truncate(table, 0)

    def publish(self, pages: Sequence[int], keys: Sequence[bytes]) -> None:
        """Make pages full of committed tokens findable by their keys; a key that is already there stays as it is."""
        if not self.prefix_caching:
            return
        for page, key in zip(pages, keys, strict=True):
            if key not in self._page_of and page not in self._key_of:
                self._page_of[key] = page
                self._key_of[page] = key

    def _drop(self, page: int) -> None:
        self._refcount[page] -= 1
        if self._refcount[page]:
            return
        if page in self._key_of:
            self._idle[page] = None
        else:
            self._free.append(page)

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the tables of all live requests explain every page exactly."""
        counts = [0] * self.num_pages
        for table in tables:
            for page in table:
                counts[page] += 1
        if counts != self._refcount:
            wrong = {i: (counts[i], self._refcount[i]) for i in range(self.num_pages) if counts[i] != self._refcount[i]}
            raise AssertionError(f"page: (held by tables, refcount) differ: {wrong}")
        free, idle = set(self._free), set(self._idle)
        held = {page for page in range(self.num_pages) if counts[page]}
        if 0 in free | idle | held:
            raise AssertionError("page 0 must never be given out")
        if len(free) != len(self._free) or free & idle or (free | idle) & held:
            raise AssertionError("a page is in two places")
        if len(free) + len(idle) + len(held) != self.num_usable:
            raise AssertionError(f"{self.num_usable - len(free) - len(idle) - len(held)} pages are lost")
        if {key: page for page, key in self._key_of.items()} != self._page_of or not idle <= set(self._key_of):
            raise AssertionError("the prefix index disagrees with the pages")
