"""Tables of README and of assets/results/README.md from the CSV files beside this one, and two pictures.

pd.csv, lcm.csv, dmd2.csv: a row for each run and number of steps; shift.csv: for each timestep.
`python assets/results/make.py` prints the tables. To compare runs of your own, add their rows.
"""

import csv
import sys
from collections import defaultdict
from itertools import product
from math import log2
from pathlib import Path
from statistics import mean, stdev

import matplotlib.pyplot as plt
from scipy.stats import spearmanr, ttest_rel  # lpips brings it

ARMS = ("PD", "PD + control", "PD + DDIL")  # of the chain
SCORES = ("FD (tiny)", "alignment", "diversity (tiny)")
MEASURES = {  # of shift.csv
    "FD, student": "distance of visited from forward-diffused latents",
    "disagreement, visited / forward": "disagreement on visited latents / on forward-diffused ones",
}
COLOURS = {16: "C0", 8: "C1", 4: "C2", 2: "C3"}  # of numbers of steps
LINES = {  # of gain.png: arm, its settings, style
    "control": ("PD + control", ["chain"], {"color": "grey", "linestyle": "--"}),
    "w from 2 to 14, the recipe": ("PD + DDIL", ["chain"], {"color": "C0", "linewidth": 3}),
    "w from 2 to 10": ("PD + DDIL", ["chain, w from 2 to 10"], {"color": "C1", "fmt": "s"}),
    "w from 1.5 to 6": ("PD + DDIL", ["chain, w from 1.5 to 6"], {"color": "C2", "fmt": "o"}),
    "half the updates": ("PD + DDIL", ["chain, half the updates"], {"color": "C4", "fmt": "v"}),
    "twice the updates": ("PD + DDIL", ["chain, twice the updates"], {"color": "C3", "fmt": "^"}),
    "unreflected": ("PD + DDIL", ["chain, unreflected"], {"color": "C6", "fmt": "X"}),
    "one stage alone": (
        "PD + DDIL",
        [f"{2 * k} -> {k} alone, each seed's own PD teacher" for k in (8, 4, 2)],
        {"color": "black", "fmt": "D"},
    ),
}


def by_seed(rows: list[dict], label: str, steps: int, column: str) -> dict[str, float]:
    return {r["seed"]: float(r[column]) for r in rows if (r["label"], r["steps"]) == (label, str(steps)) and r[column]}


def standard_error(values: list[float]) -> float:
    return stdev(values) / len(values) ** 0.5


def shown(values: list[float], percent: bool = False) -> str:
    """Mean ± standard error."""
    factor, digits = (100, 1) if percent else (1, 4)
    text = f"{factor * mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {factor * standard_error(values):.{digits}f}"
    return f"{text} %" if percent else text.replace("0.", ".")


def pairs(plain: dict[str, float], other: dict[str, float]) -> list[tuple[float, float]]:
    """Of each seed that has both."""
    return [(plain[seed], other[seed]) for seed in plain if seed in other]


def changes(plain: dict[str, float], other: dict[str, float]) -> list[float]:
    """Relative to the plain method, each seed's."""
    return [b / a - 1 for a, b in pairs(plain, other)]


def change(plain: dict[str, float], other: dict[str, float]) -> str:
    return shown(changes(plain, other), percent=True)


def p_value(plain: dict[str, float], other: dict[str, float]) -> str:
    found = pairs(plain, other)
    return f"{ttest_rel(*zip(*found)).pvalue:.2g}" if len(found) > 2 else "-"


def print_row(*cells) -> None:
    print(f"| {' | '.join(map(str, cells))} |")


def print_header(*names: str) -> None:
    print()
    print_row(*names)
    print("|---" * len(names) + "|")


def headline(rows: list[dict]) -> None:
    print_header("", "steps", "undistilled", "PD", "control", "PD + DDIL", "DDIL to PD", "p (paired t-test)")
    for column, name in (("paired_error", "error"), ("stage_error", "stage error")):
        for steps in (16, 8, 4, 2):
            arms = [by_seed(rows, f"{arm}; chain", steps, column) for arm in ARMS]
            bare = [*by_seed(rows, "PD; chain", steps, "paired_error_undistilled").values()]
            cells = [shown([*arm.values()]) for arm in arms]
            first = f"{mean(bare):.3f}" if column == "paired_error" else ""
            print_row(name, steps, first, *cells, change(arms[0], arms[2]), p_value(arms[0], arms[2]))
    print_header("w = 8", "steps", "PD", "control", "PD + DDIL", "p")
    for column in SCORES:
        for steps in (8, 4, 2):
            arms = [by_seed(rows, f"{arm}; chain", steps, column) for arm in ARMS]
            cells = [shown([*arm.values()]) for arm in arms]
            print_row(column, steps, *cells, p_value(arms[0], arms[2]))


