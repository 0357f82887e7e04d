"""The `toolkit` command: what there is to plug in, templates for more, a check of samplers, and tools on finished runs."""

import argparse
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.arguments import undotted
from toolkit.errors import UserError

if TYPE_CHECKING:
    from toolkit.plugins import Plugin
    from toolkit.task import TaskSampler

# What needs torch is imported inside the functions, so that --help comes at once.


def main() -> None:
    """Runs the command line. The exit code is 0, or 1 where a sampler has faults, or 2 after one sentence on what to mend."""
    words = sys.argv[1:]
    parser = _parser()
    try:
        words = undotted(words)
        arguments, rest = parser.parse_known_args(words)
        if rest and arguments.command != "plan":
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.flags = rest
        code = arguments.run(arguments)
    except UserError as error:
        if "--debug" in words:
            raise
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted\n")
    parser.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="toolkit", description=__doc__)
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    listing = commands.add_parser("list", parents=[debug], help="list what can be named on a command line")
    listing.add_argument(
        "kind", nargs="?", metavar="KIND", help="samplers, datasets, models, algorithms or loggers; all of them"
    )
    listing.set_defaults(run=_list)

    check = commands.add_parser(
        "check-sampler",
        parents=[debug],
        allow_abbrev=False,
        help="look for faults in a task sampler",
        epilog="Settings of the sampler or dataset follow as --sampler.KEY VALUE and --dataset.KEY VALUE. "
        "The exit code is 1 where there are faults.",
    )
    check.add_argument("name", metavar="NAME", help="a name of `toolkit list`, module:attr or file.py:attr; or a dataset")
    check.add_argument("--dataset", help="dataset for a sampler that draws from one")
    check.add_argument("--ways", type=int, default=5, help="classes of a task (%(default)s)")
    check.add_argument("--shots", type=int, default=1, help="support items, of each class (%(default)s)")
    check.add_argument("--queries", type=int, default=15, help="query items, of each class, in all splits (%(default)s)")
    check.add_argument("--data-root", type=Path, default=Path("data"), help="folder of the data sets (%(default)s)")
    check.add_argument("--download", action="store_true", help="download the data set if it is not there")
    check.add_argument("--tasks", type=int, default=200, help="tasks to look at, of each split (%(default)s)")
    check.add_argument("--seed", type=int, default=0, help="seed of the tasks (%(default)s)")
    check.add_argument("--sampler-args", nargs="*", default=[], help=argparse.SUPPRESS)
    check.add_argument("--dataset-args", nargs="*", default=[], help=argparse.SUPPRESS)
    check.set_defaults(run=_check)

    new = commands.add_parser("new", parents=[debug], help="write a template that runs as it is, with a test beside it")
    new.add_argument("kind", metavar="KIND", help="sampler, model or algorithm")
    new.add_argument("path", type=Path, metavar="PATH", help="Python file to write, such as my_sampler.py")
    new.set_defaults(run=_new)

    plan = commands.add_parser(
        "plan",
        parents=[debug],
        add_help=False,
        help="predict and measure the time and memory of plans; takes the flags of an experiment",
    )
    plan.set_defaults(run=_plan)

    plot = commands.add_parser("plot", parents=[debug], help="draw the figures of run folders anew")
    plot.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, the one that holds summary.json")
    plot.add_argument("--out", type=Path, help="also overlay the adaptation curves of all runs in OUT.png and OUT.pdf")
    plot.set_defaults(run=_plot)
    return parser


def _list(arguments: argparse.Namespace) -> int:
    from toolkit import plugins

    kind = arguments.kind
    kinds = plugins.KINDS if kind is None else (f"{kind}s",) if f"{kind}s" in plugins.KINDS else (kind,)
    found = {each: plugins.listing(each) for each in kinds}
    width = shutil.get_terminal_size((160, 24)).columns  # wide where nobody watches
    print("\n\n".join(f"{each}\n{table(rows, width)}" if kind is None else table(rows, width) for each, rows in found.items()))
    return 0


def table(rows: "list[Plugin]", width: int) -> str:
    """Name, line and origin of plug-ins as columns of `width` characters; a line that is too long goes on below itself."""
    name, origin = (max((len(getattr(row, column)) for row in rows), default=0) for column in ("name", "origin"))
    middle = max(24, width - name - origin - 4)
    lines = []
    for row in rows:
        first, *rest = textwrap.wrap(row.line, middle) or [""]
        lines.append(f"{row.name:{name}}  {first:{middle}}  {row.origin}".rstrip())
        lines += [" " * (name + 2) + line for line in rest]
    return "\n".join(lines)


def _check(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from toolkit.samplers.check import check_sampler

    if arguments.tasks < 1:
        raise UserError(f"--tasks is {arguments.tasks}; give at least 1")
    samplers = _samplers(arguments)
    faults = 0
    # On stderr and only where somebody watches, after two seconds.
    with tqdm(total=3 * arguments.tasks, desc="check", unit="task", delay=2, leave=False, disable=None) as bar:
        for split, sampler in samplers.items():
            others = {name: other for name, other in samplers.items() if name != split} if split == "train" else None
            report = check_sampler(sampler, arguments.tasks, arguments.seed, others, split, bar.update)
            bar.write(f"{report}\n")
            faults += len(report.faults)
    return 1 if faults else 0


def _samplers(arguments: argparse.Namespace) -> "dict[str, TaskSampler]":
    """The samplers of the splits, as an experiment with these flags has them."""
    from toolkit import parts
    from toolkit.flags import EpisodeFlags, checked

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


def _new(arguments: argparse.Namespace) -> int:
    from toolkit.templates import write

    files = write(arguments.kind, arguments.path)
    for path in files:
        print(path)
    print(f"\nnext: python -m pytest {files[-1]}")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    import tyro

    from toolkit import parts
    from toolkit.choose import in_units, survey
    from toolkit.flags import EpisodeFlags, checked
    from toolkit.task import draw

    about = "Predicts what a meta-gradient costs by each plan, from a few pieces of the batch, and measures it."
    flags = tyro.cli(EpisodeFlags, args=arguments.flags, prog="toolkit plan", description=about)
    flags, learner, tasks = parts.assemble(checked(flags))
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


def _plot(arguments: argparse.Namespace) -> int:
    for path in draw(arguments.runs, arguments.out):
        print(path)
    return 0


def draw(runs: list[Path], out: Path | None) -> list[Path]:
    """Draws every run, then their overlay when a place for it is given; returns the files written."""
    from toolkit.plots.figures import adaptation
    from toolkit.plots.save import draw_run, save
    from toolkit.runs.folder import Run

    written = [path for run in runs for path in draw_run(run)]
    return [*written, *save(adaptation([Run(run) for run in runs]), out)] if out else written
