"""How fast are the parts, beside those of the peers, on the same data, in one run?

    make speed                                            (installs the peers in .venv-peers, then runs all of it)
    python experiments/speed.py --only steps --match sinusoid

steps: milliseconds of one training step, the exact meta-gradient of one batch of tasks and Adam's update, by our plans and by
learn2learn, higher, TorchOpt and, where the network is small, JAX (`jit` of `vmap` of `grad`). All begin from the same weights
and the same tensors, and their first losses must agree. Peers run the networks with ReLU before pooling, as papers write them;
ours have it behind, the same function by less work, so a row has learn2learn on our order too. The floor is the time that the
step's products would take at the rate of a large matrix product, measured in the same run.
memory: peak above what is there before, and seconds, of one mini-ImageNet meta-gradient for more and more inner steps, one
subject after the other, three runs each.
evaluation: test tasks per second, with the curve after each of ten steps.
start: seconds to import, to show help, and to the first step of a compiled training with a warm cache.
samplers: tasks per second of N-way K-shot image tasks on one thread, from the same uint8 images in memory: ours in meta-batches
of 32 and one by one, learn2learn's `Taskset` (endless, so that it remembers no tasks) and EasyFSL's `TaskSampler` in a
`DataLoader` without workers (less one argument that stops it on this torch); and `Taskset` on learn2learn's own Omniglot class,
which reads PNG files, as its examples do. All give float images in [0, 1] and labels.

The rows of a workload are measured in turn, round after round, so that what else the machine does hits them alike; a figure is
the median over rounds. Writes speed.md, speed.json and a bar plot of each section to `--out`, of a GPU under names with -cuda.
The committed figures: results/speed/speed.md and speed-cuda.md.
"""

import atexit
import copy
import gc
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, it has only its own folder on the path

from experiments.tools.speed_steps import Work, floor, images, ours, peer, sines, workloads
from toolkit import Plan, Task, algorithms, draw
from toolkit.choose import peak
from toolkit.data.bank import ClassBank
from toolkit.data.cifar import cifar_fs_30
from toolkit.data.omniglot import PARTS, omniglot
from toolkit.engine import gradient_function, unrounded
from toolkit.errors import UserError, unknown
from toolkit.evaluate import judge
from toolkit.files import replace as replace_file
from toolkit.flags import launch
from toolkit.metrics import accuracy, squared_error
from toolkit.models import conv4, mlp
from toolkit.runs.folder import write_json
from toolkit.samplers import Episodes
from toolkit.samplers.episodes import as_input
from toolkit.task import count, move, take

log = logging.getLogger("toolkit")


@dataclass(frozen=True)
class Config:
    """Speed, side by side with peers."""

    only: tuple[str, ...] = ()
    """Sections to measure, of steps, memory, evaluation, start and samplers; all by default."""
    match: str = ""
    """Workloads of steps to measure: those whose name has this regular expression in it, whatever the case."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where steps, memory and evaluation are measured."""
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
    """One measured figure: the median `value` in `unit`; how many times better than the row of the same `workload` that is the
    base (`ratio`); the share of the step that its `floor` would take."""

    section: str
    workload: str
    subject: str
    value: float
    unit: str
    low: float
    high: float
    ratio: float | None = None
    floor: float | None = None


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
    for once in work.values():
        once()  # what only the first call does is no part of the rate
    rates: dict[str, list[float]] = {name: [] for name in work}
    for _ in tqdm(range(config.rounds), workload, unit="round"):
        for name, once in work.items():
            done, began = 0, time.perf_counter()
            while (passed := time.perf_counter() - began) < config.seconds:
                done += once()
            rates[name].append(done / passed)
    return _rows(section, workload, rates, unit, base, better=max)


def _rows(section: str, workload: str, found: dict[str, list[float]], unit: str, base: str, better: Any = min) -> list[Row]:
    """A row for each subject, by the medians of its figures, of which `better` are the good ones."""
    medians = {name: statistics.median(figures) for name, figures in found.items()}
    ratio = {n: (m / medians[base] if better is max else medians[base] / m) if m else None for n, m in medians.items()}
    return [Row(section, workload, n, medians[n], unit, min(f), max(f), ratio[n]) for n, f in found.items()]


