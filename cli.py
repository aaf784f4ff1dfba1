"""The command line: parse, build the config, call one function, show the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from featstore.errors import ConfigError
from featstore.flags import Call, CommandLine
from heads.config import Config

if TYPE_CHECKING:
    from featstore.extraction import ExtractionReport
    from heads.training.course import Progress as TrainingProgress

COHORT = ("patches", "images", "labels", "")

_line = CommandLine(
    Config, "Embeddings of pathology patches, computed once, kept in a store that can be trusted."
)
app, command = _line.app, _line.command

_AS = typer.Option(
    None, "--as", help="name of its folder in runs: begun if it is not there, gone on with if it is"
)


def _gpu(section: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What `--gpu` stands for on a command that is about this section."""
    return lambda own: {section: {"device": "cuda"}} if own["gpu"] else {}


@command(COHORT, in_project=False)
def init(
    call: Call[Config],
    patches: Path = typer.Argument(..., help="folder of PNG patches"),
    force: bool = typer.Option(False, help="replace an existing featstore.yaml"),
) -> None:
    """Look at a folder of patches and write a commented featstore.yaml."""
    from featstore.project import init_project

    created = init_project(call.config, call.project, patches, force)
    call.answer(created)


@command((*COHORT, "store", "train"))
def check(
    call: Call[Config],
    sample: int = typer.Option(64, min=1, help="patches that are decoded, spread over the stains"),
) -> None:
    """Report on the cohort: what is there, what is left out and why, what looks odd."""
    from featstore.project import REPORTS, check_project

    report = check_project(call.config, call.project, _caps(call.config), sample)
    report.save(call.project / REPORTS / "check")
    call.show(
        f"{report.to_text()}\n\nsaved in {call.project / REPORTS / 'check'} (with a contact sheet)",
        report.to_json(),
    )


@command((*COHORT, "store", "backbone", "extract"), presets=_gpu("extract"))
def extract(
    call: Call[Config], gpu: bool = typer.Option(False, "--gpu", help="insist on a GPU (--device cuda)")
) -> None:
    """Push every patch that the store lacks through the backbone, once."""
    report = _extract(call)
    call.answer(report)


def _extract(call: Call[Config]) -> ExtractionReport:
    """Fill the project's store, with a progress bar."""
    from featstore.progress import ExtractionBar
    from featstore.project import extract_project

    with ExtractionBar(call) as bar:
        return extract_project(call.config, call.project, _caps(call.config), bar.update, bar.announce)


def _caps(config: Config) -> Any:
    """The limits of training whose effect the cohort's report tells."""
    from featstore.cohort import Caps

    train = config.train
    return Caps(train.per_slice_cap, train.max_slices_per_stain, train.epochs)


@command(("store",))
def info(call: Call[Config]) -> None:
    """Say what the store holds: cohort, backbone, sizes, stains."""
    from featstore.store import Store
    from featstore.store.summary import summarize

    summary = summarize(Store.open(call.project / call.config.store.path))
    call.answer(summary)


@command(("store",))
def verify(
    call: Call[Config],
    quick: bool = typer.Option(False, "--quick", help="only records, and that every part is there"),
    full: bool = typer.Option(False, "--full", help="also hash every byte of every part"),
    subset: str | None = typer.Option(None, help="n/t, n from 0: a share of the cases, e.g. one a night"),
    csv: Path | None = typer.Option(None, help="write what is found to this table"),
) -> None:
    """Look for damage in the store; exit code 1 if there is any. Changes nothing."""
    from featstore.progress import CaseBar
    from featstore.store.verify import verify as verify_store

    if quick and full:
        raise ConfigError("--quick and --full at once", expected="one of them", where="verify")
    level = "quick" if quick else "full" if full else "default"
    with CaseBar() as bar:
        report = verify_store(call.project / call.config.store.path, level, subset, bar.update)
    if csv is not None:
        report.write_csv(csv)
    call.answer(report)


@command(("store",))
def repair(
    call: Call[Config],
    quick: bool = typer.Option(False, "--quick", help="look only at records and sizes of parts"),
    apply: bool = typer.Option(False, "--apply", help="do it; otherwise only say what would be done"),
) -> None:
    """Move what is damaged to quarantine, so that `extract` computes just that again."""
    from featstore.progress import CaseBar
    from featstore.store.maintenance import repair as repair_store

    with CaseBar() as bar:
        path, level = call.project / call.config.store.path, "quick" if quick else "full"
        report = repair_store(path, apply, level, bar.update)
    call.answer(report)


