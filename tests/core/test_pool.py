"""Jobs: every share is done once, whoever comes late, and nothing is used after its time."""

from __future__ import annotations

import gc
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from portopt.kernels import compiler, pool

pytest.importorskip("llvmlite")

COUNT = pool.kernel(
    ["ptr %counts", "i64 %rounds"],
    """\
open:
br label %work
work:
%i = phi i64 [0, %open], [%i.next, %work]
%i.next = add i64 %i, 1
%count = getelementptr i64, ptr %counts, i64 %share
%before = atomicrmw add ptr %count, i64 1 monotonic
%more = icmp ult i64 %i.next, %rounds
br i1 %more, label %work, label %given
""",
)
"""A kernel that counts for each share how often it is done."""
FIRST = pool.function(
    "first",
    {0: "ptr %counts"},
    """\
store i64 7, ptr %job.said
%before = atomicrmw add ptr %counts, i64 1000 monotonic
ret void""",
)


@pytest.fixture(autouse=True)
def eight(monkeypatch):
    """More threads than processors, so that some come late."""
    monkeypatch.setattr(pool.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(pool, "_team", None)
    monkeypatch.setattr(pool, "_openmp", None)


def job(shares, rounds=1, **more):
    counts = np.zeros(max(shares, 1), np.int64)
    (kernel,) = compiler.compiled(COUNT, "kernel")
    return pool.Job(kernel, shares, [counts.ctypes.data, rounds], **more), counts


@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.parametrize("linger", [0, 100, pool.LINGER])
@pytest.mark.parametrize("helpers", [0, 1, 7, 20])
@pytest.mark.parametrize("shares", [0, 1, 2, 100])
def test_every_share_is_done_once(shares, helpers, linger, locked):
    mine, counts = job(shares, rounds=3, linger=linger)
    for done in range(1, 20):
        assert mine.do(helpers, locked=locked) == 0
        assert counts[:shares].tolist() == [3 * done] * shares
    assert (pool._team.count if pool._team else 0) == min(helpers, 8)


def test_what_the_caller_does_first():
    kernel, first = compiler.compiled(COUNT + FIRST, "kernel", "first")
    counts = np.zeros(9, np.int64)
    mine = pool.Job(kernel, 9, [counts.ctypes.data, 1], first=first)
    for done in range(1, 5):
        assert mine.do(2) == 7
        assert counts.tolist() == [1001 * done, *[done] * 8]


def test_threads_of_the_caller_do_jobs_at_once():
    def work(seed):
        mine, counts = job(1 + seed, rounds=100, linger=seed)
        for _ in range(1000):
            mine.do(seed % 4)
        return counts.tolist() == [100_000] * (1 + seed)

    with ThreadPoolExecutor(6) as callers:
        assert all(callers.map(work, range(6)))


def test_threads_of_the_caller_do_the_same_job_at_once():
    mine, counts = job(10, rounds=100)

    def work(_):
        for _ in range(1000):
            mine.do(2)

    with ThreadPoolExecutor(4) as callers:
        list(callers.map(work, range(4)))
    assert counts.tolist() == [400_000] * 10


def test_memory_is_used_again_when_all_have_left():
    """Jobs that come and go, late threads among them, need little memory, and never share it."""
    pool._unused.clear()
    for _ in range(2000):
        ours = [job(3), job(5, linger=50)]
        for mine, counts in ours:
            mine.do(7)
            assert counts.tolist() == [1] * len(counts)
    del ours, mine
    gc.collect()
    assert len(pool._unused) < 200

    def all_have_left():
        return all(words[pool._TOLD] == words[pool._LEFT] for words in pool._unused)

    deadline = time.monotonic() + 30  # a busy machine may let a thread wait
    while not all_have_left() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all_have_left()
