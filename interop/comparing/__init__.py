"""A Flax model against its PyTorch origin, layer by layer: where they part, and why."""
