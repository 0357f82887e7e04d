"""What does knowledge shared by two sub-tasks buy on a third, and what when nobody says which sub-task a query belongs to?

    python experiments/shared_model.py --data-root data

A sub-task is an alphabet of Omniglot: its first ten characters by name, 20 drawings each, as 10x10 images with labels 0 to 9
for `BigModel`, a 100-50-10 perceptron. The shared knowledge comes from two background alphabets.

Starts. "random": new weights. "joint": the model after 100 epochs over the DataLoaders of both sub-tasks, which share the ten
outputs. "joint_body": the same with a new head. "maml": meta-learned on 5-shot tasks from the same loaders. Each adapts by
plain gradient descent to the same 150 5-shot tasks, each from one of the 20 evaluation alphabets, since single alphabets
differ much (`--held-out 1` takes one); intervals are 95 % over tasks. Every start has the inner rate out of RATES with the
best mean accuracy over all steps on tasks from the six validation alphabets; MAML's own rate and its number of iterations in
training were chosen on them too.

Mixture. Four held-out alphabets, a model adapted to each (maml start), and queries whose alphabet is unknown: all of one
alphabet, or each of any. `toolkit.mixture` weighs the four models: equally; by how certain each is about a query; by the
likelihood of one labelled example per class; by EM on the same examples. Beside them single models that adapted to all four
support sets pooled, a component at random, and the oracle that knows each query's alphabet.

Expected accuracy in percent, in one to four minutes on one core; the committed run has --out results/reference/shared_model:

    after 1, 5, 20 steps   random 19.4, 39.1, 46.4; joint 14.5, 26.5, 45.0; joint_body 15.9, 43.8, 52.4; maml 25.4, 43.1, 55.0
    one unknown alphabet   mixture by likelihood 63.6, EM 63.5, equal weights 35.6; oracle 63.6; single model 35.8 (maml start)

Over seeds 0 to 2 maml is ahead of random weights after every step, at the end by 2 to 9 points: by 2 where validation gives
random weights the rate 1 (52.3), which is slower at first, and not 2. What joint training shares is in its body, on which maml
gains 2 to 3 points at the end and 9 to 17 in the first two steps, but nothing after 5 to 9; its head is in the way. Where ten
labelled examples tell the alphabet, the mixture is as good as the oracle. Where each query may be of any alphabet, weights help
little: 37.7 by certainty, 35.6 by EM, 35.8 for the single model. `--subtasks 20` learns from more: maml 25.8, 52.1, 57.7.
"""

import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from toolkit import mixture
from toolkit.algorithms import maml
from toolkit.curve import Curve
from toolkit.data.bank import ClassBank
from toolkit.data.omniglot import omniglot
from toolkit.errors import UserError
from toolkit.evaluate import evaluate
from toolkit.flags import launch
from toolkit.learner import Learner, Meta
from toolkit.metrics import accuracy
from toolkit.models import BigModel
from toolkit.plan import Plan
from toolkit.runs.entry import prepare, settle
from toolkit.runs.folder import Run, write_json
from toolkit.runs.summary import Outcome, code_version, peak_mb, summarise
from toolkit.samplers import Loaders, MetaTask, joint_epochs
from toolkit.samplers.episodes import as_input
from toolkit.task import Batch, Task, draw, stack, take
from toolkit.train import train
from toolkit.tree import Params

CLASSES, DRAWINGS, SIZE = 10, 20, 10  # characters of a sub-task; drawings of each; height and width of an image
RATES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
METHODS = (
    "single model, joint start", "single model, maml start", "one component at random", "mixture, equal weights",
    "mixture, by certainty", "mixture, by likelihood", "mixture, learned by EM", "oracle component",
)  # fmt: skip
SubTasks = dict[str, DataLoader[Any]]


