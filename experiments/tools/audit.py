"""Counts equal items of the data sets and audits 10,000 tasks of every sampler, for results/datasets.json and datasets.md.

    python -m experiments.tools.audit --data-root data

Items are compared as the bank holds them: by hash, and then value by value. Of a bank whose classes are also turned, a drawing
that equals another, or itself, turned by 90, 180 or 270 degrees is counted apart. Samplers are looked at by `check_sampler`.
The tables are put between the two markers of the page. It takes about ten minutes on two idle cores.
"""

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import toolkit
from experiments.tools.audit_tables import FIGURES, PAGE, SPLITS, Pair, page, tables
from toolkit import plugins
from toolkit.data.bank import ClassBank
from toolkit.files import replace
from toolkit.samplers import (
    AllClasses,
    Augmented,
    Completion,
    Episodes,
    FromTaskset,
    Harmonics,
    Linear,
    Loaders,
    Mixed,
    SineOrLine,
    Sinusoid,
    Steps,
    check_sampler,
    crop_flip,
)
from toolkit.samplers.audit import hashes
from toolkit.samplers.episodes import as_input
from toolkit.samplers.semi import SemiEpisodes
from toolkit.samplers.tasksets import as_metadataset
from toolkit.samplers.variable import VariableEpisodes
from toolkit.task import TaskSampler

DATASETS = ("glyphs", "omniglot-vinyals", "omniglot-background", "cifar-fs-30", "fc100-30", "clinc150")
COMMAND = "python -m experiments.tools.audit --data-root data"
TASKS = 10_000
PIECE = 4096  # items hashed at once


def equal_pairs(dataset: str, banks: Mapping[str, ClassBank]) -> list[Pair]:
    """Every pair of equal items in the `banks` of the splits, once, however many turns of the two are equal."""
    places = [(split, entry) for split, bank in banks.items() for entry in range(bank.entries)]
    found = torch.cat([_hashes(bank) for bank in banks.values()])
    order = found.argsort(stable=True)
    _, counts = found[order].unique_consecutive(return_counts=True)
    pairs: dict[tuple[frozenset[tuple[str, int]], bool], Pair] = {}
    ends = counts.cumsum(0)
    for group in (counts > 1).nonzero().flatten().tolist():
        members = [places[i] for i in order[int(ends[group] - counts[group]) : int(ends[group])].tolist()]
        for (one, a), (other, b) in combinations(members, 2):
            (item, turn), (item_b, turn_b) = _drawing(banks[one], a), _drawing(banks[other], b)
            if (turn and turn_b) or not torch.equal(_read(banks[one], a), _read(banks[other], b)):
                continue  # of two turned items, the pair is also there with both turned back
            own = (one, item) == (other, item_b)
            kind = "itself" if own else "turned" if turn != turn_b else "equal"
            key = frozenset({(one, item), (other, item_b)}), turn != turn_b
            pairs.setdefault(key, Pair(dataset, kind, (one, _class(banks[one], a)), (other, _class(banks[other], b))))
    return sorted(pairs.values())


def _hashes(bank: ClassBank) -> Tensor:
    return torch.cat([hashes(bank.read(piece)) for piece in torch.arange(bank.entries).split(PIECE)])


def _read(bank: ClassBank, entry: int) -> Tensor:
    return bank.read(torch.tensor(entry))


def _drawing(bank: ClassBank, entry: int) -> tuple[int, int]:
    """The item of an entry, and how many times it is turned by 90 degrees."""
    row = entry if bank.rows is None else int(bank.rows[entry])
    return row % len(bank.items), row // len(bank.items)


def _class(bank: ClassBank, entry: int) -> str:
    return bank.names[int(torch.searchsorted(bank.first, entry, right=True)) - 1]


def dataset_rows(dataset: str, banks: Mapping[str, ClassBank], pairs: list[Pair]) -> list[dict[str, Any]]:
    """One row for each split: classes, entries (turned ones too), distinct items, and the pairs of equal items within it."""
    rows = []
    for split, bank in banks.items():
        inside = [pair for pair in pairs if pair.one[0] == pair.other[0] == split]
        numbers = torch.arange(bank.entries) if bank.rows is None else bank.rows % len(bank.items)
        row = {"dataset": dataset, "split": split, "classes": bank.classes, "entries": bank.entries}
        row |= {"items": len(numbers.unique()), "turns": bank.rows is not None and int(bank.rows.max()) >= len(bank.items)}
        row["same class"] = sum(pair.kind == "equal" and pair.one == pair.other for pair in inside)
        row["two classes"] = sum(pair.kind == "equal" and pair.one != pair.other for pair in inside)
        rows.append(row | {kind: sum(pair.kind == kind for pair in inside) for kind in ("turned", "itself")})
    return rows


