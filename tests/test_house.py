"""The shape of the house: imports point one way, and importing the toolkit is light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Who may import whom, lowest first: a module may import those of earlier lines only (and its own room).
LAYERS = [
    ["errors", "products", "stopping", "tape"],
    ["files"],
    ["plugins", "intervals", "arguments", "cluster"],
    ["task", "tree", "energy"],
    ["metrics", "kernels", "curve", "modules", "outer", "allocator", "randomness", "processes"],
    ["norms", "distributed"],
    ["data", "rules"],
    ["models"],
    ["samplers", "learner", "rule_line"],
    ["starts", "objectives"],
    ["learned"],
    ["plan", "prefix", "recorded", "order"],
    ["engine", "sharded"],
    ["choose", "cost"],
    ["predict", "algorithms", "train", "evaluate", "landscape", "adapted"],
    ["backend", "mixture", "overlap", "probe", "tuning"],
    ["health", "diagnosis"],
    ["runs"],
    ["plots", "report"],
    ["flags"],
    ["parts", "templates"],
    ["testing"],
    ["experiment"],
    ["again"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: i for i, layer in enumerate(LAYERS) for name in layer}


def imports(path: Path) -> set[str]:
    """The rooms of the toolkit, and other top-level packages, that a file imports at run time."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    checked = [n for branch in ast.walk(tree) if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
               for n in ast.walk(branch)]  # fmt: skip
    for node in ast.walk(tree):
        if node in checked:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "toolkit" else [f"toolkit.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {".".join(name.split(".")[:2]) if name.startswith("toolkit.") else name.split(".")[0] for name in names}
    return found


def test_imports_point_one_way() -> None:
    for path in (ROOT / "toolkit").rglob("*.py"):
        relative = path.relative_to(ROOT / "toolkit").with_suffix("")
        room = relative.parts[0]
        if room == "__init__":
            continue
        used = imports(path)
        assert "experiments" not in used, path
        assert room == "plots" or "matplotlib" not in used or str(relative) == "data/glyphs", f"{path} imports matplotlib"
        for name in used:
            other = name.removeprefix("toolkit.")
            if name.startswith("toolkit.") and other in LEVEL and other != room:
                assert LEVEL[other] < LEVEL[room], f"{path} imports {other}, which stands above or beside it"


def test_every_room_is_in_the_picture() -> None:
    picture = (ROOT / "ARCHITECTURE.md").read_text()
    for path in (ROOT / "toolkit").iterdir():
        if path.name.startswith("_") or path.suffix not in ("", ".py"):
            continue
        assert path.stem in LEVEL, f"{path.name} has no layer"
        assert f"`{path.stem}{'.py' if path.suffix else '/'}`" in picture, f"ARCHITECTURE.md does not name {path.name}"


def test_importing_the_toolkit_is_light() -> None:
    heavy = ["torchvision", "scipy", "matplotlib", "learn2learn", "PIL", "tyro", "torch.distributed.tensor"]
    code = f"import toolkit, toolkit.experiment, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_package_shows_its_names_when_they_are_asked_for() -> None:
    """And of a function and its module the function, whichever is asked for first."""
    code = (
        "import sys, toolkit; assert 'torch' not in sys.modules\n"
        "from toolkit.train import Record; import toolkit.evaluate, toolkit.choose\n"
        "for name in ('train', 'evaluate', 'choose'): assert getattr(toolkit, name).__module__ == f'toolkit.{name}', name\n"
        "assert all(hasattr(toolkit, name) for name in toolkit.__all__) and not hasattr(toolkit, 'nothing')\n"
        "from toolkit import *"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_core_is_an_evenings_reading() -> None:
    picture = (ROOT / "ARCHITECTURE.md").read_text()
    said = re.search(
        r"To read in an evening, in this order: (.*?): the whole method in less than ([\d,]+) lines", picture, re.DOTALL
    )
    assert said is not None
    files, most = re.findall(r"`(\w+\.py)`", said[1]), int(said[2].replace(",", ""))
    assert len(files) == 10
    assert 0.9 * most < sum(len((ROOT / "toolkit" / name).read_text().splitlines()) for name in files) < most


def test_files_stay_small() -> None:
    long = {p.name: n for p in (ROOT / "toolkit").rglob("*.py") if (n := len(p.read_text().splitlines())) > 300}
    assert not long, long
