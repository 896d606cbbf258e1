"""Run every code block of a Markdown page, in order: `python run_page.py PAGE`, in the folder the blocks work in.

Python blocks share one namespace; bash blocks run by themselves and stop at the first error. Blocks of other languages
(text, yaml) are shown, not run.
"""

import subprocess
import sys
from pathlib import Path

from markdown_it import MarkdownIt


def blocks_of(page: Path) -> list[tuple[str, str, int]]:
    """Language, code and line of every block that runs."""
    found = []
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        language = token.info.split()[0] if token.type == "fence" and token.info.strip() else ""
        if language in ("python", "bash"):
            found.append((language, token.content, (token.map or [0])[0] + 1))
    return found


def main(page: Path) -> None:
    namespace = {"__name__": "__main__"}
    for language, code, line in blocks_of(page):
        print(f"{page.name}:{line}", flush=True)
        if language == "bash":
            subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True)
        else:
            # Line numbers of the page in tracebacks
            exec(compile("\n" * line + code, str(page), "exec"), namespace)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
