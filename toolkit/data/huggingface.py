"""Image sets of Hugging Face's package `datasets`, from a local folder or by name, as class banks."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from toolkit.data.bank import ClassBank
from toolkit.data.pooled import divided, pooled
from toolkit.errors import UserError


def huggingface(
    split: str,
    path: str,
    data_root: str | Path = "data",
    download: bool = False,
    image: str = "image",
    label: str = "label",
    size: int = 0,
    channels: int = 0,
    revision: str = "",
    parts: str = "",
) -> ClassBank:
    """A data set of Hugging Face: its parts pooled, its classes divided as `pooled.divided` says.

    `path` is a folder that `save_to_disk` wrote, in `data_root` or from here, or else a name for `load_dataset`, of `revision`
    if one is given; what is not in that package's own cache is fetched only with `download`. `image` and `label` name the
    columns, `parts` the parts to pool ("train,test"), all by default. Classes have the names of the label's `ClassLabel`, or of
    the labels themselves; classes without items are left out. `size` and `channels` are as for `convert.from_dataset`, 0
    meaning as they are. Raises UserError without the package, for a set or column that is not there, for unlabelled items, and
    as `from_dataset`.
    """
    folder = next((each for each in (Path(data_root, path).absolute(), Path(path).absolute()) if each.is_dir()), None)
    return divided(_bank(path, folder, download, image, label, size, channels, revision, parts), split)


@cache
def _bank(
    path: str, folder: Path | None, download: bool, image: str, label: str, size: int, channels: int, revision: str, parts: str
) -> ClassBank:
    found = _loaded(path, folder, download, revision)
    held = dict(found) if isinstance(found, dict) else {"train": found}
    wanted = [part.strip() for part in parts.split(",")] if parts else list(held)
    if absent := [part for part in wanted if part not in held]:
        raise UserError(f"{path} has no part {', '.join(absent)}; its parts are {', '.join(held)}")
    for part in wanted:
        if absent := [column for column in (image, label) if column not in held[part].column_names]:
            raise UserError(
                f"{path} has no column {', '.join(absent)} in {part}; its columns are {', '.join(held[part].column_names)}: "
                "give their names as image=NAME and label=NAME"
            )
    names = getattr(held[wanted[0]].features[label], "names", None)
    seen = sorted({value for part in wanted for value in held[part].unique(label)}, key=lambda value: (str(type(value)), value))
    if unlabelled := [part for part in wanted if names and any(value in (-1, None) for value in held[part].unique(label))]:
        raise UserError(f"{path} has items without a label in {', '.join(unlabelled)}; name the labelled parts as parts=train")
    if names:
        names = [names[value] for value in seen]
    return pooled(path, [_Pairs(held[part], image, label) for part in wanted], names, size or None, channels or None, True)


def _loaded(path: str, folder: Path | None, download: bool, revision: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"the package datasets cannot be imported ({error}); run pip install metalearning-toolkit[huggingface]"
        ) from None
    local = datasets.DownloadConfig(local_files_only=not download)
    load: Callable[[], Any] = (
        (lambda: datasets.load_from_disk(str(folder)))
        if folder
        else (lambda: datasets.load_dataset(path, revision=revision or None, download_config=local))
    )
    try:
        return load()
    except Exception as error:  # its many errors have no common base
        said = " ".join(str(error).split()).rstrip(".")
        advice = "" if folder or download else "; add --download to fetch it, or give a folder that save_to_disk wrote"
        raise UserError(f"{folder or path} cannot be loaded by datasets ({type(error).__name__}: {said}){advice}") from None


class _Pairs:
    """A part as a map-style dataset of (image, label)."""

    def __init__(self, rows: Any, image: str, label: str) -> None:
        self.rows, self.image, self.label = rows.select_columns([image, label]), image, label

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        row = self.rows[i]
        return row[self.image], row[self.label]
