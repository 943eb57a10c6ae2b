"""The flags of `push.py`."""

from dataclasses import dataclass
from typing import ClassVar

from medsd.config.base import RecipeConfig
from medsd.errors import InputError


@dataclass
class PushConfig(RecipeConfig):
    """Push a finished pipeline, LoRA run or autoencoder to the Hub, once its audit and the privacy scan have passed."""

    section: ClassVar[str] = "push"

    pipeline: str = "runs/{name}/unet"
    """Folder that a training has finished: a pipeline, a LoRA run, or an autoencoder."""
    hub_model_id: str | None = None
    """Hub repository, user/name. Default: none, and nothing is sent."""
    hub_private_repo: bool = True
    """Make the Hub repository private."""
    revision: str | None = None
    """Branch to push to. Default: main."""
    dataset_name: str | None = None
    """Prepared data that it was trained on, whose private folder says what may not be named. Default: where its config.yaml says."""
    report: str | None = None
    """Folder that evaluate.py wrote, for the card. Default: report, beside the pipeline, if it is of these weights."""
    license: str | None = None
    """Licence of the weights, such as cc-by-nc-4.0. Default: none is stated."""
    merge_lora: bool = False
    """Add LoRA adapters to the weights of their base, in a folder PIPELINE_merged beside it, and push that."""
    audit_samples: int | None = None
    """Audit first, with so many images. Default: go by the audit.json that is there."""
    skip_audit: bool = False
    """Push without an audit; the card says so."""
    confirm_public_data: bool = False
    """Say that the training images may be public; needed where nobody audited the model and the Hub repository is public."""
    dry_run: bool = False
    """Say what would be sent, and send nothing: also what happens without --hub_model_id."""

    def check(self) -> None:
        """And the rules of this recipe."""
        super().check()
        if self.skip_audit and self.audit_samples is not None:
            raise InputError("--skip_audit and --audit_samples exclude each other: drop one")
