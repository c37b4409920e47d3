"""The tables and pictures of README.md and docs/, made from extras/results.csv.

    python -m extras.plot            write them: each table stands between <!-- results: NAME --> and <!-- end -->
    python -m extras.plot --check    only say which tables are not those of results.csv

Numbers are WER in %: means over the seeds that all columns or lines of a table have. With several seeds ± is the
standard error. Rates are those of training, in rising order. Runs that were not done have no column or line.
Pictures need matplotlib (extras/requirements.txt).
"""
import argparse
import re
import statistics
import sys

from data import parse_rates, task_rates
from extras.experiments import LISTS, RESULTS, ROOT, read_results
from extras.ideas import IDEAS
from real.files import write_whole
from real.report import table
from real.script import run_script

PAGES = "README.md", "docs/results.md", "docs/speech.md"
MARKED = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
CONDITIONS = {"sound and lips, clean": ("avsr", "clean"), "sound and lips, babble at 0 dB": ("avsr", "0"),
              "sound and lips, babble at -5 dB": ("avsr", "-5"), "sound, clean": ("asr", "clean"),
              "sound, babble at 0 dB": ("asr", "0"), "sound, babble at -5 dB": ("asr", "-5"), "lips": ("vsr", "clean")}
SHOWN = {name: CONDITIONS[name] for name in (
    "sound and lips, clean", "sound and lips, babble at -5 dB", "sound, clean", "sound, babble at 0 dB", "lips")}
SUMMED = ("avsr", "clean"), ("avsr", "-5"), ("vsr", "clean")     # the conditions of the sentence below README's table
METHODS = {"MoME": ("mome", ""), "LoRA (MTSK SS)": ("lora", ""),
           "LoRA, as many parameters in all": ("lora", "parameters of all experts"), "MTSK MS": ("lora-ms", ""),
           "MTSK MSS": ("lora-mss", ""), "projectors only": ("projectors", "")}
SINGLES = {"Llama-AVSR": "lora", "MoME-I": "mome"}     # a model for each pair of rates
STYLES = {"MoME": "tab:blue", "LoRA (MTSK SS)": "tab:orange", "projectors only": "tab:green"}


def chosen(rows, **where):
    """The rows whose columns have these values; a list holds all values that will do."""
    return [row for row in rows if all(row[name] in (value if isinstance(value, list) else [value])
                                       for name, value in where.items())]


def spread(values):
    """Values of several seeds -> their mean in %, and its standard error or None."""
    values = [100 * value for value in values]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


def of_common_seeds(found):
    """{title: rows} -> the same without titles that have none, and with only the seeds that all trainings have."""
    trainings = {}
    for title, rows in found.items():
        for row in rows:
            trainings.setdefault((title, row["train_rates"]), set()).add(row["seed"])
    seeds = list(set.intersection(*trainings.values())) if trainings else []
    return {title: chosen(rows, seed=seeds) for title, rows in found.items() if rows}


def cell(rows, task, train_rates, errors=True):
    """Rows of a task and noise -> '1.4 ± 0.4 / 1.3 ± 0.5', one entry for each trained set of rates. A dash: no row.

    Several trainings with one seed count as one value, their mean."""
    entries = []
    for rates in task_rates(task, parse_rates(train_rates)):
        seeds = {}
        for row in chosen(rows, rates=":".join(map(str, rates.values()))):
            seeds.setdefault(row["seed"], []).append(float(row["wer"]))
        values = [statistics.fmean(of_seed) for of_seed in seeds.values()]
        mean, error = spread(values) if values else (None, None)
        shown = "–" if mean is None else f"{mean:.1f}"
        entries.append(shown if error is None or not errors else f"{shown} ± {error:.1f}")
    return " / ".join(entries)


def markdown(header, lines):
    """A table in markdown. Columns and lines of runs that were not done are left out before."""
    if not lines or len(header) < 2:
        return "*Not run yet.*\n"
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines)) + "\n"


def by_condition(rows, train_rates, columns, conditions=CONDITIONS, errors=True, singles=None):
    """A line for each task and noise, a column for each {title: (method, variant)}, trained once for all rates.

    singles: {title: method} for columns with a training for each pair of rates."""
    pairs = [f"{audio}:{video}" for audio, video in parse_rates(train_rates)]
    of_columns = {title: chosen(rows, method=method, variant=variant, train_rates=train_rates)
                  for title, (method, variant) in columns.items()}
    for title, method in (singles or {}).items():
        of_columns[title] = chosen(rows, method=method, variant="", train_rates=pairs)
    of_columns = of_common_seeds(of_columns)
    lines = []
    for name, (task, snr) in conditions.items():
        found = [chosen(of_column, task=task, snr_db=snr) for of_column in of_columns.values()]
        lines.append([name, *(cell(rows, task, train_rates, errors) for rows in found)])
    return markdown(["WER %", *of_columns], lines)


