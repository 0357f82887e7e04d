"""Templates for plug-ins of your own: short files that run as they are, each with a test beside it (`toolkit new`)."""

import ast
import keyword
import re
import sys
from pathlib import Path
from typing import NamedTuple

from toolkit.errors import UserError, unknown

# In the texts, PATH and TEST stand for the files, `mine` and `Mine` for their name.
SAMPLER = '''\
"""Tasks of your own, for any experiment; `toolkit check-sampler PATH:Mine` looks for faults in them.

    python experiments/quickstart.py --sampler PATH:Mine --sampler.gap 3

Three lines below, marked `edit`, make them yours.
"""

from dataclasses import dataclass

import torch

from toolkit import Batch, Task


@dataclass(frozen=True)
class Mine:
    """Clouds of points in the plane: from which cloud is a new point?"""

    ways: int = 5  # what is named so here comes from --ways, --shots, ...; `bank` would be the classes of --dataset
    shots: int = 1
    queries: int = 15
    gap: float = 2.0  # a setting of your own: --sampler.gap 3

    def __call__(self, generator: torch.Generator) -> Task:  # one task, with all its randomness from `generator`
        n = self.shots + self.queries
        centres = self.gap * torch.randn(self.ways, 1, 2, generator=generator)  # edit 1: what sets this task apart
        x = centres + torch.randn(self.ways, n, 2, generator=generator)  # edit 2: inputs (ways, n, ...)
        y = torch.arange(self.ways)[:, None].repeat(1, n)  # edit 3: classes (ways, n), or numbers (ways, n, outputs)
        parts = (slice(0, self.shots), slice(self.shots, n))
        return Task(*(Batch(x[:, part].flatten(0, 1), y[:, part].flatten(0, 1)) for part in parts))
'''
SAMPLER_TEST = '''\
"""Mine makes good tasks: python -m pytest TEST"""

from pathlib import Path

import torch

from toolkit import draw
from toolkit.plugins import resolve
from toolkit.samplers.check import check_sampler

Mine = resolve(f"{Path(__file__).with_name('mine.py')}:Mine")


def test_a_seed_gives_the_same_tasks_and_another_seed_others() -> None:
    once, again, other = (Mine()(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(once.support.x, again.support.x) and torch.equal(once.query.x, again.query.x)
    assert not torch.equal(once.support.x, other.support.x)


def test_support_and_query_have_the_sizes_that_were_asked_for() -> None:
    task = draw(Mine(ways=3, shots=2, queries=4), 1, seed=0)
    assert task.support.y.shape[1] == 3 * 2 and task.query.y.shape[1] == 3 * 4


def test_the_audit_finds_no_fault() -> None:
    report = check_sampler(Mine(shots=2, queries=5))
    assert report.ok, str(report)
'''
MODEL = '''\
"""A network of your own, for any experiment.

    python experiments/quickstart.py --model PATH:mine --model.width 32

It gets what it names: `inputs`, `outputs`, `seed`, for square images also `channels` and `size`, and settings of its own.
"""

import math
from collections import OrderedDict

import torch
from torch import nn


def mine(inputs: tuple[int, ...], outputs: int, seed: int = 0, width: int = 64) -> nn.Module:
    """From examples of shape `inputs`, images or vectors, to `outputs` numbers; `width` is a setting of your own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the same seed gives the same weights
        if len(inputs) == 3:  # images: (channels, height, width)
            convolution = nn.Conv2d(inputs[0], width, 3, stride=2, padding=1, bias=False)
            layers: list[nn.Module] = [convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(4)]
            features = 16 * width
        else:
            layers, features = [], math.prod(inputs)
        body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, width), nn.ReLU())
        # Methods that treat the last linear layer apart, such as anil, look for it by the name `head`.
        return nn.Sequential(OrderedDict(body=body, head=nn.Linear(width, outputs)))
'''
MODEL_TEST = '''\
"""mine can be meta-learned: python -m pytest TEST"""

from pathlib import Path

import pytest
import torch

from toolkit import Batch, Task, algorithms, draw, meta_gradient
from toolkit.plugins import resolve

mine = resolve(f"{Path(__file__).with_name('mine.py')}:mine")


@pytest.mark.parametrize("inputs", [(1, 28, 28), (3, 32, 32), (2,)])
def test_every_parameter_has_a_meta_gradient(inputs: tuple[int, ...]) -> None:
    def sampler(generator: torch.Generator) -> Task:
        x, y = torch.randn(30, *inputs, generator=generator), torch.arange(30) % 5
        return Task(Batch(x[:10], y[:10]), Batch(x[10:], y[10:]))

    learner = algorithms.maml(mine(inputs, 5), inner_lr=0.1)
    gradient, _ = meta_gradient(learner, learner.init(), draw(sampler, 4, seed=0))
    for name, tensor in gradient.params.items():
        assert tensor.isfinite().all() and tensor.any(), name
'''
ALGORITHM = '''\
"""A method of your own, for any experiment.

    python experiments/quickstart.py --algorithm PATH:mine --algorithm.decay 0.1

A learner is data: `replace` changes its start, rule, steps, inner loss, objective, ... (toolkit.learner).
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from toolkit import Batch, Learner, Meta
from toolkit.algorithms import maml
from toolkit.learner import support_loss


def mine(model: nn.Module, *, decay: float = 0.01, name: str = "mine", **shared: Any) -> Learner:
    """MAML whose inner loop also makes weights small. `decay` is a setting of your own, as all that come after the star;
    `shared` is what every method takes, such as inner_lr and inner_steps (see toolkit.algorithms)."""

    def inner(learner: Learner, meta: Meta, fast: dict[str, Tensor], support: Batch, k: int) -> Tensor:
        large = torch.stack([weights.square().sum() for weights in fast.values()]).sum()
        return support_loss(learner, meta, fast, support, k) + decay * large

    return replace(maml(model, name=name, **shared), inner=inner)
'''
ALGORITHM_TEST = '''\
"""mine learns to adapt: python -m pytest TEST"""

import math
from pathlib import Path

from toolkit import evaluate, train
from toolkit.metrics import squared_error
from toolkit.models import mlp
from toolkit.plugins import resolve
from toolkit.samplers import Sinusoid

mine = resolve(f"{Path(__file__).with_name('mine.py')}:mine")


def test_the_loss_is_finite_after_a_step_and_the_learner_adapts() -> None:
    learner = mine(mlp(), loss=squared_error, metric=squared_error, inner_lr=0.01, inner_steps=2)
    records = list(train(learner, Sinusoid(), iterations=30, tasks=8, meta_lr=0.01))
    assert all(math.isfinite(record.loss) for record in records)
    curve = evaluate(learner, records[-1].meta, Sinusoid(), tasks=50, steps=2)
    before, *_, after = curve.mean(curve.loss)
    assert after < 0.99 * before
'''


