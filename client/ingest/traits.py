"""What a DICOM header says of its image, read from elements that may be missing or malformed.

Each trait is a function of the data set that holds only where the header says so; it never raises.
"""

import re
from itertools import islice
from typing import Any, Final

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence

from client.ingest import words

MAX_VALUES: Final = 16
"""Values and items looked at of one element."""


def listed(text: str) -> frozenset[str]:
    """The codes in a list; what they stand for is written before them in small letters."""
    return frozenset(word for word in text.split() if word.isupper() or word.isdecimal())


# SNOMED codes, in today's form and in the older one that most devices write.
COLOURED_FILTERS: Final = listed("""
    blue 445084008 A-010DA 111603      blue-green 422915004 A-010D8 111605
    green 445465004 A-010E2 111601     yellow-green 445340000 A-010E0 111604
    red 445279009 A-010DF              infrared 445169002 A-010DC 111606
""")
DYES: Final = listed("""
    fluorescein 350086004 C-B02CC 85596006 C-22A05    indocyanine 7292004 C-B0156
""")
UNNATURAL_CHANNELS: Final = listed("""
    infrared 414497003 R-102BE    ultraviolet 415770004 R-102BF    red-free 405739002 G-A132
""")
"""Red, green and blue together make a natural image."""
ANTERIOR_REGIONS: Final = listed("""
    chamber 31636006 T-AA050      cornea 28726007 T-AA200    endothelium 65431007 T-AA260
    epithelium 15775008 T-AA220   iris 41296002 T-AA500      lens 78076003 T-AA700
    ciliary-body 29534007 T-AA400 sclera 18619003 T-AA110    conjunctiva 29445007 T-AA860
    eyelid 80243003 T-AA810       upper 38934000 T-AA820     lower 62736007 T-AA830
    caruncle 43045000 T-AA862     gland 13561001 T-AA910     lacrimal-sac 3954005 T-AA940
""")
NOT_A_FUNDUS_CAMERA: Final = listed("""
    external-camera 409903006 R-1021B         slit-lamp 397247004 A-2B201
    operating-microscope 102321001 A-2B210    specular-microscope 409899004 R-1021C
    keratoscope 397522002 A-00FCA             endoscope 409902001 R-1021F
    pupillograph 420827006 A-00FF4            fluorescence-lifetime 1362124004
""")
LIGHT_ON_THE_FRONT: Final = listed("""
    fine-slit 410462008 R-1020F          broad-tangential 410463003 R-10211
    from-the-iris 410465005 R-10215      through-the-iris 410467002 R-10218
    scleral-scatter 410464009 R-10213    from-the-retina 410466006 R-10217
""")
NOT_AN_OCT_SCANNER: Final = listed("""
    confocal-laser 392004000 A-00E8B    thickness-analyser 416567007 R-FAB5A
    polarimeter 392007007 A-00E8C       corneal-topographers 111945 111946 111947
    scheimpflug-camera 111626
""")
NOT_BRIGHTFIELD: Final = listed("""
    epifluorescence 111743          dark-field 111745    phase-contrast 111747
    interference-contrast 111748    total-internal-reflection-fluorescence 111749
""")

NO_PICTURE_FLAVOURS: Final = listed("LOCALIZER SCOUT TOPOGRAM LABEL OVERVIEW THUMBNAIL MACRO")
"""ImageType of images that only plan or index others; of slides, two of them show the label."""
UNNATURAL_FLAVOURS: Final = listed("REDFREE RED GREEN BLUE FA ICG AF FAF IR")
"""ImageType of ophthalmic photographs in other light."""

IMAGE_TEXT: Final = (
    "BodyPartExamined",
    "AnatomicRegionSequence",
    "ViewPosition",
    "SeriesDescription",
    "ProtocolName",
    "AcquisitionDeviceProcessingDescription",
)
"""Elements that speak of this image."""
STUDY_TEXT: Final = (
    "StudyDescription",
    "RequestedProcedureDescription",
    "PerformedProcedureStepDescription",
    "ProcedureCodeSequence",
    "RequestedProcedureCodeSequence",
)
"""Elements that speak of a whole examination, perhaps of several parts of the body."""


def always(dataset: Dataset) -> bool:
    """The last row of each table."""
    return True


def is_colour(dataset: Dataset) -> bool:
    """Colour pixels, a palette included."""
    photometric, samples = _colours(dataset)
    return not photometric.startswith("MONO") if photometric else samples == "3"


def is_grey(dataset: Dataset) -> bool:
    """Grey pixels."""
    photometric, samples = _colours(dataset)
    return photometric.startswith("MONO") if photometric else samples == "1"


def has_frames(dataset: Dataset) -> bool:
    """More than one frame."""
    count = first(dataset, "NumberOfFrames")
    return count.isdecimal() and int(count) > 1


def is_localizer(dataset: Dataset) -> bool:
    """A scout view, or a slide's label, overview or thumbnail."""
    labelled = first(dataset, "SpecimenLabelInImage").upper() == "YES"
    return labelled or bool(NO_PICTURE_FLAVOURS & _flavours(dataset))


def is_page(dataset: Dataset) -> bool:
    """A page of text: protocol, dose report, screen shot."""
    return _says(words.PAGE, dataset, "ImageType", "SeriesDescription", "ProtocolName")


