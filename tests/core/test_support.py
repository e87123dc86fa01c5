"""The comparison itself: green where it should be, and red where it should be."""

from __future__ import annotations

import numpy as np
import pytest
from support import TOLERANCE, assert_agree, gradients, weights

EXPECTED = np.array([1.0, -4.0, 0.0])
KINDS = sorted(set(TOLERANCE) - {"same"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [None, np.array([3.0, -4.0, 0.0])], ids=["size", "movement"])
def test_the_line_is_where_the_table_says(kind, start):
    scale = 4.0 if start is None else 2.0
    offset = TOLERANCE[kind] * scale * np.array([1.0, 0.0, 0.0])
    assert_agree(EXPECTED + 0.99 * offset, EXPECTED, kind, start=start)
    with pytest.raises(AssertionError, match="loss: difference"):
        assert_agree(EXPECTED + 1.01 * offset, EXPECTED, kind, start=start, what="loss")


def test_same_is_bit_for_bit():
    assert_agree(EXPECTED, EXPECTED.copy(), "same")
    for wrong in np.nextafter(EXPECTED, 9.0) * np.eye(3) + EXPECTED * (1 - np.eye(3)):
        with pytest.raises(AssertionError, match="difference"):
            assert_agree(wrong, EXPECTED, "same")


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize(
    "wrong",
    [[1.0, np.nan, np.inf], [np.nan, 1.0, -np.inf], [1.0, 1.0, np.inf], [np.nan, 1.0, 1.0]],
)
def test_nan_and_inf_stand_in_the_same_places(wrong, kind):
    expected = np.array([np.nan, 1.0, np.inf])
    assert_agree(expected.copy(), expected, kind)
    with pytest.raises(AssertionError, match="NaN or Inf in other places"):
        assert_agree(wrong, expected, kind)


def test_nan_where_a_number_should_be():
    with pytest.raises(AssertionError):
        assert_agree([np.nan], [1.0], "bfloat16")


@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (4,), ()])
def test_shapes_do_not_broadcast(shape):
    with pytest.raises(AssertionError, match="shape"):
        assert_agree(np.zeros(shape), np.zeros(3), "bfloat16")


def test_an_expected_standstill_allows_no_movement():
    with pytest.raises(AssertionError, match="difference"):
        assert_agree([1.0 + 1e-12], [1.0], "float64", start=[1.0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (23,), (3, 5)])
def test_inputs_are_seeded_and_of_the_shape_and_dtype(shape, dtype):
    for made, again in (
        (list(gradients(shape, 2, dtype=dtype)), list(gradients(shape, 2, dtype=dtype))),
        ([weights(shape, dtype=dtype)], [weights(shape, dtype=dtype)]),
    ):
        for array, same in zip(made, again, strict=True):
            assert (array.shape, array.dtype) == (shape, dtype)
            assert_agree(array, same, "same")


def test_gradients_have_zeros_subnormals_and_both_signs():
    grad = next(gradients(23, 1))
    assert (grad == 0).sum() == 4
    assert ((grad != 0) & (abs(grad) < np.finfo(np.float32).tiny)).any()
    assert (grad > 0).any() and (grad < 0).any()
