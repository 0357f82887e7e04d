"""What `toolkit new` writes: short, named after its file, passing its own test, and running as it is in every experiment."""

import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from experiments import sinusoid
from toolkit import UserError, cli, draw, evaluate, meta_gradient
from toolkit.flags import Flags, launch
from toolkit.metrics import cross_entropy
from toolkit.parts import assemble
from toolkit.plots import save
from toolkit.plugins import resolve
from toolkit.runs.folder import Run
from toolkit.templates import TEMPLATES, write

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
# The scripts whose tasks come from --sampler, found by what they do, so that a new one is tested too.
SCRIPTS = sorted(path.stem for path in EXPERIMENTS.glob("*.py") if "assemble(config)" in path.read_text())
NAMES = {"sampler": "MySampler", "model": "my_model", "algorithm": "my_algorithm"}
SHORT = [
    "--iterations=4", "--validate-every=2", "--val-tasks=3", "--eval-tasks=4", "--eval-steps=2", "--tasks=2", "--queries=4",
    "--eval-queries=5",
]  # fmt: skip
# Three lines of the sampler's template, and what they become. Each begins as the template's line does.
IMAGE_PAIRS = {
    "centres =": "shifts = torch.randperm(8, generator=generator)[: self.ways].tolist()",
    "x =": "x = torch.stack([torch.stack([a, a.roll(s, -1)], 1) "
    "for s in shifts for a in [torch.rand(n, 8, 8, generator=generator)]])",
}
REGRESSION = {
    "centres =": "phase = self.gap * torch.rand(1, generator=generator)",
    "x =": "x = 10 * torch.rand(self.ways, n, 1, generator=generator) - 5",
    "y =": "y = torch.sin(x + phase)",
}
FROM_A_BANK = {
    "gap:": 'bank: "ClassBank" = None',
    "centres =": "classes = torch.randperm(self.bank.classes, generator=generator)[: self.ways].tolist()",
    "x =": "x = torch.stack([self.bank.read(self.bank.first[c] + torch.randperm(int(self.bank.sizes[c]), "
    "generator=generator)[:n]) for c in classes]).float()",
}


def edited(path: Path, edits: dict[str, str]) -> str:
    """Writes the sampler's template to `path` with at most three of its lines replaced; returns its name for --sampler."""
    write("sampler", path)
    assert len(edits) <= 3
    lines = path.read_text().splitlines()
    for begin, line in edits.items():
        [at] = [i for i, old in enumerate(lines) if old.strip().startswith(begin)]
        lines[at] = lines[at][: len(lines[at]) - len(lines[at].lstrip())] + line
    path.write_text("\n".join(lines) + "\n")
    return f"{path}:{''.join(part.title() for part in path.stem.split('_'))}"


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """An experiment as from the command line, without its figures, which other tests draw."""
    monkeypatch.setattr(save, "draw_run", lambda folder: [])
    compiled = ["--no-compile"] if module.Config().compile else []
    monkeypatch.setattr(sys, "argv", ["experiment.py", *SHORT, *compiled, *flags])
    launch(module.Config, module.main, getattr(module, "PRESETS", {}), module.__doc__ or "")


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_has_at_most_thirty_lines_and_says_how_to_run_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plug-ins").mkdir()
    file, test = write(kind, Path(f"plug-ins/my_{kind}.py"))
    assert (file, test) == (Path(f"plug-ins/my_{kind}.py"), Path(f"plug-ins/test_my_{kind}.py"))
    for path in (file, test):
        lines = path.read_text().splitlines()
        assert len(lines) <= 30 and max(map(len, lines)) <= 128, path
        assert not re.search(r"\b(PATH|TEST|Mine|mine)\b", path.read_text())
    assert f"    python experiments/quickstart.py --{kind} {file}:{NAMES[kind]} --{kind}." in file.read_text()
    assert f"python -m pytest {test}" in test.read_text().splitlines()[0]
    assert resolve(f"{file}:{NAMES[kind]}").__name__ == NAMES[kind]


