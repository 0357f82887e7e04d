"""A finished run opened again: tested on other tasks, repeated, looked at task by task.

What a run folder says is data. The names in it that stand for code of the user's (module:NAME, file.py:NAME) are not resolved
until the user types them again.
"""

import logging
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from toolkit import experiment, parts, plugins
from toolkit.arguments import fits
from toolkit.errors import UserError
from toolkit.flags import PROTOCOLS, EpisodeFlags, Flags, checked
from toolkit.landscape import landscape
from toolkit.learner import Learner, Meta
from toolkit.plan import Plan
from toolkit.runs import checkpoint
from toolkit.runs.entry import entered
from toolkit.runs.folder import Run, config_hash, write_json
from toolkit.runs.summary import Outcome, code_version, table
from toolkit.starts import inherited, zeros
from toolkit.task import draw, move, take
from toolkit.testing import example, judged

CODE = ("algorithm", "sampler", "dataset", "model")  # flags that may name code
# What evaluation can change of a finished run; all else was settled by training.
TEST_ONLY = (
    "sampler", "dataset", "sampler_args", "dataset_args", "ways", "shots", "eval_queries", "eval_tasks", "eval_steps",
    "eval_seed", "protocol", "permutations", "support_copies", "inner_lr", "rule", "batch_norm", "data_root", "download",
    "pretrained", "device", "map", "chunk", "out", "overwrite", "debug",
)  # fmt: skip

NAMED = (  # what neither the name of a run nor the size of its test tells, and makes another evaluation
    "dataset", "sampler_args", "dataset_args", "eval_queries", "permutations", "support_copies", "inner_lr", "rule",
    "batch_norm",
)  # fmt: skip
log = logging.getLogger("toolkit")


def flags_of(run: Run, words: Sequence[str] = (), about: str = "", prog: str = "toolkit evaluate") -> Flags:
    """The flags that a run was made with, changed by the words of a command line.

    Raises UserError for a folder of another kind of experiment, and for names of code that were not typed again.
    """
    import tyro

    kind: type[Flags] = EpisodeFlags if "ways" in run.config else Flags
    types = get_type_hints(kind)
    if missing := {"algorithm", "iterations", "eval_tasks", "sampler"} - run.config.keys():
        raise UserError(
            f"{run.path} has no {sorted(missing)[0]} in its config.json; only runs of `experiment.run` can be opened again"
        )
    given: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in run.config.items() if key in types}
    given |= {"data_root": Path(given["data_root"])} if given.get("data_root") else {}
    given |= {"out": None, "resume": False, "overwrite": False, "logger": (), "protocol": None}
    if wrong := [key for key, value in given.items() if not fits(value, types[key])]:
        raise run.damaged("config.json", f"{wrong[0]} cannot be {given[wrong[0]]!r}")
    untyped: dict[str, Any] = {key: "" for key in CODE if plugins.is_code(str(given.get(key) or ""), f"{key}s")}
    flags = tyro.cli(kind, default=kind(**(given | untyped)), args=list(words), prog=prog, description=about)
    if lacking := [key for key in untyped if not getattr(flags, key)]:
        again = " ".join(f"--{key} {shlex.quote(str(given[key]))}" for key in lacking)
        raise UserError(f"{run.path} was made with code, which runs only when its names are typed again; add {again}")
    return flags


def opened(run: Run, words: Sequence[str] = (), about: str = "") -> tuple[Flags, Learner, Meta, parts.Tasks]:
    """The flags of a run, changed by the words of a command line; its learner, with the weights that were chosen on validation
    tasks; and its tasks. So a new task is adapted to by `adapted.adapt(learner, weights, support)`, and kept by
    `adapted.save`. Raises UserError as `flags_of`, for a run without a checkpoint, and for tasks that it does not fit."""
    flags = checked(flags_of(run, words, about, "toolkit show-task"))
    flags, learner, tasks = parts.assemble(_as_trained(flags, flags_of(run, _code(words))), needed=("test", "train"))
    learner = parts.on_device(flags.device, learner)
    return flags, learner, _fitting(run, learner), tasks


