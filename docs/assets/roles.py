"""Griffe extension: roles in docstrings, :func:`x` and the like, as links of the site; as code where no page shows x."""

import re
from pathlib import Path

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([\w.]+)`")
PAGES = Path(__file__).parent.parent / "reference"
SHOWN = [
    name
    for page in sorted(PAGES.glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]
BY_LAST = {name.rpartition(".")[2]: name for name in reversed(SHOWN)}


def _target(name, owner):
    """The anchor of a name, said in full, by its last part, by class and member, or as a member of ``owner``; or None."""
    if name in SHOWN:
        return name
    if name in BY_LAST:
        return BY_LAST[name]
    scope, _, last = name.rpartition(".")
    within = scope.rpartition(".")[2] if scope else owner.name if owner is not None else ""
    if within not in BY_LAST or owner is None or owner.name != within or last not in owner.members:
        return None
    return f"{BY_LAST[within]}.{last}" if owner.members[last].has_docstring else None  # pages show no others


class Roles(griffe.Extension):
    """Rewrites the docstring of every object, once all of them are known."""

    def on_object(self, *, obj, loader, **kwargs):
        """Replace the roles of one docstring."""
        if obj.docstring is None:
            return
        owner = obj if obj.is_class else obj.parent if obj.parent is not None and obj.parent.is_class else None

        def link(role):
            target = _target(role[1], owner)
            return f"`{role[1]}`" if target is None else f"[`{role[1]}`][{target}]"

        obj.docstring.value = ROLE.sub(link, obj.docstring.value)
