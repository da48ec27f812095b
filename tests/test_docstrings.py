"""Docstrings of the reference say what a caller must know: arguments, results, errors, shapes, dtypes, units, source.

What is held to the rules is what the reference pages show: every name that stands there behind ``:::``, and the methods
and properties that a class itself defines. CONTRIBUTING.md states the rules for people.
"""

import ast
import builtins
import functools
import importlib
import inspect
import re
import textwrap
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

REFERENCE = Path(__file__).parent.parent / "docs" / "reference"
SHOWN = [
    name
    for page in sorted(REFERENCE.glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]

# Names of the reference that implement no formula: they hold, move, read, write or show. Every other one cites the paper
# its formula is from, or says that it is this project's own or a definition.
NO_FORMULA = {
    "fishergeo": [
        *(
            "Confidence",
            "ConvergenceError",
            "ConvergenceWarning",
            "DenseOperator",
            "Estimate",
            "Fisher",
            "FisherHeader",
        ),
        *("LayerPlan", "LayerProducts", "Plan", "SampledOverlap", "Structure", "SumOperator", "all_reduce"),
        *("operator_from_tensors", "plan"),
        *("Influence", "Merged", "NaturalGradient", "Pruned"),
    ],
    "alignguard": [
        "DriftCallback",
        "DriftReport",
        "FitResult",
        "GuardMixin",
        "GuardSeq2SeqTrainer",
        "GuardTrainer",
        "PictureCallback",
        "fit",
        "make_guard",
    ],
    "studies.summaries": ["summarise"],
    "alignguard.guard": ["load_guard", "save_guard"],
    "alignguard.pages": ["render_drift"],
    "alignguard.data": ["DataSource", "conversation", "encode_source", "pad_rows", "shown_row"],
    "studies.bench": ["Bench"],
    "studies.ledger": ["Ledger"],
    "alignguard.training": [
        *("Prepared", "card_section", "check_complete", "honours_item_count", "latest_checkpoint", "load_fisher"),
        *("plan_text", "prepare", "write_fisher"),
    ],
    "alignguard.drift": [
        "ChatJudge",
        "ClassifierJudge",
        "DriftRow",
        "Endpoint",
        "PublishedJudge",
        "driftcheck_endpoint",
        "is_right",
    ],
    "alignguard.objective": ["supervised"],
    "studies.rivals": ["Rival", "make_rival", "sweep", "train_rival"],
    "alignguard.updates": ["Matrix", "coverage_table"],
}
WITHOUT = {f"{module}.{name}" for module, names in NO_FORMULA.items() for name in names}

SOURCE = re.compile(r"\b(1[89]|20)\d\d\b|\b\d{4}\.\d{5}\b|this project's own|[Bb]y (its )?definition|the definition")
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Warns|Examples):$", re.MULTILINE)
ENTRY = re.compile(r"^ {4}(\*{0,2}[A-Za-z][\w, ]*):(?: |$)", re.MULTILINE)
_SIZE = r"[^\s(),]{1,12}(?: ?[+·×−-] ?[^\s(),]{1,6})*"
SHAPE = re.compile(rf"\((?:{_SIZE}, ?)+(?:{_SIZE})?\)|\b[Ss]calar|\bshape\b|[Tt]he same")
DTYPE = re.compile(r"dtype|\bfloat(ing|16|32|64)?\b|[Hh]alf precision|\bbool\b|\bint64\b|[Ii]ntegers?\b")
UNITS = {  # of what an argument's name says it counts: the words of which one must stand in its entry
    r"(.*_)?seconds?(_.*)?": r"seconds?\b|time",
    r"(.*_)?bytes|limit_bytes": r"bytes",
    r"(.*_)?mb": r"MiB",
    r"(plain_)?flops": r"operations",
    r"(.*_)?every": r"steps|batches",
    r"(max_)?passes": r"pass",
    r"max_length|(max_new|capability)_tokens": r"tokens",
    r"(max_)?drift|margin_\w+|base_nll|kl|lambda_kl|predicted": r"nats|KL|alignment examples",
    r"(refresh_|kl_)?examples|batch_size|held_back": r"examples?\b|prompts|answers|\bN\b",
    r"energy|share|level|confidence|decay|averaging": r"[\[(][\d.]+, [\d.]+[\])]|share|probability|intervals?",
}


