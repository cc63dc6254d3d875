"""Do the paper's printed step counts follow from its released code? `python benchmarks/paper_steps.py`.

`--lengths` prints the fitted lognormals as `packcli/papersteps.yaml` ships them.

Prints the tables of docs/paper-steps.md. A consistency check on drawn lengths, never a reproduction: the real
conversations are not here. Two cells of each data set are fitted, by the mean and the spread of a distribution;
the rest is by construction or predicted. Nothing is random but the order of documents, seed 0.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtri

from packcli.packing import Ints, next_fit_decreasing
from packcli.papersteps import allowed_rows, arms, datasets, expected_steps, models, total_steps
from packcli.released import concat, first_fit_decreasing, windows

MAX_LENGTH, WINDOW, WORKERS = 4096, 1000, 64
SHORTEST, LONGEST = (
    30,
    131_072,
)  # an empty chat rendered; the context of the largest model that may have written one
TOLERANCE = 0.005  # a fit may miss each of its two printed counts by this share
TULU_DOCUMENTS = 326_154  # as published; the only choice in the 70B cell's range that needs no guess
# Workers simulated where the last row does not matter; each has the windows it would have in the whole.
COARSE = {"wildchat_gpt4": 64, "tulu": 16, "wildchat": 8, "open_source_1m": 4}
SPREADS = {"lognormal": (0.15, 2.4), "weibull": (0.15, 2.4), "log_logistic": (0.08, 0.95)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A distribution, fitted, and what the released code does with it. Shares are of documents or of tokens."""

    family: str
    mean: float  # tokens
    spread: float
    median: float
    random_rows: int
    greedy_rows: int
    random_lost: float  # tokens in the remainders of windows
    greedy_lost: float  # tokens in over-long documents
    documents_lost: float
    padding_truncated: float  # tokens beyond max_length


def quantile(family: str, share: NDArray[np.float64], spread: float) -> NDArray[np.float64]:
    """Lengths up to a factor; a larger spread has a heavier tail.

    lognormal: spread is sigma. weibull: 1 / shape, so 1 is the exponential; the lightest tail of the three.
    log_logistic: 1 / shape; a power law's tail, the heaviest.
    """
    match family:
        case "lognormal":
            shape: NDArray[np.float64] = np.exp(spread * ndtri(share))
            return shape
        case "weibull":
            return (-np.log1p(-share)) ** spread
        case _:
            return (share / (1 - share)) ** spread


def draw(family: str, num_documents: int, mean: float, spread: float) -> Ints:
    """Evenly spaced quantiles in random order: the distribution without the luck of the draw. `[N] int64`."""
    shape = quantile(family, _shares(num_documents), spread)
    lengths = np.clip(factor(shape, mean) * shape, SHORTEST, LONGEST)
    return np.random.default_rng(0).permutation(np.rint(lengths).astype(np.int64))


def _shares(num_documents: int) -> NDArray[np.float64]:
    return (np.arange(num_documents) + 0.5) / num_documents


def factor(shape: NDArray[np.float64], mean: float) -> float:
    """What `shape` is multiplied by to have that mean once it is cut to the shortest and the longest length."""

    def miss(log_factor: float) -> float:
        return float(np.clip(np.exp(log_factor) * shape, SHORTEST, LONGEST).mean() - mean)

    low = np.log(mean / shape.mean()) - 1
    return float(np.exp(brentq(miss, low, low + 12, xtol=1e-7)))


def parameters(dataset: str, near: float) -> dict[str, float]:
    """The lognormal of a data set as it is shipped: its median before lengths are cut. `near`: as in `fit`."""
    fitted, count = fit(dataset, "lognormal", near=near), documents(dataset)
    median = factor(quantile("lognormal", _shares(count), fitted.spread), fitted.mean)
    return {"documents": count, "median": round(median, 1), "sigma": round(fitted.spread, 4)}


def documents(dataset: str) -> int:
    """Conversations: the middle of what both models' padding rows allow (padding has one a row)."""
    if dataset == "tulu":
        return TULU_DOCUMENTS
    return middle(dataset, "padding_released", models())


