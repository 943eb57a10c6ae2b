"""One synthetic image -> a file that says so: PNG, NIfTI, DICOM secondary capture.

Values come back by `medsd.read_image`, as each function says. Nothing in these files is a fact about a person, and the same image
gives the same bytes.
"""

import gzip
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import medsd
from medsd.data.dicom import SECONDARY_CAPTURE
from medsd.data.intensity import IntensityMap, Windows, nominal_ranges
from medsd.errors import InputError

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngInfo
    from pydicom import Dataset

SYNTHETIC = "Synthetic image, drawn by a diffusion model; it shows nobody."
LARGEST_STORED = 2**16 - 1
SPARE_STEPS = 35
"""Of the 16 bits of a DICOM, so that neither end falls victim to a decimal's rounding."""
NOBODY = {
    "PatientName": "SYNTHETIC",
    "PatientID": "SYNTHETIC",
    "PatientBirthDate": "",
    "PatientSex": "",
    "StudyDate": "",
    "StudyTime": "",
    "StudyID": "",
    "AccessionNumber": "",
    "ReferringPhysicianName": "",
}
"""Elements that DICOM wants, and that nobody is behind."""
LONGEST = {"SeriesDescription": 64, "DerivationDescription": 1024}
"""Characters."""


@dataclass(frozen=True)
class Origin:
    """Where a synthetic image comes from."""

    class_name: str | None
    seed: int
    model: str
    """Fingerprint of the pipeline's weights."""
    sampling: str = ""
    """How it was drawn, in words."""

    def described(self) -> str:
        """One line for people."""
        named = f"class {self.class_name}, " if self.class_name is not None else ""
        return f"{named}seed {self.seed}, model {self.model}" + (f", {self.sampling}" if self.sampling else "")

    def texts(self) -> dict[str, str]:
        """PNG's own words for it."""
        return {"Software": f"medsd {medsd.__version__}", "Description": SYNTHETIC, "Comment": self.described()}


def png_texts(texts: Mapping[str, str]) -> "PngInfo":
    """Text chunks of a PNG."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    return info


def write_png(path: Path, pixels: np.ndarray, texts: Mapping[str, str]) -> None:
    """Pixels `(H, W)` uint8 or uint16, or `(H, W, 3)` uint8, with `texts` in the file."""
    from PIL import Image

    Image.fromarray(pixels).save(path, pnginfo=png_texts(texts))


def to_16_bits(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """`[low, high]` -> 0 to 65535, clipped outside; back by low + stored / 65535 * (high - low)."""
    _check_range(low, high)
    return np.rint((np.clip(image.astype(np.float64), low, high) - low) * (LARGEST_STORED / (high - low))).astype(np.uint16)


def write_nifti(path: Path, image: np.ndarray, description: str) -> None:
    """An image `(C, H, W)` as one axial slice, `(W, H, 1)` or `(W, H, 1, C)` float32, which comes back as it was.

    Its pixels' distances are not known, and the file says so. The description is cut to 79 bytes. A name that ends in .gz is compressed.
    """
    import nibabel

    turned = image.astype(np.float32).swapaxes(1, 2)[:, ::-1, ::-1, None]
    voxels = turned[0] if len(image) == 1 else np.moveaxis(turned, 0, -1)
    nifti = nibabel.Nifti1Image(np.ascontiguousarray(voxels), np.eye(4))
    nifti.header.set_xyzt_units("unknown")
    nifti.header["descrip"] = description.encode("ascii", "replace")[:79]
    content = nifti.to_bytes()
    path.write_bytes(gzip.compress(content, mtime=0) if path.name.endswith(".gz") else content)


def display_range(intensity: IntensityMap, image_channels: int) -> tuple[float, float]:
    """(low, high) of what a viewer shows at first: the narrowest of windows, else all that the map holds."""
    if isinstance(intensity, Windows):
        centre, width = min(intensity.windows, key=lambda window: window[1])
        return centre - width / 2, centre + width / 2
    return nominal_ranges(intensity, image_channels)[0]


def write_dicom(
    path: Path,
    image: np.ndarray,
    unit: str,
    extent: tuple[float, float],
    shown: tuple[float, float],
    origin: Origin,
    number: int = 1,
) -> dict[str, Any]:
    """An image `(H, W)` in `unit`, HU or another, as a secondary capture; returns its slope, intercept and UID.

    Values from the `extent`'s low to its high are kept to half a slope, 1, 2 or 5 times a power of ten of which 16 bits span the extent.
    A viewer opens with `shown`; `number` is the image's in its series, which all images of one model, class and sampling share.
    """
    from pydicom.valuerep import format_number_as_ds

    _check_range(*extent)
    slope = _step(extent[1] - extent[0])
    intercept = float(format_number_as_ds((math.floor(extent[0] / slope) - 1) * slope))
    stored = np.rint((image.astype(np.float64) - intercept) / slope).clip(0, LARGEST_STORED).astype("<u2")
    header = _header(unit, origin)
    header.Rows, header.Columns = stored.shape
    header.PixelData, header.InstanceNumber = stored.tobytes(), number
    header.RescaleSlope, header.RescaleIntercept = slope, format_number_as_ds(intercept)
    header.VOILUTFunction = "LINEAR_EXACT"
    header.WindowCenter, header.WindowWidth = ((f"{value:.9g}") for value in ((shown[0] + shown[1]) / 2, shown[1] - shown[0]))
    # By its pixels too, since the same seed draws another image with another sampling.
    uid = _uid(header.SeriesInstanceUID, origin.seed, hashlib.sha256(header.PixelData).hexdigest())
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = uid
    header.save_as(path, enforce_file_format=True)
    return {"slope": slope, "intercept": intercept, "sop_uid": uid}


def _header(unit: str, origin: Origin) -> "Dataset":
    """What does not depend on the pixels."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = SECONDARY_CAPTURE, ExplicitVRLittleEndian
    header = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    texts = {"SeriesDescription": f"Synthetic: {origin.class_name}", "DerivationDescription": f"{SYNTHETIC} medsd, {origin.described()}"}
    elements = NOBODY | {name: text.replace("\\", "/")[: LONGEST[name]] for name, text in texts.items()}
    elements |= {
        "SpecificCharacterSet": "ISO_IR 192",
        "SOPClassUID": SECONDARY_CAPTURE,
        "StudyInstanceUID": _uid(origin.model),
        "SeriesInstanceUID": _uid(origin.model, str(origin.class_name), origin.sampling),
        "SeriesNumber": 1,
        "Modality": "CT" if unit == "HU" else "OT",
        "ConversionType": "SYN",
        "SyntheticData": "YES",
        "ImageType": ["DERIVED", "SECONDARY"],
        "BurnedInAnnotation": "NO",
        "Manufacturer": "medsd",
        "SoftwareVersions": medsd.__version__,
        "RescaleType": "HU" if unit == "HU" else "US",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 0,
    }
    for name, value in elements.items():
        setattr(header, name, value)
    return header


def _step(width: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten of which 16 bits span `width`."""
    least = width / (LARGEST_STORED - SPARE_STEPS)
    power = math.floor(math.log10(least))
    return next(step for step in (float(f"{digit}e{power}") for digit in (1, 2, 5, 10)) if step >= least)


def _check_range(low: float, high: float) -> None:
    if not high > low:
        raise InputError(f"a range from {low} to {high} holds no values: the data that the pipeline was trained on is constant")


def _uid(*key: int | str) -> str:
    """The same key, the same UID."""
    digest = hashlib.sha256("/".join(map(str, ("medsd-synthetic", *key))).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"
