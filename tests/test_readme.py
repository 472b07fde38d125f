import pathlib
import re
import textwrap
import tomllib

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_example_runs_as_printed(capsys):
    section = README.read_text(encoding="utf-8").split("## Using it")[1]
    example = re.search(r"\n\n((?:    .*\n|\n)+)", section).group(1)
    exec(textwrap.dedent(example), {"__name__": "readme"})
    assert capsys.readouterr().out.strip() == "(8, 10)"


def test_what_is_to_be_installed_can_be():
    """The package is on no index: its extras are installed from a clone, and there are such."""
    root = README.parent
    extras = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    folders = ("drconv_jax", "experiments", "docs", "launch")
    paths = [path for folder in folders for path in (root / folder).rglob("*")]
    texts = [
        path.read_text(encoding="utf-8")
        for path in [*paths, README, root / "CONTRIBUTING.md"]
        if path.suffix in (".py", ".md", ".sh", ".yaml")
    ]
    assert not any("drconv_jax[" in text for text in texts)
    named = {
        name
        for text in texts
        for some in re.findall(r"'\.\[(.*?)\]'", text)
        for name in some.split(",")
    }
    assert named <= extras.keys() and {"onnx", "tpu", "compare", "experiments"} <= named
