"""Glyphs: an Omniglot-like bank that needs no download, rendered from the fonts that matplotlib ships.

859 letters of 14 scripts (`glyphs.txt`), 20 images each; every script lies in one split. The images of a class are the
letter in up to 16 faces under random affine and elastic distortion and with random stroke thickness. This is synthetic
variety, not handwriting: accuracies here cannot be compared with those on Omniglot.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from toolkit.data.bank import ClassBank
from toolkit.data.cache import cached
from toolkit.errors import UserError, unknown
from toolkit.task import stream_seed

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

FORMAT = 1  # raise it with any change of what is rendered: it is part of the name of the cached file
SPLITS = ("train", "val", "test")
IMAGES = 20
# A fixed list, never "all fonts": LastResort claims every code point, the cm* faces map letters to other shapes.
FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
FACE_PIXELS = 96
INK_SHARE = 44 / 64  # leaves room for the distortions
BLANK = 4.0  # an image with less mean ink (of 255) is drawn again


class Glyph(NamedTuple):
    """One class: a Unicode code point, its split and its script."""

    code: int
    split: str
    script: str


def glyphs(split: str, size: int = 28) -> ClassBank:
    """The glyph bank of a `split` ("train", "val" or "test"): uint8 items of shape (items, 1, size, size), 255 = ink.

    The first call renders all splits (seconds) into the cache. Raises UserError for an unknown split, a size below 14
    pixels, or missing fonts.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if size < 14:
        raise UserError(f"glyphs of {size} x {size} pixels cannot be read; ask for a size of at least 14")
    listed = glyph_list()
    digest = hashlib.sha256(repr(listed).encode()).hexdigest()[:8]
    items = cached(f"glyphs-{FORMAT}-{size}px-{digest}", lambda: render_splits(listed, size))[split]
    names = tuple(f"{glyph.script} U+{glyph.code:04X}" for glyph in listed if glyph.split == split)
    return ClassBank(items, torch.arange(len(names) + 1) * IMAGES, names, f"glyphs {split}")


def glyph_list() -> list[Glyph]:
    """The classes of all splits, as stored in `glyphs.txt`."""
    lines = Path(__file__).with_name("glyphs.txt").read_text("utf-8").splitlines()
    rows = (line.split(maxsplit=2) for line in lines if not line.startswith("#"))
    return [Glyph(int(code, 16), split, script) for code, split, script in rows]


def render_splits(listed: list[Glyph], size: int) -> dict[str, Tensor]:
    """The images of each split, uint8 of shape (classes of the split * IMAGES, 1, size, size)."""
    images = render([glyph.code for glyph in listed], size)
    return {s: images[[glyph.split == s for glyph in listed]].flatten(0, 1) for s in SPLITS}


def render(codes: Iterable[int], size: int) -> Tensor:
    """Images of each code point, uint8 of shape (codes, IMAGES, 1, size, size); each depends on its code point only."""
    faces = [(load_face(path), charmap(path)) for path in face_paths().values()]
    side = max(64, 2 * size)
    images = []
    with one_thread():
        for code in tqdm(list(codes), desc="rendering glyphs", unit="class", leave=False):
            masters = [master(face, chr(code), side) for face, known in faces if code in known]
            if not masters:
                raise UserError(f"no font of matplotlib has U+{code:04X}; reinstall matplotlib with pip")
            images.append(draw_class(torch.stack(masters), code, size))
    return torch.stack(images)


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one thread: on a busy machine, small operations wait far longer for each other than they take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def face_paths() -> dict[str, Path]:
    """Where each of `FACES` lies. Raises UserError when matplotlib or one of them is missing."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("glyphs are rendered from matplotlib's fonts; run `pip install matplotlib`") from None
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = {face: folder / f"{face}.ttf" for face in FACES}
    if missing := [face for face, path in paths.items() if not path.is_file()]:
        raise UserError(
            f"matplotlib's fonts lack {', '.join(missing)} (looked in {folder}); "
            "reinstall matplotlib with pip, as other packages of it may leave fonts out"
        )
    return paths


def charmap(path: Path) -> set[int]:
    """The code points a font covers, by its own table: a missing glyph would still render, as a box."""
    from matplotlib.ft2font import FT2Font

    return set(FT2Font(str(path)).get_charmap())


def load_face(path: Path) -> "FreeTypeFont":
    """The font at the size of the masters, in the basic layout (the other one shapes Arabic where it is installed)."""
    from PIL import ImageFont

    return ImageFont.truetype(str(path), FACE_PIXELS, layout_engine=ImageFont.Layout.BASIC)


def ink(face: "FreeTypeFont", char: str) -> "Image":
    """The character in grey, 255 = ink, cut to the box of its ink."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = face.getbbox(char)
    image = Image.new("L", (math.ceil(right - left) + 2, math.ceil(bottom - top) + 2))
    ImageDraw.Draw(image).text((1 - left, 1 - top), char, fill=255, font=face)
    return image.crop(image.getbbox())


