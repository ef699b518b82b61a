"""Every row of docs/claims.md once more, from the records alone: own formulas, with json, numpy and scipy.

Nothing here may come from `cramlab`. `rows()` gives, by what a row claims, the numbers of its text in their order and
its verdict. Where two ways of computing may differ by more than rounding, a number has its tolerance beside it.
"""

import functools
import json
import math
from pathlib import Path

import numpy as np
from scipy import optimize, stats

RESULTS = Path(__file__).parents[1] / "results"
YES, NO, OPEN, NOWHERE = "reproduced", "**not reproduced**", "undecided", "not testable here"
TASK = {"type": "SRCDConfig", "query_frac": 0.05, "recurring_frac": 0.7, "n_patterns": 100, "write_frac": 0.1,
        "rebind_frac": 0.0, "key_mode": "vector", "key_dim": 16, "key_noise": 0.02, "n_novel_keys": 1024,
        "n_values": 64, "decay": 0.95, "beta": 0.5, "omega": 0.3, "gap_shape": 1.5, "noise_std": 0.1}  # fmt: skip


@functools.cache
def runs():
    found = []
    for folder in ("bounds", "srcd", "srcd_table", "srcd_sweeps", "transfer", "transition"):
        for path in sorted((RESULTS / folder).rglob("*.json")):
            if path.parent.name == "quick":  # a first look, no evidence
                continue
            run = json.loads(path.read_text())
            if run["status"] == "finished" and run["metrics"]["test"] is not None:
                found.append(run)
    return found


def standard(run):
    return {name: value for name, value in run["config"]["task"].items() if name != "seq_len"} == TASK


def some(experiment, size=None, mixer=None):
    return [r for r in runs() if r["experiment"] == experiment and size in (None, r["size"]) and
            mixer in (None, r["mixer"])]  # fmt: skip


def student(values, least=-math.inf, most=math.inf):
    """Mean and ends of its 95% interval; the mean alone for one value."""
    x = np.array(list(values), dtype=float)
    if len(x) < 2:
        return [x.mean()]
    half = stats.t.interval(0.95, len(x) - 1, scale=stats.sem(x))[1] if np.ptp(x) else 0.0
    return [x.mean(), max(x.mean() - half, least), min(x.mean() + half, most)]


def beta_ends(hits, n):
    """Clopper and Pearson's interval."""
    return [0.0 if hits == 0 else stats.beta.ppf(0.025, hits, n - hits + 1),
            1.0 if hits == n else stats.beta.ppf(0.975, hits + 1, n - hits)]  # fmt: skip


def wilson_high(share, n):
    z, p = stats.norm.ppf(0.975), round(share * n) / n
    return (p + z * z / (2 * n) + z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)


def judged(ours, paper, without):
    if len(ours) == 1:
        return OPEN
    low, high, claimed = ours[1], ours[2], abs(paper - without)
    if paper < low - claimed / 10 or paper > high + claimed / 10:
        return NO
    return YES if high - low <= claimed / 2 else OPEN


def reaches(ours, level):
    if len(ours) == 1:
        return OPEN
    return YES if ours[1] >= level else NO if ours[2] < level else OPEN


def all_of(verdicts):
    return next((v for v in (NO, NOWHERE, OPEN) if v in verdicts), YES)


def rows():
    return {
        **audits(),
        **srcd_table(),
        **transition(),
        **bounds(),
        **transfer(),
        **carried(),
        **practice(),
        **irregular(),
    }


def audit(model):
    return json.loads((RESULTS / "audit" / model / "audit.json").read_text())


def over_training():
    return json.loads((RESULTS / "audit" / "over_training" / "over_training.json").read_text())


