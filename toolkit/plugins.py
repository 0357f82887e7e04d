"""Plug-ins: samplers, datasets, models, algorithms and loggers, found by name and called with what they ask for.

A name is a short one that an installed package registers (an entry point of group `toolkit.samplers`, `toolkit.datasets`, ...;
the toolkit's own are registered in the same way, in setup.cfg), or `module:attr`, or `path/to/file.py:attr`. A short name may
stand for a whole library, a function that takes a `name`: `tv:resnet18` is `tv` called with the name "resnet18". Only names
that the user gives on a command line or in code are resolved; names found in run folders and checkpoints never are.
"""

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from ast import literal_eval
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from importlib.metadata import EntryPoint, distributions
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from toolkit.errors import UserError, unknown

KINDS = ("samplers", "datasets", "models", "algorithms", "loggers")
SEEN = set[str]()  # modules of code of the user's own
ANYTHING = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


class Plugin(NamedTuple):
    """One registered name: its kind, what it is in a sentence, and the package that brings it."""

    kind: str
    name: str
    line: str
    origin: str


def names(kind: str) -> list[str]:
    """The short names of a kind, sorted. Raises UserError for an unknown kind."""
    return sorted({entry.name for entry in _entries(kind)})


def listing(kind: str) -> list[Plugin]:
    """All registered plug-ins of a kind, by name; one that cannot be imported says so in its line."""
    found = []
    for entry in sorted(_entries(kind), key=lambda entry: entry.name):
        try:
            line = _described(entry.load())
        except Exception as error:  # whatever somebody else's module raises, the others can still be listed
            line = f"(cannot be imported: {type(error).__name__}: {error})"
        origin = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown package"
        found.append(Plugin(kind, entry.name, line, origin))
    return found


def resolve(name: str, kind: str | None = None) -> Any:
    """The object that `name` means: a short name (of `kind`, or of any), `library:name`, `module:attr` or
    `path/to/file.py:attr`. A library's short name goes before a module of that name.

    Modules and files are imported from the working folder too. Raises UserError for a name that is not there, with the nearest
    one, for a short name that two packages register, and for a module or file that cannot be imported, with its reason.
    """
    place, colon, attribute = name.rpartition(":")
    if colon and not (place and attribute):
        raise UserError(f"{name!r} names only half of a plug-in; write module:NAME or path/to/file.py:NAME")
    kinds = KINDS if kind is None else (kind,)
    if library := _library(name, kinds):
        return partial(library, name=name.partition(":")[2])
    if colon:
        return _attribute(_file(Path(place)) if place.endswith(".py") else _module(place, name), attribute, name)
    if name.endswith(".py"):
        raise UserError(f"{name} names a file; say what to take from it, as in {name}:NAME")
    found = _named(name, kinds)
    if not found:
        raise unknown("plug-in" if kind is None else kind[:-1], name, [known for each in kinds for known in names(each)])
    if len({entry.value for entry in found}) > 1:
        ways = " or ".join(entry.value for entry in found)
        raise UserError(f"{name!r} means more than one plug-in; say which one: {ways}")
    return _load(found[0])


def _named(name: str, kinds: Iterable[str]) -> list[EntryPoint]:
    return [entry for kind in kinds for entry in _entries(kind) if entry.name == name]


def _library(name: str, kinds: Iterable[str]) -> Any:
    """What makes things by their names, where the short name of such a plug-in is in front of a colon; else None."""
    front, colon, _ = name.partition(":")
    found = _named(front, kinds) if colon else []
    target = _load(found[0]) if found else None
    return target if callable(target) and "name" in takes(target) else None


def is_code(name: str, kind: str | None = None) -> bool:
    """Whether a name means code in a module or file of its own, and not what an installed package registers."""
    return ":" in name and _library(name, KINDS if kind is None else (kind,)) is None


def takes(target: Any) -> set[str]:
    """The names of the arguments that a plug-in takes, without those it only passes on."""
    return {p.name for p in _parameters(target) if p.kind not in ANYTHING}


def takes_any(target: Any) -> bool:
    """Whether a plug-in takes arguments of any name."""
    return any(p.kind is p.VAR_KEYWORD for p in _parameters(target))


def call(target: Any, given: Mapping[str, Any], settings: Mapping[str, Any], what: str) -> Any:
    """`target` called with those of the `given` arguments that it takes by name, and with the user's own `settings` for it.

    `what` names it in errors. Raises UserError for a setting that it does not take (one with `**settings` takes any that is not
    given), and for an argument that it needs and nobody gives, and for whatever it raises.
    """
    parameters = {p.name: p for p in _parameters(target) if p.kind not in ANYTHING}
    anything = takes_any(target)
    own = sorted(set(parameters) - set(given))
    for key in settings:
        if key not in own and (key in given or not anything):
            raise UserError(f"{what} has no setting {key!r}{_hint(key, own)}; its settings are {', '.join(own) or 'none'}")
    arguments = {name: given[name] for name in parameters if name in given} | dict(settings)
    needed = [n for n, p in parameters.items() if p.default is p.empty and n not in arguments]
    if needed:
        raise UserError(
            f"{what} needs {', '.join(needed)}, which is not given here; give it as a setting, or a default in its code "
            f"(given are {', '.join(sorted(given))})"
        )
    try:
        return target(**arguments)
    except UserError:
        raise
    except Exception as error:  # somebody else's code
        reason = " ".join(str(error).split())
        raise UserError(f"{what} cannot be made: {type(error).__name__}: {reason}; --debug shows where it happens") from error


