"""Markdown tables, and numbers in them: bytes, seconds, durations."""

from collections.abc import Iterable, Sequence


def table_row(cells: Sequence[object]) -> str:
    """Format one row of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def table_header(cells: Sequence[str]) -> str:
    """Format the head of a Markdown table and the rule below it."""
    return table_row(cells) + "\n" + table_row(["---"] * len(cells))


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a whole Markdown table."""
    return "\n".join((table_header(head), *map(table_row, rows)))


def format_fixed(number: float, digits: int) -> str:
    """Format a number with that many digits after the point, and no minus before zeros: -0.001 becomes "0.00"."""
    return f"{round(number, digits) + 0.0:.{digits}f}"


def format_bytes(count: float) -> str:
    """Format a byte count in GB, MB or kB: 1_500_000 becomes "1.5 MB"."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def format_seconds(value: float) -> str:
    """Format a measured time with three digits, in s, ms or µs: 0.0123 becomes "12.3 ms"."""
    for scale, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def format_duration(seconds: float) -> str:
    """Format how long something takes: "40 s", "12 min" or "1 h 5 min"."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
