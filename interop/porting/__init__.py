"""A PyTorch model as Flax source: a program and its module tree, written as a person would have."""
