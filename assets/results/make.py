"""Tables of README and of assets/results/README.md from the CSV files beside this one, and three pictures.

pd.csv, lcm.csv, dmd2.csv: a row for each run and number of steps; shift.csv: for each timestep.
`python assets/results/make.py` prints the tables. To compare runs of your own, add their rows.
"""

import csv
import sys
from collections import defaultdict
from collections.abc import Sequence
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
DDIL = "PD + DDIL"
DOSES = {  # share of the updates on D_DAgger -> arm; student_rate .475 throughout
    0.5: f"{DDIL}, p_forward .5",
    0.75: f"{DDIL}, p_forward .25",
    0.9: f"{DDIL}, p_forward .1",
    1: f"{DDIL}, p_forward 0, --store_start",
}
HIGH = DOSES[0.75]
HIGH_CONTROL = "PD + control, p_forward .25"
RATES = {  # student_rate -> arms at the paper's shares and at p_forward .25
    "0 (the teacher alone)": (f"{DDIL}, --student_rate 0", f"{HIGH}, student_rate 0"),
    "both": (DDIL, HIGH),
    "1 (the student alone)": (f"{DDIL}, --student_rate 1", f"{HIGH}, student_rate 1"),
}
UPDATES = {  # relative to the recipe's -> setting
    0.5: "chain, half the updates",
    1: "chain",
    2: "chain, twice the updates",
    8: "chain, 8 times the updates",
}
GUIDANCE = {  # range of w -> setting
    "1": "chain, w = 1",
    "1.5 to 6": "chain, w from 1.5 to 6",
    "2 to 10": "chain, w from 2 to 10",
    "2 to 14": "chain",
}
ALONE = [f"{2 * k} -> {k} alone, each seed's own PD teacher" for k in (8, 4, 2)]


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
    """Values of each seed that has both."""
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


def by_dose(rows: list[dict]) -> None:
    """Change of the error to plain PD's by the share of D_DAgger, and scores at w = 8."""
    scores = [(score, steps) for score in SCORES for steps in (4, 2)]
    errors = [f"error, {steps} steps" for steps in COLOURS]
    print_header("D_DAgger", "seeds", *errors, *(f"{score}, {steps} steps" for score, steps in scores))
    paper = {"0 (PD)": "PD", ".25, then .5 (the paper's)": DDIL}
    for share, arm in (paper | DOSES | {"0.75, control": HIGH_CONTROL}).items():
        found = [by_seed(rows, f"{arm}; chain", steps, "paired_error") for steps in COLOURS]
        plain = [by_seed(rows, "PD; chain", steps, "paired_error") for steps in COLOURS]
        cells = ["" if arm == "PD" else f"{change(*pair)} (p {p_value(*pair)})" for pair in zip(plain, found)]
        cells += [shown([*v.values()]) if (v := by_seed(rows, f"{arm}; chain", k, s)) else "" for s, k in scores]
        print_row(share, len(found[0]), *cells)


def by_mover(rows: list[dict]) -> None:
    """Change of the error to plain PD's by who moves in rollouts, over the seeds that have all of them."""
    print_header(
        "student_rate", *(f"{shares}, {k} steps" for shares in ("the paper's", "p_forward .25") for k in COLOURS)
    )
    for rate, arms in RATES.items():
        cells = []
        for i, steps in product(range(2), COLOURS):
            found = [by_seed(rows, f"{others[i]}; chain", steps, "paired_error") for others in RATES.values()]
            seeds = set.intersection(*map(set, found))
            plain = by_seed(rows, "PD; chain", steps, "paired_error")
            own = by_seed(rows, f"{arms[i]}; chain", steps, "paired_error")
            cells.append(change(plain, {seed: own[seed] for seed in seeds}) if seeds else "")
        print_row(rate, *cells)


