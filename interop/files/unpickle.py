"""What a pickle describes, without running it.

A pickle is a program for a small stack machine. This is that machine (opcodes and their meaning: pickletools in the
standard library) with the instructions that import and call replaced: a class or function becomes a `Global`, which is
its name; an object becomes an `Instance`, which is what the pickle says about it. Nothing is imported, and nothing is
called but the functions that the reader passes in by name (`interop.rebuild`), all of them ours.
"""

import mmap
import pickle
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Collection
from typing import Any, Final, NoReturn

from interop.files.stand_ins import Global, Instance, UnpickleError, check_key, name_of

ALLOWANCE: Final = 1 << 26  # bytes of objects that any pickle may make; beyond, they are measured against its size


Call = Callable[[Global, tuple[Any, ...]], Any]
Build = Callable[[Any, Any], bool]


def unpickle(
    source: bytes | mmap.mmap,
    start: int = 0,
    *,
    call: Call | None = None,
    build: Build | None = None,
    persistent: Callable[[Any], Any] | None = None,
    allowance: int = ALLOWANCE,
) -> tuple[Any, int]:
    """The object that the pickle at `source[start:]` describes, and the position after it.

    Args:
        source: bytes, or a mapped file, which is never copied as a whole.
        start: where the pickle begins.
        call: what to give for a call `function(*args)` of a `Global`; by default every call is an error.
        build: called with (object, state) for objects that are no `Instance`; False means that such state is an error.
        persistent: what to give for a persistent id; by default it is an error.
        allowance: bytes of objects that it may make, roughly, at the least; three times its size are always allowed.

    Raises:
        UnpickleError: for a broken pickle and for what the functions above refuse.
    """
    machine = _Machine(source, start, call or _no_call, build or (lambda value, state: False), persistent, allowance)
    try:
        return machine.run(), machine.position
    except UnpickleError:
        raise
    except (ValueError, OverflowError, RecursionError) as error:
        raise UnpickleError(f"is broken at byte {machine.position}: {type(error).__name__}: {error}") from error


def _no_call(function: Global, args: tuple[Any, ...]) -> NoReturn:
    raise UnpickleError(f"asks to call {function}, which is not done")


class _Mark:
    """Where a list of stack items begins."""


_MARK: Final = _Mark()


