import numpy as np
import pytest
from PIL import Image

from drconv_jax.viz import save_guide_masks


def drawn(path, titles, layer="a/dr_conv"):
    images = np.linspace(0, 1, len(titles) * 48).reshape(len(titles), 4, 4, 3)
    index = np.arange(len(titles) * 4).reshape(len(titles), 2, 2) % 3
    save_guide_masks(path, images, {layer: index}, 3, titles)
    with Image.open(path) as picture:
        return np.asarray(picture.convert("L"))


@pytest.mark.parametrize(
    "name",
    [
        r"$\frac{$",
        "5$ to 10$",
        "a_b^{",
        "\\alpha",
        "\n\t",
        "\x00",
        "\udc80",
        "",
        "日本語 🙂",
        "عربي",
        "x" * 1000,
    ],
)
def test_a_name_is_drawn_as_it_stands(name, tmp_path):
    assert drawn(tmp_path / "masks.png", ["cat", name], layer=f"block/{name}").min() < 255


def test_what_is_between_dollars_is_no_formula(tmp_path):
    """Two names that would be one formula, if they were formulas, are drawn as two."""
    one, other = (drawn(tmp_path / "masks.png", [name]) for name in ("$x$", "$x{}$"))
    assert one.shape != other.shape or (one != other).any()