def test_the_three_lines_to_edit_are_marked(tmp_path: Path) -> None:
    file, _ = write("sampler", tmp_path / "my_sampler.py")
    marked = [line.strip() for line in file.read_text().splitlines() if "# edit" in line]
    assert [line.partition("# edit ")[2][:2] for line in marked] == ["1:", "2:", "3:"]
    assert all(line.startswith(begin) for line, begin in zip(marked, REGRESSION, strict=True))


@pytest.mark.parametrize(
    ("kind", "file", "name"),
    [
        ("sampler", "pairs.py", "Pairs"),
        ("samplers", "my_2d_pairs.py", "My2dPairs"),
        ("sampler", "RGBPairs.py", "RGBPairs"),
        ("models", "net.py", "net"),
        ("algorithms", "ours_2.py", "ours_2"),
        ("model", "mine.py", "mine"),
        ("algorithm", "PATH.py", "PATH"),
    ],
)
def test_names_come_from_the_file(kind: str, file: str, name: str, tmp_path: Path) -> None:
    path, test = write(kind, tmp_path / file)
    assert resolve(f"{path}:{name}").__name__ == name
    assert f"{file}')}}:{name}\")" in test.read_text()


FAULTS = {
    "sampler": ("generator=generator)  # edit 2", ")  # edit 2"),
    "model": ("nn.ReLU())", "nn.ReLU(), Cut())"),
    "algorithm": ("+ decay * large", "* 0"),
}
CUT = """

class Cut(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach()
"""


