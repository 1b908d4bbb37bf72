"""Burned-in text: how much of it is found, and how often it is seen where there is none.

Four tables. Real lines: text in real images, framed by hand (LINES). Planted lines: invented names,
dates and numbers drawn on real images without text. False alarms: real images without text.
Processor time.
  found    lines with at least half of their glyph pixels inside the boxes
  whole    lines with at least 95 % of them inside
  covered  share of all glyph pixels inside
  fired    images without text where some was seen
  blanked  share of their pixels that a mask would blank

Thresholds were chosen on the images, fonts and colours of --half tune; the figures to quote are
those of --half report (the default): other files, other fonts, and other patients but in OCT, where
full-size scans of one patient are in both halves. The real lines were looked at while the detector
was built, but no threshold was fitted to them.

Found: 1,506 of 1,676 planted lines (413 of 419 on banners, 1,093 of 1,257 over images, 9 of the 95
there whose contrast is under 40 levels) and 84 of 92 real ones; text in 2 of 74 medical images
without any at full size or cut to 512 px, both OCT, and in 1 of 3,009 of 64 px, enlarged or not.

Run: python benchmarks/burned_in.py [--half report] [--data DIR] [--each 150] [--repeats 2]
     (1 minute of one processor; needs the real test data and the extra `dev`)
"""

import argparse
import io
import time
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import matplotlib
import numpy as np
import skimage
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from client.ingest.burned_in import Box, find_text
from client.ingest.dicom_file import open_dicom
from client.ingest.dicom_pixels import decode_frame
from client.ingest.types import Rules
from core.modalities import MODALITIES

Pixels = NDArray[np.uint8]

LINES: Final[dict[str, str]] = {
    "real/US1_UNCR.dcm": """19,25,170,40 19,42,90,56 19,57,70,71 19,73,80,87 19,89,60,103
        279,42,360,56 499,25,620,40 548,42,620,56 528,57,620,71 568,73,620,87 558,89,620,103
        8,137,39,151 8,217,39,231 598,137,630,151 598,217,630,231 248,361,360,375
        399,457,620,472""",
    "real/OBXXXX1A_rle.dcm": """10,8,75,23 94,9,121,23 95,36,266,51 326,36,512,54 573,9,637,23
        669,9,775,26 575,36,648,51 669,36,782,51 3,67,75,82 3,86,48,101 3,106,52,120 3,125,54,139
        3,163,29,177 10,184,63,199 10,203,68,218 10,222,54,237 10,241,78,256 125,87,215,104
        240,87,304,102 142,508,190,519""",
    "real/VL1_J2KI": """10,13,22,22 33,13,203,22 79,40,140,60 79,60,190,80 79,80,204,100
        96,120,222,140 94,140,222,160 79,180,236,200""",
    "real/VL3_J2KI": """10,13,23,22 33,13,190,22 61,52,126,69 590,32,718,48 590,52,718,69
        670,132,719,149 63,392,127,412 63,412,143,429 63,432,212,452 637,392,719,412
        637,412,719,429""",
    "real/VL6_J2KR": "10,13,206,22 10,23,46,32 178,3,207,12",
    "real/JPGLosslessP14SV1_1s_1f_8b.dcm": """13,25,142,45 13,53,63,73 13,76,69,97 13,98,65,116
        105,65,331,85 105,95,331,115 13,139,40,157 25,160,67,178 13,180,57,197 13,200,71,218
        19,220,68,238 827,25,898,44 917,25,984,44 963,79,985,93 14,477,90,496 933,729,993,746""",
    "real/examples_ybr_color.dcm": """12,3,29,11 2,14,37,22 301,14,317,22 301,24,317,32
        304,62,315,71 303,70,316,78 303,81,317,89 303,89,316,97 60,230,74,238 137,230,158,238
        177,230,199,239 224,230,234,238 246,230,276,239""",
    "derived/dx_chest_12bit_mono1.dcm": "37,1,100,13 426,226,443,238",
    "derived/dx_chest_deflated.dcm": "359,34,371,46",
    "derived/us_cine_3frames_rgb.dcm": "109,214,182,231",
}
"""Lines of at least two characters, by file: x0, y0, x1, y1, as a person framed them."""