def audits():
    made = {"R of GPT-2, 124M and 355M": ([], NOWHERE)}
    for model in ("glassllm", "smollm2"):
        data = audit(model)
        hidden = data["probes"]["hidden"]
        r, heads = hidden["overall"]["r"], data["head_shares"]["r"]
        layers = hidden["layers"]["r"]
        middle = sorted(layers[int(len(layers) / 3) : math.ceil(2 * len(layers) / 3)])
        known = [i for i, layer in enumerate(layers) if layer[0] >= 0.5]
        costly = [i for i in known if data["loss"]["alone"][i]["probe"][1] > 0.01]
        made |= {
            f"attention is predictable from the hidden state: R, on {model}": (
                r + data["probes"]["mean"]["overall"]["r"] + hidden["overall"]["r2"], reaches(r, 0.84)),
            f"R of the middle third of layers, on {model}": (
                middle[0] + middle[-1], all_of([reaches(layer, 0.97) for layer in middle])),
            f"share of heads with R above 0.8, on {model}": (
                [*heads["above_0.8"], *heads["0.5_to_0.8"], 0.5, 0.8, *heads["below_0.5"]],
                reaches(heads["above_0.8"], 0.34)),
            f"predictable layers can do without attention, on {model}": (
                [len(costly), len(known), 0.5, 0.01], NO if costly else YES if known else NOWHERE),
        }  # fmt: skip
    points = over_training()["points"]
    numbers = [2, 1000, 10_000]
    for name in ("attention-seed0", "attention-seed1"):
        for step in (0, 30, 311, 1000):
            (at,) = (p["overall"] for p in points if (p["run"], p["step"]) == (name, step))
            numbers += [at["hidden"]["r"][0], at["mean"]["r"][0], step]
    made["R does not fall during ordinary training"] = (numbers, NOWHERE)
    return made


PAPER = {  # dynamics, retrieval and what it were without the claim, attention and the same
    "transformer": (0.589, 0.68, 1.0, 1.0, 0.0), "recurrence": (0.620, 0.68, 1.0, 0.0, 1.0),
    "jamba": (0.461, 0.0, 1.0, 0.125, 0.0), "seqboat": (0.649, 0.68, 1.0, 0.23, 1.0),
    "cram": (1.211, 1.0, 0.68, 0.016, 0.05), "cram-no-consolidation": (1.198, 1.0, 0.68, 0.167, 0.016),
}  # fmt: skip


def srcd_table():
    made = {}
    for mixer, (dynamics, *figures) in PAPER.items():
        size, length = "paper", "2,048 tokens"
        if len(some("srcd_table", size, mixer)) < 2:
            size, length = "small", "256 tokens"
        group = some("srcd_table", size, mixer)
        tests, n = [r["metrics"]["test"] for r in group], len(group)
        fixed = ", by construction" if mixer in ("transformer", "recurrence", "jamba") else ""
        for name, field, paper, without in ((": retrieval, all queries", "retrieval_acc", *figures[:2]),
                                            (f": attention{fixed}", "attention_frac", *figures[2:])):  # fmt: skip
            ours = student([test[field] for test in tests], 0, 1)
            made[f"{mixer}{name} ({length})"] = ([*ours, n], judged(ours, paper, without))
        ratio = {"cram": (0.019, 0.05), "cram-no-consolidation": (0.95, 0.019), "seqboat": (0.98, 0.019)}.get(mixer)
        if ratio:
            firsts = [next(row["validation"] for row in r["series"] if row["validation"]) for r in group]
            ours = student([t["attention_frac"] / f["attention_frac"] for t, f in zip(tests, firsts, strict=True)], 0)
            made[f"{mixer}: attention at the end over that at the start"] = ([*ours, n], judged(ours, *ratio))
        if mixer != "transformer":
            full = {r["seed"]: r["metrics"]["test"]["dynamics_mse"] for r in some("srcd_table", size, "transformer")}
            ours = student([r["metrics"]["test"]["dynamics_mse"] / full[r["seed"]] for r in group])
            aim = " (ours is to be no worse)" if mixer == "cram" else ""
            made[f"{mixer}: dynamics error over the Transformer's{aim}"] = (
                [*ours, n], judged(ours, dynamics / 0.589, 1.0))  # fmt: skip
    return made


def validations(run):
    known = [row for row in run["series"] if row["validation"] is not None]
    return np.array([row["step"] for row in known], float), np.array(
        [row["validation"]["attention_frac"] for row in known]
    )


def left(y, columns):
    """What least squares on columns leave of y."""
    design = np.stack(columns, axis=1)
    return y - design @ np.linalg.lstsq(design, y, rcond=None)[0]


