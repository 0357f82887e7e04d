"""Rules from a line of text: each line against the rule built by hand, and every mistake against its sentence."""

from collections import OrderedDict
from typing import Any

import pytest
from torch import nn

from toolkit import UserError, algorithms
from toolkit.rule_line import parse
from toolkit.rules import SGD, Adam, Clip, Frozen, Groups, PerStep, RMSprop, Rule

ALONE: dict[str, Rule] = {
    "sgd 0.4": SGD(0.4),
    "  sgd   .4 ": SGD(0.4),
    "momentum 0.1": SGD(0.1, momentum=0.9),
    "momentum 0.1 momentum=0.8": SGD(0.1, momentum=0.8),
    "sgd 0.1 momentum=0.5": SGD(0.1, momentum=0.5),
    "nesterov 0.1": SGD(0.1, momentum=0.9, nesterov=True),
    "nesterov 0.1 momentum=0.5": SGD(0.1, momentum=0.5, nesterov=True),
    "rmsprop 1e-2": RMSprop(0.01),
    "adam 1e-3": Adam(1e-3),
    "frozen": Frozen(),
    "sgd 0.4 learned": SGD(0.4, learn="tensor"),
    "sgd 0.4 learned-weights": SGD(0.4, learn="weight"),
    "nesterov 0.4 learned momentum=0.7": SGD(0.4, momentum=0.7, nesterov=True, learn="tensor"),
    "adam 1e-3 clip=1.5": Clip(Adam(1e-3), 1.5),
    "sgd 0.4 learned per-step=5": PerStep(SGD(0.4, learn="tensor"), 5),
    "sgd 0.4 per-step=5 learned-weights": PerStep(SGD(0.4, learn="weight"), 5),
    "sgd 0.4 clip=2 learned per-step=3": Clip(PerStep(SGD(0.4, learn="tensor"), 3), 2.0),
}


@pytest.mark.parametrize("line", ALONE)
def test_a_line_without_a_pattern_is_one_rule(line: str) -> None:
    assert parse(line) == ALONE[line]


@pytest.mark.parametrize("line", ALONE)
def test_every_rule_may_stand_in_a_group(line: str) -> None:
    assert parse(f"head: {line}; rest: sgd 0.1") == Groups(("*head*", ALONE[line]), ("*", SGD(0.1)))


def test_differing_lines_are_differing_rules() -> None:
    rules = [parse(line) for line in ALONE if line.strip() == line]
    assert all(a != b for i, a in enumerate(rules) for b in rules[:i])


def test_the_line_of_the_docstring() -> None:
    found = parse("head: sgd 0.4 learned; norm: frozen; lora: adam 1e-3")
    assert found == Groups(("*head*", SGD(0.4, learn="tensor")), ("*norm*", Frozen()), ("*lora*", Adam(1e-3)))


PATTERNS = {
    "head": "*head*", "head.weight": "*head.weight*", "head.*": "head.*", "*bias": "*bias", "body.?.weight": "body.?.weight",
    "body.[01].*": "body.[01].*", "*": "*", "all": "*", "rest": "*", "allot": "*allot*",
}  # fmt: skip


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_without_wildcards_is_a_part_of_the_name(name: str) -> None:
    assert parse(f" {name} :sgd 0.1 ") == Groups((PATTERNS[name], SGD(0.1)))


def test_the_order_of_entries_is_kept() -> None:
    assert parse("b: sgd 0.1; a: sgd 0.2") == Groups(("*b*", SGD(0.1)), ("*a*", SGD(0.2)))
    assert parse("b: sgd 0.1; a: sgd 0.2") != parse("a: sgd 0.2; b: sgd 0.1")


