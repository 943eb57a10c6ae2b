"""The flags of `prepare_data.py`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from medsd.config.base import RecipeConfig
from medsd.errors import InputError


@dataclass
class PrepareDataConfig(RecipeConfig):
    """Turn medical images into a Parquet data set with class-token prompts and a patient-level split."""

    section: ClassVar[str] = "prepare_data"

    source: Literal["phantom", "images", "csv", "dicom", "nifti", "npz", "rsna2019", "adni", "oasis", "brats"] = "phantom"
    """What lies in data_dir: the phantom; one folder per class; a CSV beside images; DICOM, NIfTI; a MedMNIST npz; a collection."""
    data_dir: str | None = None
    """Folder of the images; for npz also the file itself. The phantom is written here (default: beside output_dir)."""
    output_dir: str = "runs/{name}/data"
    """Folder of the prepared data set."""
    labels: str | None = None
    """CSV with a row per image. A path relative to data_dir or to here."""
    image_column: str | None = None
    """CSV column of the image's path, name or stem. Default: the first of file, path, image, image_id, filename, dicom_name."""
    label_column: tuple[str, ...] = ("label",)
    """CSV column of the label; with multi_label several columns of 0 and 1, or one of names joined by |."""
    multi_label: bool = False
    """Several findings, or none, can hold in one image."""
    uncertain: Literal["drop", "positive", "negative"] = "drop"
    """What a -1 or an empty cell of a finding's column means: leave the image out, or read it as 1 or 0."""
    patient_column: str | None = None
    """CSV column of the patient. Default: the DICOM header's PatientID, else study, series, the folder in CLASS/p01/, file."""
    split_column: str | None = None
    """CSV column that already says train, validation or test."""
    mask_column: str | None = None
    """CSV column of a mask's path, relative to data_dir, beside each PNG or DICOM; kept in the column mask."""
    split_fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)
    """Shares of train, validation and test patients where the source gives no split."""
    class_names: tuple[str, ...] | None = None
    """Names for the labels 0, 1, 2, ... of an npz, or the order of the classes. Default: sorted labels."""
    resolution: int | None = None
    """Side of the square images in pixels; larger images shrink to it, smaller ones are padded. Default: 256 (phantom 64)."""
    resize: Literal["pad", "crop", "stretch"] = "pad"
    """How an image that is not square becomes square."""
    windows: tuple[str, ...] | None = None
    """CT windows, a channel each: brain, subdural, bone, lung, abdomen, CENTRE/WIDTH. Default for CT: the first three (phantom 50/130)."""
    axis: Literal["axial", "coronal", "sagittal"] = "axial"
    """Plane of the slices that a NIfTI volume is cut into."""
    slices: Literal["content", "mask", "all"] = "content"
    """Which slices of a volume: those that show something, those with something in the mask, or all."""
    channels: tuple[str, ...] | None = None
    """Volumes stacked as channels, named by a word of their file names (t1ce; mask, or mask=seg for files called seg); image mask
    stacks the mask of a phantom, or of --mask_column, behind its image."""
    prompt_template: str | None = None
    """Sentence around the class, with {label} in it. Default: "a medical image of {label}" (a collection's own, if it has one)."""
    prompt_metadata: tuple[Literal["age_band", "sex", "view", "slice_position"], ...] | None = None
    """What else the prompt says where it is known; the bare flag means all four."""
    duplicates: Literal["refuse", "drop", "keep"] = "refuse"
    """What to do with identical, near-identical or mirrored images in two splits; drop takes them from train first, never from test."""
    max_quarantine: float = 0.05
    """Largest share of unreadable files before the run is refused."""
    num_workers: int = 2
    """Processes that decode files, each killed and replaced when a file hangs or breaks it."""
    seed: int = 0
    """Seed of the split (and of the phantom)."""
    salt_file: str | None = None
    """File with the secret that patients' ids are hashed with. Default: one per person, in the user's config folder."""
    overwrite: bool = False
    """Replace a data set that is already in output_dir."""
    dry_run: bool = False
    """Read headers only, and say what would come out: images, classes, patients, hours and GB."""
    push_to_hub: bool = False
    """Push the finished data set to the Hub."""
    hub_dataset_id: str | None = None
    """Hub data set repository, user/name."""
    hub_private_repo: bool = True
    """Make the Hub repository private."""
    confirm_public_data: bool = False
    """Say that this data set may be public; needed where the Hub repository is."""

    def check(self) -> None:
        """And the rules of this recipe."""
        super().check()
        if self.prompt_template is not None and "{label}" not in self.prompt_template:
            raise InputError(f'--prompt_template "{self.prompt_template}" has no {{label}} in it')
        if self.source != "phantom" and self.data_dir is None:
            raise InputError(f"--source {self.source} needs --data_dir")
        if self.dry_run and self.source == "phantom":
            raise InputError("--dry_run looks at files that are there: name a --source and --data_dir")
        if self.source == "csv" and self.labels is None:
            raise InputError("--source csv needs --labels FILE.csv")
        if len(self.label_column) != 1 and not self.multi_label:
            raise InputError("--label_column names several columns: add --multi_label, or name one")
        self._check_flags_of_sources()
        if abs(sum(self.split_fractions) - 1) > 1e-6 or min(self.split_fractions) < 0:
            raise InputError(f"--split_fractions {' '.join(map(str, self.split_fractions))}: three shares that add up to 1 are expected")
        if not 0 <= self.max_quarantine <= 1:
            raise InputError(f"--max_quarantine {self.max_quarantine} is not within 0 and 1")
        if self.push_to_hub and self.hub_dataset_id is None:
            raise InputError("--push_to_hub needs --hub_dataset_id user/name")

    def _check_flags_of_sources(self) -> None:
        """Refuse flags that this source would not look at."""
        with_table = self.labels is not None and self.source in {"csv", "dicom", "nifti", "images"}
        for flag in ("image_column", "patient_column", "split_column", "mask_column"):
            if getattr(self, flag) is not None and not with_table:
                raise InputError(f"--{flag} names a column of --labels FILE.csv, which --source csv, dicom and nifti read: add that")
        if self.multi_label and not with_table and self.source not in {"rsna2019", "phantom"}:
            raise InputError("--multi_label needs --labels FILE.csv with the findings, and --source csv, dicom or nifti (or the phantom)")
        if self.mask_column is not None and self.source == "nifti":
            raise InputError("--mask_column is for images; the mask of NIfTI volumes is a channel: --channels t1 mask")
        if self.channels is not None and (self.source not in {"nifti", "brats"} or self.multi_label) and not self.stacks_mask:
            raise InputError(
                "--channels stacks volumes of --source nifti or brats with one class an image, and image mask what --mask_column names "
                "(or the phantom has): leave it away"
            )

    @property
    def stacks_mask(self) -> bool:
        """Whether the masks of single images become their last channel."""
        return self.channels == ("image", "mask") and (self.source == "phantom" or self.mask_column is not None)
