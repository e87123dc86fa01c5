"""`portopt.Optimizer` by kernels: layouts, threads, forks, interrupts, exits, no llvmlite."""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from bits import assert_bits, dtype_of
from children import child
from support import gradients, interrupted, weights

import portopt.plan
from portopt import Around, Optimizer, trace
from portopt.kernels import compiler, cpu, pool, slow
from portopt.rules import SGD, Adam

pytest.importorskip("llvmlite")
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")
SLOW = "portopt.Optimizer steps without a kernel, slowly: "


@pytest.fixture
def launches(monkeypatch):
    """The operands' dtypes, launch by launch."""
    seen = []

    class Counted(cpu.Step):
        def __init__(self, program, storage, *rest):
            super().__init__(program, storage, *rest)
            self.storage = storage

        def run(self, *args):
            seen.append(self.storage)
            super().run(*args)

    monkeypatch.setattr(cpu, "Step", Counted)
    return seen


@pytest.fixture
def fresh():
    """What is said once has not been said yet."""
    for function in (slow.warn, cpu.refusal):
        function.cache_clear()
    yield
    for function in (slow.warn, cpu.refusal):
        function.cache_clear()


@pytest.fixture
def small_spans(monkeypatch):
    """Even few elements are shared out among four threads."""
    monkeypatch.setattr(cpu, "SPAN", 64)
    monkeypatch.setattr(cpu, "SHARE", 64)
    monkeypatch.setattr(cpu, "ALONE", 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")


# Layouts


def unaligned(array):
    memory = np.empty(array.nbytes + 1, np.uint8)[1:]
    view = memory.view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def swapped(array):
    """The same values, the first two axes in the other order in memory."""
    return np.ascontiguousarray(array.swapaxes(0, 1)).swapaxes(0, 1)


BASE, CUBE = weights((6, 8)), weights((3, 4, 5))
LAYOUTS = {
    # functions that make the parameter, and the gradient of one; why no kernel takes them
    "plain": (BASE.copy, np.array, None),
    "0-d": (lambda: np.array(BASE[0, 0]), np.array, None),
    "empty": (BASE[:0].copy, np.array, None),
    "empty, transposed": (lambda: BASE[:0].copy().T, np.array, None),
    "Fortran": (lambda: np.asfortranarray(BASE), np.asfortranarray, None),
    "axes swapped": (lambda: swapped(CUBE), swapped, None),
    "one row of two": (lambda: np.repeat(BASE[:1], 2, 0)[::2], np.array, None),
    "middle of a buffer": (lambda: BASE.copy()[1:3], np.array, None),
    "memory of a subclass": (lambda: BASE.copy().view(np.memmap), np.array, None),
    "other than the gradient": (lambda: swapped(CUBE), np.array, "lies otherwise"),
    "gradient transposed": (BASE.copy, np.asfortranarray, "lies otherwise"),
    "sliced": (lambda: BASE.copy()[:, 1:4], np.array, "has gaps"),
    "every other": (lambda: BASE.flatten()[::2], lambda g: np.repeat(g, 2)[::2], "has gaps"),
    "backwards": (lambda: BASE.flatten()[::-1], np.array, "has gaps"),
    "unaligned": (lambda: unaligned(BASE), np.array, "is not aligned"),
    "gradient unaligned": (BASE.copy, unaligned, "is not aligned"),
    "other byte order": (lambda: BASE.astype(">f4"), lambda g: g.astype(">f4"), "byte order"),
}


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, launches):
    """All go through the kernel that can, in place; the others are slow and say so, once."""
    make, grad_of, words = LAYOUTS[layout]
    param = make()
    around = Around(clip_norm=0.5, ema_decay=0.75, zero_grad=True)
    contiguous = np.array(param, np.float32, order="C")
    ours = Optimizer(Adam(lr=0.1), [param], around=around)
    plain = Optimizer(Adam(lr=0.1), [contiguous], around=around)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for given in gradients(param.shape, 3):
            grad = grad_of(given)
            ours.step([grad])
            assert_bits(np.array(grad, np.float32), np.zeros(param.shape, np.float32))
            count = len(launches)
            plain.step([np.array(given)])
            assert len(launches) == count + 1
    assert len(launches) == (6 if words is None else 3)
    said = [str(warning.message) for warning in caught]
    assert len(said) == (words is not None)
    assert all(text.startswith(SLOW) and words in text for text in said)
    assert all(warning.filename == __file__ for warning in caught)
    assert_bits(np.array(param, np.float32), contiguous)
    for slot in trace(Adam(), around).slots:
        assert_bits(np.array(ours.state[0][slot], np.float32), plain.state[0][slot], slot)


