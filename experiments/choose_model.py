"""Which model for these tasks? What each reaches after adaptation, and what that costs, in one figure and one table.

    python experiments/choose_model.py --models mlp "mlp width=256" conv4-32 conv4 --seconds-per-model 60
    python experiments/choose_model.py --models tv:resnet18 "tv:vit_b_16 lora=8 resize=224" --iterations 1000 --sampler ...

Every model is trained by the same method on the same tasks for the same budget: `--iterations`, or as many as go into
`--seconds-per-model` on this machine, by a measurement of the first ones. Each is an ordinary run in a process of its own, so
that its peak memory is its own, and keeps the number of iterations that it began with; the same command again goes on where it
stopped, and finished runs are kept. `--models` are names as `--model` takes them, each with what that one has of its own: flags
(pretrained, lora, lora_layers, prompts, adapts, freeze, rule, inner_lr) and its settings. All other flags are those of any
experiment.

Accuracy is after the steps of training, on the same test tasks for all, with its 95 % interval over tasks (over seeds and tasks
with `--seeds`), and the paired difference to the best. Costs are the model's parameters, the seconds of adapting to a test task
with its predictions, the most memory that training held, and the bytes to store for an adapted task. A model is on the Pareto
front if no other is at least as good for at most each cost, and better in one: by means, so look at the intervals too.

A small budget compares early learning on this machine: what is large and slow is seen far from its end. `adaptation` beside the
figure has the curves.
"""

import csv
import io
import json
import logging
import math
import multiprocessing
import shlex
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from toolkit import parts, plugins
from toolkit.errors import UserError, unknown
from toolkit.experiment import configuration, run
from toolkit.files import replace as replace_file
from toolkit.flags import EpisodeFlags, checked, launch
from toolkit.learner import Learner
from toolkit.metrics import direction
from toolkit.runs.comparison import Entry, difference, entries
from toolkit.runs.entry import check_same
from toolkit.runs.folder import Run, write_json
from toolkit.train import train

log = logging.getLogger("toolkit")
# By key of a row: text of the axis, and its unit.
COSTS = {
    "parameters": ("parameters of the model", ""),
    "task_seconds": ("time of a test task", "s"),
    "peak_bytes": ("peak memory of training", "B"),
    "task_bytes": ("storage for an adapted task", "B"),
}
# Flags that a model may have of its own, and the kind of their value.
OWN: dict[str, Callable[[str], Any]] = {
    "pretrained": str, "lora": int, "lora_layers": str, "prompts": int, "adapts": str, "freeze": str, "rule": str,
    "inner_lr": float,
}  # fmt: skip
TRIAL, PATIENCE = 50, 3.0  # at most so many iterations, or seconds of them, are timed
COLUMNS = (
    "model", "accuracy", "minus the best", "Pareto front", "parameters", "adapt", "s a task", "peak MB", "kB a task",
    "iterations", "training s",
)  # fmt: skip


@dataclass(frozen=True)
class One(EpisodeFlags):
    """Flags of one model's run, as it is found in its folder."""

    sampler: str = "glyphs"
    tasks: int = 16
    queries: int = 5
    eval_queries: int = 5
    iterations: int = 300
    validate_every: int = 100
    eval_tasks: int = 300
    eval_steps: int = 5


@dataclass(frozen=True)
class Config(One):
    """Several models on the same tasks with the same budget: accuracy against cost."""

    models: tuple[str, ...] = ()
    """Models to choose from, named as --model takes them, each perhaps with flags and settings of its own, as in
    "tv:vit_b_16 lora=8 resize=224"; by default --model alone."""
    seconds_per_model: float | None = None
    """Budget of training for each model, in place of --iterations."""
    seeds: int = 1
    """Runs of each model, with seeds --seed, --seed + 1, ..."""


def main(config: Config) -> None:
    models = config.models or (config.model,)
    if doubled := sorted({model for model in models if models.count(model) > 1}):
        raise UserError(f"--models has {', '.join(doubled)} twice; give each once")
    if config.seeds < 1 or not 0 < (config.seconds_per_model or 1) < math.inf:
        raise UserError(
            f"{config.seeds} seeds, {config.seconds_per_model} seconds a model; give 1 seed or more, and positive seconds"
        )
    out = config.out or Path("results") / "choose-model" / config.run_name
    given = {field.name: getattr(config, field.name) for field in fields(One)}
    each = {model: own(One(**given), model) for model in models}  # a misspelt one is said before the others are trained
    asked = {
        (model, seed): replace(flags, seed=config.seed + seed, out=out / f"{folder(model)}-seed{seed}")
        for model, flags in each.items()
        for seed in range(config.seeds)
    }
    if len({flags.out for flags in asked.values()}) < len(asked):
        raise UserError("two of --models would share a folder, which is called by the end of each; call one otherwise")
    if not config.overwrite:
        asked = {key: replace(flags, resume=True) for key, flags in asked.items()}
    failed = _all(config, asked)
    finished = {
        model: [Run(asked[model, seed].out or out) for seed in range(config.seeds)]
        for model in models
        if not any((model, seed) in failed for seed in range(config.seeds))
    }
    if finished:
        _report(out, finished, config)
    if failed:
        (model, _), message = next(iter(failed.items()))
        raise UserError(f"{len(failed)} of {len(asked)} runs failed, {model}: {message}")


