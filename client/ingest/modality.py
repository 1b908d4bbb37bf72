"""Which of the seven modalities a DICOM image is of: a table over what its header says.

A family holds the SOP classes of one kind of image; the rows below it are tried in order and the
first that holds decides. Three kinds of header never reach the rows: a class of the standard that
no family lists (MR, PET, mammograms, dose, reports, ...) is none of the seven; a Modality that
belongs to another family contradicts the class and leaves the image undecided; and where the class
is missing, Modality names the family. Undecided images need the operator's word.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pydicom import uid
from pydicom.config import IGNORE, disable_value_validation
from pydicom.dataset import Dataset
from pydicom.uid import UID

from client.ingest import traits
from client.ingest.types import BURNED_IN_DEFAULTS, Reason

RETIRED_ULTRASOUND: Final = (UID("1.2.840.10008.5.1.4.1.1.6"), UID("1.2.840.10008.5.1.4.1.1.3"))
VISIBLE_LIGHT_TRIAL: Final = (
    UID("1.2.840.10008.5.1.4.1.1.77.1"),
    UID("1.2.840.10008.5.1.4.1.1.77.2"),
)

OTHER_CODES: Final = traits.listed("""
    ANN AR ASMT AU BDUS BI BMD CFM CTPROTOCOL DG DOC DS ECG EEG EMG EOG EPS ES FID HC HD IO IOL
    IVOCT IVUS KER KO LEN LS M3D MA MG MR MS NM OAM OPM OPTBSV OPTENF OPV OSS PA PLAN POS PR PT PX
    REG RESP RF RTDOSE RTIMAGE RTINTENT RTPLAN RTRAD RTRECORD RTSEGANN RTSTRUCT RWV SEG SMR SR SRF
    ST STAIN TEXTUREMAP TG VA VF XA XAPROTOCOL
