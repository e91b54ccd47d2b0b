"""How each operation is written: one file for each kind."""

from interop.porting.printers import (  # noqa: F401
    elementwise,
    layers,
    making,
    matrices,
    patches,
    pooling,
    random,
    recurrent,
    reducing,
    resizing,
    shaping,
)
