"""`packcli eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from packcli import console, log
from packcli.cli.options import DEFAULT_RUNS, Json, Runs, Unsafe, app


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
