"""Schema of all settings: a tree of frozen dataclasses, with a default and a help text for each.

Flags are flat (`--n_layer=4`) and have nanoGPT's names and meanings. The tree only groups them.
`settings.py` checks every value once against its type and its `Range`.
"""

# Annotations are not postponed: settings.py reads the fields' types.
import operator
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Annotated, Any, Literal, TypeVar

from fastgpt_kernels import OPS

T = TypeVar("T")


def flag(default: T, about: str) -> T:
    """Returns a dataclass field with a default and its line in `--help`."""
    return field(default=default, metadata={"about": about})  # type: ignore[return-value]


class Range:
    """Bounds of a number by name: ge (greater or equal), gt (greater than), le, lt."""

    SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}

    def __init__(self, **bounds: float):
        self.bounds = bounds

    def __contains__(self, value: float) -> bool:
        return all(getattr(operator, name)(value, b) for name, b in self.bounds.items())

    def __str__(self) -> str:
        return " and ".join(f"{self.SIGNS[name]} {b:,}" for name, b in self.bounds.items())


Count = Annotated[int, Range(ge=1, le=10**9)]
CountOrZero = Annotated[int, Range(ge=0, le=10**9)]
Size = Annotated[int, Range(ge=1, le=10**6)]
Fraction = Annotated[float, Range(ge=0, lt=1)]
Share = Annotated[float, Range(gt=0, le=1)]
NonNegative = Annotated[float, Range(ge=0)]
Positive = Annotated[float, Range(gt=0)]
Seed = Annotated[int, Range(ge=0, lt=2**63)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Pretrained = Literal["weights", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
Switch = Literal["auto"] | bool


@dataclass(frozen=True)
class RunConfig:
    out_dir: str = flag("", "Folder of the run; empty: a new one under runs/.")
    init_from: Literal["scratch", "resume"] | Pretrained = flag(
        "scratch",
        "scratch: new weights; resume: go on from the newest checkpoint of --out_dir or of the "
        "newest run; auto: resume if --out_dir has a checkpoint; gpt2, ...: OpenAI's weights, "
        "downloaded once; weights: those of --weights.",
    )
    checkpoint: str = flag(
        "latest", "With --init_from=resume: latest, best, or a folder's name under checkpoints/."
    )
    reset_optimizer: bool = flag(False, "Resume with fresh moments, without the optimizer's state.")
    weights: str = flag("", "Hugging Face GPT-2 folder or safetensors file to start from.")
    overwrite: bool = flag(False, "Replace the run that already stands in --out_dir.")
    dry_run: bool = flag(False, "Print what the run would take, on a GPU also the hours; stop.")
    max_iters: Count = flag(600_000, "Optimizer steps in all.")
    seed: Seed = flag(1337, "Determines initial weights, batches and dropout.")


@dataclass(frozen=True)
class CorpusConfig:
    dataset: str = flag("openwebtext", "A corpus of those in `fastgpt --help`, or a token folder.")
    input: str = flag("", "Train on this text file or folder instead of a named corpus.")
    tokenizer: str = flag("", "byte, char, gpt2 or bpe:N; empty: the corpus's own.")
    vocab_file: str = flag("", "Rank file for the gpt2 tokenizer, if it cannot be downloaded.")
    data_dir: str = flag("data", "Folder of prepared token files.")
    val_fraction: Fraction = flag(0.0, "Share of the text held out; 0: the corpus's own.")
    shards: Annotated[int, Range(ge=1, le=103)] = flag(10, "fineweb10B: shards of 100M tokens.")
    workers: Annotated[int, Range(ge=0, le=1024)] = flag(
        0, "Threads that tokenize; 0: one per core."
    )


@dataclass(frozen=True)
class DataConfig(CorpusConfig):
    sampling: Literal["random", "epochs"] = flag("random", "epochs: each window once, shuffled.")


@dataclass(frozen=True)
class ModelConfig:
    n_layer: Annotated[int, Range(ge=1, le=4096)] = flag(12, "Transformer blocks.")
    n_head: Size = flag(12, "Attention heads; divides n_embd.")
    n_embd: Size = flag(768, "Width of the residual stream.")
    block_size: Size = flag(1024, "Context length in tokens.")
    dropout: Fraction = flag(0.0, "Rate after the embedding, in attention and on both branches.")
    bias: bool = flag(False, "Biases in linear layers and layer norms, as in GPT-2.")
    gelu: Literal["tanh", "erf"] = flag("tanh", "tanh: as in GPT-2; erf: exact, as in nanoGPT.")
    vocab_size: CountOrZero = flag(0, "Token ids of the model; 0: those of the data or weights.")


@dataclass(frozen=True)
class OptimConfig:
    batch_size: Size = flag(12, "Sequences per micro-batch; auto: the fastest that fits.")
    auto_batch_size: bool = flag(False, "Set by --batch_size=auto.")
    gradient_accumulation_steps: Size = flag(40, "Micro-batches per optimizer step, on all GPUs.")
    optimizer: Literal["adamw", "muon"] = flag("adamw", "muon: for the blocks' matrices only.")
    learning_rate: Positive = flag(6e-4, "Highest learning rate, reached after the warm-up.")
    min_lr: NonNegative = flag(6e-5, "Learning rate at the end of the cosine.")
    warmup_iters: CountOrZero = flag(2000, "Steps of linear warm-up.")
    lr_schedule: Literal["cosine", "wsd"] = flag("cosine", "wsd: constant, at the end linear to 0.")
    lr_decay_fraction: Share = flag(0.4, "wsd: last part of lr_decay_iters, with a falling rate.")
    lr_decay_iters: CountOrZero = flag(0, "Step at which the schedule ends; 0: max_iters.")
    decay_lr: bool = flag(True, "False: the learning rate stays at learning_rate.")
    weight_decay: NonNegative = flag(0.1, "Decoupled decay of matrices and embeddings.")
    beta1: Fraction = flag(0.9, "AdamW: decay of the first moment.")
    beta2: Fraction = flag(0.95, "AdamW: decay of the second moment.")
    grad_clip: NonNegative = flag(1.0, "Clip the global gradient norm to this; 0: off.")

    @property
    def rows(self) -> int:
        """Returns the number of sequences in one optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps


@dataclass(frozen=True)
class LogConfig:
    eval_interval: Count = flag(2000, "Steps between evaluations (and checkpoints).")
    eval_iters: Size = flag(200, "Batches in one evaluation of one split.")
    target_val_loss: NonNegative = flag(0.0, "Stop at this validation loss or less; 0: never.")
    eval_only: bool = flag(False, "Evaluate once and stop.")
    log_interval: Count = flag(1, "Steps between log lines.")
    always_save_checkpoint: bool = flag(True, "False: save only if the validation loss improved.")
    keep_checkpoints: Count = flag(3, "How many of the newest checkpoints stay, besides the best.")
    sample_tokens: Annotated[int, Range(ge=0, le=10**6)] = flag(
        300, "Tokens of sample text at the end of the run."
    )
    wandb_log: bool = flag(False, "Log to Weights & Biases (extra [log]).")
    wandb_project: str = flag("fastgpt", "Project in Weights & Biases.")
    wandb_run_name: str = flag("", "Run's name there; empty: the name of the run's folder.")
    tensorboard: bool = flag(False, "Write TensorBoard events to the run's folder (extra [log]).")


@dataclass(frozen=True)
class SystemConfig:
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps.")
    dtype: Dtype = flag("auto", "auto: bfloat16 on a GPU (float16 if it is old), float32 on a CPU.")
    tf32: bool = flag(False, "With --dtype=float32: round the inputs of matmuls to TF32.")
    deterministic: bool = flag(False, "Bitwise reproducible gradients on a GPU too; slower.")
    compile: Switch = flag("auto", "torch.compile; auto: on a GPU.")
    max_autotune: bool = flag(False, "torch.compile times Triton's matmuls too; minutes, once.")
    kernels: Literal["auto", "triton", "eager"] = flag(
        "auto", "Implementation of the fused ops; auto: the fastest known here that passes a check."
    )
    activation_checkpointing: bool = flag(False, "Recompute blocks: less memory, a third slower.")
    cuda_graph: Switch = flag("auto", "One launch per micro-batch; auto: where launching is slow.")
    peak_tflops: NonNegative = flag(0.0, "Peak for MFU in TFLOP/s; 0: from the table, or measured.")
    parallel: Literal["auto", "ddp", "fsdp"] = flag("auto", "With torchrun; auto: ddp if it fits.")
    reduce_dtype: Literal["float32", "bfloat16"] = flag("float32", "Of gradients' sums over ranks.")
    dist_timeout: Annotated[float, Range(gt=0, le=10**6)] = flag(
        300.0, "Seconds that a rank waits for others before all end."
    )
    backend: str = flag("nccl", "torch.distributed backend of GPUs; CPUs always use gloo.")


def _op_config() -> type:
    """Returns the section with a setting for each op that has a flag: --op.NAME."""
    settings = []
    for name, op in OPS.items():
        if op.flag:
            kind = Literal[("auto", *op.choices)]  # type: ignore[valid-type]
            settings.append((name, kind, flag("auto", op.about)))
    return make_dataclass("OpConfig", settings, frozen=True)


OpConfig: Any = _op_config()


@dataclass(frozen=True)
class Config:
    """Settings of a training run."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    log: LogConfig = LogConfig()
    system: SystemConfig = SystemConfig()
    op: OpConfig = OpConfig()


@dataclass(frozen=True)
class PrepareConfig(CorpusConfig):
    """Settings of `fastgpt prepare`."""

    dataset: str = flag("python_stdlib", "A corpus of those in `fastgpt --help`.")
    overwrite: bool = flag(False, "Make the token files anew if they exist.")

    @classmethod
    def of(cls, data: CorpusConfig) -> "PrepareConfig":
        """Returns the settings that prepare a run's data."""
        return cls(**{f.name: getattr(data, f.name) for f in fields(CorpusConfig)})


@dataclass(frozen=True)
class SourceConfig:
    """Settings that name a trained model."""

    out_dir: str = flag("", "Folder of the run; empty: the newest under runs/.")
    init_from: Literal["resume"] | Pretrained = flag("resume", "A run, --weights, or OpenAI's.")
    checkpoint: str = flag("best", "best, latest, or a folder's name under checkpoints/.")
    weights: str = flag("", "Hugging Face GPT-2 folder or safetensors file.")


@dataclass(frozen=True)
class SampleConfig(SourceConfig):
    """Settings of `fastgpt sample`."""

    start: str = flag("\n", "Prompt; FILE:path reads it from a file, LINES:path one per line.")
    num_samples: Size = flag(10, "Texts per prompt.")
    batch_size: Size = flag(1, "Texts at a time; the first is shown while it is made.")
    max_new_tokens: Size = flag(500, "Tokens per text.")
    temperature: NonNegative = flag(0.8, "Below 1: likelier tokens; 0: always the likeliest.")
    top_k: CountOrZero = flag(200, "Draw from the k likeliest tokens only; 0: all.")
    top_p: Share = flag(1.0, "Draw from the smallest set of tokens with this probability.")
    repetition_penalty: Positive = flag(1.0, "Above 1: tokens already in the text are less likely.")
    stop: bool = flag(False, "End a sample at the end-of-text token.")
    stop_strings: str = flag("", "End a sample before the first of these texts, separated by |.")
    seed: Seed = flag(1337, "The same seed gives the same samples.")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps.")
    dtype: Dtype = flag("auto", "As in training.")
    compile: Switch = flag(False, "torch.compile the step that makes a token.")


@dataclass(frozen=True)
class EvalConfig(SourceConfig):
    """Settings of `fastgpt eval`."""

    task: Literal["loss", "hellaswag"] = flag("loss", "Loss of every token, or HellaSwag.")
    input: str = flag("", "Text, .bin or .jsonl of HellaSwag; empty: the run's validation data.")
    dataset: str = flag("", "Prepared data in place of the run's: a name or a folder.")
    split: Literal["train", "val"] = flag("val", "Part of the data.")
    data_dir: str = flag("data", "Folder of prepared token files.")
    block_size: CountOrZero = flag(0, "Longest context; 0: all that the model has.")
    stride: CountOrZero = flag(0, "Tokens by which the window moves; 0: half of block_size.")
    batch_size: Size = flag(8, "Windows, or questions of HellaSwag, at a time.")
    limit: CountOrZero = flag(0, "Only the first so many tokens or questions; 0: all.")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps.")
    dtype: Dtype = flag("auto", "As in training.")


@dataclass(frozen=True)
class ExportConfig(SourceConfig):
    """Settings of `fastgpt export`."""

    to: str = flag("", "The new folder.")


@dataclass(frozen=True)
class CompareConfig:
    """Settings of `fastgpt compare`."""

    to: str = flag("compare.png", "The picture.")


@dataclass(frozen=True)
class ImportConfig:
    """Settings of `fastgpt import`."""

    out_dir: str = flag("", "Folder of the new run; empty: a new one under runs/.")
    overwrite: bool = flag(False, "Replace the run that already stands in --out_dir.")
    dataset: str = flag("", "Data to go on with: name or folder; empty: as in the checkpoint.")
    data_dir: str = flag("data", "Folder of prepared token files.")
    gelu: Literal["erf", "tanh"] = flag("erf", "erf: nanoGPT since 2023; tanh: before.")
