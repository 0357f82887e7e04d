"""Checkpoints that survive a kill at any moment and notice a flipped bit.

A checkpoint is a folder `step-<iteration>` with `weights.safetensors` (what to share), `state.pt` (what a resume needs) and
`manifest.json` (format, size and SHA-256 of each, and a seal over itself). It is written under a temporary name, synced, and
renamed when whole. The reader takes the newest folder that verifies; it never runs code from a file (`weights_only=True`).
"""

import hashlib
import io
import json
import logging
import os
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.distributed import fingerprint
from toolkit.errors import UserError
from toolkit.learner import Meta
from toolkit.modules import unlearned

log = logging.getLogger("toolkit")
FORMAT = 1
KEPT = 2
BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what reading a damaged manifest can raise


def save(folder: Path, iteration: int, weights: Meta, state: dict[str, Any], config_hash: str) -> Path:
    """Writes one checkpoint, unless that of the same iteration is there and whole, and removes all but the newest two.

    An error of the disk is raised, never swallowed.
    """
    from safetensors.torch import save as to_bytes

    buffer = io.BytesIO()
    torch.save(state, buffer)
    tensors = flatten(weights)
    files = {"weights.safetensors": to_bytes(tensors), "state.pt": buffer.getvalue()}
    listing = {n: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for n, data in files.items()}
    manifest = {"format": FORMAT, "iteration": iteration, "config_hash": config_hash, "files": listing}
    manifest["names"] = list(tensors)  # safetensors sorts, but the order of parameters is part of their identity
    files["manifest.json"] = json.dumps(manifest | {"seal": _seal(manifest)}, indent=2).encode()

    final, temporary = folder / f"step-{iteration:08d}", folder / f".step-{iteration:08d}.tmp"
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    for name, data in files.items():
        with open(temporary / name, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    _sync(temporary)
    if final.exists():
        if _is_whole(final):
            shutil.rmtree(temporary)
            return final
        shutil.rmtree(final)
    os.replace(temporary, final)
    _sync(folder)
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)
    return final


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_newest(folder: Path, config_hash: str | None = None) -> tuple[Meta, dict[str, Any]] | None:
    """(weights, state) of the newest checkpoint that verifies, None when there is none at all.

    Damaged ones are skipped with a warning that says why. Raises UserError when all are damaged, or when the newest good one
    belongs to another configuration.
    """
    found = sorted(folder.glob("step-*"), reverse=True)
    for path in found:
        try:
            manifest, files = _verified(path)
        except BROKEN as error:
            log.warning("skipping the checkpoint %s: %s", path, error)
            continue
        if manifest["format"] != FORMAT:
            raise UserError(
                f"{path} has checkpoint format {manifest['format']}, this version reads {FORMAT}; use the version that wrote it"
            )
        if config_hash is not None and manifest["config_hash"] != config_hash:
            raise UserError(f"{path} belongs to another configuration; resume with the flags in the run's config.json")
        from safetensors.torch import load

        try:
            state = torch.load(io.BytesIO(files["state.pt"]), weights_only=True, map_location="cpu")
        except UnpicklingError:
            raise UserError(f"{path / 'state.pt'} holds more than plain values; it is refused, do not trust it") from None
        tensors = load(files["weights.safetensors"])
        return unflatten({name: tensors[name] for name in manifest["names"]}), state
    if found:
        raise UserError(f"no checkpoint in {folder} is whole; start again with --overwrite")
    return None


def beside(model: nn.Module) -> dict[str, tuple[str, str, str]]:
    """What a checkpoint's weights stand beside and it does not hold, frozen weights and buffers: the kind, shape and hash of
    each, by name."""
    return {
        name: ("weights" if isinstance(tensor, nn.Parameter) else "statistics", str(tuple(tensor.shape)), fingerprint(tensor))
        for name, tensor in unlearned(model).items()
    }


def check_fits(folder: Path, state: dict[str, Any], own: Meta, code: str) -> None:
    """Raises UserError where the meta-parameters of a checkpoint have other names or shapes than the learner's `own`, as after
    a change of the model's code; other changes of the code cannot be judged, and are told."""
    if not state:
        return
    both = (meta._replace(stats={}) for meta in (Meta(**state["meta"]), own))
    kept, now = ({name: tuple(tensor.shape) for name, tensor in flatten(meta).items()} for meta in both)
    if wrong := [name for name in kept | now if kept.get(name) != now.get(name)]:
        had, wants = (shapes.get(wrong[0], "not there") for shapes in (kept, now))
        raise UserError(
            f"the checkpoint of {folder} does not fit this model: {wrong[0]} was {had} and is {wants}; resume with the code "
            "that began the run, or choose another --out"
        )
    if state.get("code", code) != code:
        log.warning("the code has changed since the checkpoint of %s; the run goes on with the code as it is now", folder)


def check_beside(folder: Path, state: dict[str, Any], now: dict[str, tuple[str, str, str]]) -> None:
    """Raises UserError where the weights of a checkpoint stood beside others than `now`. A buffer of another shape is one that
    the model makes for its inputs."""
    had, missing = state.get("beside", now), ("statistics", "()", "")  # older checkpoints do not say
    for name in sorted(had.keys() | now.keys()):
        (kind, shape, before), (new_kind, new_shape, after) = had.get(name, missing), now.get(name, missing)
        if shape != new_shape and "weights" in (kind, new_kind):
            raise UserError(f"{folder} does not fit these tasks: its frozen {name} is {shape}, and they want {new_shape}")
        if shape == new_shape and before != after:
            raise UserError(
                f"{folder} was trained around other frozen {kind} than the model has now, {name} for one; give what it began "
                "with (by --pretrained, if it was)"
            )


def _is_whole(path: Path) -> bool:
    try:
        _verified(path)
    except BROKEN:
        return False
    return True


def _verified(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    manifest = json.loads((path / "manifest.json").read_text())
    if manifest.pop("seal") != _seal(manifest):
        raise ValueError("manifest.json does not match its seal")
    files = {}
    for name in ("weights.safetensors", "state.pt"):
        files[name] = (path / name).read_bytes()
        if hashlib.sha256(files[name]).hexdigest() != manifest["files"][name]["sha256"]:
            raise ValueError(f"{name} does not match its checksum")
    return manifest, files


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def flatten(meta: Meta) -> dict[str, Tensor]:
    """Meta-parameters as one flat dict with the names "params/..." and "learned/..."."""
    return {f"{part}/{name}": tensor.contiguous() for part, tree in meta._asdict().items() for name, tensor in tree.items()}


def unflatten(tensors: dict[str, Tensor]) -> Meta:
    """The inverse of `flatten`."""
    trees: dict[str, dict[str, Tensor]] = {part: {} for part in Meta._fields}
    for key, tensor in tensors.items():
        part, name = key.split("/", 1)
        trees[part][name] = tensor
    return Meta(**trees)