def master(face: "FreeTypeFont", char: str, side: int) -> Tensor:
    """The undistorted character, ink 1, centred, its longer side `INK_SHARE` of `side`; shape (side, side)."""
    from PIL import Image

    cut = ink(face, char)
    scale = INK_SHARE * side / max(cut.size)
    width, height = (max(1, round(length * scale)) for length in cut.size)
    image = Image.new("L", (side, side))
    image.paste(cut.resize((width, height), Image.Resampling.BOX), ((side - width) // 2, (side - height) // 2))
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(side, side) / 255


def draw_class(masters: Tensor, code: int, size: int) -> Tensor:
    """Distorted images of the `masters` (faces, side, side) in turn, uint8 of shape (IMAGES, 1, size, size)."""
    sources = masters[torch.arange(IMAGES) % len(masters)][:, None]
    images = torch.zeros(IMAGES, 1, size, size, dtype=torch.uint8)
    blank = torch.ones(IMAGES, dtype=torch.bool)
    for attempt in range(20):
        generator = torch.Generator().manual_seed(stream_seed(attempt, "glyphs", code))
        images = torch.where(blank.view(-1, 1, 1, 1), distort(sources, size, generator), images)
        blank = images.float().mean((1, 2, 3)) < BLANK
        if not blank.any():
            return images
    raise UserError(f"U+{code:04X} stays blank at {size} x {size} pixels; ask for a larger size")


def distort(sources: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Random variants of `sources` (images, 1, side, side), uint8 of shape (images, 1, size, size).

    Lengths in pixels are those of an image of 28 x 28, so that other sizes look the same. Rotation up to 10 degrees,
    shear 0.1, scale 0.85 to 1.1, log aspect 0.12, shift 1 pixel; elastic: normal 5 x 5 grid of 1 pixel; thickness:
    a 5 x 5 blur at double size, cut softly at 0.2 to 0.6 of its maximum.
    """
    n, pixel, double = len(sources), 2 / 28, 2 * size

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(n, *shape).uniform_(low, high, generator=generator)

    angle, shear, scale = uniform(-10, 10) * math.pi / 180, uniform(-0.1, 0.1), uniform(0.85, 1.1)
    aspect, shift, cut = uniform(-0.12, 0.12).exp(), uniform(-pixel, pixel, 2), uniform(0.2, 0.6, 1, 1, 1)
    elastic = pixel * torch.randn(n, 2, 5, 5, generator=generator)

    cos, sin = angle.cos(), angle.sin()
    wide, high = 1 / (scale * aspect), aspect / scale
    x_row = torch.stack([wide * cos, wide * (shear * cos - sin), shift[:, 0]], 1)
    y_row = torch.stack([high * sin, high * (shear * sin + cos), shift[:, 1]], 1)
    grid = F.affine_grid(torch.stack([x_row, y_row], 1), [n, 1, double, double], align_corners=False)
    bent = F.interpolate(elastic, (double, double), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    drawn = F.grid_sample(sources, grid + bent, align_corners=False)

    reach = max(1, round(2 * size / 28))
    blurred = F.avg_pool2d(drawn, 2 * reach + 1, stride=1, padding=reach)
    level = blurred / blurred.amax((2, 3), keepdim=True).clamp_min(1e-6)
    # A bare sigmoid is not 0 where there is no ink: the grey of the background would tell the thickness.
    none, full = torch.sigmoid(-10 * cut), torch.sigmoid(10 * (1 - cut))
    soft = (torch.sigmoid(10 * (level - cut)) - none) / (full - none)
    return (F.avg_pool2d(soft, 2) * 255).round().to(torch.uint8)
