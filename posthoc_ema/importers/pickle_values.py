"""What a pickle is read into where plain containers do not do, and how much reading may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_FREE_BYTES, _BYTES_PER_BYTE, _MOST_BYTES = 64 << 20, 8, 1 << 30
_LONGEST_KEY, _LONGEST_STRING_KEY = 64, 1 << 16
_SCALARS = (str, int, float, bytes, bool, type(None))


@dataclass(frozen=True)
class Global:
    """A name that a pickle mentions: a module and an attribute in it, never looked up."""

    module: str
    name: str


class Opaque:
    """An object that a pickle would have made by calling a name: what it said, and nothing done.

    Attributes:
        module: module of the name.
        name: the name itself.
        args: arguments of the call.
        state: what the pickle would have set as the object's state, or None.
        items: what it would have set as items (of a subclass of dict).
        elements: what it would have appended (to a subclass of list or set).
    """

    __slots__ = ("args", "elements", "items", "module", "name", "state")

    def __init__(self, module: str, name: str, args: tuple[Any, ...]) -> None:
        self.module = module
        self.name = name
        self.args = args
        self.state: Any = None
        self.items: dict[Any, Any] = {}
        self.elements: list[Any] = []

    def __repr__(self) -> str:
        return f"Opaque({self.module}.{self.name})"


class Budget:
    """How much memory reading one file may take; shared by the pickles inside it.

    Args:
        file_bytes: size of the file.
    """

    def __init__(self, file_bytes: int) -> None:
        self._left = min(_FREE_BYTES + _BYTES_PER_BYTE * file_bytes, _MOST_BYTES)

    def charge(self, num_bytes: int) -> None:
        """Take from the budget; ValueError when it is used up."""
        self._left -= num_bytes
        if self._left < 0:
            raise ValueError("reading it would take far more memory than its size warrants")


Construct = Callable[[Global, tuple[Any, ...]], Any]
"""Builds the value of a call that is understood; raises `NotUnderstood` for the others."""


class NotUnderstood(Exception):
    """Raised by a `Construct` for a name that it does not know."""


def check_key(key: Any) -> Any:
    """Return `key` if it can be one of a dict or set: hashing it must take bounded time."""
    if isinstance(key, tuple):
        if len(key) > _LONGEST_KEY or not all(isinstance(part, _SCALARS) for part in key):
            raise ValueError("it uses long or nested values as keys")
    elif isinstance(key, str):
        if len(key) > _LONGEST_STRING_KEY:
            raise ValueError("it uses long or nested values as keys")
    elif isinstance(key, list | dict | set | frozenset):
        raise ValueError("it uses containers as keys")
    return key
