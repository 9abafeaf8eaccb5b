"""Tables of text."""


def aligned(rows: list[list[str]], numbers_from: int | None = None) -> str:
    """Rows of cells as columns; the first row is the heading.

    Args:
        rows: of as many cells each.
        numbers_from: the first column that is flush right, as all after it are; None for no such column.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = len(widths) if numbers_from is None else numbers_from
    lines = (
        "  ".join(
            cell.rjust(width) if column >= right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(rows: list[list[str]]) -> str:
    """Rows of cells as a table in Markdown; the first row is the heading."""
    heading, *others = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join([heading, "|" + "---|" * len(rows[0]), *others])
