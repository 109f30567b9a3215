"""`accuracy`: the methods at equal numbers of forwards, learning rates chosen on dev; the paper's Table 2 beside it."""

from pathlib import Path
from typing import Any

from reproduction.convergence import runs_of, until_table, write_comparison
from reproduction.facts import heading, missing
from reproduction.markdown import number, percent, table
from reproduction.pictures import draw_accuracy
from reproduction.results import Choice, Results
from reproduction.runner import Runner
from reproduction.study import HERE, Study, read_yaml
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
            cells.append(percent(results.validation(name, method)))
            cells.append(lr_text(results.choice(name, method)))
        rows.append(cells)
    return table(rows)


def lr_text(choice: Choice | None) -> str:
    """The learning rate, `<` or `>` at the edge of the grid, and how many were tried where some are missing."""
    if choice is None:
        return "-"
    partly = f" ({choice.num_tried} of {choice.num_wanted} tried)" if choice.num_tried < choice.num_wanted else ""
    return f"{choice.lr:g}{' *' if choice.at_edge else ''}{partly}"


def notes(results: Results, published: dict[str, Any]) -> list[str]:
    """What a reader of the table must know."""
    before = [f"{scheme.title} {percent(found)}" for name, scheme in results.study.schemes.items()
              if (found := first_before(results, name)) is not None]  # fmt: skip
    return [
        f"Published: {published['source']}. Elsewhere: {'; '.join(published['elsewhere'])}.",
        f"Ours: {results.metric} on validation in percent, of the weights that were best on dev; mean (range over "
        "seeds). The learning rate is the best on dev of the first seed's runs; * marks the edge of its grid.",
        f"Before training: {', '.join(before) or '-'}.",
        f"Forwards are forward equivalents: a loss of the batch is 1, a backward pass {BACKWARD} (a first-order step "
        f"{1 + BACKWARD}), an exact directional derivative 1.",
    ]


def first_before(results: Results, scheme: str) -> Any:
    """Validation of the untuned model."""
    found = (results.validation(scheme, method, "before") for method in results.study.methods)
    return next((spread for spread in found if spread is not None), None)
