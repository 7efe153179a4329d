"""Round the weights of a finished pre-training run to bf16 and put them into the package.

rayft train experiments/tiny/pretrain.yaml
python experiments/tiny/store.py runs/tiny/export
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TARGET = Path("rayft/models/tiny/model.safetensors")


def main(export: Path) -> None:
    """Read `<export>/model.safetensors`, write TARGET."""
    tensors = load_file(export / "model.safetensors")
    rounded = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(rounded, TARGET, metadata={"format": "pt"})
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes, {len(rounded)} tensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
