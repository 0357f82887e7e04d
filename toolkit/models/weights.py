"""Weights that a model starts from: those that its library knows, or a file.

A file holds tensors by name, `.safetensors`, or a state dict written by torch, `.pt` and `.pth`, which is read with
`weights_only=True`: no code in it runs. A checkpoint of a run (`weights.safetensors`) is such a file.
"""

import hashlib
import logging
import re
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from toolkit.errors import UserError
from toolkit.modules import listed
from toolkit.tree import under

log = logging.getLogger("toolkit")
KINDS = (".safetensors", ".pt", ".pth")
IMAGENET = "ImageNet"
WRAPPERS = ("state_dict", "model", "model_state_dict")  # where trainers put the weights beside other things
WRAPPED = ("_orig_mod.", "module.")  # what torch.compile and DDP put before every name
# torchvision's first densenets, whose layers were called "norm.1" when a name might hold a dot.
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")
CHECKSUM = re.compile(r"-([0-9a-f]{8,})\.\w+$")  # what torchvision's names end in
MISMATCH = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\(\[(.*?)\]\) from checkpoint, the shape in current model "
    r"is torch\.Size\(\[(.*?)\]\)"
)


class Source(NamedTuple):
    """What a library knows of its weights: what they were trained on and with which classes, and the mean and standard
    deviation of the channels that images were normalised by."""

    on: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU; of a checkpoint of a run its model's parameters. Raises UserError for a file
    that is not there, is of another kind, is damaged, or holds anything but tensors by name."""
    if path.suffix not in KINDS:
        raise UserError(f"--pretrained {path} is neither default nor a file of weights; give a file *{', *'.join(KINDS)}")
    if not path.is_file():
        raise UserError(f"there is no file {path}; give --pretrained the path of a file *{', *'.join(KINDS)}, or default")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path) if path.suffix == KINDS[0] else torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, LookupError, EOFError, UnpicklingError, SafetensorError) as error:
        said = re.split(r"(?<=[.?!:]) ", " ".join(str(error).split()))[0].rstrip(".:")
        raise UserError(f"{path} is no file of weights ({type(error).__name__}: {said}); save a state dict") from None
    found = next((found[key] for key in WRAPPERS if isinstance(found, dict) and isinstance(found.get(key), dict)), found)
    if not isinstance(found, dict) or not found or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        held = ", ".join(map(str, list(found)[:3])) if isinstance(found, dict) and found else type(found).__name__
        raise UserError(f"{path} does not hold tensors by name alone (it holds {held}); save a state dict")
    for wrapper in WRAPPED:
        found = under(wrapper, found) if all(name.startswith(wrapper) for name in found) else found
    return under("params/", found) or found


def whole(model: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    """Whether `tensors` have the model's own names rather than those of its `body`, a library's model."""
    body = getattr(model, "body", None)
    inner = set(body.state_dict()) if isinstance(body, nn.Module) else set()
    return len(set(model.state_dict()) & set(tensors)) >= len(inner & set(tensors))


def load(model: nn.Module, tensors: Mapping[str, Tensor], source: str, what: str, classifiers: tuple[str, ...] = ()) -> None:
    """Puts the `tensors` of `source` into `model`, called `what`: by its own names, or by those of its `body`, whose last
    layers were the `classifiers`.

    A head or classifier of another width is left out, with one log line. Raises UserError for names or shapes that do not fit,
    naming the first three, for numbers that are not finite, and for what the model's own loading raises.
    """
    if broken := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise UserError(f"{source} has numbers that are not finite, in {listed(broken)}; give a file of sound weights")
    own, head = whole(model, tensors), getattr(model, "head", None)
    target = model if own else model.body
    state = {name if own else OLD_DENSENET.sub(r"\1\2.", name): tensor for name, tensor in tensors.items()}
    layers = classifiers if not own else ("head",) if isinstance(head, nn.Module) else ()
    last = [_popped(state, f"{layer}.") for layer in layers]
    metadata = getattr(tensors, "_metadata", None)  # by which modules know what their parts were called in older versions
    problems = _taken(target, state, metadata, source, what)  # type: ignore[arg-type]
    if problems := [said for said in problems if not (own and said.startswith("head."))]:
        more = f"; and {len(problems) - 3} more" * (len(problems) > 3)
        raise UserError(
            f"{source} does not fit {what}: {'; '.join(problems[:3])}{more}; give weights of this model with its settings"
        )
    found = next(filter(None, last), {})
    if isinstance(head, nn.Module) and found:
        if {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in head.state_dict().items()}:
            head.load_state_dict(found)
        else:
            log.info("%s: the last layer of %s has other outputs and is left out; the head is new", what, source)


def _popped(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}


def _taken(target: nn.Module, state: dict[str, Tensor], metadata: Any, source: str, what: str) -> list[str]:
    """Loads by the modules' own code; what does not fit, in words that begin with a name. Not missed are buffers, which the
    checkpoint of a run does not hold, and a parameter that is there by another of its names."""
    ordered = OrderedDict(state)
    if metadata is not None:
        ordered._metadata = metadata  # type: ignore[attr-defined]
    try:
        found = target.load_state_dict(ordered, strict=False)
    except (RuntimeError, ValueError) as error:  # ValueError: mnasnet asks for the version that torch writes
        if wrong := MISMATCH.findall(str(error)):
            return [f"{name} is ({had}) in it and ({wants}) in the model" for name, had, wants in wrong]
        raise UserError(f"{source} cannot be loaded into {what} ({' '.join(str(error).split())}); give other weights") from None
    params = list(target.named_parameters(remove_duplicate=False))
    there = {id(p) for name, p in params if name not in found.missing_keys}
    foreign = [f"{name} is in it but not in the model" for name in found.unexpected_keys]
    return foreign + [f"{name} is in the model but not in it" for name, p in params if id(p) not in there]


def fetched(url: str, what: str) -> Mapping[str, Tensor]:
    """The state dict behind `url`, kept in torch hub's folder, its checksum compared with the one in its name. Raises UserError
    where it cannot be fetched, saying which file to put where, and for a file of another checksum."""
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    named = CHECKSUM.search(file.name)
    if file.exists() and named and not _sha256(file).startswith(named[1]):
        raise UserError(f"{file} is damaged: its SHA-256 does not begin with {named[1]}; delete it and try again")
    try:
        return torch.hub.load_state_dict_from_url(  # type: ignore[no-any-return]
            url, map_location="cpu", progress=sys.stderr.isatty(), check_hash=True, weights_only=True
        )
    except (OSError, HTTPException, RuntimeError, UnpicklingError) as error:
        raise UserError(
            f"the weights of {what} cannot be fetched ({' '.join(str(error).split())}); put {file.name} from {url} into "
            f"{file.parent}, or give it as --pretrained FILE"
        ) from None


def behind(urls: Iterable[str], file: Path) -> str | None:
    """That of the `urls`, whose names end in checksums, behind which a file is, whatever it is called."""
    digest = _sha256(file) if file.is_file() else ""
    return next((url for url in urls if (named := CHECKSUM.search(url)) and digest.startswith(named[1])), None)


def refuse_unreachable(repository: str, what: str) -> None:
    """Raises UserError where the weights of a repository of Hugging Face are neither in its cache nor to be had, saying which
    file to put where. Asked once: the library itself would try for most of a minute."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    files = ("model.safetensors", "pytorch_model.bin")
    if any(isinstance(try_to_load_from_cache(repository, file), str) for file in files):
        return
    try:
        get_hf_file_metadata(hf_hub_url(repository, files[0]), timeout=10)
    except Exception as error:  # of whichever HTTP library it uses
        raise UserError(
            f"the weights of {what} cannot be fetched ({type(error).__name__}) and are not in {constants.HF_HUB_CACHE}; fetch "
            f"{files[0]} of {repository} from Hugging Face elsewhere and give it as --pretrained FILE, or copy that cache here"
        ) from None


def torchvision_source(entry: Any, known: bool) -> Source:
    """What torchvision says of the weights of an entry; without their classes unless it is `known` that these are they."""
    shown = entry.transforms()
    classes = tuple(entry.meta["categories"]) if known else ()
    return Source(f"{IMAGENET}-1k (torchvision {entry.name})", classes, tuple(shown.mean), tuple(shown.std))


def timm_source(config: Mapping[str, Any], name: str, pretrained: str | None) -> Source | None:
    """What timm says of weights; the classes are those it infers from their number, by WordNet's numbers and words."""
    from timm.data import ImageNetInfo, infer_imagenet_subset  # type: ignore[attr-defined]

    if not config.get("mean"):
        return None
    on, classes, subset = f"timm {config.get('hf_hub_id') or name}", tuple[str, ...](), infer_imagenet_subset(dict(config))
    if subset is not None and pretrained == "default":
        info = ImageNetInfo(subset)
        words = (word for line in info.label_descriptions() for word in line.split(", "))
        on, classes = f"{subset.replace('imagenet', IMAGENET)} ({on})", (*info.label_names(), *words)
    return Source(on, classes, tuple(config["mean"]), tuple(config["std"]))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