@command(("store",))
def gc(
    call: Call[Config],
    apply: bool = typer.Option(False, "--apply", help="remove; otherwise only count"),
    grace: float = typer.Option(24.0, min=0, help="hours; keep what was needed or written since then"),
    quarantine: bool = typer.Option(False, "--quarantine", help="also remove what lies in quarantine"),
) -> None:
    """Remove old records, and the files that no recent record names."""
    from featstore.progress import CaseBar
    from featstore.store.maintenance import gc as collect

    with CaseBar() as bar:
        path = call.project / call.config.store.path
        report = collect(path, grace * 3600, apply, quarantine, bar.update)
    call.answer(report)


@command(("store",))
def rm(
    call: Call[Config],
    case: list[str] = typer.Option([], help="id of a case; may be given several times"),
    stain: list[str] = typer.Option([], help="only this stain; may be given several times"),
    slices: list[str] = typer.Option([], "--slice", help="only this slice; may be given several times"),
    apply: bool = typer.Option(False, "--apply", help="do it; otherwise only count"),
) -> None:
    """Take embeddings out of the store, by case, stain and slice."""
    from featstore.store.maintenance import rm as remove

    call.answer(remove(call.project / call.config.store.path, case, stain, slices, apply))


@command(("imports", "store", "labels"), in_project=None)
def import_(
    call: Call[Config],
    source: Path = typer.Argument(
        ..., help="folder of features of another tool, a table of bags, or a checkpoint (.pth, .pt, .ckpt)"
    ),
) -> None:
    """Take the features of CLAM, TRIDENT, STAMP, slideflow, torchmil, a table, or of one .pt a patch.

    Or a checkpoint of a lab's own hierarchical trainer, as a run: --load-splits FILE says which are its
    test cases.
    """
    # Features of a cohort are no single file of a name that torch saves models under.
    model = source.suffix.lower() in (".pth", ".pt", ".ckpt", ".tar") and not source.is_dir()
    if call.config.imports.source_format == "auto" and model:
        from heads.imported import import_checkpoint

        call.answer(import_checkpoint(call.config, call.project, source, call.tell))
        return
    from featstore.interop.project import import_project
    from featstore.progress import CaseBar

    with CaseBar("bags") as bar:
        report = import_project(call.config, call.project, source, bar.update)
    call.answer(report)


@command(("store", "labels", "split"))
def export(
    call: Call[Config],
    folder: Path = typer.Argument(..., help="new folder to write to"),
    by: str = typer.Option("slice", help="slice | case: what becomes one of CLAM's slides"),
) -> None:
    """Write embeddings, labels and splits in CLAM's layout."""
    from featstore.interop.project import export_project
    from featstore.progress import CaseBar

    with CaseBar() as bar:
        report = export_project(call.config, call.project, folder, by, bar.update)
    call.answer(report)


@command((*COHORT, "split"))
def split(call: Call[Config]) -> None:
    """Split the cases: stratified, groups together, into files that trainings share."""
    from featstore.project import split_project

    written = split_project(call.config, call.project)
    call.answer(written)


@command(("head", "train", "runs"), presets=_gpu("train"))
def train_head(
    call: Call[Config],
    folds: int | None = typer.Option(None, help="a study of so many folds, each of them trained"),
    seeds: int | None = typer.Option(None, help="a study of so many trainings a fold: seed, seed + 1, …"),
    gpu: bool = typer.Option(False, "--gpu", help="insist on a GPU (--device cuda)"),
    resume: Path | None = typer.Option(None, help="go on with this run or study, by its own settings"),
    name: str | None = _AS,
    task: str | None = typer.Option(
        None, help="I/N: share I (from 0) of a study's trainings; auto/N: I from the scheduler's array"
    ),
) -> None:
    """Train a head on the store and evaluate it on the test cases, into a new run folder.

    With --folds or --seeds: a study, many trainings on the same splits in one folder.
    """
    from heads.study import train
    from heads.study_tasks import Asked

    def show(progress: TrainingProgress, epochs: int) -> None:
        call.tell(progress.to_text(epochs))

    asked = Asked(folds, seeds, resume, name, task)
    call.answer(train(call.config, call.project, asked, call.tell, show))


