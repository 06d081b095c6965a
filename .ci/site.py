"""What the site takes from outside of docs/: pages link to files as they lie in the repository."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pymdownx.highlight import Highlight

ROOT = Path(__file__).parent.parent
# mkdocstrings 1.0.6 leaves out the Markdown that pymdown-extensions 12.3 wants for titles; its code
# has none.
Highlight.__init__.__defaults__ = (None, *Highlight.__init__.__defaults__)

LOOP = "<!-- the loop of README -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the records with their pictures, and the changelog."""
    outside = {f"results/{path.name}": path for path in (ROOT / "benchmarks/results").iterdir()}
    for uri, path in {"changelog.md": ROOT / "CHANGELOG.md", **outside}.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Show what commands need; point to what was added; of other files only the text is left."""
    if LOOP in markdown:
        code = re.search(r"```python\n.*?```", (ROOT / "README.md").read_text(), re.DOTALL)
        markdown = markdown.replace(LOOP, code[0])
    markdown = re.sub(r"<!-- (needs [^>]+) -->\n```sh", r'```sh title="\1"', markdown)
    markdown = markdown.replace("](docs/", "](")
    markdown = markdown.replace("](../benchmarks/results/", "](results/")
    return re.sub(r"\[([^]]+)\]\(\.\./[^)]+\)", r"\1", markdown)


def on_page_content(html: str, **_: object) -> str:
    """Sphinx's roles in docstrings are only code here."""
    return re.sub(r":(?:class|func|meth|attr|data|mod|exc):(?=<code>)", "", html)
