"""From flags to samplers, model and learner: what is settled on the way, and what is refused."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import quickstart, sinusoid
from toolkit import Batch, Task, UserError, draw, meta_gradient
from toolkit.data.bank import ClassBank
from toolkit.data.glyphs import glyphs
from toolkit.experiment import run
from toolkit.flags import EpisodeFlags
from toolkit.metrics import accuracy, cross_entropy, squared_error
from toolkit.parts import assemble, splits
from toolkit.runs.folder import Run, size_words
from toolkit.samplers import AllClasses, Augmented, Episodes, Sinusoid
from toolkit.task import IGNORED, take
from toolkit.testing import sizes

MODULE = __name__


def images(split: str, channels: int = 1, size: int = 8, classes: int = 7) -> ClassBank:
    generator = torch.Generator().manual_seed(len(split))
    items = torch.randint(256, (classes * 12, channels, size, size), generator=generator, dtype=torch.uint8)
    return ClassBank(items, torch.arange(classes + 1) * 12, tuple(f"{split} {i}" for i in range(classes)), f"tiny {split}")


def shifted(split: str) -> ClassBank:
    """Glyphs by other splits: those of test for training."""
    return glyphs({"train": "test", "val": "train", "test": "val"}[split])


def wide(split: str) -> ClassBank:
    items = torch.zeros(84, 3, 8, 10)
    return ClassBank(items, torch.arange(8) * 12, tuple("abcdefg"), f"wide {split}")


def texts(split: str) -> ClassBank:
    items = torch.randint(1, 50, (84, 6), generator=torch.Generator().manual_seed(0))
    return ClassBank(items, torch.arange(8) * 12, tuple("abcdefg"), f"texts {split}")


@dataclass(frozen=True)
class FromBank:
    """Episodes of a bank, remembering what it was given."""

    bank: ClassBank
    split: str
    ways: int
    shots: int
    queries: int
    gap: int = 1

    def __call__(self, generator: torch.Generator) -> Task:
        return Episodes(self.bank, self.ways, self.shots, self.queries)(generator)


@dataclass(frozen=True)
class Config(EpisodeFlags):
    sampler: str = f"{MODULE}:images"
    model: str = "conv4"
    queries: int = 2
    eval_queries: int = 3


def flags(**changes: Any) -> Config:
    return replace(Config(), **changes)


def test_a_dataset_gives_episodes_of_the_flags_sizes_for_each_split() -> None:
    config, samplers, bank = splits(replace(quickstart.Config(), train_shots=2, train_ways=4, queries=3, eval_queries=6))
    assert {name: (s.ways, s.shots, s.queries) for name, s in samplers.items()} == {  # type: ignore[attr-defined]
        "train": (4, 2, 3), "val": (5, 1, 6), "test": (5, 1, 6),
    }  # fmt: skip
    sources = [sampler.bank.source for sampler in samplers.values()]  # type: ignore[attr-defined]
    assert sources == ["glyphs train", "glyphs val", "glyphs test"]
    assert bank is not None and bank.source == "glyphs train" and config.sampler == "glyphs" and config.dataset is None


@pytest.mark.parametrize(
    "named", [{"sampler": "episodes"}, {"dataset": "glyphs"}, {"sampler": "episodes", "dataset": "glyphs"}]
)
def test_plain_episodes_have_one_name_however_they_were_asked_for(named: dict[str, str]) -> None:
    settled, samplers, _ = splits(replace(quickstart.Config(), **named))
    assert (settled.sampler, settled.dataset) == ("glyphs", None)
    assert isinstance(samplers["train"], Episodes)


def test_a_sampler_that_takes_a_bank_gets_the_one_of_its_split() -> None:
    config = replace(quickstart.Config(), sampler=f"{MODULE}:FromBank", sampler_args=("gap=3",))
    settled, samplers, bank = splits(config)
    assert settled.dataset == "glyphs" and bank is not None and bank.source == "glyphs train"
    for split, sampler in samplers.items():
        assert isinstance(sampler, FromBank) and (sampler.split, sampler.gap) == (split, 3)
        assert sampler.bank.source == f"glyphs {split}"
    assert splits(replace(config, dataset=f"{MODULE}:images"))[1]["val"].bank.source == "tiny val"  # type: ignore[attr-defined]


def test_a_plug_in_that_makes_a_bank_is_a_dataset() -> None:
    config, learner, tasks = assemble(flags(sampler_args=("channels=3",)))
    assert isinstance(tasks.test, Episodes) and isinstance(tasks.pretraining, AllClasses)
    assert draw(tasks.training, 1, 0).support.x.shape == (1, 5, 3, 8, 8)
    assert config.sampler == f"{MODULE}:images" and tasks.chance == 0.2
    assert learner.loss is cross_entropy and learner.metric is accuracy
    assert learner.init().params["body.block0.conv.weight"].shape[1] == 3


def test_a_settings_text_reaches_the_dataset_and_the_model() -> None:
    config = replace(quickstart.Config(), dataset_args=("size=14",), model_args=("width=4",))
    _, learner, tasks = assemble(config)
    assert draw(tasks.training, 1, 0).support.x.shape[-2:] == (14, 14)
    assert learner.init().params["head.weight"].shape == (5, 4)


def test_regression_gets_its_loss_and_a_model_of_its_sizes() -> None:
    for config in (sinusoid.Config(), flags(sampler="sinusoid", shots=4)):
        settled, learner, tasks = assemble(config)
        assert isinstance(tasks.training, Sinusoid) and tasks.chance is None and tasks.pretraining is None
        assert learner.loss is squared_error and learner.metric is squared_error
        assert settled.model == "mlp" and learner.init().params["head.weight"].shape == (1, 40)


def test_a_default_model_that_does_not_fit_gives_way_to_one_that_does(caplog: pytest.LogCaptureFixture) -> None:
    for sampler, model in (("sinusoid", "mlp"), (f"{MODULE}:texts", "bag"), (f"{MODULE}:images", "conv4")):
        caplog.clear()
        with caplog.at_level("INFO", "toolkit"):
            settled, learner, tasks = assemble(flags(sampler=sampler))
        assert settled.model == model and (model == "conv4" or f"--model {model}" in caplog.text)
        learner.rehearse(take(draw(tasks.training, 1, 0), 0))
    assert (
        assemble(replace(sinusoid.Config(), sampler=f"{MODULE}:images", shots=1, queries=2, eval_queries=2))[0].model == "mlp"
    ), "it takes any numbers"


def test_more_training_ways_than_test_ways_leave_the_other_outputs_out() -> None:
    _, learner, tasks = assemble(flags(train_ways=7, ways=5))
    assert learner.init().params["head.weight"].shape[0] == 7 and tasks.chance == 0.2
    plain = assemble(flags(ways=5))[1]
    meta = plain.init()
    cut = learner.init()._replace(
        params={
            n: torch.cat([p, torch.full((2, *p.shape[1:]), 0.5)]) if n.startswith("head") else p for n, p in meta.params.items()
        }
    )
    batch = draw(tasks.test, 3, 0)
    wanted, of_plain = meta_gradient(plain, meta, batch)
    found, of_cut = meta_gradient(learner, cut, batch)
    assert of_cut.loss == pytest.approx(of_plain.loss.item(), rel=1e-5)
    for name, gradient in wanted.params.items():
        assert torch.allclose(found.params[name][: len(gradient)], gradient, atol=1e-5), name
    assert not found.params["head.weight"][5:].any(), "the outputs beyond get no gradient"


def test_pretraining_on_all_classes_keeps_all_outputs() -> None:
    _, learner, _ = assemble(flags(train_ways=7, ways=5, algorithm="fine_tune"))
    assert learner.pretrain is not None and learner.pretrain.loss is cross_entropy and learner.loss is not cross_entropy


def test_augmentation_is_for_training_and_copies_for_the_others() -> None:
    _, _, tasks = assemble(flags(augment="crop-flip", support_copies=2))
    assert isinstance(tasks.training, Augmented) and tasks.training.copies == 0
    assert isinstance(tasks.test, Augmented) and (tasks.test.copies, tasks.test.queries) == (2, False)
    assert draw(tasks.test, 1, 0).support.x.shape[1] == 15 and draw(tasks.training, 1, 0).support.x.shape[1] == 5


def test_pretraining_is_augmented_as_training_is() -> None:
    kinds = [flags(augment=kind, algorithm="linear_probe") for kind in ("none", "crop-flip")]
    plain, augmented = (assemble(each)[2].pretraining for each in kinds)
    assert isinstance(augmented, Augmented) and isinstance(augmented.sampler, AllClasses) and plain is not None
    one, other = draw(plain, 4, 0), draw(augmented, 4, 0)
    assert torch.equal(one.query.y, other.query.y) and not torch.equal(one.query.x, other.query.x)


def test_test_classes_that_are_trained_on_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """As where datasets with splits of their own are mixed: here two of glyphs, one of which is shifted by a split."""
    assemble(flags())
    assert not caplog.text
    shifted = f"{MODULE}:shifted"
    assemble(replace(quickstart.Config(), sampler="mixed", sampler_args=(f"of=glyphs,{shifted}",)))
    (line,) = caplog.messages
    said = r"\d+ of the \d+ test classes are classes of train and val as well \(.*, \.\.\.\): they are not new to what is .*"
    assert re.fullmatch(said, line)


def test_a_model_without_a_seed_is_seeded_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(
        "from torch import nn\n\ndef net(inputs, outputs):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(inputs[0] * inputs[1] * inputs[2], outputs))\n"
    )
    torch.manual_seed(1)
    before = torch.get_rng_state()
    weights = [assemble(flags(model=f"{file}:net", seed=seed))[1].init().params["1.weight"] for seed in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


class Pair(torch.nn.Module):
    """A network of two inputs."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.head = torch.nn.Linear(4, outputs)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(torch.cat([a, b], -1))
        return found


