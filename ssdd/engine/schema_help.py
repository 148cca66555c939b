"""The ``--help`` page of a config schema, written from its types, defaults and docstrings."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from typing import Any

from ssdd.engine.files import plain
from ssdd.engine.presets import available
from ssdd.engine.schema import SchemaField, schema_aliases, schema_fields, type_name

_WIDTH = 100


def help_text(schema: type, program: str, description: str) -> str:
    """Every key of ``schema`` with its default, type, docstring and other names, grouped by component, 100 columns."""
    blocks = [
        f"usage: {program} [preset=NAME] [+blocks=NAME] [key=value ...]",
        textwrap.fill(description, _WIDTH),
    ]
    for kind, prefix in (("presets", "preset="), ("blocks", "+blocks=")):
        if names := available(kind):
            blocks.append(_fill(f"{kind}: " + ", ".join(prefix + name for name in names), ""))
    groups: dict[str, list[str]] = {"": ["keys"]}
    also: dict[str, list[str]] = {}
    for name, (key, item) in schema_aliases(schema).items():
        also.setdefault(key, []).append(name if item is None else f"{name} (item {item})")
    made: dict[str, Any] = {}  # group key -> its default value, which may differ from its class's defaults
    for key, field in schema_fields(schema).items():
        parent, _, name = key.rpartition(".")
        default = getattr(made[parent], name) if made.get(parent) is not None else _default(field)
        if field.group is not None:
            made[key] = None if default is dataclasses.MISSING else default
            doc = field_docs(field.owner).get(field.field.name) or _class_doc(field.group)
            groups[key] = [_fill(f"{key}: {doc}" if doc else key, "")]
            if field.optional:
                groups[key].append(f"  {key}=null turns the group off" + (" (default)" if default is None else ""))
        else:
            groups[parent] += _entry(key, field, default, also.get(key, []))
    blocks += ["\n".join(lines) for lines in groups.values() if len(lines) > 1]
    return "\n\n".join(blocks)


def field_docs(schema: type) -> dict[str, str]:
    """Field name -> metadata `doc`, or the string literal after the field in the source of a class of ``schema``."""
    docs = {field.name: field.metadata["doc"] for field in dataclasses.fields(schema) if "doc" in field.metadata}
    for cls in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        except (OSError, TypeError):  # no source available, as in a frozen application
            continue
        for field, after in zip(body, body[1:], strict=False):
            literal = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(literal, str):
                docs[field.target.id] = " ".join(literal.split())
    return docs


def _entry(key: str, field: SchemaField, default: Any, also: list[str]) -> list[str]:
    if field.choices:
        kind = " | ".join(str(choice) for choice in field.choices) + (" or null" if field.optional else "")
    else:
        kind = type_name(field.type, field.optional)
    shown = "required" if default is dataclasses.MISSING else f"default {_yaml_value(default)}"
    lines = [_fill(f"{key}  ({kind}; {shown})", "  ")]
    if doc := field_docs(field.owner).get(field.field.name):
        lines.append(_fill(doc, "      "))
    if also:
        lines.append(_fill(f"also: {', '.join(also)}", "      "))
    return lines


def _default(field: SchemaField) -> Any:
    if field.field.default_factory is not dataclasses.MISSING:
        return field.field.default_factory()
    return dataclasses.MISSING if field.field.default == "???" else field.field.default


def _yaml_value(value: Any) -> str:
    value = plain(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(_yaml_value(item) for item in value)}]"
    return str(value) if value != "" else "''"


def _class_doc(cls: type) -> str:
    doc = inspect.getdoc(cls) or ""
    is_generated = doc.startswith(f"{cls.__name__}(")
    return "" if is_generated else " ".join(doc.split("\n\n")[0].split())


def _fill(text: str, indent: str) -> str:
    later = indent + "    " if not indent or indent == "  " else indent
    return textwrap.fill(
        text, _WIDTH, initial_indent=indent, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )
