"""The parts that the flags of an experiment ask for: samplers of the three splits, model, learner, and the plan."""

import copy
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from toolkit import plugins
from toolkit.choose import choose
from toolkit.data.bank import ClassBank, Tokens
from toolkit.errors import UserError, unknown
from toolkit.flags import Flags, build
from toolkit.learner import Learner, Loss
from toolkit.metrics import accuracy, cross_entropy, of_ways, squared_error
from toolkit.models.weights import load, read
from toolkit.overlap import warn_of_overlap, warn_of_splits
from toolkit.plan import Plan, compiled_plan, default_plan
from toolkit.randomness import kept
from toolkit.samplers import AllClasses, Augmented, Episodes, crop_flip
from toolkit.samplers.faults import banks_of
from toolkit.task import Padded, Task, TaskSampler, draw, move, take
from toolkit.tuning import tell_outputs

log = logging.getLogger("toolkit")
F = TypeVar("F", bound=Flags)
SPLITS = ("train", "val", "test")
# What our own models take, the first of a kind being our advice; models that ask for channels or a size take square images.
WANTED = {"conv4": "square images", "mlp": "numbers", "bag": "feature numbers", "hf:": "texts"}
FITS = {"numbers": ("square images",), "texts": ("feature numbers", "several inputs")}  # kinds that are others too
LOOKED_AT = 8  # tasks of each split, to see what they are like


class Tasks(NamedTuple):
    """Where an experiment's tasks come from, in the order in which `experiment.run` takes them: the samplers of the three
    splits, the accuracy of guessing (None where it has no meaning), all training classes at once (None without a bank)."""

    training: TaskSampler
    validation: TaskSampler
    test: TaskSampler
    chance: float | None
    pretraining: TaskSampler | None


class Kind(NamedTuple):
    """What tasks are like: how many numbers a model has to predict, the accuracy of guessing in test tasks (None where it has
    no meaning), and the loss and metric that go with them."""

    outputs: int
    chance: float | None
    score: dict[str, Loss]


def assemble(flags: F, device: str | None = None, needed: Sequence[str] = SPLITS) -> tuple[F, Learner, Tasks]:
    """The learner and tasks of an experiment, and its flags with the names that were settled on the way: the dataset of a
    sampler that draws from one, and a model that fits the tasks where the experiment's own does not.

    Losses follow from the tasks: cross entropy and accuracy for integer targets, squared error for others. Raises UserError for
    whatever does not fit, before anything is computed. Test classes that the model was pretrained on are a warning. On the
    `device` "meta" the model has shapes and no weights. A split that is not `needed` is not made, and "train", which is, stands
    in its place.
    """
    flags, samplers, bank = splits(flags, needed)
    looks = [draw(sampler, LOOKED_AT, flags.seed, split=split) for split, sampler in samplers.items()]
    kind = _kind(list(samplers.values()), looks)
    bank = None if looks[0].support.y.is_floating_point() else bank  # then its classes are no targets
    warn_of_splits(samplers)
    with torch.device(device) if device else nullcontext():
        tokens = next((each.tokens for each in banks_of(samplers["train"]) if each.tokens), None)
        flags, network = _model(flags, looks[0], kind.outputs, tokens)
        warn_of_overlap(flags.model, network, [name for each in banks_of(samplers["test"]) for name in each.names])
        learner = build(flags, network, bank.classes if bank else None, **kind.score)
    if not device and kind.score["metric"] is accuracy:
        tell_outputs(flags.model, learner, take(looks[0], 0), kind.outputs)
    batch = sum(each.y.shape[1] for each in looks[0])
    whole = _augmented(flags, AllClasses(bank, batch), "train") if bank else None
    training, validation, test = (samplers.get(split, samplers["train"]) for split in SPLITS)
    return flags, learner, Tasks(training, validation, test, kind.chance, whole)


