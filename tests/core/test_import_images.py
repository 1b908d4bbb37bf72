from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from core.import_images import list_csv, read_csv, read_folder, read_image, split_of


def picture(path: Path, mode: str = "L", size: tuple[int, int] = (20, 16), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_a_folder_tells_modality_and_class(tmp_path: Path) -> None:
    picture(tmp_path / "ct" / "head" / "a.png")
    picture(tmp_path / "ct" / "chest" / "b.png")
    picture(tmp_path / "us" / "c.PNG")
    (tmp_path / "ct" / "chest" / "notes.txt").write_text("passed over")
    shard = read_folder(tmp_path, 16)
    assert shard.images.shape == (3, 16, 16, 1)
    assert shard.modality.tolist() == [0, 0, 2]
    assert shard.classes == {"ct": ("chest", "head"), "us": ()}
    assert shard.label.tolist() == [0, 1, -1]
    assert shard.patient.tolist() == [0, 1, 2]


def test_with_a_modality_sub_folders_are_classes(tmp_path: Path) -> None:
    picture(tmp_path / "clear" / "a.png")
    picture(tmp_path / "cloudy" / "b.jpg", mode="RGB")
    shard = read_folder(tmp_path, 16, "cxr")
    assert shard.images.shape == (2, 16, 16, 3)
    assert shard.classes == {"cxr": ("clear", "cloudy")}
    # The grey file became colour beside a colour one: its channels are equal.
    assert (shard.images[0, ..., 0] == shard.images[0, ..., 2]).all()


def test_folders_laid_out_otherwise_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_folder(tmp_path / "nowhere", 16)
    with pytest.raises(UserError, match="holds no image"):
        read_folder(tmp_path, 16)
    picture(tmp_path / "mri" / "a.png")
    with pytest.raises(
        UserError, match=r"mri': expected folders named ct, .* or name the modality"
    ):
        read_folder(tmp_path, 16)
    picture(tmp_path / "mri" / "deeper" / "a.png")
    with pytest.raises(UserError, match="found a folder deeper"):
        read_folder(tmp_path, 16, "ct")


def test_the_shorter_side_is_resized_and_the_centre_kept(tmp_path: Path) -> None:
    pixels = np.zeros((32, 64), np.uint8)
    pixels[:, 16:48] = 200  # the centre square
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image = read_image(tmp_path / "wide.png", 16, 1)
    assert image.shape == (16, 16, 1)
    assert (image[:, 2:-2] == 200).all()
    assert image.min() > 150  # bicubic weights reach over the crop's edge


def test_resizing_is_antialiased(tmp_path: Path) -> None:
    stripes = np.zeros((128, 128), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    image = read_image(tmp_path / "stripes.png", 16, 1).astype(int)
    assert abs(image - 127).max() < 20  # point sampling would give 0 or 255


def test_an_image_of_the_right_size_is_kept_bit_for_bit(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", mode="RGB", size=(16, 16))
    np.testing.assert_array_equal(read_image(path, 16, 3), np.asarray(Image.open(path)))


def test_deep_grey_is_stretched_and_orientation_is_applied(tmp_path: Path) -> None:
    deep = np.linspace(1000, 3000, 256).reshape(16, 16).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    image = read_image(tmp_path / "deep.png", 16, 1)
    assert (image.min(), image.max()) == (0, 255)
    assert (np.diff(image.ravel().astype(int)) >= 0).all()
    left = np.zeros((16, 16), np.uint8)
    left[:, :8] = 255
    turned = Image.fromarray(left)
    exif = turned.getexif()
    exif[0x0112] = 3  # turned by 180 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png", 16, 1)[0, 15, 0] == 255


def test_a_csv_gives_label_split_and_patient(tmp_path: Path) -> None:
    for index in range(4):
        picture(tmp_path / "images" / f"{index}.png", seed=index)
    (tmp_path / "list.csv").write_text(
        "image_path,modality,label,split,patient\n"
        "images/0.png,ct,head,train,p1\n"
        "images/1.png,ct,,train,p1\n"
        "images/2.png,cfp,normal,test,p2\n"
        "images/3.png,ct,chest,val,\n"
    )
    shard = read_csv(tmp_path / "list.csv", 16)
    assert shard.name == "list"
    assert shard.classes == {"ct": ("chest", "head"), "cfp": ("normal",)}
    assert shard.label.tolist() == [1, -1, 0, 0]
    assert shard.patient.tolist() == [0, 0, 1, 2]
    assert shard.split.tolist() == ["train", "train", "test", "val"]


def test_without_splits_patients_are_split_by_their_key_alone(tmp_path: Path) -> None:
    table = tmp_path / "list.csv"
    lines = [f"{i}.png,us,p{i // 3}" for i in range(3000)]
    table.write_text("image_path,modality,patient\n" + "\n".join(lines))
    entries = list_csv(table)
    of_patient = {entry.patient: entry.split for entry in entries}
    assert all(entry.split == of_patient[entry.patient] for entry in entries)
    shares = [list(of_patient.values()).count(split) / 1000 for split in ("train", "val", "test")]
    assert shares == pytest.approx([0.70, 0.15, 0.15], abs=0.04)
    # Expected from `printf p0 | sha256sum` and so on: first bytes 16 f6 bd dc b1, and 70 % is b3,
    # 85 % is d9. A later import of the same patients must not move any into training.
    keys = {"p0": "train", "p1": "test", "p12": "val", "p13": "test", "p14": "train"}
    assert {key: split_of(key) for key in keys} == keys


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image_path\na.png\n", "expected columns image_path,modality"),
        ("image_path,modality,lable\na.png,ct,x\n", "found image_path,modality,lable"),
        ("image_path,modality\n", "has no rows"),
        ("", "found nothing"),
        ("image_path,modality\na.png,mri\n", "line 2: expected a modality of .*found 'mri'"),
        ("image_path,modality\n,ct\n", "line 2: has no image_path"),
        ("image_path,modality\na.png,ct,3\n", "line 2: .*too many values"),
        ("image_path,modality,split\na.png,ct,dev\n", "line 2: expected split .*found 'dev'"),
        ("image_path,modality,split,patient\na.png,ct,train,1\na.png,ct,val,1\n", "number 0 is in"),
        ("image_path,modality\nb.png,ct\n", r"b\.png' does not exist"),
    ],
)
def test_a_csv_that_does_not_fit_is_refused(tmp_path: Path, text: str, message: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_csv(tmp_path / "list.csv", 16)


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "ct" / "a.png")
    broken = picture(tmp_path / "ct" / "b.png", size=(64, 64))
    data = broken.read_bytes()
    for damaged in (b"", b"not an image", data[: len(data) // 2], data[:40] + data[60:]):
        broken.write_bytes(damaged)
        with pytest.raises(UserError, match=r"b\.png' cannot be decoded: .*remove the file") as e:
            read_folder(tmp_path, 16)
        assert "\n" not in str(e.value)


def test_a_file_of_several_images_is_refused(tmp_path: Path) -> None:
    frames = [Image.new("L", (16, 16), value) for value in (0, 255)]
    frames[0].save(tmp_path / "stack.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="it holds several images"):
        read_image(tmp_path / "stack.tif", 16, 1)


def test_a_class_of_one_image_is_imported(tmp_path: Path) -> None:
    picture(tmp_path / "rare" / "a.png")
    assert read_folder(tmp_path, 16, "oct").label.tolist() == [0]