Make = Callable[[str, Path], TaskSampler]


def bank_of(dataset: str, split: str, root: Path) -> ClassBank:
    """The bank of a data set, by its short name."""
    given = {"split": split, "data_root": root, "download": False}
    bank: ClassBank = plugins.call(plugins.resolve(dataset, "datasets"), given, {}, dataset)
    return bank


def _episodes(dataset: str, split: str, root: Path) -> TaskSampler:
    return Episodes(bank_of(dataset, split, root), 5, 1, 15)


def _loaders(split: str, root: Path) -> TaskSampler:
    """DataLoaders of glyphs, each of 5 classes; their labels are dealt anew in every task."""
    bank, labels = bank_of("glyphs", split, root), torch.arange(5).repeat_interleave(20)
    groups = [range(first, first + 5) for first in range(0, bank.classes - 4, 5)]
    sets = [TensorDataset(as_input(bank.read(torch.arange(20 * g[0], 20 * g[-1] + 20))), labels) for g in groups]
    return Loaders([DataLoader(each) for each in sets], 1, 15, per_class=True, permute=True)


def _taskset(split: str, root: Path) -> TaskSampler:
    data = as_metadataset(bank_of("glyphs", split, root))
    from learn2learn.data import Taskset
    from learn2learn.data import transforms as t

    return FromTaskset(Taskset(data, [t.FusedNWaysKShots(data, 5, 5), t.LoadData(data), t.RemapLabels(data)]), 1)


def _bound(dataset: str, make: Callable[[ClassBank], TaskSampler], split: str, root: Path) -> TaskSampler:
    return make(bank_of(dataset, split, root))


def _mixed(split: str, root: Path) -> TaskSampler:
    return Mixed([_episodes("omniglot-vinyals", split, root), _episodes("glyphs", split, root)])


def _augmented(split: str, root: Path) -> TaskSampler:
    """As experiments do it: crop and flip in training, in tests one changed copy of each support image beside it."""
    plain = _episodes("omniglot-vinyals", split, root)
    return Augmented(plain, crop_flip) if split == "train" else Augmented(plain, crop_flip, copies=1, queries=False)


def _family(make: Callable[[], TaskSampler], split: str, root: Path) -> TaskSampler:
    return make()


# Every sampler of the table: its name, what it draws from, and what makes that of a split.
SAMPLERS: dict[tuple[str, str], Make] = {
    **{("Episodes", dataset): partial(_episodes, dataset) for dataset in DATASETS},
    ("VariableEpisodes", "omniglot-vinyals"): partial(_bound, "omniglot-vinyals", VariableEpisodes),
    ("SemiEpisodes", "omniglot-vinyals"): partial(
        _bound, "omniglot-vinyals", partial(SemiEpisodes, queries=10, distractors=3, distractor_queries=5)
    ),
    ("Augmented(Episodes)", "omniglot-vinyals"): _augmented,
    ("Mixed(Episodes, Episodes)", "omniglot-vinyals, glyphs"): _mixed,
    ("Completion", "omniglot-vinyals"): partial(_bound, "omniglot-vinyals", Completion),
    ("Completion", "cifar-fs-30"): partial(_bound, "cifar-fs-30", Completion),
    ("AllClasses", "glyphs"): partial(_bound, "glyphs", AllClasses),
    ("Loaders", "glyphs"): _loaders,
    ("FromTaskset", "glyphs"): _taskset,
    **{(m.__name__, "-"): partial(_family, m) for m in (Sinusoid, Harmonics, SineOrLine, Steps, Linear)},
}


def sampler_row(sampler: str, dataset: str, split: str, root: Path, tasks: int = TASKS) -> dict[str, Any]:
    """What `check_sampler` finds in `tasks` tasks; that of "train" also tells whether the splits share classes."""
    return audited(sampler, dataset, split, lambda name: SAMPLERS[sampler, dataset](name, root), tasks)


