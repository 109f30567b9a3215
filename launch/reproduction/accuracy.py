"""`accuracy`: the methods at equal numbers of forwards, learning rates chosen on dev; the paper's Table 2 beside it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from reproduction.convergence import runs_of, until_table, write_comparison
from reproduction.facts import heading, missing
from reproduction.markdown import number, percent, table
from reproduction.pictures import draw_accuracy
from reproduction.results import Choice, Results
from reproduction.runner import Runner
from reproduction.study import HERE, Study
from zoscale.config import Method, read_yaml
from zoscale.passes import BACKWARD
from zoscale.run_directory import write_text


def run(study: Study, runner: Runner) -> None:
    """Every learning rate with the first seed, then the best of each method with the others.

    A method with one learning rate has nothing to choose: all its seeds run at once.
    """
    results = Results(study)
    decided = [
        cell
        for scheme, method in results.pairs()
        if len(lrs := study.lrs[scheme][method]) == 1
        for cell in study.cells(scheme, method, study.seeds[1:], lrs)
    ]
    runner.run([*results.tuning(), *decided])
    runner.run(results.counted())


def report(study: Study, logs: Path) -> Path:
    """Write what is finished as `accuracy.md` with its pictures; returns its path."""
    results, published = Results(study), read_yaml(HERE / "published.yaml")["accuracy"]
    parts = [heading(study, "accuracy at equal forwards", results.counted() + results.tuning())]
    parts += [accuracy_table(results, published), *(f"- {line}" for line in notes(results, published)), ""]
    parts += ["## Settings", "", settings_table(results)]
    draw_accuracy(results, published, study.out / "accuracy.png")
    parts += ["![accuracy](accuracy.png)", ""]
    for name, scheme in study.schemes.items():
        if runs := runs_of(results, name):
            parts += [f"## {scheme.title}: forwards until an accuracy on dev", "", until_table(results, runs)]
            verdicts = write_comparison(results, name, runs, study.out / name)
            parts += [f"## {scheme.title}: per forward equivalent, per second, per device hour", "", verdicts]
    parts += missing(results.missing(), logs)
    path = study.out / "accuracy.md"
    write_text(path, "\n".join(parts))
    return path


def accuracy_table(results: Results, published: dict[str, Any]) -> str:
    """Table 2, theirs and ours, in percent."""
    schemes = results.study.schemes
    head = [text for own in schemes.values() for text in (f"{own.title}: published", "ours", "lr")]
    rows = [["method", *head]]
    for method, own in results.study.methods.items():
        cells = [own["title"]]
        for name, scheme in schemes.items():
            cells.append(number(published.get(scheme.like, {}).get(method)))
            cells.append(percent(results.validation(name, method), len(results.study.seeds)))
            cells.append(lr_text(results.choice(name, method)))
        rows.append(cells)
    return table(rows)


def settings_table(results: Results) -> str:
    """What each method was run with, beside its learning rate."""
    rows = [["method", "trained", "steps", "estimator", "probe", "optimizer"]]
    for scheme, method in results.pairs():
        config = results.grid(scheme, method)[0].config
        optimizer = replace(config.optimizer, args={k: v for k, v in config.optimizer.args.items() if k != "lr"})
        chosen = [method_text(part) for part in (config.estimator, config.probe, optimizer)]
        study = results.study
        rows.append([study.methods[method]["title"], study.schemes[scheme].title, str(config.train.steps), *chosen])
    return table(rows)


def method_text(method: Method) -> str:
    """Its name and options."""
    options = [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
               for name, value in method.args.items() if value not in (None, {}, [])]  # fmt: skip
    return ", ".join([f"`{method.name}`", *options])


def lr_text(choice: Choice | None) -> str:
    """The learning rate, what is to be known of its choice, and how many were tried where some are missing."""
    if choice is None:
        return "-"
    partly = f" ({choice.num_tried} of {choice.num_wanted} tried)" if choice.num_tried < choice.num_wanted else ""
    mark = " (fixed)" if choice.num_wanted == 1 else " *" if choice.at_edge else ""
    return f"{choice.lr:g}{mark}{partly}"


def notes(results: Results, published: dict[str, Any]) -> list[str]:
    """What a reader of the table must know."""
    before = [f"{scheme.title} {percent(found)}" for name, scheme in results.study.schemes.items()
              if (found := first_before(results, name)) is not None]  # fmt: skip
    return [
        f"Published: {published['source']}. Elsewhere: {'; '.join(published['elsewhere'])}.",
        f"Ours: {results.metric} on validation in percent, of the weights that were best on dev; mean (range over "
        "seeds) of the seeds that ended: `2 of 3 seeds` where others diverged or are missing. The learning rate is the "
        "best on dev of the first seed's runs; * marks the edge of its grid, fixed a preset with one for the method. "
        "Methods may differ in more than that: see the settings below.",
        f"Before training: {', '.join(before) or '-'}.",
        f"Forwards are forward equivalents: a loss of the batch is 1, a backward pass {BACKWARD} (a first-order step "
        f"{1 + BACKWARD}), an exact directional derivative 1.",
    ]


def first_before(results: Results, scheme: str) -> Any:
    """Validation of the untuned model."""
    found = (results.validation(scheme, method, "before") for method in results.study.methods)
    return next((spread for spread in found if spread is not None), None)