def drop(t, share, tokens=8192):
    """A logistic fall that takes a tenth of the span at most and beats every smooth course; else None.

    Gives its middle, and by what factor the three observations before it are above the three after it.
    """
    if len(t) < 8:
        return None
    y, one, n = np.log(np.maximum(share, 1 / tokens)), np.ones_like(t), len(t)
    gap, span = np.diff(t).min(), np.ptp(t)
    line, clock = (t - t[0]) / span, t - t[0] + gap
    smooth = [[one], [one, line]]
    for shape in (np.log(clock), np.log(t), *(np.exp(-clock / tau) for tau in np.geomspace(span / 5, 5 * span, 16))):
        smooth += [[one, shape], [one, shape, line]]
    rival = min(n * math.log((left(y, c) ** 2).mean() + 1e-12) + (len(c) + 1) * math.log(n) for c in smooth)
    middles = (t[2:-3, None] + np.diff(t)[2:-2, None] * np.array([0.25, 0.5, 0.75])).ravel()
    middle, width = (grid.ravel() for grid in np.meshgrid(middles, np.geomspace(gap / 2, span, 24), indexing="ij"))
    curves = 1 / (1 + np.exp(np.clip(-(t - middle[:, None]) * 2 * math.log(9) / width[:, None], -60, 60)))
    bare = left(curves.T, [one, line]).T
    rest = left(y, [one, line])
    size = bare @ rest / (bare**2).sum(axis=1)
    gained = np.where(size < 0, size * (bare @ rest), 0)
    best = int(gained.argmax())
    power = n * math.log(((rest**2).sum() - gained[best]) / n + 1e-12) + 6 * math.log(n)
    if size[best] > -math.log(2) or width[best] > span / 10 or power > rival - 20:
        return None
    beside = max(width[best] / 2, gap / 2)
    before, after = y[t < middle[best] - beside + gap / 2][-3:], y[t > middle[best] + beside - gap / 2][:3]
    return middle[best], math.exp(before.mean() - after.mean())


def ended(run):
    return (run["encoding_ended_step"] or 0) if run["config"]["training"]["encoding_target"] > 0 else 0


def told(run):
    """Whether a run validated often enough and attends at all."""
    t, share = validations(run)
    return len(t) >= 12 and np.ptp(share) > 0


def late_drop(run):
    t, share = validations(run)
    return drop(t[t > ended(run)], share[t > ended(run)])


def quality(run):
    known = [(row["step"], row["quality"]) for row in run["series"] if row.get("quality") is not None]
    steps, q = np.array(known, float).T
    return steps[2:-2], np.array([q[i - 2 : i + 3].mean() for i in range(2, len(q) - 2)])


def transition():
    routers = ("cram", "cram-no-encoding", "cram-paper", "cram-gumbel")
    found = [r for name in ("transition", "srcd", "srcd_table", "srcd_sweeps") for r in some(name)
             if standard(r) and r["mixer"] in routers and told(r)]  # fmt: skip
    ours = [r for r in found if r["mixer"] == "cram" and ended(r)]
    drops = [drop(*validations(r)) for r in ours]
    steps = student([d[1] for d in drops if d])
    last = [validations(r)[1][-1] for r in ours]
    n, sharp = len(ours), sum(d is not None for d in drops)
    total, own = student([1 / x for x in last]), student([0.05 / x for x in last])
    share = student([math.log(0.05 / x) / math.log(1 / x) for x in last])
    at_end = sum(
        abs(d[0] - ended(r)) <= 1.5 * np.diff(validations(r)[0]).max() for r, d in zip(ours, drops, strict=True)
    )
    made = {
        "attention falls 37.8x in one sharp transition": (
            [*total, *((x, 0.3) for x in steps), sharp, n], judged(steps, 37.8, 20)),
        "the fall is consolidation": ([20, *own, *share, at_end, sharp], judged(share, 1, 0)),
    }  # fmt: skip
    paper = [r for r in found if r["mixer"] in ("cram-paper", "cram-gumbel")]
    after, free = [r for r in paper if ended(r)], [r for r in paper if not ended(r)]
    late = {id(r): late_drop(r) for r in found}
    hits = [r for r in paper if late[id(r)]]
    later = [late[id(r)][0] - ended(r) for r in after if late[id(r)]]
    at_queries = sum(validations(r)[1][-1] > 0.9 * 0.05 for r in hits)
    mine = [r for r in found if r["mixer"] in ("cram", "cram-no-encoding")]
    ends = beta_ends(len(hits), len(paper))
    made["the transition is emergent, not set off by a schedule"] = (
        [sum(r in hits for r in after), len(after), (min(later), 30), (max(later), 30), sum(r in hits for r in free),
         len(free), len(hits) / len(paper), *ends, at_queries, sum(late[id(r)] is not None for r in mine), len(mine)],
        reaches([0, *ends], 0.5))  # fmt: skip
    q = [(d[0], *quality(r)) for r, d in zip(ours, drops, strict=True) if d]
    there = student([np.interp(at, s, values) for at, s, values in q])
    final = [values[-10:].mean() for _, _, values in q]
    crossed = sum(values[-1] >= 0.83 for _, _, values in q)
    made["the transition comes when mean q crosses 0.83"] = (
        [*((x, 0.015) for x in there), len(q), min(final), max(final), 0.83, crossed, len(q)],
        judged(there, 0.83, math.exp(-1)))  # fmt: skip
    return made