def test_the_tests_beside_the_templates_pass_as_they_are_and_after_edits_and_fail_on_faults(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    edited(tmp_path / "package" / "my_pairs.py", IMAGE_PAIRS)
    edited(tmp_path / "package" / "my_curves.py", REGRESSION)
    for kind, (line, wrong) in FAULTS.items():
        write(kind, tmp_path / f"my_{kind}.py")
        bad, _ = write(kind, tmp_path / f"bad_{kind}.py")
        assert line in bad.read_text()
        bad.write_text(bad.read_text().replace(line, wrong) + (CUT if kind == "model" else ""))
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "-rA", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    results = re.findall(r"^(PASSED|FAILED|ERROR) (?:.*/)?test_(\w+)\.py", done.stdout, re.MULTILINE)
    wanted = {"my_sampler": 3, "my_model": 3, "my_algorithm": 1, "my_pairs": 3, "my_curves": 3, "bad_sampler": 1}
    assert Counter(file for result, file in results if result == "PASSED") == wanted, done.stdout
    failed = {"bad_sampler": 2, "bad_model": 3, "bad_algorithm": 1}
    assert Counter(file for result, file in results if result != "PASSED") == failed, done.stdout


FIRST = ("quickstart", "sinusoid", "intents")  # images, numbers, texts; the others differ from these in their data alone


@pytest.mark.parametrize("script", [pytest.param(name, marks=[] if name in FIRST else pytest.mark.slow) for name in SCRIPTS])
def test_the_templates_run_as_they_are_in_every_experiment(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in TEMPLATES:
        write(kind, Path(f"my_{kind}.py"))
    module = import_module(f"experiments.{script}")
    flags = ["--sampler", "my_sampler.py:MySampler", "--sampler.gap", "3"]
    run(module, monkeypatch, *flags, "--out", "fitting")
    assert Run(Path("fitting")).config["model"] == "mlp" and Run(Path("fitting")).summary["test"]["metric"] == "accuracy"
    flags += ["--model", "my_model.py:my_model", "--model.width", "12", "--algorithm", "my_algorithm.py:my_algorithm"]
    run(module, monkeypatch, *flags, "--algorithm.decay", "0.1")
    [folder] = (tmp_path / "results" / script).iterdir()
    assert folder.name.startswith("my_algorithm-my_algorithm-my_sampler-MySampler-")
    summary = Run(folder).summary
    assert (summary["algorithm"], summary["sampler"]) == ("my_algorithm", "my_sampler.py:MySampler")


def test_there_are_experiments_to_run_in() -> None:
    assert {"quickstart", "omniglot", "sinusoid", "cifar_fs", "fc100"} <= set(SCRIPTS)


@pytest.mark.parametrize(
    ("edits", "script", "flags"),
    [
        (IMAGE_PAIRS, "quickstart", ["--model", "conv4-32"]),
        (IMAGE_PAIRS, "sinusoid", []),
        (REGRESSION, "quickstart", []),
        (REGRESSION, "sinusoid", ["--sampler.gap", "3"]),
        (FROM_A_BANK, "quickstart", ["--model", "mlp"]),
        (FROM_A_BANK, "sinusoid", ["--dataset", "glyphs", "--shots", "2"]),
    ],
)
def test_three_edited_lines_make_other_tasks(
    edits: dict[str, str], script: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = edited(tmp_path / "my_other.py", edits)
    run(import_module(f"experiments.{script}"), monkeypatch, "--sampler", name, "--out", "run", *flags)
    metric = "squared error" if edits is REGRESSION else "accuracy"
    assert Run(tmp_path / "run").summary["test"]["metric"] == metric
    example = Run(tmp_path / "run").example["query_x"]
    shapes: dict[int, tuple[int, ...]] = {2: (2, 8, 8), 3: (1,)}
    assert edits is FROM_A_BANK or example.shape[1:] == shapes[len(edits)]
    assert edits is not FROM_A_BANK or example.shape[1:] == (1, 28, 28)


def test_the_model_of_the_template_is_for_images_and_vectors_and_follows_its_seed(tmp_path: Path) -> None:
    file, _ = write("model", tmp_path / "my_model.py")
    make = resolve(f"{file}:my_model")
    before = torch.get_rng_state()
    for inputs in ((1, 28, 28), (3, 12, 9), (7,), (2, 4)):
        model = make(inputs, 3, seed=1, width=8)
        assert model(torch.zeros(4, *inputs)).shape == (4, 3)
        again, other = (dict(make(inputs, 3, seed=seed, width=8).named_parameters()) for seed in (1, 2))
        for key, tensor in model.named_parameters():
            assert torch.equal(tensor, again[key]) and key.split(".")[0] in ("body", "head")
        assert not torch.equal(model.head.weight, other["head.weight"])
    assert torch.equal(before, torch.get_rng_state())


def test_the_setting_of_the_algorithm_changes_the_path_as_weight_decay_does(tmp_path: Path) -> None:
    file, _ = write("algorithm", tmp_path / "my_algorithm.py")
    ours = replace(sinusoid.Config(), algorithm=f"{file}:my_algorithm", inner_lr=0.1)
    plain, none, decayed = (
        assemble(replace(ours, algorithm=name, method=method))[1]
        for name, method in (("maml", ()), (ours.algorithm, ("decay=0",)), (ours.algorithm, ("decay=0.5",)))
    )
    meta = plain.init()
    task = draw(assemble(ours)[2].training, 1, 0)
    support = task.support._replace(x=task.support.x[0], y=task.support.y[0])  # type: ignore[index]
    ends = [list(learner.path(meta, support, 1))[-1] for learner in (plain, none, decayed)]
    for name, weights in ends[0].items():
        assert torch.allclose(ends[1][name], weights, atol=1e-7)
        assert torch.allclose(ends[2][name], weights - 0.1 * 2 * 0.5 * meta.params[name], atol=1e-6), name


def test_the_default_tasks_can_be_learned(tmp_path: Path) -> None:
    file, _ = write("sampler", tmp_path / "my_sampler.py")
    config = Flags(sampler=f"{file}:MySampler", algorithm="protonet", model="mlp", shots=5, sampler_args=("gap=5",))
    _, learner, tasks = assemble(config)
    assert learner.loss is cross_entropy and tasks.chance == 0.2
    curve = evaluate(learner, learner.init(), tasks.test, 20, 0)
    assert curve.mean()[0] > 0.6, "clouds far apart are told apart by any embedding"
    gradient, _ = meta_gradient(learner, learner.init(), draw(tasks.training, 2, 0))
    assert all(tensor.isfinite().all() for tensor in gradient.params.values())


REFUSED: dict[str, tuple[str, str, str]] = {
    "kind": ("smapler", "my_x.py", "unknown kind of template 'smapler'; did you mean 'sampler'"),
    "kind without template": ("loggers", "my_x.py", r"unknown kind of template 'logger' \(known: algorithm, model, sampler\)"),
    "no suffix": ("sampler", "my_sampler", "'my_sampler' is no name of a Python module; use .* as in my_sampler.py"),
    "other suffix": ("model", "my_model.txt", "'my_model.txt' is no name of a Python module; .*as in my_model.py"),
    "hyphen": ("sampler", "my-sampler.py", "'my-sampler.py' is no name of a Python module"),
    "dot": ("sampler", "my.sampler.py", "'my.sampler.py' is no name of a Python module"),
    "digit first": ("sampler", "2d.py", "'2d.py' is no name"),
    "digit first in the class": ("sampler", "_2d.py", "_2d.py would take a name.*call it my_2d.py"),
    "keyword": ("algorithm", "lambda.py", "'lambda.py' is no name"),
    "nothing": ("sampler", "__.py", "'__.py' is no name"),
    "Python's own": ("model", "random.py", "random.py would take a name that is needed for something else; call it my_random"),
    "torch": ("sampler", "torch.py", "call it my_torch.py"),
    "what the text calls otherwise": ("algorithm", "maml.py", "maml.py would take a name.*; call it my_maml.py"),
    "what it imports": ("sampler", "task.py", "task.py would take a name.*; call it my_task.py"),
    "what its test imports": ("model", "draw.py", "call it my_draw.py"),
    "an argument": ("model", "width.py", "call it my_width.py"),
    "no folder": (
        "sampler",
        "nowhere/my_sampler.py",
        "cannot write .*nowhere/my_sampler.py .No such file or directory.; choose",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_one_sentence_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    kind, file, sentence = REFUSED[case]
    with pytest.raises(UserError, match=sentence) as error:
        write(kind, tmp_path / file)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", ["my_sampler.py", "test_my_sampler.py"])
def test_an_existing_file_is_never_touched_and_the_other_not_written(there: str, tmp_path: Path) -> None:
    (tmp_path / there).write_text("mine")
    with pytest.raises(UserError, match=rf"cannot write .*/{there} \(File exists\); choose another name or folder"):
        write("sampler", tmp_path / "my_sampler.py")
    assert [path.name for path in tmp_path.iterdir()] == [there] and (tmp_path / there).read_text() == "mine"


@pytest.mark.parametrize("folder", ['"""', "a b", "$(x)", "mine"])
def test_an_odd_folder_does_not_break_the_texts(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(folder).mkdir()
    file, _ = write("sampler", Path(folder) / "pairs.py")
    shown = "mine/pairs.py" if folder == "mine" else "pairs.py"
    assert f" --sampler {shown}:Pairs --" in file.read_text()
    assert resolve(f"{file}:Pairs")()(torch.Generator()).query.x.shape == (75, 2)


def test_the_command_writes_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for code, words in ((0, "my_pairs.py\ntest_my_pairs.py\n"), (2, "error: cannot write my_pairs.py (File exists)")):
        monkeypatch.setattr(sys, "argv", ["toolkit", "new", "sampler", "my_pairs.py"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert ended.value.code == code and words in printed.out + printed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my_pairs.py", "test_my_pairs.py"]
