"""The parts that the flags of an experiment ask for: samplers of the three splits, model, learner."""

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from toolkit import plugins
from toolkit.data.bank import ClassBank
from toolkit.errors import UserError, unknown
from toolkit.flags import Flags, build
from toolkit.learner import Learner
from toolkit.metrics import accuracy, cross_entropy, of_ways, squared_error
from toolkit.samplers import AllClasses, Augmented, Episodes, crop_flip
from toolkit.task import Padded, Task, TaskSampler, draw

log = logging.getLogger("toolkit")
F = TypeVar("F", bound=Flags)
# What our own models take; those that ask for channels or a size take images.
WANTED = {"conv4": "square images", "mlp": "numbers", "bag": "feature numbers"}
LOOKED_AT = 8  # tasks of each split, to see what they are like


class Tasks(NamedTuple):
    """Where an experiment's tasks come from, in the order in which `experiment.run` takes them: the samplers of the three splits,
    the accuracy of guessing (None where it has no meaning), and all training classes at once (None where there are none)."""

    training: TaskSampler
    validation: TaskSampler
    test: TaskSampler
    chance: float | None
    pretraining: AllClasses | None


def assemble(flags: F) -> tuple[F, Learner, Tasks]:
    """The learner and tasks of an experiment, and its flags with the names that were settled on the way: the dataset of a sampler
    that draws from one, and a model that fits the tasks where the experiment's own does not.

    Losses follow from the tasks: cross entropy and accuracy for integer targets, squared error for others. Raises UserError for
    whatever does not fit, before anything is computed.
    """
    flags, splits, bank = _splits(flags)
    looks = [draw(sampler, LOOKED_AT, flags.seed, split=name) for name, sampler in splits.items()]
    if any(sampler_y.is_floating_point() for sampler_y in (look.support.y for look in looks)):
        outputs, chance, restrict, score = (
            looks[0].support.y.shape[-1],
            None,
            False,
            {"loss": squared_error, "metric": squared_error},
        )
    else:
        ways = [int(look.support.y.max()) + 1 for look in looks]
        outputs = max(_outputs(sampler) or seen for sampler, seen in zip(splits.values(), ways, strict=True))
        padded = any(isinstance(look.support.x, Padded) for look in looks)
        restrict = padded or min(ways) < outputs
        chance = None if padded else 1 / ways[2]
        score = {"loss": cross_entropy, "metric": accuracy}
        score = {key: of_ways(function) if restrict else function for key, function in score.items()}
    flags, network = _model(flags, looks[0], outputs)
    whole = None
    if bank is not None:
        support, query = looks[0].support.y.shape[1], looks[0].query.y.shape[1]
        whole = AllClasses(bank, support + query)
    learner = build(flags, network, bank.classes if bank else None, **score)
    return flags, learner, Tasks(*splits.values(), chance, whole)


def _splits(flags: F) -> tuple[F, dict[str, TaskSampler], ClassBank | None]:
    """The flags with the dataset settled, a sampler for each split, and the bank of training classes if there is one."""
    name, registered = flags.sampler, {kind: plugins.names(kind) for kind in ("samplers", "datasets")}
    default = type(flags)().sampler
    if name == "episodes" or name in registered["datasets"]:
        source = flags.dataset or (default if name == "episodes" else name)
        flags, make = replace(flags, sampler=source, dataset=None), None
    elif ":" not in name and name not in registered["samplers"]:
        raise unknown("sampler", name, [*registered["samplers"], *registered["datasets"]])
    else:
        source = flags.dataset or default
        make = plugins.resolve(name, "samplers")

    @cache
    def bank(split: str) -> ClassBank:
        target = plugins.resolve(source, "datasets")
        pairs = flags.dataset_args + (() if make else flags.sampler_args)
        given = {
            "split": split,
            "data_root": getattr(flags, "data_root", "data"),
            "download": getattr(flags, "download", False),
        }
        made = plugins.call(target, given, plugins.settings(pairs, "--dataset", target), f"--dataset {source}")
        if not isinstance(made, ClassBank):
            raise UserError(
                f"--dataset {source} made a {type(made).__name__}; a dataset is a function that returns a ClassBank"
            )
        return made

    found: dict[str, TaskSampler] = {}
    drawn_from: list[ClassBank] = []
    for split in ("train", "val", "test"):
        made = bank(split) if make is None else _made(flags, make, split, bank)
        if isinstance(made, ClassBank):
            drawn_from.append(made)
            made = Episodes(made, **_sizes(flags, split))
        elif make is not None and not _is_task_function(make) and "bank" in plugins.takes(make):
            drawn_from.append(bank(split))
        found[split] = _augmented(flags, made, split)
    if make is not None and drawn_from and flags.dataset is None and "bank" in plugins.takes(make):
        flags = replace(flags, dataset=source)
    return flags, found, drawn_from[0] if drawn_from else None


