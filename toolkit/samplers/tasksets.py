"""learn2learn's Tasksets as samplers, and class banks as its MetaDatasets.

A Taskset draws from Python's `random` (and its data may from numpy and torch), so a task depends on all that was drawn before.
Here those three are seeded from the task's generator and put back afterwards.
"""

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from toolkit.data.bank import ClassBank
from toolkit.errors import UserError
from toolkit.randomness import kept, seed_all
from toolkit.samplers.episodes import as_input
from toolkit.task import Batch, Task, stream_seed

ISOLATED = threading.Lock()


@dataclass(frozen=True)
class FromTaskset:
    """The tasks of a learn2learn `Taskset` (0.2.0), fixed by the generator: no global random state has a say or is changed.

    The Taskset makes a batch (x, y) of ways * (shots + queries) examples with labels 0 .. ways - 1; the first `shots` of each
    label are the support set, the rest the query set, both ordered by label. Its cache of task descriptions is neither read nor
    filled. With `num_tasks` -1 every task is new; with n, it is one of n descriptions, which `seed` fixes, and only what
    happens to the data (augmentation, say) differs from one time to the next. Random numbers of CUDA are not isolated.

    Any experiment takes it from a file of yours, `--sampler my.py:tasks`:

        from learn2learn.data import MetaDataset, Taskset, transforms as t
        def tasks(split, ways, shots, queries):
            data = MetaDataset(my_dataset(split))
            steps = [t.FusedNWaysKShots(data, ways, shots + queries), t.LoadData(data), t.RemapLabels(data)]
            return FromTaskset(Taskset(data, steps), shots)

    Raises UserError, when made and for every task, for labels that are not integers 0 .. ways - 1 with the same number of
    examples each, more than `shots`; and when made, for a Taskset that cannot make a task.
    """

    taskset: Any
    shots: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shots < 1:
            raise UserError(f"{self.shots} shots; give at least 1")
        if not hasattr(self.taskset, "sample_task_description") or not hasattr(self.taskset, "get_task"):
            raise UserError(f"a {type(self.taskset).__name__} is no Taskset of learn2learn; give learn2learn.data.Taskset(...)")
        try:
            self(torch.Generator().manual_seed(0))
        except UserError:
            raise
        except Exception as error:  # whatever its dataset and transforms raise
            raise UserError(
                f"the Taskset cannot make a task ({type(error).__name__}: {error}); mend its dataset or transforms"
            ) from error

    def __call__(self, generator: torch.Generator) -> Task:
        fresh, pick = (int(n) for n in torch.randint(2**62, (2,), generator=generator))
        number = getattr(self.taskset, "num_tasks", -1)
        with seeded(fresh if number < 0 else stream_seed(self.seed, "taskset", pick % number)):
            description = self.taskset.sample_task_description()
            if number >= 0:
                seed_all(fresh, devices=False)
            made = self.taskset.get_task(description)
        if not isinstance(made, tuple | list) or len(made) != 2 or not isinstance(made[1], Tensor):
            raise UserError(
                f"the Taskset made a {type(made).__name__}; its tasks must be pairs (x, y), y the labels as a tensor"
            )
        return split_by_label(made[0], made[1], self.shots)


def split_by_label(x: Any, y: Tensor, shots: int) -> Task:
    """A batch in any order as a task: the first `shots` of each label, and the rest. Raises UserError as `FromTaskset`."""
    if y.is_floating_point() or y.dim() != 1 or not len(y):
        raise UserError(
            f"the Taskset made labels of {y.dtype} and shape {tuple(y.shape)}; it must make one integer for each example"
        )
    low, high = int(y.min()), int(y.max())
    counts = y.bincount().tolist() if low == 0 and high < len(y) else []
    if 0 in counts or not counts:
        raise UserError(
            f"the Taskset made labels from {low} to {high}, not all of 0 .. ways - 1; end its transforms with RemapLabels"
        )
    if min(counts) < max(counts):
        raise UserError(
            f"the Taskset made {min(counts)} to {max(counts)} examples per label; take as many of each, as by KShots"
        )
    if counts[0] <= shots:
        raise UserError(
            f"the Taskset made {counts[0]} examples per label, and {shots} are for the support set; make k = shots + queries"
        )
    order = y.argsort(stable=True).view(len(counts), counts[0])
    support, query = order[:, :shots].reshape(-1), order[:, shots:].reshape(-1)
    return Task(*(Batch(pytree.tree_map(lambda t, rows=rows: t[rows], x), y[rows]) for rows in (support, query)))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators of Python, numpy and torch (CPU) seeded, and put back as they were. One thread at a time."""
    with ISOLATED, kept(seed, devices=False):
        yield


def as_metadataset(bank: ClassBank) -> Any:
    """A bank as learn2learn's `MetaDataset`: item i is (input, class) of entry i; no item is read to make it."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            from learn2learn.data import MetaDataset
    except ImportError as error:
        raise UserError(f"learn2learn cannot be imported ({error}); run pip install -r requirements-learn2learn.txt") from None
    starts = bank.first.tolist()
    return MetaDataset(_Entries(bank), {c: list(range(starts[c], starts[c + 1])) for c in range(bank.classes)})


class _Entries(torch.utils.data.Dataset[tuple[Tensor, int]]):
    def __init__(self, bank: ClassBank) -> None:
        self.bank, self.labels = bank, torch.arange(bank.classes).repeat_interleave(bank.sizes).tolist()

    def __len__(self) -> int:
        return self.bank.entries

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return as_input(self.bank.read(torch.tensor(i))), self.labels[i]