FILES: Final[dict[str, dict[str, str]]] = {
    "tune": {
        "real/CT1_JLSL": "ct",
        "real/693_J2KR.dcm": "ct",
        "real/explicit_VR-UN.dcm": "ct",
        "real/VL5_J2KI": "pathology",
        "derived/sm_tiles_4frames_jpeg.dcm": "pathology",
        "real/RG3_J2KI": "other",
        "derived/op_fundus_jpeg.dcm": "cfp",
        "derived/xc_derm_jpeg.dcm": "dermatology",
        "derived/opt_oct_volume_3frames.dcm": "oct",
    },
    "report": {
        "real/CT2_RLE": "ct",
        "real/J2K_pixelrep_mismatch.dcm": "ct",
        "real/eCT_Supplemental.dcm": "ct",
        "real/CT_small.dcm": "ct",
        "real/VL4_J2KI": "cfp",
        "real/RG1_J2KI": "cxr",
        "derived/sm_patch_j2k.dcm": "pathology",
        "derived/dms_derm_rgb.dcm": "dermatology",
        "derived/opt_oct_singleframe_jpeg.dcm": "oct",
        "real/color-pl.dcm": "us",
        "real/XA1_J2KI": "other",
        "real/NM1_JPLL": "other",
        "real/examples_overlay.dcm": "other",
        "real/MR_small.dcm": "other",
        "real/HTJ2K_08_RGB.dcm": "not medical",
    },
}
"""Real images without a line of text; one letter at most."""

PICTURES: Final = {
    "tune": {"ihc.png": "pathology"},
    "report": {"retina.jpg": "cfp"}
    | dict.fromkeys(
        ["brick", "camera", "cell", "chelsea", "coffee", "coins", "grass"], "not medical"
    ),
}
"""Of scikit-image."""

FONTS: Final = {
    "tune": ["DejaVuSans.ttf", "DejaVuSansMono-Bold.ttf", "STIXGeneral.ttf"],
    "report": ["", "DejaVuSansMono.ttf", "DejaVuSerif.ttf", "DejaVuSans-Bold.ttf", "cmss10.ttf"],
}
"""Of matplotlib; the empty name is Pillow's own."""

CONTRASTS: Final = ("a: under 40", "b: 40 to 79", "c: 80 to 159", "d: 160 levels and more")
SIZES: Final = (8, 10, 12, 16, 24, 32, 48)
WHITE, GREY, DARK = (255, 255, 255), (150, 150, 150), (10, 10, 10)
COLOURS: Final = {
    "tune": [WHITE, GREY, (255, 230, 40), (0, 230, 60), DARK],
    "report": [WHITE, GREY, (255, 215, 0), (90, 255, 90), (0, 220, 255), DARK],
}
NAMES: Final = {
    "tune": ["DOE JANE", "Muster, Erika", "TESTPATIENT", "O'Nobody Sam", "DOE^JOHN"],
    "report": ["ROE RICHARD", "Mustermann, Max", "NOBODY^ANN", "Invented Person", "PAT. EXAMPLE"],
}
ARCHIVES: Final = {
    "ct_mednist_bodyregion": "ct",
    "cxr_nih_pneumonia": "cxr",
    "us_busi": "us",
    "path_lc25000_lung": "pathology",
    "cfp_eyedisease": "cfp",
    "derm_ham10000": "dermatology",
    "oct_noor": "oct",
}
"""Of 64 x 64 images."""


def decode(path: Path, modality: str) -> Pixels:
    with open_dicom(path) as file:
        return decode_frame(file, 0, Rules(), modality if modality in MODALITIES else "us")


