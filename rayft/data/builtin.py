"""The corpora that need no download: `builtin:pydocs`, `builtin:docstrings`, `builtin:arith`.

All are made when asked for, from what every Python carries, by reading files; no module of the
standard library is imported for its text (only `pydoc_data.topics`, one dict of strings).

- pydocs      {"text"}                            language reference topics and library source
- docstrings  {"prompt", "completion"}            a signature -> first sentence of its docstring
- arith       {"prompt", "completion", "answer"}  small problems; `answer` alone decides

Splits are drawn by a CRC of a name, never by position, so they do not move when a file is added.
Every top-level module belongs to exactly one of three groups; a package is never cut in two:

    group       about   pydocs    docstrings
    train       84 %    train     train
    text         7 %    heldout   -
    pairs        9 %    -         heldout

`_pydecimal`, `_decimal` and `decimal` count as one name. The text differs a little between Python
versions; the group of a module does not. Left out: docstrings of C modules, tests, code tables,
and modules that many installations lack (tkinter, idlelib, lib2to3, distutils, ensurepip).
"""

import ast
import difflib
import functools
import inspect
import itertools
import random
import re
import sysconfig
import textwrap
import tokenize
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

NAMES = ("pydocs", "docstrings", "arith")
SPLITS = ("train", "heldout")

_ROW_CHARACTERS = 640  # longest pydocs row; about 200 tokens of builtin:tiny
_SKIPPED_PARTS = {
    *("site-packages", "dist-packages", "lib-dynload", "pydoc_data", "test", "tests", "idle_test"),
    *("tkinter", "turtledemo", "idlelib", "lib2to3", "distutils", "ensurepip"),
    *("this", "antigravity", "encodings", "stringprep"),
}
_TWINS = {"ntpath": "posixpath"}  # near copies under another name go to the same group
_SIGNATURE_CHARACTERS = 200  # longer signatures make no pair
_SENTENCE_CHARACTERS = range(12, 201)  # length of a completion
_SENTENCE = re.compile(r".+?(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)[.!?](?=\s|$)")
_SIGNATURE_LIKE = re.compile(r"^[\w.]+\s*\(|->|^\W|^:|>>>")
_ARITH_HELDOUT_PERCENT = 10

Row = dict[str, str]


def rows(name: str, split: str, seed: int = 0, samples: int | None = None) -> Iterator[Row]:
    """Yield the rows of one split in an order fixed by `seed`.

    Args:
        name: one of `NAMES`, without the `builtin:` prefix.
        split: one of `SPLITS`.
        seed: order of the rows. The set of rows of a split does not depend on it.
        samples: at most this many rows, counted after ordering; None gives the whole split.

    Returns:
        Iterator of dicts with str keys and str values; the keys are listed at the top of this file.

    Raises:
        ValueError: unknown name or split (with the nearest valid one), or negative `samples`.
        FileNotFoundError: this Python has no standard-library source files to read.
    """
    _require(name, NAMES, "builtin corpus")
    _require(split, SPLITS, f"split of builtin:{name}")
    if samples is not None and samples < 0:
        raise ValueError(f"samples must be 0 or more, got {samples}")
    made = list(_MAKERS[name](split))
    if name == "arith":
        made = _interleaved(made, random.Random(seed))
    else:
        random.Random(seed).shuffle(made)
    return iter(made[:samples])


def _require(value: str, allowed: tuple[str, ...], what: str) -> None:
    if value not in allowed:
        nearest = difflib.get_close_matches(value, allowed, n=1, cutoff=0.0)[0]
        known = ", ".join(allowed)
        raise ValueError(f"no {what} {value!r}; did you mean {nearest!r}? (known: {known})")


# --- the standard library, as files ---


def _percentile(text: str) -> int:
    """A number in 0..99 that depends on the text alone, equal on every machine."""
    return zlib.crc32(text.encode("utf-8")) % 100


def _group(module: str) -> str:
    """train, text or pairs: see the table at the top. `module` is a dotted name."""
    top = module.split(".")[0].lstrip("_").removeprefix("py") or module
    place = _percentile(_TWINS.get(top, top))
    if place < 9:
        return "pairs"
    return "text" if place < 16 else "train"


