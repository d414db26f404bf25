"""What the site shows beside the files of docs/.

The site's first page is README.md. CONTRIBUTING.md, CHANGELOG.md, the notebooks and the kept results are pages too.
Each file is read from its place in the repository, so that it is there once. Links between files are those that work
in the repository; `on_page_markdown` turns them into links of the site. A file that is no page is linked to at the
repository's public address.
"""

import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
ADDRESS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def pages() -> dict[str, str]:
    """Returns the path within the site's sources of each file that is shown, by its path within the repository."""
    found = {"README.md": "index.md", "CONTRIBUTING.md": "conventions.md", "CHANGELOG.md": "changelog.md"}
    for pattern in ("*.md", "api/*.md"):
        found |= {f"docs/{path}": path for path in _paths(ROOT / "docs", pattern)}
    found |= {f"notebooks/{path}": f"notebooks/{path}" for path in _paths(ROOT / "notebooks", "*.ipynb")}
    for pattern in ("*/report.md", "*/*.png"):
        found |= {
            f"experiments/results/{path}": f"results/{path}" for path in _paths(ROOT / "experiments/results", pattern)
        }
    return found


# Before the plugin of the notebooks looks for them.
@event_priority(100)
def on_files(files: Any, config: Any) -> Any:
    """Adds the files that lie outside docs/."""
    for source, uri in pages().items():
        if source == uri:  # the notebooks, whose plugin wants a file with a folder
            files.append(File(uri, str(ROOT), config.site_dir, config.use_directory_urls))
        elif not source.startswith("docs/"):
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turns the repository's links into the site's, and keeps `65.5 ± 1.2 %` on one line."""
    uris = pages()
    sources = {uri: source for source, uri in uris.items()}
    folder = posixpath.dirname(sources[page.file.src_uri])
    here = posixpath.dirname(page.file.src_uri)

    def link(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match["path"]))
        if path in uris:
            return f"]({posixpath.relpath(uris[path], here or '.')}{match['anchor'] or ''})"
        if (ROOT / path).exists():
            return f"]({ADDRESS}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}{match['anchor'] or ''})"
        return match[0]

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)  # prose and code in turn
    parts[::2] = [re.sub(r"(?<=\d) [±%](?: (?=\d))?", _on_one_line, part) for part in parts[::2]]
    markdown = "".join(parts)
    return re.sub(r"\]\((?!\w+:)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)", link, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Puts words in the place of Colab's badge, which a reader's browser would fetch from elsewhere."""
    return re.sub(r'<img[^>]*colab-badge.svg"[^>]*>', "Open in Colab", html)


def _on_one_line(match: re.Match[str]) -> str:
    """What was found, with spaces that do not break."""
    return match[0].replace(" ", "\N{NO-BREAK SPACE}")


def _paths(folder: Path, pattern: str) -> list[str]:
    """The files of a folder that a pattern finds, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern))
