"""PyTorch in, PyTorch out: models and checkpoints to JAX and back. torch is imported only where its objects arrive."""
