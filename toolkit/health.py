"""`checks`: whether this machine has what the toolkit needs. And what checks, of any model too, are made of: errors in words,
random state left alone, derivatives against differences."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

from toolkit import __version__
from toolkit.algorithms import maml
from toolkit.choose import free
from toolkit.metrics import squared_error
from toolkit.probe import TOLERANCE, meta_objective, meta_slopes, mismatch, undisturbed, words
from toolkit.task import Batch, Task, move

NEEDED = ("torch", "torchvision", "numpy", "scipy", "matplotlib")
OPTIONAL = ("learn2learn", "peft", "datasets", "tensorboard", "wandb", "trackio", "transformers", "timm")
PATIENCE, GB = 10.0, 10**9
# What each dataset reads below the data folder: all of these, each one of several. Not here: those that read what a user names
# (folder, csv-lists, torchvision, pickled, huggingface), and glyphs, which are rendered.
SPLITS = ("train", "val", "test")
OMNIGLOT = [f"omniglot-py/images_{part}.zip" for part in ("background", "evaluation")]
FILES = {
    **{f"omniglot-{protocol}": OMNIGLOT for protocol in ("vinyals", "background")},
    **{name: ["cifar-100-python/train", "cifar-100-python/test"] for name in ("cifar-fs", "fc100")},
    **{name: ["cifar100_fewshot.zip"] for name in ("cifar-fs-30", "fc100-30")},
    **{name: ["clinc150.json.gz"] for name in ("clinc150", "clinc150-wordpieces")},
    **{
        f"{name}-imagenet": [
            f"{name}-imagenet/images|{name}-imagenet/images.zip",
            *(f"{name}-imagenet/{split}.csv*|splits/{name}_imagenet_{split}.csv*" for split in SPLITS),
        ]
        for name in ("mini", "tiered")
    },
    "fashion-mnist": [f"FashionMNIST/raw/{part}-images-idx3-ubyte" for part in ("train", "t10k")],
    "emnist": [f"EMNIST/raw/emnist-balanced-{part}-images-idx3-ubyte" for part in ("train", "test")],
    "svhn": ["train_32x32.mat", "test_32x32.mat"],
    "flowers": ["flowers-102/jpg", "flowers-102/imagelabels.mat", "flowers-102/setid.mat"],
    "dtd": ["dtd/dtd/images"],
    "aircraft": ["fgvc-aircraft-2013b/data/images"],
    "cub": ["CUB_200_2011/images"],
    "medmnist": ["*mnist.npz"],
}
# Two processes, run by -c with rank and file, add up their ranks plus one.
PAIR = """
import datetime, sys, torch
import torch.distributed as dist
patience = datetime.timedelta(seconds=float(sys.argv[3]))
dist.init_process_group("gloo", init_method=sys.argv[2], rank=int(sys.argv[1]), world_size=2, timeout=patience)
number = torch.tensor(float(sys.argv[1]) + 1)
dist.all_reduce(number)
print(number.item())
"""


@dataclass(frozen=True)
class Check:
    """What was looked at, whether it is well (None: for information), and a sentence on it."""

    name: str
    ok: bool | None
    line: str


def checks(data_root: Path) -> Iterator[Check]:
    """One check after the other, some seconds in all; what a check raises is its sentence."""
    looks: dict[str, Callable[[], tuple[bool | None, str]]] = {
        "versions": _versions,
        "devices": _devices,
        "second order": _second_order,
        "two processes": _two_processes,
        "compiler": _compiler,
        "data": partial(_data, data_root),
        "optional packages": _optional,
        "results folder": partial(_writable, Path("results")),
        "disk and memory": _room,
    }
    for name, look in looks.items():
        try:
            yield Check(name, *look())
        except Exception as error:
            yield Check(name, False, words(error))


def _versions() -> tuple[bool, str]:
    found = {name: _version(name) for name in NEEDED}
    listed = ", ".join(f"{name} {number or 'missing'}" for name, number in found.items())
    advice = "" if all(found.values()) else "; install what is missing with pip install -e ."
    return all(found.values()), f"toolkit {__version__}, python {platform.python_version()}, {listed}{advice}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> tuple[None, str]:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return None, f"{torch.get_num_threads()} threads on {os.cpu_count()} processors, CUDA: {', '.join(names) or 'none'}"


def _toy() -> Task:
    x = torch.linspace(-1, 1, 2 * 2 * 5 * 3, dtype=torch.float64).view(2, 2, 5, 3).sin()
    y = x.square().sum(-1, keepdim=True)
    return Task(Batch(x[0], y[0]), Batch(x[1], y[1]))


def _second_order() -> tuple[bool, str]:
    model, tasks = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(), _toy()
    for p in model.parameters():
        p.data = torch.linspace(-1, 1, p.numel(), dtype=torch.float64).view(p.shape)
    off = {}
    for device in ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))):
        learner = maml(model.to(device), loss=squared_error, metric=squared_error, inner_lr=0.1, inner_steps=2)
        own = move(tasks, device)
        with undisturbed():
            params = learner.init().params
            off[device] = mismatch(partial(meta_objective, learner, own), meta_slopes(learner, params, own, "vmap"), params)
    found = ", ".join(f"{each:.0e}" + (f" on {device}" if len(off) > 1 else "") for device, each in off.items())
    return max(off.values()) < TOLERANCE, f"a meta-gradient is off by {found} of its length from differences, in float64"


def _two_processes(patience: float = PATIENCE) -> tuple[bool, str]:
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pair = [
            subprocess.Popen(
                [sys.executable, "-c", PAIR, str(rank), f"file://{folder}/rendezvous", str(patience)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
            )
            for rank in range(2)
        ]  # fmt: skip
        deadline = time.monotonic() + patience
        try:
            said = [process.communicate(timeout=max(0.1, deadline - time.monotonic())) for process in pair]
        except subprocess.TimeoutExpired:
            return False, f"two processes did not add a number within {patience:.0f} s; look for a firewall or a busy machine"
        finally:
            for process in pair:
                process.kill()
                process.communicate()
    if [out.strip() for out, _ in said] == ["3.0", "3.0"]:
        return True, "two processes added a number (torch.distributed, gloo)"
    last = next((lines[-1] for _, text in said if (lines := text.strip().splitlines())), "no word from them")
    return False, f"two processes could not add a number ({last[:200]})"


def _compiler() -> tuple[bool | None, str]:
    wanted = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    found = next((place for name in wanted if name and (place := shutil.which(name))), None)
    if found is None:
        return None, "no C++ compiler, which --compile needs; install g++ or clang++, or do without"
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return (True, found) if headers.exists() else (None, f"{found}, but no {headers}, which --compile may need")


def _data(root: Path) -> tuple[None, str]:
    def there(place: str) -> bool:
        return any(any(root.glob(pattern)) for pattern in place.split("|"))

    found = [name for name, places in FILES.items() if all(map(there, places))]
    absent = [name for name in FILES if name not in found]
    return None, f"in {root}: {', '.join(found) or 'none'}; not there: {', '.join(absent) or 'none'}; glyphs need no files"


def _optional() -> tuple[None, str]:
    found = {name: _version(name) for name in OPTIONAL}
    here = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    return None, f"{here or 'none'}; not installed: {', '.join(name for name in OPTIONAL if not found[name]) or 'none'}"


def _writable(folder: Path) -> tuple[bool, str]:
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return True, f"{folder} can be written"
    except OSError as error:
        return False, f"{folder} cannot be written ({error.strerror}); give another folder with --out"


def _room() -> tuple[None, str]:
    disk = shutil.disk_usage(Path.cwd()).free
    return None, f"{disk / GB:.1f} GB free on disk here, {free(_toy()) / GB:.1f} GB of memory"
