"""The plan: every element once, equal shares, whole tensors where they must be."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portopt.sharding import divide
from portopt.sharding.plan import CHUNK

SIZES = st.one_of(st.integers(0, 40), st.integers(0, 3 * CHUNK))


@st.composite
def plans(draw):
    """A plan, the places of its whole tensors, and what its cuts are aligned to."""
    sizes = draw(st.lists(SIZES, max_size=8))
    widths = draw(st.lists(st.sampled_from((2, 4, 8)), min_size=len(sizes), max_size=len(sizes)))
    whole = [place for place in range(len(sizes)) if draw(st.booleans())]
    align = draw(st.sampled_from((1, 16, 100)))
    plan = divide(sizes, draw(st.integers(1, 9)), whole=whole, widths=widths, align=align)
    return plan, whole, align


@given(plans())
def test_every_element_belongs_to_one_rank(made):
    plan, whole, align = made
    for tensor, size in enumerate(plan.sizes):
        spans = sorted(s for mine in plan.spans for s in mine if s.tensor == tensor)
        edges = [span.start for span in spans] + [size]
        assert all(span.length > 0 for span in spans) if size else spans == [(tensor, 0, 0)]
        assert size or spans[0] in plan.spans[0]
        assert edges[0] == 0 and [span.stop for span in spans] == edges[1:]
        assert all(edge % align == 0 for edge in edges[:-1])
        assert tensor not in whole or len(spans) <= 1
    for mine in plan.spans:
        assert len({span.tensor for span in mine}) == len(mine), "two spans of a tensor"
        assert list(mine) == sorted(mine)


@given(plans())
def test_shares_are_equal(made):
    plan, whole, align = made
    slack = align * max(plan.widths, default=1)
    fixed = [
        sum(s.length * plan.widths[s.tensor] for s in mine if s.tensor in whole)
        for mine in plan.spans
    ]
    largest = max((plan.sizes[place] * plan.widths[place] for place in whole), default=0)
    assert max(fixed) - min(fixed) <= largest  # the largest first: the last one made the difference
    # The others fill up the rest, as water would: where a rank has any of them, none has less.
    surface = min(plan.shares)
    for share, own in zip(plan.shares, fixed, strict=True):
        assert own == share or share <= surface + 2 * slack
    if not whole:
        assert all(abs(share - sum(plan.shares) / plan.ranks) <= slack for share in plan.shares)


@given(plans())
def test_chunks_and_their_ends(made):
    """Chunks are every element once too; what a rank lacks of its own, others have as heads."""
    plan, *_ = made
    chunks = [chunk for rank in range(plan.ranks) for chunk in plan.chunks(rank)]
    assert sorted(chunks) == [
        (tensor, start, min(CHUNK, size - start))
        for tensor, size in enumerate(plan.sizes)
        for start in range(0, size, CHUNK)
    ]
    for rank, mine in enumerate(plan.spans):
        known = [*mine, *chain(*(plan.heads(r) for r in range(plan.ranks) if r != rank))]
        for chunk in plan.chunks(rank):
            parts = [
                range(max(s.start, chunk.start), min(s.stop, chunk.stop))
                for s in known
                if s.tensor == chunk.tensor
            ]
            assert sum(map(len, parts)) == chunk.length


@pytest.mark.parametrize(
    ("sizes", "ranks", "shares"),
    [
        ([], 3, (0, 0, 0)),
        ([0, 0], 2, (0, 0)),
        ([5], 4, (0, 5, 0, 0)),  # no piece of less than 16
        ([64, 1, 63], 1, (128,)),
        ([4096] * 300, 4, (307_200,) * 4),
        ([50257 * 768, 768 * 768], 3, (13_062_400,) * 3),
    ],
    ids=str,
)
def test_examples(sizes, ranks, shares):
    assert divide(sizes, ranks).shares == pytest.approx(shares, abs=16)
    assert sum(divide(sizes, ranks).shares) == sum(sizes)


def test_whole_tensors_go_first_and_the_others_fill_up():
    plan = divide([1000, 600, 400, 2000], 3, whole=[0, 1, 2])
    assert [[span[:2] for span in mine if span.tensor != 3] for mine in plan.spans] == [
        [(0, 0)],
        [(1, 0)],
        [(2, 0)],
    ]
    assert plan.shares == pytest.approx((1333, 1333, 1333), abs=16)


def test_the_printed_plan():
    plan = divide([100_000, 8, 0, 70_000, 3, 3], 3, whole=[3])
    assert str(plan).splitlines() == [
        "rank      elements  share  spans",
        "   0        70,000  1.235  2, 3",
        "   1        50,000  0.882  0[0:50000]",
        "   2        50,014  0.883  0[50000:100000], 1, 4, 5",
    ]
    assert str(divide([1] * 9, 1)).endswith("0, 1, 2, 3, and 5 more")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ranks": 0}, "ranks must be at least 1, got 0"),
        ({"align": 0}, "align must be at least 1, got 0"),
        ({"sizes": [3, -1]}, r"sizes\[1\] must be at least 0, got -1"),
        ({"whole": [2]}, r"whole must have places in \[0, 2\), got 2"),
        ({"widths": [4]}, r"widths must be 2 numbers of at least 1, got \(4,\)"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        divide(**{"sizes": [3, 4], "ranks": 2, **arguments})


def gpt(vocabulary, width, layers):
    """The tensors of a model shaped like GPT-2."""
    block = (width, width, 3 * width * width, 3 * width, width * width, width)
    block += (width, width, 4 * width * width, 4 * width, 4 * width * width, width)
    return [vocabulary * width, 1024 * width, *block * layers, width, width]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(
    "sizes",
    [gpt(50257, 768, 12), [64 * 64] * 300, [50257 * 256, *[256 * 256] * 49]],
    ids=["GPT-2", "300 small ones", "80 % in one"],
)
def test_the_largest_share(sizes, ranks):
    plan = divide(sizes, ranks)
    assert max(plan.shares) <= 1.001 * sum(sizes) / ranks