@dataclass(frozen=True)
class Case:
    """A docstring and what it must account for.

    Attributes:
        label: dotted name.
        text: the docstring.
        around: of a method, its class's docstring.
        own: name -> annotation of each argument, as text.
        gives: annotation of what is returned, empty for nothing, a class or a property's owner.
        functions: whose code runs when it is called.
        method: whether it is a member of a class.
    """

    label: str
    text: str
    around: str
    own: dict[str, str]
    gives: str
    functions: tuple[types.FunctionType, ...]
    method: bool

    @functools.cached_property
    def parts(self):
        """The sections of the docstring, the opening under the empty name."""
        parts = SECTION.split(self.text)
        return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}

    def entries(self, *names):
        """Name -> text of the entries of some sections; ``a, b: text`` documents both."""
        found = {}
        for section in names:
            parts = ENTRY.split("\n" + self.parts.get(section, ""))
            for several, text in zip(parts[1::2], parts[2::2], strict=True):
                found |= {name.strip().lstrip("*"): text for name in several.split(",")}
        return found


def written(annotation):
    """An annotation as text, empty for none."""
    if annotation in (inspect.Parameter.empty, None, "None"):
        return ""
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "") + str(annotation)


def arguments(called):
    """Name -> annotation of the arguments; those that stand for any others are left out."""
    try:
        parameters = inspect.signature(called).parameters
    except ValueError:  # exceptions without a constructor of their own
        return {}
    return {
        name: written(p.annotation)
        for name, p in parameters.items()
        if name not in ("self", "cls") and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }


def function_case(label, function, around="", method=False, own=None):
    gives = written(inspect.signature(function).return_annotation)
    own = arguments(function) if own is None else own
    return Case(label, inspect.getdoc(function) or "", around, own, gives, (function,), method)


def cases_of(label, thing):
    """A case for a function; for a class its own, and one for every public member that it defines."""
    if not inspect.isclass(thing):
        yield function_case(label, thing)
        return
    text, protocol = inspect.getdoc(thing) or "", getattr(thing, "_is_protocol", False)
    made = [vars(thing).get(name) for name in ("__init__", "__post_init__")]
    made = tuple(function for function in made if isinstance(function, types.FunctionType) and not protocol)
    yield Case(label, text, "", {} if protocol else arguments(thing), "", made, False)
    for name, member in vars(thing).items():
        function = getattr(member, "fget", None) or getattr(member, "func", None) or getattr(member, "__func__", member)
        if not name.startswith("_") and isinstance(function, types.FunctionType):
            asked = isinstance(member, (types.FunctionType, classmethod, staticmethod))
            yield function_case(f"{label}.{name}", function, text, True, None if asked else {})


def resolve(dotted):
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


CASES = [case for dotted in SHOWN for case in cases_of(dotted, resolve(dotted))]


def _translates(node):
    """Whether a ``with`` of a private helper, which turns errors into others."""
    calls = [item.context_expr for item in node.items] if isinstance(node, ast.With) else []
    return any(isinstance(call, ast.Call) and getattr(call.func, "id", "").startswith("_") for call in calls)