def common_rows(dataset: str, arm: str, of: tuple[str, ...]) -> tuple[int, int]:
    """First and last number of rows that gives all these models' printed counts, those that none gives aside."""
    ranges = [found for model in of if (found := allowed_rows(dataset, model, arm))]
    return max(first for first, _ in ranges), min(last for _, last in ranges)


def middle(dataset: str, arm: str, of: tuple[str, ...]) -> int:
    """The middle of `common_rows`."""
    return sum(common_rows(dataset, arm, of)) // 2


def released_rows(lengths: Ints, workers: int) -> int:
    """Rows of the released "greedy"."""
    return first_fit_decreasing(lengths, MAX_LENGTH, windows(len(lengths), WINDOW, workers)).num_rows


def truncating_rows(lengths: Ints, workers: int) -> int:
    """Rows had the released "greedy" cut over-long documents instead of losing them."""
    return released_rows(np.minimum(lengths, MAX_LENGTH), workers)


def next_fit_rows(lengths: Ints, _: int) -> int:
    """Rows of "greedy" as the paper's text has it: next-fit decreasing, the whole set, over-long documents cut."""
    return next_fit_decreasing(np.minimum(lengths, MAX_LENGTH), MAX_LENGTH, np.random.default_rng(0)).num_rows


RULES = {
    "as released": released_rows,
    "released, truncating": truncating_rows,
    "next-fit decreasing": next_fit_rows,
}


def with_random_rows(family: str, num_documents: int, spread: float, rows: float, workers: int) -> Ints:
    """Lengths of that spread whose mean makes "random" of the released code yield `rows`, to a row or so."""
    bounds = windows(num_documents, WINDOW, workers)
    tokens = (rows + (len(bounds) - 1) / 2) * MAX_LENGTH  # half a row is lost in each window
    for _ in range(3):
        lengths = draw(family, num_documents, tokens / num_documents, spread)
        tokens += (rows - concat_rows(lengths, bounds)) * MAX_LENGTH
    return lengths


