"""Sixty and more mistakes, each answered by one sentence that says what was given and what to do: never a traceback."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments import omniglot, quickstart, sinusoid
from toolkit import cli
from toolkit.flags import launch

SHORT = "--iterations 2 --validate-every 2 --tasks 2 --val-tasks 2 --eval-tasks 4 --eval-steps 1"
# The command line, and what its one sentence must say. Folders: good and other (sinusoid, same tasks), glyphs (classes).
TOOL = [
    # names and numbers
    ("list sampler-s", r"unknown kind of plug-in 'sampler-s'; did you mean 'samplers'"),
    ("check-sampler sinsuoid", r"unknown sampler 'sinsuoid'; did you mean 'sinusoid'"),
    ("check-sampler sinusoid --tasks 0", r"--tasks is 0; give at least 1"),
    ("check-sampler nowhere.py:thing", r"there is no file nowhere\.py"),
    ("check-sampler episodes", r"episodes are drawn from a dataset; name one, as in --dataset"),
    ("check-sampler sinusoid --sampler.colour 3", r"colour"),
    ("new samplr my.py", r"unknown kind of template 'samplr'; did you mean 'sampler'"),
    ("new sampler my.txt", r"my\.txt"),
    ("plan", r"no sampler was given; give one of .*, omniglot-vinyals"),
    ("plan --sampler omniglot-vinyls", r"unknown sampler 'omniglot-vinyls'; did you mean 'omniglot-vinyals'"),
    ("plan --sampler glyphs --algorithm mmal", r"unknown algorithm 'mmal'; did you mean"),
    ("plan --sampler glyphs --tasks 0", r"--tasks is 0; give at least 1"),
    ("plan --sampler glyphs --budget 3apples", r"budget"),
    # runs that are not there or not whole
    ("plot nowhere", r"there is no run folder nowhere; give the folder that holds config\.json"),
    ("plot half --out half/curves", r"half has no summary\.json; the run has not come so far, continue it with --resume"),
    ("plot cut-summary", r"cut-summary/summary\.json is damaged .*; restore it or repeat the run"),
    ("plot cut-metrics", r"cut-metrics/metrics\.jsonl is damaged .*; restore it or repeat the run"),
    ("plot edited-metrics", r"edited-metrics/metrics\.jsonl is damaged .*; restore it or repeat the run"),
    ("plot no-metrics", r"no-metrics has no metrics\.jsonl"),
    ("plot untested", r"untested has no test result in summary\.json; let the run finish, or evaluate it first"),
    ("plot good --kind adaption", r"unknown kind of figure 'adaption'; did you mean 'adaptation'"),
    ("plot good glyphs --kind adaptation --out o", r"runs of different metrics .*draw them separately"),
    ("plot good --kind pairs", r"two runs"),
    ("plot good glyphs --kind pairs", r"metric"),
    ("plot glyphs other-tasks --kind pairs", r"tasks"),
    ("plot good --kind shots", r"shots"),
    ("plot glyphs --kind ways", r"ways"),
    ("plot good --kind reliability", r"reliability|card|calibration"),
    ("plot old --kind reliability", r"old"),
    # comparison
    ("compare good", r"the runs given are one method, maml; give runs of at least two"),
    ("compare glyphs good", r"the runs have different metrics \(accuracy, squared error\); compare those of one metric"),
    ("compare glyphs other-tasks", r"the runs were tested on 2 different lists of tasks; give them the same --eval-seed"),
    ("compare glyphs glyphs-anil-seed1", r"anil was trained with seeds 1 and maml with 0; give the same seeds of both"),
    ("compare glyphs glyphs-anil --step 9", r"tested for 1 inner steps, not 9; choose among 0 to 1"),
    ("compare glyphs no-curve", r"^error: no-curve has no curve\.json"),
    ("compare glyphs cut-curve", r"cut-curve/curve\.json is damaged"),
    ("compare glyphs empty-curve", r"empty-curve/curve\.json is damaged \(it holds tensors of shape \(0,\) and \(0,\)"),
    # tables
    ("table", r"no table is asked for; give table files or run folders, or --into FILE"),
    ("table nowhere.json", r"there is no table nowhere\.json"),
    ("table broken.json", r"broken\.json is no table of results"),
    ("table good --columns methd", r"unknown column 'methd'; did you mean 'method'"),
    ("table --into plain.md", r"plain\.md asks for no table; put <!-- table: FILE -->"),
    ("table --into none.md", r"there is no file none\.md; give Markdown files"),
    ("table half", r"half has no summary\.json"),
    # finished runs opened again
    ("evaluate nowhere", r"there is no run folder nowhere"),
    ("evaluate half", r"half has no summary\.json|half has no checkpoint"),
    ("evaluate glyphs --iterations 5", r"--iterations belongs to training, which is over; `toolkit evaluate` takes"),
    ("evaluate glyphs --algorithm anil", r"--algorithm belongs to training, which is over"),
    ("evaluate glyphs --ways 9", r"does not fit these tasks: its head\.weight is \(5, 40\), they want \(9, 40\)"),
    ("evaluate glyphs --sampler sinusoid", r"sinusoid|fit"),
    ("evaluate glyphs --eval-tasks 0", r"--eval-tasks is 0; give at least 1"),
    ("evaluate glyphs --protocol claims --eval-tasks 7", r"--protocol claims means 10,000 test tasks"),
    ("evaluate no-checkpoint", r"has no checkpoint, only numbers; `toolkit rerun no-checkpoint` makes its weights anew"),
    ("evaluate cut-checkpoint", r"checkpoint"),
    ("evaluate code", r"code, which runs only when its names are typed again; add --sampler mine\.py:lines"),
    ("rerun nowhere", r"there is no run folder nowhere"),
    ("rerun glyphs --iterations 9", r"these flags make another run than glyphs"),
    ("rerun foreign", r"foreign has no algorithm in its config\.json"),
    ("show-task glyphs --index -4", r"task -4 is none; tasks are numbered from 0"),
    ("show-task no-checkpoint", r"has no checkpoint"),
    ("watch nowhere", r"there is no run folder nowhere"),
    ("watch edited-metrics", r"edited-metrics/metrics\.jsonl is damaged \(line 1 is no row of a run"),
    ("report nowhere", r"nowhere"),
    # the doctor
    ("doctor --model con4", r"unknown model 'con4'; did you mean 'conv4'"),
    ("doctor --model conv4 --inputs 3,x", r"--inputs 3,x is no shape; write positive whole numbers"),
    ("doctor --model nowhere.py:net", r"there is no file nowhere\.py"),
    ("doctor --model tv:resnet17 --inputs 3,32,32", r"unknown model of torchvision 'resnet17'; did you mean 'resnet18'"),
    ("doctor --model tv:resnet18 --inputs 12", r"the model tv:resnet18 needs channels, size"),
]
SCRIPTS: list[tuple[str, str]] = [
    ("sinusoid --preset quik", r"unknown preset 'quik'; did you mean 'quick'|unknown preset 'quik'"),
    ("sinusoid --algorithm protnet", r"unknown algorithm 'protnet'; did you mean 'protonet'"),
    ("sinusoid --device cuda:77", r"--device cuda:77 is not usable here; use one of"),
    ("sinusoid --meta-lr -1", r"--meta-lr is -1\.0; give a positive number"),
    ("sinusoid --rule sgdd", r"sgdd"),
    ("sinusoid --logger tensorbord", r"unknown logger 'tensorbord'; did you mean 'tensorboard'"),
    ("sinusoid --out good", r"the run folder good exists; continue it with --resume, replace it with --overwrite"),
    ("sinusoid --out plain", r"plain exists and is not a run folder; choose another place with --out"),
    ("omniglot --data-root nowhere", r"nowhere"),
    ("omniglot --ways 1 --data-root nowhere", r"nowhere|ways"),
    ("quickstart --ways 5000", r"5,?000"),
    # models of other libraries, and weights
    ("quickstart --model tv:resnett18", r"unknown model of torchvision 'resnett18'; did you mean 'resnet18'"),
    ("quickstart --model tvv:resnet18", r"there is no module 'tvv' for 'tvv:resnet18'"),
    ("quickstart --model tv:vit_b_32", r"is a multiple of 32, and these have 28 pixels; add --model\.resize 32"),
    ("quickstart --model tv:alexnet", r"tv:alexnet cannot take images of 28 x 28 \(.*\); add --model\.resize 224"),
    ("quickstart --model tv:squeezenet1_0 --model.resize 64", r"does not end in a linear layer, so it has no head"),
    ("quickstart --model tv:shufflenet_v2_x0_5 --model.resize big", r"resize is a whole number"),
    ("quickstart --model tv:shufflenet_v2_x0_5 --model.widht 3", r"cannot be made: .*'widht'"),
    ("sinusoid --model tv:resnet18", r"--model tv:resnet18 takes square images, but these tasks have numbers of shape \(1,\)"),
    (
        "quickstart --model hf:minilm",
        r"--model hf:minilm takes texts, but these tasks have square images .*; use --model conv4",
    ),
    ("quickstart --pretrained default", r"the model conv4 comes without weights; leave out --pretrained"),
    ("quickstart --pretrained gone.pth", r"there is no file gone\.pth; give --pretrained the path of a file"),
    ("quickstart --pretrained mine.py", r"--pretrained mine\.py is neither default nor a file of weights"),
    ("quickstart --pretrained torn.safetensors", r"torn\.safetensors is no file of weights"),
    (
        "quickstart --model tv:shufflenet_v2_x0_5 --pretrained other.pth",
        r"other\.pth does not fit tv:shuff\w*: weight is in it",
    ),
    # what adapts
    ("sinusoid --adapts hed.*", r"--adapts hed\.\* matches no trained parameter; the model has body\.layer0\.weight"),
    (
        "quickstart --adapts body.blok1.*",
        r"near it are '\*block1\*', .*; the model has body\.block0\.conv\.weight, .* and 12 more",
    ),
    ("sinusoid --adapts last:9", r"--adapts last:9: the model has 2 blocks, body\.layer0, body\.layer1; give last:1 to last:2"),
    ("sinusoid --algorithm anil --adapts *.bias", r"anil is the method whose inner loop moves the head, and --adapts \*\.bias"),
    ("sinusoid --freeze *", r"--freeze \* leaves nothing to train"),
    ("sinusoid --freeze lora", r"--freeze lora matches no trained parameter"),
    ("sinusoid --lora 0", r"adapters of rank 0; give rank 1 or more"),
    ("sinusoid --lora 2 --lora-layers body.layr*", r"--lora-layers body\.layr\* matches no layer that can have adapters"),
    ("sinusoid --lora-layers body.*", r"there are none; add --lora and their rank"),
    ("sinusoid --algorithm lora_maml --lora 2", r"lora_maml puts layers of its own into the model; leave --lora out"),
    ("quickstart --prompts 4", r"prompts are put into the vision transformers of torchvision and timm"),
]
MINE = """
import torch
from toolkit import Batch, Task
def lines(generator):
    x = torch.randn(20, 1, generator=generator)
    return Task(Batch(x[:10], 2 * x[:10]), Batch(x[10:], 2 * x[10:]))