def by_setting(rows: list[dict], name: str, settings: dict, arms: dict[str, str]) -> None:
    """Plain PD's error in each setting and its change in each arm; a row for each number of steps."""
    print_header(name, "steps", *(f"{what} (seeds)" for what in ["PD", *arms]))
    for (value, setting), steps in product(settings.items(), COLOURS):
        plain = by_seed(rows, f"PD; {setting}", steps, "paired_error")
        cells = []
        for arm in arms.values():
            found = by_seed(rows, f"{arm}; {setting}", steps, "paired_error")
            cells.append(f"{change(plain, found)} ({len(pairs(plain, found))})" if pairs(plain, found) else "")
        if any(cells):
            print_row(value, steps, f"{shown([*plain.values()])} ({len(plain)})", *cells)


def ablations(rows: list[dict]) -> None:
    print_header("setting", "steps", "seeds", "PD", "arm", "stage error", "to PD", "error of the chain to PD")
    elsewhere = ("p_forward", "w = 1", "8 times")  # have tables of their own
    of_seeds = [(*r["label"].partition("; ")[::2], int(r["steps"])) for r in rows if r["stage_error"]]
    of_seeds = [found for found in of_seeds if not any(what in "; ".join(found[:2]) for what in elsewhere)]
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
    """Plain PD's students beside their own teachers, for each setting and number of steps: measures of the shift,
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


def gain_figure(rows: list[dict], picture: Path) -> None:
    """What DDIL changes in the chain's error: how much, by dose, by duration, by guidance."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharey=True, layout="constrained")

    def draw(axis, arms: Sequence[tuple[float, str, str]], steps: int, column="paired_error", **style) -> None:
        """arms: x, arm, setting"""
        gains = [(x, gain) for x, arm, setting in arms if (gain := gain_of(rows, setting, steps, column, arm))]
        if gains:
            axis.errorbar([x for x, _ in gains], *zip(*(gain for _, gain in gains)), capsize=2, **style)

    by_steps, dose, duration, guidance = axes.flat
    for steps, x in zip(COLOURS, range(4)):
        named = lambda label, first=steps == 16: {"label": label if first else None}
        for offset, arm, colour, label in (
            (0, "PD + control", "grey", "control: forward-diffused latents at DDIL's timesteps"),
            (0, DDIL, "C0", "PD + DDIL, the paper's shares"),
            (0.06, HIGH, "C4", "PD + DDIL, --p_forward .25 --student_rate .475"),
        ):
            draw(by_steps, [(x + offset, arm, "chain")], steps, fmt="o", color=colour, **named(label))
        if steps < 16:
            label = "the paper's shares, one stage alone, same teacher"
            alone = [(x - 0.06, DDIL, ALONE[x - 1])]
            draw(by_steps, alone, steps, "stage_error", fmt="D", color="black", label=label if steps == 8 else None)
    for steps in (8, 4, 2):
        style = {"color": COLOURS[steps], "marker": "o"}
        line = [(0.375, DDIL, "chain"), *((share, arm, "chain") for share, arm in DOSES.items())]
        draw(dose, sorted(line), steps, label=f"{steps} steps", **style)
        control = {"fmt": "s", "markerfacecolor": "white", "color": COLOURS[steps], "label": f"{steps} steps, control"}
        draw(dose, [(0.75, HIGH_CONTROL, "chain")], steps, **control)
        for arm, name, kind in ((DDIL, "the paper's shares", "-"), (HIGH, "--p_forward .25", "--")):
            line = [(log2(times), arm, setting) for times, setting in UPDATES.items()]
            if steps > 2:
                draw(duration, line, steps, label=f"{steps} steps, {name}", linestyle=kind, **style)
        line = [(x, DDIL, setting) for x, setting in enumerate(GUIDANCE.values())]
        draw(guidance, line, steps, label=f"{steps} steps", **style)
    by_steps.set(title="how much", xticks=range(4), xticklabels=[f"{k} steps" for k in COLOURS])
    dose.set(title="dose: share of the updates on D_DAgger", xticks=[0.375, 0.5, 0.75, 0.9, 1])
    dose.set_xticklabels(["paper's", ".5", ".75", ".9", "1"])
    duration.set(title="duration: updates relative to the recipe's", xticks=[-1, 0, 1, 3])
    duration.set_xticklabels(["1/2", "1", "2", "8"])
    guidance.set(title="guidance in training: w", xticks=range(4), xticklabels=GUIDANCE)
    for axis in axes.flat:
        axis.axhline(0, color="black", linewidth=0.8)
        axis.legend(fontsize=8, handlelength=3)
    figure.supylabel("error relative to plain PD [%], lower is better")
    figure.savefig(picture, dpi=100)
    plt.close(figure)


