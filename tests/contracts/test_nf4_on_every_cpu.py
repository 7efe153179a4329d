"""A 4-bit base is the same before and after an evaluation, on either kind of CPU.

bitsandbytes repacks a Linear4bit for bf16 inference on CPUs with AVX512-BF16, the first time it
runs in eval mode without gradients (see models/load.py::keep_nf4_as_loaded).
"""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import nn

from rayft.config.methods import LoraSpec
from rayft.config.run import ModelSpec
from rayft.methods import apply_all, build
from rayft.models.load import keep_nf4_as_loaded, load_model
from rayft.trials.initial import shared_copy
from tests.packs import Lab, finish, losses, small_model

WIDTH = 64


def layer() -> Linear4bit:
    """A 4-bit layer as bitsandbytes makes it."""
    torch.manual_seed(0)
    made = Linear4bit(WIDTH, WIDTH, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    return made.to("cpu")


def rows(*, requires_grad: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, WIDTH, generator=generator).requires_grad_(requires_grad)


def evaluated(module: nn.Module) -> torch.Tensor:
    """As `engine.evaluating()` runs it; training again afterwards."""
    module.eval()
    with torch.no_grad():
        out = module(rows())
    module.train()
    return out


def repacked(module: nn.Module) -> list[str]:
    """Names of layers that bitsandbytes has repacked."""
    return [
        name
        for name, one in module.named_modules()
        if isinstance(one, Linear4bit) and "packing_format_for_cpu" in vars(one.weight.quant_state)
    ]


def test_the_switch_is_there_and_follows_the_reading(cpu_reading):
    """Should bitsandbytes rename it, setting it would do nothing."""
    assert vars(layer())["support_avx512bf16_for_cpu"] == cpu_reading


@pytest.mark.skipif(not has_avx512bf16(), reason="the kernel needs a CPU with AVX512-BF16")
def test_the_trap_is_there():
    """What rayft keeps its layers from. Should this fail, bitsandbytes has mended it."""
    trapped, kept = layer(), layer()
    keep_nf4_as_loaded(kept)
    gap = (evaluated(trapped) - evaluated(kept)).abs().max()
    assert gap > 1e-4  # bf16, although the layer computes in float32
    assert repacked(trapped) == [""] and repacked(kept) == []
    for one, dead in ((trapped, True), (kept, False)):
        x = rows(requires_grad=True)
        with warnings.catch_warnings(action="ignore"):  # torch says that nobody wrote a backward
            one(x).sum().backward()
        assert (x.grad is None) == dead


def test_an_evaluation_leaves_a_layer_as_it_was(cpu_reading):
    made = layer()
    keep_nf4_as_loaded(made)
    codes, first = made.weight.data.clone(), evaluated(made)
    x = rows(requires_grad=True)
    out = made(x)
    assert torch.equal(out, first) and torch.equal(made.weight.data, codes)
    out.sum().backward()
    assert x.grad is not None and float(x.grad.abs().min()) > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("base"))


def test_no_path_of_rayft_makes_a_layer_that_repacks(cpu_reading, folder, tmp_path):
    """Loading, copies of the module tree, adapters around the layers, adapters from a folder."""
    spec = ModelSpec(path=str(folder), quant="nf4")
    made = load_model(spec, device="cpu", seed=0)
    base, again = shared_copy(made), load_model(spec, device="cpu", seed=0)
    method = build(LoraSpec(rank=4))
    apply_all(made, [method])
    state = {name: param for name, param in made.named_parameters() if param.requires_grad}
    method.export(made, state, tmp_path / "adapter")
    PeftModel.from_pretrained(again, str(tmp_path / "adapter"))  # changes `again` itself
    for model in (made, base, again):
        layers = [one for one in model.modules() if isinstance(one, Linear4bit)]
        assert len(layers) == 2 * 7
        assert not any(one.support_avx512bf16_for_cpu for one in layers)
        model.eval()
        with torch.no_grad():
            model(input_ids=torch.arange(8)[None], use_cache=False)
        assert repacked(model) == []


def test_a_run_that_evaluates_while_it_trains_has_the_same_losses_on_either_cpu(
    tmp_path, monkeypatch
):
    """Solo, and in a pack: losses, held-out losses and adapters' gradients, bit for bit."""
    found = {}
    for reading in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda answer=reading: answer)
            lab = Lab(tmp_path / str(reading), "model.quant=nf4", steps=6)
            alone, packed = (
                lab.run("one", "train.eval_every=2", where=w) for w in ("solo", "pack")
            )
            lab.solo(alone)
            pack = lab.pack(packed)
            finish(pack)
            assert repacked(pack._model.step) == []
        found[reading] = [
            losses(run, split) for run in (alone, packed) for split in ("train", "eval")
        ]
    assert found[0] == found[1]
    assert found[0][0][-1] < 0.999 * found[0][0][0]  # it does learn


def test_the_advice_to_install_kernels_does_not_reach_users():
    """The message is bitsandbytes' own, given at its import on CPUs with AVX512-BF16; so that
    other CPUs test the filter too, it is given once more, and another one, which must pass."""
    code = (
        "import logging, peft, rayft.models.load\n"
        "log = logging.getLogger('bitsandbytes.backends.cpu.ops')\n"
        "log.warning('Failed to load CPU gemm_4bit_forward from kernels-community: %s.', 'none')\n"
        "log.warning('something else')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import rayft\n{code}"], capture_output=True, text=True, check=True
    )
    assert done.stderr.count("something else") == 1
    assert "kernels" not in done.stdout + done.stderr