@functools.cache
def raised(function):
    """Names of the exceptions that a function's own code raises, its module's private helpers and checkers included.

    What is raised or called where it is handled, under ``try`` or a private context manager, is passed over.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except OSError:  # what dataclasses generate
        return frozenset()
    tried = [step for node in ast.walk(tree) if isinstance(node, ast.Try) or _translates(node) for step in node.body]
    handled = {id(node) for step in tried for node in ast.walk(step)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None and id(node) not in handled:
            name = getattr(node.exc.func if isinstance(node.exc, ast.Call) else node.exc, "id", "")
            kind = function.__globals__.get(name, getattr(builtins, name, None))
            if inspect.isclass(kind) and issubclass(kind, Exception):
                found.add(name)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and id(node) not in handled:
            called = function.__globals__.get(node.func.id)
            near = node.func.id.startswith("_") and getattr(called, "__module__", "") == function.__module__
            checks = near or node.func.id.startswith("check_")
            if isinstance(called, types.FunctionType) and called is not function and checks:
                found |= raised(called)
    return frozenset(found - {"NotImplementedError", "AssertionError", "StopIteration"})


def docstring(case):
    """There is one."""
    return [] if case.text.strip() else ["docstring"]


def argument(case):
    """Each argument has an entry in Args or Attributes; a method's may stand in its text or its class's. No other has."""
    known, near = case.entries("Attributes", "Args"), case.text + case.around if case.method else ""
    gaps = [name for name in case.own if name not in known and not re.search(rf"\b{name}\b", near)]
    real = {name for function in case.functions for name in inspect.signature(function).parameters}
    return gaps + [f"no such argument: {name}" for name in case.entries("Args") if real and name not in real]


def result(case):
    """A function has a section Returns; a method may say it in its opening."""
    return ["Returns"] if case.gives and not case.method and "Returns" not in case.parts else []


def error(case):
    """Every error that the code raises is named."""
    said = case.parts.get("Raises", "") + case.parts.get("Warns", "")
    kinds = set().union(*map(raised, case.functions))
    return sorted(kind for kind in kinds if not re.search(rf"\b{kind}\b", said))


def shape_and_dtype(case):
    """Every tensor has a shape, in its entry, in Returns or in the opening, and the docstring or the class's a dtype."""
    known, everywhere = case.entries("Attributes", "Args"), case.text + case.around
    tensors = [name for name, annotation in case.own.items() if "Tensor" in annotation]
    gaps = [f"shape of {name}" for name in tensors if not SHAPE.search(known.get(name, everywhere))]
    if "Tensor" in case.gives and not SHAPE.search(case.parts.get("Returns", case.parts[""])):
        gaps.append("shape of what is returned")
    if (tensors or "Tensor" in case.gives) and not DTYPE.search(everywhere):
        gaps.append("dtype")
    return gaps


def unit(case):
    """What counts something says what."""
    return [
        f"unit of {name}"
        for name, entry in case.entries("Attributes", "Args").items()
        for pattern, words in UNITS.items()
        if re.fullmatch(pattern, name) and not re.search(words, entry)
    ]


def source(case):
    """A formula has one."""
    said = "".join(part for name, part in case.parts.items() if name != "Examples")
    return [] if case.method or case.label in WITHOUT or SOURCE.search(said) else ["source"]


RULES = [docstring, argument, result, error, shape_and_dtype, unit, source]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_reference_keeps_the_rule(rule):
    lacking = [f"{case.label}: {', '.join(gaps)}" for case in CASES if (gaps := rule(case))]
    if lacking:
        pytest.fail(f"{rule.__doc__}\n" + "\n".join(lacking), pytrace=False)


def test_the_list_of_names_without_a_formula_is_up_to_date():
    assert not sorted(WITHOUT - set(SHOWN))


def _check_positive(value):
    if value < 0:
        raise ValueError("negative")


def poor(matrix: torch.Tensor, max_length: int) -> torch.Tensor:
    """Does something.

    Args:
        matrix: to be turned.
        max_length: how long.
        gone: an argument of yesterday.
    """
    _check_positive(max_length)
    if matrix.ndim != 2:
        raise TypeError("not a matrix")
    return matrix


def silent(matrix: torch.Tensor) -> torch.Tensor: ...


def test_each_rule_finds_its_gaps():
    (case,) = cases_of("poor", poor)
    found = {rule.__name__: rule(case) for rule in RULES}
    assert found == {
        "docstring": [],
        "argument": ["no such argument: gone"],
        "result": ["Returns"],
        "error": ["TypeError", "ValueError"],
        "shape_and_dtype": ["shape of matrix", "shape of what is returned", "dtype"],
        "unit": ["unit of max_length"],
        "source": ["source"],
    }
    (case,) = cases_of("silent", silent)
    assert docstring(case) == ["docstring"] and argument(case) == ["matrix"]
