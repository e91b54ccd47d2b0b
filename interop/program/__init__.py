"""A model's graph as plain data: what tracing writes, files keep and running runs. Knows no torch and no JAX."""