def steps(config: Config) -> list[Row]:
    """Milliseconds of a training step."""
    rows, rate = [], product_rate(config.device)
    rows.append(Row("steps", "matrix product of 2048 x 2048", "torch", rate / 1e9, "GFLOP/s", rate / 1e9, rate / 1e9))
    for work in workloads():
        if not re.search(config.match, work.name, re.IGNORECASE):
            continue
        subjects = {f"toolkit: {plan}": partial(ours, work, plan, config.device) for plan in _plans(work, config.device)}
        subjects |= {name: partial(peer, work, name, config.device) for name in work.peers if _there(name, config.device)}
        if work.usual is not work.model:
            subjects["learn2learn, pooling first"] = partial(peer, work, "learn2learn", config.device, False)
        made, losses = {}, {}
        for name, make in subjects.items():
            log.info("%s: %s", work.name, name)
            made[name] = make()
            losses[name] = made[name]()
        exact = [loss for name, loss in losses.items() if "bfloat16" not in name]
        if max(exact) - min(exact) > 1e-3 * max(1, abs(exact[0])):
            raise UserError(f"the first losses of {work.name} differ, so the work is not the same: {losses}")
        times: dict[str, list[float]] = {name: [] for name in made}
        for _ in tqdm(range(config.rounds), work.name, unit="round"):
            for name, step in made.items():
                done, began = 0, time.perf_counter()
                while not done or time.perf_counter() - began < config.seconds:
                    step()
                    done += 1
                times[name].append(1000 * (time.perf_counter() - began) / done)
        least = 1000 * floor(work) / rate
        rows += [replace(row, floor=least / row.value) for row in _rows("steps", work.name, times, "ms", "learn2learn")]
        del made
        gc.collect()
    return rows


def _plans(work: Work, device: str) -> tuple[Plan, ...]:
    return work.plans if device == "cpu" else (Plan("vmap"), Plan("vmap", trace=True))


def _there(name: str, device: str) -> bool:
    return device == "cpu" or name != "JAX"  # whose build here has no GPU


def product_rate(device: str) -> float:
    """Floating-point operations per second of a large matrix product in float32."""
    a = torch.randn(2048, 2048, device=device)
    times = []
    for _ in range(10):
        began = time.perf_counter()
        (a @ a).sum().item()
        times.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(times)


def memory(config: Config) -> list[Row]:
    """Megabytes, and seconds, for more and more inner steps."""
    import learn2learn as l2l

    work, rows = next(work for work in workloads() if work.name.startswith("mini")), []
    for k in (1, 5, 20, 64):
        own = replace(work, steps=k, inner_lr=0.001)
        learner, tasks = own.learner(), move(own.tasks(), config.device)
        learner = replace(learner, model=copy.deepcopy(learner.model).to(config.device))
        each, meta = [take(tasks, slice(i, i + 1)) for i in range(count(tasks))], learner.init()
        maml = l2l.algorithms.MAML(own.usual().to(config.device), lr=own.inner_lr)

        def theirs(maml: Any = maml, own: Work = own, each: Any = each) -> None:
            maml.zero_grad()
            for task in each:
                clone = maml.clone()
                for _ in range(own.steps):
                    clone.adapt(own.loss(clone(task.support.x[0]), task.support.y[0]))
                own.loss(clone(task.query.x[0]), task.query.y[0]).backward()

        plans = [Plan("loop"), Plan("loop", memory="recompute")]
        if k <= RECORDED:
            plans += [replace(plan, trace=True) for plan in plans]
        found: dict[str, list[float]] = {}
        seconds: dict[str, list[float]] = {}
        for plan in plans:
            log.info("memory, K = %d: %s", k, plan)
            function = gradient_function.__wrapped__(learner, plan)
            function(meta, tasks)
            found[f"toolkit: {plan}"], seconds[f"toolkit: {plan}"] = _peak_and_time(partial(function, meta, tasks), config)
        theirs()
        found["learn2learn"], seconds["learn2learn"] = _peak_and_time(theirs, config)
        rows += _rows("memory", f"mini-ImageNet, K = {k}", found, "MB", "learn2learn")
        times = {name: [1000 * t for t in each] for name, each in seconds.items()}
        rows += _rows("memory", f"mini-ImageNet, K = {k}, time", times, "ms", "learn2learn")
    return rows


MEMORY_RUNS = 3
RECORDED = 20  # inner steps up to which recorded plans are in the table of memory: recording takes half a second a step


def _peak_and_time(work: Callable[[], object], config: Config) -> tuple[list[float], list[float]]:
    peaks, times = list[float](), list[float]()
    for _ in range(MEMORY_RUNS):
        began = time.perf_counter()
        peaks.append(peak(work, config.device) / 1e6)
        times.append(time.perf_counter() - began)
    return peaks, times


