"""What torch does not promise and tracing needs: one test for each, which names what broke on a new torch."""

import ast
import pathlib
import re
import warnings

import pytest
import torch
from torch.export import Dim

import interop
from interop.errors import TorchVersionError
from interop.program import versions
from interop.tracing import private

ROOT = pathlib.Path(__file__).parent.parent
PRIVATE = ROOT / "interop" / "tracing" / "private.py"


def exported(module, *args):
    shapes = [{0: Dim.AUTO} for _ in args]
    return torch.export.export(module, args, dynamic_shapes=shapes, strict=False)


def test_batch_norm_layers_are_known_and_no_others():
    layers = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm3d(2), torch.nn.SyncBatchNorm(2), torch.nn.LazyBatchNorm2d()
    assert all(isinstance(layer, private.batch_norm_class()) for layer in layers)
    assert not isinstance(torch.nn.InstanceNorm2d(2), private.batch_norm_class())
    assert not isinstance(torch.nn.GroupNorm(1, 2), private.batch_norm_class())


def test_dropout_layers_are_known():
    assert isinstance(torch.nn.Dropout2d(), private.dropout_class())


def test_a_layers_tables_are_those_that_it_reads():
    layer = torch.nn.BatchNorm2d(2, affine=False)
    assert private.parameters(layer) == {"weight": None, "bias": None}
    private.buffers(layer)["running_mean"] = mean = torch.ones(2)
    assert layer.running_mean is mean
    parent = torch.nn.Sequential(layer)
    private.children(parent)["0"] = other = torch.nn.Linear(2, 2)
    assert parent[0] is other


def test_hooks_are_seen_where_they_are_kept():
    layer = torch.nn.Linear(2, 2)
    before, after = private.forward_hooks(layer)
    assert not before and not after and not private.has_gradient_hooks(layer)
    layer.register_forward_pre_hook(lambda *_: None)
    layer.register_forward_hook(lambda *_: None)
    assert (len(before), len(after)) == (1, 1)
    for register in (layer.register_full_backward_hook, layer.register_full_backward_pre_hook):
        handle = register(lambda *_: None)
        assert private.has_gradient_hooks(layer)
        handle.remove()
    for register in (layer.weight.register_hook, layer.weight.register_post_accumulate_grad_hook):
        handle = register(lambda _: None)
        assert private.has_tensor_hooks(layer.weight)
        handle.remove()
    assert not private.has_tensor_hooks(layer.weight) and not private.has_gradient_hooks(layer)


def test_an_input_is_refused_as_batch_norm_refuses_it():
    private.input_check(torch.nn.BatchNorm2d(2))(torch.zeros(1, 2, 3, 3))
    with pytest.raises(ValueError, match="expected 4D input"):
        private.input_check(torch.nn.BatchNorm2d(2))(torch.zeros(1, 2))


def test_parameters_without_a_shape_are_known():
    layer = torch.nn.LazyLinear(2)
    assert private.is_uninitialised(layer.weight)
    layer(torch.zeros(1, 3))
    assert not private.is_uninitialised(layer.weight)


def test_tensors_are_no_objects_of_cpp():
    assert not private.is_script_object(torch.zeros(1))
    assert private.is_script_object(torch.classes.quantized.Conv2dPackedParamsBase) is False


def test_views_share_memory_and_copies_do_not():
    x = torch.zeros(4)
    assert private.storage(x) == private.storage(x[1:]) != private.storage(x.clone())


def test_a_write_makes_a_new_version():
    x = torch.zeros(4)
    before = private.version(x)
    x[1:].add_(1)
    assert private.version(x) == before + 1


def test_a_version_is_set_back():
    weight = torch.nn.Parameter(torch.ones(3))
    before = private.version(weight)
    weight.data.fill_(2), weight.detach().fill_(3)
    assert private.version(weight) > before
    private.set_version(weight, before)
    assert private.version(weight) == before


def test_tensors_with_bytes_in_memory_are_known():
    x = torch.ones(2, 3)
    assert private.has_memory(x) and private.has_memory(x.T) and private.has_memory(torch.nn.Parameter(x))
    others = x.to_sparse(), x.to("meta"), torch.nn.LazyLinear(3).weight
    assert not any(map(private.has_memory, others))
    with private.shapes_alone() as fake:
        assert not private.has_memory(fake.from_tensor(x))
    assert private.storage_key(x.untyped_storage()) == private.storage(x)


