"""Images from folders and tars, splits by name, augmentation, and the reading of icon packages."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from arimg.data import augment, emoji, load_images, open_image, to_tensor
from arimg.data.images import group_of


def png(colour, size=(8, 8), mode="RGB"):
    out = io.BytesIO()
    Image.new(mode, size, colour).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path):
    for category, colour in (("a/x", (255, 0, 0)), ("b", (0, 0, 255))):
        (tmp_path / "set" / category).mkdir(parents=True)
        for i in range(5):
            (tmp_path / "set" / category / f"n{i}.png").write_bytes(png(colour))
    (tmp_path / "set" / "notes.txt").write_text("no image")
    return tmp_path / "set"


def test_a_folder_and_its_tar_read_the_same(folder, tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(folder, ".")
    from_folder, from_tar = load_images(folder, 4), load_images(tmp_path / "set.tar", 4)
    assert from_folder.classes == from_tar.classes == ("a/x", "b")
    assert from_folder.names == from_tar.names
    np.testing.assert_array_equal(from_folder.pixels, from_tar.pixels)
    np.testing.assert_array_equal(from_folder.labels, [0] * 5 + [1] * 5)
    assert from_folder.batch([0])[0, :, 0, 0].tolist() == [1, 0, 0]


def test_transparent_pixels_become_white_and_half_transparent_ones_lighter():
    clear = open_image(io.BytesIO(png((255, 0, 0, 0), mode="RGBA")), 8)
    half = open_image(io.BytesIO(png((255, 0, 0, 128), mode="RGBA")), 8)
    assert (clear == 255).all()
    assert half[0, 0].tolist() == [255, 127, 127]


def test_a_wide_picture_is_cropped_at_the_centre_before_it_is_resized():
    picture = np.zeros((10, 30, 3), np.uint8)
    picture[:, 10:20] = 200
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    assert (open_image(io.BytesIO(out.getvalue()), 5) == 200).all()


def test_a_split_depends_on_names_alone_and_keeps_groups_together(tmp_path):
    for style in ("s1", "s2"):
        (tmp_path / style).mkdir()
        for i in range(60):
            for variant in ("m", "w"):
                (tmp_path / style / f"name{i}~{variant}.png").write_bytes(png((i, 0, 0), (1, 1)))
    images = load_images(tmp_path, 1)
    train, held_out = images.split(0.25)
    sides = [{group_of(n) for n in part.names} for part in (train, held_out)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 60
    assert 5 <= len(sides[1]) <= 27  # binomial(60, 1/4): beyond this once in 10^4
    shuffled = images.subset(np.random.default_rng(0).permutation(len(images)))
    assert set(shuffled.split(0.25)[1].names) == set(held_out.names)
    assert set(images.split(0.25, seed=1)[1].names) != set(held_out.names)


def test_errors_name_what_is_wrong(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_images(tmp_path / "nowhere", 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found none"):
        load_images(tmp_path / "empty", 8)
    with pytest.raises(ValueError, match="expected a folder or a tar"):
        load_images(folder / "notes.txt", 8)
    with pytest.raises(ValueError, match="known classes"):
        load_images(folder, 8, classes=["b"])
    (folder / "b" / "broken.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"b/broken\.png"):
        load_images(folder, 8)


def test_augmentation_shifts_within_bounds_and_repeats_with_the_seed():
    images = torch.zeros(16, 3, 9, 9)
    images[:, :, 4, 4] = 1
    moved = augment(images, torch.Generator().manual_seed(0), shift=2)
    spots = moved[:, 0].flatten(1).argmax(1)
    rows, columns = spots // 9 - 4, spots % 9 - 4
    assert rows.abs().max() <= 2 and columns.abs().max() <= 2 and len(spots.unique()) > 3
    assert torch.equal(moved, augment(images, torch.Generator().manual_seed(0), shift=2))
    assert torch.equal(augment(images, torch.Generator()), images)


def test_pixels_become_channels_first():
    pixels = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3)
    tensor = to_tensor(pixels)
    assert tensor.shape == (1, 3, 2, 4) and tensor[0, 2, 1, 3] == pytest.approx(23 / 255)


def package(folder, icons, categories, chars, licence="MIT"):
    folder.mkdir(parents=True)
    body = {"icons": {n: {"body": f"<circle id='{n}' r='5'/>"} for n in icons}, "width": 32, "height": 32}
    parts = {"icons": body, "metadata": {"categories": categories}, "chars": chars}
    for name, content in {**parts, "info": {"license": {"spdx": licence}}}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_styles_share_names_and_skin_tones_are_left_out(tmp_path):
    noto = package(
        tmp_path / "noto",
        ["grinning-face", "man-cook", "man-cook-dark-skin-tone", "hourglass-not-done"],
        {
            "Smileys & Emotion": ["grinning-face"],
            "People & Body": ["man-cook", "man-cook-dark-skin-tone"],
            "Objects": ["hourglass-not-done"],
        },
        {
            "1f600": "grinning-face",
            "1f468-200d-1f373": "man-cook",
            "1f468-1f3ff-200d-1f373": "man-cook-dark-skin-tone",
            "23f3": "hourglass-not-done",
        },
    )
    other = package(tmp_path / "fx", ["grinningface", "hourglassflowingsand", "unheardof"], {}, {})
    fluent = package(tmp_path / "fluent", ["grinning-face", "man-cook-dark"], {}, {})
    found = [d.member for d in emoji.read_drawings({"noto": noto, "fxemoji": other, "fluent": fluent})]
    assert found == [
        "smileys/noto/grinning-face~grinning-face.png",
        "objects/noto/hourglass-not-done~hourglass-not-done.png",
        "people/noto/cook~man-cook.png",
        "smileys/fxemoji/grinning-face~grinning-face.png",
        "objects/fxemoji/hourglass-not-done~hourglass-not-done.png",
        "smileys/fluent/grinning-face~grinning-face.png",
    ]


def test_a_set_under_another_licence_is_refused(tmp_path):
    folder = package(tmp_path / "noto", ["a"], {}, {}, licence="CC-BY-4.0")
    with pytest.raises(ValueError, match=r"CC-BY-4\.0"):
        list(emoji.read_drawings({"noto": folder}))


def test_a_drawing_is_rendered_on_white():
    pytest.importorskip("resvg_py", reason="resvg-py is not installed")
    shape = '<rect width="4" height="2" fill="#f00"/>'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 2">{shape}</svg>'
    pixels = open_image(io.BytesIO(emoji.render(svg, 16)))
    assert pixels.shape == (16, 16, 3)
    assert pixels[8, 8].tolist() == [255, 0, 0] and pixels[1, 8].tolist() == [255, 255, 255]
