import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import MPEG2MPML, RLELossless

from client.ingest import pictures
from client.ingest.readers.dicom import read_dicom
from client.ingest.types import BURNED_IN_DEFAULTS, Item, Reason, Rejected, Rules

US = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.1", "Modality": "US"}
CAPTURE = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "Modality": "OT"}
SLIDE = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.77.1.6", "Modality": "SM"}
MR = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4", "Modality": "MR"}
HU = {"Modality": "CT", "RescaleSlope": 1, "RescaleIntercept": 0}

pytestmark = pytest.mark.filterwarnings("ignore:::pydicom")


def item(path, **known):
    return Item(path, f"0/{path.name}", **known)


def reason_of(path, rules=None, **known):
    with pytest.raises(Rejected) as rejected:
        read_dicom(item(path, **known), rules or Rules())
    return rejected.value.reason


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)


def test_a_ct_becomes_one_picture_in_the_window_of_the_rules(write_dicom, ramp):
    path = write_dicom(ramp, **HU, PatientID="P7", Manufacturer="GE MEDICAL SYSTEMS")
    reading = read_dicom(item(path), Rules(px=64, ct_window=(2048, 4096)))
    (picture,) = reading.pictures
    assert picture.modality == "ct"
    assert np.abs(picture.pixels[:, :, 0].ravel() - np.arange(4096) / 4096 * 255).max() <= 0.6
    assert (reading.kind, reading.vendor, reading.text) == ("DICOM uncompressed", "GE", "")


@pytest.mark.parametrize(
    ("header", "identity"),
    [
        ({"PatientID": " P7 "}, "dicom:\0P7"),
        ({"PatientID": "P7", "IssuerOfPatientID": "A"}, "dicom:A\0P7"),
        ({"PatientID": "P7", "StudyInstanceUID": "1.2"}, "dicom:\0P7"),
        ({"PatientID": "", "StudyInstanceUID": "1.2"}, "study:1.2"),
        ({"StudyInstanceUID": "1.2"}, "study:1.2"),
        ({}, "file:0/0.dcm"),
    ],
)
def test_a_patient_is_its_id_with_issuer_else_its_study_else_its_file(
    write_dicom, ramp, header, identity
):
    assert read_dicom(item(write_dicom(ramp, **HU, **header)), Rules()).identity == identity


def test_two_values_in_a_patient_id_are_one_id(write_dicom, ramp):
    readings = [
        read_dicom(item(write_dicom(ramp, **HU, PatientID=name)), Rules()).identity
        for name in (r"A\1", r"A\2")
    ]
    assert readings[0] != readings[1]


def test_without_a_patient_id_the_csv_and_the_folder_name_the_patient(write_dicom, ramp):
    path = write_dicom(ramp, **HU, StudyInstanceUID="1.2")
    assert read_dicom(item(path, patient="X"), Rules()).identity == "csv:X"
    path = write_dicom(ramp, **HU)
    assert read_dicom(item(path), Rules(patients="folder")).identity == "folder:0"


def test_an_undecided_modality_is_the_folders_then_the_operators(write_dicom, noise):
    path = write_dicom(noise, **CAPTURE)
    assert reason_of(path) is Reason.UNDECIDED
    rules = Rules(modality="cxr", burned_in={**BURNED_IN_DEFAULTS, "screen": "accept"})
    assert read_dicom(item(path), rules).pictures[0].modality == "cxr"
    assert read_dicom(item(path, modality="oct"), rules).pictures[0].modality == "oct"


def test_nobodys_word_makes_another_modality_one_of_the_seven(write_dicom, noise):
    path = write_dicom(noise, **MR)
    assert reason_of(path, Rules(modality="ct"), modality="ct") is Reason.OTHER_MODALITY


def test_a_scout_is_named_before_its_pixels_are_looked_at(write_dicom):
    path = write_dicom(
        [b"\0\0"], RLELossless, Modality="CT", ImageType=["ORIGINAL", "P", "LOCALIZER"]
    )
    assert reason_of(path) is Reason.LOCALIZER


