"""Task samplers: the same tasks however they are drawn, uniform draws, disjoint sets, and clear errors."""

import hashlib
from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from torch import Tensor
from torch.utils import _pytree as pytree

from toolkit import Batch, Task, TaskSampler, UserError, draw
from toolkit.data.bank import ClassBank
from toolkit.samplers import AllClasses, Episodes, Linear, Sinusoid
from toolkit.samplers.episodes import distinct
from toolkit.samplers.linear import adapted
from toolkit.task import count, fingerprint, generators, stream_seed, take

SIZES = (6, 9, 7, 12, 8, 10, 6)


def bank(sizes: tuple[int, ...] = SIZES) -> ClassBank:
    """Images of two pixels: the class number, and ten times the item's number within its class."""
    pixels = [torch.tensor([[c, 10 * i] for i in range(size)], dtype=torch.uint8) for c, size in enumerate(sizes)]
    first = torch.tensor([0, *sizes]).cumsum(0)
    names = tuple(f"class-{c}" for c in range(len(sizes)))
    return ClassBank(torch.cat(pixels).view(-1, 1, 1, 2), first, names, "toy")


def decode(x: Tensor) -> tuple[Tensor, Tensor]:
    """The class and the item number of each image."""
    pixels = (x * 255).round().long()
    return pixels[..., 0, 0, 0], pixels[..., 0, 0, 1] // 10


def plain(generator: torch.Generator) -> Task:
    """A sampler that is only a function, with a dict for x."""

    def batch(n: int) -> Batch:
        tokens = torch.randint(50, (n, 4), generator=generator)
        return Batch({"tokens": tokens, "mask": tokens > 10}, torch.randint(3, (n,), generator=generator))

    return Task(batch(3), batch(5))


SAMPLERS: dict[str, TaskSampler] = {
    "episodes": Episodes(bank(), ways=3, shots=2, queries=3),
    "all classes": AllClasses(bank(), queries=5),
    "sinusoid": Sinusoid(4, 6),
    "linear": Linear(3, 4, 6),
    "function": plain,
}


def same(a: object, b: object) -> bool:
    return all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    )


def digest_of(*batches: Task) -> str:
    digest = hashlib.sha256()
    for tasks in batches:
        fingerprint(tasks, digest)
    return digest.hexdigest()


