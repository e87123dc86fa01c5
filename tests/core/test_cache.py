"""Compiled kernels on disk: shared by processes, and harmless when the folder is not well."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from pathlib import Path

import numpy as np
import pytest
from children import child, start
from support import assert_agree

from portopt import Optimizer
from portopt.kernels import compiler, layout, llvm, pool
from portopt.rules import SGD, Adam

binding = pytest.importorskip("llvmlite.binding")
TEXT = llvm.square_sum("float32")
KEY_LENGTH = 64


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache folder, and no kernel in memory."""
    layout.arrays()  # which is looked for once: in no folder of these
    pool._functions()
    monkeypatch.setenv("PORTOPT_CACHE_DIR", str(tmp_path / "kernels"))
    forget()
    yield tmp_path / "kernels"
    forget()


@pytest.fixture
def compilations(monkeypatch):
    """The assembly that was compiled, not read from disk."""
    seen, parse = [], binding.parse_assembly
    monkeypatch.setattr(binding, "parse_assembly", lambda text: seen.append(text) or parse(text))
    return seen


def forget():
    """As a process that begins."""
    compiler._compiled.cache_clear()


def check():
    """One step through a kernel."""
    param = np.array([1.0, 2.0], np.float32)
    Optimizer(SGD(lr=0.5), [param]).step([np.array([2.0, 2.0], np.float32)])
    assert_agree(param, [0.0, 1.0], "same")


def test_a_kernel_is_compiled_once(folder, compilations):
    check()
    check()
    (file,) = folder.iterdir()
    assert len(file.name) == KEY_LENGTH and len(compilations) == 1
    forget()
    check()
    assert len(compilations) == 1
    assert list(folder.iterdir()) == [file]


def test_a_second_process_compiles_nothing(folder):
    with pytest.raises(AssertionError, match="it compiles"):
        child("steps", "read", PORTOPT_CACHE_DIR=str(folder))
    weights = child("steps", PORTOPT_CACHE_DIR=str(folder))
    assert child("steps", "read", PORTOPT_CACHE_DIR=str(folder)) == weights


def test_eight_processes_at_once_on_an_empty_folder(folder):
    processes = [start("steps", PORTOPT_CACHE_DIR=str(folder)) for _ in range(8)]
    ends = [(*process.communicate(timeout=100), process.returncode) for process in processes]
    assert ends == [(ends[0][0], "", 0)] * 8
    names = {file.name for file in folder.iterdir()}
    assert len(names) == 4  # a rule, a norm, a loop, the threads; nothing half-written lies about
    assert all(len(name) == KEY_LENGTH for name in names)
    assert child("steps", "read", PORTOPT_CACHE_DIR=str(folder)) == ends[0][0]


def cut(content):
    return content[:-1]


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "spoil",
    [cut, flip, lambda content: b"", lambda content: content[:20], lambda content: b"x" * 5000],
    ids=["cut", "flipped", "empty", "short", "other"],
)
def test_a_file_that_is_not_whole_is_made_anew(folder, compilations, spoil):
    check()
    (file,) = folder.iterdir()
    good = file.read_bytes()
    file.write_bytes(spoil(good))
    forget()
    check()
    assert len(compilations) == 2
    assert file.read_bytes() == good


def test_the_file_of_another_kernel_is_made_anew(folder, compilations):
    """Whole, but under the wrong name."""
    compiler.compiled(TEXT, "kernel")
    (other,) = folder.iterdir()
    check()
    (file,) = set(folder.iterdir()) - {other}
    shutil.copy(other, file)
    forget()
    check()
    assert len(compilations) == 3


def no_folder(folder):
    folder.write_text("a file")


def no_access(folder):
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)


def no_parent(folder):
    folder.symlink_to("nowhere/at/all")


def directories(folder):
    """Where the files would be stand folders."""
    check()
    for file in folder.iterdir():
        file.unlink()
        file.mkdir()
    forget()


