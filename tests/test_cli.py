"""The `toolkit` command: lists, the check of samplers, templates; one sentence and exit code 2 for what the user can mend."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import toolkit
from toolkit import UserError, cli, commands, plugins
from toolkit.flags import Flags, launch
from toolkit.plugins import Plugin

ROOT = Path(__file__).parent.parent
SAMPLERS = '''
from dataclasses import dataclass

import torch

from toolkit import Batch, Task
from toolkit.samplers import Episodes


@dataclass(frozen=True)
class Numbers:
    """Numbers of a class."""

    split: str
    ways: int
    shots: int
    queries: int
    gap: float = 1.0
    leak: bool = False

    def __call__(self, generator):
        def batch(n):
            y = torch.arange(self.ways).repeat_interleave(n)
            return Batch(torch.randn(len(y), 3, generator=generator) + self.gap * y[:, None], y)

        support, query = batch(self.shots), batch(self.queries)
        if self.leak and self.split == "val":
            query.x[0] = support.x[0]
        return Task(support, query)


def plain(generator):
    return Numbers("train", 3, 1, 2)(generator)


def pairs(bank, shots, queries):
    return Episodes(bank, 2, shots, queries)


def broken(split):
    raise KeyError("my own\\nfault")
'''


@pytest.fixture
def samplers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my.py"
    path.write_text(SAMPLERS)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of a command."""
    monkeypatch.setattr(sys, "argv", ["toolkit", *words])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return int(done.value.code or 0)


@pytest.mark.parametrize("kind", plugins.KINDS)
def test_a_list_holds_each_name_with_its_line_and_origin(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert run(monkeypatch, "list", kind) == 0
    lines = capsys.readouterr().out.splitlines()
    starts = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert starts == plugins.names(kind) and all(len(line) <= 100 for line in lines)
    assert run(monkeypatch, "list", kind.removesuffix("s")) == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert sum("metalearning-toolkit" in line for line in lines) == len(starts)


def test_a_list_without_a_kind_holds_all_kinds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "list") == 0
    blocks = capsys.readouterr().out.strip().split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == list(plugins.KINDS)


def test_an_unknown_kind_gets_a_suggestion(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "list", "sampelrs") == 2
    assert capsys.readouterr().err.startswith("error: unknown kind of plug-in 'sampelrs'; did you mean 'samplers'?")


@pytest.mark.parametrize("width", [40, 60, 200])
def test_a_table_is_aligned_and_loses_nothing(width: int) -> None:
    rows = [
        Plugin("samplers", "a", "one two three four five six seven eight nine ten eleven", "me 1"),
        Plugin("samplers", "longer", "", "somebody-else 2.0"),
    ]
    lines = commands.columns(rows, width).splitlines()
    middle = max(24, width - 6 - 17 - 4)
    assert lines[0][:8] == "a       " and lines[0][8 + middle :] == "  me 1"
    assert lines[-1] == f"longer  {'':{middle}}  somebody-else 2.0"
    assert " ".join(line[8 : 8 + middle].strip() for line in lines[:-1]) == rows[0].line
    assert commands.columns([], width) == ""


def test_a_sound_sampler_gives_a_report_for_each_split_and_exit_code_0(
    samplers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run(monkeypatch, "check-sampler", "my.py:Numbers", "--ways", "4", "--shots", "2", "--queries", "3", "--tasks", "40")
        == 0
    )
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if "split '" in line and "faults" in line] == [
        f"Numbers, split '{split}': no faults, no notes" for split in ("train", "val", "test")
    ]
    assert out.count("4 labels a task, each with 2 support and 3 query items") == 3
    assert out.count("40 tasks were drawn (seed 0, split") == 3
    assert "train, val, test share nothing that could be found" in out