def test_hooks_on_gradients_are_seen_where_they_are_kept():
    weight = torch.nn.Parameter(torch.ones(3))
    assert private.tensor_hooks(weight) == []
    handle = weight.register_hook(lambda grad: grad)
    assert [len(table) for table in private.tensor_hooks(weight)] == [1]
    handle.remove()


def test_who_switches_modes_in_its_own_way_is_known():
    class Own(torch.nn.Linear):
        def train(self, mode=True):
            return super().train(mode)

    assert private.is_overridden(Own(2, 2), "train") and not private.is_overridden(Own(2, 2), "eval")
    assert not private.is_overridden(torch.nn.MultiheadAttention(4, 2), "train")
    layer = torch.nn.Linear(2, 2)
    assert {private.TABLES[name] for name in private.TABLES if name in vars(layer)} == {"parameter", "buffer", "layer"}


def test_nested_arguments_come_apart_and_together():
    tree = {"a": [torch.zeros(1), 2], "b": (None, 3.0)}
    leaves, spec = private.flatten(tree)
    assert private.unflatten(leaves, spec) == tree
    assert [name for name, _ in private.flatten_with_names(tree)] == ["['a'][0]", "['a'][1]", "['b'][0]", "['b'][1]"]
    assert [part.is_leaf() for part in private.parts(spec)] == [False, False]
    assert len(private.parts(private.parts(spec)[0])) == 2
    assert private.parts(private.flatten(1)[1]) == []


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count.add_(1)
        with torch.no_grad():
            scale = self.fc(x).mean()
        return {"y": x * scale if x.shape[0] > 2 else x}


@pytest.mark.filterwarnings("ignore:.*LeafSpec")  # torch's own, inside run_decompositions
def test_an_exported_program_says_what_it_assumes_and_replaces():
    program = exported(Net(), torch.zeros(4, 3))
    inputs, output = private.call_structure(program)
    assert len(private.parts(inputs)) == 2 and len(private.parts(output)) == 1
    functional = program.run_decompositions({})
    kinds = {spec.kind for spec in functional.graph_signature.output_specs}
    assert kinds & set(private.mutations())
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    assert [node for node in nodes if private.is_gradient_region(node)]
    operation = next(node for node in nodes if node.target is torch.ops.aten.add_.Tensor)
    assert private.is_operation(operation.target) and not private.is_operation(max)
    assert private.schema(operation.target).is_mutable
    size = next(node for node in program.graph.nodes if node.name == "x").meta["val"].shape[0]
    symbol = private.expression(size)
    assert symbol.is_symbol and private.example_size(size) == 4
    texts = [private.as_python(c) for c in private.assumptions(size) if c.free_symbols]
    assert any(eval(text, {str(symbol): 3}) and not eval(text, {str(symbol): 2}) for text in texts)


def test_shapes_that_depend_on_values_are_told_apart():
    program = exported(torch.nn.Sequential(), torch.zeros(4, 3))
    assert not private.depends_on_values(next(iter(program.graph.nodes)).meta["val"].shape)

    class Chosen(torch.nn.Module):
        def forward(self, x):
            return x[x > 0]

    program = exported(Chosen(), torch.zeros(4, 3))
    shapes = [getattr(node.meta.get("val"), "shape", ()) for node in program.graph.nodes]
    assert any(map(private.depends_on_values, shapes))


def test_a_buffers_place_in_the_graph_is_found_while_it_is_recorded():
    found = []

    class Reading(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(3))

        def forward(self, x):
            found.extend(private.graph_nodes([self.scale]))
            return x * self.scale

    exported(Reading(), torch.zeros(4, 3))
    assert [node.op for node in found] == ["placeholder"] and found[0].users


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_a_node_without_readers_is_kept():
    operation = torch.library.custom_op("jaxnorm_test::kept", lambda x: x.clone(), mutates_args=(),
                                        schema="(Tensor x) -> Tensor")  # fmt: skip
    operation.register_fake(lambda x: torch.empty_like(x))
    private.keep(torch.ops.jaxnorm_test.kept.default)

    class Calling(torch.nn.Module):
        def forward(self, x):
            torch.ops.jaxnorm_test.kept(x)
            return x + 1

    program = exported(Calling(), torch.zeros(4, 3)).run_decompositions({})
    assert torch.ops.jaxnorm_test.kept.default in [node.target for node in program.graph.nodes]


