"""Hold the prose of pages and docstrings against proselint; code, mathematics and tables are left out.

    python scripts/prose.py

Prints what is found as path:line, and fails if anything is.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "docs/**/*.md")
CODE = ("fishergeo/**/*.py", "alignguard/**/*.py", "studies/**/*.py")

# Checks that are not of use here, and why.
EXCEPTIONS = {
    "typography.symbols.curly_quotes": "straight quotes, as on a keyboard and in code",
    "typography.symbols.ellipsis": "three dots stand for what a reader fills in, in commands and signatures",
    "typography.symbols.copyright": "(c) is item c, or a cost in a formula",
    "typography.punctuation.hyperbole": "??? opens a folded answer",
    "typography.diacritical_marks": "to resume a run is no résumé",
    "misc.preferred_forms": "names of fonts and of options",
    "misc.but": "a paragraph may begin with what speaks against the one before",
    "dates_times": "no times of day are written here; p.m. is rank m of p rows",
    "spelling.consistency": "colour in prose, color in matplotlib's arguments",
    "cliches.misc.write_good": "divide and conquer is an algorithm's name",
    "needless_variants": "saliency is the word of those who prune",
}

FOUND = re.compile(r"(?:.*/)?(?P<name>\d+\.txt):(?P<line>\d+):\d+: (?P<check>[\w.]+): (?P<words>.*)")
# Of "words repeated" only words: formulas say G G and x_i x_i.
LETTERS = re.compile(r"lexical illusion in '(?!([a-z]{2,})\s+\1')")

FENCE = re.compile(r"^(\s*)(`{3,}|~{3,}).*?^\1\2`*\s*?$", re.MULTILINE | re.DOTALL)
LEFT_OUT = (
    FENCE,
    re.compile(r"\\\[.*?\\\]|\\\(.*?\\\)", re.DOTALL),
    re.compile(r"<svg.*?</svg>|<[^>]+>", re.DOTALL),
    re.compile(r"^\s*\|.*$|^\s*(?:>>>|\.\.\.).*$", re.MULTILINE),
    re.compile(r"``[^`]+``|`[^`\n]+`"),
    re.compile(r"\]\([^)]*\)|\{[^}\n]*\}"),
)


def prose(text: str) -> str:
    """Text without code, mathematics, tables and addresses; what is left keeps its line.

    Args:
        text: markdown, or a docstring.
    """
    for pattern in LEFT_OUT:
        text = pattern.sub(lambda found: "\n" * found[0].count("\n") or "X", text)
    return text


def docstrings(code: str) -> str:
    """The docstrings of a module, each on the lines where it stands.

    Args:
        code: Python.
    """
    lines = [""] * (code.count("\n") + 2)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if ast.get_docstring(node) and isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                for place, line in enumerate(str(first.value.value).split("\n")):
                    lines[first.lineno - 1 + place] = line
    return "\n".join(lines)


def findings(texts: dict[str, str]) -> list[str]:
    """What proselint says of texts, by name and line, exceptions left out.

    Args:
        texts: prose by the name that it is reported under.

    Raises:
        RuntimeError: proselint is not installed, or did not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        places = {}
        for number, (name, text) in enumerate(texts.items()):
            (Path(folder) / f"{number}.txt").write_text(text, encoding="utf-8")
            places[f"{number}.txt"] = name
        command = [str(Path(sys.executable).with_name("proselint")), "-o", "compact", "check", folder]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode not in (0, 1) or (ran.returncode and not ran.stdout):
        raise RuntimeError(f"proselint did not run: {ran.stderr.strip()}")
    said = [FOUND.match(line) for line in ran.stdout.splitlines()]
    return [
        f"{places[one['name']]}:{one['line']}: {one['check']}: {one['words']}"
        for one in said
        if one and not one["check"].startswith(tuple(EXCEPTIONS)) and not LETTERS.search(one["words"])
    ]


def main() -> int:
    """Check every page and docstring of the repository; the exit code."""
    texts = {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for g in PAGES for p in sorted(ROOT.glob(g))}
    texts |= {
        str(p.relative_to(ROOT)): docstrings(p.read_text(encoding="utf-8")) for g in CODE for p in sorted(ROOT.glob(g))
    }
    found = findings({name: prose(text) for name, text in texts.items()})
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
