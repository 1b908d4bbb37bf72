"""Every real, malformed and derived DICOM file: its pixels against another decoder, or its reason.

Uncompressed pixels are compared with numpy on the bytes, compressed ones with GDCM or, where GDCM
knows no better, with another codec. Where GDCM is our decoder, digests stand in for libjpeg-turbo
(12 bits) and liblj92 (lossless), which gave the same pixels when this table was made.
"""

import csv
import hashlib
import io
from functools import cache
from pathlib import Path

import gdcm
import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.encaps import get_frame
from pydicom.pixels import (
    apply_color_lut,
    apply_modality_lut,
    apply_voi,
    apply_windowing,
    pixel_array,
)
from pydicom.uid import HTJ2K, JPEGBaseline8Bit, RLELossless

from client.ingest.dicom_file import UNCOMPRESSED, open_dicom
from client.ingest.dicom_pixels import decode_frame, stored_values
from client.ingest.readers.dicom import read_dicom
from client.ingest.types import Item, Reason, Rejected, Rules

pytestmark = pytest.mark.filterwarnings("ignore:::pydicom")

PICTURES = {
    "ct": """CT_small.dcm 693_J2KI.dcm 693_J2KR.dcm eCT_Supplemental.dcm explicit_VR-UN.dcm
        J2K_pixelrep_mismatch.dcm CT1_J2KR CT1_JLSL CT1_JLSN CT1_JPLL CT1_RLE CT2_J2KI CT2_RLE
        bad_sequence.dcm ct_bitflips_in_pixels.dcm ct_no_pixel_spacing_no_window.dcm
        ct_no_rescale.dcm ct_modality_empty.dcm ct_lowercase_unknown_modality.dcm
        ct_frames_zero.dcm ct_with_synthetic_phi.dcm""",
    "cxr": "RG1_J2KI dx_chest_12bit_mono1.dcm dx_chest_deflated.dcm",
    "us": """US1_UNCR.dcm US1_RLE US1_J2KI.dcm US1_J2KR.dcm examples_ybr_color.dcm
        examples_rgb_color.dcm examples_palette.dcm OBXXXX1A_rle_2frame.dcm OBXXXX1A_rle.dcm
        JPGLosslessP14SV1_1s_1f_8b.dcm color-pl.dcm color-px.dcm ExplVR_BigEnd.dcm
        us_cine_3frames_rgb.dcm""",
    "pathology": "sm_patch_j2k.dcm sm_tiles_4frames_jpeg.dcm",
    "cfp": "op_fundus_jpeg.dcm",
    "oct": "opt_oct_volume_3frames.dcm opt_oct_singleframe_jpeg.dcm",
    "dermatology": "dms_derm_rgb.dcm",
}
"""Files that give pictures, by the modality that their headers name."""

COUNTS = {
    "eCT_Supplemental.dcm": 2,
    "examples_ybr_color.dcm": 16,  # of 30
    "OBXXXX1A_rle_2frame.dcm": 2,
    "sm_tiles_4frames_jpeg.dcm": 4,
    "us_cine_3frames_rgb.dcm": 3,
    "opt_oct_volume_3frames.dcm": 3,
}

REASONS = {
    Reason.UNDECIDED: """SC1_JPLY VL1_J2KI VL3_J2KI VL4_J2KI VL5_J2KI VL6_J2KI VL6_J2KR
        SC_rgb_16bit.dcm SC_ybr_full_uncompressed.dcm SC_ybr_full_422_uncompressed.dcm
        SC_rgb_rle_32bit.dcm SC_rgb_jpeg_dcmtk.dcm SC_jpeg_no_color_transform.dcm
        GDCMJ2K_TextGBR.dcm HTJ2K_08_RGB.dcm JLSL_16_15_1_1F.dcm image_dfl.dcm vlut_04.dcm
        OT-PAL-8-face.dcm ct_wrong_modality_tag.dcm xc_derm_jpeg.dcm""",
    Reason.OTHER_MODALITY: """RG3_J2KI RG3_JLSN RG3_JPLY XA1_J2KI MR_small.dcm
        MR_small_implicit.dcm MR_small_bigendian.dcm MR_small_jpeg_ls_lossless.dcm
        MR_small_RLE.dcm MR_small_padded.dcm examples_overlay.dcm NM1_JPLL JPGExtended.dcm
        JPEG2000.dcm parametric_map_float.dcm liver_1frame.dcm rtdose_1frame.dcm
        MR_truncated.dcm JPEG-lossy.dcm JPEG2000-embedded-sequence-delimiter.dcm badVR.dcm
        emri_small_jpeg_2k_lossless_too_short.dcm liver_nonbyte_aligned_rle.dcm""",
    Reason.NO_PIXELS: """rtplan.dcm test-SR.dcm waveform_ecg.dcm ExplVR_BigEndNoMeta.dcm
        reportsi_with_empty_number_tags.dcm""",
    Reason.DAMAGED_HEADER: """meta_missing_tsyntax.dcm no_meta_group_length.dcm
        nested_priv_SQ.dcm UN_sequence.dcm preamble_only.dcm meta_cut.dcm""",
    Reason.TRUNCATED: """rtplan_truncated.dcm ct_truncated_60pct.dcm
        us_jpeg_cine_truncated_50pct.dcm j2k_chest_truncated_30pct.dcm ct_rows_too_big.dcm""",
    Reason.NOT_AN_IMAGE: """no_meta.dcm not_dicom_jpeg_named.dcm html_error_page.dcm
        random_bytes_4k.dcm""",
    Reason.TOO_SMALL: "SC_rgb_small_odd.dcm",
    Reason.EMPTY: "zero_length.dcm",
    Reason.CONSTANT: "ct_constant_zero.dcm",
}

