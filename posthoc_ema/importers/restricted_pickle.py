"""Reads pickles as data: builds plain containers and tensors, and can execute nothing.

A pickle is a program for a small stack machine, and two of its instructions import a name and call it.
This is our own machine for the same instructions (the format is documented in Python's `pickletools`)
in which a name stays a name: `Global("os", "system")` is a pair of strings, and calling it makes an
inert `Opaque` record of the name and its arguments. No name from a file is ever looked up; the few that
are understood (`constructors.py`) are compared as strings and built by code of ours.

Memory is bounded: what an instruction can create is charged against a budget that grows with the size
of the file, large byte strings stay in the file until they are read, and nothing here recurses over
nested values.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

from posthoc_ema.importers.pickle_values import (
    Budget,
    Construct,
    Global,
    NotUnderstood,
    Opaque,
    check_key,
)
from posthoc_ema.importers.spans import Cursor, Span

__all__ = ["Budget", "Global", "NotUnderstood", "Opaque", "Reader", "check_key"]

_MARK_COST, _SLOT_COST, _VALUE_COST, _CONTAINER_COST, _OPAQUE_COST = 64, 8, 40, 232, 400
_SMALL = 4096  # byte strings up to this size are read at once, larger ones stay in the file
_LARGEST_INTEGER = 256  # bytes


def _no_construct(what: Global, args: tuple[Any, ...]) -> Any:
    raise NotUnderstood


def _no_persistent(key: Any) -> Any:
    raise ValueError("it refers to data outside itself (a persistent id)")


class Reader:
    r"""Interprets one pickle.

    Args:
        cursor: where it starts; left behind its last byte by `read`.
        budget: what it may take.
        construct: builds the values of calls that are understood.
        persistent: builds the value of a persistent id.

    Example:
        >>> hostile = b"cos\nsystem\n(S'echo gotcha'\ntR."
        >>> Reader(Cursor(Span.of(hostile)), Budget(len(hostile))).read()
        Opaque(os.system)
    """

    def __init__(
        self,
        cursor: Cursor,
        budget: Budget,
        construct: Construct = _no_construct,
        persistent: Callable[[Any], Any] = _no_persistent,
    ) -> None:
        self._cursor = cursor
        self._charge = budget.charge
        self._construct = construct
        self._persistent = persistent
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []  # the stacks below each mark
        self._memo: dict[int, Any] = {}

    def read(self) -> Any:
        """The value of the pickle.

        Raises:
            ValueError, IndexError, KeyError, TypeError, struct.error: it is malformed. `torch_files`
                turns them into `SnapshotFormatError`.
        """
        take, charge = self._cursor.take, self._charge
        while True:
            code = take(1)
            charge(_SLOT_COST)
            if code == b".":
                return self._stack.pop()
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise ValueError(f"it has an unknown instruction {code!r}")
            instruction(self)

    # ---- helpers

    def _push(self, value: Any, cost: int = _VALUE_COST) -> None:
        self._charge(cost)
        self._stack.append(value)

    def _number(self, code: str) -> int:
        return int(struct.unpack(code, self._cursor.take(struct.calcsize(code)))[0])

    def _bytes(self, size: int) -> bytes | Span:
        if size < 0:
            raise ValueError("it holds a negative size")
        if size > _SMALL:
            return self._cursor.skip(size)
        self._charge(size)
        return self._cursor.take(size)

    def _text(self, size: int) -> str:
        if size < 0:
            raise ValueError("it holds a negative size")
        self._charge(4 * size)
        return self._cursor.take(size).decode("utf-8")

    def _since_mark(self) -> list[Any]:
        values = self._stack
        self._stack = self._marked.pop()
        return values

    def _call(self, what: Any, args: Any) -> Any:
        if not isinstance(args, tuple):
            raise ValueError("it calls a name with something that is no argument list")
        if isinstance(what, Global):
            try:
                return self._construct(what, args)
            except NotUnderstood:
                module, name = what.module, what.name
        elif isinstance(what, Opaque):  # the result of a call that was not made
            self._charge(_SLOT_COST * len(args))
            name = f"{what.name.removesuffix('(...)')}(...)"  # one mark, however long the chain
            module, args = what.module, (what, *args)
        else:
            raise ValueError("it calls a value that is no name")
        self._charge(_OPAQUE_COST)
        return Opaque(module, name, args)

    # ---- instructions, in the order of pickletools

    def _int_line(self) -> None:
        line = self._cursor.line()
        self._push({b"00": False, b"01": True}[line] if line in (b"00", b"01") else _integer(line))

    def _long_line(self) -> None:
        self._push(_integer(self._cursor.line().removesuffix(b"L")))

    def _long(self, code: str) -> None:
        size = self._number(code)
        if not 0 <= size <= _LARGEST_INTEGER:
            raise ValueError("it holds an integer of absurd size")
        self._push(int.from_bytes(self._cursor.take(size), "little", signed=True))

    def _string_line(self) -> None:
        self._push(_unquote(self._cursor.line()))

    def _unicode_line(self) -> None:
        line = self._cursor.line()
        self._charge(4 * len(line))
        text = line.decode("raw-unicode-escape")
        text.encode("utf-8")  # no halves of surrogate pairs: no file name or JSON can hold them
        self._push(text)

    def _float_line(self) -> None:
        self._push(float(self._cursor.line()))

    def _binary_string(self, code: str) -> None:
        size = self._number(code)
        if size < 0:
            raise ValueError("it holds a negative size")
        self._charge(size)
        self._push(self._cursor.take(size).decode("latin-1"))

    def _append(self) -> None:
        value = self._stack.pop()
        self._extend([value])

    def _appends(self) -> None:
        self._extend(self._since_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        self._charge(_SLOT_COST * len(values))
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, Opaque):
            target.elements.extend(values)
        else:
            raise ValueError("it appends to a value that is no list")

    def _add_items(self) -> None:
        values = self._since_mark()
        target = self._stack[-1]
        self._charge(_MARK_COST * len(values))
        if isinstance(target, set):
            target.update(check_key(value) for value in values)
        elif isinstance(target, Opaque):
            target.elements.extend(values)
        else:
            raise ValueError("it adds to a value that is no set")

    def _set_item(self) -> None:
        value = self._stack.pop()
        key = self._stack.pop()
        self._set([key, value])

    def _set_items(self) -> None:
        self._set(self._since_mark())

    def _set(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Opaque):
            target = target.items
        if not isinstance(target, dict):
            raise ValueError("it sets items of a value that is no dict")
        target.update(self._pairs(values))

    def _pairs(self, values: list[Any]) -> dict[Any, Any]:
        self._charge(2 * _MARK_COST * len(values))
        keys = (check_key(key) for key in values[::2])
        return dict(zip(keys, values[1::2], strict=True))

    def _tuple(self, count: int) -> None:
        values = self._stack[-count:]
        if len(values) < count:
            raise ValueError("it takes more values than it has")
        del self._stack[-count:]
        self._push(tuple(values), _MARK_COST)

    def _put(self, index: int) -> None:
        self._charge(2 * _MARK_COST)
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _memoize(self) -> None:
        self._put(len(self._memo))

    def _mark(self) -> None:
        self._charge(_MARK_COST)
        self._marked.append(self._stack)
        self._stack = []

    def _frozen_set(self) -> None:
        values = self._since_mark()
        self._charge(_MARK_COST * len(values))
        self._push(frozenset(check_key(value) for value in values), _CONTAINER_COST)

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._since_mark()

    def _global(self, module: str, name: str) -> Global:
        self._charge(_CONTAINER_COST)
        return Global(module, name)

    def _global_lines(self) -> Global:
        module, name = self._cursor.line().decode("utf-8"), self._cursor.line().decode("utf-8")
        return self._global(module, name)

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("it makes a name of values that are no strings")
        self._stack.append(self._global(module, name))

    def _extension(self) -> None:
        raise ValueError("it uses the extension registry, whose meaning it does not say")

    def _reduce(self) -> None:
        args = self._stack.pop()
        self._stack.append(self._call(self._stack.pop(), args))

    def _instance(self) -> None:  # INST: the class is named in the text
        args = tuple(self._since_mark())
        self._stack.append(self._call(self._global_lines(), args))

    def _object(self) -> None:  # OBJ: the class is the first value since the mark
        what, *args = self._since_mark()
        self._stack.append(self._call(what, tuple(args)))

    def _new_object_with_names(self) -> None:
        names, args = self._stack.pop(), self._stack.pop()
        if not isinstance(names, dict):
            raise ValueError("it calls a name with something that is no argument list")
        if names:
            if not isinstance(args, tuple):
                raise ValueError("it calls a name with something that is no argument list")
            self._charge(_SLOT_COST * len(args))
            args = (*args, names)
        self._stack.append(self._call(self._stack.pop(), args))

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, Opaque):
            target.state = state
        elif hasattr(target, "set_state"):  # a value of constructors.py that has one
            target.set_state(state)
        elif not isinstance(
            target, dict
        ):  # attributes of an OrderedDict say nothing about its items
            raise ValueError("it sets the state of a value that has none")

    def _persistent_line(self) -> None:
        self._stack.append(self._persistent(self._cursor.line().decode("utf-8")))

    def _persistent_value(self) -> None:
        self._stack.append(self._persistent(self._stack.pop()))

    def _frame(self) -> None:
        if self._number("<Q") > self._cursor.span.size:
            raise ValueError("it announces more bytes than it has")

    def _protocol(self) -> None:
        version = self._number("<B")
        if version > 5:
            raise ValueError(f"it has pickle protocol {version}, the newest known is 5")

    def _buffer(self) -> None:
        raise ValueError("it refers to data outside itself (an out-of-band buffer)")


def _integer(text: bytes) -> int:
    if len(text) > _LARGEST_INTEGER:
        raise ValueError("it holds an integer of absurd size")
    return int(text)


_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|[\\'\"abfnrtv])", re.S)
_LETTERS = dict(zip(b"\\'\"abfnrtv", b"\\'\"\a\b\f\n\r\t\v", strict=True))


def _unquote(line: bytes) -> str:
    """Text of a quoted string, with the escapes that Python's repr writes."""
    if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1]:
        raise ValueError("it holds a string without quotes")

    def value(match: re.Match[bytes]) -> bytes:
        code = match[1]
        return bytes([int(code[1:], 16) if len(code) == 3 else _LETTERS[code[0]]])

    body = line[1:-1]
    if b"\\" in _ESCAPE.sub(b"", body):
        raise ValueError("it holds a string with an unknown escape")
    return _ESCAPE.sub(value, body).decode("latin-1")


