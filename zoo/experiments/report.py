"""The report: what the papers claim, and whether it holds here. Made of the records alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from zoo.experiments._experiment import Record
from zoo.experiments._failures import Records, failures
from zoo.experiments._tables import Difference, difference, mean
from zoo.experiments.many import standing
from zoo.experiments.stability import spread
from zoo.train import write_atomically

HOLDS, OPEN, AGAINST, NONE = "settled: it holds here", "not settled", "contradicted here", "not run"
FLAT = 0.02
"""How many points (as a share) an accuracy may fall and be called flat."""


@dataclass(frozen=True)
class Answer:
    """What the records say to a claim.

    Attributes:
        verdict: one of four.
        text: the numbers.
    """

    verdict: str
    text: str


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper, or of ours, that the records can settle.

    Attributes:
        source: whose.
        text: the claim.
        experiment: whose record is asked.
        answer: from that record.
    """

    source: str
    text: str
    experiment: str
    answer: Callable[[Record], Answer]


def _verdict(gap: Difference) -> str:
    return {"ahead": HOLDS, "behind": AGAINST}.get(gap.verdict, OPEN)


def _worst(gaps: Iterable[Difference]) -> str:
    return min((_verdict(g) for g in gaps), key=(AGAINST, OPEN, HOLDS).index)


def _against(record: Record, ours: str, theirs: str, **wanted: object) -> Difference:
    left, right = (record.where(matcher=m, repair="repair", **wanted) for m in (ours, theirs))
    return difference(left, right)


def _ahead_of(ours: str, *others: str, kind: str = "", n: int | None = None) -> Callable[[Record], Answer]:
    """Whether one matcher is ahead of others after REPAIR; the verdict is the worst of them.

    Args:
        ours: the matcher.
        others: what it is set against.
        kind: a part of the names of the settings that are looked at.
        n: how many networks are merged; any number.
    """

    def answer(record: Record) -> Answer:
        chosen = {} if n is None else {"n": n}
        settings = [s for s in record.values("setting", **chosen) if kind in s]
        gaps = {other: _against(record, ours, other, setting=settings, **chosen) for other in others}
        parts = []
        for other, gap in gaps.items():
            means = [_against(record, ours, other, setting=s, **chosen).value for s in settings]
            ahead, known = sum(v > 0 for v in means), sum(not math.isnan(v) for v in means)
            parts.append(f"against `{other}` {gap}, in the mean ahead in {ahead} of {known} settings")
        text = "; ".join(parts)
        return Answer(_worst(gaps.values()), text + (" (N averaged within a set)" if n is None else f" (N = {n})"))

    return answer


def _exchanged(record: Record) -> Answer:
    gaps = {}
    for matcher in ("universe", "weight-matching"):
        ours, theirs = (
            record.where(merge=f"{matcher}, experts {how}", repair="repair") for how in ("exchanged", "stay")
        )
        gaps[matcher] = difference(ours, theirs)
    return Answer(
        _worst(gaps.values()),
        "; ".join(f"`{m}`: exchanged against where they are {gap}" for m, gap in gaps.items())
        + " (N averaged within a set)",
    )


def _wider(record: Record) -> Answer:
    parts, verdicts = [], []
    for family in record.values("family"):
        widths = record.values("width", family=family)
        ends = []
        for width in (widths[-1], widths[0]):
            merged = record.where(family=family, width=width, matcher="universe", repair="repair")
            single = record.where(family=family, width=width, matcher="single models")
            singles = {k: mean([r for r in single if r["set"] == k]).value for k in {r["set"] for r in single}}
            ends.append([{**r, "setting": family, "gap": r["accuracy"] - singles[r["set"]]} for r in merged])
        gap = difference(ends[0], ends[1], "gap")
        verdicts.append(_verdict(gap))
        parts.append(
            f"{family}: the merge's distance to single models from width {widths[0]:g} to {widths[-1]:g} {gap}"
        )
    return Answer(_all(verdicts), "; ".join(parts))


def _flat(record: Record) -> Answer:
    parts, verdicts = [], []
    for setting in record.values("setting"):
        counts = record.values("n", setting=setting)
        if len(counts) < 3:
            continue
        gap = _change(record, setting, "universe", counts[0], counts[-1])
        if math.isnan(gap.margin):
            verdicts.append(OPEN)
        elif gap.value - gap.margin > -FLAT:
            verdicts.append(HOLDS)
        else:
            verdicts.append(AGAINST if gap.value + gap.margin < -FLAT else OPEN)
        parts.append(f"{record.title(setting)}: from N = {counts[0]} to {counts[-1]} {gap}")
    return Answer(_all(verdicts), "; ".join(parts) + f" (flat: a fall of at most {100 * FLAT:.0f} points)")


def _change(record: Record, setting: str, matcher: str, few: int, many: int) -> Difference:
    ends = [record.where(setting=setting, matcher=matcher, repair="repair", n=n) for n in (many, few)]
    late, early = ([{**r, "n": 0} for r in rows] for rows in ends)
    return difference(late, early)


