"""Names and layouts of arrays and settings between PyTorch and Flax."""
