"""Names of operations that mean something to more than one room."""

BATCH_NORM = "jaxnorm.batch_norm.default"
"""A whole BatchNorm layer: `(x, path)`, or `(x, path, mask, dim)` where the mask says which of the dimension count."""

CHECK = "jaxnorm.check.default"
"""A check of values in the model's code: `(condition, expected, message)`."""

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
