from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslcli.data.bad_images import BadImage
from sslcli.data.decode import Encoded, decode, decode_jpeg, open_file
from sslcli.data.pixels import Pixels
from sslcli.data.sources.files import Flat


def pixel(path: Path, at=(0, 0)):
    image = decode(str(path))
    assert image.mode == "RGB"
    return image.getpixel(at)


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    Image.new("RGB", (8, 8), (250, 10, 10)).convert("CMYK").save(tmp_path / "a.jpg")
    red, green, blue = pixel(tmp_path / "a.jpg")
    assert red > 230
    assert max(green, blue) < 40


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path, suffix):
    Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16)).save(tmp_path / f"a.{suffix}")
    image = decode(str(tmp_path / f"a.{suffix}"))
    assert [image.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_sixteen_bit_pgm_is_scaled(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535\n" + np.array([32896, 65535], ">u2").tobytes())
    assert pixel(tmp_path / "a.pgm") == (128, 128, 128)


def test_floats_of_zero_to_one_fill_the_range_and_others_are_stretched(tmp_path):
    Image.fromarray(np.array([[0.0, 0.2]], np.float32)).save(tmp_path / "a.tif")
    assert pixel(tmp_path / "a.tif", (1, 0)) == (51, 51, 51)
    Image.fromarray(np.array([[-300.0, 300.0]], np.float32)).save(tmp_path / "b.tif")
    assert [pixel(tmp_path / "b.tif", (x, 0))[0] for x in (0, 1)] == [0, 255]


@pytest.mark.parametrize("mode", ["1", "L"])
def test_gray_and_bilevel_become_rgb(tmp_path, mode):
    Image.new(mode, (3, 3), 255).save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == (255, 255, 255)


def test_palette_becomes_its_colors(tmp_path):
    for suffix in ("png", "gif"):
        Image.new("RGB", (4, 4), (10, 200, 30)).quantize(4).save(tmp_path / f"a.{suffix}")
        assert pixel(tmp_path / f"a.{suffix}") == (10, 200, 30)


def test_transparency_is_laid_over_white(tmp_path):
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (2, 2), (200, 0, 0, 255)).save(tmp_path / "solid.png")
    Image.new("LA", (2, 2), (0, 127)).save(tmp_path / "half.png")
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert pixel(tmp_path / "clear.png") == (255, 255, 255)
    assert pixel(tmp_path / "solid.png") == (200, 0, 0)
    assert pixel(tmp_path / "half.png") == (128, 128, 128)
    assert pixel(tmp_path / "palette.png") == (255, 255, 255)


def test_image_of_one_pixel_is_read(tmp_path):
    Image.new("RGB", (1, 1), (200, 30, 60)).save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == (200, 30, 60)


def test_exif_orientation_is_ignored(tmp_path):
    image, exif = Image.new("RGB", (6, 4)), Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif)
    assert decode(str(tmp_path / "a.jpg")).size == (6, 4)


@pytest.mark.parametrize(("width", "height"), [(400, 300), (401, 303), (17, 9)])
@pytest.mark.parametrize("divisor", [1, 2, 4, 8])
def test_a_jpeg_is_decoded_at_the_share_of_its_size_that_is_asked_for(tmp_path, width, height, divisor):
    gradient = np.linspace(0, 255, width * height * 3).reshape(height, width, 3).astype(np.uint8)
    Image.fromarray(gradient).save(tmp_path / "a.jpg", quality=95)
    opened = Flat(root=str(tmp_path), image_size=8).open(0)
    assert opened.size == (width, height)
    small = opened.decode(divisor)
    assert small.size == (-(-width // divisor), -(-height // divisor))
    if min(width, height) > 80:
        again = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), float)
        assert np.abs(again - np.asarray(decode(str(tmp_path / "a.jpg")), float)).mean() < 3


def test_other_formats_are_decoded_whole(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    assert Flat(root=str(tmp_path), image_size=8).open(0).decode(4).size == (40, 30)


@pytest.mark.parametrize("divisor", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(1, 1), (3, 4), (4, 7), (8, 8), (33, 17), (250, 187)])
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"mode": "L"}, {"mode": "CMYK"}]
)
def test_a_jpeg_has_the_pixels_that_pil_makes_of_it(tmp_path, size, divisor, options):
    noise = np.random.default_rng(0).integers(0, 255, (size[1] // 4 + 1, size[0] // 4 + 1, 3), np.uint8)
    image = Image.fromarray(noise).resize(size).convert(options.pop("mode", "RGB"))
    image.save(tmp_path / "a.jpg", quality=90, **options)
    with Image.open(tmp_path / "a.jpg") as expected:
        expected.draft(None, (max(1, size[0] // divisor), max(1, size[1] // divisor)))
        opened = open_file(str(tmp_path / "a.jpg"))
        assert opened.size == size
        assert np.array_equal(np.asarray(opened.decode(divisor)), np.asarray(expected.convert("RGB")))


def test_a_jpeg_with_bytes_that_only_libjpeg_minds_is_read_and_a_cut_one_is_not(tmp_path):
    Image.new("RGB", (40, 30), (10, 200, 30)).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    end = content.rindex(b"\xff\xd9")
    minded = Encoded(content[:end] + bytes(40) + content[end:], "a.jpg")
    with pytest.raises(ValueError, match="xtraneous"):
        decode_jpeg(minded.content, minded.size, 1)
    assert np.array_equal(np.asarray(minded.decode()), np.asarray(decode(str(tmp_path / "a.jpg"))))
    with pytest.raises(BadImage, match=r"(?i)truncated"):
        Encoded(content[: end // 2], "a.jpg").decode()


def test_a_jpeg_larger_than_pil_allows_is_left_to_pil(tmp_path, monkeypatch):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(BadImage, match="bomb"):
        open_file(str(tmp_path / "a.jpg"))


def test_crops_of_pixels_are_those_of_pil():
    values = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    image, pixels = Image.fromarray(values), Pixels(values)
    assert (pixels.size, pixels.width, pixels.height) == ((30, 20), 30, 20)
    box = (3, 5, 23, 17)
    assert np.array_equal(np.asarray(pixels.crop(box)), np.asarray(image.crop(box)))
    resized = [picture.crop(box).resize((9, 7), Image.Resampling.BILINEAR) for picture in (pixels, image)]
    assert np.array_equal(*map(np.asarray, resized))