def splits(flags: F, needed: Sequence[str] = SPLITS) -> tuple[F, dict[str, TaskSampler], ClassBank | None]:
    """The flags with the dataset settled, a sampler for each split, and the training classes if the tasks come from a bank."""
    flags, make = named(flags)
    banks = cache(lambda split: _bank(flags, split))
    made = {split: banks(split) if make is None else _sampler(flags, make, split, banks) for split in needed}
    training = made["train"] if isinstance(made["train"], ClassBank) else banks("train") if flags.dataset else None
    samplers = {split: Episodes(m, **_sizes(flags, split)) if isinstance(m, ClassBank) else m for split, m in made.items()}
    return flags, {split: _augmented(flags, samplers[split], split) for split in SPLITS if split in samplers}, training


def named(flags: F) -> tuple[F, Any]:
    """The flags with the dataset settled, and what makes their sampler: None for plain episodes of a dataset."""
    own, datasets = type(flags)().sampler, plugins.names("datasets")
    name = flags.sampler
    if name == "episodes" or (name in datasets and name not in plugins.names("samplers")):
        name = flags.dataset or (own if name == "episodes" else name)
        return replace(flags, sampler=name, dataset=None), None
    if ":" in name or name.endswith(".py") or name in plugins.names("samplers"):
        make = plugins.resolve(name, "samplers")
        if _takes_bank(make):
            if flags.dataset is None and own not in datasets:
                raise UserError(
                    f"--sampler {name} draws from a dataset; this experiment has none of its own, so give --dataset"
                )
            flags = replace(flags, dataset=flags.dataset or own)
        elif flags.dataset is not None or flags.dataset_args:
            raise UserError(f"--sampler {name} draws from no dataset, so --dataset would do nothing; leave it out")
        return flags, make
    raise unknown("sampler", name, ["episodes", *plugins.names("samplers"), *datasets])


def _bank(flags: Flags, split: str) -> ClassBank:
    plain = flags.dataset is None
    name = flags.sampler if plain else flags.dataset or ""
    target = plugins.resolve(name, "datasets")
    pairs = flags.dataset_args + (flags.sampler_args if plain else ())
    made = plugins.call(target, _place(flags, split), plugins.settings(pairs, "--dataset", target), f"the dataset {name}")
    if not isinstance(made, ClassBank):
        raise UserError(f"the dataset {name} made a {type(made).__name__}; a dataset is a function that returns a ClassBank")
    return made


def _sampler(flags: Flags, make: Any, split: str, banks: Callable[[str], ClassBank]) -> Any:
    what = f"the sampler {flags.sampler}"
    given = _place(flags, split) | _sizes(flags, split)
    if _takes_bank(make):
        given["bank"] = banks(split)
    if _is_sampler(make):
        taken = {key: given[key] for key in plugins.takes(make) if key in given}
        own = plugins.settings(flags.sampler_args, "--sampler", make)
        if wrong := sorted(set(own) - (plugins.takes(make) - {"generator", *given})):
            raise UserError(f"{what} has no setting {wrong[0]!r}; a function of a generator has its other arguments for some")
        return partial(make, **taken | own) if taken | own else make
    made = plugins.call(make, given, plugins.settings(flags.sampler_args, "--sampler", make), what)
    if isinstance(made, type) or not (callable(made) or isinstance(made, ClassBank)):
        raise UserError(f"{what} made a {type(made).__name__}; return a task sampler or a ClassBank")
    return made


def _is_sampler(make: Any) -> bool:
    """Whether a plug-in draws tasks itself, where others make what does."""
    return not isinstance(make, type) and "generator" in plugins.takes(make)


def _takes_bank(make: Any) -> bool:
    return "bank" in plugins.takes(make)


def _place(flags: Flags, split: str) -> dict[str, Any]:
    root, download = getattr(flags, "data_root", "data"), getattr(flags, "download", False)
    return {"split": split, "data_root": root, "download": download}


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