class Template(NamedTuple):
    """The texts of a plug-in and of the test beside it."""

    text: str
    test: str


TEMPLATES = {
    "sampler": Template(SAMPLER, SAMPLER_TEST),
    "model": Template(MODEL, MODEL_TEST),
    "algorithm": Template(ALGORITHM, ALGORITHM_TEST),
}


def write(kind: str, path: Path) -> list[Path]:
    """Writes a template of `kind` (sampler, model, algorithm; plurals as well) to `path` and a test beside it, both or none;
    returns the two files. What they define is named after the file: my_sampler.py has MySampler, my_model.py my_model.

    Raises UserError for an unknown kind, a name that Python cannot import, or that means something else to Python or to the
    template, and for files that exist or cannot be written.
    """
    kind = kind.removesuffix("s")
    if kind not in TEMPLATES:
        raise unknown("kind of template", kind, TEMPLATES)
    template, name = TEMPLATES[kind], _name(kind, path)
    # Only a short and plain path can stand in a command, and in a docstring, as it is.
    plain = path.as_posix() if not path.is_absolute() and re.fullmatch(r"[\w./-]{1,40}", path.as_posix()) else path.name
    test = path.with_name(f"test_{path.name}")
    words = {"PATH": plain, "TEST": plain.removesuffix(path.name) + test.name, "Mine": name, "mine": path.stem}
    written: list[Path] = []
    for file, text in ((path, template.text), (test, template.test)):
        try:
            with open(file, "x", encoding="utf-8") as opened:
                written.append(file)
                opened.write(re.sub(rf"\b({'|'.join(words)})\b", lambda word: words[word[0]], text))
        except OSError as error:
            for each in written:
                each.unlink()
            raise UserError(f"cannot write {file} ({error.strerror}); choose another name or folder") from None
    return written


def _name(kind: str, path: Path) -> str:
    """What the file at `path` is to define. Raises UserError for a file that cannot be named so."""
    stem = path.stem
    if path.suffix != ".py" or not stem.isidentifier() or keyword.iskeyword(stem) or not stem.strip("_"):
        raise UserError(f"{path.name!r} is no name of a Python module; use letters, digits and _, as in my_{kind}.py")
    name = "".join(part[:1].upper() + part[1:] for part in stem.split("_")) if kind == "sampler" else stem
    if stem in sys.stdlib_module_names | {"torch", "toolkit"} or name in _used(TEMPLATES[kind]) or not name.isidentifier():
        raise UserError(f"{path.name} would take a name that is needed for something else; call it my_{stem.strip('_')}.py")
    return name


def _used(template: Template) -> set[str]:
    """The names that the texts use for something else."""
    nodes = [node for text in template for node in ast.walk(ast.parse(text))]
    used = {node.id for node in nodes if isinstance(node, ast.Name)} | {node.arg for node in nodes if isinstance(node, ast.arg)}
    return (used | {node.name for node in nodes if isinstance(node, ast.alias)}) - {"mine", "Mine"}
