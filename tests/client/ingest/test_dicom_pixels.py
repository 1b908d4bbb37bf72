import dataclasses
import io
import struct

import numpy as np
import pytest
from openjpeg.utils import encode_array
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    MPEG2MPML,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from client.ingest.dicom_file import open_dicom
from client.ingest.dicom_pixels import KINDS, decode_frame, stored_values
from client.ingest.types import Reason, Rejected, Rules

RULES = Rules(ct_window=(40.0, 400.0))
HU = {"RescaleSlope": 1, "RescaleIntercept": -1024}
SYNTAXES = (RLELossless, JPEGLSLossless, JPEG2000Lossless)

pytestmark = pytest.mark.filterwarnings("ignore:::pydicom")


def shown(path, modality="us", index=0):
    with open_dicom(path) as file:
        return decode_frame(file, index, RULES, modality)


def stored(path, index=0):
    with open_dicom(path) as file:
        return stored_values(file, index)


def reason_of(path, modality="us"):
    with pytest.raises(Rejected) as rejected:
        shown(path, modality)
    return rejected.value.reason


def item(**elements):
    dataset = Dataset()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset


def jpeg(picture, quality=95, **options):
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality, subsampling=0, **options)
    return out.getvalue()


@pytest.fixture
def colours():
    """Smooth colours, so that lossy compression changes them little."""
    small = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC))


# Grey: rescale, windows, tables


def test_ct_is_windowed_in_hounsfield_units(write_dicom, ramp):
    image = shown(write_dicom(ramp, **HU), "ct").ravel()
    hounsfield = np.arange(4096) - 1024.0
    expected = np.clip((hounsfield - (40 - 200)) / 400, 0, 1) * 255
    assert np.abs(image - expected).max() <= 0.5 + 1e-3
    assert image[1024 - 160] == 0
    assert image[1024 + 240] == 255


def test_signed_ct_gives_the_same_picture(write_dicom, ramp):
    signed = (ramp.astype(np.int32) - 1024).astype(np.int16)
    unsigned = shown(write_dicom(ramp, **HU), "ct")
    assert (shown(write_dicom(signed, RescaleSlope=1, RescaleIntercept=0), "ct") == unsigned).all()


@pytest.mark.parametrize(
    "header", [{}, {**HU, "RescaleType": "US"}, {"RescaleSlope": 1}], ids=["none", "US", "half"]
)
def test_ct_that_is_not_in_hounsfield_units_has_the_files_own_window(write_dicom, ramp, header):
    centre = 2048.0 - (1024 if "RescaleIntercept" in header else 0)
    path = write_dicom(ramp, **header, WindowCenter=centre, WindowWidth=4096.0)
    assert np.abs(shown(path, "ct").ravel() - np.arange(4096) / 4095 * 255).max() <= 0.5 + 1e-3


def test_the_first_window_of_the_file_is_used_elsewhere(write_dicom, ramp):
    path = write_dicom(ramp, WindowCenter=[1000, 5], WindowWidth=[101, 2])
    image = shown(path).ravel()
    # PS3.3 C.11.2.1.2: (x - (c - 0.5)) / (w - 1) + 0.5
    expected = np.clip((np.arange(4096) - 999.5) / 100 + 0.5, 0, 1) * 255
    assert np.abs(image - expected).max() <= 0.5 + 1e-3
    assert image[949] == 0
    assert image[1050] == 255


def test_an_exact_window_has_no_half_steps(write_dicom, ramp):
    path = write_dicom(ramp, WindowCenter=1000, WindowWidth=100, VOILUTFunction="LINEAR_EXACT")
    expected = np.clip((np.arange(4096) - 1000) / 100 + 0.5, 0, 1) * 255
    assert np.abs(shown(path).ravel() - expected).max() <= 0.5 + 1e-3


