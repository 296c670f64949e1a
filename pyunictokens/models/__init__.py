"""Models: the Show-o transformer, the MAGVIT-v2 tokenizer, sequences and masks, concept tokens, checkpoints.

Nothing here knows rollouts, rewards or training.
"""

from .concept_tokens import ConceptTokens
from .magvit import MagvitConfig, MagvitV2
from .showo import prompting
from .showo.attention import PromptKV
from .showo.model import Showo, ShowoConfig
from .showo.prefill import answer_hidden, image_hidden, prefill_mmu, prefill_mmu_clip, prefill_t2i
from .tokenizer import TextTokenizer

__all__ = [
    "ConceptTokens",
    "MagvitConfig",
    "MagvitV2",
    "PromptKV",
    "Showo",
    "ShowoConfig",
    "TextTokenizer",
    "answer_hidden",
    "image_hidden",
    "prefill_mmu",
    "prefill_mmu_clip",
    "prefill_t2i",
    "prompting",
]
