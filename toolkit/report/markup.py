"""Markup by functions: whatever is no markup yet is escaped on its way in, so that no text of a run folder becomes code."""

import html
import json
from typing import Any

VOID = ("img",)


class Html(str):
    """Text that is markup already."""


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element. Children that are None are left out, as are attributes that are None or False; `class_` is class."""
    words = [name]
    for key, value in attributes.items():
        if value is not None and value is not False:
            key = key.rstrip("_").replace("_", "-")
            words.append(key if value is True else f'{key}="{html.escape(str(value))}"')
    return Html(f"<{' '.join(words)}>" + ("" if name in VOID else f"{join(*children)}</{name}>"))


def join(*children: object) -> Html:
    """The children one after the other."""
    return Html("".join(c if isinstance(c, Html) else html.escape(str(c)) for c in children if c is not None))


def embedded(data: Any) -> Html:
    """JSON that can stand in a <script>, which ends at the first "</script" whatever the quotes around it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Html(text)
