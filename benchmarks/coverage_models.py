"""The models that benchmarks/coverage.py runs: which, and how each is built, at which inputs, with which weights."""

import contextlib
import fnmatch
import json
import random
import subprocess
import sys

# Attributes that say how often something is left out, where it is no layer of its own.
RANDOM = ("drop_prob", "drop_path_rate", "p_stochastic_depth", "stochastic_depth_prob", "drop_rate", "dropout")
SIZES = (64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)

ULTRALYTICS = {
    "detect": "yolov3-tiny yolov3 yolov5n yolov6n yolov8n yolov9t yolov10n yolo11n yolo12n",
    "segment": "yolov8n-seg yolo11n-seg",
    "pose": "yolov8n-pose yolo11n-pose",
    "classify": "yolov8n-cls yolo11n-cls",
}
TORCHVISION = {
    "classification": "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 "
    "maxvit_t mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnext50_32x4d "
    "shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t vgg11_bn vit_b_32 wide_resnet50_2",
    "segmentation": "segmentation.lraspp_mobilenet_v3_large segmentation.deeplabv3_mobilenet_v3_large "
    "segmentation.deeplabv3_resnet50 segmentation.fcn_resnet50",
    "video": "video.r3d_18 video.mc3_18 video.r2plus1d_18 video.s3d video.mvit_v2_s video.swin3d_t",
    "detection backbones": "backbone.resnet18_fpn backbone.mobilenet_v3_large_fpn",
}


def build(name):
    """The module, its weights drawn from a fixed seed, and the shapes of input to try, smallest first."""
    import torch

    torch.manual_seed(0)
    library, _, model = name.partition(":")
    if library == "timm":
        import timm

        module = timm.create_model(model)
        channels, *default = (getattr(module, "default_cfg", None) or {}).get("input_size", (3, 224, 224))
        return module, [*((channels, n, n) for n in SIZES if n < default[0]), (channels, *default)]
    if library == "torchvision":
        return _torchvision(model)
    from ultralytics.nn import tasks

    kind = next(kind for kind, names in ULTRALYTICS.items() if model in names.split())
    classes = {
        "detect": "DetectionModel",
        "segment": "SegmentationModel",
        "pose": "PoseModel",
        "classify": "ClassificationModel",
    }
    return getattr(tasks, classes[kind])(f"{model}.yaml", verbose=False), [(3, 64, 64)]


def _torchvision(model):
    import torchvision

    kind, _, short = model.rpartition(".")
    if kind == "backbone":
        backbones = torchvision.models.detection.backbone_utils
        if short.startswith("mobilenet"):
            return backbones.mobilenet_backbone("mobilenet_v3_large", weights=None, fpn=True), [(3, 64, 64)]
        return backbones.resnet_fpn_backbone(backbone_name="resnet18", weights=None), [(3, 64, 64)]
    keywords = {"weights_backbone": None} if kind == "segmentation" else {}
    if short in ("googlenet", "inception_v3"):
        keywords["init_weights"] = True
    module = torchvision.models.get_model(short, weights=None, **keywords)
    if kind == "video":
        return module, [(3, 16, n, n) for n in (64, 112, 224)]
    return module, [(3, n, n) for n in (*SIZES[:7], 299, 320)]


def uniform(like, low, high, generator):
    """Random numbers of the shape and type of `like`."""
    import torch

    return low + (high - low) * torch.rand(like.shape, generator=generator, dtype=like.dtype)


def prepare(module, torch):
    """In float64, every constant parameter shaken, everything random off."""
    from interop.tracing import private

    generator = torch.Generator().manual_seed(0)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.numel() and parameter.min() == parameter.max():
                parameter.add_(uniform(parameter, -0.3, 0.3, generator))
        for layer in module.modules():
            if isinstance(layer, private.dropout_class()):
                layer.p = 0.0
            for attribute in RANDOM:
                if isinstance(getattr(layer, attribute, None), float):
                    setattr(layer, attribute, 0.0)
            if type(layer).__name__ == "StochasticDepth":
                layer.p = 0.0
    return module


def randomise_statistics(module, inputs, torch):
    """Running statistics about those of what each layer is given in eval mode: means off by up to 0.3 deviations,
    variances by up to a half.

    Statistics that know nothing of the activations, or only of training's, let these grow or die out from layer to
    layer, and few examples leave channels with hardly a variance, which then amplify rounding: hence more of them.
    """
    from interop.tracing import private

    generator = torch.Generator().manual_seed(1)

    def draw(layer, values):
        variance, mean = torch.var_mean(values, dim=1, correction=0)
        layer.running_mean.copy_(mean + uniform(mean, -0.3, 0.3, generator) * variance.sqrt())
        layer.running_var.copy_(variance * uniform(variance, 0.5, 1.5, generator))

    def channels_first(layer, x):  # spiking networks have time steps before the examples
        return (x if x.shape[1] == layer.num_features else x.flatten(0, 1)).transpose(0, 1).flatten(1)

    layers = [m for m in module.modules() if isinstance(m, private.batch_norm_class())]
    layers = [m for m in layers if m.running_mean is not None and len(m.running_mean) == m.num_features]  # not ghosts'
    hooks = []
    for layer in layers:
        draw(layer, torch.tensor([-1.0, 1.0]).to(layer.running_mean).expand(layer.num_features, 2))  # not called, maybe
        hooks.append(layer.register_forward_pre_hook(lambda m, args: draw(m, channels_first(m, args[0]))))
    if layers:
        with torch.no_grad():
            module.eval()(*more_examples(inputs, generator, torch))
    for hook in hooks:
        hook.remove()