def pairs(generator: torch.Generator) -> Task:
    def batch(n: int) -> Batch:
        y = torch.arange(3).repeat_interleave(n)
        return Batch({name: torch.randn(3 * n, 2, generator=generator) + y[:, None] for name in "ab"}, y)

    return Task(batch(1), batch(4))


SHORT: dict[str, Any] = {"iterations": 2, "tasks": 2, "val_tasks": 2, "eval_tasks": 3, "eval_steps": 2, "validate_every": 1}


@pytest.mark.parametrize("name", ["variable", "semi"])
def test_a_run_on_tasks_with_unlabelled_or_padded_examples_keeps_an_example_without_them(name: str, tmp_path: Path) -> None:
    own = {"variable": ("min_ways=2",), "semi": ("unlabelled=2", "distractors=1", "distractor_queries=2")}[name]
    asked = flags(sampler=name, dataset=f"{MODULE}:images", ways=6, sampler_args=own, out=tmp_path / "run", **SHORT)
    config, learner, tasks = assemble(asked)
    example = run(config, "toy", learner, *tasks).example
    drawn = take(draw(tasks.test, 1, 0, split="test"), 0)
    assert (drawn.query.y == IGNORED).any(), "there is something to leave out"
    assert torch.equal(example["query_y"], drawn.query.y[drawn.query.y >= 0])
    assert torch.equal(example["support_y"], drawn.support.y[drawn.support.y >= 0])
    assert len(example["support_x"]) == len(example["support_y"]) and len(example["query_x"]) == len(example["query_y"])
    ways = int(example["query_y"].max()) + 1
    assert example["predictions"].shape == (2, len(example["query_y"]), ways if name == "variable" else 6)
    assert (tmp_path / "run" / "task.png").exists()


