"""Checks the links of the documentation: python docs/check_links.py [SITE].

Every relative link and #anchor in the repository's Markdown files and notebooks and, if SITE is the folder of
a built site, in its pages. Prints the broken ones, and exits with 1 if there are any. Needs no network.
"""

import html.parser
import json
import pathlib
import re
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(`+).+?\1", re.DOTALL)
LINK = re.compile(r"!?\[(?:[^\[\]]|!?\[[^\]]*\]\([^)]*\))*\]\(\s*<?([^)\s>]+)>?[^)]*\)")
HTML_LINK = re.compile(r"""<(?:img|a|source)\b[^>]*?(?:src|href)=["']([^"']+)["']""")
HEADING = re.compile(r"^#{1,6} +(.+?)(?: +#+)? *$", re.MULTILINE)


def markdown_files() -> list[pathlib.Path]:
    """Returns the Markdown files and notebooks that git knows or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md", "*.ipynb"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def markdown_text(path: pathlib.Path) -> str:
    """Returns the Markdown of a file; of a notebook, that of its Markdown cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def slug(heading: str) -> str:
    """Returns the anchor that GitHub and mkdocs give a heading."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def anchors(path: pathlib.Path) -> set[str]:
    text = FENCE.sub("", markdown_text(path))
    return {slug(heading) for heading in HEADING.findall(text)} | set(re.findall(r'id="([^"]+)"', text))


def broken_markdown_links(path: pathlib.Path) -> Iterator[str]:
    """Yields the broken links of a Markdown file or notebook."""
    text = CODE.sub("", FENCE.sub("", markdown_text(path)))
    for link in LINK.findall(text) + HTML_LINK.findall(text):
        name, _, anchor = urllib.parse.unquote(link).partition("#")
        if urllib.parse.urlparse(link).scheme:
            continue
        target = (path.parent / name).resolve() if name else path
        if name.startswith("/") or not target.exists():
            yield f"{path.relative_to(ROOT)}: {link}: no such file"
        # mkdocstrings makes the anchors of the API reference; they are checked in the site.
        is_heading = anchor and target.suffix == ".md" and not anchor.startswith("gptoss_jax.")
        if is_heading and target.exists() and anchor not in anchors(target):
            yield f"{path.relative_to(ROOT)}: {link}: no such heading"


class Page(html.parser.HTMLParser):
    """The links and the ids of an HTML page."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.ids.add(value)
            elif name in ("href", "src") and value is not None and tag != "base":
                self.links.append(value)


def broken_site_links(site: pathlib.Path) -> Iterator[str]:
    """Yields the broken links of a built site."""
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    for path, page in pages.items():
        for link in dict.fromkeys(page.links):
            url = urllib.parse.urlparse(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / urllib.parse.unquote(url.path)).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = urllib.parse.unquote(url.fragment)
            is_page = target in pages
            if not target.exists():
                yield f"{path.relative_to(site.resolve())}: {link}: no such file"
            elif is_page and anchor and anchor not in pages[target].ids and not anchor.startswith("__"):
                yield f"{path.relative_to(site.resolve())}: {link}: no such anchor"


def main(sites: list[str]) -> int:
    files = markdown_files()
    broken = [problem for path in files for problem in broken_markdown_links(path)]
    for site in sites:
        broken += broken_site_links(pathlib.Path(site))
    print(*broken, sep="\n", end="\n" if broken else "")
    print(f"{len(files)} Markdown files, {len(sites)} sites: {len(broken)} broken links")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