@command(("finetune", "runs", "backbone", "patches"), presets=_gpu("finetune"))
def finetune(
    call: Call[Config],
    run: Path | None = typer.Argument(None, help="run to start from (default: the newest finished one)"),
    gpu: bool = typer.Option(False, "--gpu", help="insist on a GPU (--device cuda)"),
    resume: Path | None = typer.Option(None, help="go on with this fine-tuning, by its own settings"),
    finish: bool = typer.Option(
        False, "--finish", help="--resume: train no further; evaluate and export its best epoch"
    ),
    name: str | None = _AS,
) -> None:
    """Train a run's backbone and head together on the patches, and export the backbone to extract with.

    On several GPUs or machines: torchrun --nproc-per-node N --no-python featstore finetune RUN
    """
    from featstore.progress import CaseBar
    from heads.finetune import finetune_project

    if (resume is None and finish) or (resume is not None and run is not None):
        raise ConfigError(
            "--finish without --resume" if finish else f"a run to start from, {run}, and one to resume",
            expected="featstore finetune [RUN], or featstore finetune --resume RUN [--finish]",
            where="finetune",
            fix="leave one of them out",
        )

    def show(progress: TrainingProgress, epochs: int) -> None:
        call.tell(progress.to_text(epochs))

    config, project = call.config, call.project
    with CaseBar("steps") as bar:
        done = finetune_project(config, project, run, resume, finish, call.tell, show, bar.update, name)
    if done is not None:
        call.answer(done)


@command(("runs",))
def evaluate(
    call: Call[Config],
    run: Path | None = typer.Argument(None, help="run folder (default: the newest finished one)"),
    part: str = typer.Option("test", help="cases to evaluate: test | val | train"),
    study: Path | None = typer.Option(None, help="write the tables and pictures of this study anew"),
) -> None:
    """Evaluate a run again, its best and its last epoch, from the checkpoints alone."""
    from heads.study import evaluate as evaluate_again

    call.answer(evaluate_again(call.config, call.project, run, part, study, call.tell))


@command(("runs",))
def compare(
    call: Call[Config],
    a: Path = typer.Argument(..., help="a run or a study"),
    b: Path = typer.Argument(..., help="another"),
    ensemble: bool = typer.Option(
        False, "--ensemble", help="studies: by the mean probability of the seeds, not by their mean metrics"
    ),
    csv: Path | None = typer.Option(None, help="write the differences to this table"),
) -> None:
    """Compare two runs or studies on the cases that both have, by a paired bootstrap."""
    from heads.study import compare_project

    done = compare_project(call.config, call.project, a, b, ensemble, call.tell)
    if csv is not None:
        done.write_csv(csv)
    call.answer(done)


@command(("images",))
def attention(
    call: Call[Config],
    run: Path | None = typer.Argument(None, help="run folder (default: the newest finished one)"),
    part: str = typer.Option("test", help="cases to look into: test | val | train | all"),
    case: list[str] = typer.Option([], help="only this case; may be given several times"),
    top_n: int = typer.Option(5, min=1, help="patches a gallery"),
    top_percent: float = typer.Option(
        5.0, min=0.01, max=100, help="of a case's patches, listed as its top"
    ),
    overlays: int = typer.Option(6, min=0, help="slices a case that get an overlay, the most attended"),
) -> None:
    """Show what a run attended to: tables, galleries and overlays, in attention_analysis/ of the run."""
    from featstore.progress import CaseBar
    from heads.inspect.attention_files import AttentionOptions, attention_project
    from heads.inspect.opened import Wanted

    wanted, options = Wanted(run, part, tuple(case)), AttentionOptions(top_n, top_percent, overlays)
    with CaseBar() as bar:
        done = attention_project(call.config, call.project, wanted, options, call.tell, bar.update)
    call.answer(done)


