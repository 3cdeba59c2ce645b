"""That annotations are checked while these tests run: shapes, plain types, and both of the package's own functions."""

from collections.abc import Callable

import jaxtyping
import pytest
import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError
from torch import Tensor

import writesae as ws
from annotations import CHECKED, calls, sparing
from edit_cases import annotations_unchecked


def product(x: Float[Tensor, "n d"], y: Float[Tensor, "d m"]) -> Float[Tensor, "n m"]:
    return x @ y if len(x) > 1 else x


def longer(words: list[str], by: "int" = 1) -> "int":
    return len(words) + by if by else None  # type: ignore[return-value]


def adding(n: int) -> Callable[[int], int]:
    def add(x: int) -> int:
        return x + n

    return sparing(add, typechecker=beartype)


def test_what_is_checked() -> None:
    with_shapes, without = (sparing(typechecker=beartype)(fn) for fn in (product, longer))
    two, three = torch.zeros(2, 3), torch.zeros(3, 2)
    assert with_shapes(two, three).shape == (2, 2) and without(["a"], by=2) == 3
    with pytest.raises(TypeCheckError):
        with_shapes(two, two)
    for fn, given in ((with_shapes, (two[:1], three)), (without, ("a",)), (without, ([], 0))):  # what comes back, too
        with pytest.raises(TypeCheckError):
            fn(*given)
        with annotations_unchecked():
            fn(*given)
    assert adding(1)(0.5) == 1.5, "an inner function is left as it is"  # type: ignore[arg-type]


def test_the_package_is_checked() -> None:
    assert jaxtyping.jaxtyped is sparing
    with pytest.raises(TypeCheckError, match="kl_divergence"):
        ws.kl_divergence("logits", torch.zeros(1, 3))  # type: ignore[arg-type]
    with pytest.raises(TypeCheckError, match="to_single_token"):
        ws.HookedRecurrentModel.to_single_token(None, 0.5)  # type: ignore[arg-type]


def test_a_function_that_runs_by_the_thousand_is_checked_at_its_first_calls() -> None:
    without = sparing(longer, typechecker=beartype)
    for _ in range(CHECKED - 1):
        without(["a"], by=2)
    with pytest.raises(TypeCheckError):
        without(["a"], by=0)
    assert without(["a"], by=0) is None and without(["a"], by=2) == 3
    calls.clear()  # as before the next test
    with pytest.raises(TypeCheckError):
        without(["a"], by=0)
