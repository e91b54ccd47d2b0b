"""Sizes that the model's own code asks for: what was recorded is refused for others, never run."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import interop
from interop.errors import ProgramError
from interop.program.encoding import decode_model, encode_model
from interop.program.guards import holds, sizes_in


class Branch(torch.nn.Module):
    """Another factor where the test of the sizes holds."""

    def __init__(self, test):
        super().__init__()
        self.test = test

    def forward(self, x):
        return x * 2 if self.test(*x.shape) else x * 3


@pytest.mark.parametrize(
    ("test", "example", "same", "other"),
    [
        (lambda n, h, w: n > 4, (2, 4, 4), (4, 4, 4), (8, 4, 4)),
        (lambda n, h, w: n > 4, (6, 4, 4), (5, 4, 4), (2, 4, 4)),
        (lambda n, h, w: n % 2 == 0, (4, 4, 4), (6, 4, 4), (7, 4, 4)),
        (lambda n, h, w: n != 3, (7, 4, 4), (2, 4, 4), (3, 4, 4)),
        (lambda n, h, w: h > w, (2, 5, 4), (3, 9, 8), (2, 4, 5)),
        (lambda n, h, w: h // 2 == 3 or w * h < 20, (2, 6, 9), (2, 7, 8), (2, 8, 8)),
    ],
)
def test_the_branch_that_was_not_recorded_is_refused(test, example, same, other, tmp_path):
    module = Branch(test)
    model = interop.from_torch(module, torch.ones(example), dynamic_dims=(0, 1, 2))
    interop.save(model, tmp_path)
    for found in (model, interop.load(tmp_path)):
        np.testing.assert_array_equal(found(jnp.ones(same)), module(torch.ones(same)).numpy())
        with pytest.raises(ValueError, match=r"asks for sizes(?s:.*)found s\d+ = "):
            found(jnp.ones(other))
    assert not np.array_equal(module(torch.ones(example))[:1, :1, :1], module(torch.ones(other))[:1, :1, :1])


def test_a_loop_over_the_batch_fixes_its_size():
    class Loop(torch.nn.Module):
        def forward(self, x):
            return sum(x[i] * (i + 1) for i in range(x.shape[0]))

    model = interop.from_torch(Loop(), torch.ones(4, 3))
    np.testing.assert_array_equal(model(jnp.ones((4, 3))), np.full(3, 10.0))
    with pytest.raises(ValueError, match=r"expected the shape \(4, 3\), found \(6, 3\)"):
        model(jnp.ones((6, 3)))


@given(st.integers(0, 40), st.integers(1, 40))
def test_conditions_are_computed_as_python_computes_them(a, b):
    for condition in (
        "(a % 2) == 0", "a // b <= 3 and not a == b", "max(a, b) - min(a, b) > 2 or a < 5", "math.floor(a / b) == 2",
        "2 <= a < b", "(a if a > b else b) != 7", "-a + b**2 >= 3",
    ):  # fmt: skip
        assert holds(condition, {"a": a, "b": b}) == bool(
            eval(condition, {"math": __import__("math")}, {"a": a, "b": b})
        )
        assert sizes_in(condition) == {"a", "b"} & set(condition.replace("max(", "").replace("math", ""))


@pytest.mark.parametrize(
    "condition",
    [
        "__import__('os')",
        "a.real",
        "[a][0]",
        "a <",
        "(lambda: 1)()",
        "a if a else 'x'",
        "open(a)",
        "9**9**9",
        "(" * 5000,
    ],
)
def test_nothing_but_conditions_is_read(condition):
    with pytest.raises(ProgramError):
        holds(condition, {"a": 0})


@pytest.mark.parametrize("guard", ["__import__('os')", "unknown > 2"])
def test_an_artifact_with_another_guard_is_refused(guard):
    model = interop.from_torch(Branch(lambda n, h, w: n > 4), torch.ones(2, 4, 4))._interop.model
    changed = dataclasses.replace(model, eval=dataclasses.replace(model.eval, guards=(guard,)))
    with pytest.raises(ProgramError, match=r"condition on sizes|not about the inputs' sizes"):
        decode_model(encode_model(changed))


def test_a_size_of_zero_under_a_division_does_not_hold():
    assert not holds("12 % a == 0", {"a": 0})
