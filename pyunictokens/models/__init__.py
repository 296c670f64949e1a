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
from .bundle import ModelBundle, Sources
from .concept_tokens import ConceptTokens
from .magvit import MagvitConfig, MagvitV2
from .prefix import Prefix
from .registry import load
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
    "ModelBundle",
    "Prefix",
    "PromptKV",
    "SamplingRule",
    "Showo",
    "ShowoConfig",
    "Sources",
    "TextTokenizer",
    "answering",
    "load",
    "owning_rows",
    "prompting",
]
