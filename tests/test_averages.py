"""Which weights are the average: files made as training frameworks make them, each way read back as what it is.

Every maker repeats the lines of the framework that build what it gives to torch.save, and names them.
"""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import interop
from interop import CheckpointError, load_checkpoint
from interop.files import averages


def net(value: float) -> nn.Module:
    """A model whose floating-point numbers are all `value`."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Sequential(nn.BatchNorm2d(2)), nn.Linear(2, 2))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.fill_(value)
    return model


TRAINED, AVERAGE = net(1.0), net(2.0)
NAMES = list(TRAINED.state_dict())
META = {"epoch": 3, "lr": 0.1}


def averaged() -> nn.Module:
    return AveragedModel(AVERAGE, use_buffers=True)


def timm():
    """timm/utils/checkpoint_saver.py, CheckpointSaver._save."""
    return {"epoch": 3, "arch": "x", "version": 2, "state_dict": TRAINED.state_dict(),
            "state_dict_ema": AVERAGE.state_dict(), "metric": 0.5}  # fmt: skip


def torchvision():
    """references/classification/train.py: `checkpoint["model_ema"] = model_ema.state_dict()`, an AveragedModel."""
    return {
        "model": TRAINED.state_dict(),
        "epoch": 1,
        "model_ema": averaged().state_dict(),
    }


def mmengine():
    """mmengine/hooks/ema_hook.py: before_save_checkpoint, _swap_ema_state_dict; model/averaged_model.py: `steps`."""
    ema = {"steps": torch.tensor(9), **{f"module.{name}": x for name, x in AVERAGE.state_dict().items()}}
    model = TRAINED.state_dict()
    for name in ema:
        if name[:7] == "module.":
            ema[name], model[name[7:]] = model[name[7:]], ema[name]
    return {"meta": {"epoch": 1, "mmengine_version": "0.10.4"}, "state_dict": dict(model), "message_hub": {},
            "ema_state_dict": ema}  # fmt: skip


def mmcv(exchanged: bool):
    """mmcv/runner/hooks/ema.py: buffers `ema_*`, exchanged by after_train_epoch before CheckpointHook writes."""
    one, other = (AVERAGE, TRAINED) if exchanged else (TRAINED, AVERAGE)
    second = {f"ema_{name.replace('.', '_')}": x for name, x in other.named_parameters()}
    return {"meta": {"epoch": 1}, "state_dict": {**one.state_dict(), **second}}


class EmaPytorch(nn.Module):
    """ema_pytorch/ema_pytorch.py, EMA.__init__."""

    def __init__(self, model: nn.Module, average: nn.Module, include_online_model: bool = True):
        super().__init__()
        if include_online_model:
            self.online_model = model
        self.ema_model = average
        self.register_buffer("initted", torch.tensor(True))
        self.register_buffer("step", torch.tensor(500))


def ema_pytorch(online: bool):
    """denoising_diffusion_pytorch.py, Trainer.save."""
    return {"step": 5, "model": TRAINED.state_dict(), "ema": EmaPytorch(TRAINED, AVERAGE, online).state_dict()}


def lightning_weight_averaging():
    """lightning/pytorch/callbacks/weight_averaging.py, on_save_checkpoint."""
    state = averaged().state_dict()
    return {
        "epoch": 1, "callbacks": {"WeightAveraging": {"latest_update_step": 3}}, "loops": {"fit_loop": {}},
        "current_model_state": TRAINED.state_dict(),
        "state_dict": {name[7:]: x for name, x in state.items() if name.startswith("module.")},
        "averaging_state": {name: x for name, x in state.items() if not name.startswith("module.")},
    }  # fmt: skip


def lightning_swa():
    """lightning/pytorch/callbacks/stochastic_weight_avg.py, state_dict."""
    swa = {
        "n_averaged": 3,
        "latest_update_epoch": 2,
        "scheduler_state": None,
        "average_model_state": AVERAGE.state_dict(),
    }
    return {"epoch": 1, "state_dict": TRAINED.state_dict(), "callbacks": {"StochasticWeightAveraging": swa}}


class LightningModule(nn.Module):
    """A module that holds its own average, which many LightningModules do: `self.ema_model = AveragedModel(...)`."""

    def __init__(self, average: nn.Module, more: bool):
        super().__init__()
        self.model = TRAINED
        self.ema_model = average
        if more:
            self.head = nn.Linear(1, 1)


def detectron2():
    """fvcore/common/checkpoint.py, Checkpointer.save, with d2go/modeling/ema.py, may_get_ema_checkpointer."""
    return {"model": TRAINED.state_dict(), "ema_state": dict(AVERAGE.state_dict()), "iteration": 7}


def composer(active: bool):
    """composer/algorithms/ema/ema.py: apply puts the average into the model before a checkpoint; core/state.py writes
    the algorithms as a list of pairs."""
    stale = net(7.0).state_dict()
    ema = {"repr": "EMA()", "ema_model": AVERAGE.state_dict(), "ema_weights_active": active, "ema_started": True,
           "training_model": TRAINED.state_dict() if active else stale}  # fmt: skip
    model = (AVERAGE if active else TRAINED).state_dict()
    return {"state": {"model": model, "algorithms": [("EMA", ema)], "run_name": "x"}, "rng": []}


def composer_swa():
    """composer/algorithms/swa/swa.py, SWA.state_dict."""
    swa = {"repr": "SWA()", "swa_model": averaged().state_dict(), "swa_started": True}
    return {"state": {"model": TRAINED.state_dict(), "algorithms": [("SWA", swa)]}, "rng": []}


def ultralytics(model: bool):
    """ultralytics/engine/trainer.py, save_model; YOLOv5 before it wrote the model too."""
    return {"epoch": 1, "model": TRAINED if model else None, "ema": AVERAGE, "updates": 3}


MADE = {
    "timm": (timm(), "model"),
    "torchvision": (torchvision(), "model"),
    "MMEngine": (mmengine(), None),
    "ema_pytorch": (ema_pytorch(True), "model"),
    "ema_pytorch, without the online model": (ema_pytorch(False), "model"),
    "ema_pytorch alone": (EmaPytorch(TRAINED, AVERAGE).state_dict(), None),
    "ema_pytorch under DDP": ({f"module.{n}": x for n, x in EmaPytorch(TRAINED, AVERAGE).state_dict().items()}, None),
    "Lightning, WeightAveraging": (lightning_weight_averaging(), None),
    "Lightning, SWA": (lightning_swa(), "model"),
    "detectron2": (detectron2(), "model"),
    "composer": (composer(False), "model"),
    "composer, average in the model": (composer(True), None),
    "composer, SWA": (composer_swa(), "model"),
    "Ultralytics": (ultralytics(True), "ema"),
    "RT-DETR": ({"model": TRAINED.state_dict(), "ema": {"module": AVERAGE.state_dict(), "updates": 3}}, "model"),
    "average counted at the top": (
        {"model": TRAINED.state_dict(), "ema": {"module": AVERAGE.state_dict(), "updates": torch.tensor(3)}}, "model"),
    "averaged_model": ({"net": TRAINED.state_dict(), "averaged_model": AVERAGE.state_dict()}, "model"),
    "swa_model": ({"state_dict": TRAINED.state_dict(), "swa_model": averaged().state_dict()}, "model"),
    "ema_model_state_dict": (
        {"model_state_dict": TRAINED.state_dict(), "ema_model_state_dict": AVERAGE.state_dict()}, "model"),
    "modelEMA": ({"model": TRAINED.state_dict(), "modelEMA": AVERAGE.state_dict()}, "model"),
    "shadow": ({"model": TRAINED.state_dict(), "ema": {"shadow": AVERAGE.state_dict(), "decay": 0.9}}, "model"),
    "shadow_params by name": (
        {"model": TRAINED.state_dict(), "shadow_params": dict(AVERAGE.state_dict()), "decay": 0.9}, "model"),
    "AveragedModel under another name": (
        {"state_dict": TRAINED.state_dict(), "best": averaged().state_dict()}, "model"),
    "two modules in one": (LightningModule(AVERAGE, False).state_dict(), "whole"),
    "an AveragedModel in a module": (LightningModule(averaged(), False).state_dict(), "whole"),
    "an EMA in a module": (LightningModule(EmaPytorch(TRAINED, AVERAGE), False).state_dict(), "whole"),
}  # fmt: skip


def value(checkpoint) -> float:
    """The one number that all floating-point arrays hold."""
    found = {float(x) for array in checkpoint.values() if array.dtype.kind == "f" for x in array.flat}
    assert len(found) == 1, found
    return found.pop()


@pytest.mark.parametrize("name", MADE)
def test_both_sets_of_weights_are_read_as_what_they_are(tmp_path, name):
    content, default = MADE[name]
    torch.save(content, tmp_path / "x.pth")
    for which, expected in (("model", 1.0), ("ema", 2.0)):
        checkpoint = load_checkpoint(tmp_path / "x.pth", which)
        assert list(checkpoint) == NAMES
        assert value(checkpoint) == expected, which
        net(0.0).load_state_dict(interop.to_torch(checkpoint), strict=True)
    if default is None:
        with pytest.raises(CheckpointError, match=r"which=: 'model' .* 'ema'"):
            load_checkpoint(tmp_path / "x.pth")
    elif default == "whole":  # nothing is chosen: all under the file's own names
        assert list(load_checkpoint(tmp_path / "x.pth")) == list(content)
    else:
        assert value(load_checkpoint(tmp_path / "x.pth")) == {"model": 1.0, "ema": 2.0}[default]


@pytest.mark.parametrize("average", [
    {"ema": AVERAGE.state_dict()},
    {"model_ema": averaged().state_dict(), "epoch": 3},
    {"model": averaged().state_dict()},
    averaged().state_dict(),
    {f"module.{name}": x for name, x in averaged().state_dict().items()},
    {f"_orig_mod.{name}": x for name, x in averaged().state_dict().items()},
    EmaPytorch(TRAINED, AVERAGE, False).state_dict(),
    {"ema_model_state_dict": EmaPytorch(TRAINED, AVERAGE, False).state_dict()},
    {"steps": torch.tensor(3), **{f"module.{name}": x for name, x in AVERAGE.state_dict().items()}},
    {"shadow_params": dict(AVERAGE.state_dict()), "num_updates": 3},
    ultralytics(False),
    averaged(),
])  # fmt: skip
def test_an_average_alone_is_never_the_trained_weights(tmp_path, average):
    torch.save(average, tmp_path / "x.pth")
    for which in (None, "ema"):
        checkpoint = load_checkpoint(tmp_path / "x.pth", which)
        assert list(checkpoint) == NAMES and value(checkpoint) == 2.0
    with pytest.raises(CheckpointError, match=r"no trained weights|no state dict for which='model'"):
        load_checkpoint(tmp_path / "x.pth", "model")


def unnamed(**more):
    """diffusers/training_utils.py, EMAModel.state_dict, and torch_ema/ema.py: a list in the order of the parameters."""
    return {"decay": 0.99, "shadow_params": [x.detach() for x in AVERAGE.parameters()], **more}


UNCLEAR = {
    "diffusers": ({"model": TRAINED.state_dict(), "ema": unnamed(optimization_step=3)}, ["ema"]),
    "torch_ema with counts that are tensors": (
        {"model": TRAINED.state_dict(), "ema": unnamed(num_updates=torch.tensor(3), decay=torch.tensor(0.9))}, ["ema"]),
    "MMCV after an epoch": (mmcv(True), ["model", "ema"]),
    "MMCV after an iteration": (mmcv(False), ["model", "ema"]),
    "MMEngine without its notes": (
        {name: mmengine()[name] for name in ("state_dict", "ema_state_dict")}, [None, "model"]),
    "two averages": (
        {"model": TRAINED.state_dict(), "ema_fast": AVERAGE.state_dict(), "ema_slow": net(3.0).state_dict()}, ["ema"]),
    "trained weights beside the model": (
        {"model": AVERAGE.state_dict(), "raw_model": TRAINED.state_dict()}, [None, "model", "ema"]),
    "the model without its average": (
        {"model": AVERAGE.state_dict(), "non_ema_model": TRAINED.state_dict()}, [None, "model", "ema"]),
    "student and teacher": (
        {"student": TRAINED.state_dict(), "teacher": AVERAGE.state_dict()}, [None, "model", "ema"]),
    "no average": ({"model": TRAINED.state_dict()}, ["ema"]),
    "no average, nothing around": (TRAINED.state_dict(), ["ema"]),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_a_file_does_not_say_is_an_error_that_says_what_which_may_be(tmp_path, name):
    content, refused = UNCLEAR[name]
    torch.save(content, tmp_path / "x.pth")
    for which in refused:
        with pytest.raises(CheckpointError, match="which=: 'model'"):
            load_checkpoint(tmp_path / "x.pth", which)
    for name in (name for name, item in content.items() if name.endswith("state_dict") or name.startswith("ema_")):
        assert set(NAMES) <= set(load_checkpoint(tmp_path / "x.pth", name))  # each by its own name


def test_an_average_without_names_is_named_in_the_error(tmp_path):
    torch.save({"model": TRAINED.state_dict(), "ema": unnamed()}, tmp_path / "x.pth")
    assert value(load_checkpoint(tmp_path / "x.pth")) == 1.0
    with pytest.raises(CheckpointError, match="'ema/shadow_params' is an average without names"):
        load_checkpoint(tmp_path / "x.pth", "ema")
    torch.save(unnamed(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="'shadow_params' is an average without names"):
        load_checkpoint(tmp_path / "x.pth")


class LitEma(nn.Module):
    """https://github.com/CompVis/latent-diffusion, ldm/modules/ema.py: buffers by names without dots."""

    def __init__(self, model: nn.Module, average: nn.Module):
        super().__init__()
        self.register_buffer("decay", torch.tensor(0.9999))
        self.register_buffer("num_updates", torch.tensor(3))
        for name, parameter in average.named_parameters():
            self.register_buffer(name.replace(".", ""), parameter.clone().detach())


