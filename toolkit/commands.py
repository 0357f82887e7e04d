"""What each command of `toolkit` does: a function of its arguments that prints and returns an exit code."""

import argparse
import math
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from toolkit import parts, plugins
from toolkit.choose import in_units, survey
from toolkit.errors import UserError, in_words, unknown
from toolkit.flags import EpisodeFlags, checked
from toolkit.plugins import Plugin
from toolkit.runs.folder import Run
from toolkit.task import TaskSampler, draw, move, take


def opened(path: Path) -> Run:
    """The run in a folder, which has a name even where it was given as "."."""
    return Run(path if path.name not in ("", "..") else path.resolve())


def list_(arguments: argparse.Namespace) -> int:
    kind = arguments.kind
    kinds = plugins.KINDS if kind is None else (f"{kind}s",) if f"{kind}s" in plugins.KINDS else (kind,)
    found = {each: plugins.listing(each) for each in kinds}
    width = shutil.get_terminal_size((160, 24)).columns  # wide where nobody watches
    print(
        "\n\n".join(f"{each}\n{columns(rows, width)}" if kind is None else columns(rows, width) for each, rows in found.items())
    )
    return 0


def columns(rows: Sequence[Plugin], width: int) -> str:
    """Name, line and origin of plug-ins as columns of `width` characters; a line that is too long goes on below itself."""
    name, origin = (max((len(getattr(row, column)) for row in rows), default=0) for column in ("name", "origin"))
    middle = max(24, width - name - origin - 4)
    lines = []
    for row in rows:
        first, *rest = textwrap.wrap(row.line, middle) or [""]
        lines.append(f"{row.name:{name}}  {first:{middle}}  {row.origin}".rstrip())
        lines += [" " * (name + 2) + line for line in rest]
    return "\n".join(lines)


def check_sampler(arguments: argparse.Namespace) -> int:
    from toolkit.samplers.check import check_sampler as check

    if arguments.tasks < 1:
        raise UserError(f"--tasks is {arguments.tasks}; give at least 1")
    samplers = _samplers(arguments)
    faults = 0
    # On stderr and only where somebody watches, after two seconds.
    with tqdm(total=3 * arguments.tasks, desc="check", unit="task", delay=2, leave=False, disable=None) as bar:
        for split, sampler in samplers.items():
            others = {name: other for name, other in samplers.items() if name != split} if split == "train" else None
            report = check(sampler, arguments.tasks, arguments.seed, others, split, bar.update)
            bar.write(f"{report}\n")
            faults += len(report.faults)
    return 1 if faults else 0


def _samplers(arguments: argparse.Namespace) -> dict[str, TaskSampler]:
    """The samplers of the splits, as an experiment with these flags has them."""
    if arguments.name == "episodes" and arguments.dataset is None:
        raise UserError("episodes are drawn from a dataset; name one, as in --dataset omniglot-vinyals")
    flags = EpisodeFlags(
        sampler=arguments.name,
        dataset=arguments.dataset,
        ways=arguments.ways,
        shots=arguments.shots,
        queries=arguments.queries,
        eval_queries=arguments.queries,
        data_root=arguments.data_root,
        download=arguments.download,
        seed=arguments.seed,
        sampler_args=tuple(arguments.sampler_args),
        dataset_args=tuple(arguments.dataset_args),
    )
    return parts.splits(checked(flags))[1]


def new(arguments: argparse.Namespace) -> int:
    from toolkit.templates import write

    files = write(arguments.kind, arguments.path)
    for path in files:
        print(path)
    print(f"\nnext: python -m pytest {files[-1]}")
    return 0


def plan(arguments: argparse.Namespace) -> int:
    import tyro

    about = "Predicts what a meta-gradient costs by each plan, from a few pieces of the batch, and measures it."
    flags = checked(tyro.cli(EpisodeFlags, args=arguments.flags, prog="toolkit plan", description=about))
    if arguments.rate is not None and not 0 < arguments.rate < math.inf:
        raise UserError(f"--flops-per-second is {arguments.rate}; give a positive number, such as 1e12")
    if arguments.predict:
        return _predicted(arguments, flags)
    for flag, value in (("inputs", arguments.inputs), ("numbers", arguments.numbers), ("flops-per-second", arguments.rate)):
        if value is not None:
            raise UserError(f"--{flag} {value} is for a prediction from shapes; add --predict, or leave it out")
    flags, learner, tasks = parts.assemble(flags)
    batch = draw(tasks.training, flags.tasks, flags.seed)
    print(f"{learner.name}, {flags.tasks} tasks of {flags.sampler} a meta-gradient")
    print(f"{'plan':44} {'predicted s':>12} {'measured s':>12} {'predicted MB':>13} {'measured MB':>13}")
    found = []
    for row, cost in survey(learner, batch, flags.budget, flags.trace, flags.compile):
        if row.cost is None or cost is None:
            print(f"{row.plan!s:44} {row.reason}")
            continue
        found.append((cost.seconds, row.plan))
        cells = [cell for pair in zip(in_units(row.cost), in_units(cost), strict=True) for cell in pair]
        print(f"{row.plan!s:44} {cells[0]:>12.4g} {cells[1]:>12.4g} {cells[2]:>13.0f} {cells[3]:>13.0f}", flush=True)
    if not found:
        raise UserError(f"no plan fits; {row.reason}")
    print(f"fastest: {min(found, key=lambda pair: pair[0])[1]}")
    return 0


