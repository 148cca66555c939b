"""The keys of a config: a dataclass tree as dotted names with types and aliases, and a config as YAML."""

from __future__ import annotations

import dataclasses
import enum
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from ssdd.engine.files import plain


def to_yaml(cfg: Any) -> str:
    """A config dataclass as YAML that ``preset=FILE.yaml`` reads back to an equal config."""
    return OmegaConf.to_yaml(OmegaConf.create(plain(cfg, standard=False)))


class SchemaField(NamedTuple):
    """One key of a schema: a value, or a group of keys when ``group`` is its dataclass."""

    type: Any
    optional: bool
    group: type | None
    field: dataclasses.Field
    owner: type

    @property
    def choices(self) -> tuple[Any, ...]:
        """The allowed values: metadata `choices` is a tuple, a table whose keys they are, or a function giving either.

        Read anew each time, so that an entry added to a table is a choice at once.
        """
        choices = self.field.metadata.get("choices", ())
        return tuple(choices() if callable(choices) else choices)


def schema_fields(schema: type, prefix: str = "") -> dict[str, SchemaField]:
    """Full dotted key -> field, depth first in the order of declaration; groups come before their keys."""
    found: dict[str, SchemaField] = {}
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind, optional = strip_optional(hints[field.name])
        group = kind if dataclasses.is_dataclass(kind) else None
        found[prefix + field.name] = SchemaField(kind, optional, group, field, schema)
        if group is not None:
            found |= schema_fields(group, f"{prefix}{field.name}.")
    return found


def with_keys(keys: Mapping[str, tuple[type, Any, str]]) -> Callable[[type], type]:
    """Decorator of a config dataclass: adds keys that a table decides, as name -> (type, default, documentation).

    The default of a group, a dataclass, is `...`: that of its own fields.
    """

    def extended(base: type) -> type:
        fields = []
        for name, (kind, default, doc) in keys.items():
            given = {"default_factory": kind} if default is ... else {"default": default}
            fields.append((name, kind, dataclasses.field(**given, metadata={"doc": doc})))
        namespace = {"__doc__": base.__doc__, "__module__": base.__module__}
        return dataclasses.make_dataclass(base.__name__, fields, bases=(base,), namespace=namespace)

    return extended


class Alias(NamedTuple):
    """What another name of a key stands for: the key, or the item of it when it is a list."""

    key: str
    item: int | None


def schema_aliases(schema: type) -> dict[str, Alias]:
    """The other names that keys of ``schema`` have: its class variable `ALIASES`, such as
    ``{"training.beta2": "training.betas[1]"}``, whose names are those of values, not of groups.
    """
    found = {}
    for name, target in getattr(schema, "ALIASES", {}).items():
        key, item = re.fullmatch(r"([\w.]+)(?:\[(\d+)\])?", target).groups()
        found[name] = Alias(key, None if item is None else int(item))
    return found


def type_name(kind: Any, optional: bool = False) -> str:
    """A field's type as the help and the errors print it, such as ``list[int]`` or ``float or null``."""
    if kind is Any:
        return "any value"
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        name = " or ".join(type_name(part) for part in typing.get_args(kind))
    elif isinstance(kind, type) and issubclass(kind, enum.Enum):
        name = " | ".join(member.name for member in kind)
    elif typing.get_args(kind):
        arguments = ", ".join(type_name(part) for part in typing.get_args(kind) if part is not Ellipsis)
        name = f"{typing.get_origin(kind).__name__}[{arguments}]"
    else:
        name = kind.__name__
    return f"{name} or null" if optional else name


def strip_optional(kind: Any) -> tuple[Any, bool]:
    """A type without None, and whether None is a value of it."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return kind, kind is Any
    parts = [part for part in typing.get_args(kind) if part is not types.NoneType]
    return (parts[0] if len(parts) == 1 else typing.Union[tuple(parts)]), len(parts) < len(typing.get_args(kind))  # noqa: UP007