def test_shapes_alone_need_no_values():
    layer = torch.nn.Linear(3, 5)
    with private.shapes_alone() as mode, torch.no_grad():
        state = {name: mode.from_tensor(tensor) for name, tensor in layer.named_parameters()}
        y = torch.func.functional_call(layer, state, (mode.from_tensor(torch.zeros(2, 3)),))
    assert y.shape == (2, 5) and type(y) is not torch.Tensor


def test_every_operation_is_seen():
    seen = []

    class Seeing(private.dispatch_mode()):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Seeing():
        torch.zeros(2).add(1)
    assert torch.ops.aten.add.Tensor in seen


def test_what_is_computed_outside_the_trace_is_real_and_not_recorded():
    class Peeking(torch.nn.Module):
        def forward(self, x):
            with private.outside_the_trace():
                assert float(torch.sin(torch.ones(()))) == pytest.approx(0.8414709848)
                assert torch.ones(1, requires_grad=True).exp().requires_grad
            return x + 1

    targets = [str(node.target) for node in exported(Peeking(), torch.zeros(4, 3)).graph.nodes]
    assert "aten.add.Tensor" in targets and not any("sin" in target or "exp" in target for target in targets)


def test_gradients_are_switched_as_by_no_grad_and_not_where_the_mode_is_kept():
    private.set_grad_enabled(False)
    off = torch.is_grad_enabled()
    private.set_grad_enabled(True)
    assert not off and torch.is_grad_enabled()
    with private.grad_mode_kept(), torch.no_grad():
        assert torch.is_grad_enabled()
    with torch.no_grad():
        assert not torch.is_grad_enabled()


def test_a_transformers_mask_is_not_looked_at():
    layer = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(4, 2, 8), 1, enable_nested_tensor=False)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(3)

    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, mask)

    with private.causal_masks_believed():
        torch.export.export(Masked(), (torch.zeros(3, 2, 4),), strict=False)


def test_reentrant_checkpoints_are_calls_of_the_function_known_here(monkeypatch):
    calls = []
    monkeypatch.setattr(private.checkpoint_function(), "forward",
                        staticmethod(lambda ctx, run, preserve, *args: calls.append(args) or run(*args)))  # fmt: skip
    x = torch.ones(2, requires_grad=True)
    torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=True)
    assert len(calls) == 1 and calls[0][0] is x


def test_a_recorded_tensor_has_a_node_and_a_constant_a_holder():
    found = []

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("k", torch.ones(()))

        def forward(self, x):
            y = x + torch.tensor([1.0, 2.0])
            constants = [n for n in private.recorded_as(y).graph.nodes if n.op == "get_attr"]
            held = getattr(private.recording_root(), constants[0].target)
            found.append((private.recorded_as(self.k).op, private.recorded_as(y).op, held.shape))
            return y

    exported(Net(), torch.zeros(3, 2))
    assert found == [("placeholder", "call_function", (2,))]
    assert private.recorded_as(torch.zeros(2)) is None


def test_packing_and_assertions_are_the_functions_known_here():
    called = []

    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            called.append(function)
            return function(*args, **(kwargs or {}))

    with Watching():
        packed = torch.nn.utils.rnn.pack_padded_sequence(torch.zeros(3, 2, 1), torch.tensor([3, 1]))
        torch.nn.utils.rnn.pad_packed_sequence(packed)
        torch._assert(torch.nn.Parameter(torch.tensor(True), requires_grad=False), "")
    assert all(function in called for function in (*private.packing(), *private.assertions()[:1]))


