"""Command lines: YAML files and ``key=value`` arguments over the defaults of a dataclass tree.

Later sources win: dataclass defaults, presets, blocks, command line. A field without a default must be given. A value
is read by the type of its field, so ``run_name=5_000`` stays text and ``training.steps=5_000`` is a number;
``${other.key}`` refers to another key. A key may have other names (:func:`~ssdd.engine.schema.schema_aliases`), valid
wherever the key is; different values under two names in one source are refused.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ssdd.engine.errors import UserError, first_line
from ssdd.engine.presets import named_file
from ssdd.engine.schema import Alias, SchemaField, schema_aliases, schema_fields, strip_optional, type_name
from ssdd.engine.schema_help import help_text

T = TypeVar("T")
_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def parse(schema: type[T], argv: list[str], *, program: str, description: str) -> T:
    """An instance of the dataclass ``schema`` filled from the configuration files and ``argv`` (without the program).

    Grammar: ``key=value`` (dotted keys), ``preset=NAME`` (``configs/presets/NAME.yaml``, or a path ending in
    ``.yaml``), ``+blocks=NAME`` (``configs/blocks/NAME.yaml``, may be repeated), ``--help`` or ``-h`` (prints
    :func:`help_text` and exits with status 0). :class:`UserError` names the argument or the file and line of an unknown
    key (with the nearest valid one), a value of the wrong type or outside the field's ``metadata={"choices": (...)}``,
    and a missing value.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(schema, program, description))
        raise SystemExit(0)
    files, arguments = _split(argv)
    builder = _Builder(schema)
    for path in files:
        builder.merge_file(path)
    builder.merge_arguments(arguments)
    return builder.finish()


def read_config(schema: type[T], path: Path) -> T:
    """The config that a YAML file sets over the defaults, as the ``config.yaml`` of a run; errors as of `parse`."""
    builder = _Builder(schema)
    builder.merge_file(path)
    return builder.finish()


def _split(argv: Iterable[str]) -> tuple[list[Path], list[tuple[str, str, str]]]:
    """Arguments as (YAML files in the order of precedence, [(argument, key, text)])."""
    presets: list[Path] = []
    blocks: list[Path] = []
    arguments = []
    for argument in argv:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise UserError(f"argument {argument!r}: expected key=value; --help lists the keys")
        if key == "preset":
            presets.append(named_file("preset", "presets", text))
        elif key == "+blocks":
            blocks += [named_file("+blocks", "blocks", name) for name in text.strip("[]").split(",")]
        elif not (key[0].isalpha() or key[0] == "_"):
            raise UserError(
                f"argument {argument!r}: write {key.lstrip('+-~')}={text}; only +blocks=NAME takes a prefix"
            )
        else:
            arguments.append((argument, key, text))
    return presets + blocks, arguments


def _argument_node(argument: str, text: str, field: SchemaField | None) -> yaml.Node:
    """The value of an argument as a YAML node; what goes to a text field needs no YAML quoting."""
    is_text = field is not None and field.type in (str, Path)
    if not text.strip() or (is_text and not text.startswith(("'", '"'))):
        return yaml.ScalarNode("", text)
    try:
        return yaml.compose(text, yaml.SafeLoader) or yaml.ScalarNode("", "")
    except yaml.YAMLError as error:
        raise UserError(f"argument {argument!r}: the value is not valid YAML ({error.problem}); quote it") from None


