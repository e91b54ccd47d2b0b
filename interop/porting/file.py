"""The file as a whole: what it says of itself, what it imports, the classes, and the function that makes the model."""

from __future__ import annotations

import ast
import copy
import inspect
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from typing import Any

from interop.porting.assembling import Assembly
from interop.porting.comments import with_comments
from interop.porting.helpers import sources
from interop.porting.proof import PortError, Proof
from interop.porting.siblings import with_arguments
from interop.porting.source import Module
from interop.porting.terms import Term, constant, dotted, rewritten, terms_in


def written(assembly: Assembly, title: str, origin: str, proof: Proof | None, plain: bool = False) -> str:
    """The file, formatted; `plain` with Flax's BatchNorm."""
    definitions = copy.deepcopy(assembly.definitions)
    if plain:
        _make_plain(definitions)
    norm = _common_norm(definitions, "nnx.BatchNorm" if plain else "jaxnorm.nnx.BatchNorm")
    root = definitions[-1]
    output = root.body.output
    with_arguments(root, {d.name: d for d in definitions}, _classes(assembly, output))
    inputs = {d.name: _names(assembly.tree.classes[d.paths[0]]) for d in definitions}
    module = Module(definitions, inputs, assembly.modes["train"].shapes)
    classes = [module.class_source(d, "") for d in definitions]
    function = _function(root, title, module)
    body: list[ast.stmt] = [ast.Expr(ast.Constant(_doc(title, origin, proof, plain)))]
    helpers = ast.parse("\n\n".join(sources(_called([*classes, function])))).body
    code = [*helpers, *classes, function]
    body += _imports(code, norm)
    names = [title, root.name]
    body.append(ast.Assign([ast.Name("__all__")], ast.List([ast.Constant(one) for one in names])))
    if norm is not None:
        body.append(ast.Assign([ast.Name("BatchNorm")], norm))
    body += code
    text = ast.unparse(ast.fix_missing_locations(ast.Module(body, [])))
    return formatted("\n".join(_without_parentheses(with_comments(line)) for line in text.split("\n")))


def _without_parentheses(line: str) -> str:
    """`return a, b` for `return (a, b)`, which is how `ast` writes it."""
    found = re.fullmatch(r"(\s*(?:return|[\w, ()]+ =) )\((.*)\)", line)
    if not found:
        return line
    short = found[1] + found[2]
    try:
        same = ast.dump(ast.parse(f"def f():\n {short.strip()}")) == ast.dump(ast.parse(f"def f():\n {line.strip()}"))
    except SyntaxError:
        return line
    return short if same else line


def _make_plain(definitions: Any) -> None:
    """Leaves out of each BatchNorm what Flax's has no option for, where that says nothing.

    Raises:
        PortError: where it does.
    """
    usual = {"count_batches": (True, False), "track_running_stats": (True,)}

    def to(term: Term) -> Any:
        if term.kind != "call" or term.parts[0] != Term("name", ("BatchNorm",)):
            return term
        options = dict(term.parts[2])
        unlike = [key for key, values in usual.items() if options.pop(key, values[0]) not in values]
        unlike += [key for key in ("activation",) if key in options]
        unlike += [] if options["momentum"] is not None else ["momentum=None"]
        if unlike:
            raise PortError(f"Flax's BatchNorm has no {', '.join(unlike)}, which a layer has: leave out plain=True")
        return Term("call", (term.parts[0], term.parts[1], tuple(options.items())))

    for definition in definitions:
        definition.members = {key: rewritten(term, to) for key, term in definition.members.items()}


def _common_norm(definitions: Any, name: str) -> ast.expr | None:
    """BatchNorm with the options that all layers share; they are left out of each."""
    layers = [
        term
        for definition in definitions
        for term in terms_in(tuple(definition.members.values()))
        if term.kind == "call" and term.parts[0] == Term("name", ("BatchNorm",))
    ]
    if not layers:
        return None
    shared = {
        (key, value)
        for key, value in layers[0].parts[2]
        if not isinstance(value, Term) and all((key, value) in one.parts[2] for one in layers)
    }
    defaults = {("use_bias", True), ("use_scale", True), ("track_running_stats", True), ("count_batches", False),
                ("epsilon", 1e-5)}  # fmt: skip

    def to(term: Term) -> Any:
        if term.kind == "call" and term.parts[0] == Term("name", ("BatchNorm",)):
            kept = tuple(pair for pair in term.parts[2] if pair not in shared)
            return Term("call", (term.parts[0], term.parts[1], kept))
        return term

    for definition in definitions:
        definition.members = {key: rewritten(term, to) for key, term in definition.members.items()}
    keywords = [ast.keyword(key, constant(value)) for key, value in layers[0].parts[2]
                if (key, value) in shared - defaults]  # fmt: skip
    if name.startswith("jaxnorm"):  # as PyTorch's; Flax's rule widens a bfloat16 input to the running statistics' dtype
        keywords.append(ast.keyword("promote_dtype", dotted("jaxnorm.nnx.input_dtype")))
    return ast.Call(ast.Name("partial"), [dotted(name)], keywords)