def differences(rows, train_rates):
    """MoME's WER minus LoRA's with the same seed -> {condition: a (mean, standard error or None) for each set of rates}.

    A seed fixes clips, encoders and Llama, so this difference varies less than either WER."""
    found = {}
    for name, (task, snr) in CONDITIONS.items():
        same = dict(variant="", train_rates=train_rates, task=task, snr_db=snr)
        for rates in task_rates(task, parse_rates(train_rates)):
            mome, lora = ({row["seed"]: float(row["wer"]) for row in chosen(
                rows, method=method, rates=":".join(map(str, rates.values())), **same)} for method in ("mome", "lora"))
            found.setdefault(name, []).append(spread([mome[seed] - lora[seed] for seed in sorted(mome.keys() & lora.keys())]))
    return found


def signed(points):
    """-0.04 -> '+0.0': what is rounded to nothing has no minus."""
    return f"{round(points, 1) + 0:+.1f}"


def paired(rows, train_rates):
    """A line for each task and noise: MoME's WER minus LoRA's, mean and standard error over the seeds."""
    lines = [[name, " / ".join(f"{signed(mean)} ± {error or 0:.1f}" for mean, error in of_rates)]
             for name, of_rates in differences(rows, train_rates).items()]
    return markdown(["MoME's WER minus LoRA's, in points", f"trained at {train_rates}"], lines)


def parameters(rows, columns):
    """A line: the parameters in the LLM, of each method, active and in all."""
    lines = []
    for title, (method, variant) in columns.items():
        of_method = chosen(rows, method=method, variant=variant, train_rates="2,4,8")
        if of_method:
            lines.append([title, f"{int(of_method[0]['active_params']):,}", f"{int(of_method[0]['trained_params']):,}"])
    return markdown(["in the LLM", "active for one token", "in all"], lines)


def one_or_each(rows):
    """A line for each kind of condition, a column for each method and set of rates. A cell is the WER of the models for one
    pair of rates minus that of the model for all: mean and range over cells, each the mean over the seeds that all have."""
    kinds = {"where lips are seen, clean and in babble": [("avsr", "clean"), ("avsr", "0"), ("avsr", "-5"), ("vsr", "clean")],
             "sound alone, clean": [("asr", "clean")], "sound alone, in babble": [("asr", "0"), ("asr", "-5")]}
    heads, lines = [""], [[kind] for kind in kinds]
    for title, method in SINGLES.items():
        for train_rates in ("2,4,8", "4,16x2,5"):
            pairs = [f"{audio}:{video}" for audio, video in parse_rates(train_rates)]
            same = chosen(rows, method=method, variant="")
            seeds = set.intersection(*({row["seed"] for row in chosen(same, train_rates=one)} for one in (train_rates, *pairs)))
            wers = {}
            for row in chosen(same, train_rates=[train_rates, *pairs], seed=list(seeds)):
                wers.setdefault((row["task"], row["snr_db"], row["rates"], row["train_rates"]), []).append(float(row["wer"]))
            means = {key: 100 * statistics.fmean(of_seeds) for key, of_seeds in wers.items()}
            found = [[mean - means[(*key[:3], train_rates)] for key, mean in means.items() if key[:2] in conditions
                      and key[3] != train_rates and key[2] != "auto"] for conditions in kinds.values()]
            if all(found):
                heads.append(f"{title}, {train_rates}")
                for line, xs in zip(lines, found):
                    mean, low, high = (round(x, 1) + 0 for x in (statistics.fmean(xs), min(xs), max(xs)))
                    line.append(f"{mean} ({low} to {high})")
    return markdown(heads, lines)


def by_variant(rows, train_rates, variants):
    """A line for each {title: (method, variant)}, a column for each of five conditions."""
    found = {title: chosen(rows, method=method, variant=variant, train_rates=train_rates)
             for title, (method, variant) in variants.items()}
    lines = []
    for title, of_variant in of_common_seeds(found).items():
        active = f"{int(of_variant[0]['active_params']):,}"
        cells = [cell(chosen(of_variant, task=task, snr_db=snr), task, train_rates) for task, snr in SHOWN.values()]
        lines.append([title, active, *cells])
    return markdown(["WER %", "active", *SHOWN], lines)