def concat_rows(lengths: Ints, bounds: Ints) -> int:
    """`concat(...).num_rows` without making the rows: many calls, and a test holds them equal."""
    ends = np.concatenate([[0], np.cumsum(lengths)])[bounds]
    return int((np.diff(ends) // MAX_LENGTH).sum())


def fit(
    dataset: str, family: str, rule: str = "as released", *, workers: int = WORKERS,
    random_by: float = 1.0, greedy_by: float = 1.0, near: float | None = None,
) -> Fit:  # fmt: skip
    """Mean and spread that give the 8B rows of both packing arms, times `random_by` and `greedy_by`.

    `workers` fewer than 64 simulates their part of the data. `near`: a spread known to within 3%. Raises
    ValueError where no spread of the family does it.
    """
    part = workers / WORKERS
    num_documents = documents(dataset) * workers // WORKERS
    random_rows = middle(dataset, "random_released", ("llama3_8b",)) * part * random_by
    greedy_rows = middle(dataset, "greedy_released", ("llama3_8b",)) * part * greedy_by

    def miss(spread: float) -> float:
        return RULES[rule](lengths_at(spread), workers) - greedy_rows

    def lengths_at(spread: float) -> Ints:
        return with_random_rows(family, num_documents, spread, random_rows, workers)

    low, high = SPREADS[family] if near is None else (0.97 * near, 1.03 * near)
    spread = brentq(miss, low, high, xtol=1e-4 if near is None else 1e-5, rtol=1e-4 if near is None else 1e-5)
    return measure(family, spread, lengths_at(spread), workers)


def measure(family: str, spread: float, lengths: Ints, workers: int) -> Fit:
    """What the released code makes of these lengths."""
    bounds = windows(len(lengths), WINDOW, workers)
    total = int(lengths.sum())
    greedy = first_fit_decreasing(lengths, MAX_LENGTH, bounds)
    placed = np.zeros(len(lengths), bool)
    placed[greedy.document] = True
    random_rows = concat(lengths, MAX_LENGTH, bounds).num_rows
    return Fit(
        family=family,
        mean=float(lengths.mean()),
        spread=spread,
        median=float(np.median(lengths)),
        random_rows=random_rows,
        greedy_rows=greedy.num_rows,
        random_lost=1 - random_rows * MAX_LENGTH / total,
        greedy_lost=float(lengths[~placed].sum() / total),
        documents_lost=float(1 - placed.mean()),
        padding_truncated=float(np.maximum(lengths - MAX_LENGTH, 0).sum() / total),
    )


def tulu_as_published() -> NDArray[np.float64]:
    """TULU 2's own account of its lengths (arXiv 2311.10702, section 2): evenly spaced quantiles, Llama-2 tokens.

    A quarter is below 230 tokens, a quarter above 1,464, 63,900 of 326,154 above 2,048; long conversations come
    in blocks of at most 4,196. In between: log-uniform below 1,464, uniform to 2,048, and above a power chosen
    so that the mean is the published 1,097. Its 20 documents above 8,192 are left out.
    """
    share = (np.arange(TULU_DOCUMENTS) + 0.5) / TULU_DOCUMENTS
    top = 1 - 63_900 / TULU_DOCUMENTS
    lengths = np.exp(np.interp(share, [0, 0.25, 0.75], np.log([40, 230, 1464])))
    lengths = np.where(share > 0.75, np.interp(share, [0.75, top], [1464, 2048]), lengths)
    within = np.clip((share - top) / (1 - top), 0, 1)

    def with_power(power: float) -> NDArray[np.float64]:
        return np.where(share > top, 2048 + (4196 - 2048) * within**power, lengths)

    return with_power(brentq(lambda power: with_power(power).mean() - 1097, 0.3, 3))


def tulu_prediction(order: str) -> tuple[float, Ints]:
    """Llama-3 tokens per Llama-2 token that give TULU's random rows, and the lengths in that order.

    shuffled: any document may follow any. by_source: ShareGPT's 35% first, as one block, in it all documents of
    the longest fifth.
    """
    published, rng = tulu_as_published(), np.random.default_rng(0)
    bounds = windows(TULU_DOCUMENTS, WINDOW, WORKERS)
    tokens = (middle("tulu", "random_released", ("llama3_8b",)) + (len(bounds) - 1) / 2) * MAX_LENGTH
    factor = float(tokens / published.sum())
    lengths = np.rint(published * factor).astype(np.int64)
    if order == "by_source":
        others = (114_046 - 63_900) / (TULU_DOCUMENTS - 63_900)
        sharegpt = (published > 2048) | (rng.random(TULU_DOCUMENTS) < others)
        return factor, np.concatenate([rng.permutation(lengths[sharegpt]), rng.permutation(lengths[~sharegpt])])
    return factor, rng.permutation(lengths)


def corners(dataset: str, family: str) -> list[Fit]:
    """Fits to the four corners of what the tolerance allows; more over-long documents mean fewer greedy rows."""
    steps = 1 - TOLERANCE, 1 + TOLERANCE
    return [
        fit(dataset, family, workers=COARSE[dataset], random_by=random_by, greedy_by=greedy_by)
        for random_by in steps
        for greedy_by in steps
    ]


def print_table(*columns: str) -> None:
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")


def print_rows() -> None:
    """What the printed counts say without any distribution."""
    print_table("data set", *arms(), "greedy rows cannot hold, % of tokens")
    for dataset in datasets():
        ranges = [common_rows(dataset, arm, models()) for arm in arms()]
        least_lost = 1 - ranges[2][1] / ranges[1][0]
        print(
            f"| {dataset} | {' | '.join(f'{first:,} to {last:,}' for first, last in ranges)} "
            f"| {f'at least {100 * least_lost:.1f}' if least_lost > 0 else 'no bound'} |"
        )


def print_cells(fits: dict[str, Fit]) -> None:
    names = "printed", "from the fit", "difference", "role"
    print_table("data set", "arm", *(f"{model}: {name}" for model in ("8B", "70B") for name in names))
    for dataset, fitted in fits.items():
        rows = documents(dataset), fitted.random_rows, fitted.greedy_rows
        for arm, num_rows in zip(arms(), rows, strict=True):
            cells = []
            for model in models():
                printed, steps = expected_steps(dataset, model, arm), total_steps(num_rows, model)
                role = "fitted" if model == "llama3_8b" else "out of sample"
                if arm == "padding_released":
                    role = "published size" if dataset == "tulu" else "by construction"
                cells.append(f"{printed:,} | {steps:,} | {steps - printed:+,} | {role}")
            print(f"| {dataset} | {arm} | {' | '.join(cells)} |")


def print_fits(dataset: str, fitted: Fit, allowed: list[Fit]) -> None:
    def span(of: str) -> str:
        values = [100 * getattr(one, of) for one in (fitted, *allowed)]
        return f"{100 * getattr(fitted, of):.1f} ({min(values):.1f} to {max(values):.1f})"

    spreads = [one.spread for one in allowed]
    print(
        f"| {dataset} | {fitted.family} | {fitted.mean:,.0f} | {fitted.median:,.0f} "
        f"| {fitted.spread:.3f} ({min(spreads):.2f} to {max(spreads):.2f}) | {span('greedy_lost')} "
        f"| {span('documents_lost')} | {span('random_lost')} | {span('padding_truncated')} |",
        flush=True,
    )


def print_alternatives(dataset: str, near: Fit) -> None:
    """What the other rules make of the lognormal fit, and the lognormal that they would need."""
    workers = COARSE[dataset]
    num_documents = documents(dataset) * workers // WORKERS
    lengths = draw("lognormal", num_documents, near.mean, near.spread)
    printed = expected_steps(dataset, "llama3_8b", "greedy_released")
    for rule in list(RULES)[1:]:
        steps = total_steps(round(RULES[rule](lengths, workers) * WORKERS / workers), "llama3_8b")
        needs = fit(dataset, "lognormal", rule, workers=workers)
        print(
            f"| {dataset} | {rule} | {printed:,} | {steps:,} ({steps / printed - 1:+.0%}) | {needs.spread:.2f} "
            f"| {needs.median:,.0f} | {100 * needs.documents_lost:.1f} | {100 * needs.padding_truncated:.0f} |",
            flush=True,
        )


def print_tulu() -> None:
    print_table("order of TULU's published lengths", "rule", "8B steps", "printed", "difference")
    printed = expected_steps("tulu", "llama3_8b", "greedy_released")
    for order in ("shuffled", "by_source"):
        factor, lengths = tulu_prediction(order)
        for rule, pack in RULES.items():
            steps = total_steps(pack(lengths, WORKERS), "llama3_8b")
            print(f"| {order}, x{factor:.3f} | {rule} | {steps:,} | {printed:,} | {steps / printed - 1:+.1%} |")


def print_lengths() -> None:
    for dataset in datasets():
        found = parameters(dataset, fit(dataset, "lognormal", workers=COARSE[dataset]).spread)
        print(f"    {dataset}: {{{', '.join(f'{key}: {value}' for key, value in found.items())}}}", flush=True)


def main() -> None:
    if "--lengths" in sys.argv[1:]:
        print_lengths()
        return
    print_rows()
    print_table(
        "data set", "family", "mean", "median", "spread", "greedy loses, % of tokens", "% of conversations",
        "random loses, % of tokens", "padding truncates, % of tokens",
    )  # fmt: skip
    best: dict[str, Fit] = {}
    for dataset in datasets():
        for family in SPREADS:
            rough = fit(dataset, family, workers=COARSE[dataset])
            fitted = fit(dataset, family, near=rough.spread)
            print_fits(dataset, fitted, corners(dataset, family))
            best.setdefault(dataset, fitted)
    print_cells(best)
    print_table(
        "data set", "rule", "printed", "with the fit above", "spread it needs", "median", "over-long, %",
        "beyond 4,096, % of tokens",
    )  # fmt: skip
    for dataset, near in best.items():
        print_alternatives(dataset, near)
    print_tulu()


if __name__ == "__main__":
    main()
