"""Threads of ours, and the jobs that they share: compiled functions that need nothing of Python's.

A thread waits in compiled code, at a lock of its own, and never asks for Python's: it is at work
while Python still is. A job has shares of work, which threads take one by one; who comes late finds
none left. So a thread that the system lets wait costs nothing: nobody waits for it unless it is at
work.

Where OpenMP's threads are in the process as well, they do the jobs (`join`).
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeAlias

from portopt.kernels import compiler

LINGER = 20_000
"""How often a thread had best look for another job that comes soon: half a millisecond, or one."""

_Words: TypeAlias = "ctypes.Array[ctypes.c_int64]"

_JOB = (
    *("kernel", "first", "linger", "shares", "openmp"),
    *("begun", "said", "told", "left", "taken", "done"),
)
"""What the memory of a job begins with, in words of 64 bits; what its kernel is told follows.

``openmp``: the address of `_openmp`, if its threads do the job, else 0; ``begun``: whether threads
have been told of it; ``said``: 0, or what the kernel or the caller's function says; ``told``: how
many threads ever were; ``left``: how many of these have done with it. ``taken`` and ``done``: how
many of the ``shares`` are.
"""
_JOB_WORDS = 32
_BOX = ("job", "lock", "acquire", "release")
"""What the box of a thread has: the address of a job, 0 for none, 1 while the thread sleeps; the
lock where it does; the functions that take and release it."""
_BOX_WORDS = 8  # a cache line
_PATIENCE = 20_000
"""How often the caller looks whether a helper has done its last share, before it asks Python."""


class Job:
    """A kernel, as `kernel` prints it, and what it works on.

    Args:
        kernel: Where its machine code begins.
        shares: How many shares of work it has.
        arguments: Addresses and numbers, as it wants them. The caller keeps alive what is there.
        first: Where a function of the job begins that its caller is to do before taking a share; 0
            for none.
        linger: How often a thread looks for another job afterwards, before it sleeps.
    """

    def __init__(
        self,
        kernel: int,
        shares: int,
        arguments: Sequence[int],
        *,
        first: int = 0,
        linger: int = 0,
    ) -> None:
        self._shares, self._memory = shares, list[_Words]()
        head = [kernel, first, linger, shares]
        self._begin: list[Any] = [*head, *[0] * (len(_JOB) - len(head)), *arguments]
        self._memory.append(self._filled())

    def _filled(self) -> _Words:
        words = _memory()
        words[: len(self._begin)] = self._begin
        return words

    def __del__(self) -> None:
        """Leave the memory to jobs to come."""
        _unused.extend(self._memory)

    def do(self, helpers: int, *, locked: bool = False) -> int:
        """Do all shares; when it returns or raises, no thread is at work on them any more.

        Args:
            helpers: How many other threads may take part; OpenMP's have a number of their own.
            locked: Whether to keep Python's lock meanwhile.

        Returns:
            What the kernel or ``first`` says, else 0.
        """
        openmp = _openmp if helpers > 0 else None
        boxes, count = _boxes(helpers) if helpers > 0 and openmp is None else (0, 0)
        run = _functions().run_locked if locked else _functions().run
        # If another thread does the same, it has the memory.
        words = self._memory.pop() if self._memory else self._filled()
        at = ctypes.addressof(words)
        words[_BEGUN], words[_OPENMP] = 0, ctypes.addressof(openmp) if openmp else 0
        done, interrupt = 0, None
        while done < self._shares:
            try:
                done = run(at, boxes, count)
                if done < self._shares:  # a helper is still at its last share
                    time.sleep(0)
            except BaseException as error:  # what the caller then sees must be whole
                interrupt = error
        said = words[_SAID]
        self._memory.append(words)
        if interrupt is not None:
            raise interrupt
        return said


def finish(actions: Iterable[Callable[..., object]], *args: object) -> None:
    """Call all; an interrupt meanwhile is raised at the end."""
    interrupt = None
    for action in actions:
        try:
            action(*args)
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def join(library: ctypes.CDLL) -> None:
    """Have OpenMP's threads do all jobs from now on, if a library has GNU's OpenMP or one alike.

    After each of its loops they look for another one for some milliseconds, and threads of ours
    would have to share the processors with them.

    Args:
        library: The library that has them work. What the whole process has, as Intel's OpenMP
            where that is preloaded, comes before its own, as for the library itself.
    """
    global _openmp
    names = "GOMP_parallel", "omp_get_thread_num"
    whole = [ctypes.PyDLL(None)] if os.name == "posix" else []
    for one in (*whole, library):
        if all(hasattr(one, name) for name in names):
            found = [ctypes.cast(getattr(one, name), ctypes.c_void_p) for name in names]
            _openmp = (ctypes.c_void_p * 2)(*found)
            return


_openmp: ctypes.Array[ctypes.c_void_p] | None = None
"""Where functions begin that have all threads call a function, and number them; None for ours."""


def kernel(arguments: Sequence[str], body: str, locals: Iterable[str] = ()) -> str:
    """A kernel in LLVM assembly: a function ``kernel`` of the address of a job.

    It takes shares as long as there are any, and returns how many are done by then.

    Args:
        arguments: What it is told: "ptr %table", "i64 %n".
        body: What is done for a ``%share``: from the block ``open`` on, to a jump to ``given``. It
            may store what there is to say, atomically, at ``%job.said``.
        locals: Instructions before the first share.
    """
    return _KERNEL.format(
        at=_fields("job", "i64", ("said", "taken", "done"), _JOB),
        shares=_load("i64 %shares", _JOB.index("shares") - len(_JOB)),
        arguments="\n".join(_load(argument, place) for place, argument in enumerate(arguments)),
        locals="\n".join(locals),
        body=body,
    )


def function(name: str, arguments: Mapping[int, str], body: str) -> str:
    """A function of the address of a job, for its caller to do first.

    Args:
        name: Its name.
        arguments: What it loads of what the job is told, by place.
        body: What it does, up to ``ret void``; as in `kernel` it may store at ``%job.said``.
    """
    lines = [_fields("job", "i64", ["said"], _JOB)]
    lines += [_load(argument, place) for place, argument in arguments.items()]
    return "\n".join([f"define void @{name}(ptr %job) {{", *lines, body, "}\n"])


def _load(argument: str, place: int) -> str:
    """Lines that load from ``%job`` what stands at that place of what it is told."""
    kind, name = argument.split()
    return (
        f"{name}.in.job = getelementptr i64, ptr %job, i64 {len(_JOB) + place}\n"
        f"{name} = load {kind}, ptr {name}.in.job"
    )


def _fields(of: str, kind: str, names: Sequence[str], all_names: Sequence[str]) -> str:
    """Lines that say where the fields of ``%of`` are: ``%of.name``."""
    return "\n".join(
        f"%{of}.{name} = getelementptr {kind}, ptr %{of}, i64 {all_names.index(name)}"
        for name in names
    )


_BEGUN, _SAID, _TOLD, _LEFT = map(_JOB.index, ("begun", "said", "told", "left"))
_OPENMP = _JOB.index("openmp")
_unused: list[_Words] = []


def _memory() -> _Words:
    """Memory for a job, which no thread will look at any more."""
    for place, words in enumerate(_unused):
        if words[_TOLD] == words[_LEFT]:
            return _unused.pop(place)
    return _allocated(_JOB_WORDS)


def _allocated(count: int) -> _Words:
    """Words, all of them 0, that are never given back: even as Python ends, a thread may look."""
    size = ctypes.c_size_t
    address = _api("PyMem_RawCalloc", ctypes.c_void_p, size, size)(count, 8)
    if address is None:
        raise MemoryError
    return (ctypes.c_int64 * count).from_address(address)


def _api(name: str, *kinds: type) -> Callable[..., Any]:
    """A function of CPython's C interface, by its result's type and its arguments'."""
    return ctypes.PYFUNCTYPE(*kinds)((name, ctypes.pythonapi))


