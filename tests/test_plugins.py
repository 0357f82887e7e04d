"""Plug-ins from a second package that is really installed: found in three ways, called with what they ask for, and safe."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module, invalidate_caches
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from experiments import quickstart, sinusoid
from toolkit import Learner, Task, UserError, cli, draw
from toolkit.algorithms import build
from toolkit.data.bank import ClassBank
from toolkit.flags import launch
from toolkit.models import mlp
from toolkit.parts import assemble, splits
from toolkit.plots import save
from toolkit.plugins import KINDS, call, listing, names, resolve, settings, takes
from toolkit.runs.checkpoint import load_newest
from toolkit.runs.folder import Run, config_hash
from toolkit.runs.loggers import loggers

HERE = Path(__file__).parent
OBJECTS = {"samplers": "Thresholds", "datasets": "stripes", "models": "network", "algorithms": "boosted", "loggers": "Lines"}
WAYS = ("short name", "module", "file")
SHORT = [
    "--iterations=4", "--validate-every=2", "--val-tasks=3", "--eval-tasks=4", "--eval-steps=2", "--tasks=2", "--queries=4",
    "--eval-queries=5",
]  # fmt: skip


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The second package, installed by pip into a folder on the path for the tests of this file."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(HERE / "plugin_package", folder / "source")  # pip leaves a build folder there
    site = folder / "site"
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *offline, "--target", str(site), str(folder / "source")]
    subprocess.run(command, check=True, capture_output=True)
    sys.path.insert(0, str(site))
    invalidate_caches()
    yield import_module("theirs")
    sys.path.remove(str(site))
    del sys.modules["theirs"]
    invalidate_caches()


def run(module: Any, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """An experiment as from the command line, without its figures, which other tests draw."""
    monkeypatch.setattr(save, "draw_run", lambda folder: [])
    monkeypatch.setattr(sys, "argv", ["experiment.py", *SHORT, *flags])
    launch(module.Config, module.main, {}, module.__doc__)


def refused(capsys: pytest.CaptureFixture[str], module: Any, monkeypatch: pytest.MonkeyPatch, *flags: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(module, monkeypatch, *flags)
    sentence = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and sentence.startswith("error: ") and "\n" not in sentence, sentence
    return sentence


def name_of(kind: str, way: str, package: ModuleType) -> str:
    short = "stripes" if kind == "datasets" else "theirs"
    return {"short name": short, "module": f"theirs:{OBJECTS[kind]}", "file": f"{package.__file__}:{OBJECTS[kind]}"}[way]


def lines_of(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_works(kind: str, target: Any, folder: Path) -> None:
    """Puts a resolved plug-in to its use."""
    if kind == "samplers":
        sampler = call(target, {"shots": 2, "queries": 3, "ways": 7, "split": "train"}, {"gap": 4.0}, "it")
        assert sampler.gap == 4.0 and draw(sampler, 2, 0).query.y.shape == (2, 15)
    elif kind == "datasets":
        bank = call(target, {"split": "val", "data_root": folder}, {"classes": 6}, "it")
        assert isinstance(bank, ClassBank) and bank.classes == 6 and bank.source == "stripes val"
    elif kind == "models":
        assert call(target, {"inputs": (5,), "outputs": 3, "seed": 1}, {}, "it")(torch.zeros(2, 5)).shape == (2, 3)
    elif kind == "algorithms":
        assert isinstance(target(mlp(), boost=2.0), Learner)
    else:
        call(target, {"folder": folder, "config": {"seed": 7}, "start": 3}, {}, "it")({"iteration": 4})
        assert lines_of(folder / "theirs.jsonl") == [{"start": 3}, {"seed": 7, "iteration": 4}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_plug_in_of_each_kind_is_found_in_each_way(kind: str, way: str, package: ModuleType, tmp_path: Path) -> None:
    name = name_of(kind, way, package)
    target = resolve(name, kind)
    assert target.__name__ == OBJECTS[kind]
    assert (target is getattr(package, OBJECTS[kind])) == (way != "file"), "a file is a module of its own"
    assert resolve(name, kind) is target
    check_works(kind, target, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_list_shows_name_line_and_origin(kind: str, package: ModuleType) -> None:
    [found] = [plugin for plugin in listing(kind) if plugin.name == name_of(kind, WAYS[0], package)]
    assert found.kind == kind and found.origin == "their-plugins 2.5"
    assert found.line == getattr(package, OBJECTS[kind]).__doc__.splitlines()[0]
    ours = [plugin for plugin in listing(kind) if plugin.origin.startswith("metalearning-toolkit")]
    assert ours and sorted(names(kind)) == [plugin.name for plugin in listing(kind)]
    assert not [plugin for plugin in ours if "cannot be imported" in plugin.line or plugin.line == "no description"]


def test_a_broken_plug_in_is_listed_and_the_others_are_too(package: ModuleType) -> None:
    lines = {plugin.name: plugin.line for plugin in listing("samplers")}
    assert lines["broken"] == "(cannot be imported: ModuleNotFoundError: No module named 'theirs_gone')"
    assert lines["theirs"].startswith("Which of five") and "sinusoid" in lines
    with pytest.raises(UserError, match=r"broken \(theirs_gone:Sampler\) cannot be imported: ModuleNotFoundError"):
        resolve("broken", "samplers")


def test_a_short_name_without_a_kind_must_mean_one_thing(package: ModuleType) -> None:
    with pytest.raises(UserError, match=r"'twice' means more than one.*theirs:Thresholds or theirs:network"):
        resolve("twice")
    assert resolve("twice", "models") is package.network
    assert resolve("omniglot-vinyals").__name__ == "vinyals"


def test_a_name_that_two_packages_register_must_be_told_apart(
    package: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[toolkit.samplers]\ntheirs = others:Sampler\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"'theirs' means more than one.*others:Sampler or theirs:Thresholds"):
        resolve("theirs", "samplers")
    assert [plugin.origin for plugin in listing("samplers") if plugin.name == "theirs"] == ["others 1.0", "their-plugins 2.5"]


def test_all_five_kinds_of_an_installed_package_run_together(package: ModuleType, tmp_path: Path) -> None:
    assert package.__file__ is not None
    script = HERE.parent / "experiments" / "quickstart.py"
    flags = ["--sampler", "theirs", "--sampler.gap", "3", "--model=theirs", "--model.width=8", "--algorithm", "theirs"]
    flags += ["--algorithm.boost", "2", "--logger", "theirs", "--seed", "5", *SHORT]
    environment = os.environ | {"PYTHONPATH": str(Path(package.__file__).parent)}
    command = [sys.executable, str(script), *flags]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = Run(tmp_path / "results" / "quickstart" / "theirs-theirs-5w1s-seed5")
    assert folder.config["sampler_args"] == ["gap=3"] and folder.config["method"] == ["boost=2"]
    assert folder.summary["algorithm"] == "boosted" and folder.summary["sampler"] == "theirs"
    weights, _ = load_newest(folder.path / "checkpoints") or pytest.fail("no checkpoint")
    assert weights.params["head.weight"].shape == (5, 8)
    started, *rows = lines_of(folder.path / "theirs.jsonl")
    assert started == {"start": 0} and rows == [{"seed": 5, **row} for row in folder.metrics]


FROM_BANK = '''
from dataclasses import dataclass

from toolkit.data.bank import ClassBank
from toolkit.samplers import Episodes


@dataclass(frozen=True)
class Thing:
    """Episodes that tell what they were made of."""

    bank: ClassBank
    split: str
    shots: int
    queries: int
    gap: int = 1

    def __call__(self, generator):
        assert (self.bank.source, self.bank.classes) == (f"stripes {self.split}", 6)
        assert self.bank.items.shape[1:] == (1, 9, 9)
        return Episodes(self.bank, self.gap + 1, self.shots, self.queries)(generator)
'''


def test_a_sampler_from_a_file_gets_the_banks_of_their_dataset_and_all_get_their_settings(
    package: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thing.py").write_text(FROM_BANK)
    flags = ["--sampler", "mine/thing.py:Thing", "--sampler.gap", "3", "--dataset", "stripes", "--dataset.classes", "6"]
    flags += ["--dataset.size=9", "--model", "theirs", "--model.width", "8", "--algorithm", "theirs", "--algorithm.boost=1.5"]
    run(quickstart, monkeypatch, *flags)
    folder = tmp_path / "results" / "quickstart" / "theirs-thing-Thing-stripes-5w1s-seed0"
    assert Run(folder).summary["test"]["tasks"] == 4
    assert Run(folder).config["dataset_args"] == ["classes=6", "size=9"]
    assert Run(folder).config["method"] == ["boost=1.5"] and Run(folder).config["model_args"] == ["width=8"]
    weights, _ = load_newest(folder / "checkpoints") or pytest.fail("no checkpoint")
    assert weights.params["head.weight"].shape == (4, 8) and weights.params["body.1.weight"].shape == (8, 81)
    before = (folder / "curve.json").read_bytes()
    capsys.readouterr()
    assert "continue it with --resume" in refused(capsys, quickstart, monkeypatch, *flags)
    flags[3] = "4"
    changed = refused(capsys, quickstart, monkeypatch, *flags, "--resume")
    assert "was made with --sampler-args ['gap=3'], not ['gap=4']; resume with the same flags" in changed
    flags[3] = "3"
    run(quickstart, monkeypatch, *flags, "--resume")
    assert (folder / "curve.json").read_bytes() == before


MINE = '''
"""Plug-ins of a user."""

import torch
from torch import nn

from toolkit import Batch, Task

calls = []


def plain(generator):
    """A sampler that is only a function."""
    x = torch.randn(10, 2, generator=generator)
    return Task(Batch(x, x.sum(1, keepdim=True)), Batch(x + 1, x.sum(1, keepdim=True) + 2))


def needs(split, colour, gap=1):
    """Needs what nobody gives."""


def flawed(shots):
    return shots


def to_class(shots):
    return type("Inner", (), {"__call__": plain})


def no_bank(split):
    return [split]


def no_module(inputs, outputs):
    return "a model"


def lazy(inputs, outputs):
    import torch

    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(outputs))


def no_learner(model, **shared):
    return model


def no_logger(folder):
    return folder


def raising(row_number=3):
    def logger(row):
        if row["iteration"] >= row_number:
            raise ValueError("the disk of the logger is full")
        calls.append(row)

    return logger


def interrupting(start):
    def logger(row):
        if start == 0 and row["iteration"] == 3:
            raise KeyboardInterrupt

    return logger


number = 3
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with mine.py in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


UNRESOLVED: dict[str, tuple[str, str | None, str]] = {
    "unknown": ("sinusiod", "samplers", r"unknown sampler 'sinusiod'; did you mean 'sinusoid'\? \(known: .*linear"),
    "unknown without a kind": ("conv44", None, r"unknown plug-in 'conv44'; did you mean 'conv4'\?"),
    "unknown kind": ("conv4", "model", "unknown kind of plug-in 'model'; did you mean 'models'"),
    "no module": ("no_such_thing:Sampler", "samplers", "no module 'no_such_thing' for 'no_such_thing:Sampler', neither inst"),
    "no submodule": ("toolkit.nothing:Sampler", None, "no module 'toolkit.nothing'"),
    "no file": ("gone.py:Sampler", "samplers", "there is no file gone.py; give the path of a Python file"),
    "file alone": ("mine.py", "samplers", r"mine.py names a file; say what to take from it, as in mine.py:NAME"),
    "no module before the colon": (":Sampler", "samplers", "':Sampler' names only half of a plug-in; write module:NAME"),
    "nothing after the colon": ("mine.py:", "samplers", "'mine.py:' names only half of a plug-in"),
    "no attribute": ("mine.py:plian", "samplers", r"'mine.py:plian': there is no 'plian'; did you mean 'plain'\?; it has flaw"),
    "no attribute of a module": ("toolkit.models.mlp:mpl", None, r"there is no 'mpl'; did you mean 'mlp'\?; it has mlp$"),
    "no attribute in it": ("toolkit.samplers:Sinusoid.nothing", None, "there is no 'nothing'; it has none"),
    "broken file": ("broken.py:x", None, "broken.py cannot be imported: ZeroDivisionError: division by zero"),
    "syntax": ("syntax.py:x", None, "syntax.py cannot be imported: SyntaxError: "),
    "needs more": ("needs_more:x", None, "needs_more cannot be imported: ModuleNotFoundError: No module named 'not_there'"),
    "broken module": ("broken_module:x", None, "broken_module cannot be imported: ZeroDivisionError"),
}


@pytest.mark.parametrize("case", UNRESOLVED)
def test_a_name_that_is_not_there_is_one_sentence(case: str, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in ("broken.py", "broken_module.py"):
        (mine / file).write_text("1 / 0\n")
    (mine / "syntax.py").write_text("def\n")
    (mine / "needs_more.py").write_text("import not_there\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    name, kind, sentence = UNRESOLVED[case]
    for _ in range(2):  # what failed once is not taken for imported
        with pytest.raises(UserError, match=sentence) as error:
            resolve(name, kind)
        assert "\n" not in str(error.value)


def test_a_module_in_the_working_folder_is_found_but_hides_nothing(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (mine / "only_here.py").write_text("def plain(generator): ...\n")
    (mine / "tyro.py").write_text("1 / 0\n")
    monkeypatch.delitem(sys.modules, "tyro", raising=False)
    assert resolve("only_here:plain").__module__ == "only_here"
    assert resolve("tyro:cli").__module__.startswith("tyro")
    del sys.modules["only_here"]


def test_a_file_is_imported_once_and_files_of_one_name_are_told_apart(mine: Path) -> None:
    (mine / "sub").mkdir()
    (mine / "sub" / "mine.py").write_text("def plain(generator): ...\n")
    assert resolve("mine.py:plain") is resolve(f"{mine}/sub/../mine.py:plain")
    assert resolve("sub/mine.py:plain") is not resolve("mine.py:plain")


REFUSED: dict[str, tuple[Any, str, str]] = {
    "no value": (quickstart, "--sampler mine.py:needs --sampler.gap", "--sampler.gap has no value; write --sampler.gap VALUE"),
    "no value before a flag": (quickstart, "--sampler.gap --seed 3", "--sampler.gap has no value"),
    "no equals": (quickstart, "--sampler mine.py:needs --sampler-args gap", "--sampler gap: settings are written key=value"),
    "unknown setting": (
        quickstart,
        "--sampler mine.py:needs --sampler.gpa 3",
        "the sampler mine.py:needs has no setting 'gpa'; did you mean 'gap'?; its settings are colour, gap",
    ),
    "settings of others": (quickstart, "--sampler mine.py:needs --sampler.split 3", "needs has no setting 'split'"),
    "missing": (quickstart, "--sampler mine.py:needs", "needs colour, which is not given here; give it as a setting, or a def"),
    "kind of value": (quickstart, "--sampler mine.py:needs --sampler.gap=wide", "--sampler gap=wide: gap is a whole number"),
    "settings of a function": (
        quickstart,
        "--sampler mine.py:plain --sampler.gap 3",
        "the sampler mine.py:plain has no setting 'gap'; a function of a generator has its other arguments for some",
    ),
    "sampler made a number": (quickstart, "--sampler mine.py:flawed", "the sampler mine.py:flawed made a int; return a task"),
    "sampler made a class": (quickstart, "--sampler mine.py:to_class", "the sampler mine.py:to_class made a type"),
    "no function": (quickstart, "--sampler mine.py:number", "3 cannot be called by name; a plug-in is a function or a class"),
    "dataset": (
        quickstart,
        "--dataset mine.py:no_bank",
        "the dataset mine.py:no_bank made a list; a dataset is a function that returns a ClassBank",
    ),
    "model": (quickstart, "--model mine.py:no_module", "the model mine.py:no_module made a str; a model is an nn.Module"),
    "lazy model": (quickstart, "--model mine.py:lazy", "the model mine.py:lazy has no shape for 1.weight yet; call it once on"),
    "algorithm": (quickstart, "--algorithm mine.py:no_learner", "mine.py:no_learner made a Sequential; an algorithm is a"),
    "algorithm's setting": (
        quickstart,
        "--algorithm mine.py:no_learner --algorithm.key 3",
        "--method key=3: mine.py:no_learner takes none",
    ),
    "logger": (quickstart, "--logger mine.py:no_logger", "mine.py:no_logger made a "),
    "unknown logger": (quickstart, "--logger cvs", "unknown logger 'cvs'; did you mean 'csv'?"),
    "dataset for a sampler without": (
        sinusoid,
        "--sampler mine.py:plain --dataset glyphs",
        "--sampler mine.py:plain draws from no dataset, so --dataset would do nothing; leave it out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_plug_in_cannot_be_is_one_sentence_and_leaves_nothing(
    case: str, mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, flags, sentence = REFUSED[case]
    found = refused(capsys, module, monkeypatch, *flags.split())
    assert sentence in found, found
    assert case == "logger" or not (mine / "results").exists()


def test_settings_are_values_where_they_look_like_some_and_texts_otherwise() -> None:
    def target(gap: int = 1, wide: float = 0.5, name: str = "x", on: bool = False, sizes: object = None) -> None: ...

    pairs = ["gap=3", "wide=2", "name=1", "on=True", "sizes=(1,2)", "other=a=b"]
    assert settings(pairs, "--it", target) == {
        "gap": 3, "wide": 2, "name": "1", "on": True, "sizes": (1, 2), "other": "a=b",
    }  # fmt: skip
    for pair, kind in (("gap=2.5", "a whole number"), ("wide=x", "a number"), ("on=3", "True or False")):
        with pytest.raises(UserError, match=f"--it {pair}: .* is {kind}; give one"):
            settings([pair], "--it", target)
    for pair in ("gap", "=3", "a-b=3"):
        with pytest.raises(UserError, match="settings are written key=value"):
            settings([pair], "--it", target)


def test_a_plug_in_gets_only_what_it_names() -> None:
    def target(shots: int, *rest: int, gap: int = 1, **others: int) -> tuple[Any, ...]:
        return shots, rest, gap, others

    assert takes(target) == {"shots", "gap"}
    assert call(target, {"shots": 2, "ways": 5}, {"gap": 4}, "it") == (2, (), 4, {})
    with pytest.raises(UserError, match=r"it needs shots.*given are ways"):
        call(target, {"ways": 5}, {}, "it")


def test_an_algorithm_that_makes_no_learner_is_told_by_build(mine: Path) -> None:
    with pytest.raises(UserError, match="made a Sequential; an algorithm is a function from a model to a Learner"):
        build("mine.py:no_learner", mlp())


def test_names_in_a_run_folder_import_nothing(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(sinusoid, monkeypatch, "--no-compile", "--out", "run")
    folder = mine / "run"
    identity = config_hash(Run(folder).config)
    marker = mine / "marker"
    (mine / "evil.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n\ndef attr(generator): ...\n")
    for file in ("config.json", "summary.json"):
        content = json.loads((folder / file).read_text())
        for key in ("sampler", "dataset", "model", "algorithm"):
            content[key] = "evil.py:attr"
        content["logger"] = ["evil.py:attr", "evil:attr"]
        (folder / file).write_text(json.dumps(content))
    assert Run(folder).config["model"] == Run(folder).summary["sampler"] == "evil.py:attr"
    assert Run(folder).metrics and Run(folder).example and Run(folder).curve.loss.shape == (4, 3)
    monkeypatch.undo()
    monkeypatch.chdir(mine)
    for words in (["run"], ["run", "--out", "overlay"]):
        monkeypatch.setattr(sys, "argv", ["toolkit", "plot", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
    assert (folder / "adaptation.png").exists() and (mine / "overlay.png").exists()
    assert load_newest(folder / "checkpoints", identity)
    capsys.readouterr()
    sentence = refused(capsys, sinusoid, monkeypatch, "--no-compile", "--out", "run", "--resume")
    assert "run was made with --algorithm evil.py:attr" in sentence
    assert not marker.exists() and "evil" not in sys.modules
    resolve("evil.py:attr")
    assert marker.exists(), "the file does what it is there for"


def test_a_logger_that_raises_is_dropped_with_a_warning_and_the_run_ends_well(
    mine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(sinusoid, monkeypatch, "--no-compile", "--out", "run", "--logger", "mine.py:raising", "csv")
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "failed (ValueError: the disk of the logger is full); going on without it" in warnings[0]
    seen = sys.modules[resolve("mine.py:raising").__module__].calls
    assert seen == [row for row in Run(mine / "run").metrics if row["iteration"] < 3] and len(seen) == 3
    assert Run(mine / "run").summary["test"]["tasks"] == 4
    assert tables(mine / "run") == expected(mine / "run"), "the other logger still has all rows"


COLUMNS = {
    "training.csv": ("iteration", "loss", "metric", "seconds"),
    "validation.csv": ("iteration", "val_loss", "val_metric", "val_ci95", "val_finite"),
}


def tables(folder: Path) -> dict[str, list[dict[str, float]]]:
    """The rows of the tables that the csv logger writes."""
    found = {}
    for name, columns in COLUMNS.items():
        with open(folder / "csv" / name, newline="") as file:
            reader = csv.DictReader(file)
            found[name] = [{key: float(value) for key, value in row.items() if value} for row in reader]
        assert tuple(reader.fieldnames or ()) == columns
    return found


def expected(folder: Path) -> dict[str, list[dict[str, float]]]:
    """The rows of metrics.jsonl, sorted into tables."""
    return {name: [row for row in Run(folder).metrics if set(row) & set(columns[1:])] for name, columns in COLUMNS.items()}


def test_csv_and_console_write_what_the_journal_has(
    mine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(sinusoid, monkeypatch, "--no-compile", "--out", "run", "--logger", "csv", "console", "--algorithm", "meta_sgd")
    assert tables(mine / "run") == expected(mine / "run")
    assert [len(rows) for rows in tables(mine / "run").values()] == [4, 2]
    validations = expected(mine / "run")["validation.csv"]
    lines = [record.message for record in caplog.records if record.message.startswith("iteration ")]
    assert lines == ["  ".join(f"{key} {value:.4g}" for key, value in row.items()) for row in validations]


def test_a_resumed_run_repeats_no_row_of_a_table(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--no-compile", "--out", "run", "--sampler", "mine.py:plain", "--logger", "csv"]
    with pytest.raises(SystemExit) as stopped:
        run(sinusoid, monkeypatch, *flags, "mine.py:interrupting")
    assert stopped.value.code == 130
    assert [row["iteration"] for row in tables(mine / "run")["training.csv"]] == [1, 2, 3], "one more than the checkpoint"
    with open(mine / "run" / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 4, "lo')
    run(sinusoid, monkeypatch, *flags, "--resume")
    assert tables(mine / "run") == expected(mine / "run")
    assert [row["iteration"] for row in tables(mine / "run")["training.csv"]] == [1, 2, 3, 4]
    run(sinusoid, monkeypatch, *flags, "--resume")
    assert tables(mine / "run") == expected(mine / "run"), "a finished run has nothing to add"


@pytest.mark.parametrize(
    ("sampler", "folder"),
    [
        ("mine.py:plain", "maml-mine-plain-10s-seed0"),
        ("some/where/my pairs.py:Pairs", "maml-my-pairs-Pairs-10s-seed0"),
        ("/elsewhere/x.py:A.b", "maml-x-A.b-10s-seed0"),
        ("package.module:Thing", "maml-package.module-Thing-10s-seed0"),
    ],
)
def test_the_run_folder_of_a_plug_in_has_a_sane_name(sampler: str, folder: str) -> None:
    assert sinusoid.Config(sampler=sampler).run_name == folder
    assert Path(folder).name == folder and not set(folder) & set(' :/\\*?"<>|')


def test_a_function_of_a_row_is_a_logger(mine: Path) -> None:
    (mine / "rows.py").write_text("found = []\n\ndef keep(row):\n    found.append(row)\n")
    [logger] = loggers(["rows.py:keep"], mine, {}, 0)
    logger({"iteration": 1})
    assert resolve("rows.py:found") == [{"iteration": 1}]


def test_a_sampler_is_not_hidden_by_a_dataset_of_the_same_name(package: ModuleType) -> None:
    config, samplers, bank = splits(quickstart.Config(sampler="two-sided", queries=2))
    assert isinstance(samplers["test"], package.Thresholds) and bank is None and config.dataset is None


@pytest.mark.parametrize("torn", ["12", "3,0.5", "3,0.5,0.25,1.5\r\nit", "3,0.5,0.25,1.5\r\n\0\0"])
def test_a_table_with_a_torn_end_goes_on_from_the_journal(torn: str, tmp_path: Path) -> None:
    rows = [{"iteration": i, "loss": 0.5, "metric": 0.25, "seconds": 1.5} for i in range(1, 12)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "training.csv").write_text(
        "iteration,loss,metric,seconds\r\n1,0.5,0.25,1.5\r\n2,0.5,0.25,1.5\r\n" + torn
    )
    [logger] = loggers(["csv"], tmp_path, {}, 10)
    for row in rows[10:]:
        logger(row)
    assert tables(tmp_path)["training.csv"] == rows


def test_a_validation_without_a_finite_loss_is_in_the_table_and_on_the_console(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"iteration": 2, "val_metric": 0.25, "val_finite": 0.0}
    with caplog.at_level("INFO", "toolkit"):
        for logger in loggers(["csv", "console"], tmp_path, {}, 0):
            logger(row)
            logger({"iteration": 2, "rate/body": 0.1})
    assert tables(tmp_path) == {"training.csv": [], "validation.csv": [row]}
    assert [record.message for record in caplog.records] == ["iteration 2  val_metric 0.25  val_finite 0"]


def test_a_task_of_their_sampler_is_a_function_of_seed_and_index(package: ModuleType) -> None:
    sampler = package.Thresholds(2, 3)
    whole, part = draw(sampler, 4, 1), draw(sampler, 1, 1, start=2)
    assert isinstance(whole, Task) and torch.equal(whole.query.x[2], part.query.x[0])  # type: ignore[index]


BROKEN = """
from toolkit.algorithms import maml

