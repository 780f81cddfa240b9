"""Mutation testing, `make mutants`: change one place of a source file, run the tests that reach it,
see whether one fails.

    python tests/mutants.py [FILE …] [--sample N] [--seed S] [--list]

Each mutant is a fork of a process that has imported torch but nothing of the package, so it costs
its tests and no start. Nothing on disk is changed. Every result is a line of
runs/mutants/log.jsonl; started again, the run goes on behind it. See docs/testing.md for why not
mutmut or cosmic-ray.
"""

import argparse
import gc
import hashlib
import importlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mutations import ROOT, Mutant, mutants, mutate

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
RUNS = ROOT / "runs/mutants"
# Not sharded.py, which runs in processes of its own.
SOURCES = [
    "sampling/*.py", "samplers/[!s]*.py", "samplers/so*.py", "guidance.py", "diffusion/loss.py",
    "target.py", "metrics/functional.py",
]  # fmt: skip
# Not tests/golden: they see every change, and nobody knows whether the text was right before.
TESTS = [
    "sampling/test_*.py", "samplers/test_*.py", "wiring/test_*.py", "test_guidance.py",
    "test_target.py", "diffusion/test_*.py", "metrics/test_metrics.py", "metrics/test_reference.py",
    "reliability/test_numbers.py",
]  # fmt: skip
SLOWEST, BUDGET = 8.0, 15.0  # seconds of one test, and of all that one mutant is given to
THIRD_PARTY = (
    "torch numpy scipy.stats lightning.pytorch torchmetrics transformers datasets jsonargparse"
    " omegaconf sacrebleu arviz_stats hypothesis rich.console matplotlib.pyplot coverage pytest"
)

# How it is run.


