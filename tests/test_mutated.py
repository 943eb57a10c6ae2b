"""Broken files give pixels or a refusal: a short run of `benchmarks/mutated_inputs.py`, without real data."""

from collections import Counter

import pytest

from benchmarks.mutated_inputs import ALLOWED, FORBIDDEN, report, run

COUNT = 500


@pytest.fixture(scope="module")
def notes():
    return run(range(COUNT), seed=0, data=None, workers=2, show=lambda done: None)


def test_every_file_is_decoded_or_refused(notes):
    wrong = [note for note in notes if note["outcome"] in FORBIDDEN]
    assert not wrong, f"{len(wrong)} wrong; the first, which --only does again: {wrong[0]}"
    assert sorted(note["number"] for note in notes) == list(range(COUNT))


def test_some_are_decoded_and_most_kinds_are_there(notes):
    outcomes = Counter(note["outcome"] for note in notes)
    assert set(outcomes) <= set(ALLOWED) and outcomes["decoded"] > COUNT / 10 and outcomes["refused"] > COUNT / 10
    assert {note["kind"] for note in notes} >= {"dicom", "nii", "nii.gz", "png", "tif", "npz", "csv"}
    assert "unexpected exceptions" in report(notes)


def test_a_refusal_names_its_file(notes):
    for note in notes:
        if note["outcome"] == "refused" and note["kind"] not in {"csv", "npz"}:
            assert note["reason"].startswith(f"{note['number']}-{note['seed']}: ") and "\n" not in note["reason"]


def test_a_number_can_be_done_again(notes):
    number = next(note["number"] for note in notes if note["outcome"] == "refused" and note["kind"] == "dicom")
    assert run([number], seed=0, data=None, workers=1, show=lambda done: None) == [note for note in notes if note["number"] == number]
