"""What the flags of an experiment say of a model and of one method: adapters put in, what is frozen, what adapts, and settings
that only this method has.

What adapts and what is frozen is named by patterns with commas between them: names of parameters, with * for any letters, parts
of names between dots (layer.1, norm*, or lora_ for what begins so) where that matches no whole name, or

    head     the last linear layer            norm     all of the normalisation layers      lora     low-rank adapters
    base     all but head, adapters, prompts  bias     every bias                           prompt   prompts
    last:2   the last two blocks (`modules.blocks`) and the head
"""

import copy
import logging
from collections.abc import Sequence
from contextlib import suppress
from inspect import signature
from typing import Any

import torch
from torch import nn

from toolkit import algorithms, plugins
from toolkit.errors import UserError
from toolkit.learner import Learner
from toolkit.models.surgery import able, lora, prompted
from toolkit.modules import blocks, listed, select
from toolkit.randomness import kept
from toolkit.task import Task
from toolkit.tree import Selection, matches

log = logging.getLogger("toolkit")

# Methods that are what they are by what adapts, and what that is.
FIXED = {
    "anil": "the head", "boil": "all but the head", "cavia": "its context parameters", "warp_grad": "all but its warp layers",
    "lora_maml": "its adapters", "linear_probe": "the new head", "protonet": "the head, without steps",
    "matching_net": "the head, without steps", "r2d2": "the head, without steps", "nearest_centroid": "the head, without steps",
}  # fmt: skip
BUILDERS = ("cavia", "warp_grad", "lora_maml")  # methods that put layers of their own into the model
WORDS = ("head", "base", "norm", "bias", "lora", "prompt")
ADDED = ("*lora_*", "*prompt*")
# Of settings whose default does not show their kind.
KINDS: dict[str, tuple[type, ...]] = {"context": (int,), "layer": (str,), "peft": (bool,), "layers": (tuple, str)}


def tuned(
    model: nn.Module,
    algorithm: str = "maml",
    *,
    adapts: str | None = None,
    freeze: str | None = None,
    rank: int | None = None,
    layers: str = "*",
    prompts: int | None = None,
    head: str = "head",
    seed: int = 0,
) -> tuple[nn.Module, tuple[str, ...] | None]:
    """The model for the method called `algorithm`, and the names of what adapts; None where that is the method's own choice.

    In this order: adapters of rank `rank` on the `layers`, by default on all but the head; `prompts` learned tokens; `freeze`.
    What is put in adapts together with the head, unless `adapts` says otherwise or the method is one by what adapts: then the
    outer loop alone learns it. The adapters are our own, peft or not, so that a command makes the same run everywhere. The
    given model is left alone; what is not changed is shared with it. Raises UserError for a pattern that matches nothing, a
    method that such a wish would turn into another, layers that are not there, and when all is frozen.
    """
    if adapts is not None and algorithm in FIXED:
        raise UserError(
            f"{algorithm} is the method whose inner loop moves {FIXED[algorithm]}, and --adapts {adapts} would make another of "
            "it; leave it out, or use --algorithm maml"
        )
    if algorithm in BUILDERS and (rank is not None or prompts is not None):
        flag = "--lora" if rank is not None else "--prompts"
        raise UserError(f"{algorithm} puts layers of its own into the model; leave {flag} out, or use --algorithm maml")
    if rank is None and layers != "*":
        raise UserError(f"--lora-layers {layers} says where adapters go, but there are none; add --lora and their rank")
    if rank is not None:
        names = _layers(model, layers, head)
        widest = max(min(_sides(model.get_submodule(name))) for name in names)
        if rank > widest:
            raise UserError(f"--lora {rank}: no layer that gets adapters has a rank above {widest}; give at most that")
        model = lora(model, rank, names, peft=False, seed=seed)
    if prompts is not None:
        model = prompted(model, prompts, seed)
    if freeze is not None:
        model = frozen(model, chosen(model, freeze, head, "--freeze"))
        if algorithm not in BUILDERS and not any(p.requires_grad for p in model.parameters()):
            raise UserError(f"--freeze {freeze} leaves nothing to train; freeze less, or add --lora and a rank")
    if adapts is not None:
        return model, chosen(model, adapts, head, "--adapts")
    added = [word for word, given in (("lora", rank), ("prompt", prompts)) if given is not None]
    if not added or algorithm in FIXED:
        return model, None
    if freeze is not None and not any(p.requires_grad for name, p in model.named_parameters() if matches(name, ADDED)):
        raise UserError(f"--freeze {freeze} freezes what --{added[0].replace('prompt', 'prompts')} adds to adapt; freeze less")
    trained = any(p.requires_grad for name, p in model.named_parameters() if name.startswith(f"{head}."))
    return model, chosen(model, ",".join([*added, *["head"] * trained]), head, "--adapts")


