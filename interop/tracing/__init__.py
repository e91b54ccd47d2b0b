"""torch.nn.Module -> program. The one room that needs torch."""