WITHOUT_CONSOLIDATION = {"price-only", "memorizer", "cram-random", "sliding-window", "seqboat", "mixture-of-depths",
                         "transmamba", "cram-no-consolidation"}  # fmt: skip


def bounds():
    held, free, own = [], [], []
    for run in runs():
        scratch = run["experiment"] == "transfer" and run["variant"].endswith("-scratch")
        rebind, test = run["config"]["task"]["rebind_frac"], run["metrics"]["test"]
        name = "rebound" if rebind == 1 else "recurring"
        if (run["experiment"] == "transfer" and not scratch) or rebind not in (0, 1) or not test[f"n_queries_{name}"]:
            continue
        n = test[f"n_queries_{name}"]
        wrong = wilson_high(1 - test[f"retrieval_acc_{name}"], n)
        guess = 1 / run["config"]["task"]["n_values"] if rebind == 1 else 0.0
        least = max(0.0, 1 - wrong / (1 - guess)) * n / test["n_tokens"]
        below = wilson_high(test["attention_frac"], test["n_tokens"]) < least
        if run["mixer"] == "recurrence":
            free.append(below)
        elif rebind == 1:
            held.append(below)
        elif run["mixer"] in WITHOUT_CONSOLIDATION:
            free.append(below)
        elif run["mixer"] == "cram" and standard(run):
            own.append(below)
    ends = beta_ends(sum(own), len(own))
    f = 0.05 * 0.7
    ours, theirs = math.log(100 / 0.05) / (2 * f), math.log(100 / 0.05) / f**2
    return {
        "no router over attention reads less than (1 - eps) f n where no weights can know the answer": (
            [sum(held), len(held)], NO if any(held) else YES),
        "without that assumption a router that consolidates nothing needs as much (5% on SRCD)": (
            [sum(free), len(free)], NO if any(free) else YES),
        "CRAM reads less than the bound for static routers (1.5% on SRCD)": (
            [sum(own), len(own), sum(own) / len(own), *ends], reaches([0, *ends], 0.5)),
        "a consolidated router reads at most eps_cons f n + O(sqrt(n log(K/delta))) for what recurs": (
            [2, ours, theirs, 2048, 100, 0.05], YES),
        "consolidation error <= eps_approx^2 + C/(T eta)": ([], NO),
        "use(T)/use(0) <= 1 - rho + eps": ([1, 1, 1 / (1 - 0.7)], YES),
    }  # fmt: skip


def training_reads(run, goal):
    """Tokens read in training up to the first validation that meets a goal; None if none does."""
    reads = seen = 0
    for row in run["series"]:
        reads, seen = reads + (row["n_tokens"] - seen) * row["train_reads_frac"], row["n_tokens"]
        if row["validation"] and goal(row["validation"]):
            return reads
    return None


