"""How figures are written on pages, on the console and in tables."""

from collections.abc import Mapping


def percent(rate: float) -> str:
    """Format a rate: 0.634 -> `63.4 %`."""
    return f"{100 * rate:.1f} %"


def number(value: float) -> str:
    """Format a score with three decimals, or with three significant digits below 0.1."""
    return f"{value:.3f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"


def fixed(value: float) -> str:
    """Format with three decimals, so that the numbers of a column align."""
    return f"{value:.3f}"


def moved(value: float) -> str:
    """Format with a sign and three decimals; a value that rounds to zero gives `+0.000`."""
    return f"{round(value, 3) + 0.0:+.3f}"


def p_value(value: float) -> str:
    """Format a p-value: 0.0312 -> `0.031`, 0.0001 -> `< 0.001`."""
    return "< 0.001" if value < 0.001 else fixed(value)


def verdict(interval: Mapping[str, float], level: float) -> str:
    """Whether an interval lies "above" `level`, "below" it, or contains it ("unclear")."""
    return "above" if interval["low"] > level else "below" if interval["high"] < level else "unclear"


def needed(tested: Mapping, level: float) -> str:
    """Say how many prompts a difference of the size seen needs, where its interval contains `level`; else "".

    `tested` has "low", "high" and "prompts_needed".
    """
    count = tested["prompts_needed"]
    return f"about {count} prompts would show it" if count and verdict(tested, level) == "unclear" else ""


def span(entry: Mapping[str, float], low: str = "low", high: str = "high") -> str:
    """Format an interval of rates in %, without the sign: `50.1–58.9`."""
    return f"{100 * entry[low]:.1f}–{100 * entry[high]:.1f}"


def with_span(rate: Mapping[str, float]) -> str:
    """Format a rate in % with its interval: `54.5 (50.1–58.9)`."""
    return f"{100 * rate['mean']:.1f} ({span(rate)})"
