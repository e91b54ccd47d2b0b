"""What docs/lint.md takes for granted: a checkpoint with a fault."""

import torch

import interop

layer = torch.nn.BatchNorm2d(3)
layer.running_var[1] = -1
torch.save({"state_dict": torch.nn.Sequential(layer).state_dict(), "epoch": 3}, "model_best.pth.tar")


def in_what_lint_finds(names):
    assert not interop.lint(torch.nn.Sequential(torch.nn.BatchNorm2d(3)))  # "a healthy model gives an empty list"
    yield
    found = names["finding"]
    assert (found.severity, found.rule, found.layer) == ("error", "variance", "0")