def transfer():
    found = {}
    for run in some("transfer"):
        target, _, way = run["variant"].partition("-")
        found[run["mixer"], target, way, run["seed"]] = run

    def saved(run, target, by):
        mixer = "cram" if run["mixer"] == "cram-random" else run["mixer"]
        others = [
            found[key] for way in ("scratch", "no_encoding") if (key := (mixer, target, way, run["seed"])) in found
        ]
        if not others:
            return "nothing to compare"
        mine, first = run["metrics"]["test"], others[0]["metrics"]["test"]
        if mine["retrieval_acc"] < first["retrieval_acc"] - 0.01 or mine["dynamics_mse"] > 1.05 * first["dynamics_mse"]:
            return None
        if by == "test":
            return 1 - mine["attention_frac"] / first["attention_frac"]
        oracle = run["oracle"]["attention_frac"]

        def goal(v):
            return (v["retrieval_acc"] or 0) >= 0.95 and (by == "goal" or v["attention_frac"] <= 1.25 * oracle)

        own, theirs = training_reads(run, goal), [training_reads(r, goal) for r in others]
        if own is None:
            return None
        reached = [x for x in theirs if x is not None]
        return 1 - own / (min(reached) if reached else max(r["train_reads_frac"] * r["n_train_tokens"] for r in others))

    def told(mixer, targets, ways, by, level):
        """Numbers of the text, and by target whether some way saves a level, by the interval of two runs or more."""
        numbers, verdicts = [], {}
        for target in targets:
            for way in ways:
                keys = sorted(key for key in found if key[:3] == (mixer, target, way))
                shares = [s for key in keys if (s := saved(found[key], target, by)) != "nothing to compare"]
                known = [s for s in shares if s is not None]
                if not shares:
                    continue
                lost = len(known) < len(shares)
                numbers += [len(shares) - len(known), len(shares)] if lost else [100 * x for x in student(known)]
                verdict = OPEN if len(shares) < 2 else NO if lost else reaches(student(known), level)
                verdicts.setdefault(target, []).append(verdict)
        yes = sum(YES in v for v in verdicts.values())
        no = sum(YES not in v and NO in v for v in verdicts.values())
        return numbers, yes, no, len(verdicts)

    facts = ("recall", "rebound", "patterns", "copy")
    made = {}
    for what, ways in (
        ("a frozen memory and router with a new head reads about half of what training from scratch ends at", ["head"]),
        ("the same with embedding and head, or everything, trained on", ["embedding", "all"]),
    ):
        numbers, yes, no, n = told("cram", facts, ways, "test", 0.48)
        made[what] = (numbers, YES if 2 * yes > n else NO if 2 * no >= n else OPEN)
    for what, mixer, way in (
        ("a frozen router that never learned saves nothing", "cram", "untrained"),
        ("a random router at the carried one's rate saves nothing", "cram-random", ""),
        ("SeqBoat's router, carried with a new head, saves nothing", "seqboat", "head"),
    ):
        numbers, yes, no, n = told(mixer, facts, [way], "test", 0.1)
        made[what] = (numbers, YES if no == n else NO if yes else OPEN)
    for what, by in (
        ("ours: training reads up to 95% retrieval, 60% fewer on 3 targets", "goal"),
        ("ours: training reads up to 95% retrieval at 1.25 x the oracle's attention, 60% fewer on 3 targets", "sparse"),
    ):
        numbers, yes, no, n = told("cram", (*facts, "relabel", "queries", "laws"), ["head", "all"], by, 0.6)
        made[what] = (numbers, YES if yes >= 3 else NO if n - no < 3 else OPEN)
    return made


@functools.cache
def documents(data):
    return [json.loads(path.read_text()) for path in sorted((RESULTS / "irregular" / data).glob("*.json"))]


def split(data, model, way, field):
    return {d["seed"]: d["test"][field] for d in documents(data) if (d["model"], d.get("way")) == (model, way)}


def carried():
    made = {}
    for data in ("nafld2", "pbcseq"):
        own, scratch = (split(data, "cram", way, "attention_frac") for way in ("embedding", "scratch"))
        auc, before = (split(data, "cram", way, "auc") for way in ("embedding", "scratch"))
        gain = student([auc[s] - before[s] for s in auc])
        read, first = student(own.values(), 0, 1), student(scratch.values(), 0, 1)
        if first[0] < 0.001:
            verdict = NO if read[1] >= 0.001 else NOWHERE
        else:
            kept = YES if -gain[1] <= 0.01 else NO if -gain[2] > 0 else OPEN
            verdict = all_of([kept, reaches(student([0.52 * scratch[s] - own[s] for s in own]), 0)])
        made[f"memory and router frozen, embedding and heads new, on {data}: about half the reads"] = (
            [*read, *first, *gain], verdict)  # fmt: skip
    return made


