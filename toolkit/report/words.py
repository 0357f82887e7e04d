"""Numbers as the page writes them."""

import math

NONE = "–"
SPACE = "\N{NO-BREAK SPACE}"


def value(x: float | None, percent: bool) -> str:
    """A metric: percent to a hundredth, anything else to three digits."""
    if x is None:
        return NONE
    return f"{100 * x:.2f}{SPACE}%" if percent else f"{x:.3g}"


def interval(mean: float | None, ci: float | None, percent: bool) -> tuple[str, str]:
    """A mean, and ± half its 95 % interval; the latter is empty when it is not known. To two digits of the interval."""
    if mean is None:
        return NONE, ""
    if percent:
        return (f"{100 * mean:.2f}", f"±{SPACE}{100 * ci:.2f}{SPACE}%") if ci is not None else (value(mean, True), "")
    if ci is None or ci <= 0:
        return f"{mean:.3g}", ""
    places = max(0, 1 - math.floor(math.log10(ci)))
    if places > 5 or abs(mean) >= 1e6:
        return f"{mean:.2e}", f"±{SPACE}{ci:.0e}"
    return f"{mean:.{places}f}", f"±{SPACE}{ci:.{places}f}"


def count(x: float | None) -> str:
    """A whole number, thousands apart."""
    return NONE if x is None else f"{x:,.0f}"


def steps(k: int) -> str:
    """So many steps."""
    return f"{k}{SPACE}step{'s' * (k != 1)}"
