"""The matrix of installations on which the suite runs: ``make matrix``; docs/compatibility.md has the results.

Each pair of torch and torchvision has a virtual environment of its own. Everything else that the project depends on is
pinned by ``constraints.txt`` in all of them. One of them alone: ``nox -s "suite(py313-torch2.14)"``; what stands behind
``--`` goes to pytest.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True

PAIRS = (
    nox.param("3.11", "2.13.0", "0.28.0", id="py311-torch2.13"),  # what constraints.txt pins
    nox.param("3.11", "2.14.1", "0.29.1", id="py311-torch2.14"),  # what a plain pip install takes today
    nox.param("3.12", "2.11.0", "0.26.0", id="py312-torch2.11"),  # what machines with a GPU often have
    nox.param("3.13", "2.14.1", "0.29.1", id="py313-torch2.14"),
    nox.param("3.10", "2.6.0", "0.21.0", id="py310-torch2.6"),  # the oldest that pyproject.toml admits
)
RESULTS = Path("build/matrix")


@nox.session
@nox.parametrize("python,torch,torchvision", PAIRS)
def suite(session: nox.Session, torch: str, torchvision: str) -> None:
    """Install one pair with everything else, and run the whole suite on it."""
    pinned = Path(session.create_tmp()) / "constraints.txt"
    lines = Path("constraints.txt").read_text(encoding="utf-8").splitlines()
    others = [line for line in lines if not line.startswith(("torch==", "torchvision=="))]
    pinned.write_text("\n".join([*others, f"torch=={torch}", f"torchvision=={torchvision}", ""]), encoding="utf-8")
    session.install("torch", "-c", str(pinned))  # first: what depends on it would otherwise pull another build
    session.install("-e", ".[all,dev]", "-c", str(pinned))
    RESULTS.mkdir(parents=True, exist_ok=True)
    results = RESULTS / session.name.removeprefix("suite(").removesuffix(")")
    packages = session.run("python", "-m", "pip", "freeze", silent=True, log=False)
    Path(f"{results}.txt").write_text(str(packages), encoding="utf-8")
    parallel = ("--numprocesses", "auto", "--dist", "loadfile")
    session.run("pytest", *parallel, f"--junitxml={results}.xml", *session.posargs, env={"OMP_NUM_THREADS": "1"})