def evaluation(config: Config) -> list[Row]:
    """Test tasks per second, each with the curve over ten inner steps."""
    import learn2learn as l2l

    rows = list[Row]()
    cases: tuple[tuple[str, bool, Callable[[], nn.Module], Task], ...] = (
        ("Omniglot (stride 2)", True, partial(conv4, 5), images(16, 15, 28, 1)()),
        ("sinusoid", False, mlp, sines(64)()),
    )
    for name, classes, model, made in cases:
        loss, metric = (F.cross_entropy, accuracy) if classes else (squared_error, squared_error)
        network, tasks = model().to(config.device), move(made, config.device)
        own = algorithms.maml(network, loss=loss, metric=metric, inner_lr=0.01)
        maml, meta, done = l2l.algorithms.MAML(network, lr=0.01, first_order=True), own.init(), [0]

        def theirs(maml: Any = maml, tasks: Task = tasks, loss: Any = loss, metric: Any = metric, done: Any = done) -> int:
            task, clone = take(tasks, done[0] % count(tasks)), maml.clone()
            done[0] += 1
            for k in range(11):
                with torch.no_grad():
                    prediction = clone(task.query.x)
                    loss(prediction, task.query.y), metric(prediction, task.query.y)
                if k < 10:
                    clone.adapt(loss(clone(task.support.x), task.support.y))
            return 1

        def by(plan: Plan, own: Any = own, meta: Any = meta, tasks: Task = tasks) -> Callable[[], int]:
            scored = judge(own, plan, 10, 1)
            return lambda: len(torch.cat([piece["loss"] for piece in scored(meta, tasks)[0]]))

        first = Plan("threads", 1) if classes and config.device == "cpu" else Plan("vmap")
        subjects = {f"toolkit: {plan}": by(plan) for plan in (first, replace(first, trace=True))} | {"learn2learn": theirs}
        rows += _table("evaluation", f"{name}, 10 steps", subjects, "tasks/s", "learn2learn", config)
    return rows


def start(config: Config) -> list[Row]:
    """Seconds of processes."""
    first_step = (
        "from experiments.tools.speed_steps import ours, workloads; from toolkit import Plan; "
        "ours(workloads()[1], Plan('vmap', compile=True), 'cpu')()"
    )
    commands = {
        "import": {
            "torch": ["-c", "import torch"],
            "toolkit (from toolkit import train)": ["-c", "from toolkit import train"],
            "learn2learn": ["-c", "import learn2learn"],
        },
        "help": {
            "torch": ["-c", "import torch"],
            "toolkit --help": ["-m", "toolkit.cli", "--help"],
            "experiments/omniglot.py --help": ["experiments/omniglot.py", "--help"],
        },
        "first compiled step, warm cache": {
            "torch": ["-c", "import torch"],
            "sinusoid, 25 tasks, K = 5": ["-c", first_step],
        },
    }
    rows = []
    for workload, subjects in commands.items():
        times: dict[str, list[float]] = {name: [] for name in subjects}
        for _ in tqdm(range(config.rounds + 1), workload, unit="round"):
            for name, arguments in subjects.items():
                began = time.perf_counter()
                subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
                times[name].append(time.perf_counter() - began)
        rows += _rows("start", workload, {name: each[1:] for name, each in times.items()}, "s", "torch")
    return rows


SECTIONS: dict[str, Callable[[Config], list[Row]]] = {
    "steps": steps, "memory": memory, "evaluation": evaluation, "start": start, "samplers": samplers,
}  # fmt: skip
BASE = dict.fromkeys(SECTIONS, "learn2learn") | {"start": "torch"}
PEERS = {"samplers": ("learn2learn", "easyfsl"), "steps": ("learn2learn", "higher", "torchopt", "jax"),
         "memory": ("learn2learn",), "evaluation": ("learn2learn",), "start": ("learn2learn",)}  # fmt: skip


