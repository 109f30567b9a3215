"""The model card of an export: Hugging Face metadata and what the run measured, from the run's own records."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from zoscale.config import RunConfig
from zoscale.release.run_record import RunRecord
from zoscale.tasks import TASKS

_MOST_ROWS = 12  # of the table of evaluations
_LIBRARY = {"adapter": "peft", "merged": "transformers"}
_LOADING = {
    "adapter": (
        "from peft import AutoPeftModelForCausalLM\n\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("{name}", dtype="{dtype}")'
    ),
    "merged": (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="{dtype}")\n'
        'tokenizer = AutoTokenizer.from_pretrained("{name}")'
    ),
}


def model_card(record: RunRecord, summary: Mapping[str, Any], *, kind: str, name: str, dtype: str) -> str:
    """The text of README.md.

    Args:
        record: of the run.
        summary: of the run.
        kind: `adapter` or `merged`.
        name: repository id, or name of the folder.
        dtype: of the weights in use.
    """
    data = _metadata(record.config, summary, kind=kind, name=name)
    config, base = record.config, hub_id(record.config.model.id)
    shown = f"[{base}](https://huggingface.co/{base})" if base else _place(config.model.id)
    what = f"An adapter ({_scheme(config)}) for" if kind == "adapter" else "A fine-tuned copy of"
    parts = [
        f"# {name.rpartition('/')[2]}",
        f"{what} {shown}, trained {_method(config, summary)}.",
        f"## Use\n\n```python\n{_LOADING[kind].format(name=name, dtype=dtype)}\n```",
        f"## Results\n\n{_results(config, summary)}",
        _history(record, summary),
        f"## Training\n\n{_training(config, summary)}",
        f"<details><summary>Configuration</summary>\n\n```yaml\n{_configuration(config)}```\n\n</details>",
        "The licence is that of the base model; name it in the metadata above before you publish.",
    ]
    return f"---\n{data.to_yaml().strip()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def _method(config: RunConfig, summary: Mapping[str, Any]) -> str:
    if summary.get("backwards"):
        return f"with zoscale by backpropagation through DeepSpeed ZeRO-3, {config.optimizer.name}"
    how = f"{config.optimizer.name} with the {config.probe.name} probe"
    return f"without backpropagation by zoscale: forward passes only, {how}"


def hub_id(place: str | None) -> str | None:
    """The place if it can be an id on the Hugging Face Hub; None for local folders."""
    if place is None or Path(place).exists():
        return None
    try:
        validate_repo_id(place)
    except HFValidationError:
        return None
    return place


def _metadata(config: RunConfig, summary: Mapping[str, Any], *, kind: str, name: str) -> ModelCardData:
    base, dataset = hub_id(config.model.id), hub_id(config.task.args.get("path"))
    scheme = [_scheme(config)] if config.adapter is not None else []
    order = [] if summary.get("backwards") else ["zeroth-order-optimization"]
    chosen = summary["validation"]["chosen"]
    metrics = _metrics(config, chosen)
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset or config.task.name,
            dataset_name=config.task.name,
            dataset_split="validation",
            metric_type=metric,
            metric_value=round(float(chosen[metric]), 6),
        )
        for metric in metrics
    ]
    return ModelCardData(
        base_model=base,
        library_name=_LIBRARY[kind],
        pipeline_tag="text-generation",
        tags=["zoscale", *order, config.optimizer.name, *scheme],
        datasets=[dataset] if dataset else None,
        metrics=metrics,
        model_name=name.rpartition("/")[2],
        eval_results=results,
    )


def _metrics(config: RunConfig, result: Mapping[str, Any]) -> list[str]:
    """The metrics of a result that say something about the run's task."""
    return [metric for metric in TASKS[config.task.name].metrics if metric in result]


def _results(config: RunConfig, summary: Mapping[str, Any]) -> str:
    before, chosen = summary["validation"]["before"], summary["validation"]["chosen"]
    rows = [(metric, f"{before[metric]:.4f}", f"{chosen[metric]:.4f}") for metric in _metrics(config, chosen)]
    dev = summary["dev"]
    where = f"the best step on dev, {dev['best_step']}" if dev else "the last step"
    counted = f"{chosen['count']} examples of the validation split; the weights are of {where} of {summary['steps']}."
    return f"{_table(('validation', 'before', 'after'), rows)}\n\nTask `{config.task.name}`, {counted}"


def _history(record: RunRecord, summary: Mapping[str, Any]) -> str:
    """The evaluations on dev by step; thinned out if there are many."""
    taken = record.evaluations("dev")
    metrics = _metrics(record.config, taken[0][1]) if taken else []
    every = -(-len(taken) // _MOST_ROWS) or 1
    best = summary["dev"]["best_step"] if summary["dev"] else None
    kept = [(step, row) for i, (step, row) in enumerate(taken) if i % every == 0 or step in (best, taken[-1][0])]
    if not kept:
        return ""
    rows = [(str(step), *(f"{row[metric]:.4f}" for metric in metrics)) for step, row in kept]
    return f"On dev, which chose the step ({taken[0][1]['count']} examples):\n\n{_table(('step', *metrics), rows)}"


def _training(config: RunConfig, summary: Mapping[str, Any]) -> str:
    hardware = summary["hardware"]
    devices = ", ".join(sorted(set(hardware["gpus"]))) or f"CPU ({hardware['machine']})"
    lr = f" lr {config.optimizer.args['lr']}" if "lr" in config.optimizer.args else ""
    rows = [
        ("optimizer", f"{config.optimizer.name}{lr}"),
        ("probe, estimator", f"{config.probe.name}, {config.estimator.name}"),
        ("steps, forward passes", f"{summary['steps']:,}, {summary['forwards']:,}"),
        ("batch", f"{config.data.batch_size} examples"),
        ("seed", str(summary["seed"])),
        ("skipped steps", str(summary["skipped_steps"])),
        ("ranks", f"{summary['world_size']} x {devices}"),
        ("training time", f"{summary['training_seconds']:.0f} s, {summary['tokens_per_second']:.0f} tokens/s"),
        *_of_a_rank(summary),
        ("commit of zoscale", summary["commit"]),
        ("configuration", summary["config_hash"]),
        ("versions", ", ".join(f"{package} {version}" for package, version in summary["versions"].items())),
    ]
    return _table(("", ""), rows)


def _of_a_rank(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was measured of the ranks, which is of the steps since the run was resumed."""
    ranks, since = summary["ranks"], summary["resumed_at_step"]
    if since == summary["steps"]:
        return []
    peak = max(rank["peak_memory_bytes"] for rank in ranks)
    gathered = max(rank["gathered_bytes_per_step"] for rank in ranks)
    when = f", since step {since:,}" if since else ""
    return [
        (f"peak memory of a rank{when}", f"{peak / 2**20:.0f} MiB"),
        (f"gathered per rank and step{when}", f"{gathered / 2**20:.1f} MiB"),
    ]


def _configuration(config: RunConfig) -> str:
    """What was computed, as YAML; of absolute paths only the last part."""
    from zoscale.config.strict_yaml import dump_yaml

    return dump_yaml(_without_places(config.identity()))


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _scheme(config: RunConfig) -> str:
    """The kind of adapter, as in the configuration."""
    return str((config.adapter or {}).get("peft_type") or "lora")


def _place(model: str | None) -> str:
    return f"the model `{Path(model).name}`" if model else "a model with random weights"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
