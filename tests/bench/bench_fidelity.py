"""What is lost in bfloat16, and by another runtime: cosines to float32, and AUCs on 48 colon cases.

    OMP_NUM_THREADS=1 python tests/bench/bench_fidelity.py --data CRCHISTO_FOLDER --work WORK_FOLDER

What was asked of it: a cosine of at least 0.9999 between the embeddings of a patch in bfloat16 and in
float32, of at least 0.99 once the cohort's mean is subtracted from both, and AUCs that differ by no
more than the seed of training moves them.

- Features are those of `bench_crchisto` (DenseNet121 with random weights, 64 px), extracted by
  `featstore extract` once each way, and kept as float16 as they are by default. The reference is
  PyTorch in float32, kept as float32. At 224 px there are `--subset` patches, evenly over the cohort,
  and cosines alone.
- AUCs are by the protocol of `bench_crchisto`, on the same folds, with the same seeds: the head
  `hierarchical` as it is when nothing is set, and logistic regression of the mean patch, which has no
  seed. Every AUC is over all 48 cases.
- `floored` is that regression on features standardised as the heads do it. Declared after the first
  results: a unit that is all but dead in the training cases has a deviation near zero, and its value in
  one case decides about this case whatever the precision. The heads divide by 1% of the median
  deviation at least.
- `r.m.s.` is the centred error of all patches together, relative to the centred embeddings: what
  cannot be told from the cosine of a patch that lies near the mean. `spread` is the reference's, the
  length of a centred embedding over that of an embedding: how much of a vector tells patches apart.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench_crchisto import default_config, over_seeds, run_head
from crchisto_peers import CLASSES, FOLDS, SPLIT_SEED, auc_of, run_method
from numpy.typing import NDArray

from featstore.cohort import read_labels
from featstore.cohort.splits import Split, make_splits
from featstore.config import FeatstoreConfig
from featstore.project import extract_project
from featstore.resident import CaseBags
from featstore.store import Store
from heads.cohort import load_bags
from heads.models.standardize import Standardize
from heads.training.data import fit_standardize

HEAD, PEER = "hierarchical", "mean_pool_logistic"
PLAIN, CENTRED = 0.9999, 0.99  # the cosines asked for
Features = NDArray[np.float64]
Found = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """How embeddings are computed and kept; the fields are settings of `extract`."""

    runtime: str
    amp: str
    dtype: str = "float16"

    @property
    def name(self) -> str:
        """For tables, and for the store's folder."""
        return f"{self.runtime}_{'float32' if self.amp == 'off' else self.amp}_{self.dtype}"


REFERENCE = Way("torch", "off", "float32")
WAYS = (Way("torch", "off"), Way("torch", "bf16"), Way("openvino", "off"), Way("openvino", "bf16"))


def settings(data: Path, patches: Path, side: int, way: Way) -> FeatstoreConfig:
    return FeatstoreConfig.model_validate(
        {
            "patches": {"folder": str(patches)},
            "labels": {"file": f"{data}/labels.csv", "case_column": "case_id", "class_column": "label"},
            "classes": CLASSES,
            "backbone": {"name": "densenet121", "weights": "random:0", "resize": side},
            "extract": {"device": "cpu", "runtime": way.runtime, "amp": way.amp, "dtype": way.dtype},
            "store": {"path": f"store_{side}_{way.name}"},
        }
    )


def extracted(config: FeatstoreConfig, work: Path) -> Store:
    """The store, with what is not there yet."""
    started = time.perf_counter()
    report = extract_project(config, work)
    print(
        f"{config.store.path}: {report.committed} patches in {time.perf_counter() - started:.0f} s",
        flush=True,
    )
    return Store.open(work / config.store.path)


def features(store: Store) -> tuple[list[str], Features]:
    """Paths of all patches, and their embeddings (n, D), in one order whatever the store."""
    table = store.table()
    bags = [store.bag(case) for case in sorted(store.cases())]
    paths = [path for bag in bags for path in table.loc[bag.rows, "path"]]
    return paths, np.concatenate([bag.features for bag in bags]).astype(np.float64)


def cosines(found: Features, expected: Features) -> Features:
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return np.einsum("nd,nd->n", found, expected) / lengths


def fidelity(store: Store, reference: Store) -> Found:
    """Least, 1st percentile and median of the cosines to the reference, plain and centred."""
    (paths, found), (same, expected) = features(store), features(reference)
    assert paths == same
    mean = expected.mean(axis=0)
    away = expected - mean
    result: Found = {
        "patches": len(paths),
        "rms": float(np.linalg.norm(found - expected) / np.linalg.norm(away)),
        "spread": float(np.linalg.norm(away) / np.linalg.norm(expected)),
    }
    for name, values in (("plain", cosines(found, expected)), ("centred", cosines(found - mean, away))):
        least, low, median = np.quantile(values, (0, 0.01, 0.5)).tolist()
        result[name] = {"least": least, "1%": low, "median": median}
    return result


def print_fidelity(side: int, name: str, found: Found) -> None:
    values = [found[kind][key] for kind in ("plain", "centred") for key in ("least", "1%", "median")]
    print(
        f"{side:>4}  {name:<26}{''.join(f'{value:>10.6f}' for value in values)}"
        f"{found['rms']:>9.5f}{found['spread']:>8.3f}"
    )


def pick(patches: Path, count: int, folder: Path) -> Path:
    """Copies of some patches, evenly over the cohort."""
    files = sorted(file for file in patches.rglob("*") if file.is_file())
    for at in np.linspace(0, len(files) - 1, min(count, len(files))).astype(int):
        target = folder / files[at].relative_to(patches)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(files[at], target)
    return folder