def sampler(shots):
    raise RuntimeError("no such\\nspeaker")

def method(model, boost=2.0, **shared):
    return maml(model, name=f"boosted {boost}", **shared)

def narrow(model):
    return maml(model)
"""


def test_whatever_a_plug_in_raises_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(BROKEN)
    config = quickstart.Config()
    with pytest.raises(UserError, match="cannot be made: RuntimeError: no such speaker; --debug shows where"):
        assemble(replace(config, sampler=f"{file}:sampler"))
    with pytest.raises(UserError, match=r"narrow cannot be called \(.*; a method is def "):
        assemble(replace(config, algorithm=f"{file}:narrow"))
    with pytest.raises(UserError, match=r"cannot be called by name; a plug-in is a function or a class with named"):
        assemble(replace(config, algorithm="builtins:dict"))
    assert assemble(replace(config, algorithm=f"{file}:method", method=("boost=3.0",)))[1].name == "boosted 3.0"


def test_a_listing_gives_the_whole_first_sentence_and_what_a_partial_sets() -> None:
    lines = {kind: {plugin.name: plugin.line for plugin in listing(kind)} for kind in ("algorithms", "models")}
    assert lines["algorithms"]["anil"] == "Almost no inner loop: only the head adapts (Raghu et al. 2020, section 4)."
    assert lines["models"]["conv4-32-pool"] == f"{lines['models']['conv4']} (width=32, pool=True)"
