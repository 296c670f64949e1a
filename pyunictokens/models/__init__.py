"""Models: the protocol of a masked model, Show-o behind it, the MAGVIT-v2 tokenizer, concept tokens, checkpoints.

Nothing here knows rollouts, rewards or training.
"""

from .base import (
    AnsweringModel,
    CapturableModel,
    ConceptModel,
    ImageTokenizer,
    MaskedModel,
    answering,
    owning_rows,
)
from .concept_tokens import ConceptTokens
from .magvit import MagvitConfig, MagvitV2
from .prefix import Prefix
from .sampling_rule import SamplingRule
from .showo import prompting
from .showo.attention import PromptKV
from .showo.model import Showo, ShowoConfig
from .tokenizer import TextTokenizer

__all__ = [
    "AnsweringModel",
    "CapturableModel",
    "ConceptModel",
    "ConceptTokens",
    "ImageTokenizer",
    "MagvitConfig",
    "MagvitV2",
    "MaskedModel",
    "Prefix",
    "PromptKV",
    "SamplingRule",
    "Showo",
    "ShowoConfig",
    "TextTokenizer",
    "answering",
    "owning_rows",
    "prompting",
]