@dataclass(frozen=True)
class Config:
    """Joint training, MAML and no learning as starts for a held-out alphabet; a mixture for unknown ones."""

    subtasks: int = 2
    """Alphabets to learn from."""
    held_out: int | None = None
    """Held-out alphabets to adapt to, each test task to one of them; by default all there are."""
    components: int = 4
    """Held-out alphabets in the mixture."""
    shots: int = 5
    """Support examples per class."""
    queries: int = 10
    """Query examples per class."""
    labelled: int = 1
    """Labelled examples per class that choose the weights of the mixture."""
    epochs: int = 100
    """Epochs of joint training."""
    batch: int = 20
    """Examples per batch of joint training."""
    joint_lr: float = 1e-3
    """Learning rate of joint training (Adam)."""
    inner_lr: float = 1.0
    """Inner rate of MAML in training."""
    inner_steps: int = 5
    """Inner steps of MAML in training."""
    meta_lr: float = 1e-3
    """Outer learning rate of MAML (Adam)."""
    tasks: int = 8
    """Tasks per meta-update."""
    iterations: int = 700
    """Meta-updates."""
    val_tasks: int = 100
    """Validation tasks per inner rate."""
    eval_tasks: int = 150
    """Test tasks."""
    eval_steps: int = 20
    """Inner steps at test time."""
    trials: int = 200
    """Draws of supports, labelled examples and queries for the mixture."""
    seed: int = 0
    """Seed of the weights, the batches and the training tasks."""
    eval_seed: int = 0
    """Seed of the validation and test tasks."""
    data_root: Path = Path("data")
    """Folder that holds the data sets, in torchvision's layout."""
    download: bool = False
    """Download the data set into the data root if it is not there."""
    out: Path | None = None
    """Run folder; by default results/shared_model/<name made from the flags>."""
    overwrite: bool = False
    """Replace the run in the run folder."""
    debug: bool = False
    """Show the traceback of an error."""


class Start(NamedTuple):
    """Weights to adapt from, the inner rate for it, and the mean validation accuracy at each of RATES."""

    meta: Meta
    rate: float
    validation: dict[str, float]


def main(config: Config) -> None:
    began, git = time.perf_counter(), code_version()
    _check(config)
    learning, validation = sub_tasks(config, "train", config.subtasks), sub_tasks(config, "val")
    held_out, components = sub_tasks(config, "test", config.held_out), sub_tasks(config, "test", config.components)
    episodes = {name: few_shot(config, tasks) for name, tasks in (("val", validation), ("test", held_out), ("train", learning))}
    folder = config.out or Path("results/shared_model") / f"{config.subtasks}alphabets-{config.shots}s-seed{config.seed}"
    flags = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    flags |= {"experiment": "shared_model", "sampler": _where(held_out), "device": "cpu"}
    if (folder / "config.json").exists() and not config.overwrite:
        raise UserError(f"the run folder {folder} exists; replace it with --overwrite, or choose --out")
    prepare(folder, flags, resume=False, overwrite=config.overwrite)

    model = BigModel((SIZE * SIZE, 50, CLASSES), config.seed)
    learner = maml(model, inner_lr=config.inner_lr, inner_steps=config.inner_steps)
    random, clock = learner.init().params, [time.perf_counter()]
    joint, losses = jointly(config, model, learning)
    clock.append(time.perf_counter())
    learned = meta_learned(config, learner, episodes["train"])
    clock.append(time.perf_counter())
    trained = {"random": 0.0, "joint": clock[1] - clock[0], "joint_body": clock[1] - clock[0], "maml": clock[2] - clock[1]}
    new_head = {name: p for name, p in random.items() if name.startswith("head.")}
    weights = {"random": random, "joint": joint, "joint_body": joint | new_head, "maml": learned}
    starts = {name: tuned(config, model, name, params, episodes["val"]) for name, params in weights.items()}
    curves = {}
    for name, start in starts.items():
        adapts = replace(adapting(config, model, start), name=name, steps=config.inner_steps)
        curves[name] = judged(config, adapts, start, episodes["test"])
        selected = {"inner_lr": start.rate, "val_metric": start.validation[str(start.rate)]}
        outcome = Outcome(adapts.init(), selected, trained[name], Plan("vmap"), peak_mb("cpu"))
        traces = {"selection": f"the best rate on {config.val_tasks} validation tasks", "git": git}
        own = summarise(flags, adapts, curves[name], outcome, 1 / CLASSES, False, 0, traces)
        # MAML alone was trained on steps, and only its iterations are those of the flags.
        own["inner_steps"] = config.inner_steps if name == "maml" else None
        own["cost"] = {key: own["cost"][key] for key in ("seconds", "parameters")}
        (folder / name).mkdir()
        write_json(folder / name / "curve.json", curves[name].to_json())
        write_json(folder / name / "summary.json", own)

    unknown = unknown_sub_task(config, model, starts, components)
    summary = {
        "experiment": "shared_model",
        "sub_tasks": {"training": list(learning), "validation": list(validation), "held out": list(held_out)},
        "joint_loss": dict(zip(learning, losses, strict=True)),
        "starts": {name: _outcome(starts[name], curve) for name, curve in curves.items()},
        "maml_minus": {name: _difference(curves["maml"], curves[name]) for name in curves if name != "maml"},
        "mixture": {"sub_tasks": list(components), "chance": 1 / CLASSES, "accuracy": unknown},
        "seconds": round(time.perf_counter() - began, 1),
        "git": git,
    }
    write_json(folder / "summary.json", summary)
    settle(folder)
    from toolkit.plots.figures import adaptation
    from toolkit.plots.save import save

    save(adaptation([Run(folder / name) for name in starts]), folder / "adaptation")
    print(table(config, summary))
    print(f"run folder: {folder} (summary.json, adaptation.png, a folder per start with its curve.json)")


