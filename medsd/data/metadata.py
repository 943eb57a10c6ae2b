"""Facts about a patient and an acquisition that may be kept: age band, sex, scanner, view.

Whatever a header or a table says is mapped to one of the words below, or dropped. Nothing else can leave, whatever stands in
the source: ages over 89 become one band, a scanner is its maker's name, a view is one of the standard projections.
"""

import re
from dataclasses import dataclass, fields

SEXES = {"f": "female", "female": "female", "w": "female", "m": "male", "male": "male", "o": "other", "other": "other"}
VIEWS = {
    "ap": "AP",
    "ap supine": "AP",
    "ap erect": "AP",
    "antero-posterior": "AP",
    "pa": "PA",
    "postero-anterior": "PA",
    "ll": "lateral",
    "rl": "lateral",
    "lat": "lateral",
    "l": "lateral",
    "lateral": "lateral",
    "frontal": "frontal",
    "cc": "CC",
    "mlo": "MLO",
    "axial": "axial",
    "coronal": "coronal",
    "sagittal": "sagittal",
}
MAKERS = (
    "Agfa",
    "Canon",
    "Carestream",
    "Elekta",
    "Esaote",
    "Fujifilm",
    "GE",
    "Hitachi",
    "Hologic",
    "Konica Minolta",
    "Mindray",
    "Neusoft",
    "Philips",
    "Samsung",
    "Siemens",
    "Toshiba",
    "United Imaging",
    "Varian",
)
OLDEST_BAND = 90
"""Ages from here on are one band (HIPAA's Safe Harbor, 45 CFR 164.514)."""
POSITIONS = ("lower", "middle", "upper")
"""Thirds of a series or volume."""
PROMPT_METADATA = ("age_band", "sex", "view", "slice_position")
"""What a prompt may say about an image."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one image; every value is one of this module's words."""

    age_band: str | None = None
    """Ten years, such as `60-69`, or `90+`."""
    sex: str | None = None
    scanner: str | None = None
    view: str | None = None

    def or_else(self, other: "Facts") -> "Facts":
        """These facts, and `other`'s where there are none."""
        return Facts(**{field.name: getattr(self, field.name) or getattr(other, field.name) for field in fields(self)})


FACT_COLUMNS = tuple(field.name for field in fields(Facts))
"""Columns of a prepared data set, for prompts and for metrics by subgroup."""


def known_facts(age: object = None, sex: object = None, manufacturer: object = None, view: object = None) -> Facts:
    """Facts from a source's own words; what is not understood is dropped."""
    return Facts(age_band(age), SEXES.get(_word(sex)), scanner(manufacturer), VIEWS.get(_word(view)))


def age_band(age: object) -> str | None:
    """`"063Y"`, `"63"`, `63.4` -> `"60-69"`; months, weeks and days are 0-9; no age or one out of range is None."""
    found = re.fullmatch(r"(\d{1,3})(?:\.\d*)?\s*([DWMY]?)", str(age or "").strip().upper())
    if not found:
        return None
    years = int(found[1]) if found[2] in {"", "Y"} else 0
    if years > 130:
        return None
    return f"{OLDEST_BAND}+" if years >= OLDEST_BAND else f"{years // 10 * 10}-{years // 10 * 10 + 9}"


def scanner(manufacturer: object) -> str | None:
    """The maker, if it is one of `MAKERS`; any other is None."""
    words = f" {re.sub(r'[^a-z]+', ' ', str(manufacturer or '').lower())} "
    return next((maker for maker in MAKERS if f" {maker.lower()} " in words), None)


def slice_position(fraction: float) -> str:
    """The third of a volume at `fraction` of its height, 0 the lowest (most inferior) slice and 1 the highest."""
    return POSITIONS[min(2, int(fraction * 3))]


def _word(value: object) -> str:
    return str(value or "").strip().lower()
