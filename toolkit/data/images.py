"""Image files, in a folder or a zip, as uint8 pixels of one size in the cache."""

import hashlib
import io
import json
import os
import re
import zipfile
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from toolkit.data.stored import Write, stored
from toolkit.errors import UserError, unknown

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

FORMAT = 1  # raise it with any change of the pixels or notes: it is part of the key of the cache
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
DECODERS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
FITS = ("squash", "crop")


@dataclass(frozen=True)
class Look:
    """How images become pixels: (`channels`, `size`, `size`), `channels` 1 (grey) or 3 (RGB); `fit` "squash" squeezes the whole
    image into the square, as is usual for mini-ImageNet, "crop" takes the largest square in its middle. Resized by Lanczos.

    Raises UserError for what is none of these.
    """

    size: int = 84
    channels: int = 3
    fit: str = "squash"

    def __post_init__(self) -> None:
        if self.size < 1 or self.channels not in (1, 3):
            raise UserError(
                f"images of {self.channels} channels and size {self.size}; give 1 or 3 channels and a size of 1 or more"
            )
        if self.fit not in FITS:
            raise unknown("fit", self.fit, FITS)


class Files(NamedTuple):
    """The image files below `root`, a folder or a zip: for each name, relative to `top` in it and with "/" between folders, its
    size and a stamp that changes with its content; and all folders."""

    root: Path
    top: str
    stamps: dict[str, tuple[int, int]]
    folders: tuple[str, ...]


class Decoded(NamedTuple):
    """All classes' images, in their order, uint8 of shape (images, channels, size, size), and how many each class has; how many
    could not be read and the first of them; and (class, class, images): how many images of the second are also in the first."""

    items: Tensor
    counts: list[int]
    bad: int
    first_bad: list[str]
    same: list[tuple[int, int, int]]


def image_files(root: Path) -> Files:
    """The image files (jpg, jpeg, png, webp, bmp, gif, whatever the case) below a folder or in a zip, but for hidden ones. What
    lies in a single folder is seen as if that were the root.

    Raises UserError for a root that is not there or cannot be read, and for a zip with a path that leaves it.
    """
    if not root.exists():
        raise UserError(f"there is no {root}; give the folder of the images with --data-root")
    try:
        found = _in_zip(root) if root.is_file() else dict(_below(root, ""))
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{root} is no folder or zip that can be read ({error}); give one with --data-root") from None
    top = ""
    while len(tops := {name[len(top) :].partition("/")[:2] for name in found if len(name) > len(top)}) == 1:
        first, slash = tops.pop()
        if not slash:
            break
        top += f"{first}/"
    inside = {name[len(top) :]: stamp for name, stamp in sorted(found.items()) if len(name) > len(top)}
    stamps = {name: stamp for name, stamp in inside.items() if stamp is not None}
    return Files(root, top, stamps, tuple(name[:-1] for name, stamp in inside.items() if stamp is None))


