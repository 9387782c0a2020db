"""A pickle interpreter that builds containers, literals and descriptions of tensors, no more.

Nothing is imported and nothing is called; `pickleobjects` says what a pickle may speak of. Every
other opcode ends the reading with an `UnsafeFileError` that names it.

Memory is bounded by the pickle's own length: no opcode repeats data, keys are never compound
(hashing a tuple that contains itself many times over would take for ever), and values are never
printed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from optlm.checkpoint.pickleobjects import (
    BadPickleError,
    Global,
    Opaque,
    apply,
    check_global,
    is_plain_key,
    storage_of,
    unsafe,
)

MAX_PICKLE_BYTES = 4 * 2**20  # OPT-175B in one part needs 0.2 MB


def load(data: bytes) -> object:
    """The object that a pickle describes.

    Raises:
        UnsafeFileError: it refers to a global or uses an opcode that is not on the lists above.
        CheckpointError: it is cut off, too long or inconsistent.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise BadPickleError(f"the pickle has {len(data)} bytes; the limit is {MAX_PICKLE_BYTES}")
    return _Machine(data).run()


class _Stop(Exception):
    pass


class _Machine:
    """The stack machine of the pickle format, restricted."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> object:
        try:
            while True:
                code = self.take(1)[0]
                operation = _OPERATIONS.get(code)
                if operation is None:
                    raise unsafe(f"the opcode 0x{code:02x}")
                operation(self)
        except _Stop:
            if len(self.stack) != 1 or self.marks:
                raise BadPickleError("the pickle ends with a stack of the wrong height") from None
            return self.stack.pop()

    # ---- operands ----------------------------------------------------------------------------

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise BadPickleError("the pickle is cut off")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 1024)
        if end < 0:
            raise BadPickleError("the pickle has a name without an end")
        raw = self.take(end - self.at)
        self.at += 1
        return self.text(raw)

    @staticmethod
    def text(raw: bytes) -> str:
        try:
            return raw.decode("utf-8", errors="surrogatepass")
        except UnicodeDecodeError as error:
            raise BadPickleError(f"the pickle has text that is not UTF-8: {error}") from None

    def pop(self) -> Any:
        if not self.stack:
            raise BadPickleError("the pickle takes from an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise BadPickleError("the pickle takes from an empty stack")
        return self.stack[-1]

    def push(self, value: object) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        if not self.marks:
            raise BadPickleError("the pickle lacks a mark")
        values, self.stack = self.stack, self.marks.pop()
        return values

    # ---- objects -----------------------------------------------------------------------------

    def push_global(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise BadPickleError("the pickle has a global whose name is not text")
        name = f"{module.replace('__builtin__', 'builtins')}.{name}"
        self.push(check_global(name))

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Opaque):
            target.state = state
        elif not isinstance(target, dict):  # an OrderedDict's own attributes carry no weights
            raise BadPickleError("the pickle sets the state of something that has none")

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise BadPickleError("the pickle calls something that is not a function")
        self.push(apply(function, arguments))

    def set_items(self, pairs: list[Any]) -> None:
        target = self.top()
        if len(pairs) % 2:
            raise BadPickleError("the pickle has a key without a value")
        if isinstance(target, Opaque):
            target = target.items
        if not isinstance(target, dict):
            raise BadPickleError("the pickle sets items of something that is not a dictionary")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not is_plain_key(key):
                raise BadPickleError("the pickle has a key that is neither text nor small number")
            target[key] = value

    def extend(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Opaque):
            target = target.values
        if not isinstance(target, list):
            raise BadPickleError("the pickle appends to something that is not a list")
        target.extend(values)

    def new_object(self) -> None:
        arguments, type_ = self.pop(), self.pop()
        if not isinstance(type_, Global):
            raise BadPickleError("the pickle makes an object of something that is not a class")
        self.push(apply(type_, arguments if isinstance(arguments, tuple) else ()))

    def remember(self, index: int) -> None:
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise BadPickleError("the pickle recalls a value that it never stored")
        self.push(self.memo[index])

    def persistent(self) -> None:
        self.push(storage_of(self.pop()))

    def stop(self) -> None:
        raise _Stop

    def protocol(self) -> None:
        version = self.take(1)[0]
        if version > 5:
            raise BadPickleError(f"the pickle has protocol {version}; 2 to 5 are known")

    def long(self) -> None:
        self.push(int.from_bytes(self.take(self.number("B")), "little", signed=True))

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.push_global(module, name)


_Operation = Callable[[_Machine], None]

_OPERATIONS: dict[int, _Operation] = {
    ord("."): _Machine.stop,
    ord("("): _Machine.mark,
    ord("0"): lambda m: void(m.pop()),
    ord("1"): lambda m: void(m.since_mark()),
    ord("2"): lambda m: m.push(m.top()),
    0x80: _Machine.protocol,
    0x95: lambda m: void(m.take(8)),  # frame length
    # literals
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("J"): lambda m: m.push(m.number("i")),
    ord("K"): lambda m: m.push(m.number("B")),
    ord("M"): lambda m: m.push(m.number("H")),
    0x8A: _Machine.long,
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    ord("X"): lambda m: m.push(m.text(m.take(m.number("I")))),
    0x8C: lambda m: m.push(m.text(m.take(m.number("B")))),
    0x8D: lambda m: m.push(m.text(m.take(m.number("Q")))),
    ord("B"): lambda m: m.push(m.take(m.number("I"))),
    ord("C"): lambda m: m.push(m.take(m.number("B"))),
    0x8E: lambda m: m.push(m.take(m.number("Q"))),
    # containers; sets become `Opaque`, for their members are never needed
    ord(")"): lambda m: m.push(()),
    ord("]"): lambda m: m.push([]),
    ord("}"): lambda m: m.push({}),
    0x8F: lambda m: m.push(Opaque(type=Global(name="builtins.set"))),
    ord("t"): lambda m: m.push(tuple(m.since_mark())),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("a"): lambda m: m.extend([m.pop()]),
    ord("e"): lambda m: m.extend(m.since_mark()),
    0x90: lambda m: m.extend(m.since_mark()),
    0x91: lambda m: m.push(Opaque(type=Global(name="builtins.frozenset"), values=m.since_mark())),
    ord("s"): lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    ord("u"): lambda m: m.set_items(m.since_mark()),
    # memo
    ord("q"): lambda m: m.remember(m.number("B")),
    ord("r"): lambda m: m.remember(m.number("I")),
    0x94: lambda m: m.remember(len(m.memo)),
    ord("h"): lambda m: m.recall(m.number("B")),
    ord("j"): lambda m: m.recall(m.number("I")),
    # globals and objects
    ord("c"): lambda m: m.push_global(m.line(), m.line()),
    0x93: _Machine.stack_global,
    ord("R"): _Machine.reduce,
    0x81: _Machine.new_object,
    ord("b"): _Machine.build,
    ord("Q"): _Machine.persistent,
}


def void(_: object) -> None:
    """Drop a value where an operation must return nothing."""