def irregular():
    made = {what: ([], NOWHERE) for what in ("PhysioNet 2012, AUC", "MIMIC-III, AUC", "UCI person activity, accuracy")}
    for data in ("nafld2", "pbcseq"):
        models = ("cram", "gradient-boosting", "recurrence", "seqboat", "transformer")
        auc = {model: split(data, model, None, "auc") for model in models}
        read = student(split(data, "cram", None, "attention_frac").values(), 0, 1)
        best = max(models[1:], key=lambda model: np.mean(list(auc[model].values())))
        ahead = student([auc[best][s] - auc["cram"][s] for s in auc["cram"]])
        numbers = [x for model in models for x in student(auc[model].values(), 0, 1)]
        equal = YES if ahead[2] <= 0.01 else NO if ahead[1] > 0 else OPEN
        few = YES if read[2] <= 0.17 else NO if read[1] > 0.17 else OPEN
        made[f"CRAM is as good as the best other model, with few reads, on {data}"] = (
            [*numbers, *read, *ahead], all_of([equal, few]))  # fmt: skip
    return made


def practice_log(run):
    """Encounters (bins), and reads and chances to read (patterns, bins)."""
    log = run["practice"]
    first = np.array(log["first_encounter"], float)
    last = np.r_[first[1:] - 1, math.floor(first[-1] * 4 / 3)]
    return np.sqrt(first * last), np.array(log["read"], float), np.array(log["n"], float)


SHAPES = {
    "power": lambda k, p: -np.exp(p[0]) * np.log(k),
    "exponential": lambda k, p: -k * np.exp(-p[0]),
    "logistic": lambda k, p: -np.logaddexp(0, (k - np.exp(p[0])) * np.exp(-p[1])),
    "weibull": lambda k, p: -np.exp(np.minimum(np.exp(p[1]) * (np.log(k) - p[0]), 60)),
}
STARTS = {
    "power": [[-4], [-2], [0]],
    "exponential": [[5], [7], [9]],
    "logistic": [[c, c - w] for c in (5.5, 6.5, 7.3) for w in (0.7, 1.5, 2.5)],
    "weibull": [[c, g] for c in (5.5, 6.5, 7.3) for g in (0, 1, 2)],
}


def likeliest(law, k, hits, n):
    """Least negative log likelihood of a law that is at most 1 at the first encounter, and its shape."""
    miss, first = n - hits, k[0]

    def nats(p):
        ends = SHAPES[law](np.array([first]), p[1:])
        log = min(p[0], -1e-13) + SHAPES[law](k, p[1:]) - ends
        with np.errstate(divide="ignore", invalid="ignore"):
            return -(np.where(hits > 0, hits * log, 0) + np.where(miss > 0, miss * np.log(-np.expm1(log)), 0)).sum()

    bounds = [(-5, 0), *[(-12, 15)] * (len(STARTS[law][0]))]
    x = min(([-0.01, *start] for start in STARTS[law]), key=nats)
    before = math.inf
    while nats(x) < before - 1e-3:
        before = nats(x)
        for method in ("L-BFGS-B", "Nelder-Mead"):
            x = optimize.minimize(nats, x, method=method, bounds=bounds).x
            x[0] = min(x[0], 0)
    return nats(x), x[1:]


def step_nats(k, hits, n):
    def part(where):
        p = hits[where].sum() / n[where].sum()
        return -sum(c * math.log(x) for c, x in ((hits[where].sum(), p), ((n - hits)[where].sum(), 1 - p)) if c > 0)

    return min(part(k < place) + part(k >= place) for place in k[1:])


def criteria(k, hits, n):
    """AICc of all laws, best first; a step goes first among equals."""
    made = {}
    for law in (*SHAPES, "step"):
        nats = step_nats(k, hits, n) if law == "step" else likeliest(law, k, hits, n)[0]
        p = 2 if law in ("power", "exponential") else 3
        made[law] = 2 * nats + 2 * p + 2 * p * (p + 1) / (n.sum() - p - 1)
    return dict(sorted(made.items(), key=lambda item: (round(item[1], 1), item[0] != "step")))