def shift_figure(rows: list[dict], picture: Path) -> None:
    """The shift of 4-step students with and without DDIL, by timestep: colour = student, line style = whose latents."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    panels = {
        "distance of visited latents to forward-diffused ones": ["FD, student", "FD, teacher", "FD, other images"],
        "distance to the guided model's own latents": ["FD, student to teacher"],
        "student and guided model disagree about x": ["disagreement, visited", "disagreement, forward"],
    }
    lines = {"teacher": "-", "other images": ":", "forward": ":"}  # the student's own are dashed
    for axis, (title, columns) in zip(axes, panels.items()):
        for (arm, colour), column in product({"PD": "C0", "PD+DDIL": "C1"}.items(), columns):
            line = next((line for whose, line in lines.items() if column.endswith(f", {whose}")), "--")
            is_shared = column in ("FD, teacher", "FD, other images")  # the same for both students
            if is_shared and arm != "PD":
                continue
            found = defaultdict(list)
            for row in rows:
                if row["label"] == f"{arm}, 4 steps":
                    found[row["t"]].append(float(row[column]))
            bars = [standard_error(values) for values in found.values()]
            style = {"color": "black" if is_shared else colour, "linestyle": line, "capsize": 2}
            axis.errorbar([*found], [mean(values) for values in found.values()], bars, **style)
        axis.set(title=title, xlabel="t", ylabel="RMS" if "disagree" in title else "Frechet distance")
        axis.title.set_fontsize(10)
    named = [plt.Line2D([], [], color=c, label=n) for n, c in {"PD": "C0", "PD + DDIL": "C1", "both": "black"}.items()]
    styles = {"on latents that the student visits": "--", "that the guided model visits": "-"}
    styles |= {"forward-diffused (of other images)": ":"}
    named += [plt.Line2D([], [], color="grey", linestyle=line, label=whose) for whose, line in styles.items()]
    figure.legend(handles=named, loc="outside lower center", ncols=len(named), fontsize=9)
    figure.savefig(picture, dpi=100)
    plt.close(figure)


def gain_against_shift(rows: list[dict], shifts: list[dict], picture: Path) -> None:
    """A point for each setting and number of steps: what DDIL changes in the stage's error, over the measured shift."""
    found, points, markers = shifts_of(shifts), [], {}
    settings = dict.fromkeys(row["label"].partition("; ")[2] for row in rows if row["label"].startswith("PD;"))
    for setting in settings:
        is_alone = setting.endswith("own PD teacher")  # its PD arm is that of the chain
        for steps in (16, 8, 4, 2):
            gain = gain_of(rows, setting, steps, "stage_error")
            if shift := found.get(("chain" if is_alone else setting, steps)) if gain else None:
                marker = markers.setdefault("one stage alone" if is_alone else setting, "osD^vPX*"[len(markers)])
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
    """LCM or DMD2: every arm at 4 steps beside the plain method, and its UNet forwards."""
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
    by_dose(table)
    by_mover(table)
    by_setting(table, "updates", UPDATES, {"the paper's shares": DDIL, "--p_forward .25": HIGH})
    by_setting(table, "w", GUIDANCE, {"the paper's shares": DDIL, "--p_forward .25": HIGH})
    ablations(table)
    lcm, dmd2 = read("lcm.csv"), read("dmd2.csv")
    ladder(lcm, "LCM")
    by_steps(lcm)
    ladder([row for row in dmd2 if "batch" not in row["label"] or row["label"] == "DMD2, global batch 28"], "DMD2")
    by_batch(dmd2)
    pictures = Path(__file__).parents[1]
    gain_figure(table, pictures / "gain.png")
    shifts = read("shift.csv")
    shift_figure(shifts, pictures / "shift.png")
    gain_against_shift(table, shifts, pictures / "gain_against_shift.png")
