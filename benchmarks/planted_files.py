"""Image files with a marker wherever a format can hold text: what a search for leaks begins with.

Contents carry one stem, names of files and folders another: paths may be listed where contents may
not. The markers are made up; nothing here belongs to a person.
"""

import itertools
from pathlib import Path

import dicom_bytes
import dicom_files as files
import nibabel
import numpy as np
from PIL import Image, PngImagePlugin
from pydicom.datadict import DicomDictionary, RepeatersDictionary
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.sequence import Sequence
from pydicom.uid import JPEGLosslessSV1

TAG, FOLDER = "PHIQZ", "PATHQZ"
"""Stems of the markers: in contents of files, and in their names."""
ROOT_UID, DATE, NUMBER = "1.2.826.0.1.99887766", "19470311", "887766554"
CONTENTS = (TAG, "99887766", DATE, "031147.471947", NUMBER, "097Y")
EVERYTHING = (*CONTENTS, FOLDER)
PATIENT = f"{TAG}PATIENT"

READ = {
    *("SpecificCharacterSet", "ImageType", "SOPClassUID", "Modality", "PatientID"),
    *("PhotometricInterpretation", "BurnedInAnnotation", "NumberOfFrames", "PatientOrientation"),
    *("PresentationLUTShape", "VOILUTFunction", "PixelPresentation", "LossyImageCompression"),
    *("WindowCenter", "WindowWidth", "RescaleIntercept", "RescaleSlope", "RescaleType"),
    *("BodyPartExamined", "ViewPosition", "TransferSyntaxUID", "IssuerOfPatientID"),
    *("RecognizableVisualFeatures", "ConversionType", "PixelSpacing"),
}
"""Elements that decide how a file is read; some of them get a marker of their own below."""


def value_of(vr: str, number: int) -> object:
    """A marker in the form that a value of this type has."""
    marker = f"{TAG}{number:05d}"
    return {
        "PN": f"{marker}^{marker}",
        "UI": f"{ROOT_UID}.{number}",
        "DA": DATE,
        "TM": "031147.471947",
        "DT": f"{DATE}031147.471947",
        "AS": "097Y",
        "IS": NUMBER,
        "DS": f"{NUMBER}.5",
        "OB": marker.encode() + b"\0" * (len(marker) % 2),
        "UN": marker.encode() + b"\0" * (len(marker) % 2),
    }.get(vr, marker)


TEXT_VR = {"PN", "LO", "SH", "LT", "ST", "UT", "UC", "UR", "UI", "AE", "CS", *("DA", "TM", "DT")}
TEXT_VR |= {"AS", "IS", "DS", "OB", "UN"}


def plant(dataset: Dataset) -> int:
    """Put a marker into every element that can hold text; gives how many."""
    count = itertools.count(1)
    inner = Dataset()
    for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
        pixels = tag >> 16 in (0x0028, 0x7FE0, 0x5400, 0x0022) and vr == "OB"
        if vr not in TEXT_VR or keyword in READ or pixels or tag >> 16 < 8:
            continue
        (dataset if tag >> 16 != 0xFFFC else inner).add_new(tag, vr, value_of(vr, next(count)))
    for mask, (vr, *_) in RepeatersDictionary.items():
        if vr in TEXT_VR and vr != "OB" and mask.startswith(("50xx", "60xx")):
            dataset.add_new(int(mask.replace("xx", "00"), 16), vr, value_of(vr, next(count)))
    block = dataset.private_block(0x0011, f"{TAG} CREATOR", create=True)
    for at, vr in enumerate(("LO", "PN", "UN", "DA")):
        block.add_new(at, vr, value_of(vr, next(count)))
    for keyword in ("PatientName", "OperatorsName", "StudyDate", "InstitutionName", "PatientID"):
        setattr(inner, keyword, PATIENT if keyword != "StudyDate" else DATE)
    middle = Dataset()
    middle.RequestAttributesSequence = Sequence([inner])
    for keyword in ("ReferencedStudySequence", "OtherPatientIDsSequence", "SourceImageSequence"):
        setattr(dataset, keyword, Sequence([middle, inner]))
    dataset.PatientID = PATIENT
    dataset.IssuerOfPatientID = f"{TAG}ISSUER"
    meta = dataset.file_meta
    meta.SourceApplicationEntityTitle = f"{TAG}AE"
    meta.ImplementationVersionName = f"{TAG}IMPL"
    meta.PrivateInformationCreatorUID = ROOT_UID
    meta.PrivateInformation = f"{TAG}PRIVATE0".encode()
    dataset.preamble = f"{TAG}PREAMBLE".encode().ljust(128, b"\0")
    return next(count)