def decode(data: bytes, look: Look) -> "np.ndarray[Any, Any]":
    """The pixels of an image file, uint8 of shape (channels, size, size).

    The first frame, turned as its EXIF orientation says; what is transparent is white; 16 bits become 8. Raises whatever the
    decoder does for a file that is damaged or of another kind.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data), formats=DECODERS) as opened:
        opened.load()
        image: Image.Image = opened
        with suppress(Exception):  # of damaged EXIF data, which leave the image as it is
            image = ImageOps.exif_transpose(opened)
        image = _eight_bits(image).convert({1: "L", 3: "RGB"}[look.channels])
        square = (look.size, look.size)
        lanczos = Image.Resampling.LANCZOS
        image = ImageOps.fit(image, square, lanczos) if look.fit == "crop" else image.resize(square, lanczos)
        return np.ascontiguousarray(np.asarray(image).reshape(*square, look.channels).transpose(2, 0, 1))


def decoded(name: str, files: Files, classes: list[tuple[str, ...]], look: Look, skip_bad: bool = False) -> Decoded:
    """The images of each class, given by their names in `files`, from the cache or decoded into it by threads.

    The cache is keyed by the names, sizes and stamps of the files and by `look`; `name` only makes it readable. Raises
    UserError if there are files that are no readable images, unless `skip_bad`; nothing is kept then.
    """
    key = hashlib.sha256(json.dumps([FORMAT, look.size, look.channels, look.fit]).encode())
    for images in classes:
        key.update(json.dumps([(image, *files.stamps[image]) for image in images]).encode())
    total = sum(map(len, classes))

    def refuse(bad: int, names: list[str]) -> None:
        if bad and not skip_bad:
            raise UserError(
                f"{bad} of {total} images in {files.root} cannot be read ({some(names, bad)}); repair or remove them, or add "
                "--dataset.skip_bad True to go on without them"
            )

    def fill(write: Write) -> dict[str, Any]:
        counts, bad, seen, same = [0] * len(classes), list[str](), dict[bytes, int](), Counter[tuple[int, int]]()
        for c, image, pixels in _all_decoded(name, files, classes, look):
            if pixels is None:
                bad.append(image)
                continue
            write(pixels)
            counts[c] += 1
            digest = hashlib.blake2b(pixels.data, digest_size=16).digest()
            if digest in seen:
                same[seen[digest], c] += 1
            else:
                seen[digest] = c
        refuse(len(bad), bad[:3])
        return {"counts": counts, "bad": len(bad), "first_bad": bad[:3], "same": [[*pair, n] for pair, n in same.items()]}

    readable = re.sub(r"[^\w.]+", "-", name)
    items, notes = stored(f"{readable}-{key.hexdigest()[:16]}", total, (look.channels, look.size, look.size), fill)
    refuse(notes["bad"], notes["first_bad"])
    return Decoded(items, notes["counts"], notes["bad"], notes["first_bad"], [(a, b, n) for a, b, n in notes["same"]])


def some(names: list[str], count: int | None = None) -> str:
    """The first three names, and a sign that there are more, up to `count`."""
    return ", ".join(names[:3]) + (", ..." if (len(names) if count is None else count) > 3 else "")


def _all_decoded(
    name: str, files: Files, classes: list[tuple[str, ...]], look: Look
) -> Iterator[tuple[int, str, "np.ndarray[Any, Any] | None"]]:
    """Class, name and pixels (None where they cannot be read) of each image in order; only a few are in memory at a time."""
    from PIL import Image
    from tqdm import tqdm

    Image.init()  # the decoders are imported here, by one thread
    archive = zipfile.ZipFile(files.root) if files.root.is_file() else None

    def pixels(image: str) -> "np.ndarray[Any, Any] | None":
        try:
            data = archive.read(files.top + image) if archive else (files.root / files.top / image).read_bytes()
            return decode(data, look)
        except MemoryError:
            raise
        except Exception:  # decoders raise anything over a damaged file
            return None

    threads = min(16, os.cpu_count() or 1)
    every = ((c, image) for c, images in enumerate(classes) for image in images)
    pool = ThreadPoolExecutor(threads)
    try:
        waiting: deque[tuple[int, str, Future[np.ndarray[Any, Any] | None]]] = deque()
        for c, image in tqdm(every, f"decoding {name}", sum(map(len, classes)), leave=False):
            waiting.append((c, image, pool.submit(pixels, image)))
            if len(waiting) > 4 * threads:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)
        if archive:
            archive.close()


def _result(c: int, image: str, future: "Future[Any]") -> tuple[int, str, Any]:
    return c, image, future.result()


def _eight_bits(image: "Image") -> "Image":
    """The image as L or RGB: 16 bits scaled to 8, and white where it is transparent."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        values = np.where(values == image.info.get("transparency"), 65535, values)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    image = on_white(image)
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def on_white(image: "Image") -> "Image":
    """The image, white where it is transparent; as RGB where it may be."""
    from PIL import Image

    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _below(folder: Path | str, prefix: str) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """Name and stamp of each image below a folder, and each folder, with None."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            if entry.name.startswith((".", "__MACOSX")):
                continue
            if entry.is_dir():
                yield f"{name}/", None
                yield from _below(entry.path, f"{name}/")
            elif name.lower().endswith(EXTENSIONS):
                try:
                    known = entry.stat()
                    yield name, (known.st_size, known.st_mtime_ns)
                except FileNotFoundError:  # a link to nowhere, which is then found to be unreadable
                    yield name, (0, 0)


def _in_zip(root: Path) -> dict[str, tuple[int, int] | None]:
    found: dict[str, tuple[int, int] | None] = {}
    with zipfile.ZipFile(root) as archive:
        for member in archive.infolist():
            path = PurePosixPath(member.filename)
            if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:|.*\\", member.filename):
                raise UserError(
                    f"{root} holds the path {member.filename!r}, which leads out of it; use a zip without such paths"
                )
            if any(part.startswith((".", "__MACOSX")) for part in path.parts):
                continue
            for parent in [*path.parents][:-1] + [path] * member.is_dir():
                found[f"{parent}/"] = None
            if not member.is_dir() and member.filename.lower().endswith(EXTENSIONS):
                found[member.filename] = (member.file_size, member.CRC)
    return found
