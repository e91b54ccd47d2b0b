"""The few calls of a PyTorch pickle that stand for data, and what they mean.

Every name below is answered by a function of this file, which makes tensors, containers, numbers or strings out of the
arguments; the function that the pickle names is never looked up. A class gives a stand-in (`Instance`), and any other
call one too (`Called`), which keeps its name: an error only where a tensor is wanted.
"""

import dataclasses
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from interop import dtypes
from interop.files.keys import check_keys
from interop.files.stand_ins import Called, Global, Instance, UnpickleError, name_of
from interop.files.tensors import MAX_DIMENSIONS, Storage, Tensor


class Unsupported:
    """A tensor of a kind that is no array (sparse, quantized, without data). An error only where it is wanted."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __repr__(self) -> str:
        return f"<no array: {self.reason}>"


def call(function: Global, args: tuple[Any, ...]) -> Any:
    """What `function(*args)` describes: data where the call is known to stand for some, else a stand-in with its name.

    Raises UnpickleError for a known call with arguments that it cannot have.
    """
    rebuild = _CALLS.get(str(function))
    if rebuild is not None:
        try:
            return rebuild(function, *args)
        except TypeError as error:
            raise UnpickleError(f"calls {function} with {len(args)} arguments: {error}") from error
    if is_class(function):
        return Instance(function, args)
    return Called(function, args)


def build(value: Any, state: Any) -> bool:
    """Applies the state of an object that is no stand-in; False if there is no such thing."""
    if isinstance(value, OrderedDict):
        # torch.nn.Module.state_dict keeps the versions of its modules here
        if isinstance(state, dict) and isinstance(state.get("_metadata"), dict):
            value._metadata = state["_metadata"]  # type: ignore[attr-defined]
        return True
    if isinstance(value, _Array):
        value.set(state)
        return True
    if isinstance(value, _DType):
        value.set(state)
        return True
    # a parameter's or a subclass's Python attributes
    return isinstance(value, Tensor | Unsupported)


def finish(value: Any) -> Any:
    """The value itself, where the pickle built it in two steps."""
    return value.array if isinstance(value, _Array) else value


def is_class(function: Global) -> bool:
    """Whether the name is that of a class: by its capital (PEP 8), or because it is known as one."""
    last = function.name.rpartition(".")[2].lstrip("_")
    return last[:1].isupper() or str(function) in _CLASSES


# tensors


def _tensor(function: Global, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor | Unsupported:
    """torch._utils._rebuild_tensor, _v2(..., requires_grad, hooks, metadata), _v3(..., hooks, dtype, metadata)."""
    if not isinstance(storage, Storage) or type(size) is not tuple or type(stride) is not tuple:
        raise UnpickleError("builds a tensor from something else than storage, offset, size and stride")
    dtype = storage.dtype
    if function.name == "_rebuild_tensor_v3":
        if len(rest) < 3:
            raise UnpickleError("builds a tensor without its dtype")
        dtype = as_dtype(rest[2])
        rest = rest[:2] + rest[3:]
    flags = rest[2] if len(rest) > 2 and isinstance(rest[2], dict) else {}
    if dtype is None:
        return _unsupported("its dtype is not one that NumPy can hold")
    return Tensor(
        storage, dtype, size, offset, stride, conjugate=flags.get("conj") is True, negative=flags.get("neg") is True
    )


def _parameter(function: Global, data: Any, *rest: Any) -> Any:
    return data


def _converted(function: Global, data: Any, dtype: Any, *rest: Any) -> np.ndarray | Tensor | Unsupported:
    """torch._utils._rebuild_device_tensor_from_numpy, _from_cpu_tensor: a device's tensor, stored as another dtype."""
    data, target = finish(data), as_dtype(dtype)
    if isinstance(data, np.ndarray) and target is not None:
        return data.astype(target)
    if isinstance(data, Tensor) and target is not None:
        return dataclasses.replace(data, cast=None if target == data.dtype else target)
    return _unsupported(f"a device's tensor of {name_of(dtype)}")