UNREADABLE = {
    "SC_rgb_small_odd.dcm": Reason.TOO_SMALL,
    "rtdose_1frame.dcm": Reason.TOO_SMALL,
}
"""Files that the manifest says decode and that have too few pixels for us."""

DIGESTS = {
    "CT1_JPLL": "1add6ede29758c6f",
    "NM1_JPLL": "a6e9d32143339d3f",
    "JPGLosslessP14SV1_1s_1f_8b.dcm": "53e607880105df3b",
    "bad_sequence.dcm": "ef7120ddfc77c166",
    "SC1_JPLY": "8d01580b53c9cc89",
    "RG3_JPLY": "c3f8afd42451473c",
    "JPGExtended.dcm": "d30242775a414c01",
}
"""SHA-256 of the values as little-endian 16 bits; the 12-bit ones clipped to BitsStored."""

SIGN_BITS = {"J2K_pixelrep_mismatch.dcm": 13, "JLSL_16_15_1_1F.dcm": 15}
"""Signed by their headers, while GDCM leaves the sign bit a number as the codestream has it."""

MODALITY_OF = {name: modality for modality, names in PICTURES.items() for name in names.split()}
REASON_OF = {name: reason for reason, names in REASONS.items() for name in names.split()}
TWELVE_BITS = ("SC1_JPLY", "RG3_JPLY", "JPGExtended.dcm")
"""Not by pydicom, as the manifest says, but by us."""