def sub_tasks(config: Config, split: str, number: int | None = None) -> SubTasks:
    """The first `number` alphabets of a split, by name, that have ten characters; of each the first ten, by name."""
    bank = omniglot(split, config.data_root, "background", rotations=False, size=SIZE, download=config.download)
    alphabets: dict[str, list[str]] = {}
    for name in sorted(bank.names):
        alphabets.setdefault(name.split("/")[1], []).append(name)
    names = [alphabet for alphabet in sorted(alphabets) if len(alphabets[alphabet]) >= CLASSES]
    if number is not None and number > len(names):
        raise UserError(f"{number} alphabets were asked for, but the {split} split has {len(names)} of {CLASSES} characters")
    return {name: _loader(config, bank, alphabets[name][:CLASSES]) for name in names[:number]}


def _loader(config: Config, bank: ClassBank, names: list[str]) -> DataLoader[Any]:
    chosen = bank.select([bank.names.index(name) for name in names])
    labels = torch.arange(CLASSES).repeat_interleave(chosen.sizes)
    return DataLoader(TensorDataset(as_input(chosen.read(torch.arange(chosen.entries))), labels), config.batch, shuffle=True)


def few_shot(config: Config, tasks: SubTasks, more: int = 0) -> Loaders:
    # Labels are dealt anew in every task. With fixed ones a model could learn the training alphabets by heart and never
    # adapt, and what number a held-out character has is arbitrary.
    return Loaders(list(tasks.values()), config.shots, config.queries + more, per_class=True, permute=True)


def jointly(config: Config, model: BigModel, learning: SubTasks) -> tuple[Params, tuple[float, ...]]:
    """The weights after joint training, and each sub-task's loss in its last epoch."""
    tasks = [MetaTask(loader, model) for loader in learning.values()]
    with tqdm(total=config.epochs, desc="joint", unit="epoch") as bar:
        for epoch in joint_epochs(tasks, config.epochs, config.joint_lr, config.seed):
            bar.set_postfix(loss=" ".join(f"{loss:.3f}" for loss in epoch.losses), refresh=False)
            bar.update()
    return epoch.params, epoch.losses


def meta_learned(config: Config, learner: Learner, sampler: Loaders) -> Params:
    """The weights after MAML."""
    with tqdm(total=config.iterations, desc="maml", unit="it") as bar:
        for record in train(learner, sampler, config.iterations, config.tasks, config.meta_lr, config.seed, Plan("vmap")):
            bar.set_postfix(loss=f"{record.loss:.3f}", accuracy=f"{record.metric:.3f}", refresh=False)
            bar.update()
    return record.meta.params


