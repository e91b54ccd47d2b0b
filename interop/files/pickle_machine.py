"""The machine that a pickle is a program for (opcodes and their meaning: pickletools in the standard library).

What an instruction makes is charged to the reader's budget: a byte can be a set of 200, or a copy of what is shared.
"""

import codecs
import mmap
import pickle
import struct
import sys
import warnings
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from interop.files.budget import Budget
from interop.files.keys import Keys
from interop.files.stand_ins import Called, Global, Instance, UnpickleError, name_of

Call = Callable[[Global, tuple[Any, ...]], Any]
Build = Callable[[Any, Any], bool]

_STRETCH: Final = 1 << 14  # opcodes, and
_UNCHARGED: Final = 1 << 20  # bytes of objects, between two looks at what is left
_LONGEST_NAME: Final = 1000  # of a class or function
_GAP: Final = 1000  # numbers of the memo that may be left out
_NO_COPY: Final = frozenset({int, bool, float, type(None), Global, Instance})  # of what a call may be given
_SIZE: Final = struct.Struct("<Q")


class _Mark:
    """Where a list of stack items begins."""


MARK: Final = _Mark()


class Machine:
    """The stack, the memo, and an instruction for each method. `unpickle` says which opcode is which."""

    def __init__(
        self,
        source: bytes | mmap.mmap,
        start: int,
        budget: Budget,
        call: Call,
        build: Build,
        persistent: Callable[[Any], Any] | None,
    ) -> None:
        self.source, self.position, self.end = source, start, len(source)
        self.call, self.build, self.persistent = call, build, persistent
        self.budget = budget
        self.made = 0  # bytes of objects that are not yet charged
        self.version = 0
        self.stack: list[Any] = []
        self.memo: list[Any] = []
        self.names: dict[tuple[str, str], Global] = {}
        self.keys = Keys()

    def run(self, handlers: "Sequence[Callable[[Machine], None] | None]") -> Any:
        """The object that is described, when its end is reached."""
        source, stop = self.source, pickle.STOP[0]
        while True:
            for count in range(_STRETCH):
                opcode = source[self.position]
                self.position += 1
                if opcode == stop:
                    value = self.pop()
                    if self.stack:
                        raise UnpickleError(f"is broken: {len(self.stack)} values are left over at its end")
                    self.budget.spend(self.made, count)
                    return value
                handler = handlers[opcode]
                if handler is None:
                    raise UnpickleError(f"has opcode {opcode:#04x} at byte {self.position - 1}, which is not supported")
                handler(self)
            self.budget.spend(self.made, _STRETCH)
            self.made = 0

    def charge(self, made: int, steps: int = 0) -> None:
        """Counts bytes of objects, and steps beside those of the opcode itself."""
        self.made += made
        if steps or self.made > _UNCHARGED:
            self.budget.spend(self.made, steps)
            self.made = 0

    # reading

    def read(self, size: int) -> bytes:
        if size < 0 or size > self.end - self.position:
            raise UnpickleError(f"is truncated: {size} bytes are announced at byte {self.position}")
        self.position += size
        return self.source[self.position - size : self.position]

    def unpack(self, code: struct.Struct) -> Any:
        (value,) = code.unpack_from(self.source, self.position)
        self.position += code.size
        return value

    def byte(self) -> int:
        value = self.source[self.position]
        self.position += 1
        return value

    def line(self, encoding: str = "utf-8", limit: int = 1 << 16) -> str:
        end = self.source.find(b"\n", self.position, self.position + limit)
        if end < 0:
            raise UnpickleError(f"is truncated: no end of line after byte {self.position}")
        text = self.read(end - self.position).decode(encoding)
        self.position += 1
        return text

    # the stack

    def push(self, value: Any, made: int = 0) -> None:
        self.stack.append(value)
        self.made += made

    def made_of(self, value: Any) -> None:
        """Pushes a text, bytes or a number that may be long."""
        self.stack.append(value)
        self.charge(sys.getsizeof(value))

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is MARK:
            raise UnpickleError(f"is broken: no value on the stack at byte {self.position}")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack or self.stack[-1] is MARK:
            raise UnpickleError(f"is broken: no value on the stack at byte {self.position}")
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        stack = self.stack
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is MARK:
                items = stack[index + 1 :]
                del stack[index:]
                return items
        raise UnpickleError(f"is broken: no mark on the stack at byte {self.position}")

    # numbers, strings

    def int_line(self) -> None:
        text = self.line()
        self.made_of({"00": False, "01": True}[text] if text in ("00", "01") else int(text))

    def long_line(self) -> None:
        self.made_of(int(self.line().removesuffix("L")))

    def long(self, size: int) -> None:
        self.made_of(int.from_bytes(self.read(size), "little", signed=True))

    def text(self, size: int) -> None:
        self.made_of(str(self.read(size), "utf-8", "surrogatepass"))

    def string(self, size: int) -> None:  # Python 2's str: text, or bytes where it is none
        self.made_of(_old_string(self.read(size)))

    def string_line(self) -> None:
        text = self.line()
        if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
            raise UnpickleError(f"is broken: a string without quotes before byte {self.position}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python no longer writes
            self.made_of(_old_string(codecs.escape_decode(text[1:-1].encode())[0]))

    # containers

    def tuple(self, count: int) -> None:
        items = tuple(self.stack[-count:])
        if len(items) < count:
            raise UnpickleError(f"is broken: no {count} values on the stack at byte {self.position}")
        for item in items:
            if item is MARK:
                raise UnpickleError(f"is broken: a mark among {count} values at byte {self.position}")
        self.stack[-count:] = [items]
        self.made += 40 + 8 * count

    def marked(self, kind: Callable[[list[Any]], Any]) -> None:
        items = self.pop_mark()
        if kind is frozenset:
            self.charge(0, self.keys.check(items, items))
        value = kind(items)
        self.stack.append(value)
        self.charge(sys.getsizeof(value))

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Instance):
            target.elements.extend(items)
        elif type(target) is list:
            target.extend(items)
        else:
            raise UnpickleError(f"appends to {name_of(target)}, which is no list")
        self.charge(9 * len(items))

    def add(self) -> None:
        items, target = self.pop_mark(), self.top()
        if isinstance(target, Instance):
            target.elements.extend(items)
            self.charge(9 * len(items))
        elif type(target) is set:
            steps, before = self.keys.check(target, items), sys.getsizeof(target)
            target.update(items)
            self.charge(sys.getsizeof(target) - before, steps)
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
        keys = items[::2]
        steps, before = self.keys.check(target, keys), sys.getsizeof(target)
        target.update(zip(keys, items[1::2], strict=True))
        self.charge(sys.getsizeof(target) - before, steps)

    def marked_dict(self) -> None:
        items = self.pop_mark()
        self.push({}, 64)
        self.set_items(items)

    # the memo

    def get(self, index: int) -> None:
        value = self.memo[index] if 0 <= index < len(self.memo) else MARK
        if value is MARK:
            raise UnpickleError(f"is broken: value {index} is used before byte {self.position} but not kept")
        self.stack.append(value)

    def put(self, index: int) -> None:
        value, gap = self.top(), index - len(self.memo)
        if gap == 0:
            self.memo.append(value)
            self.made += 9
        elif index >= 0 and gap <= _GAP:
            if gap > 0:
                self.memo.extend([MARK] * (gap + 1))
                self.charge(9 * gap)
            self.memo[index] = value
        else:
            raise UnpickleError(f"is broken: value {index} is kept before byte {self.position} after {len(self.memo)}")

    # classes, functions, objects: names and stand-ins

    def find(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise UnpickleError(f"is broken: a class without a name at byte {self.position}")
        if len(module) + len(name) > _LONGEST_NAME:
            raise UnpickleError(f"is broken: a class has a name of {len(module) + len(name)} characters")
        # Python 2's names, which protocols up to 2 still write
        if self.version < 3:
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        known = self.names.get((module, name))
        if known is None:
            known = self.names[module, name] = Global(module, name)
            self.charge(300 + len(module) + len(name))
        self.stack.append(known)

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        if type(args) is not tuple:
            raise UnpickleError(f"is broken: {name_of(function)} is called with no tuple before byte {self.position}")
        self.charge(100 + _copied(args), 10)  # what is made of the arguments may be a copy of them
        if isinstance(function, Instance):  # what an object would make that can be called
            self.stack.append(Called(function.cls, args))
        elif isinstance(function, Global):
            self.stack.append(self.call(function, args))
        else:
            raise UnpickleError(f"asks to call {name_of(function)}, which is not done")

    def new(self, with_keywords: bool) -> None:
        kwargs = self.pop() if with_keywords else {}
        args, cls = self.pop(), self.pop()
        self.instance(cls, args, kwargs)

    def instance(self, cls: Any, args: Any, kwargs: Any = None) -> None:
        kwargs = {} if kwargs is None else kwargs
        if not isinstance(cls, Global) or type(args) is not tuple or type(kwargs) is not dict:
            raise UnpickleError(f"is broken: an object of {name_of(cls)} before byte {self.position}")
        self.push(Instance(cls, args, kwargs), 270)

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
            return
        self.charge(_copied(state), 10)
        if not self.build(target, state):
            raise UnpickleError(f"sets the state of {name_of(target)}, which is not done")

    def persist(self, key: Any) -> None:
        if self.persistent is None:
            raise UnpickleError(f"refers to {name_of(key)} outside of the pickle")
        self.charge(0, 5)
        self.stack.append(self.persistent(key))

    def frame(self) -> None:
        size = self.unpack(_SIZE)
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


def _copied(value: Any, levels: int = 2) -> int:
    """Bytes of a copy of what is in `value`, and in tuples in it."""
    if type(value) in _NO_COPY:
        return 0
    if isinstance(value, str | bytes | bytearray):
        return len(value)
    if isinstance(value, np.ndarray):
        return 2 * value.nbytes
    if isinstance(value, tuple) and levels:
        return 9 * len(value) + sum(_copied(item, levels - 1) for item in value)
    if isinstance(value, list | tuple | set | frozenset | dict):
        return 100 * len(value)
    return _copied(getattr(value, "array", None), 0) if hasattr(value, "array") else 0


def _old_string(text: bytes) -> str | bytes:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return text
