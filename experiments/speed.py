"""How fast are the parts, beside those of the peers, on the same data, in one run?

    make speed                                            (installs the peers, then runs all of it)
    python experiments/speed.py --only samplers --data-root data

samplers: tasks per second of N-way K-shot image tasks on one thread, from the same uint8 images in memory: ours in meta-batches
of 32 and one by one, learn2learn's `Taskset` (endless, so that it remembers no tasks) and EasyFSL's `TaskSampler` in a
`DataLoader` without workers (less one argument that stops it on this torch); and `Taskset` on learn2learn's own Omniglot class,
which reads PNG files, as its examples do. All give float images in [0, 1] and labels. The rows are measured in turn, round
after round, so that what else the machine does hits them alike; a figure is the median over rounds.

Writes speed.md, speed.json and a bar plot to `--out`. The committed figures: results/speed/speed.md.
"""

import atexit
import hashlib
import logging
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from toolkit import draw
from toolkit.data.bank import ClassBank
from toolkit.data.cifar import cifar_fs_30
from toolkit.data.omniglot import PARTS, omniglot
from toolkit.errors import UserError, unknown
from toolkit.files import replace
from toolkit.flags import launch
from toolkit.runs.folder import write_json
from toolkit.samplers import Episodes
from toolkit.samplers.episodes import as_input

log = logging.getLogger("toolkit")


@dataclass(frozen=True)
class Config:
    """Speed, side by side with peers."""

    only: tuple[str, ...] = ()
    """Sections to measure; all by default. There is one so far: samplers."""
    rounds: int = 7
    """Times that every row is measured, in turn."""
    seconds: float = 0.5
    """How long a row is measured in each round, at least."""
    data_root: Path = Path("data")
    """Folder that holds Omniglot and cifar100_fewshot.zip."""
    out: Path = Path("results/speed")
    """Where the table, the numbers and the figure go."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Row:
    """One measured figure: the median `value` in `unit`, and the `ratio` to the row of the same `workload` that is the base."""

    section: str
    workload: str
    subject: str
    value: float
    unit: str
    low: float
    high: float
    ratio: float | None = None


Sizes = tuple[int, int, int]
SIZES: tuple[Sizes, ...] = ((5, 1, 15), (5, 5, 15), (20, 1, 5))


class Images(Dataset[tuple[Tensor, int]]):
    """A bank as the peers want it: a map-style dataset of (float image, label), whose labels EasyFSL asks for at once."""

    def __init__(self, bank: ClassBank) -> None:
        self.items = bank.read(torch.arange(bank.entries))
        self.labels = torch.arange(bank.classes).repeat_interleave(bank.sizes).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return as_input(self.items[i]), self.labels[i]

    def get_labels(self) -> list[int]:
        """All labels, in the order of the items."""
        return self.labels


def samplers(config: Config) -> list[Row]:
    """Tasks per second."""
    omniglot_bank = omniglot("train", config.data_root, rotations=False)
    files = _full_omniglot(config.data_root)
    found = []
    for name, bank in (("Omniglot 28x28", omniglot_bank), ("CIFAR-100 32x32", cifar_fs_30("train", config.data_root))):
        images = Images(bank)
        for sizes in SIZES:
            draws = {
                "toolkit, 32 at once": _ours(bank, sizes, 32),
                "toolkit, one by one": _ours(bank, sizes, 1),
                "learn2learn Taskset": _learn2learn(images, sizes),
                "EasyFSL TaskSampler": _easyfsl(images, sizes),
            }
            if bank is omniglot_bank:
                draws["learn2learn FullOmniglot, from PNG files"] = _learn2learn(files, sizes)
            workload = f"{name}, {sizes[0]}-way {sizes[1]}-shot, {sizes[2]} queries"
            found += _table("samplers", workload, draws, "tasks/s", "learn2learn Taskset", config)
    return found


def _ours(bank: ClassBank, sizes: Sizes, tasks: int) -> Callable[[], int]:
    sampler, done = Episodes(bank, *sizes), [0]

    def once() -> int:
        draw(sampler, tasks, seed=0, start=done[0])
        done[0] += tasks
        return tasks

    return once


def _full_omniglot(root: Path) -> Any:
    """learn2learn's own Omniglot, as its examples use it: each image is read from its PNG file and shrunk when it is drawn."""
    import learn2learn as l2l
    from PIL.Image import Resampling
    from torchvision import datasets, transforms

    folder = Path(tempfile.mkdtemp()) / "omniglot-py"
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    folder.mkdir()
    md5 = {}
    for part in PARTS:
        shutil.copy(root / "omniglot-py" / f"{part}.zip", folder)
        shutil.unpack_archive(folder / f"{part}.zip", folder)
        md5[part] = hashlib.md5((folder / f"{part}.zip").read_bytes(), usedforsecurity=False).hexdigest()
    shrink = transforms.Compose([transforms.Resize(28, Resampling.LANCZOS), transforms.ToTensor()])
    with patch.object(datasets.Omniglot, "zips_md5", md5):  # torchvision knows the zips by their first packing only
        return l2l.vision.datasets.FullOmniglot(root=str(folder.parent), transform=shrink, download=False)