def _made(flags: Flags, make: Any, split: str, bank: Callable[[str], ClassBank]) -> Any:
    what = f"--sampler {flags.sampler}"
    if _is_task_function(make):
        if flags.sampler_args:
            raise UserError(f"{what} is a function of a generator and has no settings; make it a function that returns one")
        return make
    given = {"split": split, "data_root": getattr(flags, "data_root", "data"), "download": getattr(flags, "download", False)}
    given |= _sizes(flags, split)
    if "bank" in plugins.takes(make):
        if not (flags.dataset or type(flags)().sampler in plugins.names("datasets")):
            raise UserError(f"{what} draws from a dataset, and this experiment has none of its own; give one with --dataset")
        given["bank"] = bank(split)
    made = plugins.call(make, given, plugins.settings(flags.sampler_args, "--sampler", make), what)
    if not callable(made) and not isinstance(made, ClassBank):
        raise UserError(f"{what} made a {type(made).__name__}; return a task sampler or a ClassBank")
    return made


def _is_task_function(make: Any) -> bool:
    """Whether it is a sampler itself, and not something that makes one."""
    return not isinstance(make, type) and "generator" in plugins.takes(make)


def _sizes(flags: Flags, split: str) -> dict[str, int]:
    """Ways, shots and queries of a split's tasks; only those that the experiment has."""
    train = split == "train"
    sizes = {
        "ways": (train and getattr(flags, "train_ways", None)) or getattr(flags, "ways", None),
        "shots": (train and flags.train_shots) or flags.shots,
        "queries": flags.queries if train else flags.eval_queries,
    }
    return {key: size for key, size in sizes.items() if size is not None}


def _augmented(flags: Flags, sampler: TaskSampler, split: str) -> TaskSampler:
    if split == "train":
        return Augmented(sampler, crop_flip) if getattr(flags, "augment", "none") == "crop-flip" else sampler
    copies = getattr(flags, "support_copies", 0)
    return Augmented(sampler, crop_flip, copies=copies, queries=False) if copies else sampler


def _outputs(sampler: TaskSampler) -> int | None:
    found: int | None = getattr(sampler, "outputs", None)
    return found


def _model(flags: F, tasks: Task, outputs: int) -> tuple[F, nn.Module]:
    """The network, and the flags with its name: where the experiment's own does not fit the examples, one that does."""
    x = tasks.support.x.x if isinstance(tasks.support.x, Padded) else tasks.support.x
    inputs = {k: tuple(v.shape[2:]) for k, v in x.items()} if isinstance(x, dict) else tuple(x.shape[2:])
    given: dict[str, Any] = {"inputs": inputs, "outputs": outputs, "ways": outputs, "seed": flags.seed}
    kind = "several inputs" if isinstance(x, dict) else "numbers" if x.is_floating_point() else "feature numbers"
    if kind == "numbers" and len(inputs) == 3 and inputs[1] == inputs[2]:
        kind, given = "square images", given | {"channels": inputs[0], "size": inputs[1]}
    target = plugins.resolve(flags.model, "models")
    if isinstance(target, nn.Module):
        return flags, copy.deepcopy(target)
    wanted = "square images" if {"channels", "size"} & plugins.takes(target) else WANTED.get(flags.model, kind)
    if wanted != kind and (wanted, kind) != ("numbers", "square images"):
        fitting = next((name for name, takes in WANTED.items() if takes == kind), None)
        if flags.model != type(flags)().model or fitting is None:
            advice = f"--model {fitting}" if fitting else "a model of your own, as --model file.py:NAME"
            raise UserError(
                f"--model {flags.model} takes {wanted}, but these tasks have {kind} of shape {inputs}; use {advice}"
            )
        log.info("%s takes %s, and these tasks have %s of shape %s: --model %s", flags.model, wanted, kind, inputs, fitting)
        flags = replace(flags, model=fitting)
        target = plugins.resolve(fitting, "models")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(flags.seed)  # for models that take no seed
        arguments = plugins.settings(flags.model_args, "--model", target)
        network = plugins.call(target, given, arguments, f"--model {flags.model}")
    if not isinstance(network, nn.Module):
        raise UserError(f"--model {flags.model} made a {type(network).__name__}; a model is an nn.Module, or makes one")
    return flags, network
