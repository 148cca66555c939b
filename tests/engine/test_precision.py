"""What a precision's name means on a device, who decides it, and what it does to forward and backward passes."""

from __future__ import annotations

import pytest
import torch

from ssdd.engine import precision
from ssdd.engine.errors import UserError
from ssdd.engine.precision import VARIABLE, Precision, cpu_capability, native_bf16

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture(params=[True, False], ids=["amx", "without amx"])
def amx(request, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: request.param)
    return request.param


@pytest.fixture(params=[True, False], ids=["bf16", "without bf16"])
def avx512_bf16(request, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param)
    return request.param


def test_auto_trains_a_cpu_in_bf16_where_it_has_instructions_for_it_and_says_which(amx, avx512_bf16):
    found = Precision.resolve("auto", CPU)
    expected = "auto: bf16, AMX" if amx else "auto: bf16, AVX512-BF16" if avx512_bf16 else None
    assert str(found) == (expected or "auto: no, no native bfloat16 on this cpu")
    assert found.name == ("bf16" if expected else "no")


@pytest.mark.parametrize(("capability", "name"), [((7, 5), "no"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_trains_gpus_in_bf16_since_ampere(monkeypatch, capability, name):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = Precision.resolve("auto", CUDA)
    assert found.name == name and ("compute capability" in found.why) == (name == "bf16")


def test_other_devices_train_in_float32():
    assert native_bf16(torch.device("mps")) == "" and Precision.resolve("auto", "mps").name == "no"


def test_what_is_measured_is_float32_on_any_cpu(amx, avx512_bf16):
    assert Precision.resolve("auto", CPU, measuring=True).name == "no"
    assert Precision.resolve("bf16", CPU, measuring=True).name == "bf16"


@pytest.mark.parametrize("measuring", [False, True])
@pytest.mark.parametrize("forced", ["no", "bf16"])
def test_the_variable_decides_what_auto_is_and_nothing_else(monkeypatch, forced, measuring):
    monkeypatch.setenv(VARIABLE, forced)
    assert str(Precision.resolve("auto", CPU, measuring)) == f"auto: {forced}, {VARIABLE}"
    assert [str(Precision.resolve(name, CPU, measuring)) for name in ("no", "bf16")] == ["no", "bf16"]
    monkeypatch.setenv(VARIABLE, "auto")
    assert VARIABLE not in str(Precision.resolve("auto", CPU, measuring))


def test_names_that_mean_nothing_here_are_refused_where_they_were_given(monkeypatch):
    with pytest.raises(UserError, match="^mixed_precision=fp16 needs a GPU.* on cpu choose auto, no or bf16$"):
        Precision.resolve("fp16", CPU)
    for forced, message in {"fp16": "needs a GPU", "bfloat16": "is unknown: choose one of auto, no, bf16"}.items():
        monkeypatch.setenv(VARIABLE, forced)
        with pytest.raises(UserError, match=f"^{VARIABLE}={forced} {message}"):
            Precision.resolve("auto", CPU)


def test_autocast_is_that_of_the_value_inside_of_any_other():
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    with Precision.resolve("bf16", CPU).autocast():
        assert (a @ b).dtype == torch.bfloat16
        with Precision.resolve("no", CPU).autocast():
            assert torch.equal(a @ b, torch.linalg.multi_dot([a, b])) and (a @ b).dtype == torch.float32
        assert (a @ b).dtype == torch.bfloat16
    assert (a @ b).dtype == torch.float32


@pytest.mark.parametrize("name", ["no", "bf16"])
def test_without_fp16_the_scaler_passes_everything_through(name):
    scaler, weight = Precision.resolve(name, CPU).loss_scaler(), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    loss = (weight * torch.tensor([1.0, 2.0])).sum()
    assert scaler.scale(loss) is loss and not scaler.is_enabled() and scaler.state_dict() == {}
    loss.backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [0.0, -1.0]


def test_a_record_has_the_reason_and_the_cpu_that_bytes_depend_on(monkeypatch):
    expected = {"mixed_precision": "bf16", "why": "bf16", "cpu": cpu_capability()}
    assert Precision.resolve("bf16", CPU).record() == expected
    monkeypatch.setattr(precision, "native_bf16", lambda device: "compute capability 9.0")
    found = Precision.resolve("auto", CUDA).record()
    tf32 = torch.backends.cudnn.allow_tf32
    assert found == {"mixed_precision": "bf16", "why": "auto: bf16, compute capability 9.0", "tf32": tf32}