def audited(sampler: str, dataset: str, split: str, make: Callable[[str], TaskSampler], tasks: int) -> dict[str, Any]:
    """The row of one sampler, `make(split)`: faults by name; in how many tasks a support item is again in the query set, by
    identity (None where it cannot be told) and by content, or else an item is twice in a set; and whether that is by design."""
    others = {name: make(name) for name in SPLITS[1:]} if split == "train" and dataset != "-" else None
    report = check_sampler(make(split), tasks, split=split, splits=others)
    found = {finding.check: finding for finding in report.findings}
    row: dict[str, Any] = {"sampler": sampler, "dataset": dataset, "split": split, "faults": list(report.faults)}
    row["tasks"] = int(re.sub(r"\D.*", "", found["runs"].text) if found["runs"].level == "ok" else 0)
    texts = {key: found[f"disjoint by {key}"].text if f"disjoint by {key}" in found else "" for key in ("identity", "content")}
    for key, text in texts.items():
        row[key] = _tasks(text, "again in the query set") if text and "cannot be told" not in text else None
    row["twice"] = _tasks(texts["content"], "twice in one set")
    row["by design"] = any(finding.text.startswith("by design") for finding in report.findings)
    return row | {"tasks/s": round(report.tasks_per_second)}


def _tasks(text: str, what: str) -> int:
    """In how many tasks something happens that a finding tells."""
    found = re.search(rf"{what}, in (\d+) of \d+ tasks", text)
    return int(found[1]) if found else 0


def equal_items(root: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of all data sets, and every pair of equal items."""
    found: dict[str, list[dict[str, Any]]] = {"datasets": [], "pairs": []}
    for dataset in tqdm(DATASETS, "equal items", unit="data set"):
        banks = {split: bank_of(dataset, split, root) for split in SPLITS}
        pairs = equal_pairs(dataset, banks)
        found["datasets"] += dataset_rows(dataset, banks, pairs)
        found["pairs"] += [pair._asdict() for pair in pairs]
    return found


def jobs() -> list[tuple[str, str, str]]:
    """Sampler, data set and split of every row: a family that draws from no data set has one split."""
    return [(*name, split) for name in SAMPLERS for split in (("train",) if name[1] == "-" else ("train", "test"))]


def sampler_rows(root: Path, left: list[tuple[str, str, str]], processes: int) -> Iterator[dict[str, Any]]:
    """The rows of some samplers, each as it is done."""
    if not find_spec("learn2learn"):
        left = [job for job in left if job[0] != "FromTaskset"]
        print("learn2learn is not installed: its tasksets are left out", file=sys.stderr)
    with (
        ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool,
        tqdm(total=len(left) * TASKS, desc="samplers", unit="task", unit_scale=True) as bar,
    ):
        for done in as_completed([pool.submit(sampler_row, *job, root) for job in left]):
            yield done.result()
            bar.update(TASKS)


def machine(processes: int) -> dict[str, Any]:
    """What the figures were made on."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    versions = {"python": platform.python_version(), "torch": torch.__version__, "toolkit": toolkit.__version__}
    return {"processor": models[0] if models else platform.processor() or platform.machine(), "processes": processes} | versions


def main() -> None:
    """Counts, audits, and writes the figures and the page, after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="the folder of the data sets")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="samplers that are audited at a time")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows of samplers that are there, of a run that was ended"
    )
    arguments = parser.parse_args()
    kept: dict[str, Any] = (
        json.loads(FIGURES.read_text()) if arguments.resume and FIGURES.exists() else {"samplers": [], "seconds": 0}
    )
    rows = {(row["sampler"], row["dataset"], row["split"]): row for row in kept["samplers"]}
    start, counted = time.perf_counter(), equal_items(arguments.data_root)
    about = {"command": COMMAND, "date": datetime.now(UTC).date().isoformat(), "machine": machine(arguments.processes)}
    for row in sampler_rows(arguments.data_root, [job for job in jobs() if job not in rows], arguments.processes):
        rows[row["sampler"], row["dataset"], row["split"]] = row
        seconds = round(kept["seconds"] + time.perf_counter() - start)
        found = about | {"seconds": seconds} | counted | {"samplers": [rows[job] for job in jobs() if job in rows]}
        replace(FIGURES, (json.dumps(found, indent=1) + "\n").encode())
        replace(PAGE, page(PAGE.read_text(), tables(found)).encode())
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
