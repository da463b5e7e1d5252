"""What became of each attention of a model."""

import dataclasses
import html
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Site:
    """One attention of a model.

    Attributes:
      path: of the module, or the place in the code that calls it.
      kind: what computes it, for example ``"nnx.MultiHeadAttention"``.
      query, key, value: shapes.
      dtype: of query.
      mask: its form in words: ``"none"``, ``"causal"``, ``"mask [1, 1, T, S]"``, ...
      recipe: of the attention that took its place, or None if it was kept.
      reason: why it was kept, or None.
      calls: how many times it was called while the model was traced.
    """

    path: str
    kind: str
    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    dtype: str
    mask: str
    recipe: str | None
    reason: str | None
    calls: int = 1


class Report:
    """The attentions of a model and what became of them. Prints as text, shows as HTML.

    Attributes:
      sites: those that were called while the report was open, in order of their first call.
    """

    def __init__(self, title: str = "Attention") -> None:
        self.title = title
        self.sites: list[Site] = []

    @property
    def swapped(self) -> list[Site]:
        return [site for site in self.sites if site.recipe is not None]

    @property
    def kept(self) -> list[Site]:
        return [site for site in self.sites if site.recipe is None]

    def add(self, site: Site) -> None:
        """A call that is like one before, but for its number, is counted with it."""
        for i, known in enumerate(self.sites):
            if dataclasses.replace(known, calls=site.calls) == site:
                self.sites[i] = dataclasses.replace(known, calls=known.calls + site.calls)
                return
        self.sites.append(site)

    def _summary(self) -> str:
        summary = f"{self.title}: {len(self.swapped)} swapped, {len(self.kept)} kept"
        if self.sites:
            return summary
        return f"{summary}; none was traced (a program compiled before is not reported again)"

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                site.path,
                site.kind,
                _shape(site.query),
                _shape(site.key),
                site.dtype,
                site.mask,
                str(site.calls),
                site.recipe or "-",
                site.reason or "",
            )
            for site in self.sites
        ]

    def __str__(self) -> str:
        if not self.sites:
            return self._summary()
        return f"{self._summary()}\n{text_table(COLUMNS, self._rows())}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self._summary())}</p>{html_table(COLUMNS, self._rows())}"


COLUMNS = ("path", "kind", "query", "key", "dtype", "mask", "calls", "recipe", "why it was kept")


def _shape(dims: Sequence[int]) -> str:
    return "x".join(map(str, dims))


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned at the left."""
    lines = [columns, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    style = 'style="text-align:left"'
    head = "".join(f"<th {style}>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td {style}>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class Tables:
    """A result that shows itself as tables: text, and HTML in a notebook."""

    def _tables(self) -> list[tuple[str, Sequence[str], list[tuple[str, ...]]]]:
        """(title, columns, rows) of each."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n\n".join(
            f"{title}\n{text_table(columns, rows)}" for title, columns, rows in self._tables()
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(
            f"<p>{html.escape(title)}</p>{html_table(columns, rows)}"
            for title, columns, rows in self._tables()
        )
