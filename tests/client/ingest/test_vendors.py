import pytest

from client.ingest.vendors import VENDORS, vendor_of


@pytest.mark.parametrize(
    ("text", "vendor"),
    [
        ("GE MEDICAL SYSTEMS", "GE"),
        ("G.E. Medical Systems", "GE"),
        ("GEMS", "GE"),
        ("SIEMENS", "Siemens"),
        ("Siemens Healthineers AG", "Siemens"),
        ("TOSHIBA_MEC", "Toshiba"),
        ("Canon Medical Systems Corporation", "Canon"),
        ("FUJI PHOTO FILM CO. LTD.", "Fujifilm"),
        ("FUJIFILM SonoSite, Inc.", "Sonosite"),
        ("Eastman Kodak Company", "Carestream"),
        ("KONICA MINOLTA", "Konica Minolta"),
        ("Carl Zeiss Meditec", "Zeiss"),
        ("3DHISTECH", "3DHISTECH"),
        ("  philips\0", "Philips"),
    ],
)
def test_spelling_case_and_legal_form_do_not_count(text, vendor):
    assert vendor_of(text) == vendor


@pytest.mark.parametrize("text", ["", "  ", "\0", "\t\n"])
def test_an_empty_maker_is_not_given(text):
    assert vendor_of(text) == "not given"


@pytest.mark.parametrize(
    "text",
    ["Acme", "DOE^JANE 1970-01-01", "Georgia General", "Image Tools", "---", "7", "医" * 9999],
)
def test_text_outside_the_list_never_comes_back(text):
    assert vendor_of(text) == "other"


def test_every_maker_finds_its_own_name():
    assert {name: vendor_of(name) for name in VENDORS} == {name: name for name in VENDORS}
