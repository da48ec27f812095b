"""Build hook: on every page the first use of a glossary word leads to its entry."""

import re
from html import escape
from posixpath import relpath

ENTRY = re.compile(
    r'^\*\*(?P<name>[^*]+)\.\*\* (?P<text>.+?)\n\{ #(?P<id>[\w-]+) data-words="(?P<words>[^"]+)" \}$', re.M | re.S
)
TOKEN = re.compile(r"(<!--.*?-->|<[^>]*>)", re.S)
TAG = re.compile(r"<(/?)(\w+)")
PROSE = {"p", "li", "dd", "td"}  # only what stands in one of these
NOT_IN = {
    "a",
    "code",
    "pre",
    "svg",
    "figure",
    "script",
    "style",
    "button",
    "summary",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
}
PAGE = "glossary.md"
LEFT_OUT = ("reference/", PAGE, "changelog.md")


def entries(markdown):
    """What stands in the glossary, by id: the first sentence, and the words that lead to it.

    Raises:
        ValueError: a paragraph in bold that is no entry, or a word of two entries.
    """
    found = {entry["id"]: entry for entry in ENTRY.finditer(markdown)}
    if len(found) != len(re.findall(r"^\*\*", markdown, re.M)):
        raise ValueError("glossary: an entry is '**Name.** text', then '{ #id data-words=\"one|two\" }' on a line")
    words = [word for entry in found.values() for word in entry["words"].split("|")]
    if twice := {word for word in words if words.count(word) > 1}:
        raise ValueError(f"glossary: two entries claim {sorted(twice)}")
    return {
        key: (re.split(r"(?<=\.)\s", " ".join(entry["text"].split()))[0], entry["words"].split("|"))
        for key, entry in found.items()
    }


def linked(html, glossary, address):
    """HTML whose first use of each word links to ``address#id``."""
    ids = {word.lower(): key for key, (_, words) in glossary.items() for word in words}
    longest = sorted((word for _, words in glossary.values() for word in words), key=len, reverse=True)
    # A word with capitals is a name and is found as written; any other may also begin a sentence.
    forms = [re.escape(w) if w != w.lower() else f"(?i:{w[0]}){re.escape(w[1:])}" for w in longest]
    pattern = re.compile(r"(?<![\w-])(?:" + "|".join(forms).replace(r"\ ", r"\s") + r")(?![\w-])")
    told, prose, out, mathematics = set(), 0, 0, False

    def link(match):
        key = ids[" ".join(match[0].lower().split())]
        if key in told:
            return match[0]
        told.add(key)
        title = "" if "\\(" in glossary[key][0] else f' title="{escape(re.sub("[*`]", "", glossary[key][0]))}"'
        return f'<a class="term" href="{address}#{key}"{title}>{match[0]}</a>'

    parts = TOKEN.split(html)
    for place, part in enumerate(parts):
        if tag := TAG.match(part):
            step = -1 if tag[1] else 1
            prose += step * (tag[2] in PROSE)
            out += step * (tag[2] in NOT_IN)
            mathematics = "arithmatex" in part
        elif prose and not out and not mathematics and not part.startswith("<"):
            parts[place] = pattern.sub(link, part)
    return "".join(parts)


def on_page_content(html, page, config, files):
    """Link the words of a page."""
    if page.file.src_uri.startswith(LEFT_OUT) or files.get_file_from_path(PAGE) is None:
        return html
    here = files.get_file_from_path(PAGE)
    address = relpath(here.dest_uri, page.file.dest_uri.rpartition("/")[0] or ".")
    return linked(html, entries(here.content_string), address)