def more_examples(inputs, generator, torch):
    """Four times as many examples. Integers and a number an example (a length) come again, others are drawn: normal,
    or its absolute value where none of the input is negative. The inputs themselves where the first dimension is no
    batch, as in graphs."""
    if len({len(x) if x.dim() else 0 for x in inputs}) > 1:
        return inputs

    def more(x):
        if x.dim() < 2 or not x.is_floating_point():
            return torch.cat([x] * 4) if x.dim() else x
        drawn = torch.randn(3 * len(x), *x.shape[1:], generator=generator, dtype=x.dtype)
        return torch.cat([x, drawn.abs() if x.min() >= 0 else drawn])

    return tuple(map(more, inputs))


def calm(module, torch):
    """Smaller scales and larger biases for BatchNorm: less of it near the kinks of activations.

    For deep chains that magnify rounding from layer to layer; whether one does is asked of PyTorch alone.
    """
    from interop.tracing import private

    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, private.batch_norm_class()) and layer.weight is not None:
                layer.weight.mul_(0.5)
                layer.bias.copy_(uniform(layer.bias, -1, 1, generator))


@contextlib.contextmanager
def all_in_float64(torch):
    """Models that cast to float32 on their way (normalisations, encodings of position) do not, for the time being.

    Two runs in float32 differ by its rounding, so a comparison in float64 would say nothing of them.
    """

    class Wider(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if (kwargs or {}).get("device") == "meta":  # PyTorch's own shadow of a tensor, which has its dtype
                return func(*args, **kwargs)
            func = torch.Tensor.double if func is torch.Tensor.float else func
            args = [wider.get(x, x) if isinstance(x, torch.dtype) else x for x in args]
            kwargs = {k: wider.get(x, x) if isinstance(x, torch.dtype) else x for k, x in (kwargs or {}).items()}
            return func(*args, **kwargs)

    wider = {torch.float32: torch.float64, torch.complex64: torch.complex128}

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Wider():
            yield
    finally:
        torch.set_default_dtype(default)


def smallest_input(module, shapes, torch):
    """The first shape that the module takes in both modes. Four examples; two of large ones and of videos."""
    error = None
    for shape in shapes:
        shape = (4 if len(shape) == 3 and shape[-1] <= 128 else 2, *shape)
        try:
            with torch.no_grad():
                for mode in (True, False):
                    module.train(mode)
                    module(torch.zeros(shape, dtype=torch.float64))
            return shape
        except Exception as problem:
            error = problem
    raise RuntimeError(f"the module takes none of the inputs tried: {error}")


def timm_families(cache):
    """{family: {model: parameters}}; counted once, on the meta device, and kept."""
    if cache.exists():
        return json.loads(cache.read_text())
    code = (
        "import torchvision_cpu, timm, torch, json, sys\n"
        "sizes = {}\n"
        "for family in timm.list_modules():\n"
        "    for name in timm.list_models(module=family):\n"
        "        try:\n"
        "            with torch.device('meta'): module = timm.create_model(name)\n"
        "            sizes.setdefault(family, {})[name] = sum(p.numel() for p in module.parameters())\n"
        "        except Exception: pass\n"
        "json.dump(sizes, open(sys.argv[1], 'w'))\n"
    )
    examples = cache.parent.parent.parent / "examples"
    subprocess.run([sys.executable, "-c", code, str(cache.resolve())], check=True, cwd=examples)
    return json.loads(cache.read_text())


def smallest_of_each(families):
    """{name: family}: the smallest model of each of timm's families."""
    return {f"timm:{min(models, key=models.get)}": f"timm {family}" for family, models in families.items()}


def drawn(families, count, seed):
    """{name: family}: `count` other models of timm, of up to 100 M parameters."""
    smallest = smallest_of_each(families)
    everything = {f"timm:{m}": (f"timm {family}", size) for family, ms in families.items() for m, size in ms.items()}
    pool = sorted(name for name, (_, size) in everything.items() if name not in smallest and size <= 100e6)
    return {name: everything[name][0] for name in random.Random(seed).sample(pool, min(count, len(pool)))}


def listed():
    """{name: family} of torchvision's and Ultralytics's models."""
    found = {f"torchvision:{m}": f"torchvision {group}" for group, ms in TORCHVISION.items() for m in ms.split()}
    return found | {f"ultralytics:{m}": f"ultralytics {group}" for group, ms in ULTRALYTICS.items() for m in ms.split()}


def chosen(patterns, count, seed, families):
    """{name: family} of the models to run: those that match, or one of each family, or these and `count` others."""
    if patterns:
        everything = {f"timm:{m}": f"timm {family}" for family, models in families.items() for m in models} | listed()
        return {n: f for n, f in everything.items() if any(fnmatch.fnmatch(n, p) for p in patterns)}
    return smallest_of_each(families) | listed() | drawn(families, count, seed)