def test_a_run_on_inputs_with_several_parts_ends_well_without_a_picture(tmp_path: Path) -> None:
    asked = flags(sampler=f"{MODULE}:pairs", model=f"{MODULE}:Pair", out=tmp_path / "run", **SHORT)
    config, learner, tasks = assemble(asked)
    done = run(config, "toy", learner, *tasks)
    assert done.summary["test"]["tasks"] == 3 and (tmp_path / "run" / "adaptation.png").exists()
    assert not (tmp_path / "run" / "task.png").exists()
    assert learner.init().params["head.weight"].shape == (3, 4)


REFUSED: dict[str, tuple[Any, str]] = {
    "unknown": (flags(sampler="sinusiod"), "unknown sampler 'sinusiod'; did you mean 'sinusoid'"),
    "no dataset": (replace(sinusoid.Config(), sampler=f"{MODULE}:FromBank"), "draws from a dataset; .*give --dataset"),
    "dataset for nothing": (flags(sampler="sinusoid", dataset="glyphs"), "draws from no dataset, so --dataset would"),
    "images for bag": (flags(model="bag"), r"--model bag takes feature numbers, but these tasks have square images"),
    "vectors for a chosen network": (flags(sampler="sinusoid", model="conv4-pool"), "takes square images.*use --model mlp"),
    "not square": (flags(sampler=f"{MODULE}:wide", model="conv4-pool"), r"have numbers of shape \(3, 8, 10\); use --model mlp"),
    "features": (
        flags(sampler=f"{MODULE}:texts", model="bag", model_args=("features=20",)),
        "knows feature numbers below 20, but these tasks have 49; give it more, as in --model.features",
    ),
    "unknown setting": (flags(model_args=("widht=4",)), "the model conv4 has no setting 'widht'; did you mean 'width'"),
    "setting of no dataset": (flags(dataset_args=("channels=3",)), "draws from no dataset, so --dataset would do nothing"),
    "setting of a dataset": (
        flags(dataset="glyphs", sampler="episodes", dataset_args=("siez=3",)),
        "has no setting 'siez'; did you mean 'size'",
    ),
    "wrong kind": (flags(model_args=("width=big",)), "--model width=big: width is a whole number"),
    "too many ways": (flags(train_ways=9), "9 ways need 9 classes, but tiny train has 7"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_one_sentence(case: str) -> None:
    given, sentence = REFUSED[case]
    with pytest.raises(UserError, match=sentence) as error:
        assemble(given)
    assert "\n" not in str(error.value)


def sized(generator: torch.Generator, shots: int = 10, queries: int = 10, gap: float = 1.0) -> Task:
    x = torch.randn(shots + queries, 1, generator=generator)
    return Task(Batch(x[:shots], gap * x[:shots]), Batch(x[shots:], gap * x[shots:]))


def two_rings(generator: torch.Generator) -> Task:
    x, y = torch.randn(8, 2, generator=generator), torch.arange(8) % 2
    return Task(Batch(x[:4], y[:4]), Batch(x[4:], y[4:]))


def test_a_function_of_a_generator_gets_the_sizes_and_settings_that_it_names() -> None:
    own = replace(sinusoid.Config(), sampler=f"{MODULE}:sized", shots=3, queries=4, eval_queries=5, sampler_args=("gap=2.0",))
    _, samplers, _ = splits(own)
    task = take(draw(samplers["test"], 1, 0), 0)
    assert len(task.support.y) == 3 and len(task.query.y) == 5 and torch.equal(task.query.y, 2 * task.query.x)
    with pytest.raises(UserError, match="has no setting 'shots'; a function of a generator"):
        splits(replace(own, sampler_args=("shots=2",)))


def test_results_are_labelled_by_the_sizes_that_tasks_have(tmp_path: Path) -> None:
    short = {"iterations": 1, "tasks": 2, "val_tasks": 2, "eval_tasks": 2, "eval_steps": 1, "compile": False}
    for name, sampler, words in (("own", "sized", ["3-shot"]), ("rings", "two_rings", [])):
        kind = replace(sinusoid.Config(), sampler=f"{MODULE}:{sampler}", model="mlp", shots=3, out=tmp_path / name, **short)
        sinusoid.main(kind)
        found = Run(tmp_path / name)
        assert size_words(found.config, found.summary) == words
    assert size_words({"ways": 5, "shots": 1}, {}) == ["5-way", "1-shot"], "runs of earlier versions did not look"


def test_a_size_that_differs_from_task_to_task_is_none() -> None:
    """Whatever the first task has, which may be as large as the flags say."""
    y = torch.tensor([[0, 1, 2, 3, 4], [0, 1, IGNORED, IGNORED, IGNORED], [0, 0, 1, 1, IGNORED]])
    batch = Batch(torch.zeros(3, 5, 1), y)

    def found(*chosen: int) -> dict[str, int | None]:
        return sizes(Task(*(Batch(batch.x[list(chosen)], batch.y[list(chosen)]),) * 2))

    assert found(0) == {"ways": 5, "shots": 1} and found(0, 1) == {"ways": None, "shots": 1}
    assert found(1, 2) == {"ways": 2, "shots": None} and found(2, 2) == {"ways": 2, "shots": 2}


def test_a_test_of_more_ways_than_validation_has() -> None:
    """Splits that are not needed are not made: here of 7 classes, where the test has 9."""
    own = flags(sampler=f"{MODULE}:uneven", ways=9, train_ways=7)
    with pytest.raises(UserError, match="val has 7"):
        assemble(own)
    _, _, tasks = assemble(own, needed=("test", "train"))
    assert int(draw(tasks.test, 1, 0).support.y.max()) == 8
    with pytest.raises(UserError, match="test has 9"):
        assemble(replace(own, ways=10), needed=("test", "train"))


def uneven(split: str) -> ClassBank:
    return images(split, classes=9 if split == "test" else 7)


def test_a_file_without_a_name_is_told_apart_from_a_short_name() -> None:
    with pytest.raises(UserError, match=r"names a file; say what to take from it, as in mine\.py:NAME"):
        splits(replace(sinusoid.Config(), sampler="mine.py"))


def test_pretrained_by_an_empty_word_is_a_sentence() -> None:
    """As by a variable of the shell that is not set; before, training began from random weights."""
    with pytest.raises(UserError, match=r"^--pretrained is empty; give a file or 'default', or leave it out$"):
        assemble(flags(pretrained=""))


class Wide(torch.nn.Sequential):
    """A model that is made for other data: it does not ask how many classes there are."""

    def __init__(self) -> None:
        super().__init__(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.LazyLinear(9))
        self(torch.zeros(1, 1, 8, 8))


def test_a_model_with_outputs_for_more_classes_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assemble(flags(model=f"{__name__}:Wide", head="2"))
    assert f"the model {__name__}:Wide has 9 outputs for 5 classes: it has to learn that there are no others" in caplog.text
    caplog.clear()
    assemble(flags())
    assert "outputs" not in caplog.text