@pytest.mark.parametrize("more", [False, True])
def test_an_average_of_parameters_takes_the_rest_from_the_model_and_says_so(tmp_path, more):
    module = LightningModule(nn.Identity(), more)
    module.model_ema = LitEma(TRAINED, AVERAGE)
    torch.save({"state_dict": module.state_dict(), "epoch": 1}, tmp_path / "x.ckpt")
    prefix = "model." if more else ""
    names = [prefix + name for name in NAMES] + (["head.weight", "head.bias"] if more else [])
    parameters = {prefix + name for name, _ in TRAINED.named_parameters()}
    found = load_checkpoint(tmp_path / "x.ckpt", "ema")
    assert list(found) == names
    for name in names:
        if name in parameters:
            assert (found[name] == 2.0).all()
    assert found.metadata["not_averaged"] == [name for name in names if name not in parameters]
    trained = load_checkpoint(tmp_path / "x.ckpt", "model")
    assert list(trained) == names and all((trained[name] == 1.0).all() for name in parameters)
    assert list(load_checkpoint(tmp_path / "x.ckpt", "state_dict")) == list(module.state_dict())


def test_layers_that_are_called_ema_are_no_average(tmp_path):
    """An attention of that name, code books that move as averages: the model's own."""
    models = [
        nn.ModuleDict({"conv": nn.Conv2d(1, 2, 1), "ema": nn.BatchNorm2d(2)}),
        nn.ModuleDict({"a": nn.ModuleDict({"ema": nn.Linear(2, 2)}), "b": nn.ModuleDict({"ema": nn.Linear(2, 2)})}),
        nn.ModuleDict({"ema": nn.Linear(2, 2), "one": nn.Linear(2, 2), "other": nn.Linear(2, 2)}),
    ]
    models[0].register_buffer("ema_cluster_size", torch.ones(2))
    for model in models:
        torch.save({"state_dict": model.state_dict()}, tmp_path / "x.pth")
        for which in (None, "model"):
            assert list(load_checkpoint(tmp_path / "x.pth", which)) == list(model.state_dict())
        with pytest.raises(CheckpointError, match="no state dict for which='ema'"):
            load_checkpoint(tmp_path / "x.pth", "ema")


