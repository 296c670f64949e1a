"""TRL's GRPOTrainer with log-probabilities and loss from `pyunictokens.ops`, on a tiny random language model.

The subclass replaces two methods. Log-probabilities come from hidden states and the head in one operation, so logits of
[rollouts, tokens, vocabulary] are never formed; the loss is `grpo_loss` with alpha = 1/max_completion_length, which is
TRL's `dr_grpo` with a plain k3 penalty (`use_bias_correction_kl=False`). It covers text models alone, and none of TRL's
other loss types. Needs `pip install "trl>=1.16"`:

    python examples/trl_trainer.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

import pyunictokens as uct

WORDS = [f"{colour}-{thing}" for colour in ("red", "blue") for thing in ("cat", "dog", "mug", "ball", "star", "hat")]


class FusedGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose head and loss are fused operations; `loss_type="dr_grpo"`, text models."""

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None, None]:
        """Log-probs [R, logits_to_keep] of the last tokens. The model makes the logits of one position only."""
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        weight = head.weight.full_tensor() if hasattr(head.weight, "full_tensor") else head.weight
        size, parts = batch_size or len(input_ids), []
        for ids, attend in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            with self.accelerator.autocast():
                output = model(input_ids=ids, attention_mask=attend, logits_to_keep=1, output_hidden_states=True)
                parts.append(
                    uct.ops.selected_logprob(
                        output.hidden_states[-1][:, -logits_to_keep - 1 : -1],
                        weight,
                        ids[:, -logits_to_keep:],
                        head.bias,
                        temperature=self.temperature,
                    )
                )
        return torch.cat(parts), None, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attend = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        logp, _, _ = self._get_per_token_logps_and_entropies(model, ids, attend, inputs["completion_ids"].shape[1])
        old = inputs.get("old_per_token_logps")
        loss, stats = uct.ops.grpo_loss(
            logp,
            logp.detach() if old is None else old,
            inputs.get("ref_per_token_logps"),
            inputs["advantages"],
            alpha=1.0 / self.max_completion_length,
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            beta=self.beta,
            mask=inputs["completion_mask"],
        )
        mode = "train" if self.model.training else "eval"
        for name in ("kl", "clip_fraction", "ratio_max"):
            self._metrics[mode][name].append(float(self.accelerator.gather(getattr(stats, name)).mean()))
        return loss / (self.current_gradient_accumulation_steps if mode == "train" else 1)


def share_of_red(completions: list[str], **_: Any) -> list[float]:
    """The reward: how many of the words are red."""
    return [text.count("red-") / max(len(text.split()), 1) for text in completions]


def build(folder: str, trainer: type[GRPOTrainer] = FusedGRPOTrainer, steps: int = 20, beta: float = 0.01) -> Any:
    """A trainer on a random two-layer model that writes words of a closed vocabulary."""
    torch.manual_seed(0)
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", "<eos>", "say", *WORDS])}))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=False, **sizes)
    settings = GRPOConfig(
        folder, loss_type="dr_grpo", scale_rewards="none", beta=beta, use_bias_correction_kl=False, num_iterations=2,
        per_device_train_batch_size=16, num_generations=16, max_completion_length=8, learning_rate=5e-3,
        lr_scheduler_type="constant", max_steps=steps, logging_steps=1, report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    prompts = Dataset.from_dict({"prompt": ["say"] * 16})
    Qwen2ForCausalLM(config).save_pretrained(f"{folder}/start")  # TRL loads it a second time, as the reference
    return trainer(f"{folder}/start", share_of_red, settings, prompts, processing_class=tokenizer)


def main(steps: int = 40) -> list[float]:
    """Train; returns the mean reward of every step."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(folder, steps=steps)
        trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(f"share of red words: {rewards[0]:.2f} at first, {rewards[-1]:.2f} after {steps} steps")
    return rewards


if __name__ == "__main__":
    main()
