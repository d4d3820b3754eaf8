"""Frozen records to plain values and back: unknown keys, wrong types and ranges are errors.

What every configuration record of the trainer is checked and travels with.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from posthoc_ema import ConfigError


def require(ok: bool, name: str, rule: str, value: object, remedy: str = "") -> None:
    """Raise `ConfigError` with "NAME must RULE, got VALUE. REMEDY" unless `ok`."""
    if not ok:
        raise ConfigError(f"{name} must {rule}, got {value!r}.{' ' if remedy else ''}{remedy}")


def encode(value: Any) -> Any:
    """Nested dictionaries of plain values; tuples become lists."""
    if dataclasses.is_dataclass(value):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [encode(v) for v in value] if isinstance(value, tuple) else value


def decode_record(cls: type[Any], values: Any, prefix: str = "") -> Any:
    """Inverse of `encode` for a record of type `cls`.

    Args:
        cls: the record's class.
        values: what was read; must be a mapping.
        prefix: dotted path of the record with a dot at its end, for messages.

    Raises:
        ConfigError: a key is unknown or missing, or a value has the wrong type or range.
    """
    require(
        isinstance(values, Mapping), prefix.rstrip(".") or "configuration", "be an object", values
    )
    hints, fields = typing.get_type_hints(cls), dataclasses.fields(cls)
    names = [f.name for f in fields]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f" Did you mean {prefix}{near[0]}?" if near else f" Known: {', '.join(names)}."
            raise ConfigError(f"{prefix}{key} is no field of {cls.__name__}.{hint}")
    for f in fields:
        optional = (
            f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        )
        if f.name not in values and not optional:
            raise ConfigError(f"{prefix}{f.name} is missing, and it has no default.")
    return cls(**{k: _decode(hints[k], v, prefix + k) for k, v in values.items()})


def _decode(kind: Any, value: Any, name: str) -> Any:
    """Check one JSON value against its annotation; lists become tuples, a lone number one of one."""
    if dataclasses.is_dataclass(kind):
        return decode_record(typing.cast(type[Any], kind), value, f"{name}.")
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if item is float and isinstance(value, int | float) and not isinstance(value, bool):
            value = [value]
        require(isinstance(value, list | tuple), name, "be a list", value)
        return tuple(_decode(item, v, name) for v in value)
    if isinstance(kind, types.UnionType):
        inner = next(k for k in typing.get_args(kind) if k is not types.NoneType)
        return None if value is None else _decode(inner, value, name)
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        require(number and math.isfinite(value), name, "be a finite number", value)
        return float(value)
    valid = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    require(valid, name, f"be of type {kind.__name__}", value)
    return value
