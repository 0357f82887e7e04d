"""Meta-steps to be timed by `experiments/speed.py`: the same work by the toolkit and by each peer.

A step is the exact meta-gradient of a fixed batch of tasks and one update by Adam. All start from the same weights.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from toolkit import Batch, Learner, Plan, Task, algorithms
from toolkit.engine import gradient_function
from toolkit.metrics import squared_error
from toolkit.models import conv4, mlp, resnet12
from toolkit.task import count, move, take

Step = Callable[[], float]
META_LR = 1e-3


@dataclass(frozen=True)
class Work:
    """A workload: `model()` makes the network, `usual()` the same function with its layers in the order in which papers and
    peers write it; `method` is maml, fomaml or anil; `plans` are those of ours to be timed."""

    name: str
    model: Callable[[], nn.Module]
    usual: Callable[[], nn.Module]
    tasks: Callable[[], Task]
    steps: int
    inner_lr: float
    method: str
    plans: tuple[Plan, ...]
    peers: tuple[str, ...]
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy

    def learner(self) -> Learner:
        """Ours."""
        given: dict[str, Any] = {"inner_lr": self.inner_lr, "inner_steps": self.steps, "loss": self.loss}
        if self.loss is squared_error:
            given["metric"] = squared_error
        return algorithms.METHODS[self.method](self.model(), **given)  # type: ignore[no-any-return]


def images(tasks: int, queries: int, size: int, channels: int) -> Callable[[], Task]:
    """5-way 1-shot tasks of random images."""

    def make() -> Task:
        g = torch.Generator().manual_seed(0)

        def batch(n: int) -> Batch:
            x = torch.rand(tasks, 5 * n, channels, size, size, generator=g)
            return Batch(x, torch.arange(5).repeat_interleave(n).expand(tasks, -1).contiguous())

        return Task(batch(1), batch(queries))

    return make


def sines(tasks: int) -> Callable[[], Task]:
    """10-shot tasks of random sines."""

    def make() -> Task:
        g = torch.Generator().manual_seed(0)
        x = torch.rand(2, tasks, 10, 1, generator=g) * 10 - 5
        y = (0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=g)) * (x + 3 * torch.rand(tasks, 1, 1, generator=g)).sin()
        return Task(Batch(x[0], y[0]), Batch(x[1], y[1]))

    return make


def usual_conv4(**options: Any) -> nn.Module:
    """`conv4` with ReLU before pooling."""
    model = conv4(**options, pool=True)
    for name, block in model.body.named_children():  # type: ignore[union-attr]
        if name.startswith("block"):
            parts = dict(block.named_children())
            order = OrderedDict((key, parts[key]) for key in ("conv", "norm", "relu", "pool"))
            model.body.set_submodule(name, nn.Sequential(order))  # type: ignore[union-attr]
    return model


def resnet() -> nn.Module:
    """ResNet-12 for five classes."""
    return resnet12(5)


SINE = (Plan("vmap"), Plan("vmap", compile=True))
SMALL = (Plan("threads", 8), Plan("threads", 8, trace=True), Plan("vmap", 16, compile=True))
LARGE = (Plan("threads", 1), Plan("threads", 1, trace=True), Plan("threads", 1, trace=True, autocast="bfloat16"))
TORCH = ("learn2learn", "higher", "TorchOpt")


def _strided() -> nn.Module:
    return conv4(5)


def _pooled() -> nn.Module:
    return conv4(5, pool=True)


def _mini() -> nn.Module:
    return conv4(5, channels=3, size=84, width=32, pool=True)


def _usual_mini() -> nn.Module:
    return usual_conv4(ways=5, channels=3, size=84, width=32)


def _usual_pooled() -> nn.Module:
    return usual_conv4(ways=5)


def workloads() -> list[Work]:
    """All that is timed."""
    sine: dict[str, Any] = {"model": mlp, "usual": mlp, "inner_lr": 0.01, "loss": squared_error, "plans": SINE}
    strided: dict[str, Any] = {"model": _strided, "usual": _strided, "steps": 1, "inner_lr": 0.4}
    pooled: dict[str, Any] = {"model": _pooled, "usual": _usual_pooled, "steps": 1, "inner_lr": 0.4}
    mini: dict[str, Any] = {"model": _mini, "usual": _usual_mini, "tasks": images(4, 15, 84, 3), "steps": 5, "inner_lr": 0.01}
    few, many = images(32, 1, 28, 1), images(32, 15, 28, 1)
    found = [
        Work("sinusoid, 25 tasks, K = 1", tasks=sines(25), steps=1, method="maml", peers=(*TORCH, "JAX"), **sine),
        Work("sinusoid, 25 tasks, K = 5", tasks=sines(25), steps=5, method="maml", peers=(*TORCH, "JAX"), **sine),
        Work("sinusoid, 1,000 tasks, K = 5", tasks=sines(1000), steps=5, method="maml", peers=("learn2learn", "JAX"), **sine),
        Work("Omniglot (stride 2), 32 tasks, 5+5", tasks=few, method="maml", plans=SMALL, peers=TORCH, **strided),
        # The compiler needs more than our two minutes for the pooling network.
        Work("Omniglot (pooling), 32 tasks, 5+5", tasks=few, method="maml", plans=SMALL[:2], peers=TORCH, **pooled),
        Work("Omniglot (stride 2), 32 tasks, 5+75", tasks=many, method="maml", plans=LARGE, peers=TORCH, **strided),
        Work("Omniglot (pooling), 32 tasks, 5+75", tasks=many, method="maml", plans=LARGE, peers=TORCH, **pooled),
        Work("mini-ImageNet, 4 tasks, 5+75, K = 5", method="maml", plans=LARGE, peers=TORCH, **mini),
    ]
    for method in ("fomaml", "anil"):
        given: dict[str, Any] = {"method": method, "peers": ("learn2learn",)}
        name = method.upper()
        found += [
            Work(f"{name}, Omniglot (stride 2), 32 tasks, 5+5", tasks=few, plans=SMALL[1:2], **strided, **given),
            Work(f"{name}, Omniglot (pooling), 32 tasks, 5+5", tasks=few, plans=SMALL[1:2], **pooled, **given),
            Work(f"{name}, Omniglot (pooling), 32 tasks, 5+75", tasks=many, plans=LARGE[1:2], **pooled, **given),
            Work(f"{name}, mini-ImageNet, 4 tasks, 5+75, K = 5", plans=LARGE[1:2], **mini, **given),
        ]
    found.insert(
        -4, Work("FOMAML, sinusoid, 25 tasks, K = 5", tasks=sines(25), steps=5, method="fomaml", peers=TORCH[:1], **sine)
    )
    for k in (1, 10):
        name, tasks, plans = (
            f"ANIL, ResNet-12 at 84x84, 1 task, 5+25, K = {k}",
            images(1, 5, 84, 3),
            (Plan("loop", trace=True),),
        )
        found.append(Work(name, resnet, resnet, tasks, k, 0.1, "anil", plans, peers=TORCH[:1]))
    return found


def floor(work: Work) -> float:
    """Floating-point operations of one exact meta-gradient: those of its matrix products and convolutions."""
    learner, tasks = work.learner(), take(work.tasks(), slice(0, 1))
    meta, gradient = learner.init(), gradient_function.__wrapped__(learner, Plan("loop"))
    gradient(meta, tasks)  # which may also look whether the front of the model can run once
    counter = FlopCounterMode(display=False)
    with counter:
        gradient(meta, tasks)
    return float(counter.get_total_flops()) * count(work.tasks())


def ours(work: Work, plan: Plan, device: str) -> Step:
    """The toolkit's step."""
    learner = work.learner()
    learner = replace(learner, model=copy.deepcopy(learner.model).to(device))
    meta, tasks = learner.init(), move(work.tasks(), device)
    leaves = pytree.tree_leaves(meta)
    optimizer, gradient = learner.outer.build(leaves, META_LR), gradient_function.__wrapped__(learner, plan)

    def step() -> float:
        grads, metrics = gradient(meta, tasks)
        for leaf, its in zip(leaves, pytree.tree_leaves(grads), strict=True):
            leaf.grad = its
        optimizer.step()
        return metrics.loss.item()

    return step


