"""Facts that may be kept, and the prompts that say them."""

import pytest

from medsd.data.metadata import FACT_COLUMNS, MAKERS, VIEWS, Facts, age_band, known_facts, scanner, slice_position
from medsd.data.prompts import prompt_of
from medsd.data.tables import fact_reader


@pytest.mark.parametrize(
    ("age", "band"),
    [
        ("063Y", "60-69"),
        ("63", "60-69"),
        (63.4, "60-69"),
        ("9", "0-9"),
        ("018M", "0-9"),
        ("006W", "0-9"),
        ("010D", "0-9"),
        ("89", "80-89"),
        ("90", "90+"),
        ("113Y", "90+"),
        ("0410Y", None),
        ("411", None),
        ("-1", None),
        ("", None),
        (None, None),
        ("sixty", None),
    ],
)
def test_ages_become_bands(age, band):
    assert age_band(age) == band


def test_only_known_words_pass():
    assert known_facts("45", "F", "SIEMENS Healthineers", "antero-posterior") == Facts("40-49", "female", "Siemens", "AP")
    assert known_facts("Doe", "Jane Doe", "Dr Doe's scanner", "Doe view") == Facts()
    assert scanner("GE MEDICAL SYSTEMS") == "GE" and scanner("Imagenes") is None
    assert all(scanner(maker.upper()) == maker for maker in MAKERS) and set(VIEWS.values()) >= {"AP", "PA", "lateral"}


def test_facts_are_filled_from_a_second_source():
    assert Facts(sex="male").or_else(Facts("60-69", "female", None, "AP")) == Facts("60-69", "male", None, "AP")


def test_thirds_of_a_volume():
    assert [slice_position(fraction) for fraction in (0, 0.33, 0.34, 0.66, 0.67, 1)] == [
        *("lower", "lower", "middle"),
        *("middle", "upper", "upper"),
    ]


@pytest.mark.parametrize(
    ("columns", "facts"),
    [
        ({"age": "64", "sex": "f", "view": "pa", "scanner": "Philips"}, Facts("60-69", "female", "Philips", "PA")),
        ({"Patient Age": "064Y", "Patient Gender": "M", "View Position": "AP"}, Facts("60-69", "male", None, "AP")),
        (
            {"PatientAge": "64", "PatientSex": "M", "ViewPosition": "LL", "Manufacturer": "Canon"},
            Facts("60-69", "male", "Canon", "lateral"),
        ),
        ({"GENDER": "female", "projection": "ap"}, Facts(None, "female", None, "AP")),
        ({"M/F": "F", "Age": "74", "AP/PA": "PA"}, Facts("70-79", "female", None, "PA")),
        ({"patient_name": "Doe", "age_of_scanner": "12", "address": "AP", "comment": "male"}, Facts()),
        ({"age": "", "sex": "", "view": ""}, Facts()),
    ],
)
def test_only_these_columns_of_a_table_are_read(columns, facts):
    assert fact_reader(columns)(columns) == facts


FACTS = {"slice_position": "upper", "view": "AP", "sex": "female", "age_band": "60-69", "scanner": "GE"}


@pytest.mark.parametrize(
    ("tokens", "facts", "prompt"),
    [
        (["<epidural>"], None, "a head CT with <epidural>"),
        ([], None, "a head CT with no finding"),
        (["<a>", "<b>"], {}, "a head CT with <a> and <b>"),
        (["<a>", "<b>", "<c>"], None, "a head CT with <a>, <b> and <c>"),
        (["<a>"], FACTS, "a head CT with <a>, 60-69 years, female, AP view, upper slice"),
        (["<a>"], {"age_band": "90+", "sex": "other"}, "a head CT with <a>, 90+ years"),
        ([], {"age_band": None, "sex": "male", "view": None}, "a head CT with no finding, male"),
    ],
)
def test_a_prompt_says_findings_and_what_is_known(tokens, facts, prompt):
    assert prompt_of(tokens, "a head CT with {label}", facts) == prompt


def test_a_prompt_keeps_other_braces():
    assert prompt_of(["<a>"], "{x} of {label}") == "{x} of <a>"


def test_a_prompt_takes_any_fact_there_is():
    assert prompt_of([], "{label}", {column: None for column in FACT_COLUMNS}) == "no finding"
