"""A training step whose state lies in memory as its compiler prefers.

PyTorch's kernels are (O, I, H, W). A TPU's program for an imported ResNet-18 that takes them in their usual layout
turns some around at each step and convolves with the others as they are: 1.08 times the cycles of the model written by
hand. With `Layout.AUTO` the compiler says how it would have them, they are turned once, before the first step, and the
same program takes 1.00 times the cycles (v5e:2x4, bfloat16, libtpu 0.0.42). Shapes, values and what is saved stay the
same.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding

from jaxnorm._typing import PyTree


class PreferredLayouts:
    """`jax.jit(function)` for `function(state, batch) -> (state, more)`, compiled for each state's and batch's shapes.

    `state`, `batch` and `more` are the shardings of all their arrays.
    """

    def __init__(
        self,
        function: Callable[[Any, Any], tuple[Any, Any]],
        *,
        state: Sharding,
        batch: Sharding,
        more: Sharding,
        donate: bool,
    ) -> None:
        any_layout = Format(Layout.AUTO, state)
        self.jitted = jax.jit(
            function,
            in_shardings=(any_layout, batch),
            out_shardings=(any_layout, more),
            donate_argnums=(0,) if donate else (),
            keep_unused=True,  # else the layouts are counted without what is unused
        )
        self.programs: dict[Any, tuple[jax.stages.Compiled, PyTree]] = {}

    def trace(self, state: PyTree, batch: PyTree) -> jax.stages.Traced:
        """The program for arrays, or `jax.ShapeDtypeStruct`s, of these shapes."""
        return self.jitted.trace(*jax.tree.map(_shaped, (state, batch)))

    def __call__(self, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            return self.jitted(state, batch)
        leaves, structure = jax.tree.flatten((state, batch))
        precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]  # of where it is called
        kind = structure, tuple((x.shape, x.dtype) for x in leaves), precision
        if kind not in self.programs:
            program = self.trace(state, batch).lower().compile()
            self.programs[kind] = program, jax.tree.map(_where, program.input_formats[0][0], state)
        program, formats = self.programs[kind]
        return program(jax.device_put(state, formats), batch)


def _shaped(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _where(preferred: Format, x: Any) -> Format | Sharding | None:
    """Keys of random numbers have the layout of the words that they are made of, which device_put does not take."""
    return preferred.sharding if jnp.issubdtype(x.dtype, jax.dtypes.extended) else preferred
