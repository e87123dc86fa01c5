"""What tests do in processes of their own: ``python scenes.py NAME ARGUMENTS``."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import sys


def guard(*names):
    """Kernels on memory between pages that must not be touched."""
    from bits import dtype_of

    from portopt import trace
    from portopt.kernels import cpu
    from portopt.rules import Adam

    page = mmap.PAGESIZE
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    kept = []

    def room():
        """A page between two without access: its address."""
        kept.append(mmap.mmap(-1, 3 * page))
        address = ctypes.addressof(ctypes.c_char.from_buffer(kept[-1]))
        for forbidden in (address, address + 2 * page):
            assert protect(forbidden, page, 0) == 0, ctypes.get_errno()
        return address + page

    program = trace(Adam())
    scalars = [program.scalars(vars(Adam()), 3)]
    rooms = [room() for _ in program.operands]
    for name in names:
        one = dtype_of(name).itemsize
        for size, odd in itertools.product(range(71), (0, 1, 3)):
            for begin in (odd * one, page - (size + odd) * one):
                starts = [address + begin for address in rooms]
                step = cpu.Step(program, (name,) * len(starts), [starts], [size])
                step.run(scalars, [0], 1)
                cpu.SquareSum(name, starts[:1], [size]).run(1)
        print("untouched")


def steps(*may):
    """Some steps with a norm; prints the weights. Fails if it compiles but may only "read"."""
    import numpy as np
    from llvmlite import binding

    from portopt import Around, Optimizer
    from portopt.rules import Adam

    def parse_assembly(text):
        raise AssertionError("it compiles")

    if may == ("read",):
        binding.parse_assembly = parse_assembly
    param = np.ones(5, np.float32)
    optimizer = Optimizer(Adam(lr=0.1), [param], around=Around(clip_norm=1.0))
    for _ in range(3):
        optimizer.step([param.copy()])
    print(param.tolist())


def full_disk():
    """A step where no file can grow beyond some bytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    import numpy as np

    from portopt import Optimizer
    from portopt.rules import SGD

    Optimizer(SGD(lr=0.5), [np.ones(2)]).step([np.ones(2)])
    print("done")


def _counter(size=200_000):
    """An optimizer that subtracts 1 from every weight, its weights and gradients."""
    import numpy as np

    from portopt import Optimizer
    from portopt.rules import SGD

    params = [np.zeros(size, np.float32) for _ in range(3)]
    return Optimizer(SGD(lr=1.0), params), params, [np.ones_like(param) for param in params]


def hidden():
    """Steps without llvmlite; prints what was said."""
    sys.modules["llvmlite"] = None
    import warnings

    import numpy as np

    from portopt import Around, Optimizer
    from portopt.rules import SGD

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for dtype in (np.float32, np.float64):
            param = np.ones(1, dtype)
            optimizer = Optimizer(SGD(lr=0.5), [param], around=Around(clip_norm=10.0))
            for _ in range(2):
                optimizer.step([np.ones(1, dtype)])
    print(param.tolist(), *(warning.message for warning in said))


def count_threads():
    """How many threads of ours there are after some steps."""
    from portopt.kernels import pool

    optimizer, _, grads = _counter()
    for _ in range(20):
        optimizer.step(grads)
    print(pool._team.count if pool._team else 0)


def fork(way):
    """Steps here, then the same steps here and in the child of a fork."""
    import multiprocessing
    import warnings

    import numpy as np

    from portopt.kernels import pool as threads

    # Python warns of every fork beside a thread, our own threads too.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    optimizer, params, grads = _counter()
    optimizer.step(grads)

    def rest():
        for _ in range(20):
            optimizer.step(grads)
        return bytes(np.concatenate(params).data)

    if way == "fork":
        reader, writer = os.pipe()
        if os.fork() == 0:
            assert threads._team is None, "its threads are not here"
            with open(writer, "wb") as file:
                file.write(rest())
            os._exit(0)
        os.close(writer)
        with open(reader, "rb") as file:
            theirs = file.read()
    else:
        with multiprocessing.get_context("fork").Pool(1, _set_rest, (rest,)) as pool:
            theirs = pool.apply(_rest)
    print("same" if theirs == rest() else "different")


def _set_rest(rest):
    global _rest_of_child
    _rest_of_child = rest


def _rest():
    return _rest_of_child()


def fork_while_compiling():
    """Children that compile, of a process that compiles all the time."""
    import signal
    import threading
    import warnings

    from portopt.kernels import compiler, llvm

    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    texts = (llvm.square_sum("float32") + f"; {n}" for n in itertools.count())
    stop = threading.Event()

    def compile_on():
        while not stop.is_set():
            compiler.compiled(next(texts), "kernel")

    thread = threading.Thread(target=compile_on)
    thread.start()
    for n in range(20):
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            compiler.compiled(llvm.square_sum("float64") + f"; {n}", "kernel")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, f"child {n}"
    stop.set()
    thread.join()
    print("20 children")


def interrupts():
    """Steps of large arrays, interrupted by the signal of Ctrl-C at random times."""
    import random
    import signal
    import threading
    import time

    optimizer, params, grads = _counter(2_000_000)
    optimizer.step(grads)
    random.seed(0)
    caught = stepped = 0

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job of a shell ignores it

    def interrupt():
        time.sleep(random.uniform(0.002, 0.02))
        os.kill(os.getpid(), signal.SIGINT)

    while caught < 40:
        thread = threading.Thread(target=interrupt)
        try:
            thread.start()
            while True:
                optimizer.step(grads)
                stepped += 1
        except KeyboardInterrupt:
            caught += 1
            found = [(float(param.min()), float(param.max())) for param in params]
        assert all(low == high for low, high in found), found
        time.sleep(0.01)
        assert found == [(float(param[0]), float(param[-1])) for param in params]
        thread.join()
    assert stepped
    print("whole")


def ends(way):
    """The end of Python after, or during, steps."""
    import atexit
    import threading

    optimizer, _, grads = _counter()
    optimizer.step(grads)

    def go_on():
        for _ in range(200):
            optimizer.step(grads)

    print("steps", flush=True)
    if way == "atexit":
        atexit.register(go_on)
    elif way in ("thread", "daemon"):
        threading.excepthook = lambda args: os._exit(3)
        threading.Thread(target=go_on, daemon=way == "daemon").start()
    elif way == "exception":
        threading.Thread(target=go_on).start()
        raise SystemExit(0)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