def by_updates(rows: list[dict]) -> None:
    """The chain's error with half, all and twice the recipe's updates, over the seeds that have all three."""
    updates = {"half": "chain, half the updates", "the recipe's": "chain", "twice": "chain, twice the updates"}
    print_header("updates", "steps", "seeds", *updates)
    for steps, arm in product((16, 8, 4), ("PD", "PD + DDIL")):
        found = [by_seed(rows, f"{arm}; {setting}", steps, "paired_error") for setting in updates.values()]
        seeds = set.intersection(*map(set, found))
        print_row(arm, steps, len(seeds), *(shown([errors[seed] for seed in seeds]) for errors in found))


def ablations(rows: list[dict]) -> None:
    print_header("setting", "steps", "seeds", "PD", "arm", "stage error", "to PD", "error of the chain to PD")
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
                print_row(setting, steps, len(found), plain, arm, other, change(*stage), change(*whole))


def shifts_of(rows: list[dict]) -> dict[tuple[str, int], dict[str, list[float]]]:
    """Of plain PD's students beside their own teachers, for each setting and number of steps: measures of the shift,
    each a value for every seed and timestep below 999."""
    found = defaultdict(lambda: defaultdict(list))
    for row in rows:
        student, _, setting = row["label"].partition(", to its own teacher; ")
        if setting and row["t"] != "999":
            for measure in MEASURES:
                found[setting, int(student.split()[1])][measure].append(float(row[measure]))
    return found


def gain_of(rows: list[dict], setting: str, steps: int, column: str, arm="PD + DDIL") -> tuple[float, float] | None:
    """Change of an error to plain PD's in percent: mean and standard error over seeds, if there are several."""
    found = changes(*(by_seed(rows, f"{name}; {setting}", steps, column) for name in ("PD", arm)))
    return (100 * mean(found), 100 * standard_error(found)) if len(found) > 1 else None


def gain_by_steps(rows: list[dict], picture: Path) -> None:
    """What DDIL changes, at each number of steps and in each setting."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    titles = {
        "paired_error": "whole chain, against the 32-step model",
        "stage_error": "each stage, against its own teacher",
    }
    for ax, (column, title) in zip(axes, titles.items()):
        for place, (name, (arm, settings, style)) in enumerate(LINES.items()):
            gains = [(k, gain) for k in COLOURS for s in settings if (gain := gain_of(rows, s, k, column, arm))]
            if gains and not (column == "paired_error" and "alone" in name):
                x = [log2(16 / k) + 0.06 * (place - len(LINES) / 2) for k, _ in gains]
                ax.errorbar(x, *zip(*(gain for _, gain in gains)), label=name, capsize=2, **style)
        ax.set(title=title, xticks=range(4), xticklabels=[f"{k} steps" for k in COLOURS])
        ax.axhline(0, color="black", linewidth=0.8)
    axes[0].set_ylabel("error, change to plain PD [%]")
    axes[1].legend(title="PD + DDIL, but for the control", loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(picture, dpi=110, bbox_inches="tight")


def gain_against_shift(rows: list[dict], shifts: list[dict], picture: Path) -> None:
    """A point for each setting and number of steps: what DDIL changes in the stage's error, over the measured shift."""
    found, points, markers = shifts_of(shifts), [], {}
    settings = dict.fromkeys(row["label"].partition("; ")[2] for row in rows if row["label"].startswith("PD;"))
    for setting in settings:
        is_alone = setting.endswith("own PD teacher")  # its PD arm is that of the chain
        for steps in (16, 8, 4, 2):
            gain = gain_of(rows, setting, steps, "stage_error")
            if shift := found.get(("chain" if is_alone else setting, steps)) if gain else None:
                marker = markers.setdefault("one stage alone" if is_alone else setting, "osD^vPX"[len(markers)])
                style = {"marker": marker, "color": COLOURS[steps], "yerr": gain[1]}
                points.append(({name: mean(values) for name, values in shift.items()}, gain[0], style))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for ax, (measure, title) in zip(axes, MEASURES.items()):
        for shift, gain, style in points:
            ax.errorbar(shift[measure], gain, capsize=2, **style)
        rho = spearmanr([shift[measure] for shift, _, _ in points], [gain for _, gain, _ in points])
        ax.set_xlabel(f"{title}\nrank correlation {rho.statistic:.2f}")
        ax.axhline(0, color="grey", linewidth=0.8)
    axes[0].set_ylabel("stage error, PD + DDIL to PD [%]")
    for steps, colour in COLOURS.items():
        axes[1].plot([], [], "s", color=colour, label=f"{steps} steps")
    for name, marker in markers.items():
        axes[1].plot([], [], marker, color="grey", label=name)
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(picture, dpi=110, bbox_inches="tight")