def test_a_saved_state_lies_as_its_parameter(launches):
    param = np.asfortranarray(BASE)
    optimizer = Optimizer(Adam(), [param])
    optimizer.step([np.asfortranarray(BASE)])
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step([np.asfortranarray(BASE)])
    assert len(launches) == 2


def test_one_launch_for_all_that_are_alike(launches):
    """Other shapes, layouts, learning rates and numbers of steps share it; other dtypes do not."""
    params = [np.ones(3), np.ones((2, 2)), np.asfortranarray(np.ones((3, 2))), np.float32([1.0])]
    groups = [{"params": params[:2], "lr": 0.5}, {"params": params[2:], "lr": 0.25}]
    optimizer = Optimizer(SGD(), groups)
    optimizer.step([np.ones_like(params[0]), None, None, None])
    optimizer.step([np.ones_like(param) for param in params])
    assert launches == [("float64",) * 2, ("float64",) * 2, ("float32",) * 2]
    assert [float(param.flat[-1]) for param in params] == [0.0, 0.5, 0.75, 0.75]


# Without llvmlite


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_the_same_bits_without_llvmlite(name, monkeypatch, launches):
    """Everything works, and says once why it is slow, whatever the arrays and the rules."""

    def trained():
        params = [weights(23).astype(dtype_of(name)), weights((3, 3)).astype(np.float32)]
        around = Around(clip_value=0.5, skip_nonfinite=True, ema_decay=0.75, zero_grad=True)
        optimizers = Optimizer(Adam(lr=0.1), params, around=around), Optimizer(SGD(), params)
        steps = zip(gradients(23, 3), gradients((3, 3), 3), strict=True)
        for one, two in steps:
            for optimizer in optimizers:
                optimizer.step([one.astype(dtype_of(name)), two.copy()])
        return [*params, *(optimizers[0].state[0][s] for s in ("exp_avg_sq", "param_ema"))]

    expected = trained()
    count = len(launches)
    monkeypatch.setattr(compiler, "available", lambda: False)
    cpu.refusal.cache_clear()
    with pytest.warns(UserWarning, match=f"^{SLOW}llvmlite is not installed: pip install") as said:
        actual = trained()
    assert len(said) == 1 and said[0].filename == __file__
    assert len(launches) == count > 0
    for one, other in zip(actual, expected, strict=True):
        assert_bits(one, other)


def test_llvmlite_not_installed():
    assert child("hidden") == f"[0.0] {SLOW}llvmlite is not installed: pip install llvmlite\n"


@pytest.mark.usefixtures("fresh")
def test_norms_overflow_silently_without_a_kernel(monkeypatch):
    monkeypatch.setattr(portopt.plan, "_takes", lambda arrays, silently: False)
    param = np.ones(2)
    Optimizer(SGD(), [param], around=Around(clip_norm=1.0)).step([np.array([1e200, 1.0])])
    assert_bits(param, np.ones(2))


# Threads


@pytest.mark.parametrize(
    ("text", "count"),
    [("1", 1), ("3", 3), (" 3 ", 3), ("5,2", 5), ("", 0), ("0", 0), ("-2", 0), ("many", 0)],
)
def test_the_number_of_threads(monkeypatch, text, count):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    default = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert cpu.threads() == (count or default)


def trained(rule, steps=300, size=1000):
    param = weights(size)
    optimizer = Optimizer(rule, [param])
    grads = list(gradients(size, 10))
    for t in range(steps):
        optimizer.step([grads[t % 10]])
    return param


@pytest.mark.usefixtures("small_spans")
def test_two_threads_step_two_optimizers():
    rules = Adam(lr=0.1), Adam(lr=0.1, amsgrad=True)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(trained, rules))
    for rule, param in zip(rules, found, strict=True):
        assert_bits(param, trained(rule))