""")
"""Modality of what is none of the seven."""


def is_other_code(dataset: Dataset) -> bool:
    """Modality names what is none of the seven."""
    return not OTHER_CODES.isdisjoint(_codes(dataset))


@dataclass(frozen=True)
class Family:
    """SOP classes of one kind of image."""

    classes: tuple[UID, ...]
    codes: tuple[str, ...]
    """Modality of these images"""
    rows: tuple[tuple[Callable[[Dataset], bool], str | Reason], ...]
    """the first trait that holds decides"""
    also: frozenset[str] = frozenset()
    """Modality that does not contradict the class"""
    burned_in: str = "other"
    """which policy for burned-in text, of BURNED_IN_DEFAULTS"""


CT: Final = Family(
    classes=(
        uid.CTImageStorage,
        uid.EnhancedCTImageStorage,
        uid.LegacyConvertedEnhancedCTImageStorage,
    ),
    codes=("CT",),
    rows=(
        (traits.is_localizer, Reason.LOCALIZER),
        (traits.is_page, Reason.OTHER_MODALITY),
        (traits.is_colour, Reason.UNDECIDED),  # a rendering or a map, not Hounsfield units
        (traits.always, "ct"),
    ),
)
RADIOGRAPH: Final = Family(
    classes=(
        uid.ComputedRadiographyImageStorage,
        uid.DigitalXRayImageStorageForPresentation,
        uid.DigitalXRayImageStorageForProcessing,
    ),
    codes=("CR", "DX", "RG"),
    also=frozenset({"BMD", "IO", "MG", "PX", "RF", "RTIMAGE"}),
    rows=(
        (is_other_code, Reason.OTHER_MODALITY),  # mammograms and jaws on the same plates
        (traits.is_localizer, Reason.LOCALIZER),
        (traits.is_colour, Reason.UNDECIDED),
        (traits.has_frames, Reason.UNDECIDED),
        (traits.shows_chest_and_more, Reason.UNDECIDED),
        (traits.shows_chest, "cxr"),
        (traits.shows_other_part, Reason.OTHER_MODALITY),
        (traits.always, Reason.UNDECIDED),  # PA and AP alone may be a hand
    ),
)
ULTRASOUND: Final = Family(
    classes=(
        uid.UltrasoundImageStorage,
        uid.UltrasoundMultiFrameImageStorage,
        uid.EnhancedUSVolumeStorage,
        *RETIRED_ULTRASOUND,
    ),
    codes=("US", "CD", "DD", "EC"),  # with the retired Doppler and echo codes
    also=frozenset({"BDUS", "IVUS"}),
    burned_in="ultrasound",
    rows=(
        (is_other_code, Reason.OTHER_MODALITY),  # a vessel from inside looks like nothing else
        (traits.always, "us"),
    ),
)
MICROSCOPE: Final = Family(
    classes=(
        uid.VLWholeSlideMicroscopyImageStorage,
        uid.VLSlideCoordinatesMicroscopicImageStorage,
        uid.VLMicroscopicImageStorage,
    ),
    codes=("SM", "GM"),
    rows=(
        (traits.is_localizer, Reason.LOCALIZER),  # label and overview show names
        (traits.is_grey, Reason.OTHER_MODALITY),  # one channel of a fluorescence slide
        (traits.is_not_brightfield, Reason.OTHER_MODALITY),
        (traits.always, "pathology"),
    ),
)
FUNDUS: Final = Family(
    classes=(
        uid.OphthalmicPhotography8BitImageStorage,
        uid.OphthalmicPhotography16BitImageStorage,
        uid.WideFieldOphthalmicPhotographyStereographicProjectionImageStorage,
        uid.WideFieldOphthalmicPhotography3DCoordinatesImageStorage,
    ),
    codes=("OP",),
    burned_in="photo",
    rows=(
        (traits.is_localizer, Reason.LOCALIZER),
        (traits.is_grey, Reason.OTHER_MODALITY),  # red-free, infrared, angiogram
        (traits.is_not_white_light, Reason.OTHER_MODALITY),
        (traits.is_anterior_eye, Reason.OTHER_MODALITY),
        (traits.is_page, Reason.OTHER_MODALITY),
        (traits.is_colour, "cfp"),
        (traits.always, Reason.UNDECIDED),
    ),
)
TOMOGRAPHY_OF_THE_EYE: Final = Family(
    classes=(uid.OphthalmicTomographyImageStorage,),
    codes=("OPT",),
    rows=(
        (traits.is_localizer, Reason.LOCALIZER),
        (traits.is_not_oct_scanner, Reason.OTHER_MODALITY),
        (traits.is_anterior_eye, Reason.OTHER_MODALITY),
        (traits.is_colour, Reason.UNDECIDED),
        (traits.always, "oct"),
    ),
)
DERMOSCOPY: Final = Family(
    classes=(uid.DermoscopicPhotographyImageStorage,),
    codes=("DMS",),
    also=frozenset({"XC"}),
    burned_in="photo",
    rows=(
        (traits.is_grey, Reason.OTHER_MODALITY),  # ultraviolet, confocal
        (traits.always, "dermatology"),
    ),
)
PHOTOGRAPH: Final = Family(
    classes=(
        uid.VLPhotographicImageStorage,
        uid.VideoPhotographicImageStorage,
        uid.VideoMicroscopicImageStorage,  # mostly operations under a microscope
    ),
    codes=("XC",),
    also=frozenset({"DMS"}),
    burned_in="photo",
    rows=(
        (traits.is_grey, Reason.UNDECIDED),
        (traits.shows_skin, "dermatology"),
        (traits.always, Reason.UNDECIDED),
    ),
)
CAPTURE: Final = Family(  # also every class that is private or unknown
    classes=(
        uid.SecondaryCaptureImageStorage,
        uid.MultiFrameSingleBitSecondaryCaptureImageStorage,
        uid.MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
        uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
        uid.MultiFrameTrueColorSecondaryCaptureImageStorage,
        *VISIBLE_LIGHT_TRIAL,
    ),
    codes=(),
    also=OTHER_CODES,
    burned_in="screen",
    rows=(
        (is_other_code, Reason.OTHER_MODALITY),
        (traits.always, Reason.UNDECIDED),
    ),
)

FAMILIES: Final = (
    CT,
    RADIOGRAPH,
    ULTRASOUND,
    MICROSCOPE,
    FUNDUS,
    TOMOGRAPHY_OF_THE_EYE,
    DERMOSCOPY,
    PHOTOGRAPH,
    CAPTURE,
)
BY_CLASS: Final[dict[str, Family]] = {c: f for f in FAMILIES for c in f.classes}
BY_CODE: Final = {code: f for f in FAMILIES for code in f.codes}


@disable_value_validation()  # its warnings quote values
def modality_of(dataset: Dataset) -> str | Reason:
    """The modality a DICOM header stands for.

    Args:
        dataset: a header as read, however malformed; elements that cannot be parsed count as
            missing.

    Returns:
        One of the seven modalities; or UNDECIDED, which the operator may decide; or, finally,
        OTHER_MODALITY or LOCALIZER.
    """
    sop_class, codes = _class_of(dataset), _codes(dataset)
    if sop_class not in BY_CLASS and UID(sop_class, validation_mode=IGNORE).type == "SOP Class":
        return Reason.OTHER_MODALITY
    family = _family(sop_class, codes)
    if (codes & (OTHER_CODES | BY_CODE.keys())) - family.also - set(family.codes):
        return Reason.UNDECIDED
    return next(answer for trait, answer in family.rows if trait(dataset))


@disable_value_validation()
def burned_in_class(dataset: Dataset, modality: str) -> str:
    """Which policy for text in the pixels an image of this header and modality falls under.

    Args:
        dataset: a header as read, however malformed.
        modality: what the image was taken for, by its header or by the operator.

    Returns:
        A key of BURNED_IN_DEFAULTS. An image without a class of the table is a screen.
    """
    family = BY_CLASS.get(_class_of(dataset), CAPTURE)
    by_modality = {"us": "ultrasound", "cfp": "photo", "dermatology": "photo"}
    if traits.first(dataset, "BurnedInAnnotation").upper() in ("YES", "Y"):
        found = "declared"
    elif traits.is_page(dataset):
        found = "screen"
    elif family.burned_in != "other":
        found = family.burned_in
    else:
        found = by_modality.get(modality, "other")
    assert found in BURNED_IN_DEFAULTS
    return found


def _family(sop_class: str, codes: set[str]) -> Family:
    named = [BY_CODE[code] for code in sorted(codes & BY_CODE.keys())] if not sop_class else []
    return BY_CLASS.get(sop_class) or next(iter(named), CAPTURE)


def _class_of(dataset: Dataset) -> str:
    meta = getattr(dataset, "file_meta", None)
    in_meta = traits.first(meta, "MediaStorageSOPClassUID") if isinstance(meta, Dataset) else ""
    return traits.first(dataset, "SOPClassUID") or in_meta


def _codes(dataset: Dataset) -> set[str]:
    return {code.upper() for code in traits.values(dataset, "Modality")}
