"""Jobs done by OpenMP's threads, which are PyTorch's: as by the pool's own."""

import ctypes
import os
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import torch
from support import interrupted

from portopt.kernels import compiler, pool

pytest.importorskip("llvmlite", reason="kernels are compiled by llvmlite")
LIBRARY = ctypes.PyDLL(torch._C.__file__)
pytestmark = pytest.mark.skipif(
    not hasattr(LIBRARY, "GOMP_parallel"), reason="this PyTorch has not GNU's OpenMP"
)

COUNT = pool.kernel(
    ["ptr %counts"],
    """\
open:
%count = getelementptr i64, ptr %counts, i64 %share
%before = atomicrmw add ptr %count, i64 1 monotonic
br label %given
""",
)
FIRST = pool.function("first", {}, "store i64 7, ptr %job.said\nret void")


@pytest.fixture(autouse=True)
def openmp(monkeypatch):
    """Six threads of OpenMP's, more than there may be processors; none of ours."""
    monkeypatch.setattr(pool, "_team", None)
    monkeypatch.setattr(pool, "_openmp", None)
    pool.join(LIBRARY)
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    yield
    torch.set_num_threads(before)
    assert pool._team is None


def test_the_functions_are_those_that_the_library_itself_calls(monkeypatch):
    """Of a library that is preloaded, as Intel's often is, before its own."""
    names = "GOMP_parallel", "omp_get_thread_num"

    class Preloaded:
        GOMP_parallel, omp_get_thread_num = LIBRARY.omp_get_max_threads, LIBRARY.omp_in_parallel

    def joined(whole):
        monkeypatch.setattr(pool, "_openmp", None)
        monkeypatch.setattr(pool.ctypes, "PyDLL", lambda name: whole)
        pool.join(library)
        return pool._openmp and [*pool._openmp]

    def addresses(library):
        return [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in names]

    library, nothing = LIBRARY, object()
    assert joined(Preloaded) == addresses(Preloaded) != addresses(LIBRARY)
    assert joined(nothing) == addresses(LIBRARY)
    library = nothing
    assert joined(nothing) is None


def job(shares, **more):
    counts = np.zeros(max(shares, 1), np.int64)
    kernel, first = compiler.compiled(COUNT + FIRST, "kernel", "first")
    return pool.Job(kernel, shares, [counts.ctypes.data], first=first, **more), counts


@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.parametrize("helpers", [0, 1, 20])
@pytest.mark.parametrize("shares", [1, 2, 1000])
def test_every_share_is_done_once(shares, helpers, locked):
    mine, counts = job(shares)
    for done in range(1, 20):
        assert mine.do(helpers, locked=locked) == 7
        assert counts.tolist() == [done] * shares


@pytest.mark.parametrize("before", [True, False])
def test_an_interrupt_around_a_job(before, monkeypatch):
    """All is done once, whatever the caller then does."""
    runs = interrupted(monkeypatch, KeyboardInterrupt(), before)
    mine, counts = job(100)
    with pytest.raises(KeyboardInterrupt):
        mine.do(2)
    assert len(runs) == 2
    assert counts.tolist() == [1] * 100


def test_threads_of_the_caller_do_the_same_job_at_once():
    mine, counts = job(10)

    def work():
        for _ in range(500):
            mine.do(2)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts.tolist() == [2000] * 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_has_threads_of_ours():
    """OpenMP would wait there for threads that are the parent's."""
    code = """
        import os, warnings, torch, portopt_torch
        from portopt.kernels import pool
        warnings.simplefilter("ignore")
        torch.set_num_threads(2)
        param = torch.nn.Parameter(torch.zeros(300_000))
        param.grad = torch.ones_like(param)
        optimizer = portopt_torch.SGD([param], lr=1.0)
        optimizer.step()
        assert pool._openmp and pool._team is None
        child = os.fork()
        optimizer.step()
        assert bool(pool._openmp) == bool(child) and (pool._team is None) == bool(child)
        assert param.numpy(force=True).max() == -2.0 == param.numpy(force=True).min()
        if not child:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print("done")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