def aucs(store: Store, labels: dict[str, int], seeds: list[int]) -> Found:
    """Of the head with every seed, and of logistic regression."""
    splits = make_splits(labels, {}, FOLDS, SPLIT_SEED)
    bags = load_bags(default_config(HEAD, 0), store, labels, lambda text: None)
    runs = {seed: run_head(default_config(HEAD, seed), splits, bags, labels) for seed in seeds}
    peer = run_method(PEER, splits, {case: store.bag(case).features for case in labels}, labels, seeds[0])
    floored = floored_logistic(bags, splits, labels)
    return {HEAD: {"seeds": runs, "over_seeds": over_seeds(runs, labels)}, PEER: peer, "floored": floored}


def floored_logistic(bags: CaseBags, splits: Sequence[Split], labels: dict[str, int]) -> Found:
    """`mean_pool_logistic` behind the heads' standardisation: its pooled AUC, with interval."""
    from sklearn.linear_model import LogisticRegression

    probability: dict[str, float] = {}
    for split in splits:
        standardize = Standardize(bags.store.spec.dim)
        fit_standardize(standardize, bags, split.train)
        train, test = (
            torch.stack([standardize(bags.features(case).float()).mean(dim=0) for case in part]).numpy()
            for part in (split.train, split.test)
        )
        model = LogisticRegression(C=1.0, max_iter=5000).fit(train, [labels[case] for case in split.train])
        probability |= dict(zip(split.test, model.predict_proba(test)[:, 1].tolist(), strict=True))
    return auc_of(list(labels.values()), [probability[case] for case in labels])


def print_aucs(name: str, found: Found, seeds: list[int]) -> None:
    runs, over = found[HEAD]["seeds"], found[HEAD]["over_seeds"]
    each = "".join(f"{runs[seed]['auc']:>9.4f}" for seed in seeds)
    print(
        f"{name:<26}{each}{over['mean']:>9.4f}{found[PEER]['auc']:>10.4f}{found['floored']['auc']:>9.4f}",
        flush=True,
    )


def print_verdicts(figures: dict[int, dict[str, Found]], found: dict[str, Found]) -> None:
    print()
    for side, rows in figures.items():
        for name, row in rows.items():
            plain, centred = row["plain"]["least"], row["centred"]["least"]
            missed = [
                text
                for text, value, wanted in (("plain", plain, PLAIN), ("centred", centred, CENTRED))
                if value < wanted
            ]
            verdict = f"NOT reached: {', '.join(missed)}" if missed else "reached by every patch"
            print(f"{side} px, {name}: cosines of {PLAIN} and {CENTRED} {verdict}")
    if found:
        reference = found[REFERENCE.name][HEAD]["over_seeds"]
        noise = reference["most"] - reference["least"]
        for name, row in found.items():
            if name != REFERENCE.name:
                difference = row[HEAD]["over_seeds"]["mean"] - reference["mean"]
                verdict = "within" if abs(difference) <= noise else "NOT within"
                print(
                    f"{HEAD}, {name}: mean AUC {difference:+.4f}, {verdict} the seeds' range of {noise:.4f}"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="crchisto, with patches/ and labels.csv")
    parser.add_argument("--work", type=Path, required=True, help="for the stores: kept, and used again")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 0, 1, 2], help="of training")
    parser.add_argument("--subset", type=int, default=300, help="patches at 224 px")
    parser.add_argument("--aucs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, help="write everything here, predictions too")
    options = parser.parse_args()
    started = time.perf_counter()
    data, work = options.data.resolve(), options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    ways = [way for way in WAYS if way.runtime == "torch" or find_spec("openvino") is not None]
    subset = pick(data / "patches", options.subset, work / f"patches_{options.subset}")
    figures: dict[int, dict[str, Found]] = {}
    stores: dict[str, Store] = {}
    for side, patches in ((64, data / "patches"), (224, subset)):
        opened = {
            way.name: extracted(settings(data, patches, side, way), work) for way in (REFERENCE, *ways)
        }
        figures[side] = {way.name: fidelity(opened[way.name], opened[REFERENCE.name]) for way in ways}
        stores = stores or opened
    print(f"\n{'cosine to ' + REFERENCE.name:<32}{'plain':>10}{'':>20}{'centred':>10}")
    print(
        f"  px  {'':<26}{''.join(f'{key:>10}' for key in ('least', '1%', 'median') * 2)}   r.m.s.  spread"
    )
    for side, rows in figures.items():
        for name, row in rows.items():
            print_fidelity(side, name, row)
    found: dict[str, Found] = {}
    if options.aucs:
        config = settings(data, data / "patches", 64, REFERENCE)
        known = read_labels(config.labels, config.classes, work, config.patches.normalize_cases).by_case
        labels = {case: known[case] for case in stores[REFERENCE.name].cases()}
        print(f"\nAUC of {len(labels)} cases, torch {torch.__version__}, {torch.get_num_threads()} threads")
        seeds = "".join(f"{seed:>9}" for seed in options.seeds)
        print(f"{HEAD:<26}{seeds}{'mean':>9}{'logistic':>10}{'floored':>9}")
        for name, store in stores.items():
            found[name] = aucs(store, labels, options.seeds)
            print_aucs(name, found[name], options.seeds)
    print_verdicts(figures, found)
    print(f"{time.perf_counter() - started:.0f} s")
    if options.json:
        options.json.write_text(json.dumps({"cosines": figures, "aucs": found}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