@pytest.fixture
def team(monkeypatch):
    """No threads yet, but up to eight to come."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(pool, "_team", None)
    monkeypatch.setattr(pool, "_openmp", None)


@pytest.mark.usefixtures("small_spans", "team")
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit()])
def test_an_error_around_a_job(monkeypatch, error, before):
    """All is done once, and no thread is at work any more, whatever the caller then does."""
    runs = interrupted(monkeypatch, error, before)
    param, grad = np.zeros(10_000), np.ones(10_000)
    with pytest.raises(type(error)):
        Optimizer(SGD(lr=1.0), [param]).step([grad])
    assert len(runs) == 2
    assert_bits(param, np.full(10_000, -1.0))


@pytest.mark.usefixtures("small_spans", "team")
def test_an_error_in_one_launch_waits_for_the_others(monkeypatch):
    interrupted(monkeypatch, KeyboardInterrupt(), before=False)
    params = [np.zeros(10_000), np.zeros(10_000, np.float32)]
    with pytest.raises(KeyboardInterrupt):
        Optimizer(SGD(lr=1.0), params).step([np.ones_like(param) for param in params])
    assert all((param == -1).all() for param in params)


@pytest.mark.usefixtures("small_spans", "team")
@pytest.mark.parametrize("most", [0, 1, 2])
@pytest.mark.parametrize("lacking", ["PyThread_allocate_lock", "PyThread_start_new_thread"])
def test_no_more_threads_can_be_started(monkeypatch, most, lacking):
    """Those that there are do the work, and the next step asks again."""
    api, asked, refused = pool._api, [], {"PyThread_allocate_lock": None}
    failure = refused.get(lacking, pool.FAILED)

    def limited(name, *kinds):
        function = api(name, *kinds)

        def call(*args):
            asked.append(1)
            return function(*args) if len(asked) <= most else failure

        return call if name == lacking else function

    monkeypatch.setattr(pool, "_api", limited)
    param = np.zeros(10_000)
    optimizer = Optimizer(SGD(lr=1.0), [param])
    optimizer.step([np.ones(10_000)])
    assert pool._team.count == most
    most = 10
    optimizer.step([np.ones(10_000)])
    assert pool._team.count == 3
    assert_bits(param, np.full(10_000, -2.0))


@pytest.mark.usefixtures("small_spans", "team")
@pytest.mark.parametrize(("count", "size"), [(1, 9999), (2, 9999), (4, 9999), (4, 65), (4, 64)])
def test_no_more_threads_than_asked_for_or_useful(monkeypatch, count, size):
    monkeypatch.setenv("OMP_NUM_THREADS", str(count))
    param = np.zeros(size)
    Optimizer(SGD(lr=1.0), [param]).step([np.ones(size)])
    helpers = min(count, -(-size // 64)) - 1
    assert (pool._team.count if pool._team else 0) == helpers
    assert_bits(param, np.full(size, -1.0))


def test_one_thread_starts_no_other():
    assert child("count_threads", OMP_NUM_THREADS="1") == "0\n"
    assert child("count_threads", OMP_NUM_THREADS="2") != "0\n"


@posix
@pytest.mark.parametrize("way", ["fork", "multiprocessing"])
def test_a_fork_after_the_first_step(way):
    """The child has none of its parent's threads, and steps on."""
    assert child("fork", way, OMP_NUM_THREADS="2") == "same\n"


@posix
def test_a_fork_while_another_thread_compiles(tmp_path):
    assert child("fork_while_compiling", PORTOPT_CACHE_DIR=str(tmp_path)) == "20 children\n"


@posix
def test_interrupts(tmp_path):
    """Ctrl-C at any time: every array is whole, and stays as it is; then steps go on."""
    assert child("interrupts", OMP_NUM_THREADS="2") == "whole\n"


@pytest.mark.parametrize("way", ["at once", "thread", "daemon", "atexit", "exception"])
def test_python_ends(way):
    """While steps go on in a thread, or afterwards: it neither hangs nor fails."""
    assert child("ends", way, OMP_NUM_THREADS="2") == "steps\n"