def evaluated(run: Run, words: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """Tests a run's chosen weights on the tasks that the words ask for, as `toolkit evaluate`, and writes that as a run folder:
    by default in `evaluations/` of the run. Returns the folder and its summary.

    Raises UserError for a flag that only training can use, and for tasks that the model does not fit.
    """
    kept = replace(flags_of(run, _code(words)), out=None)
    flags = flags_of(run, words, evaluated.__doc__ or "")
    if flags.protocol and flags.eval_tasks == kept.eval_tasks:
        flags = replace(flags, eval_tasks=PROTOCOLS[flags.protocol])
    flags = checked(flags)
    for field in fields(flags):
        before = run.config[field.name] if field.name in ("algorithm", "model") else getattr(kept, field.name)
        if getattr(flags, field.name) != before and field.name not in TEST_ONLY:
            flag = field.name.replace("_", "-")
            taken = ", ".join("--" + name.replace("_", "-") for name in TEST_ONLY)
            raise UserError(f"--{flag} belongs to training, which is over; `toolkit evaluate` takes {taken}")
    flags = _as_trained(flags, kept)
    if flags.sampler != kept.sampler and flags.dataset == kept.dataset:
        flags = replace(flags, dataset=None, dataset_args=())
    flags, learner, tasks = parts.assemble(flags, needed=("test", "train"))
    learner = parts.on_device(flags.device, learner)
    outcome = replace(_outcome(run), best=_fitting(run, learner))
    config = experiment.configuration(flags, str(run.config.get("experiment", "")), learner)
    name = f"{flags.run_name}-{flags.eval_tasks}x{flags.eval_steps}-{flags.eval_seed}"
    changed = {key: getattr(flags, key) for key in NAMED if getattr(flags, key, None) != getattr(kept, key, None)}
    name += "".join(f"-{key}-{re.sub('[^A-Za-z0-9.=_-]+', '_', str(value))}" for key, value in changed.items())
    folder = flags.out or run.path / "evaluations" / name
    replaces = _replaces(run, folder, flags.overwrite)
    where = words.index("--data-root") if "--data-root" in words else len(words)
    typed = [*words[:where], *words[where + 2 :]]  # a data root belongs to a machine
    place = run.path.name if run.path.is_absolute() else str(run.path)
    traces = {"git": code_version(), "command": shlex.join(["toolkit", "evaluate", place, *typed]), "weights_of": run.path.name}
    with entered(folder, config, resume=False, overwrite=replaces):
        summary = judged(folder, flags, config, learner, outcome, tasks.test, tasks.chance, traces)
    from toolkit.plots.figures import adaptation
    from toolkit.plots.save import save

    save(adaptation([Run(folder)]), folder / "adaptation")
    print(table(summary))
    return folder, summary


def repeated(run: Run, words: Sequence[str]) -> tuple[Path, list[str]]:
    """Repeats a run by the plan that it had, into a folder of its own beside it, and says what differs: nothing, where all
    numbers are the same to the last bit. A repetition that was stopped goes on.

    Raises UserError for a folder that holds no training, lacks a file to compare with, or has its repetition already."""
    if "weights_of" in run.summary:
        raise UserError(
            f"{run.path} is an evaluation of the weights of {run.summary['weights_of']}, which has no training to repeat; give "
            f"that run, or test it again by `{run.summary.get('command')}`"
        )
    _ = run.result, run.curve, run.metrics  # before hours of training
    flags = flags_of(run, words, repeated.__doc__ or "", "toolkit rerun")
    out = flags.out or run.path.with_name(f"{run.path.name}-again")
    if (out / "summary.json").exists():
        raise UserError(f"{out} is finished already; remove it to repeat the run again, or give another place with --out")
    if config_hash(experiment.configuration(flags, run.config["experiment"])) != config_hash(run.config):
        raise UserError(
            f"these flags make another run than {run.path}; `toolkit rerun` takes --out, --data-root and names of code"
        )
    out.mkdir(parents=True, exist_ok=True)
    if not any(out.iterdir()):
        write_json(out / "config.json", run.config)
        if "plan" in run.summary:
            write_json(out / "plan.json", run.summary["plan"])
    flags, learner, tasks = parts.assemble(replace(flags, out=out, resume=True))
    again = experiment.run(flags, run.config["experiment"], learner, *tasks)
    return out, differences(run, again)


def differences(first: Run, second: Run) -> list[str]:
    """What differs between the numbers of two runs, in sentences, with what may be the reason; nothing where all are equal."""
    found = []
    for name in ("metric", "loss"):
        a, b = getattr(first.curve, name), getattr(second.curve, name)
        if a.shape != b.shape:
            found.append(f"the curves have {tuple(a.shape)} and {tuple(b.shape)} points")
        elif not torch.equal(a.nan_to_num(), b.nan_to_num()):
            found.append(f"the test {name} differs by up to {float((a - b).abs().nan_to_num().max()):.3g} on a task")
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in run.metrics] for run in (first, second)]
    for a, b in zip(*rows, strict=False):
        if a != b:
            found.append(f"training differs from iteration {int(a['iteration'])} on")
            break
    else:
        if len(rows[0]) != len(rows[1]):
            found.append(f"the journals of training have {len(rows[0])} and {len(rows[1])} rows")
    here, there = first.summary, second.summary
    for part in ("test", "card", "selected"):
        a, b = (summary.get(part) or {} for summary in (here, there))
        keys = sorted(key for key in a.keys() & b.keys() if key != "seconds_per_task" and a[key] != b[key])
        found += [f"{part} {key} in summary.json differs" for key in keys]
    if found:
        for key, v in here.get("versions", {}).items():
            if there["versions"].get(key) != v:
                found.append(f"{key} was {v} and is {there['versions'].get(key)}")
        for key in ("git", "plan"):
            if here.get(key) != there.get(key):
                found.append(f"the {'code' if key == 'git' else key} was {here.get(key)} and is {there.get(key)}")
    return found


