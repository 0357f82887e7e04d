"""Every sampler by every property that the protocol promises: the same tasks however they are drawn, and nothing global."""

import random

import numpy as np
import pytest
import torch

from tests import test_augment, test_curves, test_mixed, test_padded, test_samplers, test_semi
from tests.test_samplers import digest_of, same
from toolkit import TaskSampler, draw
from toolkit.task import count, stream_seed, take

TABLES: dict[str, dict[str, TaskSampler]] = {
    "plain": test_samplers.SAMPLERS,
    "curves": test_curves.SAMPLERS,
    "variable": {**test_padded.TOY},
    "semi": {**test_semi.TOY},
    "mixed": {**test_mixed.MIXTURES},
    "augmented": {**test_augment.WAYS},
}
SAMPLERS = {f"{table}: {name}": sampler for table, cases in TABLES.items() for name, sampler in cases.items()}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_batch_of_tasks_equals_single_calls(name: str) -> None:
    drawn = draw(SAMPLERS[name], 20, seed=3, start=5)
    assert count(drawn) == 20
    for i in range(20):
        generator = torch.Generator().manual_seed(stream_seed(3, "train", 5 + i))
        assert same(take(drawn, i), SAMPLERS[name](generator))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_task_does_not_depend_on_the_batch_it_is_drawn_in(name: str) -> None:
    whole = draw(SAMPLERS[name], 40, seed=3)
    assert same(draw(SAMPLERS[name], 20, seed=3, start=5), take(whole, slice(5, 25)))
    for i in (0, 7, 39):
        assert same(draw(SAMPLERS[name], 1, seed=3, start=i), take(whole, slice(i, i + 1)))


@pytest.mark.parametrize("name", SAMPLERS)
def test_tasks_differ_over_seed_split_and_index(name: str) -> None:
    batches = [draw(SAMPLERS[name], 10, seed, 0, split) for seed in (0, 1, 2) for split in ("train", "val", "test")]
    tasks = [digest_of(take(tasks, slice(i, i + 1))) for tasks in batches for i in range(10)]
    assert len(set(tasks)) == len(tasks) == 90


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_global_random_state_is_read_or_written(name: str) -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()
        found.append(draw(SAMPLERS[name], 5, seed=0))
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert random.getstate() == python_state
        assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))
    assert same(*found)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_fingerprint_does_not_depend_on_how_tasks_are_batched(name: str) -> None:
    whole = draw(SAMPLERS[name], 12, seed=0)
    pieces = [draw(SAMPLERS[name], n, seed=0, start=start) for start, n in ((0, 5), (5, 6), (11, 1))]
    assert digest_of(whole) == digest_of(*pieces)
    assert digest_of(whole) != digest_of(*pieces[:2])
    assert digest_of(whole) != digest_of(pieces[1], pieces[0], pieces[2])
    assert digest_of(whole) != digest_of(draw(SAMPLERS[name], 12, seed=1))