def _address(name: str) -> int:
    return ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value or 0


FAILED = ctypes.c_ulong(-1).value
"""What ``PyThread_start_new_thread`` returns if there can be no more."""


class _Team:
    """The threads of this process, as far as they have been started."""

    def __init__(self) -> None:
        self.most = os.cpu_count() or 1
        self.boxes = _allocated(self.most * _BOX_WORDS)
        self.at = ctypes.addressof(self.boxes)
        self.count = 0
        self._lock = threading.Lock()

    def start(self, count: int) -> None:
        """Have ``count`` threads, or as many as can be started."""
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        new_lock = _api("PyThread_allocate_lock", pointer)
        acquire = _api("PyThread_acquire_lock", integer, pointer, integer)
        new_thread = _api("PyThread_start_new_thread", ctypes.c_ulong, pointer, pointer)
        ways = _address("PyThread_acquire_lock"), _address("PyThread_release_lock")
        with self._lock:
            while self.count < min(count, self.most):
                first = self.count * _BOX_WORDS
                lock = self.boxes[first + 1] or new_lock()
                if not self.boxes[first + 1] and lock:
                    acquire(lock, 1)  # so that the thread waits there
                    self.boxes[first : first + len(_BOX)] = [0, lock, *ways]
                started = lock and new_thread(_functions().serve, self.at + 8 * first)
                if not lock or started == FAILED:
                    return  # the next job asks again
                self.count += 1