def saved(dataset: Dataset, path: Path) -> Path:
    """Write it, with the folders above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def write_planted(home: Path) -> int:
    """Write them all into a new directory; gives how many elements of a DICOM file hold a marker.

    Some can be read, and some fail in each of the ways there are.
    """
    home.mkdir()
    planted = write_dicom_files(home)
    write_crash(home)
    write_pictures(home)
    write_slow_files(home)
    return planted


def write_dicom_files(home: Path) -> int:
    """Readable ones, and one for each way to fail; gives how many elements hold a marker."""
    kinds = files.KINDS
    planted = []

    def dataset(name: str, number: int) -> Dataset:
        kind = kinds[name]
        made = files.make_dicom(kind, files.draw(kind, number), patient="x", number=number)
        planted.append(plant(made))
        return made

    ct, us = "CT 512 x 512, 16 bits, uncompressed", "dermoscopy 450 x 600, colour, JPEG"
    for number in range(3):
        saved(dataset(ct, number), home / f"{FOLDER}{number}" / f"{FOLDER}{number}.dcm")
    photo = dataset(us, 10)
    comment = f"{TAG} JPEG COMMENT".encode()
    comment = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
    frame = next(generate_frames(photo.PixelData, number_of_frames=1))
    photo.PixelData = encapsulate([frame[:2] + comment + frame[2:]])
    saved(photo, home / f"{FOLDER}-jpeg.dcm")

    whole = saved(dataset(ct, 20), home / f"{FOLDER}-damaged.dcm")
    whole.write_bytes(whole.read_bytes()[:-100_000])
    undecided = dataset(ct, 21)
    undecided.Modality = "US"
    saved(undecided, home / f"{FOLDER}-undecided.dcm")
    strange = dataset(ct, 22)
    strange.add_new("RescaleSlope", "LO", f"{TAG}SLOPE")
    strange.add_new("WindowCenter", "LO", f"{TAG}WINDOW")
    saved(strange, home / f"{FOLDER}-values.dcm")
    coded = dataset(ct, 23)
    coded.SpecificCharacterSet = "ISO_IR 100"
    coded.PatientName = f"{TAG}MÜLLER^ÅSE"
    latin = saved(coded, home / f"{FOLDER}-latin.dcm").read_bytes()
    strange = latin.replace(b"ISO_IR 100", b"PHIQZCHARS")  # pydicom's warning will quote it
    (home / f"{FOLDER}-charset.dcm").write_bytes(strange)
    return min(planted)


def write_crash(home: Path) -> None:
    """A file that kills GDCM, and so its worker, with markers in its header."""
    head, tail = dicom_bytes.jpeg_segments(64, 64, sof=0xC3)
    name = dicom_bytes.element(0x00100010, "PN", f"{TAG}CRASH^{TAG}")
    data = dicom_bytes.dicom(head + b"\xff\xd4" + tail[2:], JPEGLosslessSV1, bits=8, early=name)
    (home / f"{FOLDER}-crash.dcm").write_bytes(data)


def noise(seed: int, px: int = 96) -> Image.Image:
    """A soft random picture."""
    draws = np.random.default_rng(seed)
    small = Image.fromarray(draws.integers(0, 256, (6, 6, 3), np.uint8))
    return small.resize((px, px), Image.Resampling.BICUBIC)


def write_pictures(home: Path) -> None:
    """PNG, JPEG, TIFF and NIfTI with a marker wherever they keep text."""
    folder = home / "dermatology" / f"{FOLDER}CLASS"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    for number, tag in enumerate((0x010E, 0x013B, 0x0131, 0x8298, 0x9286, 0xA430, 0x0132)):
        exif[tag] = f"{TAG}EXIF{number}" if tag != 0x0132 else f"{DATE} {TAG}"
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", f"{TAG}TEXT")
    text.add_text("Comment", f"{TAG}ZTXT", zip=True)
    text.add_itxt("Title", f"{TAG}ITXT Ä", "de", f"{TAG}KEY", zip=True)
    noise(1).save(folder / f"{FOLDER}.png", pnginfo=text, exif=exif)
    noise(2).save(
        folder / f"{FOLDER}.jpg", exif=exif, comment=f"{TAG}COM", xmp=b"<x>" + b"PHIQZXMP"
    )
    noise(3).save(
        folder / f"{FOLDER}.tif", tiffinfo={270: f"{TAG}DESCRIPTION", 315: f"{TAG}ARTIST"}
    )
    whole = (folder / f"{FOLDER}.png").read_bytes()
    (folder / f"{FOLDER}-cut.png").write_bytes(whole[: len(whole) // 2])
    slices = [np.asarray(noise(seed).convert("L"), np.int16) * 3 - 300 for seed in range(4, 8)]
    voxels = np.stack(slices, axis=2)
    volume = nibabel.Nifti1Image(voxels, np.eye(4))
    for field in ("descrip", "aux_file", "intent_name", "db_name"):
        volume.header[field] = f"{TAG}{field.upper()}"[:15]
    volume.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"PHIQZEXTENSION"))
    (home / "ct").mkdir()
    nibabel.save(volume, home / "ct" / f"{FOLDER}.nii.gz")


def write_slow_files(home: Path) -> None:
    """Large noisy images at the end of the list: time to kill the command."""
    for number in range(6):
        kind = files.Kind(
            *("ct", "1.2.840.10008.5.1.4.1.1.2", "CT", (1536, 1536)),
            *(files.JPEG2000Lossless, 16, 1, files.CT),
        )
        frames = np.random.default_rng(number).integers(900, 1300, (1, 1536, 1536)).astype("<u2")
        made = files.make_dicom(kind, frames, patient=PATIENT, number=90 + number)
        saved(made, home / "zz" / f"{number}.dcm")