def test_stream_seeds_are_63_bits_and_never_shared() -> None:
    seeds = [stream_seed(seed, split, i) for seed in (0, 1, 11) for split in ("train", "val") for i in range(2000)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62


def test_generators_are_as_if_each_were_new() -> None:
    """A generator that was used in part before it is reseeded must not hand on anything (randn keeps a spare number)."""
    for index, generator in zip((4, 9), generators(1, "val", [4, 9]), strict=True):
        fresh = torch.Generator().manual_seed(stream_seed(1, "val", index))
        for _ in range(2):
            assert torch.equal(torch.randn(3, generator=generator), torch.randn(3, generator=fresh))


def test_support_and_query_are_disjoint_with_exact_counts_per_label() -> None:
    tasks = draw(Episodes(bank(), ways=4, shots=2, queries=3), 2000, seed=0)
    assert torch.equal(tasks.support.y, torch.arange(4).repeat_interleave(2).expand(2000, -1))
    assert torch.equal(tasks.query.y, torch.arange(4).repeat_interleave(3).expand(2000, -1))
    (support_class, support_item), (query_class, query_item) = decode(tasks.support.x), decode(tasks.query.x)
    of_label = support_class.view(2000, 4, 2)[:, :, 0]
    assert torch.equal(support_class, of_label.gather(1, tasks.support.y)), "one class per label in the support set"
    assert torch.equal(query_class, of_label.gather(1, tasks.query.y)), "the same class in the query set"
    assert all(len(set(row)) == 4 for row in of_label.tolist()), "labels are different classes"
    ids = torch.cat([1000 * support_class + support_item, 1000 * query_class + query_item], 1)
    assert all(len(set(row)) == 20 for row in ids.tolist()), "no item twice"


def test_every_class_is_equally_likely_for_every_label_and_every_item_for_its_class() -> None:
    tasks = draw(Episodes(bank(), ways=3, shots=1, queries=2), 7000, seed=0)
    classes, items = decode(tasks.support.x)
    for label in range(3):
        assert chisquare(classes[:, label].bincount(minlength=len(SIZES))).pvalue > 1e-3
    query_classes, query_items = decode(tasks.query.x)
    for c, size in enumerate(SIZES):
        assert chisquare(items[classes == c].bincount(minlength=size)).pvalue > 1e-3
        assert chisquare(query_items[query_classes == c].bincount(minlength=size)).pvalue > 1e-3


def test_pairs_of_classes_are_uniform_over_ordered_pairs() -> None:
    classes, _ = decode(draw(Episodes(bank(), ways=2, shots=1, queries=1), 8400, seed=1).support.x)
    pairs = (classes[:, 0] * 7 + classes[:, 1]).bincount(minlength=49).view(7, 7)
    assert (pairs.diagonal() == 0).all()
    assert chisquare(pairs[~torch.eye(7, dtype=torch.bool)]).pvalue > 1e-3


@pytest.mark.parametrize(("size", "k"), [(5, 3), (4, 4), (6, 1), (7, 2)])
def test_distinct_is_uniform_over_ordered_selections(size: int, k: int) -> None:
    noise = torch.rand(60_000, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = distinct(noise, torch.tensor(size))
    number = {selection: i for i, selection in enumerate(permutations(range(size), k))}
    counts = np.zeros(len(number))
    for row in drawn.tolist():
        counts[number[tuple(row)]] += 1
    assert counts.sum() == 60_000
    assert chisquare(counts).pvalue > 1e-3


def test_distinct_never_repeats_for_unequal_sizes() -> None:
    g = torch.Generator().manual_seed(0)
    sizes = torch.randint(4, 30, (5000, 3), generator=g)
    drawn = distinct(torch.rand(5000, 3, 4, generator=g, dtype=torch.float64), sizes)
    assert drawn.shape == (5000, 3, 4)
    assert ((drawn >= 0) & (drawn < sizes[..., None])).all()
    assert (drawn.sort(-1).values.diff() > 0).all()
    for size in (4, 17):
        assert chisquare(drawn[sizes == size].reshape(-1).bincount(minlength=size)).pvalue > 1e-3


def test_distinct_holds_at_the_ends_of_the_noise() -> None:
    top = float(np.nextafter(1, 0))
    assert distinct(torch.zeros(4, dtype=torch.float64), torch.tensor(4)).tolist() == [0, 1, 2, 3]
    assert distinct(torch.full((4,), top, dtype=torch.float64), torch.tensor(4)).tolist() == [3, 2, 1, 0]
    assert int(distinct(torch.full((1,), top, dtype=torch.float64), torch.tensor(2**52))) == 2**52 - 1


def test_all_classes_and_all_items_can_be_used_up() -> None:
    drawn = draw(Episodes(bank((5, 5, 5)), ways=3, shots=2, queries=3), 50, seed=0)
    (classes, items), (_, others) = decode(drawn.support.x), decode(drawn.query.x)
    assert (classes.view(50, 3, 2)[:, :, 0].sort(1).values == torch.arange(3)).all()
    together = torch.cat([items.view(50, 3, 2), others.view(50, 3, 3)], 2)
    assert (together.sort(2).values == torch.arange(5)).all()


def test_uint8_items_become_floats_in_zero_to_one_and_floats_are_kept() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).repeat(2, 1, 1, 1)
    whole = ClassBank(pixels, torch.tensor([0, 256, 512]), ("a", "b"))
    task = take(draw(Episodes(whole, ways=2, shots=1, queries=255), 1, seed=0), 0)
    seen = torch.cat([task.support.x, task.query.x])
    assert seen.dtype == torch.float32
    assert torch.equal(seen.flatten().sort().values, (torch.arange(256).float() / 255).repeat_interleave(2))
    for dtype in (torch.float32, torch.float64):
        values = torch.linspace(-3, 300, 12, dtype=dtype)
        floats = ClassBank(values, torch.tensor([0, 6, 12]), ("a", "b"))
        task = take(draw(Episodes(floats, ways=2, shots=2, queries=4), 1, seed=0), 0)
        assert task.support.x.dtype == dtype
        assert torch.equal(torch.cat([task.support.x, task.query.x]).sort().values, values)


def test_drawing_never_changes_the_bank() -> None:
    whole = bank()
    before = whole.items.clone()
    task = draw(Episodes(whole, ways=3, shots=2, queries=3), 4, seed=0)
    task.support.x.zero_()
    assert torch.equal(whole.items, before)


def test_all_classes_are_labelled_by_their_number_in_the_bank() -> None:
    tasks = draw(AllClasses(bank(), queries=5), 200, seed=0)
    assert tasks.support.x.shape == (200, 1, 1, 1, 2) and tasks.query.x.shape == (200, 5, 1, 1, 2)
    for batch in tasks:
        classes, items = decode(batch.x)
        assert batch.y.dtype == torch.int64 and torch.equal(classes, batch.y)
        assert (items < torch.tensor(SIZES)[classes]).all()


def test_all_classes_are_equally_likely_whatever_their_size_and_so_are_the_items_of_each() -> None:
    tasks = draw(AllClasses(bank(), queries=9), 2000, seed=0)
    assert chisquare(tasks.support.y.flatten().bincount(minlength=len(SIZES))).pvalue > 1e-3
    assert chisquare(tasks.query.y.flatten().bincount(minlength=len(SIZES))).pvalue > 1e-3
    classes, items = decode(torch.cat([tasks.support.x, tasks.query.x], 1))
    for c, size in enumerate(SIZES):
        assert chisquare(items[classes == c].bincount(minlength=size)).pvalue > 1e-3


@pytest.mark.parametrize("sizes", [(1, 7, 3), (5,), (2, 1)])
def test_all_classes_reach_the_first_and_the_last_item_of_the_bank_and_nothing_beyond(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = AllClasses(bank(sizes), queries=2)
    for noise, ends in ((0.0, (0, 0)), (float(np.nextafter(1, 0)), (len(sizes) - 1, sizes[-1] - 1))):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *shape, noise=noise, **kind: torch.full(shape, noise, dtype=kind["dtype"]))
            task = sampler(torch.Generator())
        classes, items = decode(torch.cat([task.support.x, task.query.x]))
        assert set(zip(classes.tolist(), items.tolist(), strict=True)) == {ends}
        assert set(torch.cat([task.support.y, task.query.y]).tolist()) == {ends[0]}


@pytest.mark.parametrize("queries", [0, -3])
def test_a_batch_of_no_items_of_all_classes_is_a_user_error(queries: int) -> None:
    with pytest.raises(UserError, match=f"^{queries} items per batch; give at least 1$"):
        AllClasses(bank(), queries)


def test_too_many_ways_name_the_bank_and_the_flag() -> None:
    with pytest.raises(UserError, match="8 ways need 8 classes, but toy has 7; use --ways 7"):
        Episodes(bank(), ways=8, shots=1, queries=1)


def test_too_many_items_name_the_smallest_class_and_the_flag() -> None:
    with pytest.raises(UserError, match=r"need 11 images per class, but class 'class-2' of toy has 4; use --queries 3 "):
        Episodes(bank((9, 12, 4, 6)), ways=2, shots=1, queries=10)
    with pytest.raises(UserError, match=r"class 'class-1' of toy has 4; use fewer shots than 4"):
        Episodes(bank((9, 4)), ways=2, shots=4, queries=1)
    Episodes(bank((9, 4)), ways=2, shots=1, queries=3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Episodes(bank(), ways=0),
        lambda: Episodes(bank(), ways=2, shots=0),
        lambda: Episodes(bank(), ways=2, queries=0),
        lambda: Sinusoid(shots=0),
        lambda: Sinusoid(queries=-1),
        lambda: Linear(inputs=0),
        lambda: Linear(shots=0),
        lambda: Linear(queries=0),
    ],
)
def test_nothing_to_draw_is_a_user_error(make: Callable[[], TaskSampler]) -> None:
    with pytest.raises(UserError, match="must be at least 1"):
        make()