def chosen(model: nn.Module, patterns: str, head: str = "head", flag: str = "adapts") -> tuple[str, ...]:
    """The names of the trained parameters that `patterns` mean, see the module text. Raises UserError for a pattern that
    matches none; `flag` is how its sentence calls them."""
    words = [word.strip() for word in patterns.split(",") if word.strip()]
    if not words:
        raise UserError(f"{flag} {patterns!r} names nothing; give patterns such as head.*,*norm*")
    found = {name for word in words for name in select(model, _meant(model, word, head, flag), f"{flag} {word}")}
    return tuple(name for name, _ in model.named_parameters() if name in found)


@torch.no_grad()
def tell_outputs(name: str, learner: Learner, task: Task, classes: int) -> None:
    """Warns of a model with more outputs than such tasks have classes, as of one that is made for other data."""
    with kept(), suppress(Exception):  # what fails here fails again, and is told then
        found = learner.predict(learner.init(), {}, task.support.x).shape[-1]
        if found > classes:
            said = "the model %s has %d outputs for %d classes: it has to learn that there are no others"
            log.warning(said, name, found, classes)


def frozen(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """A copy of which neither loop moves the parameters of these names; all tensors are shared with `model`."""
    fixed = set(names)
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for name, p in model.named_parameters():
        memo[id(p)] = nn.Parameter(p.detach(), requires_grad=False) if name in fixed else p
    return copy.deepcopy(model, memo)


def _meant(model: nn.Module, word: str, head: str, flag: str) -> Selection:
    own = (f"{head}.*", *ADDED)
    if word == "norm":
        kinds = {name for name, m in model.named_modules() if any("Norm" in kind.__name__ for kind in type(m).__mro__)}
        return lambda name: name.rpartition(".")[0] in kinds
    if word == "base":
        return lambda name: not matches(name, own)
    if word in WORDS:
        return {"head": own[0], "lora": own[1], "prompt": own[2], "bias": "*bias"}[word]
    if not word.startswith("last:"):
        names = [name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
        if not any(matches(name, word) for name in names):
            ends = (word, f"{word}.*", *([f"{word}*"] if word.endswith("_") else []))
            parts = (*ends, *(f"*.{end}" for end in ends))
            if inner := [name for name in names if matches(name, parts)]:
                log.info("%s %s is taken for a part of a name: %s", flag, word, listed(inner))
                return lambda name: matches(name, parts)
        return word
    known = [name for name in blocks(model) if not matches(f"{name}.", own[0])]
    count = word.removeprefix("last:")
    if not count.isdecimal() or not 0 < int(count) <= len(known):
        raise UserError(f"{flag} {word}: the model has {len(known)} blocks, {listed(known)}; give last:1 to last:{len(known)}")
    last = tuple(f"{name}.*" for name in (*known[-int(count) :], head))
    return lambda name: matches(name, last)


def _layers(model: nn.Module, layers: str, head: str) -> tuple[str, ...]:
    """The names of the layers that get adapters."""
    names, patterns = able(model), tuple(word.strip() for word in layers.split(","))
    if layers == "*":
        if head not in dict(model.named_modules()):
            raise UserError(
                f"--head {head} names no layer of the model; --lora leaves the last one alone, name it: {listed(names)}"
            )
        names = [name for name in names if not f"{name}.".startswith(f"{head}.")]
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise UserError(f"--lora-layers {pattern} matches no layer that can have adapters; the model has {listed(names)}")
    return tuple(name for name in names if matches(name, patterns))


def _sides(layer: Any) -> tuple[int, int]:
    """Of the matrix that a layer multiplies by, height and width."""
    if isinstance(layer, nn.MultiheadAttention):
        return 3 * layer.embed_dim, layer.embed_dim
    return layer.weight.shape[0], layer.weight[0].numel()


def settings(name: str, pairs: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments from texts such as "lam=0.5", for what only the method called `name` takes. Raises UserError for a text
    without "=", for what the method does not take, and for a value of another kind."""
    method = plugins.resolve(name, "algorithms")
    common = set(signature(algorithms.maml).parameters) | {"classes"}
    plugins.takes(method)  # refuses what cannot be called
    parameters = signature(method).parameters.values()
    own = {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in common}
    for pair in pairs:
        if pair.partition("=")[0] not in own or "=" not in pair:
            known = ", ".join(own)
            raise UserError(f"--method {pair}: {name} takes " + (f"{known}, as key=value" if known else "none"))
    found = plugins.settings(pairs, "--method", method)
    for key, value in found.items():
        if key in KINDS and type(value) not in KINDS[key] and value != own[key]:
            wanted = {int: "a whole number", bool: "True or False", str: "a name"}[KINDS[key][-1]]
            raise UserError(f"--method {key}={value}: {key} of {name} is {wanted}; give one")
    return found