def shows_chest(dataset: Dataset) -> bool:
    """The chest is named, and maybe other parts too."""
    return "chest" in _body_parts(dataset)


def shows_other_part(dataset: Dataset) -> bool:
    """Another part of the body is named, and maybe the chest too."""
    return "other" in _body_parts(dataset)


def shows_chest_and_more(dataset: Dataset) -> bool:
    """Chest and other parts are named: an image of both, or a header that contradicts itself."""
    return len(_body_parts(dataset)) == 2


def shows_skin(dataset: Dataset) -> bool:
    """The skin or its diseases are named."""
    return _says(words.SKIN, dataset, *IMAGE_TEXT, *STUDY_TEXT)


def is_not_white_light(dataset: Dataset) -> bool:
    """An angiogram, autofluorescence, red-free or infrared photograph of the eye."""
    filters = codes(
        dataset, "LightPathFilterTypeStackCodeSequence", "ImagePathFilterTypeStackCodeSequence"
    )
    return (
        bool(COLOURED_FILTERS & filters)
        or bool(UNNATURAL_CHANNELS & codes(dataset, "ChannelDescriptionCodeSequence"))
        or bool(DYES & codes(dataset, "ContrastBolusAgentSequence"))
        or bool(UNNATURAL_FLAVOURS & _flavours(dataset))
        or _says(words.NOT_WHITE_LIGHT, dataset, *IMAGE_TEXT, "ContrastBolusAgent")
    )


def is_anterior_eye(dataset: Dataset) -> bool:
    """Front of the eye, by region, device, light or text."""
    return (
        bool(ANTERIOR_REGIONS & codes(dataset, "AnatomicRegionSequence"))
        or bool(NOT_A_FUNDUS_CAMERA & codes(dataset, "AcquisitionDeviceTypeCodeSequence"))
        or bool(LIGHT_ON_THE_FRONT & codes(dataset, "IlluminationTypeCodeSequence"))
        or _says(words.ANTERIOR_EYE, dataset, *IMAGE_TEXT)
    )


def is_not_oct_scanner(dataset: Dataset) -> bool:
    """Another ophthalmic device than an OCT scanner."""
    return bool(NOT_AN_OCT_SCANNER & codes(dataset, "AcquisitionDeviceTypeCodeSequence"))


def is_not_brightfield(dataset: Dataset) -> bool:
    """A fluorescence or phase-contrast slide."""
    paths = [dataset, *items(dataset, "OpticalPathSequence")]
    found = (codes(path, "IlluminationTypeCodeSequence") for path in paths)
    return any(NOT_BRIGHTFIELD & light for light in found)


def values(dataset: Dataset, keyword: str) -> list[str]:
    """The values of an element as text; none where it is missing or malformed."""
    value = _get(dataset, keyword)
    several = value if isinstance(value, (MultiValue, list, tuple)) else [value]
    return [text for v in islice(several, MAX_VALUES) if (text := _text(v))]


def first(dataset: Dataset, keyword: str) -> str:
    """The first value of an element as text, or an empty text."""
    return next(iter(values(dataset, keyword)), "")


def items(dataset: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence; none where it is missing or malformed."""
    value = _get(dataset, keyword)
    return list(islice(value, MAX_VALUES)) if isinstance(value, Sequence) else []


def codes(dataset: Dataset, *keywords: str) -> set[str]:
    """The code values in sequences."""
    return {first(i, "CodeValue").upper() for keyword in keywords for i in items(dataset, keyword)}


def _get(dataset: Dataset, keyword: str) -> Any:
    """An element's value; pydicom parses on access, and damaged bytes may raise anything there."""
    try:
        return dataset.get(keyword)
    except (
        Exception
    ):  # it says nothing then; what must be readable, the pixels, is checked elsewhere
        return None


def _text(value: object) -> str:
    if isinstance(value, bytes):
        value = value[: words.MAX_CHARACTERS].decode("latin-1")
    text = str(value) if isinstance(value, (str, int, float)) else ""
    return text[: words.MAX_CHARACTERS].strip("\0 \t\r\n")


def _flavours(dataset: Dataset) -> set[str]:
    return {value.upper() for value in values(dataset, "ImageType")}


def _colours(dataset: Dataset) -> tuple[str, str]:
    photometric = first(dataset, "PhotometricInterpretation").upper()
    return photometric, first(dataset, "SamplesPerPixel")


def _says(vocabulary: re.Pattern[str], dataset: Dataset, *keywords: str) -> bool:
    return vocabulary.search(_normalised(dataset, *keywords)) is not None


def _normalised(dataset: Dataset, *keywords: str) -> str:
    texts = [text for keyword in keywords for text in values(dataset, keyword)]
    named = (first(i, "CodeMeaning") for keyword in keywords for i in items(dataset, keyword))
    return words.normalise([*texts, *named])


def _body_parts(dataset: Dataset) -> set[str]:
    """Of {"chest", "other"}: as this image names them, else as its examination does."""
    return _named_in(_normalised(dataset, *IMAGE_TEXT)) or _named_in(
        _normalised(dataset, *STUDY_TEXT)
    )


def _named_in(text: str) -> set[str]:
    other = {"other"} if words.OTHER_PARTS.search(text) else set()
    chest = words.CHEST.search(text) or (not other and words.CHEST_ADJECTIVES.search(text))
    return other | ({"chest"} if chest else set())