def ladder(rows: list[dict], plain: str) -> None:
    """Of LCM or DMD2: every arm at 4 steps beside the plain method, and its UNet forwards."""
    print_header("4 steps", "seeds", *SCORES, f"FD to {plain}", "p", "forwards")
    columns = (*SCORES, "unet_forwards")
    of_plain = {column: by_seed(rows, plain, 4, column) for column in columns}
    for arm in dict.fromkeys(row["label"] for row in rows):
        found = {column: by_seed(rows, arm, 4, column) for column in columns}
        fd, forwards = found[SCORES[0]], found["unet_forwards"]
        cells = [arm, len(fd), *(shown([*found[score].values()]) for score in SCORES), "", "", ""]
        if arm != plain and forwards:
            times = mean(forwards.values()) / mean(of_plain["unet_forwards"].values())
            cells[-3:] = change(of_plain[SCORES[0]], fd), p_value(of_plain[SCORES[0]], fd), f"{times:.2f}"
        print_row(*cells)


def by_batch(rows: list[dict]) -> None:
    """DMD2 with and without reflection at each global batch, of the seeds that have both; of x_g_std the largest."""
    arms, columns = ("DMD2", "DMD2 + Reflected"), (*SCORES[:2], "x_g_std")
    fd, alignment, spread = ([f"{column}: {arm}" for arm in arms] for column in columns)
    print_header("global batch", "seeds", *fd, "change", *alignment, *spread)
    for batch in (4, 7, 16, 28, 64):
        labels = [f"{arm}, global batch {batch}" if batch != 7 else arm for arm in arms]
        found = [[by_seed(rows, label, 4, column) for label in labels] for column in columns]
        fd, alignment, spread = (zip(*pairs(*both)) for both in found)
        cells = [*map(shown, fd), change(*found[0]), *map(shown, alignment), *(f"{max(of):.2f}" for of in spread)]
        print_row(batch, len(pairs(*found[0])), *cells)


def by_steps(rows: list[dict]) -> None:
    """FD and alignment of models that sample in any number of steps: means over the seeds that have them all."""
    steps = sorted({int(row["steps"]) for row in rows})
    print_header("FD (tiny), alignment", "seeds", *steps)
    for arm in dict.fromkeys(row["label"] for row in rows):
        scores = {k: [by_seed(rows, arm, k, score) for score in SCORES[:2]] for k in steps}
        seeds = set.intersection(*(set(fd) for fd, _ in scores.values() if fd))
        cells = [arm, len(seeds)]
        for fd, right in ([[of[seed] for seed in seeds if seed in of] for of in pair] for pair in scores.values()):
            cells.append(f"{shown(fd)}, {100 * mean(right):.1f} %" if fd else "")
        print_row(*cells)


def read(name: str) -> list[dict]:
    with (Path(__file__).parent / name).open(newline="", encoding="utf-8") as file:
        return [*csv.DictReader(file)]


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # for README, whatever the terminal's
    table = read("pd.csv")
    headline(table)
    by_updates(table)
    ablations(table)
    lcm, dmd2 = read("lcm.csv"), read("dmd2.csv")
    ladder(lcm, "LCM")
    by_steps(lcm)
    ladder([row for row in dmd2 if "batch" not in row["label"] or row["label"] == "DMD2, global batch 28"], "DMD2")
    by_batch(dmd2)
    pictures = Path(__file__).parents[1]
    gain_by_steps(table, pictures / "gain.png")
    gain_against_shift(table, read("shift.csv"), pictures / "gain_against_shift.png")
