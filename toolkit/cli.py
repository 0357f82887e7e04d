"""The `toolkit` command: what there is to plug in, templates for more, a check of samplers, and tools on finished runs."""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from toolkit import __version__
from toolkit.arguments import undotted
from toolkit.errors import UserError, in_words, plain_output

# What a command does stands in `commands.py` and is imported when it is called, so that --help comes at once.


class Help(argparse.HelpFormatter):
    """Help with defaults, where there are any to know."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # False by identity: 0 equals it, and is a default worth knowing.
        known = action.default is not False and action.default not in (None, argparse.SUPPRESS, []) and action.option_strings
        return f"{action.help} (default: %(default)s)" if known else action.help


def main() -> None:
    """Runs the command line. The exit code is 0; 1 where something was found wanting (a sampler with faults, a repetition that
    differs, a model that the doctor objects to); or 2 after one sentence on what to mend."""
    words = sys.argv[1:]
    plain_output()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("toolkit").setLevel(logging.INFO)
    parser = _parser()
    try:
        words = undotted(words)
        arguments, rest = parser.parse_known_args(words)
        if rest and not arguments.takes_flags:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.flags = rest
        name = arguments.command.replace("-", "_")
        code = getattr(import_module("toolkit.commands"), "list_" if name == "list" else name)(arguments)
    except BrokenPipeError:  # whoever reads our output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.exit(0)
    except (UserError, OSError) as error:
        if "--debug" in words:
            raise
        parser.exit(2, f"error: {in_words(error)}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted\n")
    parser.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="toolkit", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, line: str, takes_flags: bool = False, epilog: str = "") -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, parents=[debug], help=line, description=f"{line[0].upper()}{line[1:]}.", allow_abbrev=False, epilog=epilog,
            formatter_class=Help,
        )  # fmt: skip
        made.set_defaults(takes_flags=takes_flags)
        return made

    for add in (_plug_ins, _planning, _finished, _results, _doctor):
        add(command)
    return parser


Add = Callable[..., argparse.ArgumentParser]
SPLIT_FLAGS = "Settings of the sampler or dataset follow as --sampler.KEY VALUE and --dataset.KEY VALUE."


def _plug_ins(command: Add) -> None:
    listing = command("list", "list what can be named on a command line")
    listing.add_argument(
        "kind", nargs="?", metavar="KIND", help="samplers, datasets, models, algorithms or loggers; all where left out"
    )

    check = command(
        "check-sampler", "look for faults in a task sampler", epilog=f"{SPLIT_FLAGS} Exit code 1: there are faults."
    )
    check.add_argument("name", metavar="NAME", help="a name of `toolkit list`, module:attr or file.py:attr; or a dataset")
    check.add_argument("--dataset", help="dataset for a sampler that draws from one")
    check.add_argument("--ways", type=int, default=5, help="classes of a task")
    check.add_argument("--shots", type=int, default=1, help="support items, of each class")
    check.add_argument("--queries", type=int, default=15, help="query items, of each class, in all splits")
    check.add_argument("--data-root", type=Path, default=Path("data"), help="folder of the data sets")
    check.add_argument("--download", action="store_true", help="download the data set if it is not there")
    check.add_argument("--tasks", type=int, default=200, help="tasks to look at, of each split")
    check.add_argument("--seed", type=int, default=0, help="seed of the tasks")
    check.add_argument("--sampler-args", nargs="*", default=[], help=argparse.SUPPRESS)
    check.add_argument("--dataset-args", nargs="*", default=[], help=argparse.SUPPRESS)

    new = command("new", "write a template that runs as it is, with a test beside it")
    new.add_argument("kind", metavar="KIND", help="sampler, model or algorithm")
    new.add_argument("path", type=Path, metavar="PATH", help="Python file to write, such as my_sampler.py")


def _planning(command: Add) -> None:
    plan = command(
        "plan", "predict and measure the time and memory of plans", takes_flags=True,
        epilog="It takes the flags of an experiment, such as --sampler omniglot-vinyals --tasks 32 --inner-steps 5.",
    )  # fmt: skip
    plan.add_argument(
        "--predict", action="store_true",
        help="from shapes alone, also for a model too large for this machine: operations, seconds, memory, bytes to store",
    )  # fmt: skip
    plan.add_argument("--inputs", help="with --predict: shape of an example, as in 3,224,224, in place of a --sampler")
    plan.add_argument("--numbers", type=int, help="with --inputs: examples are token or feature numbers below this, as of text")
    plan.add_argument(
        "--flops-per-second", type=float, dest="rate", metavar="RATE",
        help="with --predict: the rate of another machine, as in 4e14, in place of seconds measured here",
    )  # fmt: skip


def _run(made: argparse.ArgumentParser, several: bool = False) -> None:
    made.add_argument(
        "runs" if several else "folder", nargs="+" if several else None, type=Path, metavar="RUN", help="folder of a run"
    )


def _finished(command: Add) -> None:
    evaluate = command(
        "evaluate", "test a saved run on other tasks", takes_flags=True,
        epilog="It takes flags of the experiment that evaluation can use: --sampler, --dataset, --ways, --shots, --eval-tasks, "
        "--eval-steps, --eval-seed, --protocol, --permutations, --batch-norm, --inner-lr, --data-root, --out, ... What is left "
        "out is as in the run.",
    )  # fmt: skip
    _run(evaluate)
    rerun = command(
        "rerun", "repeat a run exactly and say whether the numbers are equal", takes_flags=True,
        epilog="It takes --out (by default RUN-again), --data-root and names of code. Exit code 1: some number differs.",
    )  # fmt: skip
    _run(rerun)
    show = command("show-task", "draw a test task of a saved run with its predictions", takes_flags=True)
    _run(show)
    show.add_argument("--index", type=int, default=0, help="number of the task; the worst are in summary.json")
    show.add_argument("--path", action="store_true", help="also draw how the weights walk over the losses around them")
    show.add_argument("--gif", action="store_true", help="also draw the predictions step by step, as an animation")
    watch = command("watch", "show a run in the terminal while it goes on")
    _run(watch)
    watch.add_argument("--once", action="store_true", help="show it once and leave")


def _results(command: Add) -> None:
    plot = command("plot", "draw the figures of each run folder anew, or one figure of several runs")
    _run(plot, several=True)
    plot.add_argument("--out", type=Path, help="draw one figure of all runs instead, as OUT.png, OUT.pdf and OUT.csv")
    plot.add_argument(
        "--kind", default="adaptation", metavar="KIND",
        help="what that figure is: adaptation, training, pairs (of two), reliability, shots or ways (accuracy against them)",
    )  # fmt: skip
    compare = command("compare", "compare runs on the same tasks: differences with intervals, sign test, over training seeds")
    _run(compare, several=True)
    compare.add_argument("--step", type=int, help="compare after so many inner steps; by default each after those of training")
    table = command(
        "table", "render results as a table in Markdown or LaTeX",
        epilog="SOURCE is a table file (results/tables/*.json), or a run folder. With --into, the tables that a Markdown file "
        "asks for are written into it.",
    )  # fmt: skip
    table.add_argument("sources", nargs="*", type=Path, metavar="SOURCE", help="table files or run folders")
    table.add_argument("--format", choices=("markdown", "latex"), default="markdown", help="of what is printed")
    table.add_argument("--columns", help="columns to show, with commas between; by default all")
    table.add_argument("--into", nargs="+", type=Path, default=[], metavar="FILE", help="files to fill the tables into")
    report = command("report", "write one self-contained HTML page on runs")
    _run(report, several=True)
    report.add_argument("--out", type=Path, default=Path("report.html"), help="file to write")


def _doctor(command: Add) -> None:
    doctor = command(
        "doctor", "check this installation; with --model, the gradients of a model. Exit code 1: something is wrong"
    )
    doctor.add_argument("--model", help="a name of `toolkit list models`, module:attr or file.py:attr")
    doctor.add_argument("--inputs", default="1,28,28", help="with --model: shape of an example, with commas between")
    doctor.add_argument("--outputs", type=int, default=5, help="with --model: classes of a task")
    doctor.add_argument("--numbers", type=int, help="with --model: examples are feature numbers below this, as of text")
    doctor.add_argument("--data-root", type=Path, default=Path("data"), help="folder of the data sets")