def test_a_sigmoid_window_is_a_sigmoid(write_dicom, ramp):
    path = write_dicom(ramp, WindowCenter=1000, WindowWidth=100, VOILUTFunction="SIGMOID")
    expected = 255 / (1 + np.exp(-4 * (np.arange(4096) - 1000) / 100.0))
    assert np.abs(shown(path).ravel() - expected).max() <= 0.5 + 1e-3


def test_a_window_of_one_is_a_threshold(write_dicom, ramp):
    image = shown(write_dicom(ramp, WindowCenter=1000, WindowWidth=1)).ravel()
    assert (image == np.where(np.arange(4096) > 999.5, 255, 0)).all()


@pytest.mark.parametrize("width", [0, -5, ""])
def test_a_window_that_shows_nothing_counts_as_none(write_dicom, ramp, width):
    plain = shown(write_dicom(ramp))
    assert (shown(write_dicom(ramp, WindowCenter=40, WindowWidth=width)) == plain).all()


def test_an_unknown_window_function_is_a_damaged_header(write_dicom, ramp):
    path = write_dicom(ramp, WindowCenter=40, WindowWidth=400, VOILUTFunction="CUBIC")
    assert reason_of(path) is Reason.DAMAGED_HEADER


def test_a_window_that_is_no_number_is_a_damaged_header(write_dicom, ramp):
    path = write_dicom(ramp, WindowCenter="40", WindowWidth="400")
    path.write_bytes(path.read_bytes().replace(b"DS\x04\x00400 ", b"DS\x04\x004x0 "))
    assert reason_of(path) is Reason.DAMAGED_HEADER


def test_without_a_window_deep_values_are_stretched_between_percentiles(write_dicom, ramp):
    image = shown(write_dicom(ramp, BitsStored=12)).ravel()
    low, high = np.percentile(np.arange(4096), (0.5, 99.5))
    expected = np.clip((np.arange(4096) - low) / (high - low), 0, 1) * 255
    assert np.abs(image - expected).max() <= 0.5 + 1e-3


def test_without_a_window_8_bit_values_are_kept(write_dicom):
    values = np.random.default_rng(0).integers(50, 90, (32, 32), np.uint8)
    assert (shown(write_dicom(values)) == values).all()


def test_a_voi_table_comes_before_the_window(write_dicom):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    table = [(255 - level) * 16 for level in range(10, 210)]  # for levels 10 to 209
    voi = item(LUTDescriptor=[200, 10, 12])
    voi.add_new("LUTData", "US", table)
    path = write_dicom(values, VOILUTSequence=[voi], WindowCenter=1, WindowWidth=2)
    expected = (255 - np.clip(np.arange(256), 10, 209)) * 16 / 4095 * 255
    assert np.abs(shown(path).ravel() - expected).max() <= 0.5 + 1e-3


def test_a_modality_table_comes_before_the_voi_window(write_dicom):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    table = item(LUTDescriptor=[256, 0, 16])
    table.add_new("LUTData", "US", [level * level for level in range(256)])
    path = write_dicom(
        values,
        ModalityLUTSequence=[table],
        WindowCenter=32512,
        WindowWidth=65025,
        VOILUTFunction="LINEAR_EXACT",
    )
    expected = np.clip((np.arange(256) ** 2 - 32512) / 65025 + 0.5, 0, 1) * 255
    assert np.abs(shown(path).ravel() - expected).max() <= 0.5 + 1e-3


def test_the_table_of_8_bits_may_be_packed_two_to_a_word(write_dicom):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    voi = item(LUTDescriptor=[256, 0, 8])
    voi.add_new("LUTData", "OW", bytes(range(255, -1, -1)))
    assert (shown(write_dicom(values, VOILUTSequence=[voi])).ravel() == 255 - values.ravel()).all()


def test_an_empty_table_is_a_damaged_header(write_dicom):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    voi = item(LUTDescriptor=[256, 0, 8])
    voi.add_new("LUTData", "OW", b"")
    assert reason_of(write_dicom(values, VOILUTSequence=[voi])) is Reason.DAMAGED_HEADER


