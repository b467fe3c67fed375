"""Blocks are counted by holders, found by what is in them, and lost in the order of their last use."""

from __future__ import annotations

import pytest

from steering.runtime.blocks import Blocks, chain


def test_a_name_covers_all_before_it_and_what_steered_it() -> None:
    names = chain(range(8), 4, [b"", b""])
    assert chain(range(12), 4, [b"", b"", b""])[:2] == names
    assert chain(range(8), 4, [b"", b"x"])[0] == names[0]
    others = [
        chain(range(8), 4, [b"", b"x"]),
        chain(range(8), 4, [b"x", b""]),
        chain([9, *range(1, 8)], 4, [b"", b""]),
        chain(range(8), 4, [b"", b""], b"salt"),
        names,
    ]
    assert len({other[1] for other in others}) == len(others)


def test_a_named_block_is_found_until_its_place_is_needed_the_oldest_first() -> None:
    blocks: Blocks[str] = Blocks(3, 4)
    a, b, c = (blocks.take() for _ in range(3))
    assert sorted((a, b, c)) == [1, 2, 3]
    blocks.name(a, b"a", "measured")
    blocks.name(b, b"b", None)
    blocks.hold(a)
    assert not blocks.release(a)
    for block in (b, a, c):
        assert blocks.release(block)
    assert (blocks.available, len(blocks)) == (3, 3)
    assert blocks.take() == c  # it has no name: nothing is lost
    assert blocks.find(b"a") == a
    assert blocks.record(a) == "measured"
    assert blocks.take() == b
    assert blocks.find(b"b") is None
    blocks.hold(a)
    with pytest.raises(IndexError):
        blocks.take()
    blocks.release(a)
    assert blocks.take() == a
    assert blocks.find(b"a") is None
    assert blocks.record(a) is None


def test_of_two_blocks_with_one_content_the_first_keeps_the_name() -> None:
    blocks: Blocks[None] = Blocks(2, 4)
    a, b = blocks.take(), blocks.take()
    blocks.name(a, b"x", None)
    blocks.name(b, b"x", None)
    assert blocks.find(b"x") == a
    blocks.release(b)
    blocks.forget(b)
    assert blocks.find(b"x") == a
    blocks.release(a)
    assert blocks.available == 2
    blocks.forget(a)
    assert blocks.find(b"x") is None
    assert blocks.available == 2


def test_positions_fill_blocks() -> None:
    assert [Blocks[None](1, 4).needed(n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
