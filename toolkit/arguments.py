"""The words of a command line before they are parsed, settings with a dot and presets; and what was once parsed, read again."""

from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from toolkit.errors import UserError, unknown

DOTTED = {"sampler": "--sampler-args", "dataset": "--dataset-args", "model": "--model-args", "algorithm": "--method"}


def undotted(arguments: list[str]) -> list[str]:
    """The arguments with each `--sampler.gap 3` or `--sampler.gap=3` as `gap=3` after `--sampler-args`, and so on."""
    found: dict[str, list[str]] = {}
    rest = list[str]()
    words = iter(arguments)
    for word in words:
        place, dot, setting = word.removeprefix("--").partition(".")
        if not (word.startswith("--") and dot and place in DOTTED):
            rest.append(word)
            continue
        key, equals, value = setting.partition("=")
        if not equals and (value := next(words, "--")).startswith("--"):
            raise UserError(f"{word} has no value; write {word} VALUE")
        found.setdefault(DOTTED[place], []).append(f"{key.replace('-', '_')}={value}")
    for flag, pairs in found.items():
        at = rest.index(flag) + 1 if flag in rest else len(rest)
        rest[at:at] = pairs if flag in rest else [flag, *pairs]
    return rest


def preset(presets: dict[str, dict[str, Any]], arguments: list[str]) -> dict[str, Any]:
    """The flags that the preset named in the arguments sets, by name. Raises UserError for an unknown preset."""
    name = "default"
    for i, argument in enumerate(arguments):
        if argument == "--preset" and i + 1 < len(arguments):
            name = arguments[i + 1]
        elif argument.startswith("--preset="):
            name = argument.removeprefix("--preset=")
    if name == "default":
        return {}
    if name not in presets:
        raise unknown("preset", name, ["default", *presets])
    return presets[name] | {"preset": name}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value can be that of a flag of this type: a plain one, a path, one of some words, tuples of these, or none."""
    kind, inside = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, each) for each in inside)
    if kind is Literal:
        return value in inside
    if kind is tuple:
        return isinstance(value, tuple) and all(fits(each, inside[0]) for each in value)
    if hint in (bool, int):
        return type(value) is hint
    return isinstance(value, {float: (int, float), Path: (str, Path)}.get(hint, hint))