def printed(rows):
    """The table of the default job with seed 0, as train.py prints it."""
    own = []
    for row in chosen(rows, method="mome", variant="", train_rates="2,4,8", seed="0"):
        rates = row["rates"].split(":")
        of_stream = {"avsr": rates * 2, "asr": [*rates, None], "vsr": [None, *rates]}[row["task"]]
        audio, video = ("auto", None) if row["rates"] == "auto" else (of_stream[0], of_stream[1])
        snr = None if row["snr_db"] == "clean" else float(row["snr_db"])
        own.append({"task": row["task"], "audio_rate": audio, "video_rate": video, "snr_db": snr,
                    "wer": float(row["wer"]), "tokens": float(row["tokens"])})
    return "".join(f"    {line}\n" for line in table(own).splitlines())


def summary(rows, train_rates="2,4,8"):
    """A sentence: the errors of LoRA and of projectors only as multiples of MoME's, over the seeds that all have."""
    of_methods = {method: chosen(rows, method=method, variant="", train_rates=train_rates)
                  for method in ("mome", "lora", "projectors")}
    seeds = set.intersection(*({row["seed"] for row in found} for found in of_methods.values()))

    def errors(method):
        found = chosen(of_methods[method], seed=list(seeds))
        found = [row for row in found if (row["task"], row["snr_db"]) in SUMMED and row["rates"] != "auto"]
        return sum(float(row["wer"]) * int(row["words"]) for row in found)

    if not seeds:
        return "*Not run yet.*\n"
    lora, projectors = (errors(method) / errors("mome") for method in ("lora", "projectors"))
    of_seeds = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
    return (f"At rates 2 / 4 / 8, mean of {of_seeds}; standard errors are in [docs/results.md](docs/results.md). "
            f"LoRA makes {lora:.2f} times\nMoME's errors, projectors alone {projectors:.1f} times "
            "(sound with lips, clean and at -5 dB, and lips; all rates together).\n")


def paper_summary(rows):
    """A sentence: MoME against LoRA at the paper's rates, where lips are seen."""
    found = differences(rows, "4,16x2,5")
    means = [mean for name, of_rates in found.items() if "lips" in name for mean, _ in of_rates]
    return (f"At the paper's rates MoME's WER minus LoRA's is {signed(min(means))} to {signed(max(means))} points "
            "where lips are seen.\n")


def own_decoder(rows):
    """A sentence: the WER of Whisper with its own decoder, see extras/own_decoder.py."""
    found = chosen(rows, method="whisper-base")
    if not found:
        return "*Not run yet.*\n"
    return f"Whisper-base with its own decoder: {100 * float(found[0]['wer']):.1f} % WER of {found[0]['words']} words.\n"


def tables(rows):
    """results.csv -> {name: its text}."""
    tested = chosen(rows, split="test")
    toy, few = chosen(tested, data="synthetic"), {title: METHODS[title] for title in STYLES}
    default = {"8 routed, 1 shared, bottleneck 8, beside attention": ("mome", "lr 4.5e-3")}
    variants = {name: [(trial.method, trial.variant) for trial in LISTS[name]] for name in ("experts", "causes")}
    sharing = {"a router for each set of rates": ("mome-routers", "lr 4.5e-3"),
               "a projector for each rate": ("mome", "projector per rate"),
               "the first line at lr 3e-3": ("mome", ""), "a router for each set of rates at lr 3e-3": ("mome-routers", "")}
    experts = {name: (method, name) for method, name in variants["experts"]}
    names = {"mome": "MoME", "lora": "LoRA"}
    causes = {f"{names[method]}, {name}": (method, name) for method, name in variants["causes"]}
    ideas = {names.get(method, method): (method, "") for method in ("mome", *IDEAS)}
    heard = {name: CONDITIONS[name] for name in ("sound and lips, clean", "sound, clean", "lips")}
    opened = {f"{title}, {variant or 'greedy'}": (METHODS[title][0], variant)
              for title in ("MoME", "projectors only") for variant in ("", "beam 5", "3,000 steps", "3,000 steps, beam 5")}
    digits = {title: METHODS[title] for title in ("MoME", "projectors only")} | {
        "MoME, all parts stand-ins": ("mome", "stand-ins")}
    clean = {"sound, clean": CONDITIONS["sound, clean"]}
    sound = {name: condition for name, condition in CONDITIONS.items() if condition[0] == "asr"}
    return {
        "printed": printed(toy),
        "readme": by_condition(toy, "2,4,8", few, SHOWN, errors=False),
        "summary": summary(toy) + paper_summary(toy),
        "main": by_condition(toy, "2,4,8", METHODS),
        "paired": paired(toy, "2,4,8"),
        "baselines": by_condition(toy, "2,4,8", METHODS, singles=SINGLES),
        "paper-rates": by_condition(toy, "4,16x2,5", METHODS),
        "paper-paired": paired(toy, "4,16x2,5"),
        "paper-baselines": by_condition(toy, "4,16x2,5", METHODS, singles=SINGLES),
        "one-or-each": one_or_each(toy),
        "parameters": parameters(toy, METHODS | {"MoME, a router for each set of rates": ("mome-routers", "lr 4.5e-3")}),
        "sharing": by_variant(toy, "2,4,8", default | sharing),
        "experts": by_variant(toy, "2,4,8", default | experts),
        "causes": by_variant(toy, "2,4,8", {"MoME": ("mome", ""), "LoRA": ("lora", "")} | causes),
        "ideas": by_condition(chosen(rows, data="synthetic", split="valid"), "2,4,8", ideas, heard),
        "digits": by_condition(chosen(tested, data="digits"), "4,8,16", digits, sound),
        "an4": by_condition(
            chosen(tested, data="an4"), "4,8,16",
            few | {f"MoME, {variant}": ("mome", variant) for variant in (
                "coarse rates more often", "beam 5", "2,200 steps", "5 copies")}, clean),
        "an4-coarse": by_condition(chosen(tested, data="an4"), "4,8,16", {
            "MoME, coarse rates more often, 2 seeds": ("mome", "coarse rates more often")}, clean),
        "open": by_condition(chosen(tested, data="librispeech"), "4,8,16", opened, clean),
        "own-decoder": own_decoder(chosen(tested, data="librispeech")),
        "grid": by_condition(chosen(tested, data="grid_s1"), "2,4,8", few)}


