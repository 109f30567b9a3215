"""The sections of a run's configuration that are fixed: one frozen dataclass each."""

from dataclasses import dataclass, field
from typing import Any, Literal

Master = Literal["fp32", "none", "stochastic"]
ForwardName = Literal["auto", "sequential", "fan_out"]
CompileName = Literal["off", "auto", "blocks", "cuda_graphs"]
NoiseBackend = Literal["auto", "eager", "compiled"]


@dataclass(frozen=True)
class ModelConfig:
    """The language model to tune.

    Args:
        id: Hugging Face id such as facebook/opt-1.3b, or a local folder; give exactly one of id and config.
        config: Architecture with random weights instead of an id, e.g. {model_type: opt, hidden_size: 768}.
        revision: Branch, tag or commit of the model on the Hub; null is its main branch.
        tokenizer: Hugging Face id or local folder of the tokenizer; null is the model's id.
        dtype: Type of the weights in the forward pass.
        attention: Attention implementation of transformers; null is the best that the model has.
        quantization: Hold frozen weights of linear layers in 4 bits (bitsandbytes, arXiv 2305.14314), multiply in
            dtype; each rank holds the whole model (mesh.shard_size 1) and trains an adapter.
        untie_head: Give a model whose head is tied to its embedding a head of its own, at first a copy of it, so that
            one can be trained without the other, as with trainable=^lm_head.
        trust_remote_code: Run Python code that comes with the model.
        allow_pickle: Load weights that are pickles (pytorch_model.bin), which can run code when loaded.
    """

    id: str | None = None
    config: dict[str, Any] | None = None
    revision: str | None = None
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    quantization: Literal["nf4", "fp4"] | None = None
    untie_head: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False


@dataclass(frozen=True)
class DataConfig:
    """Batches and the number of examples.

    Args:
        batch_size: Examples per step over all ranks.
        micro_batch_size: Examples per forward pass; divides batch_size.
        num_train: Training examples; null is all.
        num_dev: Examples held out of the training set for choosing a checkpoint; null is all that are left.
        num_validation: Validation examples; null is all.
        num_demonstrations: Training examples, held out of the others, that stand with their answers before every
            prompt; for in-context learning. Where max_length is too short for all, the first ones are left out.
        max_length: Longest prompt with its answer, in tokens; of a model with learned positions (OPT, GPT-2) at most as
            many as it has, and of one whose positions stretch with the longest row of a batch (LongRoPE, as Phi-3 has)
            at most as many as leave them as they are, less an adapter's virtual tokens. Longer prompts lose their
            beginning.
        length_window: Steps among which examples are put together by length to save padding. 1 sorts each step's
            examples into its micro-batches and leaves every step its examples; more save more and mix lengths anew,
            each step a share of every length.
        pad_to_multiple_of: Training rows are padded to a multiple of so many tokens (max_length at most), so that
            there are few shapes; null is 32 for a compiled forward, else 1.
        share_prefixes: Run a prompt once for all its options of several tokens, where the model is known to allow it
            (22 types, named in zoscale/models/loading.py, without FlashAttention); false runs it with each of them.
        pack: Put short examples of a micro-batch side by side into one row, where the model is known to allow it (see
            share_prefixes) and rows have at most 512 tokens; false gives each a row of its own.
    """

    batch_size: int = 16
    micro_batch_size: int = 4
    num_train: int | None = 1000
    num_dev: int | None = 500
    num_validation: int | None = None
    num_demonstrations: int = 0
    max_length: int = 512
    length_window: int = 1
    pad_to_multiple_of: int | None = None
    share_prefixes: bool = True
    pack: bool = True