class _Builder:
    """A config under construction: every assignment is checked against the schema and remembers where it came from."""

    def __init__(self, schema: type):
        self.fields, self.aliases = schema_fields(schema), schema_aliases(schema)
        self.config = OmegaConf.structured(schema)
        self.given: dict[str, dict[str, tuple[int | None, Any]]] = {}  # by this source: key -> name -> item, value
        self.origin: dict[str, str] = {}  # key -> where its value was last set

    def merge_file(self, path: Path) -> None:
        try:
            root = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}: expected 'key: value' lines at the top level")
        self.given = {}
        self._merge_mapping("", root, lambda node: f"{path}, line {node.start_mark.line + 1}")

    def merge_arguments(self, arguments: Iterable[tuple[str, str, str]]) -> None:
        self.given = {}
        for argument, name, text in arguments:
            node = _argument_node(argument, text, self.fields.get(self._meant(name).key))
            self._assign(name, node, f"argument {argument!r}", lambda _, where=f"argument {argument!r}": where)

    def finish(self) -> Any:
        """The dataclass instance, with nothing missing, interpolations resolved and choices checked."""
        try:
            missing = sorted(OmegaConf.missing_keys(self.config))
            resolved = None if missing else OmegaConf.to_object(self.config)
        except OmegaConfBaseException as error:
            key = error.full_key or "the configuration"
            raise UserError(f"{self.origin.get(key, key)}: {key}: {first_line(error)}") from None
        if missing:
            field = self.fields[missing[0]]
            kind = type_name(field.type, field.optional)
            raise UserError(f"{missing[0]}=... must be given ({kind}); --help explains it")
        for key, field in self.fields.items():
            if field.choices:
                self._check_choice(key, field.choices, _value_at(resolved, key))
        return resolved

    def _merge_mapping(self, prefix: str, node: yaml.MappingNode, place: Callable[[yaml.Node], str]) -> None:
        seen = set()
        for name, value in node.value:
            if name.value in seen:
                raise UserError(f"{place(name)}: {prefix}{name.value} appears twice")
            seen.add(name.value)
            self._assign(prefix + name.value, value, place(name), place)

    def _meant(self, name: str) -> Alias:
        return self.aliases.get(name, Alias(name, None))

    def _assign(self, name: str, node: yaml.Node, where: str, place: Callable[[yaml.Node], str]) -> None:
        key, item = self._meant(name)
        field = self.fields.get(key)
        if isinstance(node, yaml.MappingNode) and self._is_group(name):
            self._open_groups(f"{key}.")
            self._merge_mapping(f"{key}.", node, place)
            return
        if field is not None:
            kind, optional = field.type, field.optional
        elif free := [f for prefix, f in self.fields.items() if _is_dict(f.type) and key.startswith(f"{prefix}.")]:
            kind, optional = strip_optional(typing.get_args(free[0].type)[1])
        else:
            raise UserError(f"{where}: unknown key {key!r}; {_nearest(key, self.fields)}")
        if item is not None:
            kind, optional = strip_optional(typing.get_args(kind)[0])
        chosen = field is not None and field.choices and isinstance(node, yaml.ScalarNode)
        bare = typing.get_origin(kind) is list and chosen and node.value not in _NULLS
        try:  # one of a list's choices needs no brackets, as metrics=auto
            value = _convert(yaml.SequenceNode("", [node]) if bare else node, kind, optional)
            self._open_groups(key)
            whole = _with_item(OmegaConf.select(self.config, key), item, value) if item is not None else value
            OmegaConf.update(self.config, key, whole)
        except (ValueError, TypeError, OmegaConfBaseException):
            expected = type_name(kind, optional)
            if dataclasses.is_dataclass(kind):
                expected = "a group of keys: " + ", ".join(f"{key}.{part.name}" for part in dataclasses.fields(kind))
            raise UserError(f"{where}: {name} expects {expected}; got {_text(node)}") from None
        self.origin[key] = where
        names = self.given.setdefault(key, {})
        names[name] = item, value
        for other, (its_item, its_value) in names.items():
            if other != name and whole != (its_value if its_item is None else _with_item(whole, its_item, its_value)):
                raise UserError(f"{where}: {name} and {other} set the same key to different values; give {key} alone")

    def _is_group(self, name: str) -> bool:
        """Whether keys may lie below a name: those of a group, or only other names of keys."""
        if name in self.fields:
            return self.fields[name].group is not None
        return any(alias.startswith(f"{name}.") for alias in self.aliases)

    def _open_groups(self, key: str) -> None:
        """Give the optional groups above ``key`` that are null their defaults."""
        parts = key.split(".")[:-1]
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            group = self.fields[name].group if name in self.fields else None
            if group is not None and OmegaConf.select(self.config, name) is None:
                OmegaConf.update(self.config, name, OmegaConf.structured(group))

    def _check_choice(self, key: str, choices: tuple[Any, ...], value: Any) -> None:
        given = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        for item in given:
            if item not in choices:
                names = [str(choice) for choice in choices]
                near = difflib.get_close_matches(str(item), names, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                where = self.origin.get(key, "default")
                raise UserError(f"{where}: {key} must be one of {', '.join(names)}; got {item!r}{hint}")


def _with_item(values: Iterable[Any], item: int, value: Any) -> list[Any]:
    values = list(values)
    return [*values[:item], value, *values[item + 1 :]]


def _value_at(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name, None)  # None inside an optional group that is off
    return config


def _is_dict(kind: Any) -> bool:
    return typing.get_origin(kind) is dict


def _convert(node: yaml.Node, kind: Any, optional: bool) -> Any:
    """The Python value of a YAML node for a field of type ``kind``; ValueError when they do not fit."""
    if isinstance(node, yaml.ScalarNode):
        return _convert_scalar(node.value, node.style in ("'", '"'), kind, optional)
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if isinstance(node, yaml.SequenceNode) and origin in (list, tuple, Any):
        kinds = [Any] * len(node.value) if not arguments else [a for a in arguments if a is not Ellipsis]
        if origin is list or Ellipsis in arguments:
            kinds = kinds[:1] * len(node.value)
        return [_convert(item, *strip_optional(part)) for item, part in zip(node.value, kinds, strict=True)]
    if isinstance(node, yaml.MappingNode) and origin in (dict, Any):
        value_kind = strip_optional(arguments[1] if arguments else Any)
        return {key.value: _convert(value, *value_kind) for key, value in node.value}
    raise ValueError


def _convert_scalar(text: str, quoted: bool, kind: Any, optional: bool) -> Any:
    if "${" in text:
        return text  # an interpolation: OmegaConf resolves it and checks its type
    if not quoted and text in _NULLS and not (kind is str and text == ""):
        if not optional:
            raise ValueError
        return None
    if kind is bool:
        if text.lower() not in _BOOLEANS:
            raise ValueError
        return _BOOLEANS[text.lower()]
    if kind is float and text.lower().lstrip("+-") in (".inf", ".nan"):
        return float(text.replace(".", ""))
    if kind in (int, float):
        return kind(text)
    if isinstance(kind, type):
        if issubclass(kind, (list, tuple, dict)) or dataclasses.is_dataclass(kind):
            raise ValueError
        return text  # str, Path, and enums, whose names OmegaConf checks
    if kind is Any or typing.get_origin(kind) in (typing.Union, types.UnionType):
        return text if quoted else _convert_untyped(text, typing.get_args(kind) or (bool, int, float, str))
    raise ValueError


def _convert_untyped(text: str, kinds: tuple[Any, ...]) -> Any:
    for kind in (bool, int, float, str):
        try:
            if kind in kinds:
                return _convert_scalar(text, True, kind, False)
        except ValueError:
            continue
    raise ValueError


def _text(node: yaml.Node) -> str:
    return repr(node.value) if isinstance(node, yaml.ScalarNode) else yaml.serialize(node).strip()


def _nearest(key: str, fields: dict[str, SchemaField]) -> str:
    """A hint naming the valid key closest to ``key``: same last part, then similar whole, then similar last part."""
    keys = [name for name, field in fields.items() if field.group is None]
    last = {name: name.rpartition(".")[2] for name in keys}
    own_last = key.rpartition(".")[2]
    similar = difflib.get_close_matches(own_last, last.values(), 1, 0.75)
    near = (
        difflib.get_close_matches(key, [name for name in keys if last[name] == own_last], 1, 0.0)
        or difflib.get_close_matches(key, keys, 1, 0.7)
        or difflib.get_close_matches(key, [name for name in keys if last[name] in similar], 1, 0.0)
    )
    return f"did you mean {near[0]}?" if near else "--help lists the keys"
