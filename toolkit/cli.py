"""The `toolkit` command: tools on finished runs."""

import argparse
import sys
from pathlib import Path

from toolkit.errors import UserError


def main() -> None:
    """`toolkit plot RUN [RUN ...]`: draws the figures of run folders anew, and one that overlays several runs."""
    parser = argparse.ArgumentParser(prog="toolkit", description="Tools on run folders.")
    commands = parser.add_subparsers(dest="command", required=True)
    plot = commands.add_parser("plot", help="draw the figures of run folders anew")
    plot.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, the one that holds summary.json")
    plot.add_argument("--out", type=Path, help="also overlay the adaptation curves of all runs in OUT.png and OUT.pdf")
    arguments = parser.parse_args()
    try:
        for path in draw(arguments.runs, arguments.out):
            print(path)
    except UserError as error:
        sys.exit(f"error: {error}")


def draw(runs: list[Path], out: Path | None) -> list[Path]:
    """Draws every run, then their overlay when a place for it is given; returns the files written."""
    from toolkit.plots.figures import adaptation
    from toolkit.plots.save import draw_run, save
    from toolkit.runs.folder import Run

    written = [path for run in runs for path in draw_run(run)]
    return [*written, *save(adaptation([Run(run) for run in runs]), out)] if out else written
