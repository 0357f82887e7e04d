"""Makes the stored class list of the glyph bank, `toolkit/data/glyphs.txt`.

Command, from the root of the repository (about 5 s; needs the `toolkit` package importable):

    python -m experiments.tools.make_glyph_list > glyphs.txt

The rule, in this order:

1. every code point in the cmap of DejaVu Sans whose Unicode category is Lu, Ll or Lo;
2. no decomposition (so no accented letters, presentation forms or styled letters);
3. no WITH, LIGATURE or DIGRAPH in its name;
4. the first word of its name is one of the 14 scripts of `SCRIPTS`, which also says the script's split;
5. the ink box in DejaVu Sans is at most 4 times as long as wide, or as wide as long;
6. no look-alikes: going through the splits in the order train, val, test and through the code points in rising order,
   a character is dropped when its blurred shape has a cosine similarity above 0.92 with one already kept.

The list is stored because names and categories depend on the Unicode version of the Python that reads them. Ogham is
left out: its hatching cannot be read at 28 x 28 pixels.
"""

import sys
import unicodedata

import torch
from torch import Tensor
from torch.nn import functional as F

from toolkit.data.glyphs import charmap, face_paths, ink, load_face, master

SCRIPTS = {
    "CANADIAN": ("train", "Canadian"),
    "LATIN": ("train", "Latin"),
    "CYRILLIC": ("train", "Cyrillic"),
    "GREEK": ("train", "Greek"),
    "OLD": ("train", "Old Italic"),
    "COPTIC": ("train", "Coptic"),
    "LISU": ("train", "Lisu"),
    "ARMENIAN": ("val", "Armenian"),
    "NKO": ("val", "N'Ko"),
    "GEORGIAN": ("test", "Georgian"),
    "ARABIC": ("test", "Arabic"),
    "LAO": ("test", "Lao"),
    "TIFINAGH": ("test", "Tifinagh"),
    "HEBREW": ("test", "Hebrew"),
}
ORDER = ("train", "val", "test")
MAX_ASPECT = 4
MAX_SIMILARITY = 0.92
BLUR_SIGMA = 2.0


def script_of(code: int) -> tuple[str, str] | None:
    """The (split, script) of a code point that passes rules 1 to 4, else None."""
    char = chr(code)
    name = unicodedata.name(char, "")
    plain = unicodedata.category(char) in ("Lu", "Ll", "Lo") and not unicodedata.decomposition(char)
    if not plain or {"WITH", "LIGATURE", "DIGRAPH"} & set(name.split()):
        return None
    return SCRIPTS.get(name.split()[0])


def shapes(masters: Tensor) -> Tensor:
    """Blurred `masters` (classes, side, side) as rows of length 1, shape (classes, side * side)."""
    offsets = torch.arange(-8, 9, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / BLUR_SIGMA) ** 2)
    kernel = kernel / kernel.sum()
    blurred = F.conv2d(masters[:, None], kernel.view(1, 1, 1, -1), padding=(0, 8))
    blurred = F.conv2d(blurred, kernel.view(1, 1, -1, 1), padding=(8, 0))
    return F.normalize(blurred.flatten(1), dim=1)


def without_lookalikes(codes: list[int], rows: Tensor) -> list[int]:
    """The `codes`, in their order, less each whose row is too similar to that of one kept before it."""
    similar = rows @ rows.T > MAX_SIMILARITY
    kept: list[int] = []
    for i in range(len(codes)):
        if not similar[i, kept].any():
            kept.append(i)
    return [codes[i] for i in kept]


def main() -> None:
    """Writes the list to stdout and the number of characters left by each step to stderr."""
    path = face_paths()["DejaVuSans"]
    face = load_face(path)
    found = {code: where for code in charmap(path) if (where := script_of(code))}
    sizes = {code: ink(face, chr(code)).size for code in found}
    readable = [code for code in found if max(sizes[code]) <= MAX_ASPECT * min(sizes[code])]
    readable.sort(key=lambda code: (ORDER.index(found[code][0]), code))
    kept = without_lookalikes(readable, shapes(torch.stack([master(face, chr(code), 64) for code in readable])))
    print(f"by name {len(found)}, by aspect {len(readable)}, without look-alikes {len(kept)}", file=sys.stderr)

    print("# The classes of the glyph bank: code point (hex), split, script.")
    print("# Made by experiments/tools/make_glyph_list.py, which states the rule: plain letters of 14 scripts in")
    print("# DejaVu Sans, less look-alikes (over all splits together); every script lies in one split only.")
    print(f"# {len(kept)} classes; Unicode {unicodedata.unidata_version}.")
    for code in kept:
        print(f"{code:04X} {' '.join(found[code])}")


if __name__ == "__main__":
    main()