"""


def script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = {"sinusoid": sinusoid, "omniglot": omniglot, "quickstart": quickstart}[words[0]]
    monkeypatch.setattr(sys, "argv", words)
    launch(module.Config, module.main, getattr(module, "PRESETS", {}), module.__doc__ or "")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders, sound ones and ones that something happened to."""
    place = tmp_path_factory.mktemp("place")
    (place / "mine.py").write_text(MINE)
    runs = {
        "good": "sinusoid --no-compile", "glyphs": "quickstart --queries 1 --eval-queries 1 --model mlp",
        "glyphs-anil": "quickstart --queries 1 --eval-queries 1 --model mlp --algorithm anil",
        "glyphs-anil-seed1": "quickstart --queries 1 --eval-queries 1 --model mlp --algorithm anil --seed 1",
        "other-tasks": "quickstart --queries 1 --eval-queries 1 --model mlp --eval-seed 5", 
        "code": "sinusoid --no-compile --sampler mine.py:lines",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr("toolkit.plots.save.draw_run", lambda folder: [])  # figures have tests of their own
        for name, words in runs.items():
            script([*words.split(), *SHORT.split(), "--out", name], patch)

    def copy(name: str, of: str, change: Callable[[Path], object]) -> None:
        shutil.copytree(place / of, place / name)
        change(place / name)

    def cut(file: str, share: float = 0.5) -> Callable[[Path], object]:
        return lambda folder: (folder / file).write_text((whole := (folder / file).read_text())[: int(len(whole) * share)])

    copy("half", "good", lambda folder: [(folder / name).unlink() for name in ("summary.json", "curve.json")])
    copy("cut-summary", "good", cut("summary.json"))
    copy("cut-metrics", "good", cut("metrics.jsonl", 0.9))
    copy("cut-curve", "glyphs-anil", cut("curve.json"))
    copy("no-curve", "glyphs-anil", lambda folder: (folder / "curve.json").unlink())
    copy("no-metrics", "good", lambda folder: (folder / "metrics.jsonl").unlink())
    copy("no-checkpoint", "good", lambda folder: shutil.rmtree(folder / "checkpoints"))
    copy("foreign", "good", lambda folder: (folder / "config.json").write_text('{"seed": 0}'))
    edited = "iteration: 1\n"
    copy("edited-metrics", "good", lambda f: (f / "metrics.jsonl").write_text(edited + (f / "metrics.jsonl").read_text()))

    def emptied(folder: Path) -> None:
        curve = json.loads((folder / "curve.json").read_text()) | {"loss": [], "metric": []}
        (folder / "curve.json").write_text(json.dumps(curve))

    def without(key: str) -> Callable[[Path], object]:
        def change(folder: Path) -> None:
            summary = json.loads((folder / "summary.json").read_text())
            del summary[key]
            (folder / "summary.json").write_text(json.dumps(summary))

        return change

    def torn(folder: Path) -> None:
        for file in (folder / "checkpoints").rglob("weights.safetensors"):
            file.write_bytes(file.read_bytes()[:100])

    copy("empty-curve", "glyphs-anil", emptied)
    copy("untested", "good", without("test"))
    copy("old", "glyphs", without("card"))
    copy("cut-checkpoint", "glyphs", torn)
    (place / "broken.json").write_text("{")
    (place / "plain.md").write_text("no table here\n")
    (place / "torn.safetensors").write_bytes(b"torn")
    torch.save({"weight": torch.ones(2)}, place / "other.pth")
    (place / "plain").mkdir()
    (place / "plain" / "letter.txt").write_text("mine")
    return place


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of error that was printed, after anything else."""
    said = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in "".join(said)
    errors = [line for line in said if line.startswith("error: ")]
    assert len(errors) == 1 and said[-1] == errors[0], said
    return errors[0]


@pytest.mark.parametrize(("words", "said"), TOOL, ids=[words for words, _ in TOOL])
def test_the_tool_answers_in_a_sentence(
    words: str, said: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["toolkit", *words.split()])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    found = sentence(capsys)
    assert re.search(said, found), found


@pytest.mark.parametrize(("words", "said"), SCRIPTS, ids=[words for words, _ in SCRIPTS])
def test_an_experiment_answers_in_a_sentence(
    words: str, said: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    with pytest.raises(SystemExit) as left:
        script([*words.split(), *SHORT.split()], monkeypatch)
    assert left.value.code == 2
    found = sentence(capsys)
    assert re.search(said, found), found
    assert sorted(place.rglob("*")) == before, "a mistake must leave nothing behind"