def _holds_up(record: Record) -> Answer:
    """Whether CCA loses less from the fewest to the most networks than permutations do."""
    parts, verdicts = [], []
    for setting in record.values("setting"):
        counts = record.values("n", setting=setting)
        if len(counts) < 3:
            continue
        cells = []
        for theirs in ("weight-matching", "universe"):
            falls = {}
            for matcher in ("cca", theirs):
                few, many = (
                    {r["set"]: 0.0 for r in record.where(setting=setting, n=n)} for n in (counts[0], counts[-1])
                )
                for end, n in ((few, counts[0]), (many, counts[-1])):
                    for k in end:
                        end[k] = mean(record.where(setting=setting, n=n, set=k, matcher=matcher, repair="repair")).value
                falls[matcher] = [{"setting": setting, "set": k, "fall": many[k] - few[k]} for k in many if k in few]
            gap = difference(falls["cca"], falls[theirs], "fall")
            verdicts.append(_verdict(gap))
            cells.append(f"against that of `{theirs}` {gap}")
        parts.append(f"{record.title(setting)}, from N = {counts[0]} to {counts[-1]}: {', '.join(cells)}")
    return Answer(_all(verdicts), "the change of `cca` with N; " + "; ".join(parts))


def _cycles(record: Record) -> Answer:
    exact = record.where(matcher="universe")
    pairs = [r for r in record.where(matcher=("weight-matching, pair by pair", "pairwise, pair by pair")) if r["n"] > 2]
    if not exact or not pairs:
        return Answer(NONE, "no rows")
    worst = max(r["displaced"] for r in exact)
    apart = mean(pairs, "displaced")
    halfway = difference([r for r in exact if r["n"] > 2], pairs)
    verdict = HOLDS if worst == 0 and min(r["displaced"] for r in pairs) > 0 else AGAINST
    text = (
        f"the universe displaces {100 * worst:.0f} % in all {len(exact)} cycles, maps pair by pair {apart.percent()} "
        f"% in {len(pairs)}; accuracy halfway between a network and itself carried around: universe against pair by "
        f"pair {halfway}"
    )
    return Answer(verdict, text)


def _basin(record: Record) -> Answer:
    rows = {m: record.where(matcher=m, point="centre") for m in ("naive", "universe")}
    gap = difference(rows["naive"], rows["universe"], "barrier")
    left = mean(rows["universe"], "barrier")
    text = (
        f"the barrier at the mean of three networks falls by {gap.value:.2f} ± {gap.margin:.2f} nats ({gap.wins} of "
        f"{gap.sets} sets); {left.plain(2)} are left in the mean over settings"
    )
    return Answer(_verdict(gap), text)


def _steadier(*others: str) -> Callable[[Record], Answer]:
    """Whether the universe's accuracy differs less between repetitions than others'; the verdict is the worst of them."""

    def answer(record: Record) -> Answer:
        ours = spread(record, "universe")
        gaps = {other: difference(spread(record, other), ours, "deviation") for other in others}
        own = 100 * mean(ours, "deviation").value
        parts = [f"`{other}` against it {gap}" for other, gap in gaps.items()]
        text = f"the accuracy of `universe` deviates by {own:.2f} points over repetitions; " + "; ".join(parts)
        return Answer(_worst(gaps.values()), text)

    return answer


def _flattered(record: Record) -> Answer:
    aligned, unaligned = (record.where(matcher="merge-many", repair=r) for r in ("repair", "repair (unaligned)"))
    gap = difference(aligned, unaligned)
    return Answer(_verdict(gap), f"MergeMany repaired towards aligned against unaligned networks {gap}")


def _all(verdicts: list[str]) -> str:
    if not verdicts:
        return NONE
    return verdicts[0] if len(set(verdicts)) == 1 else OPEN