def main(config: Config) -> None:
    for name in config.only:
        if name not in SECTIONS:
            raise unknown("section", name, SECTIONS)
    if config.rounds < 1 or not config.seconds > 0:
        raise UserError(f"{config.rounds} rounds of {config.seconds} seconds; give at least 1 and more than 0")
    try:
        re.compile(config.match)
    except re.error as error:
        raise UserError(f"--match {config.match} is no pattern ({error}); give a part of a workload's name") from None
    asked = config.only or tuple(SECTIONS)
    for package in dict.fromkeys(package for name in asked for package in PEERS[name]):
        try:
            version(package)
        except PackageNotFoundError:
            raise UserError(f"{package}, a peer, is not installed; `make speed` installs all peers and runs this") from None
    threads, rows = torch.get_num_threads(), list[Row]()
    for name in asked:
        torch.set_num_threads(1 if name == "samplers" else threads)
        with unrounded():  # peers are to do the same work as we do
            rows += SECTIONS[name](config)
        write(rows, config)
        log.info("%s is measured", name)
    print((config.out / ("speed.md" if config.device == "cpu" else "speed-cuda.md")).read_text())


def write(rows: list[Row], config: Config) -> None:
    """The table, the numbers and the bars of what is measured so far; other sections of an earlier run stay."""
    config.out.mkdir(parents=True, exist_ok=True)
    stem = "speed" if config.device == "cpu" else "speed-cuda"
    file = config.out / f"{stem}.json"
    before = json.loads(file.read_text()) if file.exists() else {"rows": [], "machine": {}}
    new = {row.section for row in rows}
    rows = [*rows, *(Row(**row) for row in before["rows"] if row["section"] not in new)]
    machines = {name: machine() if name in new else before["machine"][name] for name in {row.section for row in rows}}
    rows.sort(key=lambda row: list(SECTIONS).index(row.section))
    kept = {"rounds": config.rounds, "seconds": config.seconds, "device": config.device}
    write_json(file, {"config": kept, "machine": machines, "rows": [asdict(row) for row in rows]})
    replace_file(config.out / f"{stem}.md", markdown(rows, machines, config).encode())
    from toolkit.plots.save import save
    from toolkit.plots.speed import bars

    for section in new:
        drawn = [asdict(row) for row in rows if row.section == section and row.unit != "GFLOP/s"]
        for unit in {row["unit"]: None for row in drawn}:
            name = section if unit != "ms" or section == "steps" else f"{section}-time"
            rounds = MEMORY_RUNS if section == "memory" else config.rounds
            spread = f"medians of {rounds} rounds, whiskers from lowest to highest"
            title = f"{name}: {spread}\n(×: times as good as {BASE[section]})"
            name = name if config.device == "cpu" else f"{name}-cuda"
            save(bars([row for row in drawn if row["unit"] == unit], title), config.out / name)


def machine() -> dict[str, str]:
    """The processor, threads and versions behind the figures."""
    info = Path("/proc/cpuinfo")
    models = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    )
    found = {"processor": models[0] if models else platform.processor() or platform.machine(), "cores": str(os.cpu_count())}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    for package in ("torch", "learn2learn", "higher", "torchopt", "jax", "easyfsl"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found | {"python": platform.python_version()}


def highlights(rows: list[Row]) -> str:
    """Of each exact second-order step how many times as fast as learn2learn our fastest plan is, in one line."""
    best: dict[str, float] = {}
    for row in rows:
        if row.section == "steps" and row.subject.startswith("toolkit") and "bfloat16" not in row.subject and row.ratio:
            best[row.workload] = max(best.get(row.workload, 0), row.ratio)
    return ", ".join(f"{ratio:.3g} ({name})" for name, ratio in best.items() if not name.startswith(("FOMAML", "ANIL")))


def markdown(rows: list[Row], on: dict[str, dict[str, str]], config: Config) -> str:
    """The tables of all sections, with the machine of each."""
    from toolkit.plots.speed import number

    lines = [
        "# Speed",
        "",
        f"`make speed` (`experiments/speed.py`, which says what each section measures), medians of {config.rounds} rounds "
        "taken in turn (memory: of three runs), lowest to highest in brackets.",
    ]
    for section in {row.section: None for row in rows}:
        mine = [row for row in rows if row.section == section]
        floors = any(row.floor for row in mine)
        lines += ["", f"## {section}", "", ", ".join(f"{k} {v}" for k, v in on[section].items()) + ".", ""]
        lines += [f"| work | by | figure | times {BASE[section]} |" + (" share of the floor |" if floors else "")]
        lines += ["|---|---|---|---|" + ("---|" if floors else "")]
        for row in mine:
            figure = f"{number(row.value)} {row.unit} ({number(row.low)} to {number(row.high)})"
            ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
            share = f" {row.floor:.0%} |" if row.floor else " |" if floors else ""
            lines.append(f"| {row.workload} | {row.subject} | {figure} | {ratio} |{share}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    launch(Config, main, {}, __doc__)