class _Machine:
    def __init__(
        self,
        source: bytes | mmap.mmap,
        start: int,
        call: Call,
        build: Build,
        persistent: Callable[[Any], Any] | None,
        allowance: int,
    ) -> None:
        self.source, self.position, self.end = source, start, len(source)
        self.call, self.build, self.persistent = call, build, persistent
        self.version = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.allowance = max(allowance, 3 * (self.end - start))

    def run(self) -> Any:
        handlers, source = _HANDLERS, self.source
        while True:
            if self.position >= self.end:
                raise UnpickleError("is truncated: the pickle does not end")
            opcode = source[self.position]
            self.position += 1
            if opcode == 0x2E:  # STOP
                value = self.pop()
                if self.stack:
                    raise UnpickleError(f"is broken: {len(self.stack)} values are left over at its end")
                return value
            handler = handlers.get(opcode)
            if handler is None:
                raise UnpickleError(f"has opcode {opcode:#04x} at byte {self.position - 1}, which is not supported")
            handler(self)

    # reading

    def read(self, size: int) -> bytes:
        if size < 0 or size > self.end - self.position:
            raise UnpickleError(f"is truncated: {size} bytes are announced at byte {self.position}")
        self.position += size
        return self.source[self.position - size : self.position]

    def unpack(self, code: str) -> Any:
        return struct.unpack(code, self.read(struct.calcsize(code)))[0]

    def line(self, encoding: str = "utf-8", limit: int = 1 << 16) -> str:
        end = self.source.find(b"\n", self.position, self.position + limit)
        if end < 0:
            raise UnpickleError(f"is truncated: no end of line after byte {self.position}")
        text = self.read(end - self.position).decode(encoding)
        self.position += 1
        return text

    # the stack

    def push(self, value: Any, cost: int = 0) -> None:
        self.stack.append(value)
        if cost:
            self.spend(cost)

    def spend(self, cost: int) -> None:
        self.allowance -= cost
        if self.allowance < 0:
            raise UnpickleError(f"makes more objects than its size allows, up to byte {self.position}")

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise UnpickleError(f"is broken: no value on the stack at byte {self.position}")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise UnpickleError(f"is broken: no value on the stack at byte {self.position}")
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        stack = self.stack
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is _MARK:
                items = stack[index + 1 :]
                del stack[index:]
                return items
        raise UnpickleError(f"is broken: no mark on the stack at byte {self.position}")

    # numbers, strings

    def int_line(self) -> None:
        text = self.line()
        self.push({"00": False, "01": True}[text] if text in ("00", "01") else int(text))

    def long_line(self) -> None:
        self.push(int(self.line().removesuffix("L")))

    def long(self, code: str) -> None:
        self.push(int.from_bytes(self.read(self.unpack(code)), "little", signed=True))

    def text(self, code: str) -> None:
        self.push(str(self.read(self.unpack(code)), "utf-8", "surrogatepass"), 48)

    def string(self, code: str) -> None:  # Python 2's str: text, or bytes where it is none
        self.push(_old_string(self.read(self.unpack(code))), 48)

    def string_line(self) -> None:
        text = self.line()
        if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
            raise UnpickleError(f"is broken: a string without quotes before byte {self.position}")
        import codecs

        self.push(_old_string(codecs.escape_decode(text[1:-1].encode())[0]), 48)

    # containers

    def empty(self, kind: type, cost: int) -> None:
        self.push(kind(), cost)

    def tuple(self, count: int) -> None:
        if count > len(self.stack) or any(item is _MARK for item in self.stack[-count:]):
            raise UnpickleError(f"is broken: no {count} values on the stack at byte {self.position}")
        self.stack[-count:] = [tuple(self.stack[-count:])]
        self.spend(40)

    def marked(self, kind: Callable[[list[Any]], Any], cost: int) -> None:
        self.push(kind(self.pop_mark()), cost)

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Instance):
            target.elements.extend(items)
        elif type(target) is list:
            target.extend(items)
        else:
            raise UnpickleError(f"appends to {name_of(target)}, which is no list")

    def add(self) -> None:
        items, target = self.pop_mark(), self.top()
        if isinstance(target, Instance):
            target.elements.extend(items)
        elif type(target) is set:
            target.update(map(check_key, items))
            self.spend(64 * len(items))
        else:
            raise UnpickleError(f"adds to {name_of(target)}, which is no set")

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Instance):
            target = target.items
        if not isinstance(target, dict):
            raise UnpickleError(f"sets items of {name_of(target)}, which is no dict")
        if len(items) % 2:
            raise UnpickleError(f"is broken: a key without a value at byte {self.position}")
        target.update(zip(map(check_key, items[::2]), items[1::2], strict=True))
        self.spend(100 * (len(items) // 2))

    def marked_dict(self) -> None:
        items = self.pop_mark()
        self.push({}, 72)
        self.set_items(items)

    # the memo

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise UnpickleError(f"is broken: value {index} is used before byte {self.position} but not kept")
        self.push(self.memo[index])

    def put(self, index: int) -> None:
        self.memo[index] = self.top()
        self.spend(100)

    # classes, functions, objects: names and stand-ins

    def find(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise UnpickleError(f"is broken: a class without a name at byte {self.position}")
        # Python 2's names, which protocols up to 2 still write
        if self.version < 3:
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        self.push(Global(module, name), 48)

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        if not isinstance(function, Global):
            raise UnpickleError(f"asks to call {name_of(function)}, which is not done")
        if type(args) is not tuple:
            raise UnpickleError(f"is broken: {function} is called with no tuple before byte {self.position}")
        # what is made of the arguments may be a copy of them
        sizes = (len(arg) * (1 if isinstance(arg, str | bytes) else 64) for arg in args if isinstance(arg, Collection))
        self.push(self.call(function, args), 200 + sum(sizes))

    def new(self, with_keywords: bool) -> None:
        kwargs = self.pop() if with_keywords else {}
        args, cls = self.pop(), self.pop()
        self.instance(cls, args, kwargs)

    def instance(self, cls: Any, args: Any, kwargs: Any = None) -> None:
        kwargs = {} if kwargs is None else kwargs
        if not isinstance(cls, Global) or type(args) is not tuple or type(kwargs) is not dict:
            raise UnpickleError(f"is broken: an object of {name_of(cls)} before byte {self.position}")
        self.push(Instance(cls, args, kwargs), 300)

    def old_object(self) -> None:
        items = self.pop_mark()
        self.instance(items[0] if items else None, tuple(items[1:]))

    def old_instance(self) -> None:
        args = tuple(self.pop_mark())
        self.find(self.line(), self.line())
        self.instance(self.pop(), args)

    def set_state(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Instance):
            target.state = state
        elif not self.build(target, state):
            raise UnpickleError(f"sets the state of {name_of(target)}, which is not done")

    def persist(self, key: Any) -> None:
        if self.persistent is None:
            raise UnpickleError(f"refers to {name_of(key)} outside of the pickle")
        self.push(self.persistent(key), 200)

    def frame(self) -> None:
        size = self.unpack("<Q")
        if size > self.end - self.position:
            raise UnpickleError(f"is truncated: a frame of {size} bytes is announced at byte {self.position}")

    def protocol(self) -> None:
        if (version := self.read(1)[0]) > pickle.HIGHEST_PROTOCOL:
            raise UnpickleError(f"has pickle protocol {version}, which is not known")
        self.version = version

    def drop(self) -> None:
        if not self.stack:
            raise UnpickleError(f"is broken: no value on the stack at byte {self.position}")
        self.stack.pop()

    def drop_marked(self) -> None:
        self.pop_mark()


def _old_string(text: bytes) -> str | bytes:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return text


# pickletools' names; the opcodes of the extension registry and of out-of-band buffers are left out on purpose
_HANDLERS: Final[dict[int, Callable[[_Machine], None]]] = {
    code[0]: handler
    for code, handler in [
        (pickle.PROTO, _Machine.protocol),
        (pickle.FRAME, _Machine.frame),
        (pickle.MARK, lambda m: m.push(_MARK)),
        (pickle.POP, _Machine.drop),
        (pickle.POP_MARK, _Machine.drop_marked),
        (pickle.DUP, lambda m: m.push(m.top())),
        (pickle.NONE, lambda m: m.push(None)),
        (pickle.NEWTRUE, lambda m: m.push(True)),
        (pickle.NEWFALSE, lambda m: m.push(False)),
        (pickle.INT, _Machine.int_line),
        (pickle.LONG, _Machine.long_line),
        (pickle.BININT, lambda m: m.push(m.unpack("<i"))),
        (pickle.BININT1, lambda m: m.push(m.unpack("<B"))),
        (pickle.BININT2, lambda m: m.push(m.unpack("<H"))),
        (pickle.LONG1, lambda m: m.long("<B")),
        (pickle.LONG4, lambda m: m.long("<i")),
        (pickle.FLOAT, lambda m: m.push(float(m.line()))),
        (pickle.BINFLOAT, lambda m: m.push(m.unpack(">d"))),
        (pickle.STRING, _Machine.string_line),
        (pickle.SHORT_BINSTRING, lambda m: m.string("<B")),
        (pickle.BINSTRING, lambda m: m.string("<i")),
        (pickle.UNICODE, lambda m: m.push(m.line("raw-unicode-escape", 1 << 20), 48)),
        (pickle.SHORT_BINUNICODE, lambda m: m.text("<B")),
        (pickle.BINUNICODE, lambda m: m.text("<I")),
        (pickle.BINUNICODE8, lambda m: m.text("<Q")),
        (pickle.SHORT_BINBYTES, lambda m: m.push(m.read(m.unpack("<B")), 40)),
        (pickle.BINBYTES, lambda m: m.push(m.read(m.unpack("<I")), 40)),
        (pickle.BINBYTES8, lambda m: m.push(m.read(m.unpack("<Q")), 40)),
        (pickle.BYTEARRAY8, lambda m: m.push(m.read(m.unpack("<Q")), 40)),
        (pickle.EMPTY_LIST, lambda m: m.empty(list, 64)),
        (pickle.EMPTY_DICT, lambda m: m.empty(dict, 72)),
        (pickle.EMPTY_SET, lambda m: m.empty(set, 224)),
        (pickle.EMPTY_TUPLE, lambda m: m.push(())),
        (pickle.TUPLE1, lambda m: m.tuple(1)),
        (pickle.TUPLE2, lambda m: m.tuple(2)),
        (pickle.TUPLE3, lambda m: m.tuple(3)),
        (pickle.TUPLE, lambda m: m.marked(tuple, 48)),
        (pickle.LIST, lambda m: m.marked(list, 64)),
        (pickle.DICT, _Machine.marked_dict),
        (pickle.FROZENSET, lambda m: m.marked(lambda items: frozenset(map(check_key, items)), 224)),
        (pickle.APPEND, lambda m: m.append([m.pop()])),
        (pickle.APPENDS, lambda m: m.append(m.pop_mark())),
        (pickle.ADDITEMS, _Machine.add),
        (pickle.SETITEM, lambda m: m.set_items([m.pop(), m.pop()][::-1])),
        (pickle.SETITEMS, lambda m: m.set_items(m.pop_mark())),
        (pickle.GET, lambda m: m.get(int(m.line()))),
        (pickle.BINGET, lambda m: m.get(m.unpack("<B"))),
        (pickle.LONG_BINGET, lambda m: m.get(m.unpack("<I"))),
        (pickle.PUT, lambda m: m.put(int(m.line()))),
        (pickle.BINPUT, lambda m: m.put(m.unpack("<B"))),
        (pickle.LONG_BINPUT, lambda m: m.put(m.unpack("<I"))),
        (pickle.MEMOIZE, lambda m: m.put(len(m.memo))),
        (pickle.GLOBAL, lambda m: m.find(m.line(), m.line())),
        (pickle.STACK_GLOBAL, lambda m: m.find(*[m.pop(), m.pop()][::-1])),
        (pickle.REDUCE, _Machine.reduce),
        (pickle.NEWOBJ, lambda m: m.new(with_keywords=False)),
        (pickle.NEWOBJ_EX, lambda m: m.new(with_keywords=True)),
        (pickle.OBJ, _Machine.old_object),
        (pickle.INST, _Machine.old_instance),
        (pickle.BUILD, _Machine.set_state),
        (pickle.PERSID, lambda m: m.persist(m.line())),
        (pickle.BINPERSID, lambda m: m.persist(m.pop())),
    ]
}