def tuned(config: Config, model: BigModel, name: str, params: Params, sampler: Loaders) -> Start:
    """The start with its best inner rate: the greatest mean accuracy after 1, 2, ... steps on validation tasks."""
    meta, found = Meta(params, {}), {}
    for rate in tqdm(RATES, f"inner rate of {name}", leave=False):
        learner = adapting(config, model, Start(meta, rate, {}))
        curve = evaluate(learner, meta, sampler, config.val_tasks, config.eval_steps, config.eval_seed, "val", Plan("vmap"))
        found[str(rate)] = round(float(curve.mean()[1:].mean()), 6)
    return Start(meta, max(RATES, key=lambda rate: found[str(rate)]), found)


def adapting(config: Config, model: BigModel, start: Start) -> Learner:
    """Plain gradient descent at the start's rate, for the steps of the test."""
    return maml(model, inner_lr=start.rate, inner_steps=config.eval_steps)


def judged(config: Config, learner: Learner, start: Start, sampler: Loaders) -> Curve:
    """The adaptation curve on the test tasks, rounded: that makes its file a third as large."""
    with tqdm(total=config.eval_tasks, desc=f"test {learner.name}", unit="task") as bar:
        numbers = config.eval_tasks, config.eval_steps, config.eval_seed
        curve = evaluate(learner, start.meta, sampler, *numbers, "test", Plan("vmap"), bar.update)
    return replace(curve, loss=curve.loss.round(decimals=3), metric=curve.metric.round(decimals=6))


def unknown_sub_task(
    config: Config, model: BigModel, starts: Mapping[str, Start], tasks: SubTasks
) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy on queries of an unknown sub-task by setting and method, {mean, ci95} over trials."""
    drawn = [
        draw(few_shot(config, {name: loader}, config.labelled), config.trials, config.eval_seed, split=f"mixture {name}")
        for name, loader in tasks.items()
    ]
    found: dict[str, list[list[float]]] = {"one": [], "any": []}
    for trial in tqdm(range(config.trials), "mixture", unit="trial"):
        whole = stack([take(batch, trial) for batch in drawn])
        labelled, queries = _split(whole, config.labelled)
        models = _models(config, model, starts, whole)
        one = trial % len(tasks)
        truth = torch.eye(len(tasks))[one]
        found["one"].append(_accuracies(models, take(labelled, one), take(queries, one), truth))
        truth = torch.eye(len(tasks)).repeat_interleave(queries.y.shape[1], 0)
        found["any"].append(_accuracies(models, _flat(labelled), _flat(queries), truth))
    return {setting: _means(torch.tensor(rows, dtype=torch.float64)) for setting, rows in found.items()}


class Models(NamedTuple):
    """The components with their learner, and single models by their start."""

    learner: Learner
    meta: Meta
    components: mixture.Components
    single: dict[str, tuple[Learner, Meta, mixture.Components]]


def _models(config: Config, model: BigModel, starts: Mapping[str, Start], tasks: Task) -> Models:
    single = {}
    for name in ("joint", "maml"):
        learner = adapting(config, model, starts[name])
        pooled = pytree.tree_map(lambda tensor: tensor.unsqueeze(0), _flat(tasks.support))
        single[name] = learner, starts[name].meta, mixture.adapt(learner, starts[name].meta, pooled)
    learner, meta, _ = single["maml"]
    return Models(learner, meta, mixture.adapt(learner, meta, tasks.support), single)


def _accuracies(models: Models, labelled: Batch, queries: Batch, truth: Tensor) -> list[float]:
    """One accuracy for each of METHODS; `truth` are the oracle's weights."""
    shared = models.learner, models.meta, models.components
    logs = mixture.log_probabilities(*shared, queries.x)
    negative_entropy = (logs.exp() * logs).sum(-1)
    alone = torch.stack([accuracy(own, queries.y) for own in logs])
    single = [mixture.log_probabilities(*models.single[name], queries.x)[0] for name in ("joint", "maml")]
    mixed = [
        mixture.mix(*shared, queries.x, weights)
        for weights in (
            mixture.uniform(len(logs)),
            negative_entropy.softmax(0).T,
            mixture.by_likelihood(*shared, labelled),
            mixture.fit_weights(*shared, labelled),
            truth,
        )
    ]
    scores = [accuracy(prediction, queries.y).item() for prediction in (*single, *mixed)]
    return [*scores[:2], alone.mean().item(), *scores[2:]]


