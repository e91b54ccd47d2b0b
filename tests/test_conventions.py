"""Conversions between the frameworks' conventions invert exactly."""

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interop.conventions import FLAX_NAMES, TORCH_NAMES, flax_momentum, torch_momentum


@given(st.floats(0, 1))
def test_momentum_converts_both_ways_exactly(momentum):
    assert torch_momentum(flax_momentum(momentum)) == momentum
    assert flax_momentum(torch_momentum(momentum)) == momentum


@pytest.mark.parametrize(("torch", "flax"), [(0.1, 0.9), (0.01, 0.99), (0.9, 0.1), (0.3, 0.7), (0.0, 1.0), (1.0, 0.0)])
def test_momentum_is_the_complement_that_people_write(torch, flax):
    assert flax_momentum(torch) == flax
    assert torch_momentum(flax) == torch
    assert torch_momentum(float(flax)) == torch  # typed in, not converted


def test_the_cumulative_average_stays_itself():
    assert flax_momentum(None) is None
    assert torch_momentum(None) is None


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_converted_momentum_survives_copies(clone):
    assert torch_momentum(clone(flax_momentum(1e-20))) == 1e-20


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
def test_a_momentum_out_of_range_is_an_error(wrong):
    with pytest.raises(ValueError, match="from 0 to 1"):
        flax_momentum(wrong)


def test_names_invert():
    assert {FLAX_NAMES[torch]: torch for torch in FLAX_NAMES} == dict(TORCH_NAMES)