def shown(run: Run, index: int, words: Sequence[str], path: bool = False, gif: bool = False) -> list[Path]:
    """Draws test task `index` of a run with its predictions, as task-INDEX in the run folder or in --out; with `path` also how
    the weights walk over the losses around them (path-INDEX), with `gif` the predictions step by step (adaptation-INDEX.gif).
    Returns the files."""
    if index < 0:
        raise UserError(f"task {index} is none; tasks are numbered from 0")
    flags, learner, weights, tasks = opened(run, words, shown.__doc__ or "")
    place, steps = flags.out or run.path, max(flags.eval_steps, learner.steps)
    tensors = example(flags, learner, weights, tasks.test, index)
    if not tensors:
        raise UserError(f"the tasks of {run.path} have inputs of several parts, of which there is no picture")
    from toolkit.plots import figures
    from toolkit.plots.animation import animate
    from toolkit.plots.landscape import landscape as drawn
    from toolkit.plots.save import save

    pictured, source = Run(run.path), f"{flags.sampler}, task {index}"
    title = f"{learner.name} on {source}"
    # In place of those of the folder, which are of task 0.
    pictured.__dict__.update(example=tensors, known=run.result | {"sampler": source})
    made = {f"task-{index}": figures.example(pictured)}
    if path:
        task = move(take(draw(tasks.test, 1, flags.eval_seed, index, "test"), 0), flags.device)
        try:
            made[f"path-{index}"] = drawn(landscape(learner, weights, task, steps), title)
        except UserError as error:  # weights that do not move have no path; the rest is drawn
            log.warning("no path-%d: %s", index, error)
    written = [file for name, figure in made.items() for file in save(figure, place / name)]
    if gif:
        all_steps = example(flags, learner, weights, tasks.test, index, range(steps + 1))
        written.append(animate(all_steps, title, place / f"adaptation-{index}.gif"))
    return written


