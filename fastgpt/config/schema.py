"""What a run is: one tree of dataclasses, filled from a preset or a TOML file, then from flags.

Flags are flat (`--n_layer=4`) and have nanoGPT's names and meanings; the tree only groups them.
`settings.py` reads them from flags and files and checks every value once, against its type and its
`Range` here, so that the rest of the code trusts it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass
from typing import Annotated, Any, Literal

from typing_extensions import Doc

from fastgpt_kernels import OPS


@dataclass(frozen=True)
class Range:
    """Bounds of a number: greater or equal, greater than, less or equal, less than."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def check(self, value: float) -> bool:
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __str__(self) -> str:
        signs = ((">=", self.ge), (">", self.gt), ("<=", self.le), ("<", self.lt))
        return " and ".join(f"{sign} {bound:g}" for sign, bound in signs if bound is not None)


Count = Annotated[int, Range(ge=1)]
CountOrZero = Annotated[int, Range(ge=0)]
Fraction = Annotated[float, Range(ge=0, lt=1)]
NonNegative = Annotated[float, Range(ge=0)]
Positive = Annotated[float, Range(gt=0)]
Seed = Annotated[int, Range(ge=0, lt=2**63)]
Pretrained = Literal["weights", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]


@dataclass(frozen=True)
class RunConfig:
    out_dir: str = ""
    """Folder of the run; empty: a new one under runs/."""
    init_from: Literal["scratch", "resume"] | Pretrained = "scratch"
    """scratch: new weights; resume: go on from the newest checkpoint of --out_dir or newest run;
    gpt2, ...: OpenAI's weights, downloaded once; weights: those of --weights, of any size."""
    weights: str = ""
    """Hugging Face GPT-2 folder or safetensors file to start from, in place of a download."""
    overwrite: bool = False
    """Replace the run that already stands in --out_dir."""
    max_iters: Count = 600_000
    """Optimizer steps in all."""
    seed: Seed = 1337
    """Initial weights, batches and dropout all follow from it."""


@dataclass(frozen=True)
class CorpusConfig:
    dataset: str = "openwebtext"
    """python_stdlib, shakespeare_char, shakespeare, openwebtext, fineweb10B, or a token folder."""
    input: str = ""
    """Train on this text file or folder instead of a named corpus."""
    tokenizer: str = ""
    """byte, char, gpt2 or bpe:N; empty: the corpus's own."""
    vocab_file: str = ""
    """Local rank file for the gpt2 tokenizer, if it cannot be downloaded."""
    data_dir: str = "data"
    """Where prepared token files live."""
    val_fraction: Fraction = 0.0
    """Share of the text held out for validation; 0: the corpus's own."""
    shards: Annotated[int, Range(ge=1, le=103)] = 10
    """fineweb10B: how many shards of 100M tokens to fetch."""
    workers: CountOrZero = 0
    """Threads that tokenize; 0: one a core."""


@dataclass(frozen=True)
class DataConfig(CorpusConfig):
    sampling: Literal["random", "epochs"] = "random"
    """random: windows with replacement, as nanoGPT; epochs: each window once an epoch, shuffled."""


@dataclass(frozen=True)
class ModelConfig:
    n_layer: Annotated[int, Range(ge=1, le=4096)] = 12
    """Transformer blocks."""
    n_head: Count = 12
    """Attention heads; divides n_embd."""
    n_embd: Count = 768
    """Width of the residual stream."""
    block_size: Count = 1024
    """Context length in tokens."""
    dropout: Fraction = 0.0
    """Rate after the embedding, on attention weights and on both residual branches."""
    bias: bool = False
    """Biases in linear layers and layer norms, as GPT-2 has them."""
    gelu: Literal["tanh", "erf"] = "tanh"
    """tanh: GPT-2's approximation; erf: the exact function, as nanoGPT."""
    vocab_size: CountOrZero = 0
    """Token ids the model knows; 0: those of the data, or of the weights it starts from."""


