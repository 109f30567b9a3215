"""Options of several tokens merged into one row against a row each: tokens, and time as a ratio measured in one run.

python launch/benchmark_prefixes.py [--config FILE] [--prompt P] [--options O] [--option L] [--json FILE]

Random prompts of P tokens with O options of L tokens each, four examples per forward pass, one process.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from zoscale.cli import guarded
from zoscale.config import ConfigError, ModelConfig, at_least, read_yaml
from zoscale.data.batch import MicroBatch
from zoscale.data.prefixes import Row, share_prefixes
from zoscale.models.answers import AnswerModel
from zoscale.models.loading import load_model, read_model_config
from zoscale.models.sizes import count_parameters

OPT_125M: dict[str, Any] = {"model_type": "opt"}
EXAMPLES = 4


def micro_batch(vocabulary: int, prompt: int, options: int, option: int, *, merged: bool) -> MicroBatch:
    """Examples of random tokens; the first option is the right one."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: tuple(torch.randint(4, vocabulary, (count,), generator=generator).tolist())  # noqa: E731
    rows = []
    for example in range(EXAMPLES):
        start, own = draw(prompt), []
        for number in range(options):
            tokens = start + draw(option)
            own.append(Row(tokens[:-1], tuple((c - 1, tokens[c], number) for c in range(prompt, len(tokens))), example))
        rows += share_prefixes(own, prompt + options * option, branching=True) if merged else own
    return MicroBatch.from_rows(rows, [[number == 0 for number in range(options)]] * EXAMPLES, 0)


def measure(config: ModelConfig, lengths: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Tokens and median seconds of both over alternating repetitions."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    architecture = read_model_config(config)
    prompt, options, option = lengths
    positions, longest = count_parameters(architecture).positions, prompt + options * option
    if positions is not None and longest > positions:
        raise ConfigError(f"prompt and options of up to {positions} tokens", str(longest), "shorten them")
    torch.manual_seed(0)
    model = load_model(config, architecture).to(device)
    answers = AnswerModel(model, model)
    batches = {
        name: micro_batch(architecture.vocab_size, *lengths, merged=name == "merged").to(torch.device(device))
        for name in ("separate", "merged")
    }
    times: dict[str, list[float]] = {name: [] for name in batches}
    for repeat in range(repeats + 1):
        for name, batch in batches.items():
            started = time.perf_counter()
            with torch.no_grad():
                float(answers.answer_logprobs(batch).sum())
            if repeat > 0:  # the first one warms up
                times[name].append(time.perf_counter() - started)
    report: dict[str, Any] = {
        name: {"tokens": batch.num_tokens, "seconds": statistics.median(times[name])} for name, batch in batches.items()
    }
    for what in ("tokens", "seconds"):
        report[f"ratio_of_{what}"] = report["merged"][what] / report["separate"][what]
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, help="YAML of an architecture, as model.config; default OPT-125M")
    parser.add_argument("--prompt", type=at_least(0), default=60, help="tokens of a prompt")
    parser.add_argument("--options", type=at_least(1), default=4, help="options of an example")
    parser.add_argument("--option", type=at_least(1), default=5, help="tokens of an option")
    parser.add_argument("--repeats", type=at_least(1), default=10, help="timed passes of each")
    parser.add_argument("--threads", type=at_least(1), default=1, help="CPU threads")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shapes = read_yaml(arguments.config) if arguments.config else OPT_125M
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    lengths = (arguments.prompt, arguments.options, arguments.option)
    report = measure(ModelConfig(config=shapes, dtype=dtype), lengths, arguments.repeats)
    print(json.dumps(report, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(guarded("launch/benchmark_prefixes.py", main, sys.argv[1:]))