def test_a_bank_whose_parts_do_not_fit_is_a_user_error() -> None:
    for first, names in (([0, 3, 5], ("a", "b")), ([0, 6], ("a", "b"))):
        with pytest.raises(UserError, match="class starts"):
            ClassBank(torch.zeros(6), torch.tensor(first), names)


def test_selected_classes_keep_their_items_and_names() -> None:
    part = bank().select([4, 1], "some")
    assert (part.names, part.source, part.sizes.tolist()) == (("class-4", "class-1"), "some", [8, 9])
    numbers, items = decode(part.read(torch.arange(part.entries)) / 255)
    assert numbers.tolist() == [4] * 8 + [1] * 9
    assert items.tolist() == [*range(8), *range(9)]


def test_sinusoids_are_sinusoids_within_their_ranges() -> None:
    tasks = draw(Sinusoid(10, 10), 2000, seed=0)
    assert tasks.support.x.shape == tasks.query.y.shape == (2000, 10, 1)
    x = torch.cat([tasks.support.x, tasks.query.x], 1)[..., 0].double()
    y = torch.cat([tasks.support.y, tasks.query.y], 1).double()
    fit = torch.linalg.lstsq(torch.stack([x.sin(), x.cos()], -1), y).solution
    residual = torch.stack([x.sin(), x.cos()], -1) @ fit - y
    assert residual.abs().max() < 1e-4
    amplitude, phase = fit.norm(dim=1)[:, 0], torch.atan2(-fit[:, 1, 0], fit[:, 0, 0])
    assert amplitude.min() > 0.1 - 1e-4 and amplitude.max() < 5 + 1e-4
    assert phase.min() > -1e-4 and phase.max() < torch.pi + 1e-4
    assert x.min() >= -5 and x.max() <= 5
    assert kstest(amplitude, "uniform", (0.1, 4.9)).pvalue > 1e-3
    assert kstest(phase, "uniform", (0, torch.pi)).pvalue > 1e-3
    assert kstest(x.flatten(), "uniform", (-5, 10)).pvalue > 1e-3