@pytest.fixture(scope="module")
def manifest(real_data):
    """File name -> row of the manifest."""
    with open(real_data / "dicom" / "MANIFEST.csv", newline="") as file:
        return {Path(row["file"]).name: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def decoded(manifest, real_data):
    """Files with right pixels to be had: name -> path."""
    return {
        name: real_data / "dicom" / row["file"]
        for name, row in manifest.items()
        if (row["decodes_with_pydicom"].startswith("ok") and name not in UNREADABLE)
        or name in TWELVE_BITS
    }


@cache
def stored(path):
    """All frames, as our decoders give them: [F, H, W] or [F, H, W, 3]."""
    with open_dicom(path) as file:
        file.check_length()
        return np.stack([stored_values(file, index) for index in range(file.layout.frames)])


def to_rgb(ybr):
    """PS3.3 C.7.6.3.1.2, the other way round."""
    y, blue, red = (ybr[..., channel].astype(float) for channel in range(3))
    blue, red = blue - 128, red - 128
    rgb = np.stack([y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue], -1)
    return np.rint(np.clip(rgb, 0, 255)).astype(np.uint8)


def by_numpy(path):
    """Uncompressed pixels straight from the bytes of their element."""
    header = dcmread(path)
    frames = int(header.get("NumberOfFrames") or 1)
    shape = (frames, header.Rows, header.Columns)
    colour = header.SamplesPerPixel == 3
    count = int(np.prod(shape)) * header.SamplesPerPixel
    if "FloatPixelData" in header:
        return np.frombuffer(header.FloatPixelData, "<f4").reshape(shape)
    data = header.PixelData
    if header.BitsAllocated == 1:
        return np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[:count].reshape(
            shape
        )
    big = not header.original_encoding[1]
    if big and header.BitsAllocated == 8 and header["PixelData"].VR == "OW":
        data = np.frombuffer(data, ">u2").astype("<u2").tobytes()
    dtype = np.dtype(
        f"{'>' if big else '<'}{'ui'[header.PixelRepresentation]}{header.BitsAllocated // 8}"
    )
    if header.PhotometricInterpretation == "YBR_FULL_422":
        luma1, luma2, blue, red = np.frombuffer(data, dtype)[: count // 3 * 2].reshape(-1, 4).T
        pixels = np.stack([luma1, blue, red, luma2, blue, red], axis=1).reshape(*shape, 3)
        return to_rgb(pixels)
    values = np.frombuffer(data, dtype, count)
    if not colour:
        return values.reshape(shape)
    if header.PlanarConfiguration:
        values = values.reshape(frames, 3, header.Rows, header.Columns).transpose(0, 2, 3, 1)
    values = values.reshape(*shape, 3)
    return to_rgb(values) if header.PhotometricInterpretation.startswith("YBR") else values


def by_gdcm(path):
    """Compressed pixels by GDCM's own reader."""
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    image = reader.GetImage()
    kind = image.GetPixelFormat()
    names = {"INT": "i", "UINT": "u"}
    text = kind.GetScalarTypeAsString()
    dtype = np.dtype(f"<{names[text.rstrip('0123456789')]}{int(text.lstrip('UINT')) // 8}")
    columns, rows, frames = (*image.GetDimensions(), 1)[:3]
    values = np.frombuffer(image.GetBuffer().encode("utf-8", "surrogateescape"), dtype)
    if kind.GetSamplesPerPixel() == 1:
        return values.reshape(frames, rows, columns)
    if image.GetPlanarConfiguration():
        values = values.reshape(frames, 3, rows, columns).transpose(0, 2, 3, 1)
    values = values.reshape(frames, rows, columns, 3)
    photometric = str(image.GetPhotometricInterpretation())
    return to_rgb(values) if photometric.startswith("YBR_FULL") else values


def by_pillow(path):
    """HTJ2K, which GDCM does not know, by Pillow's build of OpenJPEG."""
    frame = get_frame(dcmread(path).PixelData, 0, number_of_frames=1)
    return np.asarray(Image.open(io.BytesIO(frame)))[None]


def by_pydicom(path):
    """RLE by pydicom's own decoder: GDCM mixes the bytes of 32-bit colours."""
    frames = int(dcmread(path).get("NumberOfFrames", 1))
    return np.stack([pixel_array(path, index=n, decoding_plugin="pydicom") for n in range(frames)])


OTHER_DECODER = {RLELossless: by_pydicom, HTJ2K: by_pillow}


def shown_by_pydicom(path, values, modality):
    """Every third pixel as it should look, 0 to 255, by pydicom's tables and windows."""
    header = dcmread(path)
    whole, values = values, values[::3, ::3]
    if "FloatPixelData" in header:  # pydicom only counts windows from the depth of integers
        header.BitsStored, header.PixelRepresentation = 16, 0
    if values.ndim == 3:
        return values / (2.0**header.BitsStored - 1) * 255
    if header.PhotometricInterpretation == "PALETTE COLOR":
        return apply_color_lut(values, header) / 256
    for group in header.get("SharedFunctionalGroupsSequence") or []:
        for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            header.update(group[name][0] if name in group else {})
    rescaled = apply_modality_lut(values, header)
    is_hounsfield = "RescaleSlope" in header and header.get("RescaleType", "HU") == "HU"
    if modality == "ct" and is_hounsfield:
        grey = (rescaled + 160) / 400
    elif "VOILUTSequence" in header:
        grey = apply_voi(rescaled, header) / (2.0 ** header.VOILUTSequence[0].LUTDescriptor[2] - 1)
    elif "WindowWidth" in header:
        windowed = apply_windowing(rescaled, header)
        bits, slope = header.BitsStored, float(header.get("RescaleSlope", 1))
        low = -(2 ** (bits - 1)) if header.PixelRepresentation else 0
        low = low * slope + float(header.get("RescaleIntercept", 0))
        grey = (windowed - low) / ((2**bits - 1) * slope)
    elif header.get("BitsStored") == 8:
        grey = values / 255
    else:
        low, high = np.percentile(whole, (0.5, 99.5))
        low, high = (low, high) if low < high else (whole.min(), whole.max())
        grey = (values - low) / (high - low)
    grey = np.clip(grey, 0, 1) * 255
    if header.PhotometricInterpretation == "MONOCHROME1":
        grey = 255 - grey
    if header.get("PixelPaddingValue") is not None:
        grey[values == header.PixelPaddingValue] = 0
    return grey


def test_every_file_of_the_manifest_is_in_the_table(manifest):
    assert not MODALITY_OF.keys() & REASON_OF.keys()
    assert MODALITY_OF.keys() | REASON_OF.keys() == manifest.keys()
    assert len(manifest) == 111


def test_every_file_gives_its_pictures_or_its_reason(manifest, real_data):
    outcomes = {}
    for name, row in manifest.items():
        try:
            reading = read_dicom(Item(real_data / "dicom" / row["file"], f"0/{name}"), Rules())
            (outcomes[name],) = {picture.modality for picture in reading.pictures}
            assert len(reading.pictures) == COUNTS.get(name, 1), name
        except Rejected as rejected:
            outcomes[name] = rejected.reason
    assert outcomes == {**MODALITY_OF, **REASON_OF}


def test_what_the_manifest_says_decodes_has_its_shape(manifest, decoded):
    for name, path in decoded.items():
        if name not in TWELVE_BITS:
            shape = manifest[name]["decodes_with_pydicom"].split(")")[0].removeprefix("ok (")
            frames = stored(path)
            frames = frames[0] if len(frames) == 1 else frames
            assert frames.shape == tuple(int(side) for side in shape.split(",")), name
    for name, reason in UNREADABLE.items():
        with pytest.raises(Rejected, match=reason):
            stored(decoded["CT_small.dcm"].with_name(name))


def test_stored_values_are_those_of_another_decoder(decoded):
    compared = set()
    for name, path in decoded.items():
        with open_dicom(path) as file:
            syntax = file.syntax
        values = stored(path)
        compared.add(syntax)
        if name in DIGESTS:
            digest = hashlib.sha256(values[0].astype("<u2").tobytes()).hexdigest()
            assert digest.startswith(DIGESTS[name]), name
            continue
        other = by_numpy if syntax in UNCOMPRESSED else OTHER_DECODER.get(syntax, by_gdcm)
        expected = other(path)
        if bits := SIGN_BITS.get(name):
            expected = expected.astype(int)
            expected = np.where(expected >= 2 ** (bits - 1), expected - 2**bits, expected)
        assert values.shape == expected.shape, name
        if syntax == JPEGBaseline8Bit:
            # Two libjpegs round cosines and widen chroma each in their own way.
            assert np.abs(values.astype(int) - expected).mean() < 1, name
        else:
            np.testing.assert_array_equal(values, expected, err_msg=name)
    assert len(compared) == 13  # transfer syntaxes


def test_pictures_look_as_pydicom_shows_them(decoded):
    for name in decoded.keys() - {"ct_constant_zero.dcm"}:
        path = decoded[name]
        modality = MODALITY_OF.get(name, "us")
        with open_dicom(path) as file:
            image = decode_frame(file, 0, Rules(), modality)[::3, ::3]
        expected = shown_by_pydicom(path, stored(path)[0], modality)
        assert image.dtype == np.uint8
        assert image.shape == expected.shape, name
        assert np.abs(image - expected).max() <= 1.01, name


def test_copies_of_one_image_in_several_syntaxes_are_alike(decoded):
    lossless = [stored(decoded[name]) for name in ("CT1_J2KR", "CT1_JLSL", "CT1_JPLL", "CT1_RLE")]
    assert all((copy == lossless[0]).all() for copy in lossless)
    for names in (
        ("CT1_J2KR", "CT1_JLSN"),
        ("CT2_RLE", "CT2_J2KI"),
        ("RG3_J2KI", "RG3_JLSN", "RG3_JPLY"),
        ("NM1_JPLL", "JPGExtended.dcm"),
        ("US1_UNCR.dcm", "US1_RLE", "US1_J2KR.dcm", "US1_J2KI.dcm"),
        ("VL6_J2KR", "VL6_J2KI"),
    ):
        first, *others = (stored(decoded[name]).astype(float).ravel() for name in names)
        for other in others:
            assert np.corrcoef(first, other)[0, 1] > 0.98, names


def test_air_is_dark_and_the_belly_bright_in_every_chest(decoded):
    for name in PICTURES["cxr"].split():
        with open_dicom(decoded[name]) as file:
            image = decode_frame(file, 0, Rules(), "cxr").astype(float)
        height, width = image.shape
        belly = image[int(0.85 * height) : int(0.95 * height), int(0.4 * width) : int(0.6 * width)]
        air = image[: height // 20, : width // 20]
        assert belly.mean() > air.mean() + 100, name
