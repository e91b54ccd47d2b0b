"""torch.optim and optax: rules, state, schedules."""
