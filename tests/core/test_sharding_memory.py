"""The memory of a training, against the figures of the ZeRO paper, and what workers do hold."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from portopt.rules import SGD, Adafactor, Adam, Lamb, Momentum
from portopt.sharding import ModelState, Sharded, read_shapes, simulate
from portopt.sharding.memory import PASSES, STAGES

# Table 1 of arXiv 1910.02054, in GB as printed there: for each number of workers, the stages 1, 2
# and 3 for models of 7.5B, 128B and 1T parameters.
TABLE = {
    1: ("120 120 120", "2048 2048 2048", "16000 16000 16000"),
    4: ("52.5 41.3 30", "896 704 512", "7000 5500 4000"),
    16: ("35.6 21.6 7.5", "608 368 128", "4750 2875 1000"),
    64: ("31.4 16.6 1.88", "536 284 32", "4187 2218 250"),
    256: ("30.4 15.4 0.47", "518 263 8", "4046 2054 62.5"),
    1024: ("30.1 15.1 0.12", "513 257 2", "4011 2013 15.6"),
}


@pytest.mark.parametrize("workers", TABLE)
def test_table_1_of_the_paper(workers):
    for elements, row in zip((7.5e9, 128e9, 1e12), TABLE[workers], strict=True):
        model = ModelState.of_count(elements, Adam())
        for stage, text in zip((1, 2, 3), row.split(), strict=True):
            last_digit = 10.0 ** -len(text.partition(".")[2])  # some are rounded, some cut off
            total = model.memory(stage, workers).total / 1e9
            assert abs(total - float(text)) < last_digit, (elements, stage)


def test_figure_1_of_the_paper():
    model = ModelState.of_count(7.5e9, Adam())
    found = [model.memory(stage, 64).total / 1e9 for stage in STAGES]
    assert [f"{total:.3g}" for total in found] == ["120", "31.4", "16.6", "1.88"]


def test_what_is_sent():
    """Section 7 of the paper: 2, and in stage 3 three times the parameters, for many workers."""
    assert list(PASSES.values()) == [2, 2, 2, 3]
    model = ModelState.of_count(1e9, Adam())
    assert [model.sent(stage, 2) for stage in STAGES] == [2e9, 2e9, 2e9, 3e9]
    assert model.sent(3, 1) == 0


@pytest.mark.parametrize(
    ("rule", "precision", "bytes_each"),
    [
        (Adam(), "mixed", (2, 2, 12)),
        (Adam(amsgrad=True), "float32", (4, 4, 12)),
        (Momentum(), "mixed", (2, 2, 8)),
        (SGD(), "bfloat16", (2, 2, 0)),
        (Lamb(), "float64", (8, 8, 16)),
    ],
    ids=["adam", "amsgrad", "momentum", "sgd", "lamb"],
)
def test_the_largest_model_fits_just(rule, precision, bytes_each):
    model = ModelState.of_count(1e6, rule, precision)
    assert model.memory(0, 7) == tuple(1e6 * each for each in bytes_each)
    for stage in STAGES:
        largest = model.largest(stage, 7, 32e9)
        fitting = ModelState.of_count(largest, rule, precision).memory(stage, 7)
        assert fitting.total == pytest.approx(32e9)


@pytest.mark.parametrize("rule", [Adam(), Lamb(), Adafactor()], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_hold_what_is_foretold(rule, workers):
    shapes = [(300, 40), (40,), (7, 11, 3)]

    def work(collectives):
        params = [np.ones(shape, np.float32) for shape in shapes]
        optimizer = Sharded(rule, params, collectives)
        optimizer.step(params)
        kept = optimizer.state.values()
        return sum(x.nbytes for entries in kept for x in entries.values() if hasattr(x, "nbytes"))

    held = ModelState.of_shapes(shapes, rule, "float32").memory(1, workers)
    assert held.optimizer == max(simulate(workers, work))


def torch_like():
    class Module:
        def named_parameters(self):
            yield "w", SimpleNamespace(shape=(3, 2), requires_grad=True)
            yield "frozen", SimpleNamespace(shape=(9,), requires_grad=False)
            yield "b", SimpleNamespace(shape=(2,), requires_grad=True)

    return Module()


def shapes_of_a_model():
    return {"w": (3, 2), "b": np.ones(2)}


def model_that_fails():
    yield (3, 2)
    raise SystemExit(0)


def model_of_no_shapes():
    return {"w": (-1, 2)}


NUMBER = 3
ENTRIES = {
    "__metadata__": {"format": "np"},
    "w": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]},
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]},
}


def write_safetensors(path, entries):
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(32))


def test_shapes_of_models(tmp_path):
    np.savez(tmp_path / "model.npz", w=np.ones((3, 2)), b=np.ones(2))
    write_safetensors(tmp_path / "model.safetensors", ENTRIES)
    sources = [str(tmp_path / "model.npz"), str(tmp_path / "model.safetensors")]
    for source in (*sources, f"{__name__}:torch_like", f"{__name__}:shapes_of_a_model"):
        assert read_shapes(source) == [(3, 2), (2,)]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ModelState.of_count(0, Adam()), r"elements must be in \(0, 2\*\*63\), got 0"),
        (lambda: ModelState.of_count(1, Adam(), "int8"), "precision must be one of mixed.*'int8'"),
        (lambda: ModelState.of_count(1, Adafactor()), "Adafactor depends on shapes"),
        (lambda: ModelState.of_shapes([(0, 2)], Adam()), r"elements must be in \(0, .*, got 0"),
        (lambda: ModelState.of_shapes([(2**32,) * 2], Adam()), "elements must be in .*, got 1844"),
        (lambda: ModelState.of_count(1, Adam()).memory(4, 1), "stage must be one of .*got 4"),
        (lambda: ModelState.of_count(1, Adam()).sent(1, 0), "workers must be at least 1, got 0"),
        (lambda: read_shapes("model.bin"), "model must be .*: model.bin"),
        (lambda: read_shapes(f"{__name__}:nothing"), "AttributeError: .* no attribute 'nothing'"),
        (lambda: read_shapes(f"{__name__}:NUMBER"), "TypeError: 'int' object is not callable"),
        (lambda: read_shapes(f"{__name__}:model_that_fails"), "cannot be read: SystemExit: 0"),
        (lambda: read_shapes(f"{__name__}:model_of_no_shapes"), r"\(-1, 2\) has no shape and is"),
        (lambda: read_shapes(".:d"), "the shapes of .:d cannot be read: TypeError"),
        (lambda: read_shapes("builtins:object"), "must be a module, a dict or a sequence"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("content", [b"", b"\x10" + bytes(7) + b"no JSON at all!!", b"PK\xff\xff"])
@pytest.mark.parametrize("name", ["model.npz", "model.safetensors"])
def test_files_that_are_none(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"the shapes of .*{name} cannot be read"):
        read_shapes(str(tmp_path / name))


@pytest.mark.parametrize(
    "entries", [[3], {"w": 3}, {"w": None}, *({"w": {"shape": s}} for s in (3, [-1], [2.5], "32"))]
)
def test_a_header_without_shapes(entries, tmp_path):
    write_safetensors(tmp_path / "model.safetensors", entries)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        read_shapes(str(tmp_path / "model.safetensors"))