def _classes(assembly: Assembly, output: Any) -> int | None:
    lowered = assembly.modes["eval"]
    kind, *rest = lowered.program.output
    if kind != "leaf" or not hasattr(rest[0], "name"):
        return None
    seen = lowered.writer.seen[rest[0].name]
    return seen.shape[-1] if seen.ndim == 2 and isinstance(seen.shape[-1], int) else None


def _names(cls: type) -> list[str]:
    """What a class's forward calls its arguments."""
    forward: Any = getattr(cls, "forward", None)
    try:
        parameters = list(inspect.signature(forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _function(root: Any, title: str, module: Module) -> ast.FunctionDef:
    from interop.porting.source import _annotation
    from interop.porting.source import _function as made

    named = root.arguments
    arguments = ast.arguments(
        [], [], None, [*(ast.arg(a.name, _annotation(a)) for a in named), ast.arg("rngs", dotted("nnx.Rngs"))],
        [*(constant(a.default) for a in named), None], None, [],
    )  # fmt: skip
    keywords = [ast.keyword(a.name, ast.Name(a.name)) for a in named]
    result = ast.Call(ast.Name(root.name), [], [*keywords, ast.keyword("rngs", ast.Name("rngs"))])
    return made(title, arguments, [ast.Return(result)], ast.Name(root.name))


def _called(code: list[Any]) -> set[str]:
    return {node.id for part in code for node in ast.walk(part) if isinstance(node, ast.Name)}


def _imports(code: list[Any], norm: ast.expr | None) -> list[ast.stmt]:
    text = "\n".join(ast.unparse(ast.fix_missing_locations(node)) for node in code)
    lines = ["import base64", "import zlib"] if "unpacked(" in text else []
    lines += ["from collections.abc import Callable"] if re.search(r"\bCallable\b", text) else []
    lines += ["from functools import partial"] if norm is not None or re.search(r"\bpartial\(", text) else []
    lines += ["import jax"] if re.search(r"\bjax\.", text) else []
    lines += ["import jax.numpy as jnp"] if re.search(r"\bjnp\.", text) else []
    lines += ["import numpy as np"] if re.search(r"\bnp\.", text) else []
    lines += ["from flax import nnx"]
    lines += ["from jax import lax"] if re.search(r"\blax\.", text) else []
    lines += ["import jaxnorm"] if norm is not None and "jaxnorm" in ast.unparse(norm) else []
    return ast.parse("\n".join(lines)).body


def _doc(title: str, origin: str, proof: Proof | None, plain: bool) -> str:
    lines = [f"{title} in Flax NNX, as {origin} has it in PyTorch. Images are (N, H, W, C).", ""]
    lines += [
        f"    model = {title}(rngs=nnx.Rngs(0))",
        "    interop.load_state_dict(model, state_dict)  # PyTorch's",
        "",
    ]
    if plain:
        lines += [
            "BatchNorm is Flax's. Its running variance takes in the biased variance of a batch, where PyTorch takes in",
            "n / (n - 1) times that; num_batches_tracked is in no state dict of it; under jax.pmap and jax.shard_map",
            "statistics are those of one device unless the layers are given axis_name.",
            "",
        ]
    if proof is not None:
        import jax

        lines += [
            f"Compared with PyTorch {version('torch')} in float64 (jax {jax.__version__}, flax {version('flax')}), "
            "largest difference relative",
            f"to the largest value: eval {proof.eval:.0e}, train {proof.train:.0e}, gradients {proof.gradients:.0e}, "
            f"running statistics {proof.buffers:.0e}.",
        ]
    return "\n".join(lines).rstrip() + "\n"


def formatted(text: str) -> str:
    """The text as `ruff format` has it, imports sorted.

    Raises:
        PortError: where ruff is not installed, or complains.
    """
    for arguments in (["check", "--fix", "--quiet", "--select", "I,F401", "-"], ["format", "--quiet", "-"]):
        command = [sys.executable, "-m", "ruff", *arguments[:1], "--isolated", "--line-length", "120", *arguments[1:]]
        # Elsewhere than in a project of its own, whose packages ruff would sort apart.
        run = subprocess.run(command, input=text, capture_output=True, text=True, cwd=tempfile.gettempdir())
        if "No module named ruff" in run.stderr:
            raise PortError("the source is formatted by ruff: pip install 'jaxnorm[cli]'")
        if run.returncode and not run.stdout:
            raise PortError(f"ruff: {(run.stdout + run.stderr)[:2000]} {text[:0]}")
        text = run.stdout
    return text
