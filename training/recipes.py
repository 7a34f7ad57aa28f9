"""What is trained: heads on a frozen target (Medusa-1), or heads and adapters of the target together (Medusa-2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from specdec.heads import MedusaHeads
from specdec.passes.tolerance import differ, noise_of
from specdec.training.batches import WINDOW, Batch
from specdec.training.config import MedusaTrainingConfig
from specdec.training.hidden_states import FinalHiddenStates
from specdec.training.losses import IGNORED, NUM_RANKS, Sums, chunked_loss
from specdec.training.state_cache import StateCache

ADAPTER_FOLDER = "adapter"


def head_losses(
    heads: MedusaHeads, hidden: Tensor, targets: Tensor, coefficients: Tensor, logits_mib: float | None
) -> Sums:
    """Losses of all heads; positions at which no head has a target are left out.

    Args:
        heads: Bound to the target.
        hidden: `[batch, window, hidden]`.
        targets: `[num_heads, batch, window]`.
        coefficients: `[num_heads]`, factors of the heads' summed losses.
        logits_mib: Largest block of logits; None for the device's default.
    """
    targets = heads.places(targets, IGNORED)  # nothing is learned of tokens that the heads cannot name
    positions = (targets != IGNORED).any(0).flatten().nonzero().squeeze(1)
    features = heads.features(hidden.flatten(0, 1)[positions])
    return chunked_loss(
        features,
        targets.flatten(1)[:, positions],
        coefficients,
        heads.project,
        heads.config.num_logits,
        [] if heads.projections is None else [heads.projections],
        logits_mib=logits_mib,
    )


class HeadsAlone(nn.Module):
    """Medusa-1: only the heads are trained, and only they belong to this module.

    Args:
        target: Frozen; runs without gradients.
        heads: Bound to it.
        config: Of the run.
    """

    def __init__(self, target: Any, heads: MedusaHeads, config: MedusaTrainingConfig) -> None:
        super().__init__()
        self.heads = heads
        self._target = (target,)  # in a tuple, it is no part of this module
        self.logits_mib = config.logits_mib
        target.eval().requires_grad_(False)
        self.hidden_states = FinalHiddenStates(target)
        self.state_cache: StateCache | None = None

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Batch:
        """Adds the target's hidden states to a batch; outside of `forward`, which is what processes synchronise."""

        def compute() -> Tensor:
            return self.hidden_states(batch["input_ids"], batch["segments"], batch["position_ids"])

        cache = self.state_cache if WINDOW in batch else None
        hidden = compute() if cache is None else cache.states(batch[WINDOW], compute)
        return {**batch, "hidden": hidden.to(self.heads.device)}

    def forward(self, batch: Batch, targets: Tensor, coefficients: Tensor) -> Sums:
        """Losses; row 0 of targets and coefficients is the target's own output, which nothing here changes."""
        sums = head_losses(self.heads, batch["hidden"], targets[1:], coefficients[1:], self.logits_mib)
        cross_entropy = torch.cat([sums.cross_entropy.new_zeros(1), sums.cross_entropy])
        ranks = torch.cat([sums.ranks.new_zeros(1, NUM_RANKS), sums.ranks])
        return Sums(sums.loss, cross_entropy, ranks, sums.divergence)

    def parameter_groups(self, config: MedusaTrainingConfig) -> list[dict[str, Any]]:
        """Of the optimizer."""
        return [{"params": list(self.heads.parameters()), "lr": config.learning_rate}]

    @property
    def target(self) -> Any:
        """The model."""
        return self._target[0]