@command(("images",))
def probe(
    call: Call[Config],
    run: Path | None = typer.Argument(None, help="run folder (default: the newest finished one)"),
    part: str = typer.Option("test", help="cases to look into: test | val | train | all"),
    case: list[str] = typer.Option([], help="only this case; may be given several times"),
    mode: str = typer.Option("alone", help="what pictures are of: alone | in_place; the tables have both"),
    top_n: int = typer.Option(10, min=1, help="patches a gallery"),
    table_format: str = typer.Option("csv", "--tables", help="csv | parquet"),
    leave_out: bool = typer.Option(True, help="the effect of leaving each patch, slice and stain out"),
    curves: bool = typer.Option(True, help="deletion and insertion curves"),
) -> None:
    """Ask a run what every single patch says, and what its absence changes, into probing/ of the run."""
    from featstore.progress import CaseBar
    from heads.inspect.opened import Wanted
    from heads.inspect.probe_files import ProbeOptions, probe_project

    wanted = Wanted(run, part, tuple(case))
    options = ProbeOptions(mode, top_n, table_format, leave_out, curves)
    with CaseBar() as bar:
        done = probe_project(call.config, call.project, wanted, options, call.tell, bar.update)
    call.answer(done)


@command(("store", "backbone", "images"))
def similar(
    call: Call[Config],
    patch: str | None = typer.Argument(None, help="path or name of a patch, or any PNG file"),
    count: int = typer.Option(20, min=1, help="patches to find"),
    metric: str = typer.Option("cosine", help="cosine (of embeddings less their mean) | euclidean"),
    other_cases: bool = typer.Option(False, "--other-cases", help="leave out the patch's own case"),
    stain: str | None = typer.Option(None, help="only patches of this stain"),
    per_case: int | None = typer.Option(None, min=1, help="at most so many of a case"),
    map_: bool = typer.Option(
        False, "--map", help="draw all patches as points, by stain, class, attention"
    ),
    run: Path | None = typer.Option(None, help="--map: whose attention (default: the newest finished run)"),
) -> None:
    """Find the patches that are most like one, or draw a map of all of them, into similar/."""
    from heads.inspect.similar_files import map_project, similar_project

    if map_ == (patch is not None):
        raise ConfigError(
            "a patch and --map at once" if map_ else "no patch is named",
            expected="featstore similar PATCH, or featstore similar --map",
            where="similar",
        )
    if patch is None:
        call.answer(map_project(call.config, call.project, run, call.tell))
        return
    call.answer(
        similar_project(call.config, call.project, patch, count, metric, other_cases, stain, per_case)
    )


@command(("images",))
def report(
    call: Call[Config],
    run: Path | None = typer.Argument(None, help="run or study (default: the newest finished run)"),
    other: Path | None = typer.Argument(None, help="another, to compare the first with"),
    out: Path | None = typer.Option(None, help="file to write (default: report.html in its folder)"),
    pictures: bool = typer.Option(
        True, help="look at patches and attention; else numbers and curves alone"
    ),
) -> None:
    """Write one HTML file that a pathologist can open: results, cases, attention, single patches."""
    from featstore.progress import CaseBar
    from heads.inspect.report.making import report_project

    with CaseBar() as bar:
        done = report_project(call.config, call.project, run, other, out, pictures, call.tell, bar.update)
    call.answer(done)


@command(("labels", "head", "train"))
def drift(
    call: Call[Config],
    a: Path = typer.Argument(..., help="a store, e.g. of the backbone before it was tuned"),
    b: Path = typer.Argument(..., help="another store of the same patches"),
    out: Path | None = typer.Option(None, help="folder to write to (default: drift/A_B of the project)"),
    neighbours: int = typer.Option(10, min=1, help="nearest patches that are compared"),
    sample: int = typer.Option(5000, min=0, help="patches among which they are looked for; 0: all"),
    seeds: int = typer.Option(1, min=1, help="trainings of the head on each store: seed, seed + 1, …"),
    downstream: bool = typer.Option(True, help="train the head on both stores, and compare its AUC"),
) -> None:
    """Compare two stores of the same patches: what a tuned backbone has changed, and whether it helps."""
    from featstore.progress import CaseBar
    from heads.drift import drift_project

    with CaseBar() as bar:
        done = drift_project(
            call.config, call.project, a, b, out, neighbours, sample, seeds, downstream,
            call.tell, bar.update,
        )  # fmt: skip
    call.answer(done)


