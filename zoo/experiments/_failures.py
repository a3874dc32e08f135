"""When merging fails: the part of the report that says where, made of the records alone."""

from __future__ import annotations

from collections.abc import Mapping

from zoo.experiments._experiment import Record
from zoo.experiments._tables import mean, table

Records = Mapping[str, Record]
HEADS = {"own": "their own heads", "mean": "one head for all labels"}


def failures(records: Records) -> str:
    """Where even the best merge is bad, what hangs on the repair alone, what cannot be merged."""
    many = records["many"]
    lines = []
    for setting in many.values("setting"):
        n = max(many.values("n", setting=setting))
        single = mean(many.where(setting=setting, n=n, matcher="single models"))
        rows = [r for r in many.where(setting=setting, n=n) if r["matcher"] not in ("single models", "ensemble")]
        keys = {(r["matcher"], r["repair"]) for r in rows if r["repair"] != "repair (unaligned)"}
        scores = {k: mean([r for r in rows if (r["matcher"], r["repair"]) == k]) for k in keys}
        universe = scores["universe", "repair"]
        best = max(sorted(scores), key=lambda k: scores[k].value)
        lost = 100 * (single.value - scores[best].value)
        if lost > 5:
            lines.append(
                [
                    f"{many.title(setting)}, N = {n}",
                    single.percent(),
                    universe.percent(),
                    f"{scores[best].percent()} ({best[0]}, {best[1]})",
                    f"{lost:.1f}",
                ]
            )
    head = ["setting", "single models", "universe, repaired", "best of everything", "points lost"]
    text = "## When merging fails\n\nEven the best merge (picked after the fact) loses more than five points in:\n\n"
    parts = [text + (table(head, lines) if lines else "None.\n")]
    parts += [*_bare(many), *_other(records)]
    return "\n".join(parts)


def _bare(many: Record) -> list[str]:
    out = []
    for setting in many.values("setting"):
        n = max(many.values("n", setting=setting))
        bare = mean(many.where(setting=setting, n=n, matcher="universe", repair="none"))
        after = mean(many.where(setting=setting, n=n, matcher="universe", repair="repair"))
        if bare.value < after.value - 0.1:
            out.append(
                f"- {many.title(setting)}, N = {n}: without a repair the universe merge is at {bare.percent()} %, "
                f"with one at {after.percent()} %."
            )
    return ["More than ten points depend on the repair alone in:\n", *out, ""] if out else []


def _other(records: Records) -> list[str]:
    out = []
    if "tasks" in records:
        record = records["tasks"]
        for setting in record.values("setting"):
            single = mean(record.where(setting=setting, matcher="single models"))
            keys = sorted({(r["matcher"], r["heads"]) for r in record.where(setting=setting, repair="repair")})
            found = {k: mean(record.where(setting=setting, matcher=k[0], heads=k[1], repair="repair")) for k in keys}
            for heads in HEADS:
                mine = {k: v for k, v in found.items() if k[1] == heads}
                if mine:
                    best = max(mine, key=lambda k: mine[k].value)
                    out.append(
                        f"- {record.title(setting)}: each network alone on its task {single.percent()} %, the best "
                        f"merge with {HEADS[heads]} "
                        f"{mine[best].percent()} % ({best[0]})."
                    )
    parts = ["Networks that have learnt different things ([tasks](tasks.md)):\n", *out, ""] if out else []
    refused = [r for r in records["widths"].rows if r["matcher"] == "refused"] if "widths" in records else []
    if refused:
        parts += ["Networks of other widths ([widths](widths.md)) are refused where padding would change them:\n"]
        parts += [f"- `{r['narrow']}` in `{r['setting']}`: {r['reason']}." for r in refused]
        parts += [""]
    return parts
