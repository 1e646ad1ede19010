"""docs/map.md: what the parts of the package are for, and who imports whom, from the imports."""

from __future__ import annotations

import ast

from tests.imports import PACKAGE, edges, listed_floors
from tests.paths import ROOT

SCRIPTS = {
    "tools": "Command lines, a file a command.",
    "benchmarks": "One script a question, each compares side by side.",
    "examples": "The quickstart and its summary, steps of a run by preset, evaluation.",
    "pretrain_trinity": "The entry point of training.",
}
"""What is no part of the package, and has no docstring to tell of itself."""


def map_page() -> str:
    """The page."""
    drawn = [name for floor in listed_floors() for name in floor]
    imports = edges()
    rows = "\n".join(
        f"| `{name}` | {_purpose(name)} | {_names(drawn, imports[name])} |" for name in drawn
    )
    return f"""# A map of the package

An arrow goes from who imports to what is imported, always downwards; where another way leads there
as well, it is left out, and the table has it. Printed by `python -m tests.pages` from the imports
of every file; `tests/unit_tests/test_floors.py` fails where one goes up.
[Developing](developing.md#order-of-imports) lists the floors.

```mermaid
flowchart TD
{_flowchart(drawn, imports)}
```

| part | is | imports |
|---|---|---|
{rows}

`presets/` holds YAML alone. `tests/` mirrors the package: what `megatron_trinity/moe/router.py`
does is held by `tests/unit_tests/moe/test_router.py`. `tests/distributed/` runs ranks over gloo,
`tests/clients/` other libraries, `tests/transformer_engine/` its modules on a CPU,
`tests/cuda_start/` a start on ranks that report a GPU, `tests/gpu/` is for a GPU, `tests/slurm/`
runs jobs on stand-ins, `tests/guide/` reads this guide.
"""


def reduced(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """The imports without those that follow from others (a transitive reduction)."""
    return {
        name: {
            one
            for one in found
            if not any(one in _below(other, imports) for other in found - {one})
        }
        for name, found in imports.items()
    }


def _below(name: str, imports: dict[str, set[str]]) -> set[str]:
    """Everything that `name` imports, itself or by others."""
    return imports[name].union(*(_below(other, imports) for other in imports[name]))


def _flowchart(drawn: list[str], imports: dict[str, set[str]]) -> str:
    arrows = reduced(imports)
    return "\n".join(
        f"  {name} --> {other}" for name in drawn for other in drawn if other in arrows[name]
    )


def _purpose(name: str) -> str:
    if name in SCRIPTS:
        return SCRIPTS[name]
    path = ROOT / PACKAGE / name
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    return docstring.partition("\n\n")[0].replace("\n", " ")


def _names(drawn: list[str], names: set[str]) -> str:
    return ", ".join(f"`{name}`" for name in drawn if name in names)
