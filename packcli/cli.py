"""The command line: parse, call one function, print. The only place that catches a `PackcliError`.

Results go to stdout, progress and errors to stderr. Heavy libraries load inside commands, so `--help` is quick.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from packcli import __version__, console, log
from packcli.errors import ConfigError, IntegrityError, LeftError, MissingError, OutOfMemoryError, PackcliError
from packcli.processes import GRACE_S

if TYPE_CHECKING:
    from packcli.launch.cluster import Outcome, View
    from packcli.launch.profile import Profile
    from packcli.plan import Plan
    from packcli.report.records import Report
    from packcli.store import Store

app = typer.Typer(
    help="Should I pack or pad my fine-tuning data, how, and what does it cost?",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# click's, of which some versions of typer carry a copy of their own.
_UsageError: Any = typer.BadParameter.__base__

SweepFile = Annotated[
    Path, typer.Argument(metavar="SWEEP", show_default=False, help="A sweep file, such as sweeps/tiny.yaml.")
]
Only = Annotated[
    list[str] | None, typer.Option("--only", metavar="AXIS=VALUE", help="Only matching cells. Repeatable.")
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a dotted key. Repeatable.")
]
MaxCells = Annotated[
    int | None,
    typer.Option("--max-cells", metavar="N", min=1, help="Refuse a sweep of more cells. [default: 10000]"),
]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="The run directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Processes = Annotated[
    int | None,
    typer.Option("--nproc-per-node", metavar="N", min=1, help="Processes of one training. [default: one a GPU]"),
]
Grace = Annotated[
    float, typer.Option("--grace", metavar="S", min=0, help="Seconds a stopped training has for its checkpoint.")
]
Fallback = Annotated[
    bool, typer.Option("--allow-fallback", help="If the newest checkpoint is damaged, take the one before.")
]
Unsafe = Annotated[
    bool, typer.Option("--unsafe-no-sandbox", help="Run code that the model writes without a sandbox.")
]
Format = Literal["table", "md", "csv", "latex", "json", "html", "ladder"]
DEFAULT_RUNS = Path("runs")
_AUDITED_ANEW = "an audit begins anew; what --out DIR already holds of configurations that were finished stays"


def _open(
    sweep: Path, sets: list[str] | None, only: list[str] | None, runs: Path, max_cells: int | None
) -> tuple[Plan, Store]:
    """(plan, store) of a sweep file."""
    from packcli import stages, sweepfile
    from packcli.store import Store

    store = Store(runs)
    store.check(writable=False)
    spec = sweepfile.load(sweep, sets or (), only or (), max_cells or sweepfile.MAX_CELLS)
    return stages.make_plan(spec, store), store


def _typed(sweep: Path, sets: list[str] | None, only: list[str] | None, runs: Path) -> str:
    """What chooses these cells on a command line, for the user to copy."""
    words = [str(sweep)]
    for option, values in (("--set", sets), ("--only", only)):
        words += [word for value in values or () for word in (option, value)]
    return shlex.join([*words, *(("--runs", str(runs)) if runs != DEFAULT_RUNS else ())])


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"packcli {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Should I pack or pad my fine-tuning data, how, and what does it cost?"""


