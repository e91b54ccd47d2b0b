"""Names of operations that mean something to more than one room."""

BATCH_NORM = "jaxnorm.batch_norm.default"
"""A whole BatchNorm layer: `(x, path)`, or `(x, path, mask, dim)` where the mask says which of the dimension count."""

CHECK = "jaxnorm.check.default"
"""A check of values in the model's code: `(condition, expected, message)`."""

CUSTOM_GRADIENT = "jaxnorm.custom_gradient.default"
"""`(inputs, outputs, backward)`: the outputs, whose gradients go to the inputs as `backward` (a `Backward`) says and
nowhere else. A `torch.autograd.Function`."""

GRADIENT_OF = "jaxnorm.gradient_of.default"
"""In a record of torch.export only: the stand-in for the gradient of a value."""

MODULE = "jaxnorm.module.default"
"""The call of a module that took the place of one that was recorded: `(x, path)`. Never in a record."""

RUN = frozenset({BATCH_NORM, CUSTOM_GRADIENT, MODULE})
"""Operations that `interop.running` runs itself; every other has a function in `interop.ops`."""

# Checks and hints that compute nothing.
DROPPED = frozenset(
    {
        "aten._assert_scalar.default",
        "aten._assert_async.msg",
        "aten._linalg_check_errors.default",
        "aten._assert_tensor_metadata.default",
        "aten.sym_constrain_range.default",
        "aten.sym_constrain_range_for_size.default",
    }
)
