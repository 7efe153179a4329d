"""Make the tokenizer of builtin:tiny: byte-level BPE, 2,048 tokens, from builtin:pydocs (train).

    python experiments/tiny/tokenizer.py [FOLDER]      (default: rayft/models/tiny; about 5 s)

Deterministic for one Python version; the committed files were made with Python 3.11. Digits are
single tokens, so that numbers are read the same way at any place. Tokens 0-7 are the special ones;
a text is encoded with <|bos|> before it, and a chat template writes <|bos|> itself.
The chat template is a file beside the result and is not touched.
"""

import json
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from rayft.data.builtin import rows

FOLDER = Path("rayft/models/tiny")
VOCABULARY = 2048
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
END = "<|end|>"  # ends a turn; generation stops here or at <|eos|>

# words with the space before them; single digits; runs of signs; line ends; indents
WORDS = Regex(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE with `VOCABULARY` tokens; special tokens have the ids 0 to 7."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(WORDS, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD, *ROLES, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["text"] for row in rows("pydocs", "train")), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, 0)]
    )
    return tokenizer


def main(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": [*ROLES, END],
        "model_max_length": 1024,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    print(f"{tokenizer.get_vocab_size()} tokens -> {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
