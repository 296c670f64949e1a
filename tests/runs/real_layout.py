"""Files as users of the real Show-o have them, with random weights and few of them: the published checkpoints' layout,
a byte-level BPE tokenizer, MAGVIT-v2 that halves four times, the paper's four reward models by their own libraries, a
real CLIP, and a person from cuts of a real portrait."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from typer.testing import CliRunner

from pyunictokens.cli import app
from pyunictokens.models import MagvitConfig, MagvitV2, Showo, ShowoConfig
from tests.evaluate.test_clip import CONFIG as CLIP_CONFIG
from tests.rewards.checkpoints import Folders, save_blip2, save_dinov2, save_ernie, save_facenet

CORPUS = [
    "A photo of <ann> on the beach. Is <ann> in this image? Yes. No. What colour is it? Brown.",
    "USER: Information: <ann>'s favourite book is a red atlas. Request: which information fits? ASSISTANT:",
]
SHORT = ("grpo.steps=2", "group_size=2", "grpo.timesteps=4", "grpo.max_new_tokens=3", "stages.max_steps=1")
SHORT += ("num_understanding=2", "num_generation=2", "evaluation.samples=1", "evaluation.timesteps=2")
SHORT += ("evaluation.max_new_tokens=3", "grpo.checkpoint_every=0")
FACTS = """\
info: <ann> is a woman with dark hair.
facts:
  - {fact: <ann>'s favourite book is a red atlas., prompt: A photo of <ann> with her favourite book.}
  - {fact: <ann> lives in a blue house., prompt: A photo of <ann> in front of her house.}
  - {fact: <ann> rides a green bicycle., prompt: A photo of <ann> on her way to work.}
  - {fact: <ann> has a white cat., prompt: A photo of <ann> with her pet.}
questions:
  - {question: "What colour is the hair of <ann>?", answer: Dark.}
prompts:
  reasoning_dense:
    - prompt: "A photo of <ann> with her pet in a kitchen, a lamp on the left."
      explicit: "A photo of <ann> with a white cat in a kitchen, a lamp on the left."
"""


class Weights(NamedTuple):
    """Folders as a user downloads them."""

    model: Path
    vq: Path
    tokenizer: Path
    clip: Path
    rewards: Path
    """The settings file of the reward models."""

    @property
    def flags(self) -> list[str]:
        return ["--model", str(self.model), "--vq", str(self.vq), "--tokenizer", str(self.tokenizer)]


def write_tokenizer(folder: Path) -> int:
    """A byte-level BPE tokenizer as language models publish theirs; returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "tokenizer_class": "CodeGenTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return tokenizer.get_vocab_size()


def write_showo(folder: Path, text: int, clip_vit: bool = False) -> None:
    """Show-o's files: config.json with the names of the published one, phi/config.json, pytorch_model.bin."""
    torch.manual_seed(0)
    config = ShowoConfig(
        vocab_size=text + 10 + 32 + 1,
        llm_vocab_size=text,
        codebook_size=32,
        num_vq_tokens=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
        max_text=48,
        w_clip_vit=clip_vit,
    )
    (folder / "phi").mkdir(parents=True)
    torch.save(Showo(config).state_dict(), folder / "pytorch_model.bin")
    sizes = asdict(config)
    own = ("vocab_size", "llm_vocab_size", "codebook_size", "num_vq_tokens", "w_clip_vit")
    about = {"_class_name": "Showo", "_diffusers_version": "0.21.0", "llm_model_path": "phi", "load_from_showo": True}
    about |= {"mask_token_id": config.vocab_size - 1, "max_text": config.max_text}
    (folder / "config.json").write_text(json.dumps(about | {name: sizes[name] for name in own}))
    phi = {name: value for name, value in sizes.items() if name not in (*own, "max_text")}
    phi |= {"model_type": "phi", "architectures": ["PhiForCausalLM"], "vocab_size": text, "hidden_act": "gelu_new"}
    (folder / "phi" / "config.json").write_text(json.dumps(phi))


def make_weights(root: Path) -> Weights:
    """All the folders."""
    import open_clip
    from safetensors.torch import save_file

    found = Weights(root / "show-o", root / "magvitv2", root / "phi-1_5", root / "clip", root / "rewards.yaml")
    write_showo(found.model, write_tokenizer(found.tokenizer))
    torch.manual_seed(1)
    MagvitV2(MagvitConfig(8, (1, 1, 1, 1, 2), (1, 1, 1, 1, 2), (1,) * 5, (1,) * 5, 5, 4)).save_pretrained(found.vq)
    experts = Folders(
        save_ernie(root / "ernie"),
        save_blip2(root / "blip2"),
        save_dinov2(root / "dinov2"),
        save_facenet(root / "facenet"),
    )
    settings = {"rewards": {"models": experts.settings(), "offline": True}}
    found.rewards.write_text(yaml.safe_dump(settings))
    found.clip.mkdir()
    torch.manual_seed(2)
    state = {
        name: value.contiguous() for name, value in open_clip.CLIP(**CLIP_CONFIG["model_cfg"]).state_dict().items()
    }
    save_file(state, found.clip / "open_clip_model.safetensors")
    (found.clip / "open_clip_config.json").write_text(json.dumps(CLIP_CONFIG))
    return found


def make_person(root: Path) -> Path:
    """A person from six cuts of one real portrait, as `data new` makes it of a user's files."""
    from PIL import Image
    from skimage.data import astronaut

    portrait = np.ascontiguousarray(astronaut()[:256, 64:384])
    for number in range(6):
        cut = portrait[4 * number :, 5 * number : 320 - 3 * number]
        Image.fromarray(cut[:, ::-1] if number % 2 else cut).save(root / f"{number}.jpg")
    sheet = root / "ann.yaml"
    sheet.write_text(FACTS)
    words = ("--kind", "human", "--class", "woman", "--facts", sheet)
    call("data", "new", root / "data", "ann", *sorted(root.glob("*.jpg")), *words)
    return root / "data"


def call(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
