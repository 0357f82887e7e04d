"""The path of adaptation on one task, seen in a plane: where its steps lead, and how high the loss is around them.

The plane goes through the mean of the path's points, along their two principal directions. A path of two steps lies in it;
of a longer one it shows the part that `explained` tells.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vmap

from toolkit.engine import exact_layers
from toolkit.errors import UserError
from toolkit.learner import Learner, Meta, support_loss
from toolkit.plan import default_plan
from toolkit.randomness import kept
from toolkit.task import Task, stack
from toolkit.tree import Params

NARROWEST = 0.3  # half of the height of the narrowest path before its margin, in lengths: a straight one gets room too


@dataclass(frozen=True, eq=False)
class Landscape:
    """A path of S steps and the losses around it, all float64 and on the CPU; lengths are those of the weights.

    `points`             (S + 1, 2): the fast weights after 0..S steps, projected on the plane.
    `u`, `v`             (n,) and (m,): the grid on the first and the second direction.
    `loss`               (m, n): the query loss at the grid; `support_loss` that on the support set.
    `explained`          (2,): the share of the path's variance along each direction. The second is 0 where the path is a
                         straight line; the second direction is then the slope of the query loss across it.
    `path_loss`          (S + 1,): the query loss of the path's own weights, in the plane or not; `path_support_loss`.
    """

    points: Tensor
    u: Tensor
    v: Tensor
    loss: Tensor
    support_loss: Tensor
    explained: Tensor
    path_loss: Tensor
    path_support_loss: Tensor


class Plane(NamedTuple):
    """The weights `centre` + a `first` + b `second`, where the directions are orthonormal, or `second` is zero."""

    centre: Params
    first: Params
    second: Params

    def at(self, place: Tensor) -> Params:
        """The weights at `place`, the coordinates (a, b)."""
        found = {}
        for name, centre in self.centre.items():
            a, b = place.to(centre)
            found[name] = centre + a * self.first[name] + b * self.second[name]
        return found


@torch.no_grad()
def landscape(learner: Learner, meta: Meta, task: Task, steps: int, grid: int = 25, margin: float = 0.4) -> Landscape:
    """The path of `steps` inner steps on one task, with losses on `grid` x `grid` points of its plane. The grid reaches beyond
    the path by `margin` of its longer side, in all directions.

    Every point is judged as the path's last: with batch norm "per_step" by the statistics and scales of that step. Nothing is
    kept: no graph, no random state. Raises UserError when the weights do not move, or leave the finite numbers.
    """
    if steps < 1 or grid < 2 or not margin > 0:
        raise UserError(f"{steps} steps, grid {grid}, margin {margin}; give 1 step or more, a grid of 2, a positive margin")
    learner = replace(learner, training=False)
    with exact_layers(learner), kept():
        path = list(learner.path(meta, task.support, steps))
        plane, points, explained = spanned(learner, meta, task, path)
        low, high = points.amin(0), points.amax(0)
        length = (high - low).max()
        half = ((high - low) / 2).clamp(min=NARROWEST * length) + margin * length
        u, v = ((low + high) / 2 + torch.linspace(-1, 1, grid, dtype=torch.float64).unsqueeze(1) * half).T
        loss, on_support = losses(learner, meta, task, plane, torch.cartesian_prod(v, u).flip(1), steps)
        own = [_pair(learner, meta, task, fast, k) for k, fast in enumerate(path)]
    path_loss, path_on_support = torch.stack(own).double().cpu().T
    shape = len(v), len(u)
    return Landscape(points, u, v, loss.view(shape), on_support.view(shape), explained, path_loss, path_on_support)


def spanned(learner: Learner, meta: Meta, task: Task, path: list[Params]) -> tuple[Plane, Tensor, Tensor]:
    """The plane of a path's principal directions, the path's points in it, and the shares of variance that they explain.

    The path's end lies to the right of its start, and its farthest point from the first axis above that axis.
    """
    rows = torch.stack([_flat(fast, path[0]) for fast in path])
    if not rows.isfinite().all():
        k = int((~rows.isfinite().all(1)).nonzero()[0])
        raise UserError(f"the weights are not finite after {k} steps; draw fewer steps, or take a smaller inner rate")
    centre = rows.mean(0)
    _, sizes, directions = torch.linalg.svd(rows - centre, full_matrices=False)
    noise = 4 * max([torch.finfo(tensor.dtype).eps for tensor in path[0].values()], default=0.0) * rows.norm()
    if not path[0] or sizes[0] <= noise:
        raise UserError(
            f"the weights of {learner.name} do not move in {len(path) - 1} inner steps, so there is no path to draw; take a "
            "method with inner steps, such as maml"
        )
    first, explained = directions[0], (sizes.square() / sizes.square().sum())[:2]
    if len(sizes) > 1 and sizes[1] > noise:
        second = directions[1]
    else:
        slope = grad(lambda fast: learner.assess(meta, fast, task, len(path) - 1).loss)(path[-1])
        second, explained = _across(_flat(slope, path[0]), first), torch.tensor([1.0, 0.0], dtype=torch.float64)
    points = (rows - centre) @ torch.stack([first, second], 1)
    farthest = points[points[:, 1].abs().argmax(), 1]
    signs = torch.stack([points[-1, 0] - points[0, 0], farthest * explained[1]]).sign()
    signs = torch.where(signs == 0, 1.0, signs)
    plane = Plane(*(_shaped(vector, path[0]) for vector in (centre, signs[0] * first, signs[1] * second)))
    return plane, points * signs, explained


def losses(learner: Learner, meta: Meta, task: Task, plane: Plane, places: Tensor, k: int) -> Tensor:
    """Query and support loss, shape (2, places), at `places` (places, 2) of the plane, judged as point `k` of the path."""

    def judge(place: Tensor) -> Tensor:
        return _pair(learner, meta, task, plane.at(place), k)

    plan = default_plan(learner, stack([task]))
    places = places.to(task.support.y.device, next(iter(plane.centre.values())).dtype)
    if plan.map != "loop":
        size = plan.chunk or round(len(places) ** 0.5)
        with suppress(RuntimeError):  # of operations that vmap does not know, or of memory
            return torch.cat([vmap(judge, randomness="same")(piece) for piece in places.split(size)]).double().cpu().T
    return torch.stack([judge(place) for place in places]).double().cpu().T


def _pair(learner: Learner, meta: Meta, task: Task, fast: Params, k: int) -> Tensor:
    return torch.stack([learner.assess(meta, fast, task, k).loss, support_loss(learner, meta, fast, task.support, k)])


def _across(slope: Tensor, first: Tensor) -> Tensor:
    """The direction of the part of a slope that is orthogonal to `first`; zero where there is none."""
    rest = slope - (slope @ first) * first
    return rest / rest.norm() if rest.norm() > 1e-6 * slope.norm() else torch.zeros_like(rest)


def _flat(tree: Params, like: Params) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(tree[name].cpu().double().reshape(-1) for name in like)])


def _shaped(vector: Tensor, like: Params) -> Params:
    parts = vector.split([tensor.numel() for tensor in like.values()])
    return {name: part.view(tensor.shape).to(tensor) for part, (name, tensor) in zip(parts, like.items(), strict=True)}