_team: _Team | None = None


def _boxes(helpers: int) -> tuple[int, int]:
    """Where the threads' boxes begin, and how many there are, up to ``helpers``."""
    global _team
    if _team is None:
        _team = _Team()
    if _team.count < helpers:
        _team.start(helpers)
    return _team.at, min(_team.count, helpers)


def _forget_threads() -> None:
    """In the child of a fork: it has none of its parent's, and OpenMP would wait for them."""
    global _team, _openmp
    _team, _openmp = None, None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


class _Functions(NamedTuple):
    """What is compiled here.

    Attributes:
        run: ``run(job, boxes, n)``, without Python's lock.
        run_locked: The same, with it.
        serve: Where ``serve(box)`` begins.
    """

    run: Callable[[int, int, int], int]
    run_locked: Callable[[int, int, int], int]
    serve: int


@cache
def _functions() -> _Functions:
    """The functions of `_FUNCTIONS`."""
    pauses = (line for name, line in _PAUSE.items() if compiler.processor().startswith(name))
    text = _FUNCTIONS.format(
        job=_fields("job", "i64", _JOB, _JOB),
        other=_fields("other", "i64", ["left"], _JOB),
        box=_fields("box", "ptr", _BOX, _BOX),
        box_words=_BOX_WORDS,
        patience=_PATIENCE,
        pause=next(pauses, ""),
    )
    run, serve = compiler.compiled(text, "run", "serve")
    kinds = ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64
    return _Functions(ctypes.CFUNCTYPE(*kinds)(run), ctypes.PYFUNCTYPE(*kinds)(run), serve)


_PAUSE = {
    "x86_64": "call void @llvm.x86.sse2.pause()",
    "i686": "call void @llvm.x86.sse2.pause()",
    "aarch64": "call void @llvm.aarch64.hint(i32 1)",
    "arm64": "call void @llvm.aarch64.hint(i32 1)",
}
"""What processors want to be told between two looks at the same word."""

_KERNEL = """\
define i64 @kernel(ptr %job) {{
{at}
{shares}
{arguments}
{locals}
br label %take
take:
%job.own = phi i64 [0, %0], [%job.own.next, %given]
%share = atomicrmw add ptr %job.taken, i64 1 acquire
%job.over = icmp uge i64 %share, %shares
br i1 %job.over, label %finish, label %open
{body}
given:
%job.own.next = add i64 %job.own, 1
br label %take
finish:
%job.before = atomicrmw add ptr %job.done, i64 %job.own acq_rel
%job.total = add i64 %job.before, %job.own
ret i64 %job.total
}}
"""

