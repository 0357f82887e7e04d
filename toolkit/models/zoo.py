"""Models of other libraries by name: `tv:resnet18` of torchvision, `timm:vit_tiny_patch16_224` of timm.

Each is the library's model, unmodified but for its classifier, which passes features on, and a linear head of our own; so
whatever treats the head apart (anil, protonet, linear_probe, ...) needs no special case.
"""

import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from toolkit.errors import UserError, unknown
from toolkit.models import weights as files
from toolkit.models.headed import Headed as Headed  # language models take it from here
from toolkit.models.headed import Prepare, new_head
from toolkit.models.weights import Source, load, read, timm_source, torchvision_source, whole

log = logging.getLogger("toolkit")
NORMALISE = ("auto", "yes", "no")
AUXILIARY = ("googlenet", "inception_v3")  # they have classifiers in their middle too


class Wanted(NamedTuple):
    """What is asked of a model, whichever library it is of (see `torchvision_model`), and whether it takes `colour` images
    only, for which grey ones are repeated."""

    what: str
    colour: bool
    outputs: int
    channels: int
    size: int
    seed: int
    pretrained: str | None
    resize: int
    normalise: str

    @property
    def seen(self) -> int:
        """How wide the images are that the library's model gets."""
        return self.resize or self.size

    def refuse(self, settings: Mapping[str, Any], *decided: str) -> None:
        """Raises UserError for settings of the library's that the tasks decide."""
        for key in decided:
            if key in settings:
                raise UserError(f"{self.what}: {key} follows from the tasks and from --pretrained; leave --model.{key} out")

    def check(self) -> None:
        """Raises UserError for values that make no model, and for images that are neither grey nor in colour."""
        if self.outputs < 1 or self.resize < 0:
            raise UserError(
                f"{self.what}: {self.outputs} outputs and resize={self.resize}; give 1 output or more, resize 0 or more"
            )
        if self.normalise not in NORMALISE:
            raise unknown("value of normalise", self.normalise, NORMALISE)
        if self.colour and self.channels not in (1, 3):
            raise UserError(
                f"{self.what} takes images of 3 channels, or of 1 by repeating it, but these have {self.channels}; use a model "
                "of your own, as --model file.py:NAME, or one of timm without --pretrained"
            )

    def check_size(self, patch: int) -> None:
        """Raises UserError for images that cannot be cut into squares of `patch` pixels."""
        if self.seen % patch:
            wider = -(-self.seen // patch) * patch
            raise UserError(
                f"{self.what} takes images whose width is a multiple of {patch}, and these have {self.seen} pixels; add "
                f"--model.resize {wider}"
            )


def torchvision_model(
    name: str,
    outputs: int,
    channels: int,
    size: int,
    seed: int = 0,
    pretrained: str | None = None,
    resize: int = 0,
    normalise: str = "auto",
    **settings: Any,
) -> Headed:
    """Image classifiers of torchvision, with a new head: tv:resnet18, tv:vit_b_16, ...

    Input (images, `channels`, `size`, `size`) in [0, 1], of 3 channels, or of 1, which is repeated; output (images, `outputs`).
    `resize` makes images so many pixels wide; vit and maxvit are built for the size that results. Weights start as the library
    has it, drawn by `seed`, the head Glorot-uniform with bias 0. `settings` go to the library's own function. Stochastic depth
    is off, since it cannot be drawn for many tasks at once; dropout is as the library has it.

    `pretrained` is "default" (torchvision's default weights, by torch hub) or a file (`weights.read`). Images are then
    normalised by the mean and deviation that the library states, for a file with the name of one of its own those of that one;
    a file is known for one of its own, and for the classes behind it, by its checksum. `normalise` "yes" does so in any case,
    "no" in none, and "auto" not for a checkpoint of a run.

    Raises UserError for an unknown name, for images that the model does not take, for a model that does not end in one linear
    layer, and for weights that cannot be had or do not fit.
    """
    wanted = Wanted(f"tv:{name}", True, outputs, channels, size, seed, pretrained, resize, normalise)
    models = _library("torchvision.models", "torchvision")
    if name not in (all_of_them := models.list_models(module=models)):
        raise _unknown("torchvision", name, all_of_them)
    if name in AUXILIARY:
        raise UserError(f"tv:{name} has several classifiers, and one loss cannot train them all; use another, as tv:resnet18")
    wanted.check()
    wanted.refuse(settings, "num_classes", "weights")
    entries = list(models.get_model_weights(name))
    file = None if pretrained in (None, "default") else Path(str(pretrained))
    known = files.behind([entry.url for entry in entries], file) if file else None
    named = [entry for entry in entries if file and (entry.url == known or entry.url.rpartition("/")[2] == file.name)]
    entry = max(named, key=lambda entry: entry.url == known, default=models.get_model_weights(name).DEFAULT)
    made_for = _made_for(wanted, name, entry.transforms().crop_size[0])

    body = _built(seed, lambda: models.get_model(name, weights=None, **{**made_for, **settings}))
    last, layer = [(n, m) for n, m in body.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    if not isinstance(layer, nn.Linear):
        raise UserError(f"tv:{name} does not end in a linear layer, so it has no head; use another, as tv:resnet18")
    body.set_submodule(last, nn.Identity())
    for module in body.modules():
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0  # type: ignore[assignment]
    source = torchvision_source(entry, known=bool(known) or pretrained == "default")
    return _headed(wanted, body, (last,), source, lambda: files.fetched(entry.url, wanted.what))


def _made_for(wanted: Wanted, name: str, native: int) -> dict[str, Any]:
    """What tells a model of torchvision how wide its images are; nothing for those that take any."""
    kind = "vit" if name.startswith("vit_") else "maxvit" if name.startswith("maxvit") else None
    if kind is None:
        return {}
    if wanted.pretrained == "default" and wanted.seen != native:
        raise UserError(
            f"the weights of {wanted.what} are for images {native} pixels wide, and these have {wanted.seen}; add "
            f"--model.resize {native}"
        )
    wanted.check_size(int(name.rpartition("_")[2]) if kind == "vit" else native)
    return {"image_size": wanted.seen} if kind == "vit" else {"input_size": (wanted.seen, wanted.seen)}


def timm_model(
    name: str,
    outputs: int,
    channels: int,
    size: int,
    seed: int = 0,
    pretrained: str | None = None,
    resize: int = 0,
    normalise: str = "auto",
    **settings: Any,
) -> Headed:
    """Image models of timm, with a new head: timm:vit_tiny_patch16_224, timm:resnet18.a1_in1k, ...

    As `torchvision_model`, but built for images of any number of channels, and of `size` where the model is made for one, which
    has to be a multiple of its patches. With `pretrained` grey images are repeated, and "default" has timm fetch the weights
    of the name's tag and fit their position table to the size. Raises UserError as that does, and without timm.
    """
    wanted = Wanted(f"timm:{name}", bool(pretrained), outputs, channels, size, seed, pretrained, resize, normalise)
    wanted.refuse(settings, "num_classes", "in_chans", "pretrained")
    try:
        return _of_timm(name, wanted, settings)
    except UserError:
        if pretrained in (None, "default") or channels == 3:
            raise
        with suppress(UserError):  # the checkpoint of a run that began without weights, by a model for these channels
            return _of_timm(name, wanted._replace(colour=False), settings)
        raise


def _of_timm(name: str, wanted: Wanted, settings: Mapping[str, Any]) -> Headed:
    timm, pretrained = _library("timm", "timm"), wanted.pretrained
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    wanted.check()
    tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
    if "." in name and name not in tags:
        raise UserError(f"timm has no weights {name!r}; it has {', '.join(tags) or 'none of this model'}")
    known = timm.get_pretrained_cfg(name)
    config = known.to_dict() if known else {}
    repository, native = config.get("hf_hub_id"), config.get("input_size", (3, 224, 224))[-1]
    given: dict[str, Any] = {"num_classes": 0, "in_chans": 3 if wanted.colour else wanted.channels}
    if pretrained == "default":
        if not repository:
            raise UserError(f"timm has no weights of {name}; leave out --pretrained, or give a file")
        files.refuse_unreachable(repository, wanted.what)
        given["pretrained"] = True
    if config.get("fixed_input_size") and wanted.seen != native:
        given["img_size"] = wanted.seen
    try:
        body = _built(wanted.seed, lambda: timm.create_model(name, **{**given, **settings}))
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        if "img_size" not in given or "img_size" in settings or pretrained == "default":
            raise
        raise UserError(
            f"timm:{name} takes images {native} pixels wide, and these have {wanted.seen} ({error}); add "
            f"--model.resize {native}"
        ) from None
    for module in body.modules():
        if isinstance(module, timm.layers.PatchEmbed) and not module.dynamic_img_pad:
            wanted.check_size(module.patch_size[0])
    last = config.get("classifier") or ()
    classifiers = (last,) if isinstance(last, str) else tuple(last)
    return _headed(wanted, body, classifiers, timm_source(config, name, pretrained), None)


def _headed(
    wanted: Wanted,
    body: nn.Module,
    classifiers: tuple[str, ...],
    source: Source | None,
    fetch: Callable[[], Mapping[str, Tensor]] | None,
) -> Headed:
    """The `body` with a new head, and with the pretrained weights that are wanted: by `fetch`, of a file, or, where there is
    nothing to fetch, those that it has."""
    channels = 3 if wanted.colour else wanted.channels
    head = new_head(_features(wanted, body, channels), wanted.outputs, wanted.seed)
    model = Headed(OrderedDict(body=body, head=head))
    file = None if wanted.pretrained in (None, "default") else Path(str(wanted.pretrained))
    tensors = read(file) if file else fetch() if fetch and wanted.pretrained else {}
    # The checkpoint of a run says nothing of how its images came; a state dict of a whole `Headed` holds it.
    fitting = bool(wanted.pretrained) and (not file or not whole(model, tensors) or "prepare.mean" in tensors)
    normalised = wanted.normalise == "yes" or (wanted.normalise == "auto" and fitting)
    if normalised and source is None:
        raise UserError(f"the library does not say how images of {wanted.what} are normalised; add --model.normalise no")
    numbers: tuple[tuple[float, ...], ...] = (source.mean, source.std) if normalised and source else ()
    size = 0 if wanted.resize == wanted.size else wanted.resize
    if numbers or size or channels != wanted.channels:
        model = Headed(OrderedDict(prepare=Prepare(channels != wanted.channels, size, *numbers), body=body, head=head))
    if wanted.pretrained:
        about = source.on if source else wanted.what
        model.pretrained_classes = source.classes if source else ()
        if tensors:
            load(model, tensors, str(file or about), wanted.what, classifiers)
        model.pretrained_on = f"file {file.name}{f': {about}' * bool(model.pretrained_classes)}" if file else about
        silent = "" if model.pretrained_classes else "; which classes it was trained on is not known, so none is warned of"
        shown = f"mean {_numbers(numbers[0])} and deviation {_numbers(numbers[1])}" if numbers else "nothing"
        said = "%s starts from weights of %s; images are normalised by %s%s"
        log.info(said, wanted.what, model.pretrained_on, shown, silent)
    return model


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def _features(wanted: Wanted, body: nn.Module, channels: int) -> int:
    """How many features the body makes of an image, by its shapes alone. Raises UserError for images that it cannot take."""
    tensors = {name: t.to("meta") for name, t in (*body.named_parameters(), *body.named_buffers())}
    x = torch.empty(2, channels, wanted.seen, wanted.seen, device="meta")
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            found = functional_call(body, tensors, (x,))
    except Exception as error:  # whatever the library's code stumbles on
        wider = f"add --model.resize 224{' or more' * (wanted.seen >= 224)}"
        raise UserError(
            f"{wanted.what} cannot take images of {wanted.seen} x {wanted.seen} ({' '.join(str(error).split())}); {wider}"
        ) from None
    if not isinstance(found, Tensor) or found.dim() != 2:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UserError(f"{wanted.what} makes {shape} of two images and not one row of features each; use another model")
    return found.shape[1]


def _built(seed: int, make: Callable[[], Any]) -> nn.Module:
    """What `make` makes, with random numbers of the seed and without what libraries warn of in their own code."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        made: nn.Module = make()
        return made


def _library(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"models of {package} need that package ({error}); run pip install {package}") from None


def _unknown(library: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a misspelt name, with the nearest ones: the libraries have too many to show them all."""
    near = get_close_matches(name, known, n=4, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    listing = "torchvision.models.list_models(module=torchvision.models)" if library == "torchvision" else "timm.list_models()"
    return UserError(f"unknown model of {library} {name!r}{hint} ({listing} shows all)")
