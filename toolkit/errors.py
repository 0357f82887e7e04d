"""The one error type whose text is meant for the user, and how other things become one or are printed at all."""

import io
import sys
from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """One sentence: what was given, what is allowed, what to do. Scripts print it without a traceback."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a `name` that is not among the `known` names of its `kind`, with a suggestion; for no
    name at all, the known ones."""
    known = sorted(known)
    if not name:
        return UserError(f"no {kind} was given; give one of {', '.join(known)}")
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return UserError(f"unknown {kind} {name!r}{hint} (known: {', '.join(known)})")


def in_words(error: UserError | OSError) -> str:
    """The sentence of an error: its own, or what the system refused (a folder that cannot be written, a full disk)."""
    if isinstance(error, UserError):
        return str(error)
    what = f"{error.filename}: " if error.filename else ""
    return f"{what}{(error.strerror or str(error)).lower()}; give another place, or mend that and start again"


def plain_output() -> None:
    """What the encoding of a terminal lacks, such as ± in ASCII, is printed as a question mark, and ends no run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
