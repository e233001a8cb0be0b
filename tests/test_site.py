"""The documentation's pages: every function is there with its signature, and every notebook. Needs extra `docs`."""

import html
import inspect
import re

import pytest

import jce

EXTRA = "needs the extra 'docs'"
pytest.importorskip("pdoc", reason=EXTRA)
pytest.importorskip("nbconvert", reason=EXTRA)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_pages(tmp_path):
    from bench import site

    index, functions, *notebooks = site.build(tmp_path)
    text = functions.read_text(encoding="utf-8")
    for name in jce.__all__:
        (section,) = re.findall(rf'<section id="{name}">(.*?)</section>', text, re.DOTALL)
        words = html.unescape(re.sub(r"<[^>]+>", "", section))
        function = getattr(jce, name)
        first = inspect.getdoc(function).replace("`", "")[:25]
        signature, found, _ = words.partition(first)
        assert found, name
        assert re.search(rf"(?:def|class)\s+{name}\b", signature)
        if inspect.isfunction(function):
            assert all(parameter in signature for parameter in inspect.signature(function).parameters), name
    assert len(notebooks) == 8
    for page in notebooks:
        assert "data:image/png;base64," in page.read_text(encoding="utf-8")
        assert f'href="{page.name}"' in index.read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_help_is_no_folder(tmp_path, monkeypatch, capsys):
    from bench import site

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["bench.site", "--help"])
    with pytest.raises(SystemExit, match="0"):
        site.main()
    assert capsys.readouterr().out.startswith("usage: python -m bench.site [-h] [FOLDER]")
    assert list(tmp_path.iterdir()) == []
