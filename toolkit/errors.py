"""The one error type whose text is meant for the user, and the sentence for a misspelt name."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """One sentence: what was given, what is allowed, what to do. Scripts print it without a traceback."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a `name` that is not among the `known` names of its `kind`, with a suggestion."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return UserError(f"unknown {kind} {name!r}{hint} (known: {', '.join(known)})")