def test_notes_of_an_average_are_kept_beside_the_file_s_own(tmp_path):
    torch.save(ema_pytorch(True), tmp_path / "x.pth")
    metadata = load_checkpoint(tmp_path / "x.pth", "ema").metadata
    assert metadata["step"] == 5 and metadata["ema/step"] == 500 and metadata["ema/initted"]
    torch.save(mmengine(), tmp_path / "x.pth")
    assert load_checkpoint(tmp_path / "x.pth", "model").metadata["steps"] == 9


def test_the_table_is_the_one_of_the_documentation():
    import pathlib

    page = (pathlib.Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text()
    for row in averages.FORMATS:
        assert f"`{row.model}`" in page and f"`{row.ema}`" in page, row.framework
        assert row.source
    for wrapper in averages.WRAPPERS:
        assert f"`{wrapper.ema}.*`" in page, wrapper.name


def test_the_order_of_a_file_s_keys_decides_nothing(tmp_path):
    content = {"model": TRAINED.state_dict(), "ema": AVERAGE.state_dict(), "epoch": 3}
    for order in itertools.permutations(content):
        torch.save({key: content[key] for key in order}, tmp_path / "x.pth")
        assert [value(load_checkpoint(tmp_path / "x.pth", which)) for which in (None, "model", "ema")] == [
            1.0,
            1.0,
            2.0,
        ]


def test_an_average_goes_home_bit_for_bit(tmp_path):
    average = copy.deepcopy(AVERAGE)
    with torch.no_grad():
        average[0].weight.copy_(torch.randn(2, 1, 1, 1))
    torch.save({"model": TRAINED.state_dict(), "ema": EmaPytorch(TRAINED, average).state_dict()}, tmp_path / "x.pth")
    found = load_checkpoint(tmp_path / "x.pth", "ema")
    np.testing.assert_array_equal(found["0.weight"], average[0].weight.detach().numpy())
    assert found.versions == {"": 1, "0": 1, "1": 1, "1.0": 2, "2": 1}
