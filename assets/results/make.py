"""Tables of README and of assets/results/README.md from the CSV files beside this one.

pd.csv: a row for each run and stage; shift.csv: `evaluate.py --shift gap` of 4-step students, a row for each timestep.
`python assets/results/make.py` prints the tables. To compare runs of your own, add their rows.
"""

import csv
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import ttest_rel  # lpips brings it

HERE = Path(__file__).parent
ERRORS = ("paired_error", "stage_error")
SCORES = ("FD (tiny)", "alignment", "diversity (tiny)")


def table_of(name: str) -> list[dict]:
    with (HERE / name).open(newline="") as file:
        return [*csv.DictReader(file)]


def by_seed(rows: list[dict], label: str, steps: int, column: str) -> dict[str, float]:
    return {r["seed"]: float(r[column]) for r in rows if (r["label"], r["steps"]) == (label, str(steps)) and r[column]}


def shown(values: list[float], percent: bool = False) -> str:
    """Mean ± standard error."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0
    if percent:
        return f"{100 * mean(values):.1f} ± {100 * error:.1f} %"
    return f"{mean(values):.4f} ± {error:.4f}".replace("0.", ".")


def change(rows: list[dict], setting: str, steps: int, column: str, arm: str = "PD + DDIL") -> list[float]:
    """Relative to plain PD, for each seed that has both."""
    plain, other = (by_seed(rows, f"{name}; {setting}", steps, column) for name in ("PD", arm))
    return [other[seed] / plain[seed] - 1 for seed in plain if seed in other]


def p_value(rows: list[dict], setting: str, steps: int, column: str) -> str:
    plain, other = (by_seed(rows, f"{name}; {setting}", steps, column) for name in ("PD", "PD + DDIL"))
    seeds = [seed for seed in plain if seed in other]
    return f"{ttest_rel([other[s] for s in seeds], [plain[s] for s in seeds]).pvalue:.2g}" if len(seeds) > 2 else "-"


def headline(rows: list[dict]) -> None:
    print("| | steps | undistilled | PD | control | PD + DDIL | DDIL to PD | p |\n|---|---|---|---|---|---|---|---|")
    for column, name in (("paired_error", "error"), ("stage_error", "of the stage alone")):
        for steps in (16, 8, 4, 2):
            arms = [by_seed(rows, f"{arm}; chain", steps, column) for arm in ("PD", "PD + control", "PD + DDIL")]
            bare = [*by_seed(rows, "PD; chain", steps, "paired_error_undistilled").values()]
            cells = [shown([*arm.values()]) for arm in arms]
            first = f"{mean(bare):.3f}" if column == "paired_error" else ""
            gain = shown(change(rows, "chain", steps, column), percent=True)
            print(f"| {name} | {steps} | {first} | {' | '.join(cells)} | {gain} | {p_value(rows, 'chain', steps, column)} |")
    print("\n| w = 8 | steps | PD | control | PD + DDIL | p |\n|---|---|---|---|---|---|")
    for column in SCORES:
        for steps in (8, 4, 2):
            arms = [by_seed(rows, f"{arm}; chain", steps, column) for arm in ("PD", "PD + control", "PD + DDIL")]
            if all(arms):
                cells = [shown([*arm.values()]) for arm in arms]
                print(f"| {column} | {steps} | {' | '.join(cells)} | {p_value(rows, 'chain', steps, column)} |")


def settings_of(rows: list[dict]) -> list[tuple[str, int]]:
    found = dict.fromkeys((r["label"].partition("; ")[2], int(r["steps"])) for r in rows if "; " in r["label"])
    return [*found]


def ablations(rows: list[dict]) -> None:
    print("\n| setting | steps | seeds | PD | arm | stage error | to PD | error of the chain to PD |")
    print("|---|---|---|---|---|---|---|---|")
    arms = dict.fromkeys(r["label"].partition("; ")[0] for r in rows)
    for setting, steps in settings_of(rows):
        for arm in arms:
            stage = change(rows, setting, steps, "stage_error", arm)
            if stage and arm != "PD":
                plain, other = (by_seed(rows, f"{a}; {setting}", steps, "stage_error") for a in ("PD", arm))
                whole = shown(change(rows, setting, steps, "paired_error", arm), percent=True)
                cells = [shown([*plain.values()]), arm, shown([*other.values()]), shown(stage, percent=True), whole]
                print(f"| {setting} | {steps} | {len(stage)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    headline(table_of("pd.csv"))
    ablations(table_of("pd.csv"))