def _kind(samplers: list[TaskSampler], looks: list[Task]) -> Kind:
    """What the tasks are like, by some of each split. A sampler whose ways vary has `outputs`, the most."""
    targets = looks[0].support.y
    if targets.is_floating_point():
        outputs = targets.shape[-1] if targets.dim() > 2 else 1
        return Kind(outputs, None, {"loss": squared_error, "metric": squared_error})
    ways = [int(look.support.y.max()) + 1 for look in looks]
    outputs = max(getattr(sampler, "outputs", None) or seen for sampler, seen in zip(samplers, ways, strict=True))
    padded = any(isinstance(look.support.x, Padded) for look in looks)
    fewer: Callable[[Loss], Loss] = of_ways if padded or min(ways) < outputs else lambda function: function
    return Kind(outputs, None if padded else 1 / ways[-1], {"loss": fewer(cross_entropy), "metric": fewer(accuracy)})


def _model(flags: F, tasks: Task, outputs: int, tokens: Tokens | None) -> tuple[F, nn.Module]:
    """The network, and the flags with its name: where the experiment's own does not fit the examples, one that does."""
    x = tasks.support.x.x if isinstance(tasks.support.x, Padded) else tasks.support.x
    inputs = {k: tuple(v.shape[2:]) for k, v in x.items()} if isinstance(x, dict) else tuple(x.shape[2:])
    given: dict[str, Any] = {"inputs": inputs, "outputs": outputs, "ways": outputs, "seed": flags.seed}
    if flags.pretrained == "":
        raise UserError("--pretrained is empty; give a file or 'default', or leave it out")
    given |= {"pretrained": flags.pretrained} if flags.pretrained else {}
    given |= {"padding_token": tokens.padding} if tokens else {}
    kind = "several inputs" if isinstance(x, dict) else "numbers" if x.is_floating_point() else "feature numbers"
    if kind == "numbers" and isinstance(inputs, tuple) and len(inputs) == 3 and inputs[1] == inputs[2]:
        kind, given = "square images", given | {"channels": inputs[0], "size": inputs[1]}
    target = plugins.resolve(flags.model, "models")
    if isinstance(target, nn.Module):
        return flags, network(flags.model, given)
    usual = WANTED.get("".join(flags.model.partition(":")[:2]), kind)
    wanted = "square images" if {"channels", "size"} & plugins.takes(target) else usual
    if wanted != kind and kind not in FITS.get(wanted, ()):
        fitting = next((name for name, takes in WANTED.items() if takes == kind), None)
        if flags.model != type(flags)().model or fitting is None:
            advice = f"--model {fitting}" if fitting else "a model of your own, as --model file.py:NAME"
            raise UserError(
                f"--model {flags.model} takes {wanted}, but these tasks have {kind} of shape {inputs}; use {advice}"
            )
        log.info("%s takes %s, and these tasks have %s of shape %s: --model %s", flags.model, wanted, kind, inputs, fitting)
        flags = replace(flags, model=fitting)
        target = plugins.resolve(fitting, "models")
    made = network(flags.model, given, flags.model_args)
    reads = getattr(made, "tokens", None)
    if tokens and isinstance(reads, Tokens) and reads.vocabulary != tokens.vocabulary:
        raise UserError(
            f"--model {flags.model} reads numbers by {reads.made_by}, but these tasks have others, by {tokens.made_by}; use "
            f"that tokenizer, as in --sampler clinc150-wordpieces --sampler.tokenizer {flags.model.partition(':')[2]}"
        )
    if kind == "feature numbers":
        largest = max(int(batch.x.max()) for batch in tasks if isinstance(batch.x, torch.Tensor))
        tables = [module.num_embeddings for module in made.modules() if isinstance(module, nn.Embedding)]
        if tables and largest >= max(tables):  # a language model has smaller ones too, of positions
            raise UserError(
                f"the model {flags.model} knows feature numbers below {max(tables)}, but these tasks have {largest}; give it "
                "more, as in --model.features 8192"
            )
    return flags, made


