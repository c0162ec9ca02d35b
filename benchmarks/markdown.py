"""Tables in Markdown, to read on a terminal too."""

from collections.abc import Sequence
from pathlib import Path


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table; the first row is its head, and all columns but the first hold numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *body = (
        "| "
        + " | ".join(
            _pad(number, cell, width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in rows
    )
    rule = (
        "| "
        + " | ".join(
            "-" * width if number == 0 else "-" * (width - 1) + ":"
            for number, width in enumerate(widths)
        )
        + " |"
    )
    return "\n".join((head, rule, *body))


def publish(text: str, path: Path) -> None:
    """Print a report and write it to a file."""
    print(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def _pad(column: int, cell: str, width: int) -> str:
    return cell.rjust(width) if column else cell.ljust(width)
