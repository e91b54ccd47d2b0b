"""What a pickle describes, without running it.

A pickle is a program for a small stack machine (`pickle_machine.py`). Its instructions that import and call are
replaced: a class or function becomes a `Global`, which is its name; an object becomes an `Instance`, which is what the
pickle says about it. Nothing is imported, and nothing is called but the functions that the reader passes in by name
(`interop.rebuild`), all of them ours.
"""

import mmap
import pickle
import struct
from collections.abc import Callable
from typing import Any, Final, NoReturn

from interop.errors import CheckpointError
from interop.files.budget import Budget
from interop.files.pickle_machine import MARK, Build, Call, Machine
from interop.files.stand_ins import Global, UnpickleError

_I4, _I8 = struct.Struct("<i"), struct.Struct("<Q")
_U2, _U4, _F8 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct(">d")


def unpickle(
    source: bytes | mmap.mmap,
    start: int = 0,
    *,
    budget: Budget,
    call: Call | None = None,
    build: Build | None = None,
    persistent: Callable[[Any], Any] | None = None,
) -> tuple[Any, int]:
    """The object that the pickle at `source[start:]` describes, and the position after it.

    Args:
        source: bytes, or a mapped file, which is never copied as a whole.
        start: where the pickle begins.
        budget: what its objects and opcodes are charged to.
        call: what to give for a call `function(*args)` of a `Global`; by default every call is an error.
        build: called with (object, state) for objects that are no `Instance`; False means that such state is an error.
        persistent: what to give for a persistent id; by default it is an error.

    Raises:
        UnpickleError: for a broken pickle and for what the functions above refuse.
        CheckpointError: for one that makes more than the budget allows.
    """
    machine = Machine(source, start, budget, call or _no_call, build or (lambda value, state: False), persistent)
    try:
        return machine.run(_HANDLERS), machine.position
    except (UnpickleError, CheckpointError):
        raise
    except (IndexError, struct.error) as error:  # read after the end
        raise UnpickleError(f"is truncated: it does not end at byte {machine.position}") from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise UnpickleError(f"is broken at byte {machine.position}: {type(error).__name__}: {error}") from error


def _no_call(function: Global, args: tuple[Any, ...]) -> NoReturn:
    raise UnpickleError(f"asks to call {function}, which is not done")


# pickletools' names; the opcodes of the extension registry and of out-of-band buffers are left out on purpose
_BY_NAME: Final[list[tuple[bytes, Callable[[Machine], None]]]] = [
    (pickle.PROTO, Machine.protocol),
    (pickle.FRAME, Machine.frame),
    (pickle.MARK, lambda m: m.stack.append(MARK)),
    (pickle.POP, Machine.drop),
    (pickle.POP_MARK, Machine.drop_marked),
    (pickle.DUP, lambda m: m.push(m.top())),
    (pickle.NONE, lambda m: m.stack.append(None)),
    (pickle.NEWTRUE, lambda m: m.stack.append(True)),
    (pickle.NEWFALSE, lambda m: m.stack.append(False)),
    (pickle.INT, Machine.int_line),
    (pickle.LONG, Machine.long_line),
    (pickle.BININT, lambda m: m.push(m.unpack(_I4), 32)),
    (pickle.BININT1, lambda m: m.stack.append(m.byte())),
    (pickle.BININT2, lambda m: m.push(m.unpack(_U2), 32)),
    (pickle.LONG1, lambda m: m.long(m.byte())),
    (pickle.LONG4, lambda m: m.long(m.unpack(_I4))),
    (pickle.FLOAT, lambda m: m.push(float(m.line()), 24)),
    (pickle.BINFLOAT, lambda m: m.push(m.unpack(_F8), 24)),
    (pickle.STRING, Machine.string_line),
    (pickle.SHORT_BINSTRING, lambda m: m.string(m.byte())),
    (pickle.BINSTRING, lambda m: m.string(m.unpack(_I4))),
    (pickle.UNICODE, lambda m: m.made_of(m.line("raw-unicode-escape", 1 << 20))),
    (pickle.SHORT_BINUNICODE, lambda m: m.text(m.byte())),
    (pickle.BINUNICODE, lambda m: m.text(m.unpack(_U4))),
    (pickle.BINUNICODE8, lambda m: m.text(m.unpack(_I8))),
    (pickle.SHORT_BINBYTES, lambda m: m.made_of(m.read(m.byte()))),
    (pickle.BINBYTES, lambda m: m.made_of(m.read(m.unpack(_U4)))),
    (pickle.BINBYTES8, lambda m: m.made_of(m.read(m.unpack(_I8)))),
    (pickle.BYTEARRAY8, lambda m: m.made_of(m.read(m.unpack(_I8)))),
    (pickle.EMPTY_LIST, lambda m: m.push([], 56)),
    (pickle.EMPTY_DICT, lambda m: m.push({}, 64)),
    (pickle.EMPTY_SET, lambda m: m.push(set(), 216)),
    (pickle.EMPTY_TUPLE, lambda m: m.stack.append(())),
    (pickle.TUPLE1, lambda m: m.tuple(1)),
    (pickle.TUPLE2, lambda m: m.tuple(2)),
    (pickle.TUPLE3, lambda m: m.tuple(3)),
    (pickle.TUPLE, lambda m: m.marked(tuple)),
    (pickle.LIST, lambda m: m.marked(list)),
    (pickle.DICT, Machine.marked_dict),
    (pickle.FROZENSET, lambda m: m.marked(frozenset)),
    (pickle.APPEND, lambda m: m.append([m.pop()])),
    (pickle.APPENDS, lambda m: m.append(m.pop_mark())),
    (pickle.ADDITEMS, Machine.add),
    (pickle.SETITEM, lambda m: m.set_items([m.pop(), m.pop()][::-1])),
    (pickle.SETITEMS, lambda m: m.set_items(m.pop_mark())),
    (pickle.GET, lambda m: m.get(int(m.line()))),
    (pickle.BINGET, lambda m: m.get(m.byte())),
    (pickle.LONG_BINGET, lambda m: m.get(m.unpack(_U4))),
    (pickle.PUT, lambda m: m.put(int(m.line()))),
    (pickle.BINPUT, lambda m: m.put(m.byte())),
    (pickle.LONG_BINPUT, lambda m: m.put(m.unpack(_U4))),
    (pickle.MEMOIZE, lambda m: m.put(len(m.memo))),
    (pickle.GLOBAL, lambda m: m.find(m.line(), m.line())),
    (pickle.STACK_GLOBAL, lambda m: m.find(*[m.pop(), m.pop()][::-1])),
    (pickle.REDUCE, Machine.reduce),
    (pickle.NEWOBJ, lambda m: m.new(with_keywords=False)),
    (pickle.NEWOBJ_EX, lambda m: m.new(with_keywords=True)),
    (pickle.OBJ, Machine.old_object),
    (pickle.INST, Machine.old_instance),
    (pickle.BUILD, Machine.set_state),
    (pickle.PERSID, lambda m: m.persist(m.line())),
    (pickle.BINPERSID, lambda m: m.persist(m.pop())),
]
_HANDLERS: Final[list[Callable[[Machine], None] | None]] = [None] * 256
for _code, _handler in _BY_NAME:
    _HANDLERS[_code[0]] = _handler
