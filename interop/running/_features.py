"""features: an imported model that returns what is computed inside of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from flax import nnx

from interop.program.nodes import Model, Program
from interop.program.regions import cut, value_of
from interop.running.module import TracedModule
from interop.running.surgery import replaced_paths
from jaxnorm._checks import shown


def features(model: nnx.Module, names: Sequence[str] | Mapping[str, str]) -> TracedModule:
    """A model that returns values from inside of an imported one, as torchvision's `create_feature_extractor` does.

    ```python
    backbone = interop.features(model, ["layer2", "layer4"])
    backbone(images)                                  # {"layer2": (N, 128, 28, 28), "layer4": (N, 512, 7, 7)}
    ```

    It computes up to the last of them and nothing after that: in train mode, BatchNorm layers that come later are not
    moved. It has all of the model's arrays, also those that it does not read, so that it goes home as the model does.

    **Arguments:**

    - `model`: an imported model.
    - `names`: paths of layers, for what each returned at its first call; or names of nodes
      (`[node.name for node in model.nodes()]`). A mapping gives what they are to be called.

    **Returns:** another `TracedModule`, with variables of its own; arrays are shared until one is changed. Calls give a
    dict by these names.

    **Raises:**

    - `TypeError`: for what is no imported model, and names that are no text.
    - `ValueError`: for a name that is none, in train or eval mode, for a layer that returned several values, for no
      names at all, and for a model of which a layer was replaced.
    """
    if not isinstance(model, TracedModule):
        raise TypeError(f"expected a model from interop.from_torch, found {type(model).__name__}")
    several = isinstance(names, Sequence | Mapping) and not isinstance(names, str)
    texts = [*names, *names.values()] if isinstance(names, Mapping) else names
    if not several or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"names is a list of layers' paths, or a mapping from paths to names; found {shown(names)}")
    if not names:
        raise ValueError("names is a list of layers' paths, one or more")
    recorded = model._interop
    if changed := list(replaced_paths(model, recorded.model)):
        raise ValueError(
            f"{', '.join(changed)} of the model was replaced: take the features first, and replace layers in what comes"
        )
    wanted = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
    description = dataclasses.replace(
        recorded.model,
        train=_cut(recorded.model, "train", wanted),
        eval=_cut(recorded.model, "eval", wanted),
    )
    definition, state = nnx.split(model)
    new: TracedModule = nnx.merge(definition, state, copy=True)
    new._describe(dataclasses.replace(recorded, model=description))
    return new


def _cut(model: Model, mode: str, wanted: Mapping[str, str]) -> Program:
    program: Program = getattr(model, mode)
    found, problems = {}, []
    for name, title in wanted.items():
        try:
            found[title] = value_of(program, name)
        except ValueError as error:
            problems.append(f"  {error}")
    if problems:
        raise ValueError(f"{model.name} in {mode} mode:\n" + "\n".join(problems))
    return cut(program, found)
