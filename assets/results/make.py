"""Tables of README and of assets/results/README.md from the CSV files beside this one.

pd.csv: a row for each run and stage; shift.csv: `evaluate.py --shift gap`, a row for each timestep.
`python assets/results/make.py` prints the tables. To compare runs of your own, add their rows.
"""

import csv
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import ttest_rel  # lpips brings it

ARMS = ("PD", "PD + control", "PD + DDIL")  # of the chain
SCORES = ("FD (tiny)", "alignment", "diversity (tiny)")


def by_seed(rows: list[dict], label: str, steps: int, column: str) -> dict[str, float]:
    return {r["seed"]: float(r[column]) for r in rows if (r["label"], r["steps"]) == (label, str(steps)) and r[column]}


def shown(values: list[float], percent: bool = False) -> str:
    """Mean ± standard error."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0
    if percent:
        return f"{100 * mean(values):.1f} ± {100 * error:.1f} %"
    return f"{mean(values):.4f} ± {error:.4f}".replace("0.", ".")


def pairs(plain: dict[str, float], other: dict[str, float]) -> list[tuple[float, float]]:
    """Of each seed that has both."""
    return [(plain[seed], other[seed]) for seed in plain if seed in other]


def change(plain: dict[str, float], other: dict[str, float]) -> str:
    """Relative to plain PD, mean of each seed's."""
    return shown([b / a - 1 for a, b in pairs(plain, other)], percent=True)


def p_value(plain: dict[str, float], other: dict[str, float]) -> str:
    found = pairs(plain, other)
    return f"{ttest_rel(*zip(*found)).pvalue:.2g}" if len(found) > 2 else "-"


def headline(rows: list[dict]) -> None:
    print("| | steps | undistilled | PD | control | PD + DDIL | DDIL to PD | p |\n|---|---|---|---|---|---|---|---|")
    for column, name in (("paired_error", "error"), ("stage_error", "of the stage alone")):
        for steps in (16, 8, 4, 2):
            arms = [by_seed(rows, f"{arm}; chain", steps, column) for arm in ARMS]
            bare = [*by_seed(rows, "PD; chain", steps, "paired_error_undistilled").values()]
            cells = [shown([*arm.values()]) for arm in arms]
            first = f"{mean(bare):.3f}" if column == "paired_error" else ""
            compared = f"{change(arms[0], arms[2])} | {p_value(arms[0], arms[2])}"
            print(f"| {name} | {steps} | {first} | {' | '.join(cells)} | {compared} |")
    print("\n| w = 8 | steps | PD | control | PD + DDIL | p |\n|---|---|---|---|---|---|")
    for column in SCORES:
        for steps in (8, 4, 2):
            arms = [by_seed(rows, f"{arm}; chain", steps, column) for arm in ARMS]
            cells = [shown([*arm.values()]) for arm in arms]
            print(f"| {column} | {steps} | {' | '.join(cells)} | {p_value(arms[0], arms[2])} |")


def ablations(rows: list[dict]) -> None:
    print("\n| setting | steps | seeds | PD | arm | stage error | to PD | error of the chain to PD |")
    print("|---|---|---|---|---|---|---|---|")
    of_seeds = [(*r["label"].partition("; ")[::2], int(r["steps"])) for r in rows if r["stage_error"]]
    arms = dict.fromkeys(arm for arm, _, _ in of_seeds if arm != "PD")
    for setting, steps in dict.fromkeys(found[1:] for found in of_seeds):
        for arm in arms:
            stage, whole = (
                [by_seed(rows, f"{name}; {setting}", steps, column) for name in ("PD", arm)]
                for column in ("stage_error", "paired_error")
            )
            if found := pairs(*stage):
                plain, other = map(shown, zip(*found))
                cells = [plain, arm, other, change(*stage), change(*whole)]
                print(f"| {setting} | {steps} | {len(found)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    with (Path(__file__).parent / "pd.csv").open(newline="") as file:
        table = [*csv.DictReader(file)]
    headline(table)
    ablations(table)
