"""An exported graph of torch.fx, read into plain nodes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from interop.arrays import dtype_name
from interop.program.nodes import DType, Input, Node, State, Value
from interop.program.operations import DROPPED
from interop.tracing import private
from interop.tracing.state import Constants

if TYPE_CHECKING:
    import torch

# (x, p, train) -> x unless they train with p > 0.
_DROPOUTS = frozenset(f"aten.{kind}dropout.default" for kind in ("", "alpha_", "feature_", "feature_alpha_"))
_HERE = os.path.dirname(__file__)
# Where and how a tensor is stored, which is JAX's business.
_STORAGE = frozenset({"device", "layout", "pin_memory", "memory_format", "requires_grad"})

_TOKEN = Value("token")


def operation_name(target: torch.fx.node.Target) -> str:
    """`aten.conv2d.default`, `operator.add`, `math.floor`, `torch.sym_max`: what names an operation in a program."""
    if private.is_operation(target):
        return str(target)
    module = getattr(target, "__module__", "") or ""
    name = getattr(target, "__name__", str(target))
    return f"{module.lstrip('_')}.{name}"


def _ordered(node: torch.fx.Node) -> str:
    """The name of the operation that the higher-order `with_effects(token, operation, *args)` runs, or of its own."""
    return operation_name(node.args[1] if node.target.__name__ == "with_effects" else node.target)


def written_by(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The tensors that the node writes to."""
    import torch

    if not private.is_operation(node.target) or node.target is torch.ops.aten.detach_.default:
        return []
    found: list[Any] = []
    for index, argument in enumerate(private.schema(node.target).arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            found += given if isinstance(given, (list, tuple)) else [given]
    return [tensor for tensor in found if tensor is not None]


class GraphReader:
    """Reads one exported program: `inputs`, `nodes`, `output` and `updates`, as `interop.program.nodes` has them."""

    def __init__(self, module: torch.nn.Module, exported: torch.export.ExportedProgram, constants: Constants):
        self.inputs: list[Input] = []
        self.user_inputs: list[Any] = []
        self.nodes: list[Node] = []
        self.updates: dict[str, Value | State] = {}
        self.output: Any = None
        self._exported, self._constants = exported, constants
        self._values: dict[str, Value | State] = {}
        self._names = {path for path, _ in module.named_modules()}

    def read(self) -> None:
        """Reads the whole graph."""
        self._read_inputs()
        for node in self._exported.graph.nodes:
            if node.op == "call_function":
                self._read_call(node)
            elif node.op == "get_attr":
                self._values[node.name] = State(self._constants.add(getattr(self._exported.graph_module, node.target)))
            elif node.op == "output":
                self._read_output(node)

    def _read_inputs(self) -> None:
        from torch.export.graph_signature import ConstantArgument, InputKind

        placeholders = {node.name: node for node in self._exported.graph.nodes if node.op == "placeholder"}
        for spec in self._exported.graph_signature.input_specs:
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                self._values[spec.arg.name] = State(spec.target)
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                if placeholders[spec.arg.name].users:
                    self._values[spec.arg.name] = State(self._constants.add(self._exported.constants[spec.target]))
            elif spec.kind is InputKind.TOKEN:  # orders operations with effects, of which `DROPPED` has none left
                self._values[spec.arg.name] = _TOKEN
            elif spec.kind is InputKind.USER_INPUT and isinstance(spec.arg, ConstantArgument):
                self.user_inputs.append(spec.arg.value)
            elif spec.kind is InputKind.USER_INPUT:
                tensor = placeholders[spec.arg.name].meta["val"]
                shape = tuple(_size(size) for size in tensor.shape)
                self.inputs.append(Input(spec.arg.name, shape, dtype_name(tensor.dtype)))
                self._values[spec.arg.name] = Value(spec.arg.name)
                self.user_inputs.append(Value(spec.arg.name))
            else:
                raise ValueError(
                    f"the graph takes an input of the kind {spec.kind.name}, which has no counterpart: {spec.target}"
                )

    def _read_call(self, node: torch.fx.Node) -> None:
        name = operation_name(node.target)
        if name in DROPPED:
            return
        first = node.args[0] if node.args else None
        if self._values.get(getattr(first, "name", "")) is _TOKEN and _ordered(node) in (*DROPPED, "operator.getitem"):
            self._values[node.name] = _TOKEN
            return
        if name in _DROPOUTS and (not node.args[2] or node.args[1] == 0):
            self._values[node.name] = self._values[node.args[0].name]
            return
        self._values[node.name] = Value(node.name)
        self.nodes.append(
            Node(
                name=node.name,
                operation=name,
                args=tuple(self._argument(item) for item in node.args),
                kwargs={key: self._argument(item) for key, item in node.kwargs.items() if key not in _STORAGE},
                module=module_path(node),
                source=source_line(node),
                repeats=repeats(node),
            )
        )

    def _argument(self, item: Any) -> Any:
        import torch

        if isinstance(item, torch.fx.Node):
            return self._values[item.name]
        if isinstance(item, (list, tuple)):
            return [self._argument(inner) for inner in item]
        if isinstance(item, torch.dtype):
            return DType(dtype_name(item))
        if isinstance(item, (torch.device, torch.memory_format, torch.layout)):
            return None
        if item is None or isinstance(item, (bool, int, float, complex, str)):
            return item
        raise ValueError(
            f"the graph has an argument of type {type(item).__qualname__}, which has no counterpart: {item!r}"
        )

    def _read_output(self, node: torch.fx.Node) -> None:
        from torch.export.graph_signature import ConstantArgument, OutputKind

        results = []
        for spec, item in zip(self._exported.graph_signature.output_specs, node.args[0], strict=True):
            if spec.kind in private.mutations():
                self.updates[spec.target] = self._argument(item)
            elif spec.kind is OutputKind.USER_OUTPUT:
                results.append(spec.arg.value if isinstance(spec.arg, ConstantArgument) else self._argument(item))
        self.output = self.structure(private.call_structure(self._exported)[1], iter(results))

    def structure(self, spec: private.TreeSpec, leaves: Iterator[Any]) -> Any:
        """A TreeSpec of torch as `interop.program.nodes.structure` writes it."""
        if spec.is_leaf():
            return ("leaf", next(leaves))
        items = [self.structure(child, leaves) for child in private.parts(spec)]
        if spec.type is tuple:
            return ("tuple", items)
        if spec.type is list:
            return ("list", items)
        fields = getattr(spec.type, "_fields", None) or getattr(spec.context, "_fields", None)
        if fields:
            name = getattr(spec.context, "__name__", None) or spec.type.__name__
            return ("named", name, list(fields), items)
        keys = _keys(spec.context, len(items))
        if keys is not None:
            return ("dict", [list(pair) for pair in zip(keys, items, strict=True)])
        return ("tuple", items)


def size_guards(exported: torch.export.ExportedProgram) -> tuple[str, ...]:
    """What torch.export assumed of the sizes that vary when it recorded the code's branches: `program/guards.py`."""
    import torch

    placeholders = [node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"]
    sizes = [size for tensor in placeholders for size in getattr(tensor, "shape", ()) if isinstance(size, torch.SymInt)]
    varying = {symbol for symbol in map(private.expression, sizes) if symbol.is_symbol}
    if not varying:
        return ()
    conditions = private.assumptions(sizes[0])
    return tuple(
        dict.fromkeys(private.as_python(c) for c in conditions if c.free_symbols and c.free_symbols <= varying)
    )


def _size(size: int | torch.SymInt) -> int | str:
    """A number, also where torch.export found that a varying size has to be this one; otherwise its name."""
    if isinstance(size, int):
        return size
    expression = private.expression(size)
    return int(expression) if expression.is_number else str(size)


def _keys(context: Any, count: int) -> list[str | int] | None:
    """The keys of a dict, an OrderedDict, a defaultdict, or a registered class whose context holds them."""
    candidates = [context, *(context if isinstance(context, (list, tuple)) else ())]
    for candidate in candidates:
        fits = isinstance(candidate, (list, tuple)) and len(candidate) == count
        if fits and all(isinstance(key, (str, int)) for key in candidate):
            return list(candidate)
    return None


def module_path(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next((entry[0] for entry in reversed(list(stack.values()))), "")
    return path() if callable(path) else str(path)


def repeats(node: torch.fx.Node) -> tuple[str, ...]:
    """The modules on the node's stack that are not called for the first time, as `path@number` of the call.

    torch.export numbers calls in the keys of the stack: `L__self__layer1.0.relu@2` (`_ModuleStackTracer` in
    torch/fx/experimental/proxy_tensor.py).
    """
    found = []
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        _, at, number = str(key).rpartition("@")
        if at and number.isdecimal() and int(number):
            found.append(f"{path() if callable(path) else path}@{number}")
    return tuple(found)


def source_line(node: torch.fx.Node) -> str:
    """`file.py:12: code` of the innermost line outside torch's own modules, without the machine's folders."""
    lines = (node.meta.get("stack_trace") or "").splitlines()
    frames = []
    for index, line in enumerate(lines):
        line = line.strip()
        if line.startswith('File "') and '", line ' in line:
            file, _, rest = line[6:].partition('", line ')
            code = lines[index + 1].strip() if index + 1 < len(lines) else ""
            parts = file.replace("\\", "/").split("/")
            if parts[-3:-1] == ["nn", "modules"] or file.startswith("<") or os.path.dirname(file) == _HERE:
                continue
            frames.append(f"{'/'.join(parts[-2:])}:{rest.split(',')[0]}: {code}")
    return frames[-1] if frames else ""