def _split(tasks: Task, labelled: int) -> tuple[Batch, Batch]:
    """The first `labelled` query examples of each class, and the others; queries come ordered by class."""
    parts = pytree.tree_map(lambda tensor: tensor.unflatten(1, (CLASSES, -1)), tasks.query)
    return (
        pytree.tree_map(lambda tensor: tensor[:, :, :labelled].flatten(1, 2), parts),
        pytree.tree_map(lambda tensor: tensor[:, :, labelled:].flatten(1, 2), parts),
    )


def _flat(batch: Batch) -> Batch:
    return pytree.tree_map(lambda tensor: tensor.flatten(0, 1), batch)  # type: ignore[no-any-return]


def _means(values: Tensor) -> dict[str, dict[str, float]]:
    statistics = Curve(values, values, "accuracy")
    rows = zip(METHODS, statistics.mean().tolist(), statistics.ci95().tolist(), strict=True)
    return {method: {"mean": round(mean, 6), "ci95": round(half, 6)} for method, mean, half in rows}


def _outcome(start: Start, curve: Curve) -> dict[str, Any]:
    mean, half = ([round(v, 6) for v in values.tolist()] for values in (curve.mean(), curve.ci95()))
    return {"inner_lr": start.rate, "validation": start.validation, "mean": mean, "ci95": half, "tasks": curve.tasks}


def _difference(a: Curve, b: Curve) -> dict[str, list[float]]:
    """Mean difference of accuracy on the same tasks, with the interval of the paired difference."""
    paired = a.metric - b.metric
    return {"mean": [round(v, 6) for v in a.mean(paired).tolist()], "ci95": [round(v, 6) for v in a.ci95(paired).tolist()]}


def table(config: Config, summary: dict[str, Any]) -> str:
    """The results as text: accuracy in percent, ± half its 95 % interval."""

    def cell(row: dict[str, Any], step: int) -> str:
        return f"{100 * row['mean'][step]:.1f} ± {100 * row['ci95'][step]:.1f}"

    steps = [k for k in (0, 1, 2, 5, 10, 20, 50) if k <= config.eval_steps]
    lines = [f"accuracy (%) on {config.eval_tasks} tasks of {_where(summary['sub_tasks']['held out'])} after inner steps"]
    lines += [f"{'start':<18}{'rate':>5}" + "".join(f"{k:>13}" for k in steps)]
    for name, row in summary["starts"].items():
        lines += [f"{name:<18}{row['inner_lr']:>5}" + "".join(f"{cell(row, k):>13}" for k in steps)]
    for name, row in summary["maml_minus"].items():
        lines += [f"{'maml - ' + name:<23}" + "".join(f"{cell(row, k):>13}" for k in steps)]
    found = summary["mixture"]["accuracy"]
    lines += ["", f"queries of an unknown alphabet out of {config.components}, {config.trials} trials"]
    lines += [f"{'':<28}{'all of one':>13}{'each of any':>13}"]
    for method in METHODS:
        cells = [f"{100 * found[s][method]['mean']:.1f} ± {100 * found[s][method]['ci95']:.1f}" for s in ("one", "any")]
        lines += [f"{method:<28}" + "".join(f"{text:>13}" for text in cells)]
    return "\n".join(lines)


def _where(held_out: Collection[str]) -> str:
    return f"{len(held_out)} held-out alphabets" if len(held_out) > 1 else f"held-out alphabet {next(iter(held_out))}"


def _check(config: Config) -> None:
    for name, value in asdict(config).items():
        flag, least = f"--{name.replace('_', '-')}", 2 if name in ("components", "eval_tasks", "trials") else 1
        if type(value) is int and "seed" not in name and value < least:
            raise UserError(f"{flag} is {value}; give at least {least}")
        if type(value) is float and not 0 < value < float("inf"):
            raise UserError(f"{flag} is {value}; give a positive number")
    if (needed := config.shots + config.queries + config.labelled) > DRAWINGS:
        raise UserError(
            f"--shots {config.shots}, --queries {config.queries} and --labelled {config.labelled} need {needed} drawings of "
            f"each character, but there are {DRAWINGS}; take fewer"
        )


if __name__ == "__main__":
    launch(Config, main, {}, __doc__)
