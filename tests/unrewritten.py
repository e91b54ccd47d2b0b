"""Code with an `assert` that pytest does not write anew, as it does in the tests' own files."""

import torch


def asserted(self, y):
    assert (y < 100).all() and not torch.isnan(y).any(), "out of range"
    return y