def full_images(data: Path, half: str) -> Iterator[tuple[str, Pixels]]:
    """Modality and image, at the size they were made."""
    for name, modality in FILES[half].items():
        yield modality, decode(data / "dicom" / name, modality)
    with zipfile.ZipFile(data / "images64" / "oct_chiu2015_subject01_unlabelled.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        for name in names[half == "report" :: 2]:
            yield "oct", np.array(Image.open(io.BytesIO(archive.read(name))))
    for name, modality in PICTURES[half].items():
        path = Path(skimage.__file__).parent / "data" / name
        yield modality, np.array(Image.open(path if path.suffix else path.with_suffix(".png")))


def crops(images: list[tuple[str, Pixels]], px: int = 512) -> Iterator[tuple[str, Pixels]]:
    """Cut large images into squares that show something."""
    for modality, image in images:
        if min(image.shape[:2]) >= 2 * px:
            for y in range(0, image.shape[0] - px + 1, px):
                for x in range(0, image.shape[1] - px + 1, px):
                    crop = np.ascontiguousarray(image[y : y + px, x : x + px])
                    if crop.std() > 5:
                        yield modality, crop


def small_images(data: Path, half: str, scale: int, each: int) -> Iterator[tuple[str, Pixels]]:
    """Images of 64 pixels, enlarged: crisp but tiny at scale 1, large but smooth above."""
    for name, modality in ARCHIVES.items():
        with np.load(data / "images64" / f"{name}_64.npz") as archive:
            images = archive["train_images" if half == "tune" else "test_images"]
        chosen = np.random.default_rng(5).permutation(len(images))[:each]
        for image in images[chosen]:
            side = 64 * scale
            yield modality, np.array(Image.fromarray(image).resize((side, side), Image.BICUBIC))


def covered(boxes: list[Box], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    mask = np.zeros(shape[:2], bool)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


def write(generator: np.random.Generator, half: str) -> str:
    """An invented name, date, number, or date and time."""
    year, month, day = (int(generator.integers(*r)) for r in ((1920, 2025), (1, 13), (1, 29)))
    hour, minute = int(generator.integers(24)), int(generator.integers(60))
    lines = [
        str(generator.choice(NAMES[half])),
        f"{year}-{month:02d}-{day:02d}",
        f"ID {generator.integers(10**5, 10**8)}",
        f"{day:02d}/{month:02d}/{year} {hour:02d}:{minute:02d}",
    ]
    return lines[generator.integers(4)]


def plant(
    image: Pixels,
    font_name: str,
    size: int,
    colour: tuple[int, int, int],
    banner: bool,
    generator: np.random.Generator,
    half: str,
) -> tuple[Image.Image, NDArray[np.bool_], float] | None:
    """Draw a line; gives the picture, the glyph pixels, and the contrast in levels."""
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    font = (
        ImageFont.truetype(str(fonts / font_name), size)
        if font_name
        else ImageFont.load_default(size)
    )
    picture, text = Image.fromarray(image).convert("RGB"), write(generator, half)
    _, _, right, bottom = (int(value) for value in font.getbbox(text))
    if right + 9 > picture.width or bottom + 9 > picture.height:
        return None
    x = int(generator.integers(4, picture.width - right - 4))
    y = 4 if banner else int(generator.integers(4, picture.height - bottom - 4))
    draw = ImageDraw.Draw(picture)
    if banner:
        ground = (240, 240, 240) if colour == DARK else (0, 0, 0)
        draw.rectangle([0, 0, picture.width, bottom + 8], fill=ground)
    stencil = Image.new("L", picture.size)
    ImageDraw.Draw(stencil).text((x, y), text, font=font, fill=255)
    x0, y0, x1, y1 = stencil.getbbox()
    ground = np.asarray(picture)[y0:y1, x0:x1].reshape(-1, 3).mean(0)
    draw.text((x, y), text, font=font, fill=colour)
    return picture, np.asarray(stencil) >= 128, float(np.abs(np.array(colour) - ground).max())


def tally(rows: dict[str, list[float]], heading: str) -> None:
    """Print lines, found, whole and covered of each row's shares."""
    print(f"\n| {heading} | lines | found | whole | covered |\n|---|---:|---:|---:|---:|")
    for name, shares in rows.items():
        found, whole = (np.count_nonzero(np.array(shares) >= least) for least in (0.5, 0.95))
        print(
            f"| {name} | {len(shares)} | {found} ({found / len(shares):.0%}) "
            f"| {whole} ({whole / len(shares):.0%}) | {np.mean(shares):.0%} |"
        )


def real_lines(data: Path) -> None:
    rows = defaultdict(list)
    for name, text in LINES.items():
        image = decode(data / "dicom" / name, "us")
        inside = covered(find_text(image), image.shape)
        for line in text.split():
            x0, y0, x1, y1 = map(int, line.split(","))
            patch = np.atleast_3d(image)[y0:y1, x0:x1]
            contrast = np.abs(patch - np.median(patch, axis=(0, 1))).max(2)
            glyphs = contrast >= contrast.max() / 2
            rows[name].append(float(inside[y0:y1, x0:x1][glyphs].mean()))
    rows["all"] = [share for shares in rows.values() for share in shares]
    tally(rows, "real lines")


def planted_lines(images: list[tuple[str, Pixels]], half: str, repeats: int) -> None:
    generator = np.random.default_rng(1)
    rows: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    images = [
        (modality, np.ascontiguousarray(image[:1024, :1024]))
        for modality, image in images
        if min(image.shape[:2]) >= 224
    ]
    places = [True, False, False, False] * repeats
    for font in FONTS[half]:
        for size in SIZES:
            for colour in COLOURS[half]:
                for turn, banner in enumerate(places):
                    modality, image = images[generator.integers(len(images))]
                    planted = plant(image, font, size, colour, banner, generator, half)
                    if planted is None:
                        continue
                    picture, glyphs, contrast = planted
                    if turn % 2:
                        stream = io.BytesIO()
                        picture.save(stream, "JPEG", quality=85)
                        picture = Image.open(stream)
                    inside = covered(find_text(np.asarray(picture)), glyphs.shape)
                    share = float(inside[glyphs].mean())
                    place = "banner" if banner else "image"
                    levels = CONTRASTS[np.searchsorted((40, 80, 160), contrast, side="right")]
                    rows["planted lines"][f"on {place}"].append(share)
                    rows["font size"][f"{size:2} px, on {place}"].append(share)
                    if not banner:
                        rows["contrast, on image"][levels].append(share)
                        rows["stored as, on image"]["JPEG 85" if turn % 2 else "PNG"].append(share)
                        rows["drawn on"][modality].append(share)
    for heading, table in rows.items():
        tally(dict(sorted(table.items())), heading)


def false_alarms(sets: dict[str, list[tuple[str, Pixels]]]) -> None:
    print("\n| images without text | modality | fired | blanked |\n|---|---|---:|---:|")
    for name, images in sets.items():
        rows = defaultdict(list)
        for modality, image in images:
            rows[modality].append(float(covered(find_text(image), image.shape).mean()))
        rows["all"] = [share for shares in rows.values() for share in shares]
        for modality, shares in sorted(rows.items()):
            fired = np.count_nonzero(shares)
            print(
                f"| {name} | {modality} | {fired} of {len(shares)} "
                f"({fired / len(shares):.1%}) | {np.mean(shares):.2%} |"
            )


def speed(data: Path) -> None:
    print("\n| image | processor ms |\n|---|---:|")
    noise = np.random.default_rng(0).integers(0, 256, (12_000, 12_500), dtype=np.uint8)
    for name, image in {
        "ultrasound, colour, 640 x 480": decode(data / "dicom/real/US1_UNCR.dcm", "us"),
        "ultrasound, grey, 1,024 x 768": decode(
            data / "dicom/real/JPGLosslessP14SV1_1s_1f_8b.dcm", "us"
        ),
        "CT, 512 x 512": decode(data / "dicom/real/693_J2KR.dcm", "ct"),
        "fundus, colour, 2,226 x 1,868": decode(data / "dicom/real/VL4_J2KI", "cfp"),
        "tile of a slide, colour, 224 x 224": decode(
            data / "dicom/derived/sm_patch_j2k.dcm", "pathology"
        ),
        "noise, colour, 1,414 x 1,414": noise.reshape(-1)[: 3 * 1414**2].reshape(1414, 1414, 3),
        "noise, grey, 150 million pixels": noise,
    }.items():
        seconds = []
        for _ in range(5):
            start = time.process_time()
            find_text(image)
            seconds.append(time.process_time() - start)
        print(f"| {name} | {1000 * np.median(seconds):.0f} |")


def main() -> None:
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--half", choices=["tune", "report"], default="report")
    parser.add_argument("--each", type=int, default=150, help="images an archive and scale")
    parser.add_argument("--repeats", type=int, default=2, help="of each planted line")
    options = parser.parse_args()
    full = list(full_images(options.data, options.half))
    sets = {"full size": full, "cut to 512 px": list(crops(full))}
    for scale in (1, 4, 8):
        small = small_images(options.data, options.half, scale, options.each)
        sets[f"64 px, enlarged {scale} times"] = list(small)
    backgrounds = [image for name in list(sets)[:2] for image in sets[name]]
    real_lines(options.data)
    planted_lines(
        backgrounds + list(sets.values())[-1][:: options.each // 15], options.half, options.repeats
    )
    false_alarms(sets)
    speed(options.data)


if __name__ == "__main__":
    main()
