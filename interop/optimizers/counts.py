"""What a torch optimizer keeps for a parameter: which entries, and where it counts its steps."""

from collections.abc import Mapping
from typing import Any, Literal

# Fields of optax states and the entries of a torch optimizer's state for one parameter.
# The first entry found in the torch state is taken: RMSprop's mu is its grad_avg, Adam's is its exp_avg.
_ENTRIES = {
    "trace": ("momentum_buffer",),
    "mu": ("exp_avg", "grad_avg"),
    "nu": ("exp_avg_sq", "square_avg"),
    "nu_max": ("max_exp_avg_sq",),
    "sum_of_squares": ("sum",),
    "m": ("exp_avg",),
    "v": ("exp_avg_diff",),
    "n": ("exp_avg_sq",),
    "g": ("neg_pre_grad",),
}
ENTRIES = "entries."  # before the fields of `by_entries.EntriesState`, which have PyTorch's names
PLAIN = ("exp_avg_lr_1",)  # numbers of Python, of double precision


def names(field: str) -> tuple[str, ...]:
    """The entries that a field of an optax state can be; none for those that are no parameter's."""
    return (field.removeprefix(ENTRIES),) if field.startswith(ENTRIES) else _ENTRIES.get(field, ())


def kept(group: Mapping[str, Any]) -> Literal["none", "group", "number", "tensor"]:
    """Where the optimizer of a parameter group counts: nowhere, in the group, or for each parameter.

    There as a number where the optimizer calculates with it as such: with a tensor of float32 it would round.
    """
    if "dampening" in group or ("ns_steps" in group and "fallback_lr_scale" not in group):
        return "none"  # SGD and its like; torch's Muon
    if "betas" in group and ("trust_clip" in group or "no_prox" in group):
        return "group"  # timm's Lamb and Adan
    madgrad = group.keys() >= {"momentum", "eps", "decoupled_decay"} and "alpha" not in group
    if madgrad or "degenerated_to_sgd" in group or "mars_type" in group:
        return "number"  # timm's MADGRAD, AdaBelief, Mars
    counted = ("eps", "lr_decay", "lambd", "etas")  # the last: ASGD, Rprop. Lion has none
    return "tensor" if any(key in group for key in counted) else "none"