def network(name: str, given: dict[str, Any], pairs: Sequence[str] = ()) -> nn.Module:
    """The model of a name: a copy of the module that it stands for, or what it makes of those of the `given` things that it
    takes (`inputs`, `outputs`, `ways`, `channels`, `size`, `seed`, `padding_token`, `pretrained`) and its settings. One that
    does not take `pretrained` gets the weights of that file. Raises UserError for what is no model."""
    target, pretrained = plugins.resolve(name, "models"), given.get("pretrained")
    if isinstance(target, nn.Module):
        return _with_weights(copy.deepcopy(target), pretrained, name)
    with kept(given["seed"], devices=False):  # for models that take no seed
        made = plugins.call(target, given, plugins.settings(pairs, "--model", target), f"the model {name}")
    if not isinstance(made, nn.Module):
        raise UserError(f"the model {name} made a {type(made).__name__}; a model is an nn.Module, or makes one")
    if lazy := [n for n, p in made.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]:
        raise UserError(f"the model {name} has no shape for {lazy[0]} yet; call it once on an example before it is returned")
    return made if "pretrained" in plugins.takes(target) else _with_weights(made, pretrained, name)


def _with_weights(model: nn.Module, pretrained: str | None, name: str) -> nn.Module:
    if pretrained == "default":
        raise UserError(f"the model {name} comes without weights; leave out --pretrained, or give a file of weights")
    if pretrained:
        load(model, read(Path(pretrained)), pretrained, f"the model {name}")
        model.pretrained_on = f"file {Path(pretrained).name}"  # type: ignore[assignment]
    return model


def plan(flags: Flags, learner: Learner, training: TaskSampler) -> Plan:
    """The plan that the flags ask for, or the fastest of some; a run that is resumed keeps the one it began with."""
    tasks = move(draw(training, flags.tasks, flags.seed), flags.device)
    random = learner.rehearse(take(tasks, 0))
    if flags.map == "auto" and flags.chunk is None and flags.memory == "unroll" and flags.autocast is None:
        return choose(learner, tasks, flags.budget, None, flags.trace, flags.compile, flags.iterations)
    found = default_plan(learner, tasks) if flags.map == "auto" else Plan(flags.map)
    found = compiled_plan(found) if flags.compile and flags.map == "auto" else found
    asked = {"memory": flags.memory, "compile": flags.compile, "autocast": flags.autocast}
    chunk = found.chunk if flags.chunk is None else flags.chunk
    # A recording of recomputed steps is as long as all of them: minutes and gigabytes for a large model.
    records = flags.trace and flags.memory == "unroll" and not random and not flags.compile
    return replace(found, chunk=chunk, trace=records, **asked)  # type: ignore[arg-type]


def on_device(device: str, learner: Learner) -> Learner:
    """The learner with its model on a device; a copy where that is not the CPU."""
    return learner if device == "cpu" else replace(learner, model=copy.deepcopy(learner.model).to(device))


def kept_plan(folder: Path) -> Plan | None:
    """The plan of the earlier part of a run, so that its numbers go on as they began; None where there is none."""
    file = folder / "plan.json"
    if not file.exists():
        return None
    try:
        return Plan.stored(json.loads(file.read_text()))
    except (json.JSONDecodeError, TypeError):
        raise UserError(f"{file} is damaged; delete it, and a plan is chosen anew") from None


def judging(flags: Flags, plan: Plan) -> Plan | None:
    """The plan for evaluation: what was asked for, without what only a gradient needs, in full precision; else `evaluate`
    chooses, whose tasks have more queries than those of training."""
    if flags.map == "auto" and flags.chunk is None:
        # Unrecorded one by one is what is left for a model whose tasks cannot be mapped otherwise.
        return plan if plan == Plan("loop") and flags.backend == "toolkit" else None
    return replace(plan, memory="unroll", compile=False, autocast=None, trace=plan.records)
