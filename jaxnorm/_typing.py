"""Array annotations: jaxtyping's names where it is installed, and stand-ins that accept any shape where it is not.

jaxtyping is a tool of the tests (which check every annotation by its import hook), not a dependency of the library.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["Array", "Bool", "Float", "Inexact", "Int", "Integer", "Num", "PRNGKeyArray", "PyTree", "Shaped"]

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Inexact, Int, Integer, Num, PRNGKeyArray, PyTree, Shaped
else:
    try:
        from jaxtyping import Array, Bool, Float, Inexact, Int, Integer, Num, PRNGKeyArray, PyTree, Shaped
    except ImportError:
        from jax import Array

        class _AnyShape:
            """`Float[Array, "channels"]` gives `Array`; a bare `PyTree` says nothing."""

            def __class_getitem__(cls, item: Any) -> Any:
                return item[0] if isinstance(item, tuple) else Any

        Bool = Float = Inexact = Int = Integer = Num = PyTree = Shaped = _AnyShape
        PRNGKeyArray = Array