NEEDED = r"give a positive number, such as 0\.1"
KNOWN = r"\(known: adam, frozen, momentum, nesterov, rmsprop, sgd\)"
PATTERN = r"has no pattern; give 'pattern: kind rate', for example 'rest: sgd 0\.1'"
BAD: dict[str, str] = {
    "sgdd 0.1": rf"^rule 'sgdd 0\.1': unknown kind 'sgdd'; did you mean 'sgd'\? {KNOWN}$",
    "rest: sgd 0.1 learned; head: adm 1": "never applies",
    "head: adm 1": rf"^rule 'head: adm 1': unknown kind 'adm'; did you mean 'adam'\? {KNOWN}$",
    "": r"^rule '': no kind was given; give one of adam, frozen, momentum, nesterov, rmsprop, sgd$",
    "head:": r"^rule 'head:': no kind was given; give one of adam, frozen, momentum, nesterov, rmsprop, sgd$",
    "0.1": rf"unknown kind '0\.1' {KNOWN}$",
    "sgd": f"^rule 'sgd': the rate of sgd is ''; {NEEDED}$",
    "head: adam": f"^rule 'head: adam': the rate of adam is ''; {NEEDED}$",
    "sgd learned": f"the rate of sgd is 'learned'; {NEEDED}$",
    "sgd 0,1": f"the rate of sgd is '0,1'; {NEEDED}$",
    "sgd 0": f"the rate of sgd is '0'; {NEEDED}$",
    "sgd -0.1": rf"the rate of sgd is '-0\.1'; {NEEDED}$",
    "sgd nan": f"the rate of sgd is 'nan'; {NEEDED}$",
    "sgd inf": f"the rate of sgd is 'inf'; {NEEDED}$",
    "frozen 0.1": r"^rule 'frozen 0\.1': frozen stands alone, but '0\.1' follows; leave it out$",
    "norm: frozen learned": "frozen stands alone, but 'learned' follows",
    "sgd 0.1 lerned": r"unknown word 'lerned'; did you mean 'learned'\? \(known: clip=\.\.\., learned, learned-weights, ",
    "sgd 0.1 clips=1": r"unknown word 'clips=1'; did you mean 'clip=\.\.\.'\?",
    "sgd 0.1 clip": r"unknown word 'clip'; did you mean 'clip=\.\.\.'\?",
    "sgd 0.1 learned=1": "unknown word 'learned=1'",
    "sgd 0.1 0.2": r"unknown word '0\.2'",
    "adam 1e-3 learned": "^rule 'adam 1e-3 learned': 'learned' is not supported with adam; use it with sgd, momentum or n",
    "adam 1e-3 learned-weights": "'learned-weights' is not supported with adam",
    "rmsprop 1e-3 learned": "'learned' is not supported with rmsprop",
    "adam 1e-3 momentum=0.5": r"'momentum=0\.5' is not supported with adam",
    "sgd 0.1 learned learned-weights": "'learned-weights' says learned twice; leave one out$",
    "sgd 0.1 clip=1 clip=2": "'clip=2' says clip twice",
    "sgd 0.1 momentum=1": "^rule 'sgd 0.1 momentum=1': momentum is 1.0; give 0 <= momentum < 1",
    "sgd 0.1 momentum=": f"momentum is ''; {NEEDED}$",
    "sgd 0.1 clip=0": f"clip is '0'; {NEEDED}$",
    "sgd 0.1 clip=one": f"clip is 'one'; {NEEDED}$",
    "sgd 0.1 clip=inf": f"clip is 'inf'; {NEEDED}$",
    "sgd 0.1 per-step=5": "per-step needs learned rates; add 'learned' or 'learned-weights', or leave per-step out$",
    "adam 0.1 per-step=5": "per-step needs learned rates",
    "sgd 0.1 learned per-step=0": "per-step is '0'; give a whole number of steps, 1 or more$",
    "sgd 0.1 learned per-step=2.5": r"per-step is '2\.5'; give a whole number",
    "sgd 0.1 learned per-step=-1": "per-step is '-1'; give a whole number",
    "sgd 0.1 learned per-step=": "per-step is ''; give a whole number",
    ": sgd 0.1": rf"^rule ': sgd 0\.1' {PATTERN}$",
    "  : sgd 0.1; rest: sgd 0.1": PATTERN,
    "sgd 0.1; head: frozen": rf"^rule 'sgd 0\.1' {PATTERN}$",
    "head: sgd 0.1;": f"^rule '' {PATTERN}$",
    "sgd 0.1;": PATTERN,
    "all: sgd 0.1; head: adam 1e-3": "^rule 'head: adam 1e-3' never applies, earlier entries take all its parameters; move it",
    "head: sgd 0.1; head: adam 1e-3": "never applies",
    "rest: sgd 0.1; all: adam 1e-3": "never applies",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_one_sentence_with_its_entry(line: str) -> None:
    with pytest.raises(UserError, match=BAD[line]) as caught:
        parse(line)
    assert "\n" not in str(caught.value)


def network() -> nn.Module:
    layers: Any = OrderedDict(body=nn.Linear(3, 4), norm=nn.LayerNorm(4), head=nn.Linear(4, 2))
    return nn.Sequential(layers)


def test_a_pattern_that_matches_nothing_is_refused_by_the_learner() -> None:
    names = "body.weight, body.bias, norm.weight, norm.bias, head.weight, head.bias"
    with pytest.raises(UserError, match=rf"the rule pattern '\*hed\*' matches no parameter that adapts; these adapt: {names}$"):
        algorithms.maml(network(), rule=parse("hed: sgd 0.4; rest: sgd 0.1"))
    with pytest.raises(UserError, match=r"pattern '\*body\*' matches no parameter that adapts; these adapt: head\.weight"):
        algorithms.anil(network(), rule=parse("head: sgd 0.4; body: sgd 0.1"))
    with pytest.raises(UserError, match=r"rates for 5 steps, but the learner takes 3 inner steps"):
        algorithms.maml(network(), rule=parse("head: sgd 0.4 learned per-step=5; rest: sgd 0.1"), inner_steps=3)


def test_the_learner_takes_a_rule_from_a_line() -> None:
    rule = parse("head: sgd 0.4 learned per-step=2; norm: frozen; rest: momentum 0.1 learned-weights")
    learned = algorithms.maml(network(), rule=rule, inner_steps=2).init().learned
    shapes = {name: tuple(tensor.shape) for name, tensor in learned.items()}
    assert shapes == {
        **{f"*head*/step{k}/lr/head.{kind}": () for k in range(2) for kind in ("weight", "bias")},
        "*/lr/body.weight": (4, 3), "*/lr/body.bias": (4,),
    }  # fmt: skip
