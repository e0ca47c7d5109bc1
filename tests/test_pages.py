"""The page pool, segments, views and the prefix cache."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.runtime.pages import Entry, PagePool, Segment, View


def test_a_segment_grows_in_one_run_beside_a_sibling() -> None:
    """Two segments that grow in turn each stay a slice while the pool has room for both."""
    pool = PagePool(16, 4)
    one, two = Segment(pool, 0, expect=4), Segment(pool, 0, expect=4)
    for _ in range(16):
        one.append([1])
        two.append([2])
    assert list(one.runs()) == [(0, 16)]
    assert list(two.runs()) == [(16, 32)]


def test_pages_kept_for_growth_are_given_up_when_nothing_else_is_left() -> None:
    """A run looked out for one segment is used by others before the pool is said to be full."""
    pool = PagePool(4, 1)
    one = Segment(pool, 0, expect=4)
    one.append([1])
    two = Segment(pool, 0)
    two.append([1, 2, 3])
    assert pool.num_free == 0
    with pytest.raises(RuntimeError, match="all 4 pages"):
        pool.allocate()


def test_trim_gives_whole_pages_back() -> None:
    """Trimming keeps the page that the last token stands in."""
    pool = PagePool(8, 4)
    segment = Segment(pool, 10)
    segment.append(range(10))
    segment.trim(5)
    assert (segment.length, len(segment.pages), segment.ids) == (5, 2, [0, 1, 2, 3, 4])
    assert pool.used == 2


def test_sealed_segments_refuse_writes() -> None:
    """Nothing is appended to or trimmed from a segment that others may see."""
    segment = Segment(PagePool(2, 4), 0)
    segment.append([1])
    segment.seal()
    with pytest.raises(RuntimeError, match="sealed"):
        segment.append([2])
    with pytest.raises(RuntimeError, match="sealed"):
        segment.trim(0)


def test_freeing_twice_is_seen() -> None:
    """A page or a view let go of once too often is an error, not a shared page later."""
    pool = PagePool(2, 4)
    page = pool.allocate()
    pool.release([page])
    with pytest.raises(RuntimeError, match="freed twice"):
        pool.release([page])
    view = View(None, [])
    view.drop()
    with pytest.raises(RuntimeError, match="dropped twice"):
        view.drop()


def test_a_view_holds_its_parents() -> None:
    """A child's view keeps the parent's segments until the last child is gone."""
    pool = PagePool(8, 4)
    trunk = Segment(pool, 0)
    trunk.append(range(6))
    trunk.seal()
    root = View(None, [Entry(trunk)])
    trunk.drop()
    left, right = View(root, []), View(root, [])
    root.drop()
    left.drop()
    assert pool.used == 2
    right.drop()
    assert pool.used == 0


def test_a_chain_begins_at_the_root() -> None:
    """The links of a view come in the order in which they were made."""
    root = View(None, [])
    middle = View(root, [])
    assert View(middle, []).chain()[:2] == [root, middle]


def test_gained_entries_stop_at_the_base() -> None:
    """What a branch gained is what stands between its fork and its end, in order."""
    pool = PagePool(8, 4)
    segments = [Segment(pool, i) for i in range(3)]
    for segment in segments:
        segment.append([1])
    base = View(None, [Entry(segments[0])])
    top = View(View(base, [Entry(segments[1], 5)]), [Entry(segments[2])])
    assert [(e.segment, e.shift) for e in top.gained_since(base)] == [(segments[1], 5), (segments[2], 0)]
    assert top.gained_since(top) == []


def test_cache_gives_whole_pages_and_lets_go_when_room_is_short() -> None:
    """Equal prefixes share pages; pages that the cache alone holds are not in use, and are reused when needed."""
    pool = PagePool(4, 4)
    first = Segment(pool, 0)
    first.append(range(10))
    pool.cache.insert(first.ids, first.pages)
    assert pool.cache.match([0, 1, 2, 3, 9, 9, 9, 9]) == first.pages[:1]
    pool.release(first.pages[:1])
    first.drop()
    assert pool.used - pool.idle == 0
    assert pool.cache.match(range(8)) != []
    pool.release(pool.cache.match(range(8)))
    pool.release(pool.cache.match(range(0)))
    other = Segment(pool, 0)
    with pytest.raises(RuntimeError, match="all 4 pages"):
        other.append(range(100, 116))
    pool.cache.clear()
    assert pool.cache.match(range(8)) == []


def test_what_was_used_last_is_kept_longest() -> None:
    """A match makes a prefix young again, so that another goes first when room is short."""
    pool = PagePool(3, 1)
    for token in (1, 2):
        segment = Segment(pool, 0)
        segment.append([token])
        pool.cache.insert(segment.ids, segment.pages)
        segment.drop()
    pool.release(pool.cache.match([1]))
    Segment(pool, 0).append([7, 8])
    assert pool.cache.match([2]) == []
    assert len(pool.cache.match([1])) == 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=60))
def test_no_page_has_two_owners(steps: list[tuple[int, int]]) -> None:
    """However segments grow, are trimmed and dropped, their pages are disjoint and the counts add up."""
    pool = PagePool(24, 4)
    live: list[Segment] = []
    for action, size in steps:
        if action == 0 or not live:
            live.append(Segment(pool, 0, expect=size))
        elif action == 1 and pool.num_free * 4 >= size:
            live[size % len(live)].append(range(size))
        elif action == 2:
            segment = live[size % len(live)]
            segment.trim(segment.length // 2)
        elif action == 3:
            live.pop(size % len(live)).drop()
        pages = [page for segment in live for page in segment.pages]
        assert len(pages) == len(set(pages)) == pool.used
        for segment in live:
            assert sum(b - a for a, b in segment.runs()) == segment.length