def test_distributions_validate_again_afterwards(monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # torch.compile turns it off
    with private.arguments_of_distributions_believed():
        torch.distributions.Normal(0.0, torch.tensor(-1.0))
    with pytest.raises(ValueError, match="scale"):
        torch.distributions.Normal(0.0, torch.tensor(-1.0))


def test_a_recurrent_layer_looks_at_no_packed_size_and_at_padded_ones():
    layer, state = torch.nn.GRU(1, 1), torch.zeros(1, 5, 1)
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.zeros(3, 2, 1), torch.tensor([3, 1]))
    with private.packed_sizes_believed():
        layer.check_forward_args(packed.data, state, packed.batch_sizes)
        with pytest.raises(RuntimeError, match="Expected hidden"):
            layer(torch.zeros(3, 2, 1), state)
    with pytest.raises(RuntimeError, match="Expected hidden"):
        layer(packed, state)


def test_the_truth_of_a_number_that_depends_on_values_is_answered():
    class Net(torch.nn.Module):
        def forward(self, x):
            return x if x.sum().item() > 0 else -x

    with private.symbolic_truth(lambda: False):
        targets = [node.target for node in exported(Net(), torch.zeros(3, 2)).graph.nodes]
        assert torch.ops.aten.neg.default in targets
    with private.symbolic_truth(lambda: None), pytest.raises(Exception, match="data-dependent"):
        exported(Net(), torch.zeros(3, 2))


def test_views_are_known():
    x = torch.zeros(3)
    assert private.is_view(x[1:])
    assert not private.is_view(x)


def test_errors_of_values_are_seen_when_they_are_made():
    class Net(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    made = []
    with private.made_instances(private.value_errors(), made.append), pytest.raises(Exception, match="data-dependent"):
        exported(Net(), torch.zeros(3, 2))
    assert made
    before = len(made)
    with pytest.raises(Exception, match="data-dependent"):
        exported(Net(), torch.zeros(3, 2))
    assert len(made) == before  # the classes are as they were


def test_a_layer_that_ends_by_an_error_is_left():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(5, 5)

        def forward(self, x):
            try:
                return self.inner(x)
            except RuntimeError:
                return -x

    with private.layers_left_on_errors():
        targets = [node.target for node in exported(Net(), torch.zeros(3, 2)).graph.nodes]
    assert torch.ops.aten.neg.default in targets


def test_a_size_that_a_mask_chooses_has_its_symbol():
    class Net(torch.nn.Module):
        def forward(self, x):
            return x[x > 0]

    (chosen,) = [n.meta["val"] for n in exported(Net(), torch.zeros(3, 2)).graph.nodes if "index" in n.name]
    assert private.unknown(chosen.shape[0]) == {private.expression(chosen.shape[0])}


def test_what_has_moved_is_an_error_that_names_torch_and_what_to_do(monkeypatch):
    monkeypatch.delattr(torch.nn.modules.batchnorm, "_BatchNorm")
    monkeypatch.setattr(versions, "TRIED", {**versions.TRIED, "torch": ("2.0.0", "2.1.0")})
    says = (
        r"torch \S+ is newer than this jaxnorm knows: something that jaxnorm needs to know BatchNorm layers"
        r".*ImportError.*is affected.*2\.0\.0 to 2\.1\.0, or a newer"
    )
    with pytest.raises(TorchVersionError, match=says), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this version was not tried
        interop.from_torch(torch.nn.Linear(3, 3), torch.zeros(2, 3))


def private_names(path):
    """Attributes and imports with one leading underscore that are not the file's or the project's own."""
    tree = ast.parse(path.read_text())
    own = {"self", "cls"} | {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("interop", "jaxnorm")
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.split(".")[0] == "torch" and re.search(
                r"(^|\.)_[a-z]", ".".join([module, *(a.name for a in node.names)])
            ):
                yield f"{path.name}:{node.lineno}: from {module}"
        elif isinstance(node, ast.Attribute) and re.match(r"_[A-Za-z]", node.attr):
            root = node
            while isinstance(root, (ast.Attribute, ast.Call, ast.Subscript)):
                root = root.func if isinstance(root, ast.Call) else root.value
            name = getattr(root, "id", "")
            if name == "torch" or (path.parent.name == "tracing" and name not in own):
                yield f"{path.name}:{node.lineno}: {ast.unparse(node)}"


def test_no_other_file_touches_what_torch_does_not_promise():
    folders = ("interop", "jaxnorm", "examples", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py") if path != PRIVATE]
    assert [name for path in files for name in private_names(path)] == []