def peer(work: Work, name: str, device: str, usual: bool = True) -> Step:
    """The step of a peer, by its own classes, as its examples do it."""
    model = (work.usual if usual else work.model)().to(device)
    tasks = move(work.tasks(), device)
    if name == "JAX":
        return _jax(work, model, tasks)
    parts = {"learn2learn": _learn2learn, "higher": _higher, "TorchOpt": _torchopt}[name](work, model)
    optimizer = torch.optim.Adam(model.parameters(), META_LR)
    each = [take(tasks, i) for i in range(count(tasks))]

    def step() -> float:
        optimizer.zero_grad()
        total = 0.0
        for task in each:
            loss = parts(task)
            (loss / len(each)).backward()
            total += loss.item()
        optimizer.step()
        return total / len(each)

    return step


def _learn2learn(work: Work, model: nn.Module) -> Callable[[Task], Tensor]:
    import learn2learn as l2l

    anil = work.method == "anil"
    adapting = model.head if anil else model
    body: Callable[[Tensor], Tensor] = model.body if anil else lambda x: x  # type: ignore[assignment]
    maml = l2l.algorithms.MAML(adapting, lr=work.inner_lr, first_order=work.method == "fomaml")

    def loss(task: Task) -> Tensor:
        clone, (support, query) = maml.clone(), (body(batch.x) for batch in task)  # type: ignore[arg-type]
        for _ in range(work.steps):
            clone.adapt(work.loss(clone(support), task.support.y))
        return work.loss(clone(query), task.query.y)

    return loss