def test_linear_tasks_are_linear_with_the_given_noise() -> None:
    clean = draw(Linear(3, 8, 8, noise=0), 500, seed=0)
    x, y = torch.cat([clean.support.x, clean.query.x], 1), torch.cat([clean.support.y, clean.query.y], 1)
    design = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    weights = torch.linalg.lstsq(design, y).solution
    assert (design @ weights - y).abs().max() < 1e-9
    assert kstest(weights.flatten(), "norm").pvalue > 1e-3
    assert kstest(x.flatten(), "norm").pvalue > 1e-3
    noisy = draw(Linear(3, 8, 8, noise=0.2), 500, seed=0)
    noise = torch.cat([noisy.support.y - clean.support.y, noisy.query.y - clean.query.y], 1)
    assert kstest(noise.flatten() / 0.2, "norm").pvalue > 1e-3


@pytest.mark.parametrize("shots", [2, 10])
@pytest.mark.parametrize("steps", [0, 1, 3, 7])
def test_adapted_in_closed_form_equals_plain_gradient_descent(steps: int, shots: int) -> None:
    """With two shots the least-squares solution is not unique; the closed form holds there as well."""
    support = take(draw(Linear(3, shots, 5), 1, seed=4), 0).support
    start = torch.randn(4, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theta = start.clone()
    for _ in range(steps):
        theta.requires_grad_()
        loss = (support.x @ theta[:3] + theta[3] - support.y).square().mean()
        theta = (theta - 0.1 * torch.autograd.grad(loss, theta)[0]).detach()
    found = adapted(start, support, 0.1, steps)
    assert (found - theta).abs().max() < 1e-12
    assert steps == 0 or (found - start).abs().max() > 1e-2


@pytest.mark.parametrize("tasks", [0, -1])
def test_drawing_no_tasks_is_a_user_error(tasks: int) -> None:
    with pytest.raises(UserError, match=f"cannot draw {tasks} tasks"):
        draw(Sinusoid(), tasks, seed=0)


def test_tasks_of_different_shapes_are_a_user_error_of_one_sentence() -> None:
    def ragged(generator: torch.Generator) -> Task:
        n = int(torch.randint(1, 20, (), generator=generator))
        return Task(Batch(torch.zeros(n, 2), torch.zeros(n)), Batch(torch.zeros(3, 2), torch.zeros(3)))

    with pytest.raises(UserError, match="tasks 4 to 9 of the sampler differ in shape") as caught:
        draw(ragged, 6, seed=0, start=4)
    assert "\n" not in str(caught.value)
    assert draw(ragged, 1, seed=0).query.y.shape == (1, 3)


def test_tasks_with_different_keys_are_a_user_error_of_one_sentence() -> None:
    def changing(generator: torch.Generator) -> Task:
        key = "ab"[int(torch.randint(2, (), generator=generator))]
        return Task(Batch({key: torch.zeros(2)}, torch.zeros(2)), Batch({key: torch.zeros(2)}, torch.zeros(2)))

    with pytest.raises(UserError, match="tasks 0 to 9 of the sampler differ") as caught:
        draw(changing, 10, seed=0)
    assert "\n" not in str(caught.value)


def test_an_error_of_the_sampler_itself_is_not_hidden() -> None:
    def broken(generator: torch.Generator) -> Task:
        raise RuntimeError("my own")

    with pytest.raises(RuntimeError, match="my own"):
        draw(broken, 2, seed=0)


def test_a_function_with_a_dict_for_x_can_be_drawn_from() -> None:
    tasks = draw(plain, 6, seed=0)
    assert isinstance(tasks.support.x, dict)
    assert tasks.support.x["tokens"].shape == (6, 3, 4)
    assert torch.equal(tasks.query.x["mask"], tasks.query.x["tokens"] > 10)  # type: ignore[index]
    assert count(tasks) == 6


def test_the_fingerprint_sees_every_value_dtype_and_shape() -> None:
    whole = draw(Sinusoid(2, 2), 3, seed=0)
    seen = {digest_of(whole), digest_of(pytree.tree_map(lambda t: t.double(), whole))}
    seen.add(digest_of(pytree.tree_map(lambda t: t.view(3, 1, 2), whole)))
    for i in range(4):
        leaves, spec = pytree.tree_flatten(pytree.tree_map(torch.clone, whole))
        leaves[i][2, 1] += 1e-3
        seen.add(digest_of(pytree.tree_unflatten(leaves, spec)))
    assert len(seen) == 7
