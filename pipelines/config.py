"""Settings in three layers: dataclass defaults, a YAML file, ``key.path=value`` on the command line.

Every mistake is collected and reported together; an unknown key is refused with its nearest valid name.
A section that has a ``name`` takes a plain text for it: ``vae: tiny`` is ``vae: {name: tiny}``.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from stages.errors import ConfigError

Config = TypeVar("Config")

# Names that users of Latte, PixArt and Open-Sora reach for.
FAMILIAR = {"work_dir": "output", "load_from": "train.init_from", "activation_checkpointing": "train.activation_memory"}


def load_config(
    kind: type[Config],
    base: str | Path | Mapping[str, Any] | None,
    overrides: Sequence[str],
    options: Mapping[str, Any] | None = None,
) -> Config:
    """``kind``'s defaults, then ``base``, then ``overrides``, then the settings that have an option of their own.

    base: a YAML file, or settings that were read from elsewhere.
    Raises ConfigError naming every mistake.
    """
    mistakes: list[str] = []
    layers = [dict(base) if isinstance(base, Mapping) else _read_yaml(base)] if base else []
    layers += [_parse_override(text, mistakes) for text in overrides]
    layers += [dict(options or {})]
    merged: dict[str, Any] = {}
    for layer in layers:
        _merge(merged, layer)
    config = _build(kind, merged, "", sorted(_valid_keys(kind)), mistakes)
    if mistakes:
        raise ConfigError("; ".join(mistakes))
    return config


class _OnceLoader(yaml.SafeLoader):
    """YAML forbids a key that comes twice in a mapping; PyYAML takes the last, and what came before is lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in keys:
                raise yaml.constructor.ConstructorError(None, None, f"found {key.value} twice", key.start_mark)
            keys.add(str(key.value))
        return super().construct_mapping(node, deep)


def _read_yaml(file: str | Path) -> dict[str, Any]:
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"no config file at {path}: give --config an existing YAML file")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _OnceLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, expected keys and values")
    return content


def _parse_override(text: str, mistakes: list[str]) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        mistakes.append(f"found {text!r}: settings are written key.path=value")
        return {}
    nested: Any = _scalar(value) if value.startswith("{") else _Typed(value, _scalar(value))
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return nested


@dataclasses.dataclass(frozen=True)
class _Typed:
    """A value from the command line: what was typed, which a text setting takes as it is, and as YAML reads it."""

    text: str
    value: Any


def _scalar(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _merge(base: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        below = base.get(key)
        if isinstance(value, dict) and isinstance(below, str | _Typed):
            base[key] = {"name": below, **value}
        elif isinstance(value, dict) and isinstance(below, dict):
            _merge(below, value)
        elif isinstance(value, str | _Typed) and isinstance(below, dict):
            below["name"] = value
        else:
            base[key] = value


def _valid_keys(kind: type, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _valid_keys(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def _build(kind: type, values: Mapping[str, Any], prefix: str, valid: list[str], mistakes: list[str]) -> Any:
    hints = typing.get_type_hints(kind)
    known = {field.name: field for field in dataclasses.fields(kind) if field.init}
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in known:
            mistakes.append(_unknown(name, valid))
        elif dataclasses.is_dataclass(hints[key]):
            if isinstance(value, str | _Typed) and f"{name}.name" in valid:
                value = {"name": value}
            section = value.value if isinstance(value, _Typed) else value
            if isinstance(section, dict):
                arguments[key] = _build(hints[key], section, f"{name}.", valid, mistakes)  # type: ignore[arg-type]
            else:
                mistakes.append(f"{name}: found {section!r}, expected keys such as {_examples(name, valid)}")
        else:
            arguments[key] = _convert(value, hints[key], name, mistakes)
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        if not mistakes:  # a dataclass that checks its own values; wrong types above would only repeat
            mistakes.append(f"{prefix}* {error}" if prefix else str(error))
        return None


def _unknown(name: str, valid: list[str]) -> str:
    last = name.rsplit(".", 1)[-1]
    nearest = FAMILIAR.get(last)
    if nearest not in valid:
        by_last = {key.rsplit(".", 1)[-1]: key for key in valid}
        close = difflib.get_close_matches(name, valid, 1, 0.5)
        close = close or [by_last[match] for match in difflib.get_close_matches(last, by_last, 1, 0.5)]
        nearest = close[0] if close else None
    return f"unknown key {name!r}" + (f", did you mean {nearest!r}?" if nearest else "")


def _examples(name: str, valid: list[str]) -> str:
    return ", ".join([key for key in valid if key.startswith(f"{name}.")][:3])


def _convert(value: Any, hint: Any, name: str, mistakes: list[str]) -> Any:
    options = _options(hint)
    for reading in _readings(value, options):
        for option in options:
            accepted, converted = _accept(reading, option)
            if accepted:
                return converted
    expected = " or ".join(_describe(option) for option in options)
    mistakes.append(f"{name}: found {_untyped(value)!r}, expected {expected}")
    return value


def _readings(value: Any, options: tuple[Any, ...]) -> list[Any]:
    """What a value can be: as YAML reads it, then, from the command line, as it was typed; of a list, each item."""
    readings = [_untyped(value)]
    if isinstance(value, _Typed):
        is_list = isinstance(value.value, list) and any(typing.get_origin(each) in (list, tuple) for each in options)
        readings.append(yaml.load(value.text, yaml.BaseLoader) if is_list else value.text)
    return readings


def _untyped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untyped(entry) for key, entry in value.items()}
    return value.value if isinstance(value, _Typed) else value


def _options(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _accept(value: Any, hint: Any) -> tuple[bool, Any]:
    origin = typing.get_origin(hint) or hint
    if hint is Any:
        return True, value
    if hint is type(None):
        return value is None, None
    if origin is typing.Literal:
        return value in typing.get_args(hint), value
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            return False, None
        items = typing.get_args(hint) or (Any, ...)
        if origin is tuple and Ellipsis not in items and len(value) != len(items):
            return False, None
        results = [_accept(entry, items[0]) for entry in value]
        return all(ok for ok, _ in results), origin(converted for _, converted in results)
    if origin is dict and isinstance(value, dict):
        kind = (typing.get_args(hint) or (Any, Any))[1]
        converted = {key: _accept(entry, kind) for key, entry in value.items()}
        return all(ok for ok, _ in converted.values()), {key: entry for key, (_, entry) in converted.items()}
    if origin is float:
        return _accept_float(value)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    return isinstance(value, origin), value


def _accept_float(value: Any) -> tuple[bool, Any]:
    """Numbers, and the ``1e-4`` that YAML 1.1 reads as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False, None
    try:
        return True, float(value)
    except ValueError:
        return False, None


def _describe(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if origin is tuple and Ellipsis not in typing.get_args(hint):
        return f"a list of {len(typing.get_args(hint))} values"
    if origin in (list, tuple):
        return f"a list of {_describe((typing.get_args(hint) or (Any,))[0])}"
    if hint is type(None):
        return "null"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", dict: "keys and values"}
    return names.get(origin or hint, str(hint))
