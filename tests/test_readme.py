import pathlib
import re
import textwrap

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_example_runs_as_printed(capsys):
    section = README.read_text(encoding="utf-8").split("## Using it")[1]
    example = re.search(r"\n\n((?:    .*\n|\n)+)", section).group(1)
    exec(textwrap.dedent(example), {"__name__": "readme"})
    assert capsys.readouterr().out.strip() == "(8, 10)"
