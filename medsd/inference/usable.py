"""Images of a data set before a pipeline that cannot take all of them."""

from collections.abc import Callable, Iterable
from typing import Any

from medsd.errors import InputError
from medsd.inference.likelihood import NotFinite
from medsd.inference.scoring import Found, ScoringMixin


class UsableImages:
    """Those of the `wanted` images that a pipeline takes, in `places`; of the others, key and reason are in `failed`.

    Args:
        pipe: what will be asked.
        data: with columns `key` and `image`.
        wanted: places in `data`.
    """

    def __init__(self, pipe: ScoringMixin, data: Any, wanted: Iterable[int]) -> None:
        self.data = data
        self.places: list[int] = []
        self.failed: list[dict[str, str]] = []
        for place in wanted:
            try:
                pipe.fit_image(data[place]["image"])
            except (InputError, ValueError, TypeError, OSError) as error:
                self._fail(place, error)
            else:
                self.places.append(place)

    def apply(self, compute: Callable[[Any, list[int]], Found]) -> Found | None:
        """`compute(images, places)`, again without those whose error proves to be not finite; None where no image is left."""
        while self.places:
            try:
                return compute(self.data.select(self.places), self.places)
            except NotFinite as error:
                if not error.images:
                    raise
                bad = {self.places[index] for index in error.images}
                for place in sorted(bad):
                    self._fail(place, error)
                self.places = [place for place in self.places if place not in bad]
        return None

    def _fail(self, place: int, error: Exception) -> None:
        self.failed.append({"key": self.data.select_columns(["key"])[place]["key"], "reason": " ".join(str(error).split())})
