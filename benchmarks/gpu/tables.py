"""The results of `train_gpu.py` as Markdown. Pure: what a cut run left in results.json makes tables too."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

GIB = 1 << 30
Record = dict[str, Any]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def report(results: Record) -> str:
    """All tables; a part without results says so."""
    records = results["records"]
    parts = [
        f"**{results['label']}**\n",
        environment(results),
        "## Attention: isolation, error rule, time\n",
        backends(of(records, "attention")),
        "## Start-up probe: a model of two layers, and the models trained\n",
        probes(of(records, "probe")),
    ]
    for shape in results["shapes"]:
        parts += [f"## {shape}-shaped model: {results['label']}\n", steps(results, shape)]
    parts += [costs(results), configurations(records), failures(results)]
    return "\n".join(part for part in parts if part)


def of(records: list[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def environment(results: Record) -> str:
    [found] = of(results["records"], "environment") or [{}]
    versions = ", ".join(f"{name} {value}" for name, value in found.get("versions", {}).items() if value)
    lines = [
        f"{found.get('device', 'unknown')}; {versions}; Python {found.get('python')}; CUDA {found.get('cuda')}.",
        f"Attention by itself: {found.get('attention')}.",
        f"Documents: {results['lengths']}",
        f"Took {results['took_s']:.0f} s of {results['budget_s']:.0f} s.",
    ]
    return "\n".join(lines) + "\n"


# Attention ---------------------------------------------------------------------------------------------


def backends(records: list[Record]) -> str:
    header = [
        "heads of", "backend", "isolation, outputs", "gradients", "error packed", "one by one", "rule kept",
        "forward ms", "backward ms", "model TFLOP/s", "causal rows, TFLOP/s", "deterministic: gradients", "cost",
    ]  # fmt: skip
    rows = []
    for record in records:
        name = [record["shape"], record["backend"]]
        if (reason := record.get("refused") or record.get("failed")) is not None:
            rows.append([*name, reason, *[""] * (len(header) - 3)])
            continue
        worst = {way: max(record["error"][way].values()) for way in ("packed", "alone")}
        kept, speed = record["isolation"], record["speed"]
        across = kept["no_gradient_across"]
        rows.append(
            [
                *name,
                "bitwise" if kept["outputs_kept"] else "**LEAKS**",
                ("none across" if across else "**LEAK**")
                + (", bitwise" if kept["gradients_kept"] else ", not in fixed order"),
                f"{worst['packed']:.1e}",
                f"{worst['alone']:.1e}",
                "yes" if record["error"]["kept"] else "**NO**",
                *(_range(speed[way]) for way in ("forward", "backward")),
                f"{speed['model_tflops']:.3g}",
                f"{record['speed_causal_rows']['model_tflops']:.3g}",
                *_deterministic(record),
            ]
        )
    return table(header, rows)


def _deterministic(record: Record) -> list[str]:
    found = record["deterministic"]
    if "failed" in found:
        return [found["failed"][:80], "-"]
    plain, steady = (
        each["forward"]["ms"] + each["backward"]["ms"] for each in (record["speed"], record["deterministic"])
    )
    return ["bitwise" if found["gradients_kept"] else "**not bitwise**", f"{steady / plain - 1:+.0%}"]


def _range(found: Record) -> str:
    return f"{found['ms']:.3g} ({found['least_ms']:.3g} to {found['most_ms']:.3g})"


def probes(records: list[Record]) -> str:
    header = [
        "shape",
        "backend",
        "arm",
        "documents of a row meet",
        "error packed",
        "one by one",
        "to eager attention",
    ]
    rows = []
    for record in records:
        name = [record["shape"], record["backend"], record["arm"]]
        if "failed" in record:
            rows.append([*name, f"**{record['failed']}**", *[""] * 3])
            continue
        numbers = [record.get(key) for key in ("parity", "parity_unpacked", "attention")]
        shown = ["-" if number is None else f"{number:.1e}" for number in numbers]
        rows.append([*name, "yes, as asked" if record["crosses"] else "no", *shown])
    return table(header, rows)


# Steps -------------------------------------------------------------------------------------------------


def steps(results: Record, shape: str) -> str:
    records = [record for record in of(results["records"], "run") if record["shape"] == shape]
    found = [record for record in records if record.get("records")]
    if not found:
        return "No result.\n"
    peak = (of(results["records"], "environment") or [{}])[0].get("peak_flops")
    roofs = {each["layers"]: each for each in of(results["records"], "roofline") if each["shape"] == shape}
    header = [
        "run", "useful tokens/s", "padded tokens/s", "filled", "documents a step", "s/step (range; n)",
        "MFU strict", "MFU full square", "of the roofline", "peak GiB", "SM MHz, W", "settings",
    ]  # fmt: skip
    rows = []
    for record in found:
        number = summary(record)
        mfu = ["-", "-"]
        if peak:
            mfu = [f"{number[key] / peak:.1%}" for key in ("flops_per_s", "full_square_per_s")]
        roof = roofs.get(record["layers"])
        whole = roof is not None and record["name"].startswith("best_fit") and "lengths" not in record
        rows.append(
            [
                record["name"],
                f"{number['tokens_per_s']:,.0f}",
                f"{number['slots_per_s']:,.0f}",
                f"{number['filled']:.1%}",
                f"{number['documents']:.0f}" if number["documents"] else "-",
                f"{number['s']:.3f} ({number['least_s']:.3f} to {number['most_s']:.3f}; {number['n']})",
                *mfu,
                f"{roof['total_s'] / number['s']:.0%}" if roof and whole else "-",
                f"{record['peak_bytes'] / GIB:.1f}" if "peak_bytes" in record else "-",
                record.get("card", "-"),
                settings(record),
            ]
        )
    remark = (
        f"{results['layers'][shape]} layers. A step: 4 micro-batches of at most 2 x max_length slots, clipping, "
        "AdamW. MFU strict counts useful tokens, attention as masked and the head at labels; full square as "
        "torchtitan does. Aims of `best_fit` at 8B on an H200: 90% of the roofline, MFU strict 50%.\n"
    )
    return "\n".join([table(header, rows), remark, *(roofline(roof) for roof in roofs.values()), parts_of(found)])


def settings(record: Record) -> str:
    """How the model was laid out."""
    if (train := record.get("train")) is None:
        return "see below"
    compiled = "compiled" if train["compile"] else "not compiled"
    state = record.get("optimizer_state", train["optimizer_state"])
    return f"{compiled}, checkpointing {train['checkpointing']}, moments {state}"


def summary(record: Record) -> Record:
    """Rates over all timed steps, and the median step."""
    done = record["records"]
    seconds = [step["s"] for step in done]
    total = {key: sum(step.get(key, 0) for step in done) for key in ("tokens", "slots", "flops", "documents")}
    full = sum(step["flops_full_square"] for step in done)
    # Where steps are alike the median stands for them, so that one hiccup does not decide a short run.
    alike = len({step["slots"] for step in done}) == 1
    whole = median(seconds) * len(done) if alike else sum(seconds)
    return {
        "s": median(seconds), "least_s": min(seconds), "most_s": max(seconds), "n": len(done),
        "tokens_per_s": total["tokens"] / whole, "slots_per_s": total["slots"] / whole,
        "filled": total["tokens"] / total["slots"], "documents": total["documents"] / len(done),
        "flops_per_s": total["flops"] / whole, "full_square_per_s": full / whole,
    }  # fmt: skip


def roofline(found: Record) -> str:
    parts = ("products", "head", "attention", "traffic")
    seconds = ", ".join(f"{name} {found[f'{name}_s']:.4g}" for name in parts)
    rates = "; ".join(
        f"{name} {', '.join(f'{rate:.3g}' for rate in ways.values())}"
        for name, ways in found["product_tflops"].items()
    )
    return (
        f"Roofline of one step of `best_fit`, each part timed alone, s: {seconds}; in all {found['total_s']:.4g}. "
        f"Attention: {found['backend']}. Copying moves {found['copy_bytes_per_s'] / 1e12:.3g} TB/s. "
        f"Products, TFLOP/s forward, by input, by weight: {rates}.\n"
    )


def parts_of(found: list[Record]) -> str:
    header = ["run", "gradient s", "clip s", "update s", "graphs compiled meanwhile", "micro-batch rows"]
    rows = [
        [
            record["name"],
            *(
                f"{median(step[key] for step in record['records']):.3f}"
                for key in ("gradient_s", "clip_s", "update_s")
            ),
            str(record["compiled_while_timed"]),
            str(record["micro_batch"]),
        ]
        for record in found
        if "gradient_s" in record["records"][0]
    ]
    return table(header, rows) if rows else ""


# What switches cost --------------------------------------------------------------------------------------


def costs(results: Record) -> str:
    """Each switch against the same arm without it, same process, same model."""
    rows = []
    for record in of(results["records"], "run"):
        against = record.get("against")
        if not against or not record.get("records"):
            continue
        plain = [
            each
            for each in of(results["records"], "run")
            if each["name"] == against
            and each["shape"] == record["shape"]
            and each.get("records")
            and {**each["train"], "compile": 0} == {**record["train"], "compile": 0}
        ]
        if plain:
            one, other = (summary(each)["s"] for each in (record, plain[0]))
            rows.append([record["shape"], record["name"], against, f"{one / other - 1:+.1%}"])
    header = ["shape", "run", "against", "time of a step"]
    return "## What switches cost\n\n" + table(header, rows) if rows else ""


def configurations(records: list[Record]) -> str:
    lines = []
    for record in of(records, "run"):
        if "configuration" in record and record.get("records"):
            given, versions = json.dumps(record["configuration"]), json.dumps(record["versions"])
            lines.append(f"{record['name']}, {record['shape']}: `{given}`; `{versions}`\n")
    return "## The peer's configuration\n\n" + "\n".join(lines) if lines else ""


def failures(results: Record) -> str:
    lines = [
        f"- {record['kind']} {record.get('shape', '')} {record.get('name', record.get('part', ''))}: {reason}"
        for record in results["records"]
        if record["kind"] != "attention" and (reason := record.get("failed") or record.get("skipped")) is not None
    ]
    lines += [f"- {attempt}" for attempt in results["attempts"]]
    return "## Not measured, and why\n\n" + "\n".join(lines) + "\n" if lines else ""


if __name__ == "__main__":
    print(report(json.loads(Path(sys.argv[1]).read_text())))
