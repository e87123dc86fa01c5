"""LLVM assembly to machine code of this processor, kept on disk for the processes to come."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import itertools
import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child must not inherit LLVM at work
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
    )


def available() -> bool:
    """Whether kernels can be compiled here: llvmlite is installed."""
    return importlib.util.find_spec("llvmlite") is not None


def computes_half() -> bool:
    """Whether this processor converts float16 by itself; a kernel has no library to ask."""
    return not processor().startswith(("x86_64", "i686")) or "+f16c" in processor()


def processor() -> str:
    """This processor as LLVM describes it: its kind first."""
    return _host()[2]


def compiled(text: str, *names: str) -> tuple[int, ...]:
    """Where the machine code of functions begins that ``text`` defines; made once in a process.

    It comes from the cache folder, or goes there: ``PORTOPT_CACHE_DIR``, else ``portopt`` in the
    user's cache folder. A folder that cannot be written, or a file there that is not whole, only
    costs the time to compile.

    Raises:
        ModuleNotFoundError: llvmlite is not installed.
    """
    with _lock:  # two threads with the same first step compile once
        return _compiled(text, names)


@cache
def _compiled(text: str, names: tuple[str, ...]) -> tuple[int, ...]:
    from llvmlite import binding

    machine, jit, host = _host()
    # The text says all about the kernel, the rest all about who turns it into what for whom.
    version = binding.llvm_version_info
    key = _digest(repr((text, host, version)), b"").hex()
    code = _read(key)
    if code is None:
        module = binding.parse_assembly(text)
        module.verify()
        code = machine.emit_object(module)
        _write(key, code)
    builder = binding.JITLibraryBuilder().add_object_img(code)
    builder.add_current_process()  # for exp and log, which are the C library's
    for name in names:
        builder.export_symbol(name)
    library = builder.link(jit, f"{key} {next(_links)}")  # an interrupted one keeps its name
    _keep(library)
    return tuple(int(library[name]) for name in names)


class Loop(NamedTuple):
    """A compiled loop over Python's objects, which holds Python's lock.

    Attributes:
        call: Its function, of the address of ``functions`` and what is said of each loop.
        functions: The addresses of the C functions that it calls.
    """

    call: Callable[..., int]
    functions: npt.NDArray[np.uint64]


def loop(text: str, functions: Sequence[Any], kinds: Sequence[Any]) -> Loop:
    """The function ``kernel`` that ``text`` defines, as a `Loop`.

    Args:
        text: LLVM assembly; ``kernel`` returns an int64.
        functions: Functions of ctypes.
        kinds: The types of the kernel's arguments, of ctypes.
    """
    table = [ctypes.cast(function, ctypes.c_void_p).value for function in functions]
    (kernel,) = compiled(text, "kernel")
    call = ctypes.PYFUNCTYPE(ctypes.c_int64, *kinds)(kernel)
    return Loop(call, np.array(table, np.uint64))


_links = itertools.count()


def _keep(code: Any) -> None:
    """Never unload it: even as Python ends, a thread may be there."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(code))


@cache
def _host() -> tuple[Any, Any, str]:
    """LLVM's target machine and linker for this processor, and the processor's description."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    triple, cpu = binding.get_process_triple(), binding.get_host_cpu_name()
    features = binding.get_host_cpu_features().flatten()
    target = binding.Target.from_triple(triple)

    def machine() -> Any:
        return target.create_target_machine(cpu=cpu, features=features, opt=2, jit=True)

    jit = binding.create_lljit_compiler(machine())
    _keep(jit)
    return machine(), jit, f"{triple} {cpu} {features}"


def _folder() -> Path:
    chosen = os.environ.get("PORTOPT_CACHE_DIR")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home()) / "portopt"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "portopt"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "portopt"


def _read(key: str) -> bytes | None:
    """The code of ``key``, if its file is there and whole."""
    try:
        content = (_folder() / key).read_bytes()
    except (OSError, RuntimeError):  # no such file, no access, no home
        return None
    digest, code = content[:32], content[32:]
    return code if digest == _digest(key, code) else None


def _digest(key: str, code: bytes) -> bytes:
    import hashlib  # here, as `import portopt` is to be quick

    return hashlib.sha256(key.encode() + code).digest()


def _write(key: str, code: bytes) -> None:
    """Keep ``code``, so that other processes see all of it or nothing."""
    import tempfile

    with contextlib.suppress(OSError, RuntimeError):
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=folder)
        try:
            with open(descriptor, "wb") as file:
                file.write(_digest(key, code) + code)
            os.replace(name, folder / key)
        except BaseException:
            os.unlink(name)
            raise