CLAIMS = (
    Claim(
        "C2M3, table 1",
        "Merging in the universe with REPAIR is ahead of MergeMany with REPAIR (.69 against .50, .62/.57, .87/.86, "
        ".46/.22).",
        "many",
        _ahead_of("universe", "merge-many", "merge-many, as published"),
    ),
    Claim(
        "on C2M3's code",
        "Repairing MergeMany with the statistics of unaligned models makes it worse than it is.",
        "many",
        _flattered,
    ),
    Claim("C2M3, width", "Wider networks merge better (.46 .74 .78 .88 .91 for w = 1 to 16).", "width", _wider),
    Claim(
        "C2M3, number of models",
        "The accuracy of the universe merge is flat from N = 2 to 10 (.78 to .80).",
        "many",
        _flat,
    ),
    Claim(
        "C2M3, cycle consistency",
        "Maps through the universe compose to the identity around cycles; maps found pair by pair do not, and then "
        "a network carried around is not in its own basin.",
        "cycle",
        _cycles,
    ),
    Claim(
        "C2M3, landscape", "Aligned networks are nearer to one basin than the networks as trained.", "landscape", _basin
    ),
    Claim(
        "here",
        "The universe with REPAIR is ahead of the other matchers by weights, repaired alike.",
        "many",
        _ahead_of("universe", "merge-many", "weight-matching", "pairwise", "synchronised"),
    ),
    Claim(
        "here",
        "Two networks: Frank-Wolfe in the universe is ahead of weight matching (Git Re-Basin), repaired alike.",
        "many",
        _ahead_of("universe", "weight-matching", n=2),
    ),
    Claim(
        "here",
        "The universe's merge depends less on the order of the units and on the seed than those of MergeMany and weight "
        "matching (by coordinate descent).",
        "stability",
        _steadier("merge-many", "weight-matching"),
    ),
    Claim(
        "here",
        "The universe on activations is ahead of pairwise activation matching, repaired alike.",
        "many",
        _ahead_of("universe, activations", "activation"),
    ),
    Claim(
        "here",
        "Merges are better where the experts of a list may be exchanged than where they stay, repaired alike.",
        "modules",
        _exchanged,
    ),
    Claim(
        "CCA Merge",
        "CCA is ahead of permutations, in the MLPs, of which every hidden layer admits a matrix.",
        "many",
        _ahead_of("cca", "weight-matching", "universe", "activation", kind="mlp"),
    ),
    Claim(
        "CCA Merge",
        "CCA is ahead of permutations by weights, everywhere (layers that admit no matrix, such as all that "
        "BatchNorm or LayerNorm follows, are permuted by activations).",
        "many",
        _ahead_of("cca", "weight-matching", "universe"),
    ),
    Claim(
        "CCA Merge",
        "CCA is ahead of permutations by activations, everywhere.",
        "many",
        _ahead_of("cca", "activation", "universe, activations"),
    ),
    Claim("CCA Merge", "CCA holds up as N grows where permutations fall.", "many", _holds_up),
)


# -------------------------------------------------------------------- page
def report(records: Records) -> str:
    """The page."""
    lines, numbers = [], []
    for number, claim in enumerate(CLAIMS, 1):
        record = records.get(claim.experiment)
        answer = claim.answer(record) if record is not None else Answer(NONE, "no record")
        lines.append(f"| {number} | {claim.source}: {claim.text} | **{answer.verdict}** |")
        numbers.append(f"{number}. **{answer.verdict}**: {answer.text}.{_source(claim.experiment, record)}")
    profiles = {r.profile for r in records.values()}
    total = sum(len(r.rows) for r in records.values())
    parts = [
        "# Report\n",
        "What the papers on merging many networks claim, and whether it holds on the networks of this repository. "
        "C2M3 is [arXiv 2405.17897](https://arxiv.org/abs/2405.17897), CCA Merge [arXiv "
        "2407.05385](https://arxiv.org/abs/2407.05385). Their networks are larger and were trained longer than "
        "those here, so a verdict is about *these* networks: it says that a claim carries over to them, or does "
        "not.\n",
        "| | claim | verdict |\n|--:|:--|:--|\n" + "\n".join(lines) + "\n",
        "Every difference below is paired by set of networks, with a 95 % confidence interval (Student's t over the "
        "sets, whose number is given). **Settled** means that the interval is on the claim's side of zero, "
        "**contradicted** that it is on the other, **not settled** everything else, also where the settings or the "
        "comparisons of one claim disagree. Nothing is corrected for the number of claims.\n",
        f"{total:,} measurements, profile {', '.join(sorted(profiles))}.\n",
        "## The numbers\n\n" + "\n".join(numbers) + "\n",
        *(f"[![{n}]({n}.svg)]({n}.md)\n" for n in records if any(c.experiment == n for c in CLAIMS)),
    ]
    if "many" in records:
        table_of = standing(records["many"], last=True)
        parts += ["## The universe against the permutation baselines\n", table_of, failures(records)]
    parts.append("## Pages\n\n" + "\n".join(f"- [{name}]({name}.md)" for name in records) + "\n")
    parts.append("```bash\npython -m zoo.experiments report\n```\n")
    return "\n".join(parts)


def _source(name: str, record: Record | None) -> str:
    """Where a claim's numbers are from: the figure, the number of runs, the command."""
    if record is None:
        return ""
    sets = len({(r["setting"], r["set"]) for r in record.rows})
    size = "" if record.profile == "full" else f" --{record.profile}"
    return (
        f" [Figure and tables]({name}.md); {len(record.rows):,} measurements on {sets} sets of networks in "
        f"{len(record.values('setting'))} settings; `python -m zoo.experiments {name}{size}`"
    )


def write(out: Path, names: tuple[str, ...]) -> Path:
    """Write the report on the records that are there."""
    records = {n: Record.read(out / f"{n}.json") for n in names if (out / f"{n}.json").is_file()}
    text = report(records)
    path = out / "index.md"
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, "utf-8"))
    return path
