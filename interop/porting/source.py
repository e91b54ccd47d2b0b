"""Classes as the text of a Python file."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from interop.porting.bodies import Body
from interop.porting.classes import MISSING, Argument, Definition
from interop.porting.comments import Shapes
from interop.porting.looking import Dim
from interop.porting.names import Names
from interop.porting.terms import Term, dotted, expression, is_attribute, rewritten, terms_in
from interop.porting.unify import side_by_side

_DEFAULTS = {
    "strides": 1, "kernel_dilation": 1, "feature_group_count": 1, "use_bias": True, "use_scale": True,
    "count_batches": False, "epsilon": None,
    "track_running_stats": True,
}  # fmt: skip


class Module:
    """The file: imports, classes, and the function that makes the model."""

    def __init__(
        self, definitions: Sequence[Definition], inputs: dict[str, list[str]], shapes: Mapping[str, tuple[Dim, ...]]
    ) -> None:
        self.definitions = {definition.name: definition for definition in definitions}
        self.inputs = inputs  # by class: what PyTorch's forward calls its arguments
        self.root, self.shapes = definitions[-1], shapes  # of the root's locals

    def class_source(self, definition: Definition, doc: str) -> ast.ClassDef:
        """A class."""
        names = self.inputs.get(definition.name, [])
        body: list[ast.stmt] = [ast.Expr(ast.Constant(doc))] if doc else []
        body.append(self._init(definition))
        if definition.body.inputs or definition.body.statements:
            body.append(self._call(definition, names))
        return ast.ClassDef(definition.name, [dotted("nnx.Module")], [], body, [])

    def _init(self, definition: Definition) -> ast.FunctionDef:
        plain = [a for a in definition.arguments if a.default is MISSING]
        named = [a for a in definition.arguments if a.default is not MISSING]
        arguments = ast.arguments(
            [],
            [ast.arg("self"), *(ast.arg(a.name, _annotation(a)) for a in plain)],
            None,
            [*(ast.arg(a.name, _annotation(a)) for a in named), ast.arg("rngs", dotted("nnx.Rngs"))],
            [*(self.expression(a.default, None) for a in named), None],
            None,
            [],
        )
        body: list[ast.stmt] = []
        kept = dict(definition.kept)
        if _asks_mode(definition):
            body.append(_assign("deterministic", ast.Constant(False)))
        for key, term in kept.items():
            body.append(_assign(key, self.expression(term, None)))
        groups: dict[str, tuple[Any, list[ast.stmt], list[ast.stmt]]] = {}
        for key, term in definition.members.items():
            made = (
                self._series(key, term) if "{}" in key else self._member(key, self.expression(_loop_free(term), None))
            )
            condition = definition.conditions.get(key)
            if condition is None:
                body.append(made)
                continue
            text = ast.unparse(self.expression(condition, None))
            if text not in groups:
                test = self.expression(condition, None)
                branch = ast.If(test, [], [])
                groups[text] = (branch, branch.body, branch.orelse)
                body.append(branch)
            groups[text][1].append(made)
            if _tested(definition, key):
                groups[text][2].append(self._member(key, ast.Constant(None)))
        return _function("__init__", arguments, body or [ast.Pass()], ast.Constant(None))

    def _series(self, key: str, term: Term) -> ast.stmt:
        """`for i in range(count): setattr(self, f"layer{i + 1}", ...)`."""
        element, count, number = term.parts
        made = ast.Call(
            ast.Name("setattr"), [ast.Name("self"), _formatted(key, number), self.expression(element, None)], []
        )
        return ast.For(
            ast.Name("i"), ast.Call(ast.Name("range"), [self.expression(count, None)], []), [ast.Expr(made)], []
        )

    def _grow(self, value: Term, target: str) -> list[ast.stmt]:
        """`features.append(getattr(self, f"layer{i + 1}")(*features))`, in a loop."""
        layers, initial, count, number = value.parts
        layer = ast.Call(ast.Name("getattr"), [ast.Name("self"), _formatted(layers.parts[0], number)], [])
        result = ast.Call(layer, [ast.Starred(ast.Name(target))], [])
        append = ast.Expr(ast.Call(ast.Attribute(ast.Name(target), "append"), [result], []))
        rounds = ast.Call(ast.Name("range"), [self.expression(count, None)], [])
        return [
            ast.Assign([ast.Name(target)], self.expression(initial, None)),
            ast.For(ast.Name("i"), rounds, [append], []),
        ]

    def _member(self, key: str, value: ast.expr) -> ast.stmt:
        if is_attribute(key):
            return _assign(key, value)
        return ast.Expr(ast.Call(ast.Name("setattr"), [ast.Name("self"), ast.Constant(key), value], []))

    def _call(self, definition: Definition, names: Sequence[str]) -> ast.FunctionDef:
        body = definition.body
        if definition.evaluation is not None:
            body = side_by_side(body, definition.evaluation)
        statements, inputs = self._block(body, definition, names)
        given = [ast.arg(one, dotted("jax.Array")) for one in inputs]
        any_number = given.pop() if body.inputs[-1:] and body.inputs[-1].endswith("*") else None
        arguments = ast.arguments([], [ast.arg("self"), *given], any_number, [], [], None, [])
        returns = dotted("jax.Array") if _single(body.output) else None
        return _function("__call__", arguments, statements, returns)

    def _block(self, body: Body, definition: Definition, names: Sequence[str]) -> tuple[list[ast.stmt], list[str]]:
        named = Names(body, names)
        shapes = Shapes(self.shapes if definition is self.root else {})
        statements: list[ast.stmt] = []
        around = statements
        for statement, value, conditional in named.statements():
            if isinstance(value, Term) and value.kind == "begin":
                statements = []
                continue
            if isinstance(value, Term) and value.kind == "end":
                self._return(statements, value.parts[0], definition)
                around.append(ast.If(dotted("self.deterministic"), statements, []))
                statements = around
                continue
            targets = [named.of[t] for t in statement.targets]
            if isinstance(value, Term) and value.kind == "loop":
                statements += self._loop(value, targets[0])
                continue
            if isinstance(value, Term) and value.kind == "grow":
                statements += self._grow(value, targets[0])
                continue
            made = self.expression(value, definition)
            node: ast.stmt
            if not targets:
                node = ast.Expr(made)
            else:
                target = ast.Name(targets[0]) if len(targets) == 1 else ast.Tuple([ast.Name(t) for t in targets])
                if conditional is not None:
                    test, otherwise = self._test(statement.when, definition), ast.Name(named.of[conditional])
                    made = ast.IfExp(test, made, otherwise)
                elif len(targets) == 1 and statement.when is None:
                    made = shapes.beside(statement.targets[0], made)
                node = ast.Assign([target], made)
            if statement.when is not None and conditional is None:
                test = self._test(statement.when, definition)
                last = statements[-1] if statements else None
                if isinstance(last, ast.If) and ast.unparse(last.test) == ast.unparse(test):
                    last.body.append(node)
                    continue
                node = ast.If(test, [node], [])
            statements.append(node)
        if body.output is not None:
            self._return(statements, named.renamed(body.output), definition)
        statements = [*shapes.first((one, named.of[one]) for one in body.inputs), *statements]
        return statements, [named.of[one] for one in body.inputs]

    def _return(self, statements: list[ast.stmt], output: Any, definition: Definition) -> None:
        """The last statement, with what it assigns if that is the result."""
        result = self.expression(output, definition)
        last = statements[-1] if statements else None
        same = isinstance(last, ast.Assign) and ast.unparse(last.targets[0]) == ast.unparse(result)
        if isinstance(last, ast.Assign) and same and isinstance(last.targets[0], ast.Name):
            statements[-1] = ast.Return(last.value)
        else:
            statements.append(ast.Return(result))

    def _loop(self, value: Term, target: str) -> list[ast.stmt]:
        """`for block in self.blocks: x = block(x)`."""
        layers, given = value.parts
        word = layers.parts[0].rpartition(".")[2]
        word = word[:-1] if word.endswith("s") and not word.endswith("ss") else f"{word}_layer"
        step = ast.Assign([ast.Name(target)], ast.Call(ast.Name(word), [ast.Name(target)], []))
        loop = ast.For(ast.Name(word), self.expression(layers, None), [step], [])
        if given.kind == "local" and given.parts[0] == target:
            return [loop]
        return [ast.Assign([ast.Name(target)], self.expression(given, None)), loop]

    def _test(self, when: Any, definition: Definition) -> ast.expr:
        if isinstance(when, tuple):
            return ast.BoolOp(ast.And(), [self._test(one, definition) for one in reversed(when)])
        if when == "train":
            return ast.UnaryOp(ast.Not(), dotted("self.deterministic"))
        if when == "eval":
            return dotted("self.deterministic")
        return self.expression(when, definition)

    def expression(self, term: Any, definition: Definition | None) -> ast.expr:
        """A term as an expression of a class."""
        return expression(self._prepared(term), _path)

    def _prepared(self, term: Any) -> Any:
        def to(found: Term) -> Any:
            if found.kind == "new":
                return self._new(found)
            if found.kind == "call":
                function, arguments, keywords = found.parts
                kept = tuple((k, v) for k, v in keywords if not _is_default(function, arguments, k, v))
                return Term("call", (function, arguments, kept))
            return found

        return rewritten(term, to)

    def _new(self, term: Term) -> Term:
        """The call that makes an instance."""
        title, values = term.parts
        given = dict(values)
        positional, keywords = [], []
        for argument in self.definitions[title].arguments:
            value = given[argument.name]
            if argument.default is MISSING:
                positional.append(value)
            elif not (type(value) is type(argument.default) and value == argument.default):
                keywords.append((argument.name, value))
        rngs = Term("argument", ("rngs",))
        return Term("call", (Term("name", (title,)), tuple(positional), (*keywords, ("rngs", rngs))))


def _is_default(function: Any, arguments: tuple[Any, ...], key: str, value: Any) -> bool:
    if key == "padding" and value == 0 and function == Term("name", ("nnx.Conv",)):
        return set(arguments[2:3]) in ({(1,)}, {(1, 1)}, {(1, 1, 1)})  # which "SAME" pads by nothing
    if isinstance(value, Term) or key not in _DEFAULTS:
        return False
    if key == "epsilon":
        return function == Term("name", ("BatchNorm",)) and value == 1e-5
    return type(value) is type(_DEFAULTS[key]) and value == _DEFAULTS[key]


def _loop_free(term: Any) -> Any:
    """Runs of one element are the element."""

    def to(found: Term) -> Any:
        return found.parts[0] if found.kind == "run" and found.parts[1] == 1 else found

    return rewritten(term, to)


def _formatted(key: str, number: int) -> ast.expr:
    """`f"layer{i + 1}"`."""
    place: ast.expr = ast.Name("i") if number == 0 else ast.BinOp(ast.Name("i"), ast.Add(), ast.Constant(number))
    return ast.JoinedStr([ast.Constant(key.partition("{}")[0]), ast.FormattedValue(place, -1)])


def _path(path: str) -> ast.expr:
    found: ast.expr = ast.Name("self")
    for depth, part in enumerate(path.split(".")):
        if part.isdigit() and depth:
            found = ast.Subscript(found, ast.Constant(int(part)))
        elif is_attribute(part):
            found = ast.Attribute(found, part)
        else:
            found = ast.Call(ast.Name("getattr"), [found, ast.Constant(part)], [])
    return found


def _annotation(argument: Argument) -> ast.expr | None:
    known = {type(value) for value in argument.column}
    if known == {Term}:
        return dotted("Callable")
    for kind in (int, float, bool, str):
        if known == {kind}:
            return ast.Name(kind.__name__)
    if known <= {int, float}:
        return ast.Name("float")
    if known == {tuple} and all(type(x) is int for value in argument.column for x in value):
        return ast.Subscript(ast.Name("tuple"), ast.Tuple([ast.Name("int"), ast.Constant(...)]))
    return None


def _asks_mode(definition: Definition) -> bool:
    return definition.evaluation is not None or any(
        one in ("train", "eval")
        for s in definition.body.statements
        for one in (s.when if isinstance(s.when, tuple) else (s.when,))
        if isinstance(one, str)
    )


def _tested(definition: Definition, key: str) -> bool:
    """Whether the forward pass asks if there is such a member."""
    asked = Term("compare", ("is not", Term("self", (key,)), None))
    return any(asked in set(terms_in(s.when)) for s in definition.body.statements if isinstance(s.when, Term | tuple))


def _single(output: Any) -> bool:
    return isinstance(output, Term) and output.kind not in ("tuple", "list", "dict")


def _assign(key: str, value: ast.expr) -> ast.stmt:
    return ast.Assign([ast.Attribute(ast.Name("self"), key)], value)


def _function(title: str, arguments: ast.arguments, body: list[ast.stmt], returns: ast.expr | None) -> ast.FunctionDef:
    return ast.FunctionDef(title, arguments, body, [], returns)