@command(("vae", "runs"), in_project=None, presets=_gpu("vae"))
def train_vae(
    call: Call[Config],
    leave_one_out: bool = typer.Option(
        False, "--leave-one-out", help="hold out every environment in turn; compare with plain training"
    ),
    seeds: int = typer.Option(1, min=1, help="--leave-one-out: trainings of each, with seed, seed + 1, …"),
    gpu: bool = typer.Option(False, "--gpu", help="insist on a GPU (--device cuda)"),
    resume: Path | None = typer.Option(None, help="go on with this run, by its own settings"),
    name: str | None = _AS,
) -> None:
    """Train a β-VAE for domain generalisation; its encoder becomes a backbone for extract."""
    config, project, tell = call.config, call.project, call.tell
    if leave_one_out:
        from heads.leave_one_out import leave_one_out_project

        call.answer(leave_one_out_project(config, project, seeds, resume, tell, tell, name))
        return
    if seeds != 1:
        raise ConfigError(
            f"--seeds {seeds} without --leave-one-out",
            expected="--seed for one training",
            where="--seeds",
            fix="add --leave-one-out, or leave out --seeds",
        )
    from heads.vae import train_vae_project

    call.answer(train_vae_project(config, project, resume, tell, tell, name))


@command(("tune", "head", "train", "runs"), presets=_gpu("train"))
def tune(
    call: Call[Config],
    name: str | None = _AS,
    gpu: bool = typer.Option(False, "--gpu", help="insist on a GPU (--device cuda)"),
) -> None:
    """Search for a head's settings on folds of the cases that are not tested on, and train the winner.

    The same command with --as NAME, in as many processes and on as many machines as you like, shares the
    trials.
    """
    from heads.tuning.project import tune_project

    call.answer(tune_project(call.config, call.project, name, call.tell))


@command(("slurm",))
def submit(
    call: Call[Config],
    steps: list[str] = typer.Argument(
        ...,
        help="check | extract | verify | tune | study | collect | finetune | vae; several, in any order",
    ),
    name: str | None = typer.Option(
        None, "--as", help="name of what the jobs make in runs, gone on with if there (default: the time)"
    ),
    folds: int | None = typer.Option(None, help="study: so many folds"),
    seeds: int | None = typer.Option(None, help="study: so many trainings a fold"),
    run: Path | None = typer.Option(None, help="finetune: where to start (default: the study, newest run)"),
    resume: Path | None = typer.Option(None, help="study: only tasks with something to do in this one"),
    dry_run: bool = typer.Option(False, "--dry-run", help="show scripts and commands; submit nothing"),
) -> None:
    """Hand steps of the project to SLURM as jobs, each waiting for what it needs."""
    from heads.cluster.submit import submit_project

    call.answer(
        submit_project(
            call.config, call.project, steps, name=name, folds=folds, seeds=seeds, run=run, resume=resume,
            dry_run=dry_run, tell=call.tell,
        )
    )  # fmt: skip


@command((*COHORT, "backbone", "extract"), in_project=None, presets=_gpu("extract"))
def bench(
    call: Call[Config],
    what: str = typer.Argument("extract", help="what to measure: extract (in a project) | train"),
    patches_used: int = typer.Option(
        512, "--sample", min=32, help="extract: patches of the project to measure with"
    ),
    gpu: bool = typer.Option(False, "--gpu", help="insist on a GPU"),
) -> None:
    """Measure against the limit: decoding and backbone, or the matrix products of a training."""
    result: Any
    if what == "extract":
        from featstore.bench import bench_extract

        result = bench_extract(call.config, call.project, patches_used)
    elif what == "train":
        from heads.bench import bench_train

        result = bench_train("cuda" if gpu else "auto")
    else:
        raise ConfigError(f"there is no benchmark {what!r}", expected="extract | train", where="bench")
    call.answer(result)


@command((), in_project=False)
def demo(call: Call[Config], folder: Path = typer.Argument(Path("demo"), help="folder to make")) -> None:
    """Make a project folder from real tissue and run the main job on it."""
    from heads.demo import run_demo

    def fill(config: Config, project: Path) -> ExtractionReport:
        return _extract(Call(config, project, call.as_json))

    call.answer(run_demo(folder, fill, call.tell))


@app.callback(invoke_without_command=True)
def _main(version: bool = typer.Option(False, "--version", help="print the version")) -> None:
    if version:
        from featstore import __version__

        print(f"featstore {__version__}")
        raise typer.Exit


if __name__ == "__main__":
    app()