def test_nobody_is_asked_for_the_modality_of_pixels_that_cannot_be_read(write_dicom, noise):
    assert reason_of(write_dicom(noise, **CAPTURE, Rows=2)) is Reason.TOO_SMALL
    assert reason_of(write_dicom(noise, **CAPTURE, Rows=200)) is Reason.TRUNCATED
    assert reason_of(write_dicom([b"\0\0"], MPEG2MPML, **CAPTURE)) is Reason.NO_DECODER


def test_declared_text_is_refused_by_default_and_told_where_accepted(write_dicom, noise):
    path = write_dicom(noise, **US, BurnedInAnnotation="YES")
    assert reason_of(path) is Reason.BURNED_IN
    rules = Rules(burned_in={**BURNED_IN_DEFAULTS, "declared": "accept"})
    assert read_dicom(item(path), rules).text == "found"


def test_the_policy_is_that_of_the_headers_class(write_dicom, noise, monkeypatch):
    asked = []

    def apply_policy(image, policy, regions):
        asked.append((policy, regions))
        return image, True, policy == "mask"

    monkeypatch.setattr(pictures, "apply_policy", apply_policy)
    region = Dataset()
    region.RegionLocationMinX0, region.RegionLocationMinY0 = 10, 20
    region.RegionLocationMaxX1, region.RegionLocationMaxY1 = 49, 59
    broken = Dataset()
    broken.RegionLocationMinX0 = 3
    path = write_dicom(noise, **US, SequenceOfUltrasoundRegions=[region, broken])
    assert read_dicom(item(path), Rules()).text == "masked"
    accept = {**BURNED_IN_DEFAULTS, "other": "accept"}
    assert read_dicom(item(write_dicom(noise, **HU)), Rules(burned_in=accept)).text == "found"
    assert asked == [("mask", [(10, 20, 50, 60)]), ("accept", [])]


def test_frames_are_picked_evenly_and_blank_ones_passed_over(write_dicom):
    frames = np.random.default_rng(0).integers(0, 255, (12, 16, 16), np.uint8)
    frames[4] = 9
    path = write_dicom(frames[0], **US, NumberOfFrames=12, PixelData=frames.tobytes())
    accept = {**BURNED_IN_DEFAULTS, "ultrasound": "accept"}
    reading = read_dicom(item(path), Rules(px=16, frames=4, burned_in=accept))
    got = [picture.pixels[:, :, 0] for picture in reading.pictures]
    assert len(got) == 3  # of the frames 1, 4, 7, 10
    assert all(
        (picture == frames[index]).all() for picture, index in zip(got, (1, 7, 10), strict=True)
    )


def test_a_file_of_blank_frames_is_constant(write_dicom):
    blank = np.zeros((16, 16), np.uint8)
    path = write_dicom(blank, **US, NumberOfFrames=3, PixelData=bytes(3 * 256))
    assert reason_of(path) is Reason.CONSTANT


def test_of_a_slides_tiles_those_with_tissue_are_taken(write_dicom):
    draws = np.random.default_rng(0)
    tissue = np.array([190, 90, 160]) + draws.integers(-30, 30, (32, 32, 3))
    glass = np.full((32, 32, 3), 243) + draws.integers(-2, 3, (32, 32, 3))
    tiles = np.stack([glass, tissue, glass, tissue]).astype(np.uint8)
    path = write_dicom(tiles[0], **SLIDE, NumberOfFrames=4, PixelData=tiles.tobytes())
    reading = read_dicom(item(path), Rules(px=32, frames=1))
    assert [picture.modality for picture in reading.pictures] == ["pathology"] * 2
    assert all((picture.pixels[..., 1] < 200).all() for picture in reading.pictures)
    assert len(read_dicom(item(path), Rules(px=32, tiles=2)).pictures) == 2
    path = write_dicom(tiles[0], **SLIDE, NumberOfFrames=2, PixelData=tiles[::2].tobytes())
    assert reason_of(path) is Reason.NO_TISSUE


def test_grey_stored_as_colour_is_one_channel(write_dicom, noise):
    path = write_dicom(np.repeat(noise[:, :, None], 3, axis=2), **US)
    assert read_dicom(item(path), Rules(px=64)).pictures[0].pixels.shape == (64, 64, 1)
