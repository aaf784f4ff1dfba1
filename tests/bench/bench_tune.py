"""A search by the clock, and the epochs that pruning saves.

    OMP_NUM_THREADS=1 python tests/bench/bench_tune.py lab WORK [--workers 2] [--trials 64]
    OMP_NUM_THREADS=1 python tests/bench/bench_tune.py pruning WORK --data CRCHISTO [--seeds 3]

`lab`: what took a lab 61 hours, 64 trials: 100 cases of three stains with five slices each, 83,630 patches,
1024 made-up features, the hierarchical head, the settings that are tuned when nothing is said, three inner
folds, up to 30 epochs. Seconds on the clock and of the processors; the latter, shared out evenly to the
workers, are the former of a machine that does nothing else.

`pruning`: 48 colon cases, DenseNet121 with random weights (`crchisto_peers`), dual_stream, 64 trials of
three inner folds by 8 workers. For every search seed and pruner: the epochs trained, the best validation
value, and what the winner is worth on the outer test cases. The epochs saved are counted against the search
of the same seed without pruning, and beside them stands what `tuning.json` estimates by itself.

What is finished is kept in WORK, and an interrupted benchmark goes on from there.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from featstore.settings import PROJECT_FILE, Layers
from featstore.strict_yaml import read_file
from heads.config import Config
from tests.bench import bench_study
from tests.bench.crchisto_peers import prepare

LAB_CASES, LAB_PATCHES, LAB_HOURS = 100, 83_630, 61
PRUNERS = ("none", "median", "hyperband")
Settings = dict[str, dict[str, Any]]


def worker(project: Path, name: str, sections: Settings) -> None:
    """What `featstore tune --as NAME` does."""
    from heads.tuning.project import tune_project

    layers = Layers()
    layers.add(Config, read_file(project / PROJECT_FILE), PROJECT_FILE)
    layers.add(Config, sections, "the benchmark")
    report = tune_project(layers.build(Config), project, name, lambda text: print(text, flush=True))
    sys.exit(report.exit_code if report.interrupted is None else 128 + report.interrupted)


def search(
    project: Path, name: str, sections: Settings, workers: int
) -> tuple[dict[str, Any], float, float]:
    """A tuning by several workers; what it found, and seconds on the clock and of the processors."""
    folder = project / "runs" / f"tune_{name}"
    summary, clock = folder / "tuning.json", project / f"{name}.json"
    while not summary.exists():
        spent = json.loads(clock.read_text()) if clock.exists() else [0.0, 0.0]
        start, before = time.perf_counter(), _processor_seconds()
        command = [sys.executable, __file__, "worker", str(project), name, json.dumps(sections)]
        with open(project / f"{name}.txt", "a") as said:
            crowd = [subprocess.Popen(command, stdout=said) for _ in range(workers)]
            ends = [each.wait() for each in crowd]
        spent[0] += time.perf_counter() - start
        spent[1] += _processor_seconds() - before
        clock.write_text(json.dumps(spent))
        if any(ends):
            sys.exit(f"a worker ended early: see {said.name}; the same command goes on")
    seconds, used = json.loads(clock.read_text())
    return json.loads(summary.read_text()), seconds, used


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def lab(options: argparse.Namespace) -> None:
    bench_study.CASES, bench_study.PATCHES = LAB_CASES, LAB_PATCHES
    bench_study.make_project(options.work)
    sections: Settings = {
        "head": {"name": "hierarchical"},
        "train": {"device": "cpu"},
        "tune": {"trials": options.trials, "pruner": options.pruner},
    }
    name = f"lab_{options.pruner}_{options.trials}"
    found, seconds, used = search(options.work, name, sections, options.workers)
    (outer,) = found["outer"]
    alone = used / options.workers
    print(
        f"{options.trials} trials of 3 inner folds, {options.workers} workers: {seconds / 60:.1f} min, of "
        f"the processors {used / 60:.1f} min ({alone / 60:.1f} a worker)\n"
        f"{outer['epochs']} epochs, {outer['finished']} finished, {outer['pruned']} pruned, saved about "
        f"{outer['share_saved_by_pruning']:.0%}; {LAB_HOURS} h / {seconds / 3600:.2f} h = "
        f"{LAB_HOURS * 3600 / seconds:.0f}"
    )


def pruning(options: argparse.Namespace) -> None:
    prepare(options.work, options.data)
    epochs: dict[str, list[float]] = {name: [] for name in PRUNERS}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for pruner in options.pruners:
            sections: Settings = {
                "head": {"name": options.head},
                "train": {"device": "cpu"},
                "tune": {"trials": options.trials, "pruner": pruner, "search_seed": seed},
            }
            found, seconds, _ = search(
                options.work, f"{options.head}_{pruner}_{seed}", sections, options.workers
            )
            (outer,), (final,) = found["outer"], found["final"]
            epochs[pruner].append(outer["epochs"])
            best, test = outer["best"], final["test"]
            print(
                f"seed {seed} {pruner:9}  epochs {outer['epochs']:5}  {outer['finished']} finished  "
                f"{outer['pruned']} pruned  best {best['value']:.4f} ± {best['sd']:.4f}  "
                f"saved by its own estimate {outer['share_saved_by_pruning']:.0%}  test AUC "
                f"{test['auc']['value']:.3f}  log loss {test['log_loss']['value']:.3f}  {seconds:.0f} s",
                flush=True,
            )
    for pruner in [name for name in options.pruners if name != "none" and epochs["none"]]:
        saved = [1 - a / b for a, b in zip(epochs[pruner], epochs["none"], strict=True)]
        shown = ", ".join(f"{each:.0%}" for each in saved)
        print(f"{pruner}: saved against none {statistics.fmean(saved):.0%} ({shown})")


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        worker(Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, workers in (("lab", 2), ("pruning", 8)):
        own = kinds.add_parser(kind)
        own.add_argument("work", type=Path, help="becomes a project: kept, and used again")
        own.add_argument("--workers", type=int, default=workers)
        own.add_argument("--trials", type=int, default=64)
        if kind == "lab":
            own.add_argument("--pruner", default="median")
        else:
            own.add_argument("--data", type=Path, required=True)
            own.add_argument("--seeds", type=int, default=3)
            own.add_argument("--first-seed", type=int, default=0)
            own.add_argument("--head", default="dual_stream")
            own.add_argument("--pruners", nargs="+", default=PRUNERS, choices=PRUNERS)
    options = parser.parse_args()
    options.work = options.work.absolute()
    (lab if options.kind == "lab" else pruning)(options)


if __name__ == "__main__":
    main()
