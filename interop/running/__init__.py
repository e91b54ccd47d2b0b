"""The Flax module that runs a program, and the artifact that keeps it."""