def test_a_fault_in_one_split_gives_exit_code_1_and_settings_reach_the_sampler(
    samplers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("--sampler.leak", "True", "--sampler.gap=2.5", "--seed", "3")
    assert run(monkeypatch, "check-sampler", "my.py:Numbers", *settings) == 1
    out = capsys.readouterr().out
    assert "split 'train': no faults" in out and "split 'val': 1 fault" in out
    call = re.sub(r"\s+", " ", out).split("replay it with ")[1]
    assert call.startswith("draw(sampler, 1, 3, start=0, split='val')")


def test_a_function_of_a_generator_is_checked_as_it_is(
    samplers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "check-sampler", "my.py:plain", "--tasks", "20") == 0
    assert "3 labels a task, each with 1 support and 2 query items" in capsys.readouterr().out


@pytest.mark.parametrize("words", [("glyphs",), ("episodes", "--dataset", "glyphs"), ("my.py:pairs", "--dataset", "glyphs")])
def test_datasets_and_samplers_of_a_dataset_are_checked(
    words: tuple[str, ...], samplers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "check-sampler", *words, "--queries", "2", "--tasks", "20", "--dataset.size", "14") == 0
    out = capsys.readouterr().out
    assert out.count("Episodes, split ") == 3 and out.count("no item is twice in any of 20 tasks") == 3
    assert f"{2 if 'pairs' in words[0] else 5} labels a task" in out


MISTAKES = {
    "no such sampler": (["sinsoid"], "unknown sampler 'sinsoid'; did you mean 'sinusoid'?"),
    "no such file": (["your.py:Numbers"], "there is no file your.py"),
    "no such setting": (["my.py:Numbers", "--sampler.gab", "3"], "no setting 'gab'; did you mean 'gap'?"),
    "no such setting of the dataset": (["glyphs", "--dataset.sise", "14"], "no setting 'sise'; did you mean 'size'?"),
    "a bad value": (["my.py:Numbers", "--sampler.gap", "wide"], "gap is a number; give one"),
    "no value": (["my.py:Numbers", "--sampler.gap"], "--sampler.gap has no value"),
    "no dataset": (["episodes"], "episodes are drawn from a dataset; name one, as in --dataset omniglot-vinyals"),
    "dataset for nothing": (["sinusoid", "--dataset", "glyphs"], "--sampler sinusoid draws from no dataset, so --dataset"),
    "data not there": (["cifar-fs"], "add --download"),
    "too many ways": (["glyphs", "--ways", "5000", "--dataset.size", "14"], "5000 ways need 5000 classes"),
    "no queries": (["my.py:Numbers", "--queries", "0"], "--queries is 0; give at least 1"),
    "no tasks": (["my.py:Numbers", "--tasks", "0"], "--tasks is 0; give at least 1"),
    "a factory that raises": (
        ["my.py:broken"],
        "my.py:broken cannot be made: KeyError: 'my own\\nfault'; --debug",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    name: str, samplers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, sentence = MISTAKES[name]
    assert run(monkeypatch, "check-sampler", *words) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and sentence in shown.err and shown.err.count("\n") == 1
    assert not shown.out
    with pytest.raises(UserError):
        monkeypatch.setattr(sys, "argv", ["toolkit", "check-sampler", *words, "--debug"])
        cli.main()


@pytest.mark.parametrize("words", ["", "chekc", "check-sampler", "list a b", "check-sampler x --tasks many"])
def test_a_command_that_cannot_be_read_is_exit_code_2(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *words.split()) == 2
    assert "usage: toolkit" in capsys.readouterr().err


def test_new_prints_the_files_and_the_next_command_and_a_new_sampler_has_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "new", "sampler", "my_sampler.py") == 0
    assert capsys.readouterr().out == "my_sampler.py\ntest_my_sampler.py\n\nnext: python -m pytest test_my_sampler.py\n"
    assert run(monkeypatch, "check-sampler", "my_sampler.py:MySampler", "--tasks", "40") == 0
    assert run(monkeypatch, "new", "sampelr", "other.py") == 2
    assert capsys.readouterr().err.startswith("error: unknown kind of template 'sampelr'; did you mean 'sampler'?")


def test_plot_says_in_a_sentence_that_a_run_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "plot", str(tmp_path / "absent")) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_one_bad_run_leaves_the_figures_of_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def drawn(path: Path) -> list[Path]:
        if path.name == "bad":
            raise UserError("bad is bad")
        return [path / "adaptation.png"]

    monkeypatch.setattr("toolkit.plots.save.draw_run", drawn)
    assert run(monkeypatch, "plot", "a", "bad", "c") == 2
    shown = capsys.readouterr()
    assert shown.out.split() == ["a/adaptation.png", "c/adaptation.png"] and shown.err == "error: bad is bad\n"


@pytest.mark.parametrize(
    "words",
    [
        ("plot", "RUN", "--out", "/dev/null/figure"), ("plot", "RUN", "--out", "."), ("watch", "/dev/null"),
        ("report", "RUN", "--out", "/dev/null/x.html"), ("report", "RUN", "--out", "RUN/summary.json"),
        ("compare", "RUN/config.json", "RUN"),
    ],
)  # fmt: skip
def test_a_place_that_will_not_do_is_a_sentence(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = ROOT / "results" / "reference" / "glyphs-seed0"
    before = (reference / "summary.json").read_bytes()
    assert run(monkeypatch, *(word.replace("RUN", str(reference)) for word in words)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert (reference / "summary.json").read_bytes() == before


def test_the_doctor_wants_classes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--outputs", "--numbers"):
        assert run(monkeypatch, "doctor", "--model", "conv4", flag, "0") == 2
        assert capsys.readouterr().err == f"error: {flag} is 0; give at least 1\n"


def test_what_the_system_refuses_an_experiment_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(flags: Flags) -> None:
        raise OSError(28, "No space left on device", "somewhere/curve.json")

    monkeypatch.setattr(sys, "argv", ["experiment"])
    with pytest.raises(SystemExit) as done:
        launch(Flags, full, {}, "")
    said = "error: somewhere/curve.json: no space left on device; give another place, or mend that and start again\n"
    assert done.value.code == 2 and capsys.readouterr().err == said


def test_the_version_and_defaults_of_nought_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"toolkit {toolkit.__version__}\n"
    assert run(monkeypatch, "show-task", "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "the worst are in summary.json (default: 0)" in shown and "False" not in shown


def test_what_a_terminal_cannot_print_ends_no_command() -> None:
    code = "import sys; from toolkit.cli import main; sys.argv = ['toolkit', *sys.argv[1:]]; main()"
    words = [sys.executable, "-c", code, "watch", str(ROOT / "results" / "reference" / "glyphs-seed0"), "--once"]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}, cwd=ROOT)
    assert done.returncode == 0 and "tested: accuracy" in done.stdout and "?" in done.stdout, done.stderr


def test_help_needs_nothing_heavy() -> None:
    """The parser, without what `toolkit/__init__.py` imports by itself."""
    code = (
        "import sys, types; package = types.ModuleType('toolkit'); package.__path__, package.__version__ = ['toolkit'], '1';"
        "sys.modules['toolkit'] = package;"
        "import toolkit.cli; print(toolkit.cli._parser().format_help());"
        "print([name for name in ('torch', 'numpy', 'tqdm', 'tyro') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    shown = done.stdout.splitlines()
    assert shown[-1] == "[]"
    assert all(command in done.stdout for command in ("list", "check-sampler", "new", "plot"))


def test_an_interrupt_is_exit_code_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(kind: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plugins, "listing", interrupt)
    assert run(monkeypatch, "list") == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_a_check_leaves_global_random_numbers_alone(samplers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    run(monkeypatch, "check-sampler", "my.py:plain", "--tasks", "5")
    assert torch.equal(torch.rand(2), expected)