def _from_type(function: Global, rebuild: Any, cls: Any, args: Any, state: Any = None) -> Any:
    """torch._tensor._rebuild_from_type_v2: a tensor with Python attributes, or of a subclass."""
    if not isinstance(rebuild, Global) or type(args) is not tuple or str(rebuild) not in _TENSORS:
        return _unsupported(f"of class {name_of(cls)}")
    return _TENSORS[str(rebuild)](rebuild, *args)


def _unsupported(reason: str) -> Unsupported:
    return Unsupported(reason)


def _no_array(function: Global, *args: Any) -> Unsupported:
    return Unsupported(f"built by {function}: sparse, quantized, nested and meta tensors are no arrays")


def as_dtype(value: Any) -> np.dtype | None:
    """NumPy's dtype for a stand-in of torch.float32 and the like; None if there is none."""
    if isinstance(value, Global) and value.module == "torch":
        return dtypes.TORCH_ALIASES.get(value.name)
    return None


# NumPy


class _DType:
    def __init__(self, dtype: np.dtype | None) -> None:
        self.dtype = dtype

    def set(self, state: Any) -> None:
        """NumPy's state of a dtype is (version, byte order, ...)."""
        if self.dtype is not None and isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


class _Array:
    """An array whose contents arrive with its state, as NumPy pickles them."""

    def __init__(self) -> None:
        self.array: np.ndarray | Unsupported = Unsupported("a NumPy array without contents")

    def set(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 5:
            raise UnpickleError("has a NumPy array with an unknown state")
        _, shape, dtype, fortran, content = state[:5]
        self.array = _contents(content, dtype, shape, "F" if fortran is True else "C")


def _contents(content: Any, dtype: Any, shape: Any, order: str) -> np.ndarray | Unsupported:
    if isinstance(content, str):  # Python 2's bytes
        content = content.encode("latin-1")
    if not isinstance(dtype, _DType) or dtype.dtype is None or not isinstance(content, bytes):
        return Unsupported("a NumPy array of objects or strings")
    if type(shape) is not tuple or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > MAX_DIMENSIONS:
        raise UnpickleError("has a NumPy array without a proper shape")
    flat = np.frombuffer(content, dtype.dtype) if content else np.empty(0, dtype.dtype)
    return dtypes.native(flat.reshape(shape, order="F" if order == "F" else "C"))


def _numpy_dtype(function: Global, name: Any, *rest: Any) -> _DType:
    text = name.name if isinstance(name, Global) else name
    if not isinstance(text, str) or len(text) > 20:
        return _DType(None)
    if text in dtypes.TORCH:
        return _DType(dtypes.TORCH[text])
    simple = text.lstrip("<>=|")
    if simple[:1] in "biufc" and simple[1:].isdigit() and int(simple[1:]) <= 16:
        try:
            return _DType(np.dtype(text))
        except TypeError:
            return _DType(None)
    return _DType(None)


def _numpy_scalar(function: Global, dtype: Any, content: Any = None) -> np.generic | np.ndarray | Unsupported:
    value = _contents(content, dtype, (), "C")
    return value[()] if isinstance(value, np.ndarray) else Unsupported("a NumPy scalar of objects or strings")


def _numpy_array(function: Global, *args: Any) -> _Array:
    return _Array()


def _numpy_buffer(
    function: Global, content: Any, dtype: Any, shape: Any, order: Any, *rest: Any
) -> np.ndarray | Unsupported:
    return _contents(content, dtype, shape, "F" if order == "F" else "C")


# Python's own


def _pairs(items: Any) -> dict[Any, Any]:
    if isinstance(items, dict):
        return items
    if isinstance(items, list | tuple) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in items):
        check_keys(key for key, _ in items)
        return dict(items)
    raise UnpickleError("has a mapping made from something else than pairs")


def _ordered_dict(function: Global, items: Any = (), *rest: Any) -> OrderedDict[Any, Any]:
    return OrderedDict(_pairs(items))


def _dict(function: Global, items: Any = (), *rest: Any) -> dict[Any, Any]:
    return dict(_pairs(items))


def _default_dict(function: Global, factory: Any = None, items: Any = ()) -> defaultdict[Any, Any]:
    return defaultdict(None, _pairs(items))  # the factory would be a call


def _counter(function: Global, items: Any = ()) -> dict[Any, Any]:
    counter: Counter[Any] = Counter()
    dict.update(counter, _pairs(items))
    return counter


