"""What a method keeps beside the base is saved once, compared when a run continues, and every step
begins with `before`."""

from __future__ import annotations

import pytest
import torch

from rayft import methods
from rayft.checkpoint.reader import find_commit
from rayft.compose.kept import KEPT
from rayft.config.methods import LoraSpec
from rayft.core.errors import ConfigError
from rayft.methods.lora import Lora
from tests.packs import Lab, Silent, home_of, losses

CALLS: list[tuple[int, int]] = []


class KeepingLora(Lora):
    """LoRA with a frozen tensor of its own in the model, as VeRA's shared matrices are."""

    drawn = 5  # seed of the tensor

    def apply(self, model):
        groups = super().apply(model)
        draw = torch.Generator().manual_seed(self.drawn)
        model.model.register_buffer("own_frozen", torch.randn(3, generator=draw), persistent=False)
        return groups

    def kept(self, model):
        return {"model.own_frozen": model.get_buffer("model.own_frozen")}

    def before(self, step, full):
        CALLS.append((step, sum(tensor.numel() for _, tensor in full())))


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setitem(methods.IMPLEMENTATIONS, LoraSpec, KeepingLora)
    CALLS.clear()
    return Lab(tmp_path, steps=6)


def test_it_is_in_every_commit_and_a_run_goes_on_with_it_alone(lab, monkeypatch):
    run, whole = lab.run("cut"), lab.run("whole")
    lab.solo(run, signals=Silent(stop_at=4))
    commit = find_commit(home_of(run))
    assert commit is not None and commit.step == 4
    with commit.reader() as reader:
        kept = {name: t for name, t in reader.whole(0).items() if name.startswith(KEPT)}
    assert list(kept) == [KEPT + "model.own_frozen"]
    want = torch.randn(3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(kept[KEPT + "model.own_frozen"], want)

    with monkeypatch.context() as other:
        other.setattr(KeepingLora, "drawn", 6)
        with pytest.raises(ConfigError, match="own_frozen is not what it was in checkpoint step-4"):
            lab.solo(run, attempt=2)
    lab.solo(run, attempt=3)
    steps, sizes = zip(*CALLS, strict=True)
    assert steps == (1, 2, 3, 4, 5, 6)
    wide = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128)  # in + out of q, o; k, v; gate, up, down
    assert set(sizes) == {4 * 2 * wide}  # rank 4, two layers
    lab.solo(whole)
    assert losses(run) == losses(whole)


def test_a_commit_without_it_is_refused(lab, monkeypatch):
    run = lab.run("plain")
    with monkeypatch.context() as other:
        other.setitem(methods.IMPLEMENTATIONS, LoraSpec, Lora)
        lab.solo(run, signals=Silent(stop_at=3))
    with pytest.raises(ConfigError, match="own_frozen"):
        lab.solo(run, attempt=2)
