"""Mixtures of samplers: the same tasks however they are drawn, the right shares, and clear refusals."""

import pytest
import torch
from scipy.stats import chisquare

from tests.test_samplers import same
from toolkit import Batch, Task, TaskSampler, UserError, draw
from toolkit.data.bank import ClassBank
from toolkit.samplers import Episodes, Linear, Sinusoid
from toolkit.samplers.mixed import Mixed, mixed, together
from toolkit.task import Padded, generators


def bank(value: int, channels: int = 1, size: int = 4, classes: int = 6, source: str = "toy") -> ClassBank:
    """Images whose pixels are all `value` or up to 30 more, by item."""
    pixels = (value + torch.arange(classes * 5, dtype=torch.uint8)).view(-1, 1, 1, 1).repeat(1, channels, size, size)
    return ClassBank(pixels, torch.arange(classes + 1) * 5, tuple(map(str, range(classes))), source)


def plain(generator: torch.Generator) -> Task:
    """A function that draws sinusoids one at a time."""
    return Sinusoid(3, 4)(generator)


def episodes(value: int, ways: int = 2) -> Episodes:
    return Episodes(bank(value), ways=ways, shots=1, queries=2)


MIXTURES: dict[str, Mixed] = {
    "episodes": Mixed([episodes(0), episodes(100), episodes(200)], weights=[1, 2, 5]),
    "one": Mixed([episodes(0)]),
    "function and class": Mixed([plain, Sinusoid(3, 4)]),
    "nested": Mixed([Mixed([episodes(0), episodes(100)]), episodes(200)]),
}


def chosen(tasks: Task) -> torch.Tensor:
    """Which of the three banks each task comes from."""
    return (tasks.support.x[:, 0, 0, 0, 0] * 255).round().long() // 100  # type: ignore[index]


def test_a_task_is_what_its_sampler_draws_from_the_generator_as_the_choice_left_it() -> None:
    parts = [episodes(0), episodes(100), episodes(200)]
    mixture = Mixed(parts)
    for generator in generators(0, "train", range(20)):
        twin = generator.clone_state()
        share = torch.rand((), generator=twin, dtype=torch.float64).item()
        assert same(mixture(generator), parts[int(share * 3)](twin))


@pytest.mark.parametrize(("weights", "shares"), [(None, (1, 1, 1)), ([1, 2, 5], (1, 2, 5)), ((0.3, 0.1, 0.1), (3, 1, 1))])
def test_samplers_are_drawn_by_their_weights(weights: list[float] | None, shares: tuple[int, ...]) -> None:
    tasks = draw(Mixed([episodes(0), episodes(100), episodes(200)], weights), 3000, seed=0)
    expected = torch.tensor(shares, dtype=torch.float64) / sum(shares) * 3000
    assert chisquare(chosen(tasks).bincount(minlength=3), expected).pvalue > 1e-3


def varying(generator: torch.Generator) -> Task:
    """Two or three ways, in tasks of one size."""
    y = torch.arange(3) % int(torch.randint(2, 4, (), generator=generator))
    return Task(Batch(torch.zeros(3, 1), y), Batch(torch.zeros(3, 1), y))


class Told:
    """A sampler that says how many classes its tasks may have."""

    outputs = 7

    def __call__(self, generator: torch.Generator) -> Task:
        return varying(generator)


def test_outputs_are_the_most_that_any_sampler_says_or_shows() -> None:
    assert Mixed([episodes(0, ways=3), episodes(100, ways=3)]).outputs == 3
    assert Mixed([varying, varying]).outputs == 3
    assert Mixed([varying, Told()]).outputs == Mixed([Told(), varying]).outputs == 7
    assert Mixed([Sinusoid(), Sinusoid()]).outputs is None


