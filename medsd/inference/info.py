"""What a pipeline knows of itself beside its weights: `medsd.json`."""

from dataclasses import asdict, dataclass
from typing import Any

from medsd.data.dataset import DataInfo
from medsd.data.hypotheses import Hypotheses
from medsd.inference.calibration import Calibration


@dataclass(frozen=True)
class Base:
    """The model that LoRA adapters belong to."""

    name: str
    """Hub id, or path: in `medsd.json` relative to the run, in memory absolute."""
    revision: str | None
    sha256: str | None
    """Of a local base's UNet weights, or of the whole single file."""


@dataclass(frozen=True)
class PipelineInfo:
    """`medsd.json` of a pipeline folder."""

    data: DataInfo | None = None
    """None for a foreign folder, which knows no classes."""
    codec: dict[str, Any] | None = None
    hypotheses: Hypotheses | None = None
    """What it chooses between, and how often each was seen in training."""
    calibration: Calibration | None = None
    base: Base | None = None
    own_vae: bool = False
    """Whether the autoencoder is not the base's."""
    reads_prompts: bool = True
    """Whether its text encoder was trained on prompts; where it was not, it has to be trained in full."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "PipelineInfo":
        """Inverse of `to_dict`; what a record does not say has its default."""
        return cls(
            data=DataInfo(**record["data"]) if record.get("data") else None,
            codec=record.get("codec"),
            hypotheses=Hypotheses.from_dict(record["hypotheses"]) if record.get("hypotheses") else None,
            calibration=Calibration.from_dict(record["calibration"]) if record.get("calibration") else None,
            base=Base(**record["base"]) if record.get("base") else None,
            own_vae=record.get("own_vae", False),
            reads_prompts=record.get("reads_prompts", True),
        )
