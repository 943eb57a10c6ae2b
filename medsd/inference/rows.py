"""Rows of a data set before a pipeline that cannot take all of them."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from medsd.errors import InputError
from medsd.inference.likelihood import NotFinite
from medsd.inference.scoring import ScoringMixin

Found = TypeVar("Found")


class UsableRows:
    """Those of the `wanted` rows whose images a pipeline takes; of the others, key and reason are kept.

    Args:
        pipe: what will be asked.
        rows: with columns `key` and `image`.
        wanted: places in `rows`.
    """

    def __init__(self, pipe: ScoringMixin, rows: Any, wanted: Iterable[int]) -> None:
        self.rows = rows
        self.good: list[int] = []
        self.failed: list[dict[str, str]] = []
        for index in wanted:
            try:
                pipe.fit_image(rows[index]["image"])
            except (InputError, ValueError, TypeError, OSError) as error:
                self._fail(index, error)
            else:
                self.good.append(index)

    def apply(self, compute: Callable[[Any], Found]) -> Found | None:
        """`compute(rows)` of the good rows, without those whose error proves to be not finite; None where no row is left."""
        while self.good:
            try:
                return compute(self.rows.select(self.good))
            except NotFinite as error:
                bad = {self.good[place] for place in error.images}
                for index in sorted(bad):
                    self._fail(index, error)
                self.good = [index for index in self.good if index not in bad]
        return None

    def _fail(self, index: int, error: Exception) -> None:
        self.failed.append({"key": self.rows.select_columns(["key"])[index]["key"], "reason": " ".join(str(error).split())})