_FUNCTIONS = """\
define i64 @run(ptr %job, ptr %boxes, i64 %n) {{
{job}
%shares = load i64, ptr %job.shares
%kernel = load ptr, ptr %job.kernel
%begun = load i64, ptr %job.begun
%first = icmp eq i64 %begun, 0
br i1 %first, label %begin, label %work
begin:
store i64 1, ptr %job.begun
store i64 0, ptr %job.said
%told = atomicrmw add ptr %job.told, i64 %n monotonic
store atomic i64 0, ptr %job.done monotonic, align 8
store atomic i64 0, ptr %job.taken release, align 8
%word = ptrtoint ptr %job to i64
br label %tell
tell:
%i = phi i64 [0, %begin], [%i.next, %is.told]
%more = icmp ult i64 %i, %n
br i1 %more, label %hand, label %own
hand:
%i.next = add i64 %i, 1
%box.in = mul i64 %i, {box_words}
%box = getelementptr i64, ptr %boxes, i64 %box.in
{box}
%old = atomicrmw xchg ptr %box.job, i64 %word acq_rel
switch i64 %old, label %replaced [ i64 0, label %is.told i64 1, label %wake ]
replaced: ; a job that the thread has not looked at yet
%other = inttoptr i64 %old to ptr
{other}
%other.others = atomicrmw add ptr %other.left, i64 1 release
br label %is.told
wake:
%lock = load ptr, ptr %box.lock
%release = load ptr, ptr %box.release
call void %release(ptr %lock)
br label %is.told
is.told:
br label %tell
own:
%openmp = load ptr, ptr %job.openmp
%none = icmp eq ptr %openmp, null
br i1 %none, label %alone, label %together
together:
%parallel = load ptr, ptr %openmp
call void %parallel(ptr @member, ptr %job, i32 0, i32 0) ; as many as OpenMP has
br label %work
alone:
call void @first(ptr %job)
br label %work
work:
%part = call i64 %kernel(ptr %job)
br label %wait
wait:
%looks = phi i64 [0, %work], [%looks.next, %pause]
%done = load atomic i64, ptr %job.done acquire, align 8
%all = icmp uge i64 %done, %shares
%tired = icmp uge i64 %looks, {patience}
%stop = or i1 %all, %tired
br i1 %stop, label %take.back, label %pause
pause:
{pause}
%looks.next = add i64 %looks, 1
br label %wait
take.back:
%j = phi i64 [0, %wait], [%j.next, %is.back]
%left = icmp ult i64 %j, %n
br i1 %left, label %look, label %end
look:
%j.next = add i64 %j, 1
%back.in = mul i64 %j, {box_words}
%back = getelementptr i64, ptr %boxes, i64 %back.in
%own.word = ptrtoint ptr %job to i64
%pair = cmpxchg ptr %back, i64 %own.word, i64 0 acq_rel monotonic
%was = extractvalue {{i64, i1}} %pair, 1
br i1 %was, label %unseen, label %is.back
unseen:
%others = atomicrmw add ptr %job.left, i64 1 release
br label %is.back
is.back:
br label %take.back
end:
ret i64 %done
}}
define private void @first(ptr %job) {{
{job}
%function = load ptr, ptr %job.first
%none = icmp eq ptr %function, null
br i1 %none, label %done, label %do
do:
call void %function(ptr %job)
br label %done
done:
ret void
}}
define private void @member(ptr %job) {{
{job}
%kernel = load ptr, ptr %job.kernel
%openmp = load ptr, ptr %job.openmp
%number.at = getelementptr ptr, ptr %openmp, i64 1
%number.function = load ptr, ptr %number.at
%number = call i32 %number.function()
%is.caller = icmp eq i32 %number, 0
br i1 %is.caller, label %begin, label %work
begin:
call void @first(ptr %job)
br label %work
work:
%done = call i64 %kernel(ptr %job)
ret void
}}
define void @serve(ptr %box) {{
{box}
%lock = load ptr, ptr %box.lock
%acquire = load ptr, ptr %box.acquire
br label %rest
rest:
%pair = cmpxchg ptr %box.job, i64 0, i64 1 acq_rel monotonic
%sleeps = extractvalue {{i64, i1}} %pair, 1
br i1 %sleeps, label %sleep, label %look
sleep:
%taken = call i32 %acquire(ptr %lock, i32 1)
br label %look
look:
%linger = phi i64 [0, %rest], [0, %sleep], [%linger, %pause], [%linger.next, %leave]
%looks = phi i64 [0, %rest], [0, %sleep], [%looks.next, %pause], [0, %leave]
%seen = load atomic i64, ptr %box.job monotonic, align 8
%some = icmp ne i64 %seen, 0
br i1 %some, label %take, label %none
none:
%looks.next = add i64 %looks, 1
%over = icmp ugt i64 %looks.next, %linger
br i1 %over, label %rest, label %pause
pause:
{pause}
br label %look
take:
%word = atomicrmw xchg ptr %box.job, i64 0 acq_rel
%job = inttoptr i64 %word to ptr
%still = icmp ne ptr %job, null
br i1 %still, label %work, label %rest
work:
{job}
%kernel = load ptr, ptr %job.kernel
%linger.next = load i64, ptr %job.linger
%done = call i64 %kernel(ptr %job)
br label %leave
leave:
%others = atomicrmw add ptr %job.left, i64 1 release
br label %look
}}
"""