@pytest.mark.parametrize("spoil", [no_folder, no_access, no_parent, directories])
def test_a_folder_that_cannot_be_used_costs_only_time(folder, compilations, spoil):
    if spoil is no_access and os.geteuid() == 0:
        pytest.skip("everything is open to root: see the errors of the system below")
    spoil(folder)
    before = len(compilations)
    check()
    check()
    assert len(compilations) == before + 1
    assert not folder.is_dir() or not [f for f in folder.iterdir() if f.is_file()]


@pytest.mark.parametrize(
    ("module", "name", "number"),
    [
        (Path, "mkdir", errno.EROFS),
        (tempfile, "mkstemp", errno.EACCES),
        (os, "replace", errno.EACCES),
    ],
)
def test_errors_of_the_system_cost_only_time(
    folder, compilations, monkeypatch, module, name, number
):
    """As in a folder that is read-only."""

    def fail(*args, **keywords):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail)
        check()
    assert not folder.exists() or list(folder.iterdir()) == []
    forget()
    check()
    assert len(compilations) == 2 and len(list(folder.iterdir())) == 1


def test_a_full_disk_costs_only_time(folder):
    """A limit on the size of files, since a disk cannot be filled here: a write that fails."""
    assert child("full_disk", PORTOPT_CACHE_DIR=str(folder)) == "done\n"
    assert list(folder.iterdir()) == []


def test_no_home(monkeypatch, folder):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    for name in ("PORTOPT_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compiler.Path, "home", fail)
    check()


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(compiler.Path, "home", lambda: tmp_path)
    for name in ("PORTOPT_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compiler.sys, "platform", "linux")
    assert compiler._folder() == tmp_path / ".cache" / "portopt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert compiler._folder() == tmp_path / "xdg" / "portopt"
    monkeypatch.setattr(compiler.sys, "platform", "darwin")
    assert compiler._folder() == tmp_path / "Library" / "Caches" / "portopt"
    monkeypatch.setattr(compiler.sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert compiler._folder() == tmp_path / "local" / "portopt"
    monkeypatch.setenv("PORTOPT_CACHE_DIR", str(tmp_path / "mine"))
    assert compiler._folder() == tmp_path / "mine"


def test_what_matters_is_in_the_key(folder, compilations, monkeypatch):
    """Another text, processor or version of LLVM is another file."""
    compiler.compiled(TEXT, "kernel")
    compiler.compiled(llvm.square_sum("float64"), "kernel")
    assert len(list(folder.iterdir())) == 2
    machine, jit, processor = compiler._host()
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "_host", lambda: (machine, jit, processor + ",+other"))
        forget()
        compiler.compiled(TEXT, "kernel")
        assert len(list(folder.iterdir())) == 3
    with monkeypatch.context() as patch:
        patch.setattr(binding, "llvm_version_info", (99, 0, 0))
        forget()
        compiler.compiled(TEXT, "kernel")
        assert len(list(folder.iterdir())) == 4
    forget()
    compiler.compiled(TEXT, "kernel")
    assert len(list(folder.iterdir())) == 4 == len(compilations)


def test_an_interrupt_while_compiling_leaves_nothing_behind(folder, monkeypatch):
    """Wherever it comes, the next step compiles, or reads what was compiled."""

    def interrupt(*args):
        raise KeyboardInterrupt

    for owner, name in (
        (binding, "parse_assembly"),
        (compiler, "_write"),
        (os, "replace"),
        (compiler, "_keep"),  # linked already
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                compiler.compiled(TEXT, "kernel")
        assert all(len(file.name) == KEY_LENGTH for file in folder.glob("*"))
    compiler.compiled(TEXT, "kernel")


def test_other_programs_have_other_kernels(folder, compilations):
    for rule in (Adam(), Adam(lr=0.5), Adam(amsgrad=True), Adam(beta1=0.0)):
        Optimizer(rule, [np.ones(3)]).step([np.ones(3)])
    assert len(list(folder.iterdir())) == len(compilations) == 3
