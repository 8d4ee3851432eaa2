"""The arithmetic: medians, spreads, and ratios as medians over rounds, from a case of the JSON file."""

import itertools
from collections.abc import Sequence
from statistics import median, quantiles
from typing import Any

Row = dict[str, Any]


def taken(row: Row, measure: str) -> list[float]:
    """The seconds of the rounds that it took part in."""
    return [seconds for seconds in row["seconds"].get(measure, []) if seconds is not None]


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third, inclusive: of a single value, twice that."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = quantiles(values, n=4, method="inclusive")
    return first, third


def rate(row: Row, measure: str, seconds: float) -> float:
    """What the report shows for so many seconds: amount per second, or seconds where nothing is counted."""
    amount = row["amount"].get(measure)
    return amount / seconds if amount else seconds


def times_as_fast(row: Row, other: Row, measure: str) -> float | None:
    """How many times as fast as another, for the same amount: the median of the ratios of the rounds that both have."""
    pairs = zip(row["seconds"].get(measure, []), other["seconds"].get(measure, []), strict=False)
    ratios = [theirs / mine for mine, theirs in pairs if mine and theirs]
    return median(ratios) if ratios else None


def fastest(rows: Sequence[Row], measure: str, role: str | None = None, prefix: str = "") -> Row | None:
    """The one with the smallest median, of those of a role, whose name begins so: "a or b" are two beginnings."""
    begins = tuple(prefix.split(" or "))
    chosen = [
        row
        for row in rows
        if (role is None or row["role"] == role) and row["name"].startswith(begins) and taken(row, measure)
    ]
    return min(chosen, key=lambda row: median(taken(row, measure)), default=None)


def judge(case: dict[str, Any], bar: dict[str, Any]) -> dict[str, Any] | None:
    """A bar with the ratio that was reached and whom it is between; None if one side did not take part.

    A ratio of memory is our peak in multiples of theirs. It should be at most the floor; so should our median loss, and
    our median seconds.
    """
    measure, rows = case["measures"][0]["name"], case["contenders"]
    mine, theirs = (fastest(rows, measure, prefix=bar[side]) for side in ("ours", "theirs"))
    if mine is None or theirs is None:
        return None
    names = {"mine": mine["name"], "other": theirs["name"]}
    if bar["of"] == "speed":
        ratio = times_as_fast(mine, theirs, measure) or 0.0
        return {**bar, **names, "ratio": ratio, "met": ratio >= bar["floor"]}
    if bar["of"] == "memory":
        ratio = mine["peak"] / theirs["peak"]
    else:
        ratio = median(mine["loss"] if bar["of"] == "loss" else taken(mine, measure))
    return {**bar, **names, "ratio": ratio, "met": ratio <= bar["floor"]}


def slower(case: dict[str, Any]) -> list[tuple[str, Row, Row, float]]:
    """The measures in which the fastest of ours is behind the fastest peer with the same limit, as of one precision:
    measure, ours, peer, times as fast."""
    found = []
    limits = dict.fromkeys(row["limit"] for row in case["contenders"])
    for measure, limit in itertools.product((m["name"] for m in case["measures"]), limits):
        alike = [row for row in case["contenders"] if row["limit"] == limit]
        mine, peer = (fastest(alike, measure, role) for role in ("ours", "peer"))
        ratio = times_as_fast(mine, peer, measure) if mine and peer else None
        if mine and peer and ratio is not None and ratio < 1:
            found.append((measure, mine, peer, ratio))
    return found