def test_monochrome1_is_inverted_after_its_window(write_dicom, ramp):
    window = {"WindowCenter": 1000, "WindowWidth": 1000}
    straight = shown(write_dicom(ramp, **window), "cxr")
    path = write_dicom(ramp, PhotometricInterpretation="MONOCHROME1", **window)
    assert (shown(path, "cxr") == 255 - straight).all()
    assert shown(path, "cxr")[0, 0] == 255  # the lowest value is white


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_does_not_widen_the_percentiles(write_dicom, ramp, photometric):
    padded = ramp + 1000
    padded[:8] = 60_000
    header = {"PhotometricInterpretation": photometric}
    image = shown(write_dicom(padded, PixelPaddingValue=60_000, **header), "cxr")
    whole = shown(write_dicom(padded[8:], **header), "cxr")
    assert (image[:8] == 0).all()
    assert (image[8:] == whole).all()


def test_padding_may_be_a_range_and_written_unsigned_beside_signed_pixels(write_dicom, ramp):
    values = (ramp.astype(np.int32) - 2048).astype(np.int16)
    path = write_dicom(values, WindowCenter=0, WindowWidth=10_000)
    dataset = dcmread(path)
    dataset.add_new("PixelPaddingValue", "US", 65536 - 2048)
    dataset.add_new("PixelPaddingRangeLimit", "US", 65536 - 2000)
    dataset.save_as(path)
    image = shown(path).ravel()
    assert (image[:49] == 0).all()
    assert (image[49:] > 50).all()


def test_enhanced_objects_are_rescaled_and_windowed_frame_by_frame(write_dicom, ramp):
    def group(intercept):
        rescale = item(RescaleSlope=1, RescaleIntercept=intercept, RescaleType="HU")
        return item(PixelValueTransformationSequence=[rescale])

    shared = item(FrameVOILUTSequence=[item(WindowCenter=100, WindowWidth=1001)])
    path = write_dicom(
        ramp,
        NumberOfFrames=2,
        PixelData=ramp.tobytes() * 2,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=[group(-1024), group(-1000)],
    )
    first, second = (shown(path, "ct", index).ravel() for index in range(2))
    assert first[1024 - 160] == second[1000 - 160] == 0
    assert first[1024 + 40] == second[1000 + 40] == 128
    windowed = shown(path, "us", 1).ravel()
    assert windowed[1000 - 401] == 0
    assert windowed[1000 + 600] == 255
    assert abs(int(windowed[1000 + 100]) - 128) <= 1


def test_float_pixels_are_stretched_and_must_be_finite(write_dicom, ramp):
    values = ramp.astype(np.float32) / 100
    header = {"BitsStored": None, "PixelRepresentation": None, "PixelData": None}
    path = write_dicom(ramp, **header, BitsAllocated=32, FloatPixelData=values.tobytes())
    deep = shown(write_dicom(ramp))
    assert np.abs(shown(path).astype(int) - deep).max() <= 1
    values[3, 3] = np.nan
    path = write_dicom(ramp, **header, BitsAllocated=32, FloatPixelData=values.tobytes())
    assert reason_of(path) is Reason.NOT_FINITE


def test_a_rescale_that_overflows_is_not_finite(write_dicom, ramp):
    path = write_dicom(ramp, RescaleSlope="1e307", RescaleIntercept="0")
    assert reason_of(path, "ct") is Reason.NOT_FINITE


def test_values_of_32_bits_are_shown_like_those_of_16(write_dicom, ramp):
    deep = ramp.astype(np.uint32) * 1_000_000
    image = shown(write_dicom(deep)).astype(int)
    assert np.abs(image - shown(write_dicom(ramp))).max() <= 1