@app.command()
def prepare(
    what: Annotated[
        str,
        typer.Argument(
            metavar="SWEEP|DATA",
            show_default=False,
            help="A sweep file; with --plan also data.",
        ),
    ],
    plan_only: Annotated[
        bool, typer.Option("--plan", help="Read lengths, print what each arm would make of them, write nothing.")
    ] = False,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="NAME_OR_DIR", help="With --plan DATA: the model's tokenizer."),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option("--template", help="With --plan DATA: llama3, chatml, plain or a Jinja file."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=2, help="With --plan DATA: tokens in a row. [default: 4096]")
    ] = None,
    show: Annotated[
        int | None,
        typer.Option("--show", metavar="N", min=1, help="Print N documents and the rows that hold them."),
    ] = None,
    draw: Annotated[
        Path | None, typer.Option("--draw", metavar="FILE.svg", help="Draw a few documents laid out by every arm.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option("--export", metavar="DIR", help="Write rows as a `datasets` directory.")
    ] = None,
    part: Annotated[
        str | None,
        typer.Option("--part", metavar="K/N", help="Tokenize the K-th of N parts only: for a job array."),
    ] = None,
    only: Only = None,
    set_: Sets = None,
    max_cells: MaxCells = None,
    runs: Runs = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Make the token stores and row indexes of all cells, and print the ledger: where every token went."""
    from packcli import views

    if views.is_data(what):
        if not plan_only:
            raise ConfigError(
                f"`{what}` is data, not a sweep file",
                f"see what packing would do with it: `packcli prepare {what} --plan`; or train on it: "
                f"`packcli sweep SWEEP --set data.source={what}`",
            )
        if only or export or part:
            raise ConfigError("--only, --export and --part need a sweep", "see `packcli prepare --help`")
        asked = views.data_plan(what, tokenizer, template, max_length or 4096, set_ or ())
        _look(asked, None, tokenizer or views.OWN_TOKENIZER, show, draw, json)
        return
    if tokenizer or template or max_length:
        raise ConfigError(
            "--tokenizer, --template and --max-length are for a data file with --plan",
            "with a sweep: --set model.tokenizer=... --set data.template=... --set data.max_length=...",
        )
    plan, store = _open(Path(what), set_, only, runs, max_cells)
    if plan_only:
        _look(plan, store, "that of each cell", show, draw, json)
    elif part:
        _prepared_part(plan, store, views.part_of(part), json)
    else:
        _prepare(plan, store, show, draw, export, json)


def _look(
    plan: Plan, store: Store | None, tokenizer: str, show: int | None, draw: Path | None, json: bool
) -> None:
    import tempfile

    from packcli import views
    from packcli.report import outlook

    document = views.outlook(plan, tokenizer, store)
    console.print_json(document) if json else console.show(outlook.render(document))
    if show or draw:
        with tempfile.TemporaryDirectory(prefix="packcli-") as scratch:
            sample, sampled = views.sampled(plan, max(show or 0, views.SAMPLE), Path(scratch))
            _view(sample, sampled, show, draw, json)


def _prepare(
    plan: Plan, store: Store, show: int | None, draw: Path | None, export: Path | None, json: bool
) -> None:
    from packcli import views
    from packcli.launch import local
    from packcli.report import ledger

    failures = local.run(plan, store, [("index", id_) for id_ in plan.indexes])
    document = ledger.collect(plan, store)
    if json:
        console.print_json(document)
    elif any(cell["ledger"] for cell in document["cells"]):
        console.show(ledger.table(document))
    if not failures:
        _view(plan, store, show, draw, json)
        for path in views.export(plan, store, export) if export else []:
            log.logger.info("exported to %s", path)
    console.finish(failures)


def _view(plan: Plan, store: Store, show: int | None, draw: Path | None, json: bool) -> None:
    from packcli import views

    if show and not json:
        console.show(views.show(plan, store, show))
    if draw:
        views.draw(plan, store, draw)
        log.logger.info("drawn: %s", draw)


def _prepared_part(plan: Plan, store: Store, part: tuple[int, int], json: bool) -> None:
    from packcli import views

    made = views.prepare_part(plan, store, part)
    if json:
        console.print_json(
            {"part": part[0] + 1, "parts": part[1], "tokens": {id_: {"shards": count} for id_, count in made}}
        )
        return
    for id_, count in made:
        own = len(range(part[0], count, part[1]))
        console.say(f"tokens {id_}: part {part[0] + 1} of {part[1]} is done ({own} of {count} shards)")
    console.say("when all parts are done, `packcli prepare` of the same sweep puts them together")


@app.command()
def train(
    sweep: SweepFile,
    nproc_per_node: Processes = None,
    nnodes: Annotated[int, typer.Option("--nnodes", min=1, help="Machines that run this command together.")] = 1,
    node_rank: Annotated[int, typer.Option("--node-rank", min=0, help="Which of them this is, from 0.")] = 0,
    rdzv_endpoint: Annotated[
        str | None, typer.Option("--rdzv-endpoint", metavar="HOST:PORT", help="Machine 0, and a free port there.")
    ] = None,
    grace: Grace = GRACE_S,
    allow_fallback: Fallback = False,
    only: Only = None,
    set_: Sets = None,
    max_cells: MaxCells = None,
    runs: Runs = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Train the selected cells here, each with all GPUs.

    Under torchrun (`torchrun --nproc-per-node N -m packcli train SWEEP`) it trains the same, but torchrun exits
    with 1 whatever went wrong.
    """
    from packcli import stages
    from packcli.launch import local, ranks
    from packcli.plan import Kind, closure
    from packcli.processes import die_with_parent

    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(os.getppid())  # torch's agent starts its workers in sessions of their own
    if node_rank >= nnodes or (nnodes > 1 and rdzv_endpoint is None):
        raise ConfigError(
            "several machines need --nnodes, --rdzv-endpoint, and a --node-rank below --nnodes",
            f"on machine K of 0 to {nnodes - 1}: --nnodes {nnodes} --node-rank K --rdzv-endpoint HOST:PORT",
        )
    plan, store = _open(sweep, set_, only, runs, max_cells)
    targets: list[tuple[Kind, str]] = [("train", id_) for id_ in plan.trains]
    stages_ = closure(plan, targets)
    missing = [s for s in stages_ if s[0] in ("tokens", "index") and store.state(*s) != "done"]
    if missing:
        raise ConfigError(
            f"{len(missing)} prepare stages are missing: training never tokenizes and never packs",
            f"run `packcli prepare {sweep}` first (with the same --only, --set and --runs)",
        )
    orders = [plan.trains[id_] for kind, id_ in stages_ if kind == "train"]
    failures: Iterable[Any] = ()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        stages.train_together(orders, store, fallback=allow_fallback)
        node_rank = int(os.environ["RANK"])
    elif nnodes > 1:
        processes, _ = ranks.processes_here(nproc_per_node)
        group = ranks.Group(processes, nnodes, node_rank, rdzv_endpoint, grace)
        failures = ranks.run_each(orders, store, group, ranks.Lines(), fallback=allow_fallback)
    else:
        stages.preflight(plan, store)
        failures = local.run(
            plan, store, targets, processes=nproc_per_node, grace_s=grace, fallback=allow_fallback
        )
    if node_rank == 0:
        _report(plan, store, "json" if json else "table")
    console.finish(failures)


@app.command("eval")
def evaluate(
    ckpt: Annotated[str, typer.Option("--ckpt", help="A Hugging Face checkpoint directory or hub id.")],
    tasks: Annotated[str, typer.Option("--tasks", help="Task names, comma-separated.")],
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Score the first N items only.")] = None,
    bench_data: Annotated[
        str | None,
        typer.Option("--bench-data", metavar="DIR", help="Directory of benchmark files; without it, the hub."),
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template/--no-chat-template", help="Prompt as chat turns, or as plain text.")
    ] = True,
    fewshot: Annotated[
        Literal["turns", "text"],
        typer.Option("--fewshot", help="With a chat template: examples as turns, or as text in one turn."),
    ] = "turns",
    engine: Annotated[
        Literal["hf", "vllm", "openai"], typer.Option("--engine", help="What writes the answers.")
    ] = "hf",
    base_url: Annotated[
        str | None,
        typer.Option(
            "--base-url", metavar="URL", help="The server that --engine openai asks. [default: OPENAI_BASE_URL]"
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Prompts at a time. [default: the fastest, found]")
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes", min=1, help="With --engine hf: as many hold the checkpoint. [default: one a GPU]"
        ),
    ] = None,
    unsafe_no_sandbox: Unsafe = False,
    judge: Annotated[
        str | None,
        typer.Option("--judge", metavar="MODEL|FILE.yaml", help="Who judges wildbench, mt_bench: docs/judge.md."),
    ] = None,
    judge_url: Annotated[
        str | None,
        typer.Option("--judge-url", metavar="URL", help="The judge's server. [default: OPENAI_BASE_URL, OpenAI]"),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="FILE", help="Another model's WildBench answers: WB-Reward, too."),
    ] = None,
    prices: Annotated[
        str | None, typer.Option("--prices", metavar="FILE.yaml", help="USD per million tokens of judges.")
    ] = None,
    max_cost_usd: Annotated[
        float | None, typer.Option("--max-cost-usd", metavar="X", min=0, help="Of the judge, for each task.")
    ] = None,
    probe_data: Annotated[
        str | None,
        typer.Option("--probe-data", metavar="SOURCE", help="Conversations for `probes`. [default: a toy corpus]"),
    ] = None,
    before: Annotated[
        str | None,
        typer.Option("--before", metavar="DIR_OR_HUB_ID", help="For `probes`: the checkpoint before training."),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option("--figures", metavar="DIR", help="Draw what `probes` found there.")
    ] = None,
    runs: Runs = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Evaluate any Hugging Face checkpoint and print score and standard error of each task.

    Run again after an interruption, it goes on with the answers it has.
    """
    from packcli import evaluation
    from packcli.config import ProbeSpec
    from packcli.eval.judge import spec as judges
    from packcli.store import Store

    given = {"base_url": judge_url, "against": against, "prices": prices, "max_cost_usd": max_cost_usd}
    spec = evaluation.spec_of(
        tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
        limit=limit,
        bench_data=bench_data,
        chat_template=chat_template,
        fewshot=fewshot,
        engine=engine,
        batch_size=batch_size,
        processes=processes,
        base_url=base_url,
        judge=judges.named(judge, given),
        probes=ProbeSpec(source=probe_data, before=before),
    )
    done = evaluation.evaluate(ckpt, spec, Store(runs), unsafe_no_sandbox=unsafe_no_sandbox)
    if json:
        console.print_json(done.document())
    else:
        for part in done.shown():
            console.show(part)
    if figures is not None:
        for path in evaluation.draw(done, figures):
            log.logger.info("%s", path)
    console.finish(done.failures)


@app.command()
def sweep(
    sweep: SweepFile,
    on: Annotated[
        str, typer.Option("--on", metavar="local|PROFILE", help="Where to run: here, or a cluster's profile.")
    ] = "local",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print plan, states and estimate, and a cluster's jobs; do nothing.")
    ] = False,
    wait: Annotated[
        bool,
        typer.Option("--wait", help="On a cluster: follow until all has ended. Ctrl-C leaves the jobs alone."),
    ] = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="On a cluster: also what is quarantined, or ran out of memory.")
    ] = False,
    max_gpu_hours: Annotated[
        float | None,
        typer.Option("--max-gpu-hours", metavar="X", min=0, help="Run nothing if trainings are to take more."),
    ] = None,
    nproc_per_node: Processes = None,
    grace: Grace = GRACE_S,
    allow_fallback: Fallback = False,
    unsafe_no_sandbox: Unsafe = False,
    only: Only = None,
    set_: Sets = None,
    max_cells: MaxCells = None,
    runs: Runs = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Do all that is missing of a sweep, in dependency order, then print the table.

    On a cluster: submit all that is missing, and return; the jobs end with the table.
    """
    from packcli import stages
    from packcli.launch import cluster, local
    from packcli.launch.profile import load as load_profile

    profile = None if on == "local" else load_profile(Path(on))
    if profile is None and (wait or retry):
        raise ConfigError("--wait and --retry are for a cluster", "name its profile: --on slurm/PROFILE.yaml")
    if profile is not None and (nproc_per_node is not None or grace != GRACE_S):
        raise ConfigError(
            "--nproc-per-node and --grace are for this machine",
            f"on a cluster its profile says so: `processes_per_node` and `signal_s` in {on}",
        )
    plan, store = _open(sweep, set_, only, runs, max_cells)
    for problem in stages.preflight(plan, store):
        log.logger.warning("warning: %s; the rest of the sweep runs", problem.cause)
    if repeated := plan.repeated():
        first = " = ".join(" ".join(cell.labels.values()) for cell in repeated[0])
        log.logger.info("%d runs are named by several cells, and done once: %s", len(repeated), first)
    if dry_run:
        _dry_run(plan, store, profile, _typed(sweep, set_, None, runs), json, max_gpu_hours)
        return
    if max_gpu_hours is not None:
        from packcli.report import dryrun

        dryrun.check_budget(dryrun.collect(plan, store, _where(profile)), max_gpu_hours)
    if profile is not None:
        sizes = stages.source_bytes(plan)
        outcome = cluster.submit(
            plan,
            store,
            profile,
            sizes,
            retry=retry,
            fallback=allow_fallback,
            unsafe_no_sandbox=unsafe_no_sandbox,
        )
        _submitted(plan, store, outcome, _typed(sweep, set_, only, runs), wait=wait, json=json)
        return
    failures = local.run(
        plan,
        store,
        plan.stages(),
        processes=nproc_per_node,
        grace_s=grace,
        fallback=allow_fallback,
        unsafe_no_sandbox=unsafe_no_sandbox,
    )
    collected = _report(plan, store, "json" if json else "table")
    console.finish(failures)
    _refuse_damaged(collected)  # what cannot be read is not done


def _dry_run(
    plan: Plan, store: Store, profile: Profile | None, typed: str, json: bool, most: float | None
) -> None:
    from packcli.report import dryrun

    document, jobs = dryrun.collect(plan, store, _where(profile)), None
    if profile is not None:
        from packcli import stages
        from packcli.launch import cluster, graph, show

        view = _jobs_there(store)
        known = cluster.known(plan, store, profile, view, stages.source_bytes(plan))
        jobs = show.planned(plan, store, profile, graph.graph(plan, profile, known), typed)
    if json:
        console.print_json({**document, "jobs": jobs} if jobs else document)
    else:
        for part in dryrun.shown(document):
            console.show(part)
    if jobs is not None and not json:
        if not jobs["arrays"]:
            console.say("nothing to submit: all is done, has its job, or would only fail again (--retry)")
        else:
            console.show(show.graph_table(jobs))
            for line in show.scripts(jobs):
                console.say(line)
    if most is not None:
        dryrun.check_budget(document, most)


def _where(profile: Profile | None) -> tuple[int, int] | None:
    """Nodes of a training on a cluster, and the GPUs of each."""
    if profile is None:
        return None
    asked = profile.resources("train")
    return asked.nodes, asked.gpus_per_node


def _jobs_there(store: Store) -> View | None:
    """This run directory's jobs; None where there never was one, or no SLURM answers: the disk is still there."""
    from packcli.launch import cluster, slurm

    if not store.arrays():
        return None
    try:
        slurm.require()
        return cluster.View(store, patient=False)
    except MissingError as error:
        log.logger.warning("warning: %s; what is shown is what the disk knows", error.cause)
        return None


def _submitted(plan: Plan, store: Store, outcome: Outcome, typed: str, *, wait: bool, json: bool) -> None:
    from packcli.launch import cluster, show

    document = show.outcome(outcome)
    if json and not wait:
        console.print_json(document)
    for line in () if json else show.outcome_lines(document, typed):
        console.say(line, err=wait)
    if wait:
        from packcli.launch import follow

        follow.follow(plan, store)
        _report(plan, store, "json" if json else "table")
        console.finish(cluster.problems(plan, store, cluster.View(store)))
    console.finish(outcome.failures)


@app.command()
def cancel(
    sweep: SweepFile,
    only: Only = None,
    set_: Sets = None,
    max_cells: MaxCells = None,
    runs: Runs = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Stop what runs of a sweep, here or on a cluster: only its own processes and jobs."""
    from packcli.launch import cluster, local

    plan, store = _open(sweep, set_, only, runs, max_cells)
    processes = local.cancel(plan.name, store)
    for process in processes:
        log.logger.info("process %d: asked to write its checkpoints and stop", process)
    jobs = cluster.cancel(plan, store) if store.arrays() else []
    if json:
        console.print_json({"processes": processes, "jobs": jobs})
    else:
        console.say(f"{len(processes):,} processes of this machine asked to stop, {len(jobs):,} jobs cancelled")


@app.command()
def status(
    sweep: SweepFile,
    only: Only = None,
    set_: Sets = None,
    max_cells: MaxCells = None,
    runs: Runs = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Print the state of every cell, from disk and from SLURM, and why what failed did."""
    from packcli.launch import watch
    from packcli.report import status as statuses

    plan, store = _open(sweep, set_, only, runs, max_cells)
    document = statuses.collect(plan, store, watch.jobs(plan, store, _jobs_there(store)))
    if json:
        console.print_json(document)
        return
    console.show(statuses.table(document))
    for line in statuses.failure_lines(document):
        console.say(line)


@app.command()
def report(
    sweep: SweepFile,
    format_: Annotated[
        Format | None, typer.Option("--format", help="table (if not given), md, csv, latex, json, html, ladder.")
    ] = None,
    against: Annotated[
        Literal["paper"] | None, typer.Option("--against", help='Beside what "Packing Analysis" printed.')
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Also the health of each score, and every cost.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 4 when a file of the tables is damaged.")] = False,
    figures: Annotated[
        Path | None,
        typer.Option(
            "--figures", metavar="DIR", help="Also draw the pictures of the page there, and those of probes."
        ),
    ] = None,
    only: Only = None,
    set_: Sets = None,
    max_cells: MaxCells = None,
    runs: Runs = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Print the comparison table of what has run so far."""
    if json and format_ not in (None, "json"):
        raise ConfigError(f"`--json` and `--format {format_}` ask for two documents", "give one of them")
    with _no_garbage() as kept:
        plan, store = _open(sweep, set_, only, runs, max_cells)
        kept.append(plan)
        if store.begun().isdisjoint(plan.stages()):
            log.logger.warning("warning: nothing of `%s` has run in `%s` (see --runs)", plan.name, store.root)
        shown: Format = "json" if json else format_ or "table"
        collected = _report(plan, store, shown, against=against, everything=all_)
        kept.append(collected)
    if figures is not None:
        from packcli.report import figures as drawing
        from packcli.report import ladder, ladder_figure, probe_figures

        drawn = [
            *drawing.draw(plan, collected, store, figures),
            *ladder_figure.draw(ladder.climb(plan, collected), figures),
            *probe_figures.of_cells(collected, store, figures),
        ]
        for path in drawn:
            log.logger.info("%s", path)
    if strict:
        _refuse_damaged(collected)


@contextlib.contextmanager
def _no_garbage() -> Iterator[list[object]]:
    """Of ten thousand cells nothing can go before the end, and looking for what could takes half the time.

    What is put into the list is left to the system when the process ends: object by object that takes a second.
    """
    kept: list[object] = []
    kept.append(kept)  # so that nobody lets go of it
    gc.disable()
    try:
        yield kept
    finally:
        gc.freeze()
        gc.enable()


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A stage directory or checkpoint of ours.")],
) -> None:
    """Check every file of a store, a stage directory or a checkpoint against its manifest."""
    from packcli.store import verify as verify_directory

    console.say(f"{directory}: {verify_directory(directory)} files as their manifest says")


@app.command()
def doctor(
    sweep: Annotated[
        Path | None,
        typer.Argument(
            metavar="SWEEP", show_default=False, help="Also whether all that this sweep needs is here."
        ),
    ] = None,
    on: Annotated[
        str,
        typer.Option("--on", metavar="local|PROFILE", help="Also whether SLURM takes what a profile asks for."),
    ] = "local",
    only: Only = None,
    set_: Sets = None,
    max_cells: MaxCells = None,
    runs: Runs = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Say what this machine can do, what is missing, and what to type. Exits 6 when something is broken."""
    from packcli import fetch
    from packcli.doctor import command
    from packcli.doctor.sweep import Sweep
    from packcli.launch.profile import load as load_profile

    if sweep is None and (only or set_):
        raise ConfigError("--only and --set are for a sweep", "name its file: `packcli doctor SWEEP`")
    profile = None if on == "local" else load_profile(Path(on))
    asked = None
    if sweep is not None:
        plan, store = _open(sweep, set_, only, runs, max_cells)
        asked = Sweep(plan, store, fetch.remote(plan), here=profile is None)
    found = command.examine(runs, asked, profile)
    if json:
        console.print_json(command.document(found))
    else:
        console.show(command.table(found))
        for line in command.lines(found):
            typer.echo(log.plain(line))
    if not command.is_well(found):
        raise typer.Exit(6)


@app.command("audit")
def audit_(
    trl: Annotated[
        Path | None, typer.Option("--trl", metavar="FILE.yaml", help="Your configuration of `trl sft`.")
    ] = None,
    llamafactory: Annotated[
        Path | None,
        typer.Option(
            "--llamafactory", metavar="FILE.yaml", help="Your configuration of `llamafactory-cli train`."
        ),
    ] = None,
    axolotl: Annotated[
        Path | None, typer.Option("--axolotl", metavar="FILE.yaml", help="Your configuration of `axolotl train`.")
    ] = None,
    trainers: Annotated[
        list[str] | None,
        typer.Option("--trainer", metavar="NAME", help="Its reference configurations: packcli, trl, ..."),
    ] = None,
    envs: Annotated[
        Path, typer.Option("--envs", metavar="DIR", help="Holds NAME/, a virtual environment of each trainer.")
    ] = Path("audit-envs"),
    python: Annotated[
        list[str] | None,
        typer.Option("--python", metavar="NAME=PATH", help="The interpreter of a trainer's environment."),
    ] = None,
    install: Annotated[
        list[str] | None,
        typer.Option("--install", metavar="NAME", help="Make the environment of a trainer in --envs with pip."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Write findings, and a script that shows each `no` by itself."),
    ] = None,
    format_: Annotated[Literal["table", "md"], typer.Option("--format", help="table, md.")] = "table",
    strict: Annotated[bool, typer.Option("--strict", help="Exit 4 when an answer is no.")] = False,
    json: Json = False,
) -> None:
    """Feed crafted documents to other trainers, and to packcli, and read off what they really train.

    Without a file or a --trainer: the reference configurations of every trainer whose environment is there.
    """
    from packcli.audit import command, table
    from packcli.launch.local import terminable

    files = {"trl": trl, "llamafactory": llamafactory, "axolotl": axolotl}
    asked = command.Asked(files, trainers or [], envs, python or [], out)
    command.install(install or [], envs)
    try:
        with terminable(_AUDITED_ANEW):
            rows, failures = command.run(asked) if not install or asked.named else ([], [])
    except KeyboardInterrupt:
        console.complain("interrupted", _AUDITED_ANEW)
        sys.exit(130)
    if json:
        console.print_json(table.document(rows))
    elif rows:
        for line in table.warnings(rows):
            console.say(line)
        console.say(table.markdown(rows)) if format_ == "md" else console.show(table.drawn(rows))
        for line in table.evidence(rows):
            console.say(line)
    console.finish(failures)
    if strict and (wrong := sum(finding.answer == "no" for row in rows for finding in row.findings)):
        raise IntegrityError(f"{wrong} answers are no", "--out DIR writes a script that shows each by itself")


@app.command("fetch")
def fetch_(
    sweep: SweepFile,
    only: Only = None,
    set_: Sets = None,
    max_cells: MaxCells = None,
    runs: Runs = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Download model, data and benchmarks of a sweep, for nodes without internet."""
    from packcli import fetch

    plan, _ = _open(sweep, set_, only, runs, max_cells)
    items = fetch.fetch(plan)
    document = fetch.document(plan, items)
    console.print_json(document) if json else console.show(fetch.table(document))
    console.finish([item.error for item in items if item.error])


@app.command("import-config")
def import_config(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", show_default=False, help="A YAML of TRL, axolotl or LLaMA-Factory.")
    ],
    from_: Annotated[
        Literal["trl", "axolotl", "llamafactory"] | None,
        typer.Option("--from", help="Whose file it is. [default: seen by its keys]"),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="SWEEP", help="The sweep file to write; `-`: to stdout.")
    ] = Path("sweep.yaml"),
    processes: Annotated[
        int | None, typer.Option("--processes", metavar="N", min=1, help="That train together; no file says it.")
    ] = None,
    toy: Annotated[
        bool, typer.Option("--try", help="With packcli's toy model and chats instead of its own: for a laptop.")
    ] = False,
    json: Json = False,
) -> None:
    """Make a sweep of another trainer's configuration, and say what became of each of its keys."""
    from packcli.importers import convert

    to_stdout = str(out) == "-"
    if to_stdout and json:
        raise ConfigError("--json and `--out -` both want stdout", "name a file with --out")
    imported = convert.convert(file, from_, processes, toy=toy)
    text = convert.alone(imported) if to_stdout else ""
    written = [] if to_stdout else convert.write(imported, out)
    if json:
        console.print_json(imported.document(out))
        return
    typer.echo(text, nl=False)
    for line in convert.lines(imported, out, written):
        console.say(line, err=to_stdout)


def _report(
    plan: Plan, store: Store, format_: Format, *, against: Literal["paper"] | None = None, everything: bool = False
) -> Report:
    from packcli.report import ladder, paper, render, rows

    if format_ == "ladder" and not plan.ladders:
        raise ConfigError(f"`{plan.name}` names no ladder", "list arms in order under `ladders:` (docs/ladder.md)")
    collected = rows.collect(plan, store)
    beside = paper.compare(plan, collected) if against else None
    match format_:
        case "table":
            console.show(render.table(collected, beside, everything=everything))
        case "md":
            typer.echo(render.markdown(collected, beside, everything=everything))
        case "csv":
            typer.echo(render.csv_text(collected, beside), nl=False)
        case "latex":
            typer.echo(render.latex_text(collected, beside, everything=everything), nl=False)
        case "json":
            typer.echo(render.json_text(collected, beside, ladder.climb(plan, collected)))
        case "ladder":
            ladders = ladder.climb(plan, collected)
            console.show(render.drawn(ladder.sheets(ladders), ladder.notes(ladders)))
        case "html":
            from packcli.report.page import write

            typer.echo(write.document(plan, store, collected, beside, everything=everything), nl=False)
    return collected


def _refuse_damaged(collected: Report) -> None:
    if damaged := collected.damaged():
        raise IntegrityError("\n".join(damaged), "delete what is named and run the sweep again")


def main() -> None:
    """The console script."""
    log.setup()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: not every terminal takes every sign
    try:
        code = app(standalone_mode=False) or 0
    except LeftError as error:
        console.say(f"{error.cause}; {error.fix}", err=True)
        sys.exit(error.exit_code)
    except PackcliError as error:
        # torchrun's ranks all raise what they share; memory is each one's own.
        if os.environ.get("RANK", "0") == "0" or isinstance(error, OutOfMemoryError):
            console.complain(error.cause, error.fix)
        sys.exit(error.exit_code)
    except typer.Abort:
        code = 130
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "packcli"
        console.complain(error.format_message(), f"see `{command} --help`")
        code = 2
    if code == 130:  # typer makes this, or an Abort, of KeyboardInterrupt
        console.complain("interrupted", "run the same command again: it goes on where it was")
    sys.exit(code)