@functools.cache
def _modules() -> tuple[tuple[str, Path], ...]:
    """(dotted name, path) of every standard-library source file that is used, by name."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        generated = parts[0].startswith(("_sysconfigdata", "config-"))
        if not generated and _SKIPPED_PARTS.isdisjoint(parts):
            found.append((".".join(parts).removesuffix(".__init__"), path))
    if not found:
        raise FileNotFoundError(f"no standard-library source (.py files) under {root}")
    return tuple(sorted(found))


def _source(path: Path) -> str:
    with tokenize.open(path) as file:  # honours the encoding line
        return file.read()


# --- pydocs ---


def _pydocs(split: str) -> Iterator[Row]:
    from pydoc_data.topics import topics

    wanted = {"train": "train", "heldout": "text"}[split]
    for topic, text in sorted(topics.items()):
        heldout = _percentile(f"topic {topic}") < 7
        if heldout == (split == "heldout"):
            yield from ({"text": piece} for piece in _pieces(text))
    for module, path in _modules():
        if _group(module) == wanted:
            yield from ({"text": piece} for piece in _pieces(_source(path)))


def _pieces(text: str) -> Iterator[str]:
    """Cut at blank lines into pieces of at most `_ROW_CHARACTERS`, margins removed."""
    piece = ""
    for block in _blocks(text):
        if piece and len(piece) + len(block) + 2 > _ROW_CHARACTERS:
            yield _trimmed(piece)
            piece = ""
        piece = f"{piece}\n\n{block}" if piece else block
    if piece.strip():
        yield _trimmed(piece)


def _blocks(text: str) -> Iterator[str]:
    """Paragraphs; too long ones are cut at line ends, too long lines are dropped."""
    for paragraph in re.split(r"\n\s*\n", text.replace("\f", "")):
        block = ""
        for line in paragraph.rstrip().split("\n"):
            if len(line) > _ROW_CHARACTERS:
                continue
            if block and len(block) + len(line) + 1 > _ROW_CHARACTERS:
                yield block
                block = ""
            block = f"{block}\n{line}" if block else line
        if block.strip():
            yield block


def _trimmed(piece: str) -> str:
    return textwrap.dedent(piece).strip("\n").rstrip()


# --- docstrings ---


def _docstrings(split: str) -> Iterator[Row]:
    wanted = {"train": "train", "heldout": "pairs"}[split]
    seen = set()
    for module, path in _modules():
        if _group(module) != wanted:
            continue
        for pair in _pairs(module, ast.parse(_source(path)), ""):
            if pair["prompt"] not in seen:
                seen.add(pair["prompt"])
                yield pair


def _pairs(module: str, scope: ast.AST, prefix: str) -> Iterator[Row]:
    """The pairs of one scope and of the classes in it; functions inside functions are left out."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.If | ast.Try | ast.With):  # definitions that depend on the platform
            yield from _pairs(module, node, prefix)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = prefix + node.name
            sentence, signature = _first_sentence(node), _signature(node, name)
            if sentence and len(signature) <= _SIGNATURE_CHARACTERS:
                kind = _kind(node, prefix)
                question = f"What does this {kind} of the module {module} do?\n{signature}"
                yield {"prompt": question, "completion": sentence}
            if isinstance(node, ast.ClassDef):
                yield from _pairs(module, node, f"{name}.")


def _kind(node: ast.AST, prefix: str) -> str:
    if isinstance(node, ast.ClassDef):
        return "class"
    return "method" if prefix else "function"


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    start = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{start} {name}({ast.unparse(node.args)}){returns}"


def _first_sentence(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str | None:
    """The first sentence on one line; None where the docstring does not open with one."""
    text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
    paragraph = " ".join(text.split("\n\n")[0].split())
    match = _SENTENCE.match(paragraph)
    sentence = match.group() if match else paragraph
    if len(sentence) not in _SENTENCE_CHARACTERS or _SIGNATURE_LIKE.search(sentence):
        return None
    return sentence


# --- arith ---


def _arith(split: str) -> Iterator[Row]:
    """Every problem of the split, kind by kind. A problem is in one split, by its own text."""
    for kind in (_additions, _subtractions, _products, _largest, _sequences):
        for prompt, completion, answer in kind():
            heldout = _percentile(prompt) < _ARITH_HELDOUT_PERCENT
            if heldout == (split == "heldout"):
                yield {"prompt": prompt, "completion": completion, "answer": str(answer)}


def _additions() -> Iterator[tuple[str, str, int]]:
    for a, b in itertools.product(range(100), repeat=2):
        yield f"What is {a} + {b}?", f"{a} + {b} = {a + b}", a + b


def _subtractions() -> Iterator[tuple[str, str, int]]:
    for a, b in itertools.combinations_with_replacement(range(99, -1, -1), 2):
        yield f"What is {a} - {b}?", f"{a} - {b} = {a - b}", a - b


def _products() -> Iterator[tuple[str, str, int]]:
    for a, b in itertools.product(range(2, 100), range(2, 10)):
        yield f"What is {a} * {b}?", f"{a} * {b} = {a * b}", a * b


def _largest() -> Iterator[tuple[str, str, int]]:
    for a, b in itertools.permutations(range(100), 2):
        yield f"Which is larger, {a} or {b}?", f"{max(a, b)} is larger.", max(a, b)


def _sequences() -> Iterator[tuple[str, str, int]]:
    for start, step in itertools.product(range(100), range(1, 13)):
        shown = ", ".join(str(start + step * place) for place in range(4))
        following = start + 4 * step
        yield f"What comes next: {shown}?", f"The next number is {following}.", following


def _interleaved(made: list[Row], order: random.Random) -> list[Row]:
    """Shuffle within each kind, then take one of each in turn: a short run sees all."""
    kinds: dict[str, list[Row]] = {}
    for row in made:
        kinds.setdefault(re.sub(r"\d+", "", row["prompt"]), []).append(row)
    for members in kinds.values():
        order.shuffle(members)
    turns = itertools.zip_longest(*kinds.values())
    return [row for turn in turns for row in turn if row is not None]


_MAKERS: dict[str, Callable[[str], Iterator[Row]]] = {
    "pydocs": _pydocs,
    "docstrings": _docstrings,
    "arith": _arith,
}