def test_single_bits_are_black_and_white(write_dicom):
    bits = np.random.default_rng(0).integers(0, 2, (16, 16), np.uint8)
    path = write_dicom(bits, BitsAllocated=1, BitsStored=1)
    dataset = dcmread(path)
    dataset.PixelData = np.packbits(bits, bitorder="little").tobytes()
    dataset.save_as(path)
    assert (shown(path) == bits * 255).all()


def test_bits_that_are_not_stored_do_not_count(write_dicom, ramp):
    dirty = ramp | 0xF000
    assert (stored(write_dicom(dirty, BitsStored=12)) == ramp).all()


# Colour


def test_colours_stored_plane_by_plane_or_pixel_by_pixel_are_the_same(write_dicom, colours):
    planes = np.ascontiguousarray(colours.transpose(2, 0, 1))
    by_plane = write_dicom(colours, PlanarConfiguration=1, PixelData=planes.tobytes())
    assert (shown(by_plane) == colours).all()
    assert (shown(write_dicom(colours)) == colours).all()
    assert (shown(write_dicom(colours, PlanarConfiguration=None)) == colours).all()


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_deep_colours_are_scaled_to_8_bits(write_dicom, colours, dtype):
    factor = np.iinfo(dtype).max // 255
    assert (shown(write_dicom(colours.astype(dtype) * dtype(factor))) == colours).all()


def to_ybr(rgb):
    """PS3.3 C.7.6.3.1.2."""
    matrix = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
    return np.rint(np.clip(rgb @ matrix.T + [0, 128, 128], 0, 255)).astype(np.uint8)


def test_ybr_becomes_rgb(write_dicom, colours):
    path = write_dicom(to_ybr(colours), PhotometricInterpretation="YBR_FULL")
    assert np.abs(shown(path).astype(int) - colours).max() <= 2


def test_halved_chroma_is_widened_again(write_dicom, colours):
    pairs = np.repeat(colours[:, ::2], 2, axis=1)  # alike, so that halving loses nothing
    ybr = to_ybr(pairs)
    packed = np.stack([ybr[:, ::2, 0], ybr[:, 1::2, 0], ybr[:, ::2, 1], ybr[:, ::2, 2]], axis=-1)
    path = write_dicom(pairs, PhotometricInterpretation="YBR_FULL_422", PixelData=packed.tobytes())
    assert np.abs(shown(path).astype(int) - pairs).max() <= 2


def palette(**tables):
    header = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, (descriptor, data) in tables.items():
        header[f"{name}PaletteColorLookupTableDescriptor"] = descriptor
        header[f"{name}PaletteColorLookupTableData"] = data
    return header


def test_palettes_of_16_and_8_bits_give_their_colours(write_dicom):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    red = np.arange(0, 256, dtype="<u2")[::-1] * 257
    header = palette(
        Red=([256, 0, 16], red.tobytes()),
        Green=([200, 20, 16], (np.arange(200, dtype="<u2") * 256).tobytes()),
        Blue=([256, 0, 8], bytes(range(256))),
    )
    image = shown(write_dicom(values, **header)).reshape(256, 3)
    assert (image[:, 0] == np.arange(255, -1, -1)).all()
    assert (image[:, 1] == np.clip(np.arange(256) - 20, 0, 199)).all()
    assert (image[:, 2] == np.arange(256)).all()


