"""mkdocs hooks: formulas become MathML, diagrams a part of the page, and links out of docs/ lead to GitHub.

Browsers draw MathML themselves, so pages with formulas need no JavaScript and work offline. A diagram inside
the page follows its light or dark palette.
"""

import html
import pathlib
import posixpath
import re

from latex2mathml.converter import convert

FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\s*\\[(\[](?P<latex>.*?)\\[)\]]\s*</(?P=tag)>', re.DOTALL
)
LINK = re.compile(r"(?<=\]\()(?P<path>(?:\.\./)+[^)\s#]*)(?P<anchor>#[^)\s]*)?(?=\))")
DIAGRAM = re.compile(r'<img [^>]*src="[^"]*assets/(?P<name>[\w-]+\.svg)"[^>]*>')
ASSETS = pathlib.Path(__file__).parent / "assets"


def on_page_markdown(markdown: str, page, config, **_) -> str:
    """Links that leave docs/, such as ../README.md, lead to the file on GitHub."""
    folder = posixpath.dirname(page.file.src_uri)

    def to_repository(link: re.Match) -> str:
        path = posixpath.normpath(posixpath.join("docs", folder, link["path"]))
        if path.startswith("docs/"):
            return link[0]
        return f"{config.repo_url.rstrip('/')}/blob/main/{path}{link['anchor'] or ''}"

    return LINK.sub(to_repository, markdown)


def on_page_content(page_html: str, **_) -> str:
    """Renders LaTeX to MathML, and inserts diagrams."""

    def to_mathml(formula: re.Match) -> str:
        display = "block" if formula["tag"] == "div" else "inline"
        return convert(html.unescape(formula["latex"]), display=display)

    def to_svg(image: re.Match) -> str:
        return f'<span class="diagram-box">{(ASSETS / image["name"]).read_text(encoding="utf-8")}</span>'

    return DIAGRAM.sub(to_svg, FORMULA.sub(to_mathml, page_html))
