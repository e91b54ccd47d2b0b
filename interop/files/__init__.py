"""Checkpoints on disk, in and out. Nothing that a file says is executed."""
