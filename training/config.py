"""Everything that decides a training run, as one dataclass: YAML in and out, flags of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

from specdec.common.conversion import convert

Recipe = Literal["medusa-1", "medusa-2", "medusa-2-distill"]
CONFIG_FILE = "training.yaml"
RECIPE_DEFAULTS: dict[str, dict[str, Any]] = {
    "medusa-1": {"learning_rate": 1e-3, "heads_weight": 1.0, "schedule": "cosine", "heads_schedule": "constant"},
    "medusa-2": {"learning_rate": 5e-4, "heads_weight": 0.2, "schedule": "cosine", "heads_schedule": "constant"},
    "medusa-2-distill": {"learning_rate": 1e-4, "heads_weight": 0.01, "schedule": "cosine", "heads_schedule": "sine"},
}
"""Values of the fields that are None, from Medusa (arXiv 2401.10774)."""
CHOICES = {
    "recipe": tuple(RECIPE_DEFAULTS),
    "heads_version": ("1", "2"),
    "schedule": ("constant", "cosine", "linear"),
    "heads_schedule": ("constant", "sine"),
    "mixed_precision": ("no", "bf16", "fp16"),
    "resume": ("auto", "never"),
}
AT_LEAST_ONE = (
    "num_heads", "num_layers", "window", "batch_size", "accumulation", "save_every", "keep_checkpoints", "log_every",
    "lora_rank", "logits_mib", "eval_windows", "distill_tokens", "distill_batch", "measure_tokens", "steps", "limit",
    "eval_every", "threads", "first_stage_steps", "draft_vocabulary", "own_prompts",
)  # fmt: skip
AT_LEAST_ZERO = (
    "warmup_steps", "weight_decay", "max_grad_norm", "seed", "workers", "measure_prompts", "distill_temperature",
)  # fmt: skip
ABOVE_ZERO = ("epochs", "head_lr_multiplier", "head_decay", "learning_rate", "heads_weight", "lora_alpha")
WITHOUT_EFFECT = frozenset({
    "cache_states", "cpu", "device_map", "distill_batch", "eval_every", "keep_checkpoints", "log_every",
    "measure_prompts", "measure_tokens", "output", "project", "resume", "save_every", "threads", "trackers",
    "trust_remote_code", "workers",
})  # fmt: skip
"""Settings that the trained weights do not depend on; a run may be resumed with other values."""


@dataclass(frozen=True)
class MedusaTrainingConfig:
    """Settings of a training run of Medusa heads; each is explained beside its type.

    Raises:
        ValueError: A value is not allowed; the message names the setting and what is.
    """

    data: Annotated[
        str | None,
        "What to train on: a data set's hub name, a file, a folder, or what `specdec distill` wrote.",
    ] = None
    prompts: Annotated[
        str | None,
        "In place of --data: prompts that the target answers first, as training data (self-distillation).",
    ] = None
    own_prompts: Annotated[
        int | None,
        "In place of --data and --prompts: the chat model writes this many prompts itself, then answers them.",
    ] = None
    output: Annotated[str, "Folder for the result and the checkpoints."] = "medusa"
    model: Annotated[str, "The target: folder or hub name of a causal LM, or embedded."] = "embedded"
    recipe: Annotated[
        Recipe,
        "medusa-1: heads on the frozen target. medusa-2: heads alone, then together with LoRA adapters of the "
        "target. medusa-2-distill: both together, the target held to its own output.",
    ] = "medusa-1"
    num_heads: Annotated[int, "Draft heads; head k predicts the token k places after the target's own next one."] = 4
    num_layers: Annotated[int, "Residual blocks per head."] = 1
    heads_version: Annotated[
        Literal["1", "2"],
        "2: heads share the target's output embedding; 1: each has its own.",
    ] = "2"
    draft_vocabulary: Annotated[
        int | None,
        "New heads name so many tokens only, the data's most frequent ones: drafts cost less. All, if not given.",
    ] = None
    initial_heads: Annotated[
        str | None,
        "Heads to start from: folder or hub name. medusa-2 then skips its first stage.",
    ] = None

    split: Annotated[str, "Split of a data set."] = "train"
    text_field: Annotated[str | None, "Column of the text, where it cannot be guessed."] = None
    chat_template: Annotated[str | None, "File with a chat template, in place of the tokenizer's own."] = None
    limit: Annotated[int | None, "Read so many examples at most."] = None
    eval_fraction: Annotated[float, "Share of the examples that is held out for the evaluation."] = 0.05
    eval_windows: Annotated[int, "Evaluate on so many windows at most."] = 200
    window: Annotated[int, "Tokens per window; examples are packed into windows."] = 1024
    distill_tokens: Annotated[int, "With --prompts and --own-prompts: longest answer, in tokens."] = 256
    distill_temperature: Annotated[
        float, "With --prompts and --own-prompts: temperature of the answers; 0 is greedy."
    ] = 0.0
    distill_batch: Annotated[int, "With --prompts and --own-prompts: prompts answered at a time."] = 8

    batch_size: Annotated[int, "Windows per process and forward pass."] = 8
    accumulation: Annotated[int, "Forward passes per step."] = 1
    epochs: Annotated[float, "Passes over the data, unless --steps is given."] = 2.0
    steps: Annotated[int | None, "Training steps."] = None
    first_stage_steps: Annotated[
        int | None,
        "medusa-2: steps of the heads alone; as many as of the second stage.",
    ] = None
    learning_rate: Annotated[
        float | None,
        "Of the heads in medusa-1 (1e-3), of the adapters in medusa-2 (5e-4) and medusa-2-distill (1e-4).",
    ] = None
    head_lr_multiplier: Annotated[float, "medusa-2: the heads' learning rate, in learning rates of the adapters."] = 4.0
    schedule: Annotated[str | None, "Of the learning rate: constant, cosine or linear; cosine if not given."] = None
    warmup_steps: Annotated[int, "Steps over which the learning rate rises."] = 20
    weight_decay: Annotated[float, "Of AdamW."] = 0.0
    max_grad_norm: Annotated[float, "Gradients are scaled down to this norm; 0 leaves them."] = 1.0
    head_decay: Annotated[float, "Head k's loss counts this to the power k."] = 0.8
    heads_weight: Annotated[
        float | None,
        "medusa-2: weight of the heads' loss beside the target's own (0.2; medusa-2-distill 0.01).",
    ] = None
    heads_schedule: Annotated[
        str | None,
        "Of that weight: constant or sine; sine for medusa-2-distill, else constant.",
    ] = None
    lora_rank: Annotated[int, "medusa-2: rank of the adapters."] = 32
    lora_alpha: Annotated[float, "medusa-2: scale of the adapters, times the rank."] = 16.0
    lora_dropout: Annotated[float, "medusa-2: dropout in the adapters."] = 0.05
    seed: Annotated[int, "Of the order of the data, the split, the answers, and dropout."] = 0

    dtype: Annotated[str, "Of the target's weights: auto, float32, bfloat16 or float16."] = "auto"
    mixed_precision: Annotated[
        Literal["no", "bf16", "fp16"] | None,
        "Of the training: no, bf16 or fp16; what accelerate is configured for if not given.",
    ] = None
    device_map: Annotated[str | None, "Spreads the target over devices: auto, balanced ..."] = None
    cpu: Annotated[bool, "Train on the CPU even if there is an accelerator."] = False
    attn: Annotated[str | None, "Attention implementation: sdpa, eager, flash_attention_2 ..."] = None
    trust_remote_code: Annotated[bool, "Run code that comes with the model."] = False
    gradient_checkpointing: Annotated[bool, "medusa-2: less memory, one forward pass more."] = False
    logits_mib: Annotated[int | None, "Largest block of logits held at a time, in MiB; 64, on the CPU 8."] = None
    workers: Annotated[int, "Processes that read batches ahead."] = 0
    threads: Annotated[int | None, "CPU threads of torch."] = None
    cache_states: Annotated[
        bool,
        "medusa-1: keep the target's hidden states on disk while the run lasts (2 bytes * hidden size per token in "
        "half precision), so that only the first epoch runs the target.",
    ] = False

    eval_every: Annotated[int | None, "Steps between evaluations; only at the end if not given."] = None
    log_every: Annotated[int, "Steps between figures shown and tracked."] = 10
    save_every: Annotated[int, "Steps between checkpoints."] = 200
    keep_checkpoints: Annotated[int, "Checkpoints kept, the latest ones."] = 2
    resume: Annotated[
        Literal["auto", "never"],
        "auto: go on from the latest checkpoint in --output. never: refuse if there is one.",
    ] = "auto"
    trackers: Annotated[tuple[str, ...], "Comma-separated: tensorboard, wandb ... (as accelerate knows them)."] = ()
    project: Annotated[str, "The run's project name in the trackers."] = "specdec-medusa"
    measure_prompts: Annotated[int, "Measure the speed-up on so many held-out prompts at the end."] = 0
    measure_tokens: Annotated[int, "Tokens per measured completion."] = 128

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            self._check(
                name, getattr(self, name) in (*choices, getattr(type(self), name)), f"one of {', '.join(choices)}"
            )
        for names, is_allowed, allowed in (
            (AT_LEAST_ONE, lambda value: value >= 1, "at least 1"),
            (AT_LEAST_ZERO, lambda value: value >= 0, "0 or more"),
            (ABOVE_ZERO, lambda value: value > 0, "above 0"),
        ):
            for name in names:
                self._check(name, getattr(self, name) is None or is_allowed(getattr(self, name)), allowed)
        self._check("eval_fraction", 0 < self.eval_fraction < 1, "between 0 and 1: heads are measured on that share")
        self._check("lora_dropout", 0 <= self.lora_dropout < 1, "from 0 up to 1")
        least = self.num_heads + 2
        self._check("window", self.window >= least, f"{least} or more, to hold a target of every head")
        if sum(value is not None for value in (self.data, self.prompts, self.own_prompts)) > 1:
            raise ValueError(
                "data, prompts and own_prompts exclude each other: name what to train on, what to answer first, or how "
                "many prompts the model writes itself"
            )

    @property
    def is_self_distilled(self) -> bool:
        """Whether the target writes the answers to train on."""
        return self.prompts is not None or self.own_prompts is not None

    def _check(self, name: str, is_allowed: bool, allowed: str) -> None:
        if not is_allowed:
            raise ValueError(f"{name}={getattr(self, name)!r} is not allowed; it must be {allowed}")

    def resolved(self) -> MedusaTrainingConfig:
        """With the recipe's own values in place of None."""
        defaults = RECIPE_DEFAULTS[self.recipe]
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML and JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MedusaTrainingConfig:
        """The inverse of `to_dict`; values may be texts, as in `learning_rate: 1e-3`, which YAML takes for one.

        Raises:
            ValueError: A key or a value is not known or not allowed.
        """
        known = settings()
        if unknown := [str(key) for key in values if key not in known]:
            raise ValueError(f"{', '.join(unknown)} is no setting of the training; known are {', '.join(known)}")
        given = {}
        for name, value in values.items():
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            given[name] = convert("none" if value is None else text, known[name].annotation, name)
        return cls(**given)

    @classmethod
    def load(cls, file: str | Path, overrides: Mapping[str, Any] | None = None) -> MedusaTrainingConfig:
        """Reads a YAML file.

        Args:
            file: A mapping of settings.
            overrides: Settings that go before those of the file.

        Raises:
            ValueError: The file is no such mapping, or a setting is not known or not allowed.
        """
        return cls.from_dict({**read_yaml(file), **(overrides or {})})

    def save(self, folder: Path) -> None:
        """Writes `training.yaml`, which `load` reads."""
        import yaml

        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(self.to_dict(), sort_keys=False)
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Settings that decide the weights and differ from another run's, each with both values."""
        mine = self.to_dict()
        return [
            f"{name} ({other[name]!r} there, {mine[name]!r} here)"
            for name in mine
            if name not in WITHOUT_EFFECT and name in other and other[name] != mine[name]
        ]


class Setting(NamedTuple):
    """A field of the config: its type, help text and default."""

    annotation: Any
    help: str
    default: Any


def settings() -> dict[str, Setting]:
    """The fields of the config by name."""
    hints = get_type_hints(MedusaTrainingConfig, include_extras=True)
    known = {}
    for f in fields(MedusaTrainingConfig):
        annotation, text = get_args(hints[f.name])
        known[f.name] = Setting(annotation, text, f.default)
    return known


def read_yaml(file: str | Path) -> dict[str, Any]:
    """A mapping from a YAML file.

    Raises:
        ValueError: It is not one.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read as YAML: {error}") from error
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{file} must hold one setting a line, such as 'batch_size: 8'")
    return values or {}
