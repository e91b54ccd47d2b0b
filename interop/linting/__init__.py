"""What looks wrong in a checkpoint or a model."""