def own(flags: One, model: str) -> One:
    """The flags of one of --models: its name, and key=value for what it has of its own."""
    name, pairs = _parted(model)
    target = plugins.resolve(name, "models")
    kinds = target if callable(target) else None
    plugins.settings(pairs, "--models", kinds)
    known = set(OWN) | (plugins.takes(kinds) if kinds else set())
    for key in (pair.partition("=")[0] for pair in pairs):
        if key not in known and not (kinds and plugins.takes_any(kinds)):
            raise unknown(f"setting of {name}", key, sorted(known))
    changes: dict[str, Any] = {}
    for key, _, text in (pair.partition("=") for pair in pairs):
        if key in OWN:
            try:
                changes[key] = OWN[key](text)
            except ValueError:
                raise UserError(f"--models {model!r}: {key} is a number, not {text!r}; give one") from None
    rest = tuple(pair for pair in pairs if pair.partition("=")[0] not in OWN)
    return checked(replace(flags, model=name, model_args=(*flags.model_args, *rest), **changes))


def _parted(model: str) -> tuple[str, list[str]]:
    """The name in one of --models, and the key=value behind it."""
    try:
        words = shlex.split(model)
    except ValueError as error:
        raise UserError(f"--models {model!r} cannot be read ({error}); write NAME key=value ...") from None
    first = next((i for i, word in enumerate(words) if "=" in word), len(words))
    return " ".join(words[:first]), words[first:]


def folder(model: str) -> str:
    """What the folder of a model's runs is called."""
    name, pairs = _parted(model)
    words = [Path(name).name.replace(".py:", ":"), *("=".join(Path(part).name for part in pair.split("=")) for pair in pairs)]
    return "".join(c if c.isalnum() or c in "._=" else "-" for c in "-".join(words))


def _all(config: Config, asked: dict[tuple[str, int], One]) -> dict[tuple[str, int], str]:
    """Does the runs that are not finished yet, one after the other; returns what went wrong with which."""
    failed: dict[tuple[str, int], str] = {}
    wanted = {key: flags for key, flags in asked.items() if config.overwrite or not _finished(flags, config)}
    with tqdm(total=len(asked), initial=len(asked) - len(wanted), desc="runs") as bar:
        for key, flags in wanted.items():
            bar.set_postfix_str("{}, seed {}".format(*key))
            # A fresh process for each; forked, it would have the threads' locks of this one.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                try:
                    pool.submit(_train, flags, config.seconds_per_model).result()
                except UserError as error:
                    failed[key] = str(error)
                except BrokenProcessPool:
                    failed[key] = "its process died, of too little memory perhaps; give a smaller --budget or --chunk"
            if key in failed:
                bar.write(f"failed: {key[0]}: {failed[key]}")
            bar.update()
    return failed


def _finished(flags: One, config: Config) -> bool:
    """Whether there is a finished run for these flags. Raises UserError for one of other flags."""
    if flags.out is None or not (flags.out / "summary.json").exists():
        return False
    had = Run(flags.out).config
    settled = ["iterations", "validate_every"] if config.seconds_per_model else []
    # Left to the experiment, these were settled by the tasks and the method.
    settled += ["batch_norm"] * (flags.batch_norm is None) + ["model"] * (flags.model == One().model)
    asked = configuration(parts.named(flags)[0], "choose_model")
    check_same(had, asked | {key: had[key] for key in settled}, flags.out)
    return True


