"""Generated images on disk, batch by batch as they are drawn, until all are there: what a stopped run goes on from."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from medsd.output import flush, replace_folder, write_text, writing

SETTINGS = "settings.json"
MANIFEST, OVERVIEW = "manifest.jsonl", "overview.png"
LONGEST_NAME = 60
"""Characters of a class's folder; file systems allow 255 bytes, and a character can take four."""


def folder_names(class_names: Sequence[str | None]) -> dict[str | None, str]:
    """A folder for each class, whatever characters are in its name, and a different one for each, also where case does not count."""
    folders: dict[str | None, str] = {}
    taken = {MANIFEST, OVERVIEW}
    for name in class_names or [None]:
        plain = re.sub(r"[^\w .+-]", "-", name or "unconditional")[:LONGEST_NAME].strip(". ") or "class"
        folder, number = plain, 1
        while folder.casefold() in taken:
            number += 1
            folder = f"{plain}-{number}"
        taken.add(folder.casefold())
        folders[name] = folder
    return folders


class Gallery:
    """A hidden folder beside the images, in which a batch counts once its record is there.

    Args:
        images: the folder that the images will be in.
        settings: all that determines them. Batches under other settings are of no use.
    """

    def __init__(self, images: Path, settings: Mapping[str, Any]) -> None:
        self.images = images
        self.work = images.with_name(f".{images.name}.generating")
        self.files, self.records = self.work / "files", self.work / "batches"
        self.settings = json.dumps(settings, sort_keys=True, indent=1)

    def begin(self) -> int:
        """Make the folder, or keep one of the same settings; returns the number of images that are drawn already."""
        record = self.work / SETTINGS
        if not record.is_file() or record.read_text() != self.settings:
            if self.done():
                print(f"images of a stopped run with other settings are discarded ({self.work})")
            shutil.rmtree(self.work, ignore_errors=True)
            self.records.mkdir(parents=True)
            write_text(record, self.settings)
        return len(self.lines())

    def done(self) -> set[int]:
        """Numbers of the batches that are there, with all their files."""
        return {int(record.stem) for record in self._records()}

    def add(self, number: int, lines: Sequence[Mapping[str, Any]], views: torch.Tensor) -> None:
        """Keep the manifest's lines of a batch whose files are written, and its `views` `(n, C, H, W)` for the overview."""
        with writing(self.images):
            for line in lines:
                flush(self.files / line["file"])
            save_file({"views": views.contiguous()}, self.records / f"{number:06d}.safetensors")
        write_text(self.records / f"{number:06d}.json", json.dumps(list(lines)))

    def lines(self) -> list[dict[str, Any]]:
        """Of the manifest, by batch."""
        return [line for record in self._records() for line in json.loads(record.read_text())]

    def views(self) -> torch.Tensor:
        """`(N, C, H, W)` in `[-1, 1]`, by batch."""
        return torch.cat([self.views_of(number) for number in sorted(self.done())])

    def views_of(self, number: int) -> torch.Tensor:
        """`(n, C, H, W)` of one batch."""
        return load_file(self.records / f"{number:06d}.safetensors")["views"]

    def publish(self) -> None:
        """Write the manifest and let the images take their place, flushed to the disk."""
        with writing(self.images):
            (self.files / MANIFEST).write_text("".join(json.dumps(line) + "\n" for line in self.lines()))
            for path in (*self.files.rglob("*"), self.files):
                flush(path)
            replace_folder(self.files, self.images)
            flush(self.images.parent)
        shutil.rmtree(self.work, ignore_errors=True)

    def _records(self) -> list[Path]:
        """Of batches whose files are all there: they are not where a run was killed just after the images took their place."""
        return [
            record
            for record in sorted(self.records.glob("[!.]*.json"))
            if all((self.files / line["file"]).is_file() for line in json.loads(record.read_text()))
        ]