def pixels(channels: int, size: int, source: str, ways: int = 2, queries: int = 2) -> Episodes:
    return Episodes(bank(0, channels, size, source=source), ways=ways, shots=1, queries=queries)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (
            [pixels(1, 28, "letters"), pixels(1, 28, "letters"), pixels(3, 32, "photos")],
            r"support.x of sampler 0 \(Episodes of letters\) is \(2, 1, 28, 28\) float32 and of "
            r"sampler 2 \(Episodes of photos\) \(2, 3, 32, 32\) float32; give both",
        ),
        ([pixels(1, 4, "a"), pixels(1, 4, "b", queries=3)], r"query.x of .* is \(4, 1, 4, 4\) .* \(6, 1, 4, 4\)"),
        ([pixels(1, 4, "a"), pixels(1, 4, "b", ways=3)], r"support.x of"),
        ([Sinusoid(), Linear(1)], r"support.x of sampler 0 \(Sinusoid\) is \(10, 1\) float32 and .*\(10, 1\) float64"),
    ],
)
def test_samplers_whose_tasks_differ_are_named_when_the_mixture_is_made(others: list[TaskSampler], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Mixed(others)
    assert "\n" not in str(caught.value)


def test_padded_and_plain_tasks_do_not_mix() -> None:
    def padded(generator: torch.Generator) -> Task:
        support, query = varying(generator)
        x = Padded(torch.zeros(3, 1), torch.ones(3, dtype=torch.bool))
        return Task(support._replace(x=x), query)

    with pytest.raises(UserError, match=r"support.x of sampler 0 \(varying\) is \(3, 1\) float32 and .*\(padded\) missing"):
        Mixed([varying, padded])


def rarely_longer(generator: torch.Generator) -> Task:
    n = 4 if torch.rand((), generator=generator) < 0.05 else 3
    return Task(Batch(torch.zeros(n, 1), torch.zeros(n, 1)), Batch(torch.zeros(4, 1), torch.zeros(4, 1)))


def test_tasks_that_turn_out_to_differ_in_shape_are_a_user_error_of_one_sentence() -> None:
    with pytest.raises(UserError, match="differ in shape") as caught:
        draw(Mixed([rarely_longer, Sinusoid(3, 4)]), 300, seed=0)
    assert "\n" not in str(caught.value)
    for found in (rarely_longer, Sinusoid(3, 4)):
        assert together(found, [torch.Generator().manual_seed(1)]).query.y.shape == (1, 4, 1)


class Lying:
    """A sampler whose tasks in a batch are longer than it shows in the first batch."""

    calls = 0

    def __call__(self, generator: torch.Generator) -> Task:
        return Sinusoid(3, 4)(generator)

    def draw_many(self, streams: object) -> Task:
        self.calls += 1
        return Sinusoid(3 if self.calls == 1 else 5, 4).draw_many(streams)  # type: ignore[arg-type]


def test_batches_that_turn_out_to_differ_name_the_samplers() -> None:
    with pytest.raises(UserError, match=r"\(sampler 0 \(Sinusoid\), sampler 1 \(Lying\)\) differ in shape"):
        draw(Mixed([Sinusoid(3, 4), Lying()]), 20, seed=0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1], "1 weights were given for 2 samplers"),
        ([1, 2, 3], "3 weights were given for 2 samplers"),
        ([1, -1], "the weight -1 of the mixture is not a positive number"),
        ([0, 1], "the weight 0 of"),
        ([1, float("nan")], "the weight nan of"),
        ([float("inf"), 1], "the weight inf of"),
        (["1", 1], "the weight '1' of"),
    ],
)
def test_bad_weights_are_a_user_error(weights: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mixed([Sinusoid(), Sinusoid()], weights)


def test_nothing_to_mix_is_a_user_error() -> None:
    with pytest.raises(UserError, match="no samplers were given"):
        Mixed([])
    with pytest.raises(
        UserError, match=r"sampler 1 of the mixture is Sinusoid, which draws no tasks; give .* Sinusoid\(\.\.\.\)"
    ):
        Mixed([Sinusoid(), Sinusoid])  # type: ignore[list-item]
    with pytest.raises(UserError, match="sampler 0 of the mixture is str"):
        Mixed(["sinusoid"])  # type: ignore[list-item]


def test_the_command_line_mixes_datasets_and_samplers_by_name() -> None:
    made = mixed("val", ways=3, shots=2, queries=3, of="glyphs, tests/test_mixed.py:letters", weights="3, 1")
    assert made.weights == (3.0, 1.0) and made.outputs == 3
    first, second = made.samplers
    assert isinstance(first, Episodes) and isinstance(second, Episodes)
    assert (first.ways, first.shots, first.queries) == (second.ways, second.shots, second.queries) == (3, 2, 3)
    assert first.bank.source.startswith("glyphs") and second.bank.source == "letters val"
    functions = mixed("train", shots=3, queries=4, of="sinusoid,tests/test_mixed.py:plain")
    assert functions.samplers[0] == Sinusoid(3, 4) and functions.samplers[1].__name__ == "plain"  # type: ignore[attr-defined]
    for split, sign in (("train", 1), ("test", -1)):
        (line,) = mixed(split, shots=3, of="tests/test_mixed.py:lines").samplers
        task = line(torch.Generator())
        assert bool((task.support.y == sign * task.support.x).all()) and len(task.support.y) == 3


def lines(generator: torch.Generator, split: str = "train", shots: int = 5) -> Task:
    """A sampler that is a plain function and takes its split and sizes."""
    x = torch.randn(2 * shots, 1, generator=generator)
    y = x if split == "train" else -x
    return Task(Batch(x[:shots], y[:shots]), Batch(x[shots:], y[shots:]))


def letters(split: str) -> ClassBank:
    """A dataset of the size of glyphs."""
    return bank(0, size=28, source=f"letters {split}")


@pytest.mark.parametrize(
    ("of", "weights", "message"),
    [
        ("sinusoid,sinusoit", "", "unknown dataset or sampler 'sinusoit'; did you mean 'sinusoid'"),
        ("sinusoid,sinusoid", "1,two", "weights '1,two' of the mixture are not numbers"),
        ("sinusoid,sinusoid", "1", "1 weights were given for 2 samplers"),
    ],
)
def test_bad_names_and_weights_on_the_command_line_are_user_errors(of: str, weights: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mixed("train", shots=1, queries=2, of=of, weights=weights)