def _higher(work: Work, model: nn.Module) -> Callable[[Task], Tensor]:
    import higher

    inner = torch.optim.SGD(model.parameters(), work.inner_lr)

    def loss(task: Task) -> Tensor:
        with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (clone, optimizer):
            for _ in range(work.steps):
                optimizer.step(work.loss(clone(task.support.x), task.support.y))
            return work.loss(clone(task.query.x), task.query.y)

    return loss


def _torchopt(work: Work, model: nn.Module) -> Callable[[Task], Tensor]:
    import torchopt

    inner = torchopt.MetaSGD(model, lr=work.inner_lr)

    def loss(task: Task) -> Tensor:
        # Taken anew for each task: the state of before holds the graph of the last one.
        start, rates = torchopt.extract_state_dict(model, by="reference"), torchopt.extract_state_dict(inner)
        for _ in range(work.steps):
            inner.step(work.loss(model(task.support.x), task.support.y))
        value = work.loss(model(task.query.x), task.query.y)
        torchopt.recover_state_dict(model, start)
        torchopt.recover_state_dict(inner, rates)
        return value

    return loss


def _jax(work: Work, model: nn.Module, tasks: Task) -> Step:
    """The sinusoid network by `jit` of `vmap` of `grad`, the update with it."""
    import jax
    import jax.numpy as jnp

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    params = [tuple(jnp.array(p.detach().numpy()) for p in (layer.weight.T, layer.bias)) for layer in layers]
    data = [jnp.array(leaf.numpy()) for leaf in pytree.tree_leaves(tuple(tasks))]

    def loss(params: Any, x: Any, y: Any) -> Any:
        for weight, bias in params[:-1]:
            x = jax.nn.relu(x @ weight + bias)
        return jnp.mean((x @ params[-1][0] + params[-1][1] - y) ** 2)

    def adapted(params: Any, support_x: Any, support_y: Any, query_x: Any, query_y: Any) -> Any:
        fast = params
        for _ in range(work.steps):
            slope = jax.grad(loss)(fast, support_x, support_y)
            fast = jax.tree.map(lambda w, g: w - work.inner_lr * g, fast, slope)
        return loss(fast, query_x, query_y)

    def total(params: Any, *data: Any) -> Any:
        return jnp.mean(jax.vmap(adapted, in_axes=(None, 0, 0, 0, 0))(params, *data))

    @jax.jit  # type: ignore[untyped-decorator]
    def update(params: Any, first: Any, second: Any, t: Any, *data: Any) -> Any:
        value, slope = jax.value_and_grad(total)(params, *data)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, slope)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, slope)

        def moved(w: Any, m: Any, v: Any) -> Any:
            return w - META_LR * (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8)

        return jax.tree.map(moved, params, first, second), first, second, t + 1, value

    zeros = jax.tree.map(jnp.zeros_like, params)
    state = [(params, zeros, zeros, jnp.ones(()))]

    def step() -> float:
        *now, value = update(*state[0], *data)
        state[0] = tuple(now)
        return float(value)

    return step