def test_a_palette_for_more_levels_than_it_has_bits_is_not_folded(write_dicom):
    values = np.arange(1024, dtype=np.uint16).reshape(32, 32)
    data = bytes(level // 4 for level in range(1024))
    header = palette(**{name: ([1024, 0, 8], data) for name in ("Red", "Green", "Blue")})
    assert (shown(write_dicom(values, **header))[..., 1].ravel() == np.arange(1024) // 4).all()


@pytest.mark.parametrize("wide", [False, True])
def test_segmented_palettes_are_expanded(write_dicom, wide):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    scale = 256 if wide else 1
    # Two levels as listed, a ramp over four to 50, the first segment again, a ramp to the end.
    words = [0, 2, 10 * scale, 20 * scale, 1, 3, 50 * scale]
    words += [2, 1, 0, 0] if wide else [2, 1, 0, 0, 0, 0]
    words += [1, 249, 200 * scale]
    data = struct.pack(f"<{len(words)}{'H' if wide else 'B'}", *words)
    header = palette(
        **{name: ([256, 0, 16 if wide else 8], None) for name in ("Red", "Green", "Blue")}
    )
    for name in ("Red", "Green", "Blue"):
        del header[f"{name}PaletteColorLookupTableData"]
        header[f"Segmented{name}PaletteColorLookupTableData"] = data + b"\0" * (len(data) % 2)
    red = shown(write_dicom(values, **header))[..., 0].ravel()
    assert red[:7].tolist() == [10, 20, 30, 40, 50, 10, 20]
    assert np.abs(red[7:] - (20 + 180 * np.arange(1, 250) / 249)).max() <= 1
    assert red[255] == 200


@pytest.mark.parametrize(
    "words",
    [[1, 5, 9], [0, 1, 9, 3, 1, 0], [0, 1, 9, 2, 1, 6, 0], [0, 1, 9, 2, 60_000, 60_000, 9], []],
    ids=["ramp from nowhere", "unknown", "reference to a reference", "reference outside", "empty"],
)
def test_a_broken_segmented_palette_is_a_damaged_header(write_dicom, words):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    header = palette(**{name: ([256, 0, 16], None) for name in ("Red", "Green", "Blue")})
    for name in ("Red", "Green", "Blue"):
        del header[f"{name}PaletteColorLookupTableData"]
        header[f"Segmented{name}PaletteColorLookupTableData"] = struct.pack(
            f"<{len(words)}H", *words
        )
    assert reason_of(write_dicom(values, **header)) is Reason.DAMAGED_HEADER


def test_a_missing_palette_is_a_damaged_header(write_dicom):
    path = write_dicom(np.zeros((16, 16), np.uint8), PhotometricInterpretation="PALETTE COLOR")
    assert reason_of(path) is Reason.DAMAGED_HEADER


# Compressed


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: KINDS[syntax])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_lossless_syntaxes_give_back_every_value(write_dicom, syntax, dtype):
    info = np.iinfo(dtype)
    values = np.random.default_rng(0).integers(info.min, info.max, (64, 64), dtype, endpoint=True)
    path = write_dicom(values)
    dataset = dcmread(path)
    plugin = {JPEGLSLossless: "pyjpegls"}.get(syntax, "pylibjpeg")
    dataset.compress(syntax, encoding_plugin=plugin)
    dataset.save_as(path)
    assert (stored(path) == values).all()


def test_a_decoder_that_is_not_installed_is_not_blamed_on_the_file(write_dicom, monkeypatch):
    path = write_dicom(np.arange(256, dtype=np.uint8).reshape(16, 16))
    dataset = dcmread(path)
    dataset.compress(RLELossless, encoding_plugin="pylibjpeg")
    dataset.save_as(path)
    monkeypatch.setattr(type(get_decoder(RLELossless)), "available_plugins", ("pydicom",))
    assert reason_of(path) is Reason.NO_DECODER


COLOUR = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PhotometricInterpretation": "YBR_FULL"}
ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"


def unmarked(data, marker=b""):
    """A JPEG without its JFIF marker, with another one or none."""
    start = data.index(b"\xff\xe0")
    return data[:start] + marker + data[start + 2 + int.from_bytes(data[start + 2 : start + 4]) :]


@pytest.mark.parametrize("photometric", ["YBR_FULL", "YBR_FULL_422", "RGB"])
@pytest.mark.parametrize("marker", ["JFIF", "Adobe", "none"])
def test_jpeg_colours_are_right_however_header_and_markers_name_them(
    write_dicom, colours, photometric, marker
):
    data = jpeg(Image.fromarray(colours))
    if marker == "none" and photometric == "RGB":
        # As its header says, this stream holds RGB: encode the three channels as they are.
        data = jpeg(Image.merge("YCbCr", Image.fromarray(colours).split()))
    if marker != "JFIF":
        data = unmarked(data, ADOBE + b"\x01" if marker == "Adobe" else b"")
    header = {**COLOUR, "PhotometricInterpretation": photometric}
    image = shown(write_dicom([data], JPEGBaseline8Bit, **header))
    assert np.abs(image.astype(int) - colours).mean() < 3


def test_an_adobe_marker_that_says_rgb_is_believed(write_dicom, colours):
    data = unmarked(jpeg(Image.merge("YCbCr", Image.fromarray(colours).split())), ADOBE + b"\x00")
    image = shown(write_dicom([data], JPEGBaseline8Bit, **COLOUR))
    assert np.abs(image.astype(int) - colours).mean() < 3


def test_grey_jpeg_stays_grey(write_dicom):
    grey = Image.linear_gradient("L").resize((64, 64))
    image = shown(write_dicom([jpeg(grey)], JPEGBaseline8Bit))
    assert image.shape == (64, 64)
    assert np.abs(image.astype(int) - np.asarray(grey)).max() <= 4


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL", "YBR_RCT", "YBR_ICT"])
def test_jpeg_2000_that_was_transformed_is_rgb_whatever_its_header_says(
    write_dicom, colours, photometric
):
    data = encode_array(colours, photometric_interpretation=1, use_mct=True)
    header = {**COLOUR, "PhotometricInterpretation": photometric}
    assert (shown(write_dicom([data], JPEG2000Lossless, **header)) == colours).all()


def test_jpeg_2000_that_was_not_transformed_is_what_its_header_says(write_dicom, colours):
    data = encode_array(to_ybr(colours), photometric_interpretation=1, use_mct=False)
    image = shown(write_dicom([data], JPEG2000, **COLOUR))
    assert np.abs(image.astype(int) - colours).max() <= 2


def test_the_sign_of_jpeg_2000_is_the_headers(write_dicom, ramp):
    data = encode_array(ramp, 13, photometric_interpretation=2)
    header = {"BitsAllocated": 16, "BitsStored": 13, "PixelRepresentation": 1}
    assert (stored(write_dicom([data], JPEG2000Lossless, **header)) == ramp).all()
    high = ramp + 4096  # the sign bit of 13
    data = encode_array(high, 13, photometric_interpretation=2)
    path = write_dicom([data], JPEG2000Lossless, **header)
    assert (stored(path) == ramp.astype(int) - 4096).all()


def lie(data, rows=64, columns=64, bits=8, components=1, marker=0xC0):
    """A JPEG whose frame header claims something else."""
    start = data.index(bytes([0xFF, 0xC0]))
    claim = struct.pack(">BHHB", bits, rows, columns, components)
    return (
        data[: start + 1]
        + bytes([marker])
        + data[start + 2 : start + 4]
        + claim
        + data[start + 10 :]
    )


@pytest.mark.parametrize(
    "claim",
    [
        {"rows": 65500, "columns": 65500},
        {"rows": 65},
        {"columns": 63},
        {"bits": 12},
        {"components": 3},
        {"rows": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("syntax", "marker"),
    [
        (JPEGBaseline8Bit, 0xC0),
        (JPEGExtended12Bit, 0xC1),
        (JPEGLosslessSV1, 0xC3),
        (JPEGLSLossless, 0xF7),
    ],
)
def test_a_codestream_of_another_size_is_not_decoded(write_dicom, claim, syntax, marker):
    data = lie(jpeg(Image.new("L", (64, 64), 7)), marker=marker, **claim)
    assert reason_of(write_dicom([data], syntax)) is Reason.SIZE_LIE


def test_a_jpeg_2000_of_another_size_is_not_decoded(write_dicom):
    data = bytearray(encode_array(np.zeros((64, 64), np.uint8), photometric_interpretation=2))
    data[8:16] = struct.pack(">2L", 65500, 65500)
    for syntax in (JPEG2000, HTJ2K):
        assert reason_of(write_dicom([bytes(data)], syntax)) is Reason.SIZE_LIE


def test_rle_of_another_depth_is_not_decoded(write_dicom):
    data = struct.pack("<16L", 2, 64, 66, *[0] * 13) + bytes(64)
    assert reason_of(write_dicom([data], RLELossless)) is Reason.SIZE_LIE


@pytest.mark.parametrize("syntax", [*SYNTAXES, JPEGBaseline8Bit, JPEGLosslessSV1, HTJ2K])
@pytest.mark.parametrize("data", [b"\0\0", b"\xff\xd8\xff\xd9", bytes(500), b"<html>" * 20])
def test_pixels_that_are_no_codestream_are_damaged(write_dicom, syntax, data):
    expected = {Reason.DAMAGED_PIXELS}
    if syntax == RLELossless:
        expected.add(Reason.SIZE_LIE)
    assert reason_of(write_dicom([data], syntax)) in expected


def test_a_panic_of_the_rle_decoder_is_damage(write_dicom):
    plane = b"\x81\x07" * 32
    overfull = b"\x81\x07" * 31 + b"\x82\x07" + b"\x81\x07"  # 127 pixels more than there are
    data = struct.pack("<16L", 2, 64, 128, *[0] * 13) + plane + overfull
    path = write_dicom([data], RLELossless, BitsAllocated=16, BitsStored=16)
    assert reason_of(path) is Reason.DAMAGED_PIXELS


def test_what_nobody_decodes_is_named(write_dicom):
    assert reason_of(write_dicom([b"\0\0"], MPEG2MPML)) is Reason.NO_DECODER


def test_only_the_frame_asked_for_is_read(write_dicom):
    frames = np.random.default_rng(0).integers(0, 255, (40, 64, 64), np.uint8)
    native = write_dicom(frames[0], NumberOfFrames=40, PixelData=frames.tobytes())
    streams = [encode_array(frame, photometric_interpretation=2) for frame in frames]
    compressed = write_dicom(
        streams, JPEG2000Lossless, NumberOfFrames=40, PixelData=encapsulate(streams)
    )

    class Counting(io.BufferedReader):
        taken = 0

        def read(self, *args):
            data = super().read(*args)
            self.taken += len(data)
            return data

    for path in (native, compressed):
        with open_dicom(path) as file, Counting(io.FileIO(path)) as stream:
            watched = dataclasses.replace(file, stream=stream)
            assert (stored_values(watched, 31) == frames[31]).all()
            assert stream.taken < 2 * 64 * 64


# Orientation


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (["L", "F"], lambda image: image),
        (["R", "F"], lambda image: image[:, ::-1]),
        (["L", "H"], lambda image: image[::-1]),
        (["RA", "HL"], lambda image: image[::-1, ::-1]),
        (["F", "L"], lambda image: image.T),
        (["H", "L"], lambda image: image.T[::-1]),
        (["F", "R"], lambda image: image.T[:, ::-1]),
        (["H", "R"], lambda image: image.T[::-1, ::-1]),
        (["A", "F"], lambda image: image),
        (["P", "H"], lambda image: image[::-1]),
        (["A", "L"], lambda image: image),
        (["?", ""], lambda image: image),
        (["L"], lambda image: image),
        ("", lambda image: image),
    ],
)
def test_a_chest_is_shown_head_up_and_its_left_on_the_right(write_dicom, orientation, turn):
    values = np.random.default_rng(0).integers(0, 256, (16, 24), np.uint8)
    path = write_dicom(values, PatientOrientation=orientation)
    assert (shown(path, "cxr") == turn(values)).all()
    assert (shown(path, "us") == values).all()