def _sequence(kind: type) -> Callable[..., Any]:
    def make(function: Global, items: Any = (), *rest: Any) -> Any:
        if not isinstance(items, list | tuple | set):
            raise UnpickleError(f"makes a {function} from {name_of(items)}")
        if kind in (set, frozenset):
            check_keys(items)
        return kind(items)

    return make


def _encode(function: Global, text: Any = "", encoding: Any = "latin1") -> bytes:
    """_codecs.encode, bytes and bytearray as protocol 2 writes them: text that is bytes in Latin-1."""
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise UnpickleError(f"makes bytes from {name_of(text)} with the encoding {name_of(encoding)}")
    return text.encode("latin-1")


def _complex(function: Global, real: Any = 0.0, imaginary: Any = 0.0) -> complex:
    if not isinstance(real, float | int) or not isinstance(imaginary, float | int):
        raise UnpickleError("makes a complex number from something else than two numbers")
    return complex(real, imaginary)


def _attribute(function: Global, owner: Any, name: Any, *default: Any) -> Any:
    """getattr: a class's attribute (a nested class, a method) is a name again, anything else a stand-in."""
    if isinstance(owner, Global) and isinstance(name, str):
        return Global(owner.module, f"{owner.name}.{name}")
    return Instance(function, (owner, name))


def _reconstructed(function: Global, cls: Any, base: Any = None, state: Any = None, *rest: Any) -> Instance:
    """copyreg._reconstructor(class, base, state) and copyreg.__newobj__(class, *args): an object, not yet filled."""
    if not isinstance(cls, Global):
        raise UnpickleError(f"makes an object of {name_of(cls)}")
    instance = Instance(cls)
    if isinstance(state, dict):
        instance.items.update(state)
    elif isinstance(state, list | tuple | set):
        instance.elements.extend(state)
    return instance


_TENSORS: Final[dict[str, Callable[..., Any]]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_device_tensor_from_numpy": _converted,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _converted,
    "torch._utils._rebuild_xla_tensor": _converted,
    "torch._tensor._rebuild_from_type": lambda function, rebuild, cls, args, state=None: _from_type(
        function, rebuild, cls, args
    ),
    "torch._tensor._rebuild_from_type_v2": _from_type,
    **{
        f"torch._utils._rebuild_{kind}": _no_array
        for kind in ("sparse_tensor", "sparse_csr_tensor", "qtensor", "nested_tensor", "wrapper_subclass")
    },
    "torch._utils._rebuild_meta_tensor_no_storage": _no_array,
    "torch.nested._internal.nested_tensor._rebuild_njt": _no_array,
}

_CALLS: Final[dict[str, Callable[..., Any]]] = {
    **_TENSORS,
    "torch.Size": _sequence(tuple),
    "torch.serialization._get_layout": lambda function, name: name,
    "numpy.dtype": _numpy_dtype,
    **{
        f"numpy.{core}.{name}": rebuild
        for core in ("core", "_core")
        for name, rebuild in (
            ("multiarray.scalar", _numpy_scalar),
            ("multiarray._reconstruct", _numpy_array),
            ("numeric._frombuffer", _numpy_buffer),
        )
    },
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": _default_dict,
    "collections.Counter": _counter,
    "builtins.dict": _dict,
    "builtins.list": _sequence(list),
    "builtins.tuple": _sequence(tuple),
    "builtins.set": _sequence(set),
    "builtins.frozenset": _sequence(frozenset),
    "builtins.bytes": _encode,
    "builtins.bytearray": _encode,
    "_codecs.encode": _encode,
    "builtins.complex": _complex,
    "builtins.getattr": _attribute,
    "copyreg._reconstructor": _reconstructed,
    "copyreg.__newobj__": _reconstructed,
}

# classes with lower-case names whose objects training scripts keep in their checkpoints
_CLASSES: Final = frozenset(
    {
        *(f"builtins.{name}" for name in ("object", "slice", "range", "int", "float", "str", "bool", "type")),
        *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
        *("collections.deque", "functools.partial", "array.array", "torch.device", "torch.dtype", "torch.finfo"),
        *(f"operator.{name}" for name in ("attrgetter", "itemgetter", "methodcaller")),
    }
)