def _predicted(arguments: argparse.Namespace, flags: EpisodeFlags) -> int:
    from toolkit.predict import predictions, report, shaped

    flags = replace(flags, pretrained=None)  # weights have the shapes of those that they replace
    if arguments.inputs is not None:
        flags = replace(flags, dataset=None, **shaped(arguments.inputs, arguments.numbers))
    elif arguments.numbers is not None:
        raise UserError(f"--numbers {arguments.numbers} says what --inputs hold; give the shape of an example with it")
    flags, learner, tasks = parts.assemble(flags, device="meta")
    where = f"examples of shape ({arguments.inputs})" if arguments.inputs else flags.sampler
    print(f"{learner.name} of {flags.model}, {flags.tasks} tasks of {where} a meta-gradient, from shapes alone")
    source = tasks.pretraining if learner.pretrain and tasks.pretraining else tasks.training
    training, test = (take(draw(sampler, 1, flags.seed), 0) for sampler in (source, tasks.test))
    support = move(test, "meta").support
    for line in report(learner, predictions(learner, training, test, arguments.rate), flags.tasks, support):
        print(line, flush=True)
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    from toolkit.again import evaluated

    folder, _ = evaluated(opened(arguments.folder), arguments.flags)
    print(f"written as a run folder: {folder}")
    return 0


def rerun(arguments: argparse.Namespace) -> int:
    from toolkit.again import repeated

    folder, differing = repeated(opened(arguments.folder), arguments.flags)
    print(f"{folder} against {arguments.folder}: {'they differ' if differing else 'all numbers are equal, to the last bit'}")
    for line in differing:
        print(f"- {line}")
    return 1 if differing else 0


def show_task(arguments: argparse.Namespace) -> int:
    from toolkit.again import shown

    print(*shown(opened(arguments.folder), arguments.index, arguments.flags, arguments.path, arguments.gif), sep="\n")
    return 0


def watch(arguments: argparse.Namespace) -> int:
    from toolkit.runs.watch import follow

    follow(arguments.folder, arguments.once)
    return 0


def plot(arguments: argparse.Namespace) -> int:
    from toolkit.plots.kinds import KINDS
    from toolkit.plots.save import draw_run, save

    if arguments.kind not in KINDS:
        raise unknown("kind of figure", arguments.kind, KINDS)
    if arguments.kind != "adaptation" or arguments.out:
        runs = [opened(path) for path in arguments.runs]
        print(*save(KINDS[arguments.kind](runs), _stem(arguments.out or Path(arguments.kind))), sep="\n")
        return 0
    failed = 0
    for path in arguments.runs:
        try:
            print(*draw_run(path), sep="\n")
        except (UserError, OSError) as error:  # the others go on
            print(f"error: {in_words(error)}", file=sys.stderr)
            failed += 1
    return 2 if failed else 0


def _stem(path: Path) -> Path:
    """A figure's path without the suffix of one of its files."""
    return path.with_suffix("") if path.suffix in (".png", ".pdf", ".csv") else path


def compare(arguments: argparse.Namespace) -> int:
    from toolkit.runs.comparison import comparison, entries, grouped

    made = entries(grouped([opened(path) for path in arguments.runs]))
    if len(made) < 2:
        raise UserError(f"the runs given are one method, {made[0].method}; give runs of at least two")
    print(comparison(made, arguments.step))
    return 0


def table(arguments: argparse.Namespace) -> int:
    from toolkit.runs import tables

    if not (arguments.sources or arguments.into):
        raise UserError("no table is asked for; give table files or run folders, or --into FILE")
    for file in arguments.into:
        print(f"{file}: {'written anew' if tables.fill(file) else 'is as it was'}")
    files, runs, lost = [path for path in arguments.sources if path.suffix == ".json"], list[Run](), list[UserError]()
    for run in (opened(path) for path in arguments.sources if path not in files):
        try:
            _ = run.result, run.curve
            runs.append(run)
        except UserError as error:  # the others can still be shown
            lost.append(error)
    rows = [row for file in files for row in tables.read(file)] + tables.of_runs(runs)
    if lost and not rows:
        raise lost[0]
    for why in lost:
        print(f"left out: {why}", file=sys.stderr)
    if rows:
        asked = [name.strip() for name in arguments.columns.split(",")] if arguments.columns else tables.COLUMNS
        render = tables.markdown if arguments.format == "markdown" else tables.latex
        print(render(rows, tables.checked(asked)))
    elif files:
        raise UserError(f"{', '.join(map(str, files))} has no finished run yet; `make results` makes them")
    return 2 if lost else 0


def report(arguments: argparse.Namespace) -> int:
    from toolkit.report import write

    print(write([opened(path) for path in arguments.runs], arguments.out))
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    if arguments.model is None:
        from toolkit.health import checks

        wrong = 0
        for check in checks(arguments.data_root):
            mark = {True: "ok", False: "WRONG", None: "-"}[check.ok]
            print(f"{mark:5}  {check.name:16}  {check.line}", flush=True)
            wrong += check.ok is False
        return 1 if wrong else 0
    from toolkit import diagnosis

    for flag, value in (("outputs", arguments.outputs), ("numbers", arguments.numbers)):
        if value is not None and value < 1:
            raise UserError(f"--{flag} is {value}; give at least 1")
    inputs = _shape(arguments.inputs)
    given = {"inputs": inputs, "outputs": arguments.outputs, "ways": arguments.outputs, "seed": 0}
    given |= {"channels": inputs[0], "size": inputs[1]} if len(inputs) == 3 else {}
    findings = diagnosis.diagnose(parts.network(arguments.model, given), inputs, arguments.outputs, arguments.numbers)
    print(diagnosis.report(findings))
    return 1 if any(finding.level == "error" for finding in findings) else 0


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(word) for word in text.split(","))
        assert shape and min(shape) > 0
    except (ValueError, AssertionError):
        raise UserError(
            f"--inputs {text} is no shape; write positive whole numbers with commas between, as in 3,84,84"
        ) from None
    return shape
