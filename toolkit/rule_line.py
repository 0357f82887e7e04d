"""An inner update rule from one line of text, for flags and config files.

    adam 1e-3                                                   one rule for all that adapts
    head: sgd 0.4 learned; norm: frozen; rest: adam 1e-3        a rule per group; the first entry that fits a name applies

Entries `pattern: kind [rate] [words]` are separated by ";". A pattern fits every parameter name that contains it; with * ? or
[ it is a glob, and `all`, `rest` and `*` fit everything. Kinds: sgd, momentum (sgd with 0.9), nesterov (with 0.9), rmsprop,
adam, each with a rate; frozen, alone. Words:

    momentum=0.8     for sgd, momentum and nesterov
    learned          a learned rate per tensor; `learned-weights`: per weight; both for sgd, momentum and nesterov
    per-step=5       learned rates of their own for each of 5 steps
    clip=1.0         a longer gradient of the group is scaled down to this length
"""

import math
from dataclasses import replace

from toolkit.errors import UserError, unknown
from toolkit.rules import SGD, Adam, Clip, Frozen, Groups, PerStep, RMSprop, Rule

RATED: dict[str, Rule] = {
    "sgd": SGD(1.0), "momentum": SGD(1.0, momentum=0.9), "nesterov": SGD(1.0, momentum=0.9, nesterov=True),
    "rmsprop": RMSprop(1.0), "adam": Adam(1.0),
}  # fmt: skip
LEARNED = {"learned": "tensor", "learned-weights": "weight"}
VALUED = ("momentum", "per-step", "clip")
EVERYTHING = ("*", "all", "rest")


def parse(line: str) -> Rule:
    """The rule of a line, see the module text. Raises UserError that names the entry and what it may hold."""
    if ":" not in line and ";" not in line:
        return _rule(line.strip(), line)
    groups: dict[str, Rule] = {}
    for entry in map(str.strip, line.split(";")):
        name, _, text = map(str.strip, entry.partition(":"))
        if not name or ":" not in entry:
            raise UserError(f"rule {entry!r} has no pattern; give 'pattern: kind rate', for example 'rest: sgd 0.1'")
        pattern = "*" if name in EVERYTHING else name if set(name) & set("*?[") else f"*{name}*"
        if pattern in groups or "*" in groups:
            raise UserError(f"rule {entry!r} never applies, earlier entries take all its parameters; move it up or drop it")
        groups[pattern] = _rule(entry, text)
    return Groups(*groups.items())


def parsed(rule: Rule | str | None) -> Rule | None:
    """A rule given as such, as a line of text, or not at all."""
    return parse(rule) if isinstance(rule, str) else rule


def _rule(entry: str, text: str) -> Rule:
    try:
        return _built(*text.split())
    except UserError as error:
        raise UserError(f"rule {entry!r}: {error}") from None


def _built(kind: str = "", rate: str = "", *words: str) -> Rule:
    if kind not in (*RATED, "frozen"):
        raise unknown("kind", kind, (*RATED, "frozen"))
    if kind == "frozen":
        if rate:
            raise UserError(f"frozen stands alone, but {rate!r} follows; leave it out")
        return Frozen()
    rule, values = replace(RATED[kind], lr=_positive(f"the rate of {kind}", rate)), dict[str, str]()  # type: ignore[type-var]
    for word in words:
        name, given, value = word.partition("=")
        if name not in (VALUED if given else LEARNED):
            raise unknown("word", word, (*LEARNED, *(f"{name}=..." for name in VALUED)))
        name = name if given else "learned"
        if name in values:
            raise UserError(f"{word!r} says {name} twice; leave one out")
        if name in ("learned", "momentum") and not isinstance(rule, SGD):
            raise UserError(f"{word!r} is not supported with {kind}; use it with sgd, momentum or nesterov")
        values[name] = value or LEARNED.get(word, "")
    if isinstance(rule, SGD):
        momentum = _positive("momentum", values["momentum"]) if "momentum" in values else rule.momentum
        rule = replace(rule, momentum=momentum, learn=values.get("learned"))
    if "per-step" in values:
        if "learned" not in values:
            raise UserError("per-step needs learned rates; add 'learned' or 'learned-weights', or leave per-step out")
        steps = values["per-step"]
        if not steps.isdecimal() or not int(steps):
            raise UserError(f"per-step is {steps!r}; give a whole number of steps, 1 or more")
        rule = PerStep(rule, int(steps))
    return Clip(rule, _positive("clip", values["clip"])) if "clip" in values else rule


def _positive(what: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"{what} is {text!r}; give a positive number, such as 0.1")
    return value