@dataclass(frozen=True)
class OptimConfig:
    batch_size: Count = 12
    """Sequences in one micro-batch; auto: the largest that fits, at the same global batch."""
    auto_batch_size: bool = False
    """What --batch_size=auto sets."""
    gradient_accumulation_steps: Count = 40
    """Micro-batches in an optimizer step; times batch_size: the global batch, whatever the GPUs."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Newton-Schulz's momentum for the blocks' matrices, AdamW for the rest."""
    learning_rate: Positive = 6e-4
    """Highest learning rate, reached after the warm-up."""
    min_lr: NonNegative = 6e-5
    """Learning rate at the end of the cosine."""
    warmup_iters: CountOrZero = 2000
    """Steps of linear warm-up."""
    lr_schedule: Literal["cosine", "wsd"] = "cosine"
    """cosine: down to min_lr; wsd: constant, and at the end linear to 0."""
    lr_decay_fraction: Annotated[float, Range(gt=0, le=1)] = 0.4
    """wsd: the last part of lr_decay_iters, in which the learning rate falls."""
    lr_decay_iters: Count = 600_000
    """Step at which the schedule ends."""
    decay_lr: bool = True
    """False: the learning rate stays at learning_rate."""
    weight_decay: NonNegative = 0.1
    """Decoupled decay of matrices and embeddings; biases and norms have none."""
    beta1: Fraction = 0.9
    """AdamW: decay of the first moment."""
    beta2: Fraction = 0.95
    """AdamW: decay of the second moment."""
    grad_clip: NonNegative = 1.0
    """Clip the global gradient norm to this; 0: off."""

    @property
    def rows(self) -> int:
        """Sequences of one optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps


@dataclass(frozen=True)
class LogConfig:
    eval_interval: Count = 2000
    """Steps between evaluations (and checkpoints)."""
    eval_iters: Count = 200
    """Batches in one evaluation of one split."""
    target_val_loss: NonNegative = 0.0
    """Stop once an evaluation's validation loss is no more than this; 0: never."""
    eval_only: bool = False
    """Evaluate once and stop."""
    log_interval: Count = 1
    """Steps between log lines."""
    always_save_checkpoint: bool = True
    """True: a checkpoint after every evaluation; False: only if the validation loss improved."""
    keep_checkpoints: Count = 3
    """How many of the newest checkpoints stay; the best one stays besides."""
    sample_tokens: CountOrZero = 300
    """Tokens of sample text at the end of the run."""
    wandb_log: bool = False
    """Log to Weights & Biases (extra [log])."""
    wandb_project: str = "fastgpt"
    """Its project."""
    wandb_run_name: str = ""
    """Its run name; empty: the run folder's name."""
    tensorboard: bool = False
    """Write TensorBoard events into the run folder (extra [log])."""


@dataclass(frozen=True)
class SystemConfig:
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 if the GPU has it, float16 on older ones, float32 on a CPU."""
    tf32: bool = False
    """With --dtype=float32: let tensor cores round what they multiply to TF32. Without, float32 is
    the oracle that other precisions are held against."""
    deterministic: bool = False
    """Gradients on a GPU the same to the bit every time, as they always are on a CPU, so that a run
    can be repeated and a resumed one is the undisturbed one; some ops are slower."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile; auto: on a GPU."""
    max_autotune: bool = False
    """Let torch.compile time more matmul kernels, Triton's besides cuBLAS's; minutes, once."""
    kernels: Literal["auto", "triton", "eager"] = "auto"
    """Which implementation the fused ops use; auto: Triton on a GPU, each op if it passes its
    check."""
    activation_checkpointing: bool = False
    """Keep only what stands between blocks and compute the rest again: less memory, a third more
    compute."""
    cuda_graph: Literal["auto"] | bool = "auto"
    """Replay forward and backward of a micro-batch as one launch; auto: if launching is slow."""
    peak_tflops: NonNegative = 0.0
    """Peak that MFU is taken against, TFLOP/s; 0: from the table, or measured."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """Under torchrun, ddp: a whole model on each GPU; fsdp: a share; auto: ddp if it fits."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which gradients are summed over the ranks."""
    dist_timeout: Positive = 300.0
    """Seconds that a rank waits for the others before the job ends."""
    backend: str = "nccl"
    """torch.distributed backend of GPUs under torchrun; CPUs always use gloo."""


def _op_config() -> type:
    """A section with a setting for each op that has a flag: --op.NAME."""
    fields = []
    for name, op in OPS.items():
        if op.chosen_by == "model":
            kind = Literal[("auto", *op.choices)]  # type: ignore[valid-type]
            fields.append((name, Annotated[kind, Doc(op.about)], field(default="auto")))
    doc = "Single ops, if they should differ from --kernels; flags are --op.NAME."
    return make_dataclass("OpConfig", fields, namespace={"__doc__": doc}, frozen=True)


OpConfig: Any = _op_config()