@dataclass(frozen=True)
class TrainConfig:
    """The length of the run and what happens when.

    Args:
        steps: Optimizer steps of the whole run.
        eval_every: Steps between evaluations; 0 is only at the end.
        log_every: Steps between log lines.
        eval_micro_batch_size: Examples per forward pass in an evaluation.
        max_skipped_in_row: Consecutive steps that a non-finite loss may skip before the run stops.
        select_by: Metric on dev that chooses the weights which the run leaves, the highest, of a loss the lowest; null
            is the task's own.
    """

    steps: int = 1000
    eval_every: int = 100
    log_every: int = 10
    eval_micro_batch_size: int = 16
    max_skipped_in_row: int = 20
    select_by: str | None = None


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the steps, as a factor of the optimizer's lr.

    Args:
        name: Shape; linear and cosine fall to 0 at the last step.
        warmup_steps: Steps of linear growth from 0 at the start; not with constant.
    """

    name: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "linear"
    warmup_steps: int = 0


@dataclass(frozen=True)
class ForwardConfig:
    """How the losses of a step's candidates are taken.

    Args:
        name: fan_out takes all candidates in one pass, and gathers each layer once per step for all micro-batches of a
            rank; sequential takes one pass each; auto fans out where it can.
        max_rows: Most rows of one pass of fan_out, to bound the memory of its activations; null is
            as many as take about an eighth of the weights' memory, or 1 GiB.
        compile: Run transformer blocks under torch.compile (blocks), and replay what they launch as CUDA graphs too
            (cuda_graphs), to save launch overhead; auto is blocks on a GPU where possible. Needs an adapter or
            name=sequential, and the whole model on every rank (mesh.shard_size=1); see data.pad_to_multiple_of.
    """

    name: ForwardName = "auto"
    max_rows: int | None = None
    compile: CompileName = "off"


@dataclass(frozen=True)
class MeshConfig:
    """How ranks hold the model and share out the work; the estimates do not depend on it.

    Args:
        shard_size: Ranks that hold one copy of the model together, which divides their number; null is all of them
            (ZeRO-3; a single rank without runtime.deepspeed holds the model as with 1), 1 puts the whole model on every
            rank, which then gathers nothing; auto is as few as have the memory, as `zoscale plan` says.
        candidates: Parts that the candidates are cut into, so that ranks take different candidates of the same
            micro-batch; for more ranks than micro-batches.
        check_every: Steps between comparisons of the replicas' weights, which stop the run if they differ.
    """

    shard_size: int | Literal["auto"] | None = None
    candidates: int = 1
    check_every: int = 100


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept so that a run can be killed at any moment; every step is in the journal anyway.

    Args:
        every: Steps between checkpoints; 0 is only when the job is told to stop.
        keep: Newest checkpoints that are kept.
        journal_sync_every: Steps between waits for the disk; 1 loses nothing even when the machine fails.
    """

    every: int = 200
    keep: int = 2
    journal_sync_every: int = 1


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow.

    Args:
        mlflow: Log parameters, metrics and artifacts to MLflow.
        uri: Tracking URI; null is MLFLOW_TRACKING_URI, or else sqlite:///mlflow.db in output_dir.
        experiment: Name of the MLflow experiment.
        tags: Tags of the MLflow run.
    """

    mlflow: bool = True
    uri: str | None = None
    experiment: str = "zoscale"
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RuntimeConfig:
    """How the run is executed.

    Args:
        deepspeed: Path of a DeepSpeed JSON without batch sizes of its own; null is the ZeRO-3 settings of this package.
        timeout_minutes: Minutes that a rank waits for the others before the job fails, in phases such as loading.
        stall_seconds: Seconds without progress of a rank in training after which the job is stopped; a rank whose
            forward passes take long is given 20 of them, or twice the time of the first step or of a first evaluation
            of one pass.
        threads: CPU threads of torch per rank; null is torch's own choice.
        noise: Backend of the random numbers; auto is compiled on a GPU, and on a CPU where many elements are trained.
    """

    deepspeed: str | None = None
    timeout_minutes: float = 30.0
    stall_seconds: float = 30.0
    threads: int | None = None
    noise: NoiseBackend = "auto"
