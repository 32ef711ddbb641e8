"""Write docs/compatibility.md from the results of ``make matrix``: what passed on which installation, and what did not.

make matrix && python benchmarks/compatibility.py
"""

from __future__ import annotations

import argparse
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SHOWN = ("torch", "torchvision", "nni", "torch-pruning", "lightning", "transformers", "numpy")
TEXT = """# Compatibility

Which installations is the whole test suite run on, and what is the result? Everything that the project depends on is
installed in each of them, with the versions of `constraints.txt`; only torch and torchvision are the row's own. A pair
of `noxfile.py` without a row was not run to an end on this state.

```bash
make matrix    # installs and runs all rows (hours); PAIRS="py313-torch2.14" runs one of them
python benchmarks/compatibility.py    # writes this page
```

{table}

{reasons}
"""


@dataclass(frozen=True)
class Result:
    """One installation's run of the suite.

    Attributes:
        python: Python's version, as ``3.11``.
        versions: The version of each package that the table shows.
        tests: How many tests ran to an end, skipped ones not counted.
        failed: The names of those that failed.
        skipped: How many skipped tests (expected failures included) gave each reason.
    """

    python: str
    versions: dict[str, str]
    tests: int
    failed: list[str]
    skipped: dict[str, int]

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read pytest's XML report, and the list of packages that lies beside it."""
        packages = dict(_packages(path.with_suffix(".txt")))
        cases = ElementTree.parse(path).getroot().findall(".//testcase")
        skipped: dict[str, int] = {}
        for note in (note for case in cases for note in case.findall("skipped")):
            reason = note.get("message", "")
            skipped[reason] = skipped.get(reason, 0) + 1
        failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
        digits = re.match(r"py3(\d+)", path.name)
        assert digits is not None, f"{path} is not named after a pair"
        return cls(
            f"3.{digits[1]}",
            {name: packages.get(name, "-") for name in SHOWN},
            len(cases) - sum(skipped.values()),
            [f"{case.get('classname')}.{case.get('name')}" for case in failed],
            skipped,
        )


def _packages(path: Path) -> Iterator[tuple[str, str]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        name, found, version = line.partition("==")
        if found:
            yield name.lower(), version.split("+")[0]


def table(results: list[Result]) -> str:
    """Return the results as a Markdown table."""
    head = ("Python", *SHOWN, "passed", "failed", "skipped")
    rows = [
        (
            result.python,
            *result.versions.values(),
            f"{result.tests - len(result.failed)}",
            f"{len(result.failed)}",
            f"{sum(result.skipped.values())}",
        )
        for result in results
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def reasons(results: list[Result]) -> str:
    """Return what failed or was skipped in each installation, and why."""
    lines = []
    for result in results:
        lines += [f"## Python {result.python}, torch {result.versions['torch']}", ""]
        lines += [f"- failed: `{name}`" for name in result.failed]
        lines += [f"- {count} skipped: {reason}" for reason, count in sorted(result.skipped.items())]
        lines += ["- nothing failed or was skipped"] * (not result.failed and not result.skipped) + [""]
    return "\n".join(lines).strip()


def main() -> None:
    """Read the results and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("build/matrix"), help="where make matrix left its results")
    parser.add_argument("--output", type=Path, default=Path("docs/compatibility.md"))
    arguments = parser.parse_args()
    found = [Result.read(path) for path in sorted(arguments.results.glob("*.xml"))]
    if not found:
        parser.error(f"{arguments.results} holds no results; run make matrix first")
    arguments.output.write_text(TEXT.format(table=table(found), reasons=reasons(found)), encoding="utf-8")


if __name__ == "__main__":
    main()
