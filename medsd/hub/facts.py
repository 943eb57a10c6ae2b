"""What is known of a model that is to be pushed: what its card is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medsd.hub.contents import Kind


@dataclass(frozen=True)
class Facts:
    """What is known of a model that is to be pushed."""

    name: str
    """`user/name`, or a folder's."""
    kind: Kind
    class_name: str
    """Of diffusers or medsd, that loads it."""
    info: Mapping[str, Any]
    """Its `medsd.json`."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Flags of its training."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """Of its data."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    audit: Mapping[str, Any] | None = None
    """None where it was skipped."""
    base: tuple[str, str | None] | None = None
    """Hub id and revision of the model that training started from."""
    licence: str | None = None
    data: str | None = None
    """Hub id of its data."""
    figures: tuple[str, ...] = ()
    """Paths in the repository."""
    checkpoint: int | None = None
    """Updates of a model that had not finished its training."""
    revision: str | None = None
    """Branch that this is on."""

    @property
    def classes(self) -> Sequence[str]:
        """Of a pipeline; empty for an unconditional one, and for an autoencoder."""
        return () if self.kind == "autoencoder" else self.of_data.get("class_names", ())

    @property
    def of_data(self) -> Mapping[str, Any]:
        """What `medsd.json` says of the data; empty for a foreign model."""
        return self.info.get("data") or {}
