"""Every rule against its native twins, in real child processes; and proof that this can fail."""

from __future__ import annotations

import numpy as np
import pytest
from mutants import mutants

from portopt import parity, trace, worker

FRAMEWORKS = [f for f in worker.FRAMEWORKS if worker.missing(f) is None]
pytestmark = pytest.mark.skipif(not FRAMEWORKS, reason="no framework with natives is installed")


@pytest.fixture(scope="module")
def answers():
    return {framework: parity.ask(framework, lambda case: None) for framework in FRAMEWORKS}


def backends(answers):
    found = {"numpy": parity.on_numpy}
    if worker.missing("jax") is None:
        found["jax"] = parity.on_jax
    for framework, runs in answers.items():
        found[framework] = lambda rule, runs=runs: runs[f"ours {rule}"]
    return found


def test_every_rule_is_as_close_to_float64_as_its_twins(answers):
    table = list(parity.rows(parity.CASES, answers, backends(answers)))
    twins = sum(getattr(c, f) is not None for c in parity.CASES for f in answers)
    assert len(table) == twins * len(backends(answers))
    assert [row for row in table if not row.passed] == []


@pytest.mark.parametrize("name", mutants(parity.LR))
def test_a_wrong_rule_is_far_from_it(answers, name):
    rule, framework, twin = mutants(parity.LR)[name]
    if framework not in answers:
        pytest.skip(f"{framework} is not installed")
    case = parity.Case(rule, **{framework: twin})
    rows = list(parity.rows([case], answers, {"numpy": parity.on_numpy}))
    assert [row.passed for row in rows] == [False]
    assert rows[0].ratio > 10 * parity.LIMIT


def test_a_result_that_is_no_number_does_not_pass(answers):
    def nothing(rule):
        return {name: array * np.nan for name, array in parity.on_numpy(rule).items()}

    table = list(parity.rows(parity.CASES, answers, {"numpy": nothing}))
    assert not any(row.passed for row in table)


@pytest.mark.skipif("keras" not in FRAMEWORKS, reason="Keras is not installed")
def test_keras_has_the_bits_of_numpy(answers):
    for case in (case for case in parity.CASES if trace(case.rule).elementwise):
        expected = parity.on_numpy(case.rule)
        actual = answers["keras"][f"ours {case.rule}"]
        assert actual.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(actual[name], array, err_msg=f"{name}, {case.rule}")
