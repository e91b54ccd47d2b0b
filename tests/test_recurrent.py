"""Recurrent layers: any length, PyTorch's numbers, packed sequences as masks."""

import numpy as np
import pytest
import torch
from parity_tools import assert_same_step, flat, jax_eval, jax_step, normal, randomised, relative, torch_step
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import interop


class Recurrent(nn.Module):
    """A recurrent layer, padded or packed."""

    def __init__(self, kind, packed=None, **flags):
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.rnn = getattr(nn, kind)(5, 6, **flags)
        self.packed = packed

    def forward(self, x, lengths=None):
        if lengths is None:
            return self.rnn(x)
        first = self.rnn.batch_first
        packed = pack_padded_sequence(x, lengths, first, enforce_sorted=self.packed == "sorted")
        packed = PackedSequence(self.norm(packed.data), *packed[1:])
        output, state = self.rnn(packed)
        return *pad_packed_sequence(output, first, 0.5, total_length=x.shape[1 if first else 0]), state


def assert_same(module, model, *inputs):
    module.eval()
    model.eval()
    arrays = [x.numpy() for x in inputs]
    for found, expected in zip(flat(jax_eval(model, *arrays)), flat(module(*inputs)), strict=True):
        assert relative(found, expected.detach()) < 1e-12
    module.train()
    model.train()
    assert_same_step(jax_step(model, *arrays), torch_step(module, *inputs), 1e-10)


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("GRU", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
        ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 4}),
        ("RNN", {"nonlinearity": "relu", "bias": False}),
    ],
)
def test_a_recurrent_layer_runs_at_any_length_as_in_pytorch(kind, flags):
    module = randomised(Recurrent(kind, **flags)).train()
    model = interop.from_torch(module, normal(4, 9, 5), dynamic_dims=(0, 1))
    assert_same(module, model, normal(7, 3, 5))


@pytest.mark.parametrize(
    ("kind", "packed", "flags"),
    [
        ("GRU", "sorted", {"batch_first": True}),
        ("LSTM", "unsorted", {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    ],
)
def test_a_packed_sequence_ends_where_its_length_says_batch_norm_of_its_data_included(kind, packed, flags):
    module = randomised(Recurrent(kind, packed, **flags)).train()
    first = module.rnn.batch_first
    model = interop.from_torch(module, normal(4, 4, 5), torch.tensor([4, 3, 3, 1]), dynamic_dims=(0, 1))
    lengths = torch.tensor([6, 5, 1] if packed == "sorted" else [1, 6, 5])
    assert_same(module, model, normal(3, 7, 5) if first else normal(7, 3, 5), lengths)


def test_a_packed_sequence_of_the_caller_is_refused():
    class Inside(Recurrent):
        def forward(self, x):
            return self.rnn(PackedSequence(x[0], torch.tensor([2, 1])))[0].data

    with pytest.raises(interop.TraceError, match="pack_padded_sequence did not make"):
        interop.from_torch(Inside("GRU"), torch.zeros(2, 3, 5))


@pytest.mark.parametrize(
    "cell", [nn.LSTMCell(5, 6), nn.GRUCell(5, 6), nn.RNNCell(5, 6), nn.RNNCell(5, 6, True, "relu")]
)
def test_cells_compute_what_pytorchs_do(cell):
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = cell

        def forward(self, x):
            return self.cell(x[:, 1], self.cell(x[:, 0]))

    module = randomised(Cell()).train()
    assert_same(module, interop.from_torch(module, normal(4, 2, 5)), normal(3, 2, 5))


def test_dropout_between_layers_draws_in_training_alone():
    module = nn.GRU(5, 6, 2, dropout=0.5).double()
    model = interop.from_torch(module, normal(4, 3, 5))
    x = normal(4, 3, 5).numpy()
    assert np.abs(model(x)[0] - model(x)[0]).max() > 0
    model.eval()
    assert relative(model(x)[0], module.eval()(torch.from_numpy(x))[0].detach()) < 1e-12


def test_more_steps_are_no_more_nodes():
    """A step at a time, 200 steps took 18 s to import."""
    programs = [interop.from_torch(nn.LSTM(5, 6, 2), torch.zeros(n, 2, 5))._interop.model.train for n in (2, 400)]
    assert len(programs[0].nodes) == len(programs[1].nodes) < 20