@dataclass(frozen=True)
class Config:
    """A training run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)
    system: SystemConfig = field(default_factory=SystemConfig)
    op: OpConfig = field(default_factory=OpConfig)


@dataclass(frozen=True)
class PrepareConfig(CorpusConfig):
    """Turn a corpus into token files."""

    dataset: str = "python_stdlib"
    """python_stdlib, shakespeare_char, shakespeare, openwebtext or fineweb10B."""
    overwrite: bool = False
    """Make the token files anew if they exist."""

    @classmethod
    def of(cls, data: CorpusConfig) -> PrepareConfig:
        """What has to be prepared for a run with this data."""
        return cls(**{f.name: getattr(data, f.name) for f in fields(CorpusConfig)})


@dataclass(frozen=True)
class SourceConfig:
    """Which trained model."""

    out_dir: str = ""
    """Folder of the run; empty: the newest under runs/."""
    init_from: Literal["resume"] | Pretrained = "resume"
    """resume: a run's checkpoint; gpt2, ...: OpenAI's weights; weights: those of --weights."""
    checkpoint: str = "best"
    """best, latest, or a folder's name under checkpoints/."""
    weights: str = ""
    """Hugging Face GPT-2 folder or safetensors file, in place of a download."""


@dataclass(frozen=True)
class SampleConfig(SourceConfig):
    """Generate text from a trained model."""

    start: str = "\n"
    """Prompt; FILE:path reads it from a file, LINES:path takes each line of a file as one."""
    num_samples: Count = 10
    """How many texts for each prompt."""
    batch_size: Count = 1
    """How many texts at a time; the first of them is shown as it is made, the others after it."""
    max_new_tokens: Count = 500
    """Tokens in each."""
    temperature: NonNegative = 0.8
    """Below 1: likelier tokens; 0: always the likeliest."""
    top_k: CountOrZero = 200
    """Draw from the k likeliest tokens only; 0: all."""
    top_p: Annotated[float, Range(gt=0, le=1)] = 1.0
    """Draw from the smallest set of tokens that holds this probability."""
    repetition_penalty: Positive = 1.0
    """Above 1: tokens that the text already has become unlikelier."""
    stop: bool = False
    """End a sample at the end-of-text token."""
    stop_strings: str = ""
    """End a sample before the first of these texts, separated by |."""
    seed: Seed = 1337
    """The same seed gives the same samples."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """As in training."""
    compile: Literal["auto"] | bool = False
    """torch.compile the step that makes a token."""


@dataclass(frozen=True)
class EvalConfig(SourceConfig):
    """Measure a trained model on a whole token file, or on HellaSwag."""

    task: Literal["loss", "hellaswag"] = "loss"
    """loss: of every token of a file; hellaswag: which of four endings is the likeliest."""
    input: str = ""
    """Text, a token file (.bin), or HellaSwag's .jsonl; empty: the validation data of the run."""
    dataset: str = ""
    """Prepared data to take in place of the run's: a name or a folder."""
    split: Literal["train", "val"] = "val"
    """Which part of the data."""
    data_dir: str = "data"
    """Where prepared token files live."""
    block_size: CountOrZero = 0
    """Longest context; 0: all that the model has."""
    stride: CountOrZero = 0
    """How far the window slides: each token is seen with at least block_size - stride before it;
    0: half of block_size."""
    batch_size: Count = 8
    """Windows, or questions of HellaSwag, at a time."""
    limit: CountOrZero = 0
    """Only the first so many tokens or questions; 0: all."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """As in training."""


@dataclass(frozen=True)
class ExportConfig(SourceConfig):
    """Write a model as a Hugging Face GPT-2 folder."""

    to: str = ""
    """The new folder."""


@dataclass(frozen=True)
class CompareConfig:
    """Compare runs: their curves in one picture, their figures in a table, and a verdict."""

    to: str = "compare.png"
    """The picture."""


@dataclass(frozen=True)
class ImportConfig:
    """Make nanoGPT's ckpt.pt a run that can be resumed and sampled."""

    out_dir: str = ""
    """Folder of the new run; empty: a new one under runs/."""
    overwrite: bool = False
    """Replace the run that already stands in --out_dir."""
    dataset: str = ""
    """Data to go on with: a name or a folder; empty: the name in the checkpoint."""
    data_dir: str = "data"
    """Where prepared token files live."""
    gelu: Literal["erf", "tanh"] = "erf"
    """erf: nanoGPT since 2023; tanh: before, which the file does not tell."""