_INSTRUCTIONS: dict[bytes, Callable[[Reader], None]] = {
    b"I": Reader._int_line,
    b"J": lambda r: r._push(r._number("<i")),
    b"K": lambda r: r._push(r._number("<B")),
    b"M": lambda r: r._push(r._number("<H")),
    b"L": Reader._long_line,
    b"\x8a": lambda r: r._long("<B"),
    b"\x8b": lambda r: r._long("<i"),
    b"S": Reader._string_line,
    b"T": lambda r: r._binary_string("<i"),
    b"U": lambda r: r._binary_string("<B"),
    b"B": lambda r: r._push(r._bytes(r._number("<I"))),
    b"C": lambda r: r._push(r._bytes(r._number("<B"))),
    b"\x8e": lambda r: r._push(r._bytes(r._number("<Q"))),
    b"\x96": lambda r: r._push(r._bytes(r._number("<Q"))),
    b"\x97": Reader._buffer,
    b"\x98": Reader._buffer,
    b"N": lambda r: r._push(None),
    b"\x88": lambda r: r._push(True),
    b"\x89": lambda r: r._push(False),
    b"V": Reader._unicode_line,
    b"\x8c": lambda r: r._push(r._text(r._number("<B"))),
    b"X": lambda r: r._push(r._text(r._number("<I"))),
    b"\x8d": lambda r: r._push(r._text(r._number("<Q"))),
    b"F": Reader._float_line,
    b"G": lambda r: r._push(struct.unpack(">d", r._cursor.take(8))[0]),
    b"]": lambda r: r._push([], _CONTAINER_COST),
    b"a": Reader._append,
    b"e": Reader._appends,
    b"l": lambda r: r._push(r._since_mark(), _CONTAINER_COST),
    b")": lambda r: r._push(()),
    b"t": lambda r: r._push(tuple(r._since_mark()), _MARK_COST),
    b"\x85": lambda r: r._tuple(1),
    b"\x86": lambda r: r._tuple(2),
    b"\x87": lambda r: r._tuple(3),
    b"}": lambda r: r._push({}, _CONTAINER_COST),
    b"d": lambda r: r._push(r._pairs(r._since_mark()), _CONTAINER_COST),
    b"s": Reader._set_item,
    b"u": Reader._set_items,
    b"\x8f": lambda r: r._push(set(), _CONTAINER_COST),
    b"\x90": Reader._add_items,
    b"\x91": Reader._frozen_set,
    b"0": Reader._pop,
    b"2": lambda r: r._push(r._stack[-1]),
    b"(": Reader._mark,
    b"1": lambda r: r._since_mark().clear(),
    b"g": lambda r: r._get(_integer(r._cursor.line())),
    b"h": lambda r: r._get(r._number("<B")),
    b"j": lambda r: r._get(r._number("<I")),
    b"p": lambda r: r._put(_integer(r._cursor.line())),
    b"q": lambda r: r._put(r._number("<B")),
    b"r": lambda r: r._put(r._number("<I")),
    b"\x94": Reader._memoize,
    b"\x82": Reader._extension,
    b"\x83": Reader._extension,
    b"\x84": Reader._extension,
    b"c": lambda r: r._stack.append(r._global_lines()),
    b"\x93": Reader._stack_global,
    b"R": Reader._reduce,
    b"b": Reader._build,
    b"i": Reader._instance,
    b"o": Reader._object,
    b"\x81": Reader._reduce,  # NEWOBJ: the class is called like any name
    b"\x92": Reader._new_object_with_names,
    b"\x80": Reader._protocol,
    b"\x95": Reader._frame,
    b"P": Reader._persistent_line,
    b"Q": Reader._persistent_value,
}
