"""How a run enters its folder: as a new one, going on with what is there, or in the place of it."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from toolkit.errors import UserError
from toolkit.files import alone_in
from toolkit.runs.folder import LATER, NOT_HASHED, Run, config_hash, write_json

log = logging.getLogger("toolkit")
WAIT = 30.0  # seconds for others who decide about their places beside this one, each in a moment


def refuse(path: Path, config: dict[str, Any], resume: bool, overwrite: bool) -> bool:
    """Whether the run that is to be resumed is finished already.

    What an earlier run in this place replaced is settled first. Raises UserError when both `resume` and `overwrite` were asked
    for, or neither for a folder that exists; when that is no run folder, when another process is at work in it, when it was
    made with another configuration, or is to be replaced and is the working directory.
    """
    with _deciding(path):
        return _refuse(path, config, resume, overwrite)


@contextmanager
def _deciding(path: Path) -> Iterator[None]:
    """As the only process that decides what becomes of this place. The lock is on the folder around it, since that of the place
    itself moves away with it."""
    with alone_in(path.resolve().parent, wait=WAIT):
        yield


def _refuse(path: Path, config: dict[str, Any], resume: bool, overwrite: bool) -> bool:
    if resume and overwrite:
        raise UserError("--resume goes on with the run that is there, --overwrite replaces it; give one of them")
    with alone_in(path):
        _settle(path)
    if not _holds_something(path):
        return False
    if not (path / "config.json").exists():
        raise UserError(f"{path} exists and is not a run folder; choose another place with --out")
    if not (resume or overwrite):
        raise UserError(
            f"the run folder {path} exists; continue it with --resume, replace it with --overwrite, or choose --out"
        )
    if resume:
        check_same(Run(path).config, config, path)
    elif path.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"--overwrite cannot replace {path.resolve()} from within it; change to another folder first")
    return resume and (path / "summary.json").exists()


def slurm_job() -> dict[str, Any]:
    """The Slurm job that this process is of, where it is of one: its number, and how often it was put in line again. A part of
    its run's configuration."""
    job = os.environ.get("SLURM_JOB_ID")
    return {"job": [job, int(os.environ.get("SLURM_RESTART_COUNT", "0"))]} if job else {}


def put_in_line_again(path: Path, config: dict[str, Any]) -> bool:
    """Whether this Slurm job has begun the run at `path` by the same flags before it was put in line again, and now has to go
    on with what it saved, whether it is told to or not. Where it had saved nothing, what it was to replace is there again."""
    number, restarts = config.get("job") or (None, 0)
    if not restarts or not path.is_dir():
        return False
    with _deciding(path), alone_in(path):
        _settle(path)
    old = Run(path).config if (path / "config.json").exists() else {}
    before, count = old.get("job") or (None, 0)
    return before == number and count < restarts and config_hash(old) == config_hash(config)


def prepare(path: Path, config: dict[str, Any], resume: bool, overwrite: bool) -> Run:
    """The run folder for `config`, made when it is not there. One that is replaced is kept aside until `settle`.

    Raises UserError as `refuse`.
    """
    path.resolve().parent.mkdir(parents=True, exist_ok=True)
    with _deciding(path):
        return _prepare(path, config, resume, overwrite)


def _prepare(path: Path, config: dict[str, Any], resume: bool, overwrite: bool) -> Run:
    _refuse(path, config, resume, overwrite)
    place = path.resolve()
    if _holds_something(path) and not resume:
        place.rename(_aside(path))
    try:
        place.mkdir(exist_ok=True)
        write_json(path / "config.json", config)
    except BaseException:
        _settle(path)
        raise
    return Run(path)


@contextmanager
def entered(path: Path, config: dict[str, Any], resume: bool, overwrite: bool) -> Iterator[Run]:
    """`prepare`, and the folder for this process alone while it fills it. Where that ends badly, the folder is settled."""
    path.resolve().parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with _deciding(path):
            run = _prepare(path, config, resume, overwrite)
            held.enter_context(alone_in(path))
        try:
            yield run
        finally:
            settle(path)


def _holds_something(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def settle(path: Path) -> None:
    """What a run folder replaced, if anything, is removed once the folder holds a checkpoint or a result of its own, and is
    there again where the new run came to nothing, be it killed before it saved anything."""
    if _aside(path).exists():
        with _deciding(path):
            _settle(path)


def _settle(path: Path) -> None:
    if not (aside := _aside(path)).exists():
        return
    if (path / "summary.json").exists() or any((path / "checkpoints").glob("step-*/manifest.json")):
        shutil.rmtree(aside)
        return
    shutil.rmtree(path.resolve(), ignore_errors=True)
    aside.rename(path.resolve())
    log.warning("%s is as it was: the run that was to replace it saved nothing", path)


def _aside(path: Path) -> Path:
    place = path.resolve()
    return place.with_name(f".{place.name}.replaced")


def check_same(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    """Raises UserError where the new configuration would make other numbers than that of the run at `path`, naming the flag."""
    new = json.loads(json.dumps(new))  # as the old one was read: tuples are lists there
    for key in sorted(set(old) | set(new)):
        before, now = old.get(key, LATER.get(key)), new.get(key, LATER.get(key))
        if key not in NOT_HASHED and before != now:
            flag = "--" + key.replace("_", "-")
            other = f", or test the finished run anew by `toolkit evaluate {path}`" if key.startswith("eval_") else ""
            raise UserError(
                f"{path} was made with {flag} {before}, not {now}; resume with the same flags, or choose another --out{other}"
            )