class HeadsAndAdapters(nn.Module):
    """Medusa-2: heads and LoRA adapters of the target.

    The target's own output learns from the data, or with `distill` from itself without the adapters.

    Args:
        target: A PEFT model.
        heads: Bound to it.
        config: Of the run.
    """

    def __init__(self, target: Any, heads: MedusaHeads, config: MedusaTrainingConfig) -> None:
        super().__init__()
        self.target = target
        self.heads = heads
        self.distill = config.recipe == "medusa-2-distill"
        self.logits_mib = config.logits_mib
        self.hidden_states = FinalHiddenStates(target)
        self.own_logits = own_logits(target.get_base_model(), self.hidden_states)
        self.vocab_size: int = heads.config.vocab_size or heads.config.num_logits

    def prepare(self, batch: Batch) -> Batch:
        """Nothing: the target runs in `forward`, with gradients."""
        return batch

    def forward(self, batch: Batch, targets: Tensor, coefficients: Tensor) -> Sums:
        """Losses of the target's own output (row 0) and of the heads."""
        inputs = (batch["input_ids"], batch["segments"], batch["position_ids"])
        hidden = self.hidden_states(*inputs)
        heads = head_losses(self.heads, hidden, targets[1:], coefficients[1:], self.logits_mib)
        positions = (targets[0] != IGNORED).flatten().nonzero().squeeze(1)
        teacher = None
        if self.distill or not self.training:
            original = self._original(*inputs).flatten(0, 1)[positions]

            def teacher(block: slice) -> Tensor:
                with torch.no_grad():
                    return self.own_logits(original[None, block])

        own = chunked_loss(
            hidden.flatten(0, 1)[positions][None],
            targets[:1].flatten(1)[:, positions],
            coefficients[:1],
            self.own_logits,
            self.vocab_size,
            teacher=teacher,
            logits_mib=self.logits_mib,
        )
        cross_entropy = torch.cat([own.cross_entropy, heads.cross_entropy])
        return Sums(own.loss + heads.loss, cross_entropy, torch.cat([own.ranks, heads.ranks]), own.divergence)

    @torch.no_grad()
    def _original(self, *inputs: Tensor) -> Tensor:
        """Hidden states of the target without its adapters, and without dropout."""
        was_training = self.target.training
        self.target.eval()
        with self.target.disable_adapter():
            hidden = self.hidden_states(*inputs)
        self.target.train(was_training)
        return hidden

    def parameter_groups(self, config: MedusaTrainingConfig) -> list[dict[str, Any]]:
        """Of the optimizer: heads learn faster than adapters."""
        assert config.learning_rate is not None
        adapters = [p for p in self.target.parameters() if p.requires_grad]
        return [
            {"params": adapters, "lr": config.learning_rate},
            {"params": list(self.heads.parameters()), "lr": config.learning_rate * config.head_lr_multiplier},
        ]


Recipe = HeadsAlone | HeadsAndAdapters


def build(target: Any, heads: MedusaHeads, config: MedusaTrainingConfig) -> Recipe:
    """The module of a recipe.

    Args:
        target: The model as it was loaded; Medusa-2 puts adapters into it.
        heads: Bound to it.
        config: Of the run, resolved.
    """
    if config.recipe == "medusa-1":
        return HeadsAlone(target, heads, config)
    return HeadsAndAdapters(add_adapters(target, config), heads, config)


def add_adapters(target: Any, config: MedusaTrainingConfig) -> Any:
    """LoRA adapters on all linear projections of the decoder, as a PEFT model."""
    import peft

    if getattr(target, "is_quantized", False):
        target = peft.prepare_model_for_kbit_training(target, use_gradient_checkpointing=False)
    lora = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(target, lora)
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
        base = model.get_base_model()
        # The name changed in transformers 5.
        enable: Any = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def own_logits(model: Any, hidden_states: FinalHiddenStates) -> Callable[[Tensor], Tensor]:
    """A function from final hidden states to the model's own logits, scaling and soft-capping included.

    Raises:
        ValueError: What the model does to its logits is not known.
    """
    embedding = model.get_output_embeddings()
    ids = (torch.arange(8, device=embedding.weight.device)[None] * 5 + 3) % model.config.get_text_config().vocab_size
    segments, positions = torch.ones_like(ids), torch.arange(8, device=ids.device)[None]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        raw = embedding(hidden_states(ids, segments, positions)).float()
        true = model(input_ids=ids).logits.float()
    model.train(was_training)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    scale = (true * raw).sum() / raw.square().sum().clamp(min=1e-12)
    ways: list[Callable[[Tensor], Tensor]] = [lambda logits: logits, lambda logits: logits * scale.to(logits.dtype)]
    if cap:
        ways.insert(0, lambda logits: torch.tanh(logits / cap) * cap)
    for way in ways:
        if not differ(way(raw), true, model.dtype, noise_of(model, model.dtype)):
            return lambda hidden: way(embedding(hidden.to(model.dtype)))
    raise ValueError(
        f"{type(model).__name__} changes its logits after the output embedding in a way that is not known here; "
        "train its heads alone, with recipe medusa-1"
    )