def _learn2learn(images: Any, sizes: Sizes) -> Callable[[], int]:
    import learn2learn as l2l
    from learn2learn.data import transforms

    ways, shots, queries = sizes
    dataset = l2l.data.MetaDataset(images)
    steps = [
        transforms.FusedNWaysKShots(dataset, n=ways, k=shots + queries), transforms.LoadData(dataset),
        transforms.RemapLabels(dataset), transforms.ConsecutiveLabels(dataset),
    ]  # fmt: skip
    tasks = l2l.data.Taskset(dataset, task_transforms=steps, num_tasks=-1)

    def once() -> int:
        tasks.sample()
        return 1

    return once


def _easyfsl(images: Images, sizes: Sizes) -> Callable[[], int]:
    from easyfsl.samplers import TaskSampler

    # EasyFSL 1.5.0 hands torch's base class an argument that torch no longer has, so it cannot be used as it is.
    with patch.object(Sampler, "__init__", lambda self, data_source=None: None):
        sampler = TaskSampler(images, *sizes, n_tasks=10**9)
    batches = iter(DataLoader(images, batch_sampler=sampler, collate_fn=sampler.episodic_collate_fn))  # type: ignore[arg-type]

    def once() -> int:
        next(batches)
        return 1

    return once


def _table(section: str, workload: str, work: dict[str, Callable[[], int]], unit: str, base: str, config: Config) -> list[Row]:
    """Each subject's rate over `config.rounds` rounds. `work` does some and says how much."""
    rates: dict[str, list[float]] = {name: [] for name in work}
    for once in work.values():
        once()  # what only the first call does is no part of the rate
    for _ in tqdm(range(config.rounds), workload, unit="round"):
        for name, once in work.items():
            done, began = 0, time.perf_counter()
            while (passed := time.perf_counter() - began) < config.seconds:
                done += once()
            rates[name].append(done / passed)
    of_base = statistics.median(rates[base])
    return [
        Row(section, workload, name, statistics.median(r), unit, min(r), max(r), statistics.median(r) / of_base)
        for name, r in rates.items()
    ]


SECTIONS: dict[str, Callable[[Config], list[Row]]] = {"samplers": samplers}
BASE = {"samplers": "learn2learn"}


def main(config: Config) -> None:
    for name in config.only:
        if name not in SECTIONS:
            raise unknown("section", name, SECTIONS)
    if config.rounds < 1 or not config.seconds > 0:
        raise UserError(f"{config.rounds} rounds of {config.seconds} seconds; give at least 1 and more than 0")
    for package in ("learn2learn", "easyfsl"):
        try:
            version(package)
        except PackageNotFoundError:
            raise UserError(f"{package}, a peer, is not installed; `make speed` installs all peers and runs this") from None
    torch.set_num_threads(1)
    rows = [row for name in config.only or SECTIONS for row in SECTIONS[name](config)]
    config.out.mkdir(parents=True, exist_ok=True)
    asked = {"only": config.only, "rounds": config.rounds}
    write_json(config.out / "speed.json", {"config": asked, "machine": machine(), "rows": [asdict(row) for row in rows]})
    text = markdown(rows, machine(), config)
    replace(config.out / "speed.md", text.encode())
    from toolkit.plots.save import save
    from toolkit.plots.speed import bars

    for section in {row.section: None for row in rows}:
        save(bars([asdict(row) for row in rows if row.section == section], section), config.out / section)
    print(text)


def machine() -> dict[str, str]:
    """The processor, threads and versions behind the figures."""
    info = Path("/proc/cpuinfo")
    models = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    )
    found = {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
    return found | {name: version(name) for name in ("torch", "learn2learn", "easyfsl")} | {"python": platform.python_version()}


def markdown(rows: list[Row], on: dict[str, str], config: Config) -> str:
    """The tables of all sections."""
    lines = [
        "# Speed",
        "",
        f"`python experiments/speed.py{''.join(f' --only {name}' for name in config.only)} --data-root data`, medians of "
        f"{config.rounds} rounds taken in turn (lowest to highest in brackets). "
        + ", ".join(f"{k} {v}" for k, v in on.items())
        + ".",
    ]
    for section in {row.section: None for row in rows}:
        lines += ["", f"## {section}", "", f"| work | by | rate | times {BASE[section]} |", "|---|---|---|---|"]
        for row in rows:
            if row.section == section:
                spread = f"{row.value:,.0f} {row.unit} ({row.low:,.0f} to {row.high:,.0f})"
                lines.append(f"| {row.workload} | {row.subject} | {spread} | {row.ratio:.3g} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    launch(Config, main, {}, __doc__)