def settings(pairs: Iterable[str], flag: str, target: Any = None) -> dict[str, Any]:
    """Settings from texts such as "gap=3": Python literals where they are some, texts otherwise. Raises UserError for one
    without "=", and for one of another kind than the default that `target` has for it."""
    found: dict[str, Any] = {}
    defaults = {} if target is None else {p.name: p.default for p in _parameters(target)}
    for key, equals, text in (pair.partition("=") for pair in pairs):
        if not equals or not key.isidentifier():
            raise UserError(f"{flag} {key + equals + text}: settings are written key=value")
        try:
            value = literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        default = defaults.get(key)
        if isinstance(default, str) and not text.startswith(("(", "[")):
            value = text  # "1,2" would be a tuple
        elif isinstance(default, bool | int | float) and value != default and not _like(value, default):
            wanted = {bool: "True or False", int: "a whole number", float: "a number"}[type(default)]
            raise UserError(f"{flag} {key}={text}: {key} is {wanted}; give one")
        found[key] = value
    return found


def _like(value: object, default: object) -> bool:
    return type(value) in ((int, float) if type(default) is float else (type(default),))


def _parameters(target: Any) -> list[inspect.Parameter]:
    try:
        parameters = list(inspect.signature(target).parameters.values())
        if any(p.kind is p.POSITIONAL_ONLY for p in parameters):
            raise ValueError
        return parameters
    except (TypeError, ValueError):
        raise UserError(
            f"{target!r} cannot be called by name; a plug-in is a function or a class with named arguments"
        ) from None


def _entries(kind: str) -> tuple[EntryPoint, ...]:
    if kind not in KINDS:
        raise unknown("kind of plug-in", kind, KINDS)
    # A checkout can be seen twice, as installed and as a folder on the path with what an older install left in it. Packages are
    # therefore not told apart by their name, as `entry_points()` does, which would take the older one.
    registered = (entry for package in distributions() for entry in package.entry_points.select(group=f"toolkit.{kind}"))
    found = tuple({(entry.name, entry.value): entry for entry in registered}.values())
    if not any(entry.value.startswith("toolkit.") for entry in found):
        raise UserError(f"the toolkit's own {kind} are not registered; install it with: pip install -e .")
    return found


def _load(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as error:
        raise UserError(f"{entry.name} ({entry.value}) cannot be imported: {type(error).__name__}: {error}") from error


def sources() -> list[Path]:
    """The files of code that names such as module:NAME were resolved to, in the order of the modules' names."""
    return [Path(file) for name in sorted(SEEN) if (file := getattr(sys.modules.get(name), "__file__", None))]


def _module(place: str, name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last, so that a file here never hides an installed package
    try:
        module = importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(f"{error.name}.")):
            raise UserError(f"there is no module {place!r} for {name!r}, neither installed nor in this folder") from None
        raise UserError(f"{place} cannot be imported: {type(error).__name__}: {error}") from error
    except Exception as error:
        raise UserError(f"{place} cannot be imported: {type(error).__name__}: {error}") from error
    SEEN.add(place)
    return module


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"there is no file {path}; give the path of a Python file, from this folder or from the root")
    path = path.resolve()
    name = f"toolkit_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    SEEN.add(name)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _attribute(module: ModuleType, attribute: str, name: str) -> Any:
    found: Any = module
    for part in attribute.split("."):
        known = [n for n, value in vars(found).items() if callable(value) and not n.startswith("_")] if found is module else []
        own = [n for n in known if getattr(vars(found)[n], "__module__", None) == module.__name__]
        if not hasattr(found, part):
            raise UserError(f"{name!r}: there is no {part!r}{_hint(part, own)}; it has {', '.join(sorted(own)) or 'none'}")
        found = getattr(found, part)
    return found


def _described(target: Any) -> str:
    """The first sentence of its docstring; of a partial, with what it sets."""
    text = inspect.getdoc(getattr(target, "func", target)) or "no description"
    sentence = re.split(r"(?<=[.?!]) (?=[A-Z`])", " ".join(text.split("\n\n")[0].split()))[0]
    set_by_partial = ", ".join(f"{key}={value}" for key, value in getattr(target, "keywords", {}).items())
    return f"{sentence} ({set_by_partial})" if set_by_partial else sentence


def _hint(key: str, known: list[str]) -> str:
    close = get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