def _as_trained(flags: Flags, kept: Flags) -> Flags:
    """The flags of a test with the model's outputs as training had them: fewer ways leave some without a class."""
    if not (isinstance(flags, EpisodeFlags) and isinstance(kept, EpisodeFlags)) or flags.ways == kept.ways:
        return flags
    trained = kept.train_ways or kept.ways
    return replace(flags, train_ways=trained if flags.ways < trained else None)


def _replaces(run: Run, folder: Path, overwrite: bool) -> bool:
    """Whether an evaluation may replace what is in its folder: where that was stopped, too. Raises UserError where the folder
    is the run's own, and where another evaluation is finished and may not be replaced."""
    here, own = folder.resolve(), run.path.resolve()
    if here == own or here in own.parents:
        raise UserError(f"--out {folder} is the run {run.path} or holds it; choose another place")
    finished = (folder / "summary.json").exists()
    if finished and not overwrite:
        raise UserError(f"the evaluation {folder} exists; replace it with --overwrite, or choose another place with --out")
    # Of another run, which has more than an evaluation that was stopped, nothing is lost without being asked for.
    stopped = not finished and not any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints"))
    return overwrite or stopped


def _code(words: Sequence[str]) -> list[str]:
    """Those of the words that name code, and their values."""
    found = []
    for i, word in enumerate(words):
        flag, equals, _ = word.partition("=")
        if flag.removeprefix("--") in CODE:
            found += [word] if equals else list(words[i : i + 2])
    return found


def _weights(run: Run) -> tuple[Meta, dict[str, Any]]:
    loaded = checkpoint.load_newest(run.path / "checkpoints", config_hash(run.config))
    if loaded is None:
        if "weights_of" in run.summary:
            raise UserError(f"{run.path} is an evaluation without weights; give the run, {run.summary['weights_of']}")
        raise UserError(f"{run.path} has no checkpoint, only numbers; `toolkit rerun {run.path}` makes its weights anew")
    finished = (run.path / "summary.json").exists()
    if finished and loaded[1].get("selected", run.summary.get("selected")) != run.summary.get("selected"):
        raise UserError(
            f"the checkpoint of {run.path} that was tested is damaged, and older ones hold other weights; `toolkit rerun "
            f"{run.path}` makes them anew"
        )
    return loaded


def _outcome(run: Run) -> Outcome:
    try:
        cost, plan, selected = run.summary["cost"], Plan.stored(run.summary["plan"]), dict(run.summary["selected"])
        known = cost.get("meta_gradient_operations"), cost.get("joules"), cost.get("joules_of") or ""  # of later versions
        return Outcome(Meta({}, {}), selected, cost["seconds"], plan, cost["peak_mb"], *known)
    except (KeyError, TypeError, AttributeError) as error:
        raise run.damaged("summary.json", error) from None


def _fitting(run: Run, learner: Learner) -> Meta:
    """The run's weights as the learner has them. A head of another size will do where a method makes it of the support set."""
    (weights, state), own = _weights(run), learner.init()
    wrong = [name for name, p in own.params.items() if name not in weights.params or weights.params[name].shape != p.shape]
    made = learner.start not in (inherited, zeros)
    if [name for name in wrong if not (made and name.startswith(f"{learner.head}."))]:
        name = wrong[0]
        had = tuple(weights.params[name].shape) if name in weights.params else "not there"
        raise UserError(
            f"{run.path} does not fit these tasks: its {name} is {had}, they want {tuple(own.params[name].shape)}; give tasks "
            "of the same inputs and at most as many ways, or train a method whose head is made of the support set (protonet)"
        )
    checkpoint.check_beside(run.path, state, checkpoint.beside(learner.model))
    device = next(iter(own.params.values())).device

    def placed(tree: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(device) for name, tensor in (like | tree).items()}

    params = {name: own.params[name] if name in wrong else weights.params[name] for name in own.params}
    return Meta(placed(params, {}), placed(weights.learned, own.learned), placed(weights.stats, {}))
