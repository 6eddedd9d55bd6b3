"""Do the tests notice when the code is wrong? Mistakes are put into modules, one at a time, and their tests run.

    python tests/mutation.py hf_modx/losses hf_modx/evaluation --sample 300

Every mistake gets a process of its own, forked off one that has imported all libraries. Those that no test has noticed
are printed; what became of them is in MUTATION.md.
"""

import argparse
import ast
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
LIMIT = 180  # seconds for the tests of one mistake: what never ends is noticed too
TESTS_OF = {
    "losses": ["test_losses.py", "test_pair_ids.py", "-k", "not train"],
    "reference": ["test_zscl.py", "-k", "distillation"],
    "contrastive_distillation": ["test_cclip.py", "-k", "info_nce or widths or found_again"],
    "anchor": ["test_index.py", "-k", "anchor"],
    "cross_phase": ["test_index.py"],
    "disorder": ["test_disorder.py"],
    "encoding": ["test_suite.py", "test_retrieval.py"],
    "matrix": ["test_matrix.py"],
    "retrieval": ["test_retrieval.py"],
    "seeds": ["test_matrix.py"],
    "evaluation": ["test_suite.py"],
}
PAIRS = "FloorDiv Div Mod Mult Pow Mult Lt LtE Gt GtE Eq NotEq Is IsNot In NotIn And Or Add Sub Mult Div BitAnd BitOr"
KINDS = [getattr(ast, name) for name in PAIRS.split()]
OTHER = dict(zip(KINDS[1::2], KINDS[::2], strict=True)) | dict(zip(KINDS[::2], KINDS[1::2], strict=True))


def mistakes(node: ast.AST) -> Iterator[tuple[str, dict]]:
    """What can be done wrong at a node: what it is called, and the fields that it changes."""
    match node:
        case ast.Compare(ops=[first, *others]) if type(first) in OTHER:
            yield "other comparison", {"ops": [OTHER[type(first)](), *others]}
        case ast.BinOp() | ast.AugAssign() | ast.BoolOp() if type(node.op) in OTHER:
            yield "other operator", {"op": OTHER[type(node.op)]()}
        case ast.UnaryOp(op=ast.USub()):
            yield "other sign", {"op": ast.UAdd()}
        case ast.Constant(value=bool()):
            yield f"not {node.value}", {"value": not node.value}
        case ast.Constant(value=int() | float()):
            yield f"one more than {node.value}", {"value": node.value + 1}
        case ast.Call(keywords=[_, *_]):
            for number, keyword in enumerate(node.keywords):
                if keyword.arg:
                    yield f"without {keyword.arg}=", {"keywords": node.keywords[:number] + node.keywords[number + 1 :]}
        case ast.If() | ast.IfExp() | ast.While():
            yield "other condition", {"test": ast.UnaryOp(ast.Not(), node.test)}
        case ast.Return(value=ast.expr()):
            yield "returns None", {"value": ast.Constant(None)}
    for name in ("body", "orelse"):
        block = getattr(node, name, None)
        for number, statement in enumerate(block if isinstance(block, list) else []):
            if can_be_left_out(statement):
                left = [*block[:number], ast.Pass(), *block[number + 1 :]]
                yield f"without line {statement.lineno}", {name: left}


def can_be_left_out(statement: ast.stmt) -> bool:
    """What does something else than to give a name its value, and is no docstring."""
    if isinstance(statement, ast.Assign):
        return not isinstance(statement.targets[0], ast.Name | ast.Tuple)
    docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Expr | ast.AugAssign | ast.Raise) and not docstring


def nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All but annotations, decorators and the words of messages."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list") or isinstance(node, ast.JoinedStr | ast.Raise):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from nodes(child)


def mutants(path: Path) -> Iterator[tuple[Path, str, ast.Module]]:
    """The module with each mistake, and the mistake in words."""
    source = path.read_text()
    for number, node in enumerate(nodes(ast.parse(source))):
        for what, fields in mistakes(node):
            tree = ast.parse(source)
            place = next(other for at, other in enumerate(nodes(tree)) if at == number)
            for name, value in fields.items():
                setattr(place, name, value)
            line = getattr(node, "lineno", 1)
            told = f"{path.relative_to(ROOT)}:{line}: {what}: {source.splitlines()[line - 1].strip()}"
            yield path, told, ast.fix_missing_locations(tree)


def import_libraries() -> None:
    """All that the tests import; what lies in this repository is then forgotten, to be imported with a mistake."""
    sys.path[:0] = [str(ROOT), str(TESTS)]
    for name in (
        "conftest",
        *sorted({Path(test).stem for tests in TESTS_OF.values() for test in tests if ".py" in test}),
    ):
        __import__(name)
    for name, module in list(sys.modules.items()):
        place = getattr(module, "__file__", None) or ""
        if name != "__main__" and place.startswith((str(TESTS), str(ROOT / "hf_modx"), str(ROOT / "examples"))):
            del sys.modules[name]


def start(path: Path, tree: ast.Module) -> int:
    """The number of a process that ends with 0 if no test fails."""
    if pid := os.fork():
        return pid
    os.setsid()
    signal.alarm(LIMIT)
    for output in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    as_it_is = SourceFileLoader.get_code
    SourceFileLoader.get_code = lambda loader, name: (
        compile(tree, path, "exec") if loader.path == str(path) else as_it_is(loader, name)
    )
    import pytest

    tests = TESTS_OF.get(path.stem) or TESTS_OF[path.parent.name]
    options = ["-x", "-n", "0", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    os._exit(int(pytest.main([*options, *(str(TESTS / name) if ".py" in name else name for name in tests)])))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", nargs="+", type=Path, help="modules, or folders of modules")
    parser.add_argument("--sample", type=int, help="so many mistakes, drawn from all (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    files = [file.resolve() for path in options.paths for file in (sorted(path.glob("*.py")) or [path])]
    import_libraries()
    assert os.waitpid(start(files[0], ast.parse(files[0].read_text())), 0)[1] == 0, "The tests fail without a mistake."
    everything = [mutant for file in files for mutant in mutants(file)]
    drawn = random.Random(options.seed).sample(everything, options.sample or len(everything))
    running, unnoticed, began = {}, [], time.monotonic()
    for number, (path, told, tree) in enumerate(drawn, start=1):
        running[start(path, tree)] = told
        print(f"\r{number} of {len(drawn)}", end="", file=sys.stderr)
        while len(running) == options.processes or (running and number == len(drawn)):
            pid, status = os.wait()
            told = running.pop(pid)
            if status == 0:
                unnoticed.append(told)
                print(told, flush=True)
    print(f"{len(drawn)} of {len(everything)} mistakes in {time.monotonic() - began:.0f} s: ", end="")
    print(f"{len(unnoticed)} not noticed, {1 - len(unnoticed) / len(drawn):.1%} noticed")


if __name__ == "__main__":
    main()