def exponents(found):
    """Exponents of every run by likelihood, least squares, and a line through the logs."""
    made = []
    for run in found:
        k, hits, n = practice_log(run)
        met = n.sum(axis=0) > 0
        k, hits, n = k[met], hits.sum(axis=0)[met], n.sum(axis=0)[met]
        share = hits / n

        def error(p, k=k, share=share):
            return 100 * ((share - p[0] * k ** -p[1]) ** 2).sum()

        square = optimize.minimize(error, [0.9, 0.1], method="L-BFGS-B", bounds=[(0, 1), (0, 5)])
        line = stats.linregress(np.log(k[share > 0]), np.log(share[share > 0])).slope
        made.append((math.exp(likeliest("power", k, hits, n)[1][0]), square.x[1], -line))
    return [student(column) for column in zip(*made, strict=True)]


def practice():
    main, fast = some("srcd_table", "small", "cram"), some("srcd_table", "small", "cram-fast-semantic")
    later = [r for r in some("transfer", mixer="cram") if r["variant"] == "patterns-all"]
    made = {}
    for what, found, paper, without in (
        ("P(read at the k-th encounter) falls as k^-0.43", main, 0.43, 0),
        ("the same for patterns first met after the router has learned", later, 0.43, 0),
        ("10x semantic learning rate: exponent 0.71", fast, 0.71, 0.43),
    ):
        likelihood, *others = exponents(found)
        made[what] = (
            [1, *((x, 0.002) for x in likelihood), len(found), *((x, 0.002) for other in others for x in other)],
            judged(likelihood, paper, without))  # fmt: skip
    made["the practice curve is a power law"] = curve_laws(main)
    made["people's exponent is 0.4 to 0.5"] = people()
    return made


def curve_laws(found):
    worse, best = [], []
    for run in found:
        k, hits, n = practice_log(run)
        met = n.sum(axis=0) > 0
        laws = criteria(k[met], hits.sum(axis=0)[met], n.sum(axis=0)[met])
        worse.append(laws["power"] - min(laws.values()))
        best.append(next(iter(laws)))
    draws, single = np.random.default_rng(0), []  # the same twelve patterns
    for _ in range(12):
        k, hits, n = practice_log(found[int(draws.integers(len(found)))])
        i = int(draws.integers(len(hits)))
        met = n[i] > 0
        single.append(next(iter(criteria(k[met], hits[i][met], n[i][met]))))
    mean = student(worse)

    def shares(names):
        return sorted((names.count(name) / len(names) for name in set(names)), reverse=True)

    return ([*shares(best), len(found), *((x, 0.002 * x) for x in mean), *shares(single)],
            YES if mean[2] <= 2 else NO if mean[1] > 2 else OPEN)  # fmt: skip


EBBINGHAUS = {
    None: ((0.33, 1, 8.8, 24, 48, 144, 744), (58.2, 44.2, 35.8, 33.7, 27.8, 25.4, 21.1)),
    12: ((1, 2, 3, 4, 5, 6), (158, 109, 75, 56, 37, 31)),
    24: ((1, 2, 3, 4, 5, 6), (134, 71, 40, 25, 17, 14)),
}


def people():
    """Residuals of the line are drawn again, by another generator: ends agree within a tenth of the interval."""
    numbers, verdicts = [], []
    for name, table in EBBINGHAUS.items():
        x, y = np.log(table)
        line = stats.linregress(x, y)
        rest = (y - line.intercept - line.slope * x) * math.sqrt(len(x) / (len(x) - 2))
        draws = np.random.default_rng(99).choice(rest, (4000, len(x))) + line.slope * x
        low, high = np.percentile(-((x - x.mean()) @ draws.T) / ((x - x.mean()) ** 2).sum(), (2.5, 97.5))
        near = 0.15 * (high - low)
        numbers += [*([] if name is None else [name]), -line.slope, (low, near), (high, near)]
        verdicts.append(NO if low > 0.5 or high < 0.4 else YES if low >= 0.4 and high <= 0.5 else OPEN)
    return numbers, all_of(verdicts)