def forked(work: Callable[[], Any], cpu_seconds: float) -> Any:
    """What `work` returns in a fork of this process, or None where it died or ran out of time."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        os.chdir(ROOT)
        resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_seconds), int(cpu_seconds)))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
        signal.alarm(int(6 * cpu_seconds))  # one that sleeps; the machine may be busy
        os.write(write, json.dumps(work()).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return json.loads(said) if said else None


class Tests:
    """A pytest plugin: only these tests, in this order; notes their seconds, what failed, and by
    `switch` who runs.
    """

    def __init__(
        self, wanted: list[str] | None = None, switch: Callable[[str], None] = lambda test: None
    ) -> None:
        self.wanted, self.switch = wanted, switch
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []

    def run(self, files: list[str]) -> int:
        import pytest

        options = [
            "-p",
            "no:cacheprovider",
            "-p",
            "_hypothesis_pytestplugin",
            "--hypothesis-seed=0",
        ]
        return int(pytest.main([*options, *(["-x"] if self.wanted else []), *files], [self]))

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self.wanted is not None:
            place = {test: i for i, test in enumerate(self.wanted)}
            items[:] = sorted(
                (x for x in items if x.nodeid in place), key=lambda x: place[x.nodeid]
            )

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.switch(nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def files_of(tests: list[str]) -> list[str]:
    return sorted({test.split("::")[0] for test in tests})


def digest(*paths: str) -> str:
    return hashlib.sha256(b"\0".join((ROOT / path).read_bytes() for path in paths)).hexdigest()[:16]


def reached(test_file: str, sources: list[str]) -> dict[str, Any]:
    """The lines of `sources` that each test of a file runs: {path: {line: [test, …]}}, and the
    tests' seconds; kept.
    """
    kept = RUNS / "reach" / f"{test_file.replace('/', '.')}.json"
    if kept.exists():
        known: dict[str, Any] = json.loads(kept.read_text())
        if known["digest"] == digest(test_file, *known["lines"]):
            return known
    print(f"which lines {test_file} runs …", flush=True)

    def work() -> dict[str, Any]:
        from coverage import Coverage

        traced = Coverage(data_file=None, include=[str(ROOT / path) for path in sources])
        tests = Tests(switch=traced.switch_context)
        traced.start()
        tests.run([test_file])
        traced.stop()
        lines = {}
        for path in sources:
            by_line = traced.get_data().contexts_by_lineno(str(ROOT / path))
            if found := {
                line: sorted(set(who) - {""}) for line, who in by_line.items() if set(who) - {""}
            }:
                lines[path] = found
        seconds = {t: s for t, s in tests.seconds.items() if t not in tests.failed}
        return {"digest": digest(test_file, *lines), "lines": lines, "seconds": seconds}

    result = forked(work, 1200) or {"digest": digest(test_file), "lines": {}, "seconds": {}}
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(result))
    return json.loads(kept.read_text())


def named_equivalent() -> set[str]:
    """Names in equivalent_mutants.txt: `mutant :: reason` a line."""
    lines = (
        Path(__file__).with_name("equivalent_mutants.txt").read_text(encoding="utf-8").splitlines()
    )
    return {line.split(" :: ")[0] for line in lines if " :: " in line}


class Reach:
    """Which tests run which lines."""

    def __init__(self, test_files: list[str], sources: list[str]) -> None:
        self.lines: dict[str, dict[int, set[str]]] = {}
        self.seconds: dict[str, float] = {}
        for file in test_files:
            found = reached(file, sources)
            self.seconds |= found["seconds"]
            for path, lines in found["lines"].items():
                for line, tests in lines.items():
                    self.lines.setdefault(path, {}).setdefault(int(line), set()).update(tests)

    def tests(self, mutant: Mutant) -> list[str]:
        """Those that run its statement; of one that is run by the import alone, its function or
        class. Quick ones first.
        """
        lines = self.lines.get(mutant.path, {})
        for span in mutant.spans:
            found = set().union(*(tests for line, tests in lines.items() if line in span))
            found |= {
                test for test in self.seconds if mutant.imported and "::test_defaults" in test
            }
            if quick := sorted(
                (self.seconds[t], t) for t in found if self.seconds.get(t, SLOWEST) < SLOWEST
            ):
                spent, chosen = 0.0, []
                for seconds, test in quick:
                    spent += seconds
                    chosen += [test] if spent < BUDGET else []
                return chosen
        return []


def attempt(mutant: Mutant, tests: list[str], seconds: float) -> dict[str, Any]:
    """{killed, by}: by a test that fails, or by running out of time or memory."""

    def work() -> dict[str, Any]:
        mutate(mutant)
        plugin = Tests(tests)
        code = plugin.run(files_of(tests))
        if code == 5:  # none was collected
            return {"killed": False, "by": None}
        return {
            "killed": code != 0,
            "by": (plugin.failed or [f"exit code {code}"])[0] if code else None,
        }

    if not tests:
        return {"killed": False, "by": None}
    return forked(work, 10 + 3 * seconds) or {"killed": True, "by": "time or memory"}


# What is tried and printed.


def chosen(paths: list[str], seed: int, sample: int | None) -> list[Mutant]:
    """In a random order in which every beginning is a sample stratified by file."""
    ranked = []
    for path in paths:
        own = sorted(
            mutants(path), key=lambda m: hashlib.sha256(f"{seed} {m.name}".encode()).digest()
        )
        ranked += [((i + 0.5) / len(own), m) for i, m in enumerate(own)]
    return [m for _, m in sorted(ranked, key=lambda pair: (pair[0], pair[1].name))][:sample]


def table(tried: list[tuple[Mutant, bool]], totals: dict[str, int], equivalent: set[str]) -> str:
    from scipy.stats import binomtest

    rows = [
        "| file | mutants | tried | equivalent | killed | survived | share |",
        "| --- |" + " ---: |" * 6,
    ]
    for path in [*totals, ""]:
        own = [(m.name in equivalent, killed) for m, killed in tried if path in ("", m.path)]
        same, killed = sum(e and not k for e, k in own), sum(k for _, k in own)
        n, total = len(own) - same, totals[path] if path else sum(totals.values())
        share = f"{100 * killed / n:.0f} %" if n else ""
        if not path and n:
            low, high = binomtest(killed, n).proportion_ci(method="wilson")
            share = f"{100 * killed / n:.1f} % ({100 * low:.1f} – {100 * high:.1f})"
        label = path.removeprefix("dia_lightning/") or "all"
        rows.append(
            f"| {label} | {total} | {len(own)} | {same} | {killed} | {n - killed} | {share} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "files", nargs="*", help="of the package; by default all that docs/testing.md names"
    )
    parser.add_argument(
        "--sample", type=int, help="how many mutants, in proportion to the files'; by default all"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=RUNS / "log.jsonl")
    parser.add_argument("--list", action="store_true", help="only print their names")
    options = parser.parse_args()
    sources = [
        str(f.relative_to(ROOT))
        for glob in SOURCES
        for f in sorted((ROOT / "dia_lightning").glob(glob))
    ]
    paths = [str(Path(f).resolve().relative_to(ROOT)) for f in options.files] or sources
    totals = {path: len(mutants(path)) for path in paths}
    todo = chosen([p for p in paths if totals[p]], options.seed, options.sample)
    if options.list:
        print(*(f"{m.line:4} {m.name}" for m in todo), sep="\n")
        return
    for module in THIRD_PARTY.split():
        importlib.import_module(module)
    importlib.import_module("_pytest.config").get_config()  # imports pytest's own plugins
    gc.freeze()  # or the first collection of each fork copies all of it
    equivalent = named_equivalent()
    files = sorted(
        {str(f.relative_to(ROOT)) for glob in TESTS for f in (ROOT / "tests").glob(glob)}
    )
    reach = Reach(files, sources)
    log: Path = options.log
    log.parent.mkdir(parents=True, exist_ok=True)
    known = (
        {r["name"]: r for r in map(json.loads, log.read_text().splitlines())}
        if log.exists()
        else {}
    )
    tried = []
    for i, mutant in enumerate(todo, 1):
        if mutant.name in equivalent:
            tried.append((mutant, False))
            continue
        tests, began = reach.tests(mutant), time.monotonic()
        key = {"source": digest(mutant.path), "tests": digest(*files_of(tests)) + f" {len(tests)}"}
        old = known.get(mutant.name)
        # A new test does not revive the dead.
        if (
            not old
            or old["source"] != key["source"]
            or not (old["killed"] or old["tests"] == key["tests"])
        ):
            result = attempt(mutant, tests, sum(reach.seconds[t] for t in tests))
            old = {"name": mutant.name, **key, **result, "line": mutant.line, "n_tests": len(tests)}
            old["seconds"] = round(time.monotonic() - began, 2)
            with log.open("a") as file:
                file.write(json.dumps(old, ensure_ascii=False) + "\n")
            word = "killed  " if old["killed"] else "SURVIVED"
            print(
                f"{i:4}/{len(todo)} {word} {old['seconds']:5.1f} s {mutant.line:4} {mutant.name}",
                flush=True,
            )
        tried.append((mutant, old["killed"]))
    print("\n" + table(tried, totals, equivalent))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    main()