def _train(flags: One, seconds: float | None) -> None:
    """One model's run from begin to end, or from its newest checkpoint, in this process."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    flags, learner, tasks = parts.assemble(flags)
    if seconds is not None and flags.out is not None:
        begun = flags.out / "config.json"
        if begun.exists() and not flags.overwrite:
            had = json.loads(begun.read_text())
            flags = replace(flags, iterations=had["iterations"], validate_every=had["validate_every"])
        else:
            iterations = affordable(flags, learner, tasks, seconds)
            flags = replace(flags, iterations=iterations, validate_every=-(-iterations // 3))
    run(flags, "choose_model", learner, *tasks)


def affordable(flags: One, learner: Learner, tasks: parts.Tasks, seconds: float) -> int:
    """The number of iterations that go into so many seconds, by the time that the first ones take; the very first also makes
    recordings."""
    log.info("measuring how many iterations of %s go into %g s", flags.model, seconds)
    trainee, source = learner, tasks.training
    if learner.pretrain and tasks.pretraining:
        trainee, source = learner.pretrain, tasks.pretraining
    plan = parts.plan(flags, trainee, source)
    times = list[float]()
    for record in train(trainee, source, TRIAL, flags.tasks, flags.meta_lr, flags.seed, plan):
        times.append(record.seconds)
        if sum(times[1:]) > PATIENCE:
            break
    return max(1, 1 + round((seconds - times[0]) / statistics.median(times[1:])))


def rows(runs: dict[str, list[Run]]) -> list[dict[str, Any]]:
    """The models as plain data, best first: result, paired difference to the best, costs, whether on the Pareto front."""
    from toolkit.plots.pareto import front

    made = entries(runs)
    sign = direction(made[0].curve.metric_name) or -1

    def rank(entry: Entry) -> float:
        mean = entry.mean()[0]
        return sign * mean if math.isfinite(mean) else -math.inf

    made.sort(key=rank, reverse=True)
    found = []
    for entry in made:
        gap = None if entry is made[0] else difference(entry, made[0])
        summaries = [each.summary for each in entry.runs]
        mean, half = entry.mean()
        found.append({
            "model": entry.method,
            "metric": entry.curve.metric_name,
            "steps": entry.trained_steps,
            "value": _finite(mean),
            "ci95": _finite(half),
            "seeds": len(entry.runs),
            "difference": None if gap is None else [_finite(gap.mean), _finite(gap.ci95)],
            "parameters": round(entry.cost("model_parameters")),
            "adapted": round(entry.cost("adapted_parameters")),
            "task_seconds": statistics.fmean(float(summary["card"]["seconds_per_task"]) for summary in summaries),
            "peak_bytes": round(2**20 * entry.cost("peak_mb")),
            "task_bytes": entry.cost("task_bytes"),
            "model_bytes": entry.cost("model_bytes"),
            "meta_gradient_operations": summaries[0]["cost"]["meta_gradient_operations"],
            "evaluation_operations": summaries[0]["cost"]["evaluation_operations"],
            "iterations": statistics.fmean(int(each.config["iterations"]) for each in entry.runs),
            "seconds": entry.cost("seconds"),
        })  # fmt: skip
    marks = front(
        [None if row["value"] is None else sign * row["value"] for row in found], [[row[key] for key in COSTS] for row in found]
    )
    return [row | {"front": mark} for row, mark in zip(found, marks, strict=True)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def cells(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The rows as words; accuracy in percent."""
    scale, places = (100, 2) if found[0]["metric"] == "accuracy" else (1, 4)

    def pair(mean: float | None, half: float | None, sign: str = "") -> str:
        if mean is None:
            return "not finite"
        return f"{scale * mean:{sign}.{places}f} ± " + ("?" if half is None else f"{scale * half:.{places}f}")

    lines = []
    for row in found:
        gap = row["difference"]
        lines.append([
            f"`{row['model']}`", pair(row["value"], row["ci95"]), "-" if gap is None else pair(gap[0], gap[1], "+"),
            "yes" if row["front"] else "no", f"{row['parameters']:,}", f"{row['adapted']:,}", f"{row['task_seconds']:.3g}",
            f"{row['peak_bytes'] / 1e6:,.0f}", f"{row['task_bytes'] / 1e3:,.4g}", f"{row['iterations']:,.0f}",
            f"{row['seconds']:.0f}",
        ])  # fmt: skip
    return lines


def _report(out: Path, runs: dict[str, list[Run]], config: Config) -> None:
    from toolkit.plots.figures import adaptation
    from toolkit.plots.pareto import pareto
    from toolkit.plots.save import save

    found = rows(runs)
    first = next(iter(runs.values()))[0]
    write_json(out / "models.json", {"command": "choose_model", "sampler": config.sampler, "rows": found})
    text = [list(COLUMNS), ["---"] * len(COLUMNS), *cells(found)]
    markdown = "\n".join(f"| {' | '.join(line)} |" for line in text)
    replace_file(out / "models.md", f"{markdown}\n".encode())
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([list(found[0]), *(row.values() for row in found)])
    replace_file(out / "models.csv", table.getvalue().encode())
    budget = (
        f"{config.seconds_per_model:g} s of training each"
        if config.seconds_per_model
        else f"{config.iterations:,} iterations each"
    )
    title = (
        f"{first.summary['algorithm']} on {first.summary['sampler']}, {config.ways}-way {config.shots}-shot: {budget}, "
        f"{config.seeds} seed{'s' * (config.seeds > 1)}, {first.summary['test']['tasks']:,} test tasks"
    )
    written = save(pareto(found, COSTS, title), out / "models-figure")
    if 1 < len(runs) <= 7:
        save(adaptation([group[0] for group in runs.values()]), out / "adaptation")
    print(markdown)
    print(json.dumps({"table": str(out / "models.md"), "figure": str(written[0])}))


if __name__ == "__main__":
    launch(Config, main, {}, __doc__)