def updated(page, made):
    """The text of a page with its tables as they are made."""
    return MARKED.sub(lambda match: match[1] + made[match[2]] + match[3], page)


def tokens_picture(figure, rows, train_rates="2,4,8", snrs=("clean", "-5")):
    """Draw WER over the tokens that the LLM reads before the first word: a panel for each noise, a line a method."""
    figure.set_size_inches(9, 3.6)
    toy = chosen(rows, train_rates=train_rates, data="synthetic", task="avsr", split="test")
    of_methods = {title: chosen(toy, method=METHODS[title][0], variant=METHODS[title][1]) for title in STYLES}
    of_methods = of_common_seeds(of_methods)
    for panel, snr in zip(figure.subplots(1, len(snrs), sharey=True), snrs):
        for title, of_method in of_methods.items():
            points = {}
            for row in chosen(of_method, snr_db=snr):
                if row["rates"] != "auto":
                    points.setdefault(row["rates"], []).append((float(row["tokens"]), float(row["wer"])))
            marks = {}
            for rates, of_seeds in points.items():
                mean, error = spread([wer for _, wer in of_seeds])
                marks[statistics.fmean(tokens for tokens, _ in of_seeds)] = rates, mean, error or 0
            if marks:
                tokens = sorted(marks)
                rates, means, errors = zip(*(marks[n] for n in tokens))
                panel.errorbar(tokens, means, errors, fmt="o-", capsize=3, color=STYLES[title], label=title)
                panel.set_xscale("log")
                panel.set_yscale("log")
                panel.set_xticks([], minor=True)
                panel.set_xticks(tokens, [f"{n:.0f}\n{rate}" for n, rate in zip(tokens, rates)])
        panel.set(title="clean" if snr == "clean" else f"babble at {snr} dB")
        panel.set(xlabel="tokens read by the LLM, at rates of sound:lips")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("WER, %")
    figure.axes[0].legend()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a table is not current")
    args = parser.parse_args(argv)
    rows = read_results(RESULTS)
    made, old = tables(rows), []
    for page in map(ROOT.joinpath, PAGES):
        text = page.read_text("utf-8")
        if (new := updated(text, made)) != text:
            old.append(page.name)
            if not args.check:
                write_whole(page, lambda path: path.write_text(new, "utf-8"))
    done = "not current" if args.check else "written"
    print("; ".join(f"{name}: {done}" for name in old) or "all tables are those of results.csv")
    if args.check:
        return int(bool(old))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("plot.py: matplotlib is not installed: pip install -r extras/requirements.txt", file=sys.stderr)
        return 2
    figure = Figure(layout="constrained")
    tokens_picture(figure, rows)
    write_whole(ROOT / "docs/tokens.png", lambda path: figure.savefig(path, dpi=130, format="png"))
    return 0


if __name__ == "__main__":
    run_script(main)
